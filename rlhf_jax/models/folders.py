"""Hugging Face folders on disk: where they are, their JSON and tokenizer, and how they appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_jax.models.safetensors_io import pickle_refusal

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]


def local_folder(path_or_id: str | Path) -> Path:
    """The folder of a model or adapter, downloaded where there is none of this name.

    Raises:
        ValueError: neither a folder nor an id of the hub, or nothing there but pickles.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {folder}")
    # Imported where used: with transformers it takes seconds, and torch where that is installed.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name} is neither a folder here nor to be had from the Hugging Face hub: {reason}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(pickle_refusal(name, f"{name} has weights on the hub", name.split("/")[-1]))
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """ValueError where the file is absent or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}: is {path.parent} a Hugging Face model folder?") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The transformers tokenizer of the folder, None if it has none; ValueError if it has more ids than the model."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # here for the same reason as in `local_folder`

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} ids, its model only {vocab_size}: "
            "they do not belong together, take both from one checkpoint"
        )
    return tokenizer


@contextmanager
def replacing(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `folder`, which takes its place when the body has ended well.

    Raises:
        ValueError: `folder` is there and not empty, and not to be overwritten.
    """
    unfinished, old = (folder.with_name(f"{folder.name}.{state}") for state in ("unfinished", "old"))
    if folder.exists() and not overwrite and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty: remove it, or choose another folder")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    unfinished.rename(folder)
    if old.exists():
        shutil.rmtree(old)
