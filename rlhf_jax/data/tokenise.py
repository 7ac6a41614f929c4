"""Rows of a place to token sequences, a block at a time: mapped, shared out, and encoded by several threads.

The threads share Python's lock, but the encoding itself, by far the most of the work, runs outside it.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import splits
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.encode import Wanted, encode_block
from rlhf_jax.data.example import BadRow, Example, Row, Turns
from rlhf_jax.data.mapping.mapper import mapper
from rlhf_jax.data.store import record_batch

ROWS_PER_BLOCK = 512  # measured: smaller ones cost calls, larger ones memory that is cold
THREADS = 8  # at most: a third of a row's time is Python's, under its lock
SHOWN = 3  # messages of bad rows that are kept
T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Shares:
    """Which prompts are wanted of a place."""

    name: str  # of those that are trained on, in `split`; "": all
    split: Mapping[str, float]
    held_out: float = 0.0  # and those held out by hash, with this share
    left_out: float = 0.0  # but not those held out by hash with this share
    seed: int = 0  # of the split

    def take(self, keys: np.ndarray) -> np.ndarray:
        """[n] bool of keys [n, 2]."""
        if not self.name:
            return np.ones(len(keys), bool)
        taken = splits.trains(keys, self.name, self.split) | splits.held_out(keys, self.held_out)
        return taken & ~splits.held_out(keys, self.left_out)


@dataclass(frozen=True)
class Tally:
    """What became of the rows of a place that are trained on, or of those that are held out by hash."""

    rows: int = 0  # read, for whatever they serve
    share: int = 0  # examples whose prompts fall here; what is not dropped of them is kept
    dropped: dict[str, int] = field(default_factory=dict)  # {why: examples}
    bad: int = 0  # rows, of which nobody knows where they would fall
    bad_shown: tuple[str, ...] = ()  # messages of the first of them

    def plus(self, other: Tally) -> Tally:
        return Tally(
            self.rows + other.rows,
            self.share + other.share,
            dict(Counter(self.dropped) + Counter(other.dropped)),
            self.bad + other.bad,
            (*self.bad_shown, *other.bad_shown)[:SHOWN],
        )


def tally_of(report: dict[str, Any]) -> Tally:
    """The tally that JSON holds."""
    return Tally(**{**report, "bad_shown": tuple(report["bad_shown"])})


class EncodedBlock(NamedTuple):
    batch: pa.RecordBatch  # of the rows that are kept
    trained: Tally
    held_out: Tally  # of those held out by hash


def encoded_blocks(
    rows: Iterable[Row],
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    shares: Shares,
) -> Iterator[EncodedBlock]:
    """The rows by blocks of ROWS_PER_BLOCK, in their order."""
    to_examples, own = mapper(source, wanted.kind), threading.local()

    def work(block: list[Row]) -> EncodedBlock:
        if not hasattr(own, "tokenizer"):
            own.tokenizer = copy.deepcopy(tokenizer)  # a tokenizer's settings are changed while it encodes
        examples, wheres, bad = mapped(block, to_examples)
        keys = splits.as_keys([splits.prompt_key(key_turns(example)) for example in examples], shares.seed)
        (taken,) = shares.take(keys).nonzero()
        found = encode_block([examples[i] for i in taken], own.tokenizer, wanted)
        bad += [f"{wheres[taken[i]]}: {failure}" for i, failure in found.failures.items()]
        kept = taken[found.kept]
        numbers = [examples[i].row for i in kept]
        batch = record_batch(found.sequences, keys[kept], numbers, found.cut, wanted.per_row, len(tokenizer))
        held_out = splits.held_out(keys[taken], shares.held_out)
        share = np.bincount(np.delete(held_out, list(found.failures)), minlength=2).tolist()
        dropped = [Counter(why for i, why in found.dropped.items() if held_out[i] == side) for side in (0, 1)]
        sides = [Tally(len(block), share[i], dict(dropped[i]), len(bad), tuple(bad[:SHOWN])) for i in (0, 1)]
        return EncodedBlock(batch, *sides)

    return in_order(work, blocks_of(rows, ROWS_PER_BLOCK))


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


def key_turns(example: Example) -> Turns:
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


def in_order(work: Callable[[list[T]], R], blocks: Iterable[list[T]]) -> Iterator[R]:
    """work(block) of each block in order, with a few blocks under way at a time."""
    threads = min(THREADS, (os.cpu_count() or 1) + 1)  # one more than cores, as one waits for the lock
    waiting: deque = deque()
    pool = ThreadPoolExecutor(threads)
    set_before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each thread encodes alone, which keeps the cores busier
    try:
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if set_before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = set_before
