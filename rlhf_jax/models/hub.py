"""Hugging Face folders on disk: where they are, their JSON and tokenizer, and how they appear whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_jax import hosts
from rlhf_jax.hub_access import hub_obstacle
from rlhf_jax.models.tokenizer_files import open_tokenizer

LOGGER = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "vocab.txt", "merges.txt", "*.jinja"]
_PICKLES = ["pytorch_model.bin", "pytorch_model*-of-*.bin", "adapter_model.bin"]
# Those of the requests in which the hub's own converter offers safetensors; transformers checks the same.
_CONVERTER, _CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
_NOT_HF = ["consolidated*", "original/*"]  # the same weights again, in a layout of their authors


def local_folder(path_or_id: str | Path) -> Path:
    """The folder of a model or adapter, downloaded where there is none of this name.

    Of the hub these weights are taken: safetensors; else those that the hub's converter offers in an open pull request;
    else pickles, of which no code is run.

    Raises:
        ValueError: neither a folder nor an id of the hub, or no weights there.
    """
    if is_folder(path_or_id):
        return Path(path_or_id).expanduser()
    # Imported where used: with transformers it takes seconds, and torch where that is installed.
    from huggingface_hub import snapshot_download

    name = str(path_or_id)
    with _hub_errors(f"{name} is neither a folder here"):
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HF))
        if any(folder.glob("*.safetensors")):
            return folder
        obstacle = hub_obstacle()
        # Noted in the cache, where nothing shows who opened a pull request: without network it is known by this alone.
        note = folder.parents[1] / "refs" / f"safetensors-of-{folder.name}"
        revision = note.read_text() if note.exists() else None if obstacle else conversion_revision(name)
        if revision:
            LOGGER.info(f"{name} has no safetensors: those of {_CONVERTER}'s pull request, {revision}, are read")
            files = dict(allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HF)
            converted = Path(snapshot_download(name, revision=revision, **files))
            note.write_text(converted.name)
            return converted
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES + _PICKLES, ignore_patterns=_NOT_HF))
    if any(match for pattern in _PICKLES for match in folder.glob(pattern)):
        LOGGER.info(f"{name} has no safetensors: its pickles are read, without running any code of them")
        return folder
    if obstacle:
        raise ValueError(f"{name} is in the cache without its weights, and {obstacle}: download it first")
    raise ValueError(f"{name} has neither safetensors nor {' nor '.join(_PICKLES)} on the hub: choose another model")


def conversion_revision(name: str) -> str | None:
    """The revision "refs/pr/N" of the open pull request of the hub's converter that adds safetensors to what the main
    branch holds now; None where there is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    newest, wanted = api.list_repo_commits(name)[0].commit_id, dict(author=_CONVERTER, discussion_status="open")
    try:
        requests = list(api.get_repo_discussions(name, discussion_type="pull_request", **wanted))
    except HfHubHTTPError as error:  # a repository may have them turned off
        LOGGER.info(f"{name}: its pull requests cannot be listed ({str(error).splitlines()[0]})")
        return None
    for request in requests:
        # Asked of the hub already, but the author is what makes the files trustworthy.
        if (request.author, request.title, request.status) == (_CONVERTER, _CONVERSION, "open"):
            commits = api.list_repo_commits(name, revision=request.git_reference)
            if newest in [commit.commit_id for commit in commits[1:2]]:
                return f"refs/pr/{request.num}"
    return None


def config_json(path_or_id: str | Path) -> dict[str, Any]:
    """config.json of a folder, or of a hub id: that one file, from the cache where it is there.

    Raises:
        ValueError: not to be had, or no JSON.
    """
    if is_folder(path_or_id):
        return read_json(Path(path_or_id).expanduser() / "config.json")
    from huggingface_hub import hf_hub_download  # here for the same reason as in `local_folder`

    with _hub_errors(f"config.json of {path_or_id} is neither in a folder here"):
        return read_json(Path(hf_hub_download(str(path_or_id), "config.json")))


def is_folder(path_or_id: str | Path) -> bool:
    """Whether there is a folder of this name; ValueError where there is none and it cannot be an id of the hub."""
    folder, name = Path(path_or_id).expanduser(), str(path_or_id)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1):
        raise ValueError(f"there is no folder {folder}")
    return folder.is_dir()


@contextmanager
def _hub_errors(neither: str) -> Iterator[None]:
    """Raise what the hub refuses as a ValueError, whose message begins with `neither`."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    obstacle = hub_obstacle()
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        is_absent = isinstance(error, LocalEntryNotFoundError)  # in the cache, while the hub cannot be asked
        reason = obstacle if is_absent and obstacle else str(error).splitlines()[0]
        raise ValueError(f"{neither} nor to be had from the Hugging Face hub: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """ValueError where the file is absent or no JSON."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}: is {path.parent} a Hugging Face model folder?") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file, by the main process."""
    if not hosts.is_main():
        return
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The transformers tokenizer of the folder, None if it has none.

    Where it has more ids than the model, as Gemma 3's of text alone and CodeLlama 34B's, its attribute `num_rows` is
    the model's number: texts with an id beyond are refused when they come.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    tokenizer = open_tokenizer(folder)
    processor = folder / "chat_template.json"  # where processors of multimodal models kept it before transformers 4.51
    if tokenizer.chat_template is None and processor.exists():
        tokenizer.chat_template = read_json(processor).get("chat_template")
    if len(tokenizer) > vocab_size:
        more = f"the tokenizer of {folder} has {len(tokenizer)} ids, its model only {vocab_size}"
        LOGGER.warning(f"{more}: texts with an id beyond these are refused")
        tokenizer.num_rows = vocab_size
    return tokenizer


def check_absent(folder: Path) -> None:
    """Raise ValueError where there is something already."""
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: remove it, or choose another folder")


@contextmanager
def replace_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder next to `folder`, which replaces it when the body has ended, on every process, without an exception.

    Raises:
        ValueError: `folder` is there and not empty, and not to be overwritten.
    """
    folder = folder.absolute()
    # Hidden names, under which users keep nothing.
    unfinished, old = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "old"))

    def begin() -> None:
        if not overwrite:
            check_absent(folder)
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)

    def end() -> None:
        if folder.exists():
            if old.exists():
                shutil.rmtree(old)
            folder.rename(old)
        unfinished.rename(folder)
        if old.exists():
            shutil.rmtree(old)

    hosts.on_main(begin)
    try:
        yield unfinished
    except BaseException:
        if hosts.is_main():
            shutil.rmtree(unfinished)
        raise
    hosts.barrier()
    hosts.on_main(end)
