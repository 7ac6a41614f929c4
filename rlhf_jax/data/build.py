"""A source tokenised once: read, mapped, shared out, encoded by several threads, and kept under all that it depends on.

The threads share Python's lock, but the encoding itself, by far the most of the work, runs outside it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import places, splits
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.encode import Wanted, encode_block
from rlhf_jax.data.example import BadRow, Example, Row
from rlhf_jax.data.mapping import mapper
from rlhf_jax.data.places import content_key, read
from rlhf_jax.data.store import Store, record_batch, write

LOGGER = logging.getLogger(__name__)
ROWS_PER_BLOCK = 1024
THREADS = 4  # at most: beyond it they wait for Python's lock
BLEND = ("weight", "epochs", "max_rows")  # of a source, what its tokens do not depend on
SHOWN = 3  # messages of bad rows that are kept
T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Shares:
    """Which prompts are wanted of a place."""

    stage: tuple[float, ...] | None  # those of the stage that trains, with these shares of splits.STAGES; None: all
    held_out: float  # and those held out by hash, with this share

    def take(self, keys: np.ndarray, stage: splits.Stage) -> np.ndarray:
        """[n] bool of keys [n, 2]."""
        if self.stage is None:
            return np.ones(len(keys), bool)
        return splits.trains(keys, stage, self.stage) | splits.held_out(keys, self.held_out)


@dataclass(frozen=True)
class Tally:
    """What became of the rows of a place that are trained on, or of those that are held out by hash."""

    rows: int  # read, for whatever they serve
    share: int  # examples whose prompts fall here; what is not dropped of them is kept
    dropped: dict[str, int]  # {why: examples}
    bad: int  # rows, of which nobody knows where they would fall
    bad_shown: tuple[str, ...]  # messages of the first of them


def tokenised(
    source: SourceConfig,
    place: dict[str, Any],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    shares: Shares,
) -> tuple[Store, tuple[Tally, Tally]]:
    """The rows of a place that a stage may use, from the cache, or built and put there.

    With them comes what became of those that are trained on, and of those held out. Two processes that want the same
    build it once: the second waits. A build that is killed leaves nothing that is taken for one, and what is damaged
    later is built anew, which is said.

    Args:
        source: with its mapping resolved.
        place: the arguments of `places.read`.
    Raises:
        ValueError: more than `config.max_bad_rows` rows are bad, with the first of them; the cache cannot be written;
            and as `places.read`.
    """
    cache = cache_folder(config)
    mapping = {**dataclasses.asdict(source), **dict.fromkeys(("path", "eval_path", "eval_split", *BLEND))}
    parts = {
        "content": content_key(**place, memo=cache / "contents.json"),
        "mapping": mapping,
        "wanted": dataclasses.asdict(wanted),
        "shares": dataclasses.asdict(shares),
        "tokenizer": tokenizer_key(tokenizer),
        "code": code_key(),
    }
    folder = cache / hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
    if (kept := _kept(folder, wanted.per_row)) is None:
        try:
            with FileLock(folder.with_suffix(".lock")):
                if _kept(folder, wanted.per_row) is None:  # and no other process has built it meanwhile
                    if folder.exists():
                        LOGGER.warning(f"{folder}: these tokenised rows are damaged, and are made anew")
                        shutil.rmtree(folder)
                    _build(folder, parts, source, place, config, tokenizer, wanted, shares)
        except OSError as error:  # of what is read it would be a ValueError
            raise ValueError(unwritable(cache, error)) from error
        kept = _kept(folder, wanted.per_row)
        assert kept, folder
    store, tallies, files = kept
    # The same rows may have been read elsewhere then.
    moved = dict(zip(files, files_of(place), strict=True))
    shown = tuple(_named_anew(message, moved) for message in tallies[0].bad_shown)
    check_bad(tallies[0].bad, shown, config.max_bad_rows)
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
        tallies = [Tally(**tally) for tally in report["tallies"]]
        store, files = Store(folder / "rows.arrow", per_row, report["digest"]), report["files"]
    except (FileNotFoundError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None
    return (store, tallies, files) if len(store) == report["rows"] and len(tallies) == 2 else None


def _build(
    folder: Path,
    parts: dict,
    source: SourceConfig,
    place: dict[str, Any],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    shares: Shares,
) -> None:
    unfinished = folder.with_suffix(f".{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        source = dataclasses.replace(source, path=place["path"])  # what its examples are said to come from
        rows = itertools.islice(read(**place), source.limit or None)
        told: list[tuple[int, Tally, Tally]] = []
        batches = encoded_batches(rows, source, config, tokenizer, wanted, shares, told.append)
        digest = write(batches, unfinished / "rows.arrow", len(tokenizer))
        ((kept, *tallies),) = told
        tallies = [dataclasses.asdict(tally) for tally in tallies]
        report = {"digest": digest, "rows": kept, "tallies": tallies, "files": files_of(place), **parts}
        (unfinished / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        for path in unfinished.iterdir():  # on the disk before it has its name, as the machine may lose power
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def encoded_batches(
    rows: Iterable[Row],
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    shares: Shares,
    told: Callable[[tuple[int, Tally, Tally]], None],
) -> Iterator[pa.RecordBatch]:
    """The rows as Arrow, a block at a time in their order; `told` gets their number and the tallies of trained and held
    out when all are done.
    """
    to_examples, own = mapper(source, wanted.stage), threading.local()

    def work(block: list[Row]) -> tuple[pa.RecordBatch, np.ndarray, Counter[tuple[bool, str]], list[str]]:
        if not hasattr(own, "tokenizer"):
            own.tokenizer = copy.deepcopy(tokenizer)  # a tokenizer's settings are changed while it encodes
        examples, wheres, bad = mapped(block, to_examples)
        keys = splits.as_keys([splits.prompt_key(key_turns(example)) for example in examples])
        (taken,) = shares.take(keys, wanted.stage).nonzero()
        found = encode_block([examples[i] for i in taken], own.tokenizer, wanted)
        bad += [f"{wheres[taken[i]]}: {failure}" for i, failure in found.failures.items()]
        kept = taken[found.kept]
        numbers = [examples[i].row for i in kept]
        batch = record_batch(found.sequences, keys[kept], numbers, found.cut, wanted.per_row, len(tokenizer))
        held_out = splits.held_out(keys[taken], shares.held_out)
        good = np.delete(held_out, list(found.failures))
        dropped = Counter((bool(held_out[i]), reason) for i, reason in found.dropped.items())
        return batch, np.bincount(good, minlength=2), dropped, bad

    count = kept = bad = 0
    share, dropped = np.zeros(2, int), Counter[tuple[bool, str]]()
    shown: list[str] = []
    bar = tqdm(desc=f"{wanted.stage}: tokenising {source.path}", unit=" rows", delay=2, leave=False)
    with bar:
        for size, (batch, fallen, left_out, wrong) in in_order(work, blocks_of(rows, ROWS_PER_BLOCK)):
            bar.update(size)
            count, kept, bad = count + size, kept + len(batch) // wanted.per_row, bad + len(wrong)
            share += fallen
            dropped += left_out
            shown += wrong[: SHOWN - len(shown)]
            check_bad(bad, shown, config.max_bad_rows)
            if len(batch):
                yield batch
    trained, held_out = (
        Tally(count, int(share[i]), {why: n for (side, why), n in dropped.items() if side == i}, bad, tuple(shown))
        for i in (0, 1)
    )
    told((kept, trained, held_out))


def mapped(
    rows: Iterable[Row], to_examples: Callable[[Row], list[Example]]
) -> tuple[list[Example], list[str], list[str]]:
    """(examples, where each stands, messages of the bad rows)."""
    examples: list[Example] = []
    wheres: list[str] = []
    bad: list[str] = []
    for row in rows:
        try:
            found = to_examples(row)
        except BadRow as error:
            bad.append(str(error))
            continue
        examples += found
        wheres += [row.where] * len(found)
    return examples, wheres, bad


def key_turns(example: Example):
    """What the split looks at: the prompt, or of a document its text."""
    return example.turns or (("", example.text),)


def check_bad(count: int, shown: Sequence[str], limit: int) -> None:
    """ValueError with the first bad rows where there are more than `limit`."""
    if count > limit:
        faults: dict[str, list[str]] = {}  # one that many rows have is told once, behind their places
        for message in shown:
            place, _, fault = message.partition(": ")
            faults.setdefault(fault, []).append(place)
        told = "; ".join(f"{', '.join(places)}: {fault}" for fault, places in faults.items())
        more = f" (data.max_bad_rows = {limit}, and there are more)" if limit else ""
        raise ValueError(f"{told}{more}. Mend the data, or raise data.max_bad_rows to leave such rows out")


def blocks_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


def in_order(work: Callable[[list[T]], R], blocks: Iterable[list[T]]) -> Iterator[tuple[int, R]]:
    """(size, work(block)) of each block in order, with a few blocks under way at a time."""
    threads = max(1, min(THREADS, os.cpu_count() or 1))
    waiting: deque = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for block in blocks:
            waiting.append((len(block), pool.submit(work, block)))
            if len(waiting) > threads + 1:
                size, future = waiting.popleft()
                yield size, future.result()
        while waiting:
            size, future = waiting.popleft()
            yield size, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
    parts = [backend, tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items())]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@functools.cache
def code_key() -> str:
    """Digest of this room's code: what an older version has built is not taken for what this one would."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.*")):
        if path.suffix in (".py", ".toml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
