"""Tokenizes each source once and caches the result under a key of everything that its tokens depend on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from rlhf_jax.data import sources, splits
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.mapping import make_mapper, provides
from rlhf_jax.data.records import KINDS, Row
from rlhf_jax.data.rendering import dated_template
from rlhf_jax.data.sources import content_key, has_eval, limit_of, place_of, read_rows
from rlhf_jax.data.store import Store, write_store
from rlhf_jax.data.tokenize import (
    ROWS_PER_BLOCK,
    Job,
    RowStats,
    check_bad_rows,
    encode_blocks,
    keys_of,
    map_rows,
    parse_row_stats,
    split_blocks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
# Keys of a source that its tokens do not depend on: its place, and how often it is drawn.
NO_MAPPING = ("path", "name", "split", "eval_path", "eval_split", "stream", "limit", "weight", "epochs", "max_rows")


def key_parts(job: Job, content: Any) -> dict[str, Any]:
    """Everything that the tokens depend on, JSON-serialisable; `content` identifies the contents of the place."""
    config = job.config
    prompts = [job.spec.share, *config.split.items(), config.held_out, job.is_streamed, has_eval(job.source)]
    return {
        "content": content,
        "mapping": {**dataclasses.asdict(job.source), **dict.fromkeys(NO_MAPPING)},
        "limit": job.limit,
        "wanted": [
            job.spec.kind,
            job.spec.answers,
            job.spec.learn,
            config.max_prompt_length,
            config.max_length,
            config.long_rows,
        ],
        "prompts": [config.split_seed, *([] if job.takes_all else prompts)],
        "tokenizer": tokenizer_key(job.tokenizer),
        "code": code_key(),
    }


def folder_of(cache: Path, parts: dict[str, Any]) -> Path:
    """Cache folder for these key parts."""
    return cache / hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def load_or_tokenize(job: Job) -> tuple[Store, tuple[RowStats, RowStats]]:
    """The usable rows of a place, from the cache, or built and cached.

    Also returns the statistics of the training rows and those of the held-out rows. Two processes that need the same
    entry build it once: the second waits. A build that is killed leaves nothing that could be mistaken for a complete
    one; a damaged entry is rebuilt and a warning logged.

    Raises:
        ValueError: more than `data.max_bad_rows` rows are bad, with the first of them; the cache cannot be written;
            and as `sources.read_rows`.
    """
    cache, per_row = cache_folder(job.config), job.spec.per_row
    parts = key_parts(job, content_key(**job.place, memo=cache / "contents.json"))
    folder = folder_of(cache, parts)
    if (kept := _load_entry(folder, per_row)) is None:
        try:
            with FileLock(folder.with_suffix(".lock")):
                if _load_entry(folder, per_row) is None:  # and no other process has built it meanwhile
                    if folder.exists():
                        LOGGER.warning(f"{folder}: these tokenized rows are damaged and are rebuilt")
                        shutil.rmtree(folder)
                    _build(folder, parts, job)
        except OSError as error:  # an error while reading a source would be a ValueError
            raise ValueError(unwritable_message(cache, error)) from error
        kept = _load_entry(folder, per_row)
        assert kept, folder
    store, tallies, files = kept
    # The entry may have been built from the same files at other paths.
    moved = dict(zip(files, place_files(job.place), strict=True))
    shown = tuple(_with_current_paths(message, moved) for message in tallies[0].bad_shown)
    check_bad_rows(tallies[0].bad, shown, job.config.max_bad_rows)
    trained, held_out = (dataclasses.replace(tally, bad_shown=shown) for tally in tallies)
    return store, (trained, held_out)


def place_files(place: dict[str, Any]) -> list[str]:
    """The files of a place; [] for a hub data set and for the built-in set."""
    return sources.source_files(place["path"], place["split"]) or []


def _with_current_paths(message: str, moved: dict[str, str]) -> str:
    """The message of a bad row, which begins with the path of its file, with the current path of that file."""
    for old, new in moved.items():
        if message.startswith(f"{old}, "):
            return new + message.removeprefix(old)
    return message


def _load_entry(folder: Path, per_row: int) -> tuple[Store, list[RowStats], list[str]] | None:
    """Rows, statistics and source files of a cache folder; None where there is none, or a damaged one."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        tallies = [parse_row_stats(tally) for tally in report["tallies"]]
        store, files = Store(folder / "rows.arrow", per_row, report["digest"]), report["files"]
    except (FileNotFoundError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None
    return (store, tallies, files) if len(store) == report["rows"] and len(tallies) == 2 else None


def _build(folder: Path, parts: dict[str, Any], job: Job) -> None:
    unfinished = folder.with_suffix(f".{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        rows = itertools.islice(read_rows(**job.place), job.limit)
        if any(map(has_eval, job.config.sources)) and (job.takes_all or not has_eval(job.source)):
            rows = record_keys(rows, job.source, job.config)
        bar_text = f"{job.spec.share}: tokenizing {job.place['path']}"
        kept, tallies = 0, [RowStats(), RowStats()]

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal kept, tallies
            with tqdm(desc=bar_text, unit=" rows", delay=2, disable=None) as bar:
                for batch, *sides in encode_blocks(rows, job):
                    bar.update(sides[0].rows)
                    tallies = [before.plus(here) for before, here in zip(tallies, sides, strict=True)]
                    check_bad_rows(tallies[0].bad, tallies[0].bad_shown, job.config.max_bad_rows)
                    kept += len(batch) // job.spec.per_row
                    if len(batch):
                        yield batch

        digest = write_store(batches(), unfinished / "rows.arrow", len(job.tokenizer))
        reported = [dataclasses.asdict(tally) for tally in tallies]
        report = {"digest": digest, "rows": kept, "tallies": reported, "files": place_files(job.place), **parts}
        (unfinished / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        for path in unfinished.iterdir():  # on the disk before it has its name, because the machine may lose power
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def withheld_keys(config: DataConfig) -> np.ndarray:
    """[n] uint64, first words of the keys of prompts that some source holds out and another might train on.

    A prompt that is held out by hash is held out in all sources without evaluation set, so no list is needed where
    none has one.
    """
    is_needed = any(map(has_eval, config.sources))
    listed = [each for each in config.sources if has_eval(each) or (is_needed and not each.stream)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *(held_keys(each, config) for each in listed)]))


def held_keys(source: SourceConfig, config: DataConfig) -> np.ndarray:
    """[n] uint64, first words of the keys of the prompts that a source holds out, cached once the source was read.

    Raises:
        ValueError: more than `data.max_bad_rows` rows have no prompt; and as `sources.read_rows`.
    """
    if (report := _json(keys_path(source, config))) is None:
        place = place_of(source, config, held_out=True)
        deque(record_keys(itertools.islice(read_rows(**place), limit_of(source, place)), source, config), maxlen=0)
        report = _json(keys_path(source, config))
    check_bad_rows(report["bad"], report["bad_shown"], config.max_bad_rows)
    return np.array(report["keys"], np.uint64)


def record_keys(rows: Iterable[Row], source: SourceConfig, config: DataConfig) -> Iterator[Row]:
    """The rows of a source's held-out place, or of a source without one; after the last, `held_keys` are in the cache.

    Rows of every kind count. Every kind needs a prompt, so a row without one is bad; yet a row that is bad as a prompt
    may still give a pair to evaluate on.
    """
    here = dataclasses.replace(source, path=place_of(source, config, held_out=True)["path"])
    mappers = [make_mapper(here, kind) for kind in reversed(KINDS) if provides(here, kind)]
    found, tally = [np.zeros(0, np.uint64)], RowStats()
    for block in split_blocks(rows, ROWS_PER_BLOCK):
        yield from block
        for number, to_examples in enumerate(mappers):
            examples, _, bad = map_rows(block, to_examples)
            keys = keys_of(examples, config.split_seed)
            found.append(keys[has_eval(source) | splits.is_held_out(keys, config.held_out), 0])
            if not number:
                tally = tally.plus(RowStats(bad=len(bad), bad_shown=tuple(bad)))
    report = {"keys": np.unique(np.concatenate(found)).tolist(), "bad": tally.bad, "bad_shown": tally.bad_shown}
    path = keys_path(source, config)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        unfinished.write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
        unfinished.rename(path)
    except OSError as error:
        raise ValueError(unwritable_message(path.parent, error)) from error


def keys_path(source: SourceConfig, config: DataConfig) -> Path:
    """Where the cache keeps the keys of the prompts that a source holds out."""
    place, cache = place_of(source, config, held_out=True), cache_folder(config)
    parts = {
        "content": content_key(**place, memo=cache / "contents.json"),
        "place": place,
        "mapping": {**dataclasses.asdict(source), **dict.fromkeys(NO_MAPPING)},
        "limit": limit_of(source, place),
        "held_out": [config.split_seed, has_eval(source) or config.held_out],
        "code": code_key(),
    }
    return folder_of(cache, parts).with_suffix(".keys")


def _json(path: Path) -> dict[str, Any] | None:
    """The contents of a JSON file; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def cache_folder(config: DataConfig) -> Path:
    """The folder of tokenized rows, created if it does not exist. ValueError if that fails."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(config.cache_dir).expanduser() if config.cache_dir else caches / "rlhf_jax" / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(unwritable_message(folder, error)) from error
    return folder


def unwritable_message(folder: Path, error: OSError) -> str:
    what = error.strerror or error
    return f"{folder}: tokenized rows cannot be stored there ({what}); name another folder in data.cache_dir"


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything in a tokenizer that its encoding depends on."""
    backend = tokenizer.backend_tokenizer.to_str()
    versions = [metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
    templates = tokenizer.chat_template
    listed = templates.values() if isinstance(templates, dict) else [templates]
    dated = [dated_template(tokenizer, template) for template in listed if "strftime_now" in (template or "")]
    parts = [backend, templates, *dated, sorted(tokenizer.special_tokens_map.items()), versions]
    parts += [tokenizer.num_rows] if hasattr(tokenizer, "num_rows") else []
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@functools.cache
def code_key() -> str:
    """Digest of the code of this folder, so that entries of an older version are not reused."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.*")):
        if path.suffix in (".py", ".toml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
