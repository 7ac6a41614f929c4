"""A source tokenised once, and kept under all that its tokens depend on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.encode import Wanted
from rlhf_jax.data.example import Row
from rlhf_jax.data.reading import places
from rlhf_jax.data.reading.places import content_key, read
from rlhf_jax.data.store import Store, write
from rlhf_jax.data.tokenise import EncodedBlock, Shares, Tally, check_bad, encoded_blocks, tally_of

LOGGER = logging.getLogger(__name__)
# Of a source, what its tokens do not depend on: where it lies, and how often it is drawn. `Job.limit` is told apart.
NO_MAPPING = ("path", "name", "split", "eval_path", "eval_split", "stream", "limit", "weight", "epochs", "max_rows")


@dataclass(frozen=True)
class Job:
    """What is to be tokenised, of what, and how."""

    source: SourceConfig  # with its mapping resolved
    place: dict[str, Any]  # the arguments of `places.read`
    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    wanted: Wanted
    shares: Shares
    share: str  # whose rows they are, for messages

    @property
    def limit(self) -> int | None:
        """Rows that are read of the place, at most; None, all, of a place of held-out rows."""
        return limit_of(self.source, self.place)

    def parts(self, content: Any) -> dict[str, Any]:
        """All that the tokens depend on, as JSON holds it; `content` says what is in the place."""
        mapping = {**dataclasses.asdict(self.source), **dict.fromkeys(NO_MAPPING)}
        return {
            "content": content,
            "mapping": mapping,
            "limit": self.limit,
            "wanted": dataclasses.asdict(self.wanted),
            "shares": dataclasses.asdict(self.shares),
            "tokenizer": tokenizer_key(self.tokenizer),
            "code": code_key(),
        }

    def blocks(self, rows: Iterable[Row]) -> Iterator[EncodedBlock]:
        """The rows of the place, encoded; the path of the place is what its examples are said to come from."""
        source = dataclasses.replace(self.source, path=self.place["path"])
        return encoded_blocks(rows, source, self.tokenizer, self.wanted, self.shares)


def folder_of(cache: Path, parts: dict[str, Any]) -> Path:
    """Where in the cache stands what depends on these parts."""
    return cache / hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def tokenised(job: Job) -> tuple[Store, tuple[Tally, Tally]]:
    """The rows of a place that may be used, from the cache, or built and put there.

    With them comes what became of those that are trained on, and of those held out. Two processes that want the same
    build it once: the second waits. A build that is killed leaves nothing that is taken for one, and what is damaged
    later is built anew, which is said.

    Raises:
        ValueError: more than `data.max_bad_rows` rows are bad, with the first of them; the cache cannot be written;
            and as `places.read`.
    """
    cache, per_row = cache_folder(job.config), job.wanted.per_row
    parts = job.parts(content_key(**job.place, memo=cache / "contents.json"))
    folder = folder_of(cache, parts)
    if (kept := _kept(folder, per_row)) is None:
        try:
            with FileLock(folder.with_suffix(".lock")):
                if _kept(folder, per_row) is None:  # and no other process has built it meanwhile
                    if folder.exists():
                        LOGGER.warning(f"{folder}: these tokenised rows are damaged, and are made anew")
                        shutil.rmtree(folder)
                    _build(folder, parts, job)
        except OSError as error:  # of what is read it would be a ValueError
            raise ValueError(unwritable(cache, error)) from error
        kept = _kept(folder, per_row)
        assert kept, folder
    store, tallies, files = kept
    # The same rows may have been read elsewhere then.
    moved = dict(zip(files, files_of(job.place), strict=True))
    shown = tuple(_named_anew(message, moved) for message in tallies[0].bad_shown)
    check_bad(tallies[0].bad, shown, job.config.max_bad_rows)
    trained, held_out = (dataclasses.replace(tally, bad_shown=shown) for tally in tallies)
    return store, (trained, held_out)


def files_of(place: dict[str, Any]) -> list[str]:
    """The files of a place; none of the hub and of the built-in set."""
    is_builtin = place["path"].startswith("builtin:")
    return [] if is_builtin else places.files_of(place["path"], place["split"]) or []


def _named_anew(message: str, moved: dict[str, str]) -> str:
    """The message of a bad row, which begins with its file, with the place where that file lies now."""
    for old, new in moved.items():
        if message.startswith(f"{old}, "):
            return new + message.removeprefix(old)
    return message


def _kept(folder: Path, per_row: int) -> tuple[Store, list[Tally], list[str]] | None:
    """What such a folder holds, with the files that it is of; None where there is none, or one that is damaged."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        tallies = [tally_of(tally) for tally in report["tallies"]]
        store, files = Store(folder / "rows.arrow", per_row, report["digest"]), report["files"]
    except (FileNotFoundError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None
    return (store, tallies, files) if len(store) == report["rows"] and len(tallies) == 2 else None


def _build(folder: Path, parts: dict[str, Any], job: Job) -> None:
    unfinished = folder.with_suffix(f".{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        rows = itertools.islice(read(**job.place), job.limit)
        bar_text = f"{job.share}: tokenising {job.place['path']}"
        kept, tallies = 0, [Tally(), Tally()]

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal kept, tallies
            with tqdm(desc=bar_text, unit=" rows", delay=2, disable=None) as bar:
                for batch, *sides in job.blocks(rows):
                    bar.update(sides[0].rows)
                    tallies = [before.plus(here) for before, here in zip(tallies, sides, strict=True)]
                    check_bad(tallies[0].bad, tallies[0].bad_shown, job.config.max_bad_rows)
                    kept += len(batch) // job.wanted.per_row
                    if len(batch):
                        yield batch

        digest = write(batches(), unfinished / "rows.arrow", len(job.tokenizer))
        told = [dataclasses.asdict(tally) for tally in tallies]
        report = {"digest": digest, "rows": kept, "tallies": told, "files": files_of(job.place), **parts}
        (unfinished / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        for path in unfinished.iterdir():  # on the disk before it has its name, as the machine may lose power
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def limit_of(source: SourceConfig, place: dict[str, Any]) -> int | None:
    """How many rows are read of a place: all of a place of held-out rows."""
    is_own = (place["path"], place["split"]) == (source.path, source.split)
    return source.limit or None if is_own else None


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised rows are kept; it is made. ValueError if it cannot be."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(config.cache_dir).expanduser() if config.cache_dir else caches / "rlhf_jax" / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(unwritable(folder, error)) from error
    return folder


def unwritable(folder: Path, error: OSError) -> str:
    what = error.strerror or error
    return f"{folder}: tokenised rows cannot be kept there ({what}); name another folder in data.cache_dir"


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all of a tokenizer that its encoding depends on."""
    backend = tokenizer.backend_tokenizer.to_str()
    versions = [metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
    parts = [backend, tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items()), versions]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@functools.cache
def code_key() -> str:
    """Digest of this room's code: what an older version has built is not taken for what this one would."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.*")):
        if path.suffix in (".py", ".toml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
