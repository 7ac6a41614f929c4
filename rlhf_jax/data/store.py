"""Tokenized rows in a memory-mapped Arrow file, so that memory does not grow with the data."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rlhf_jax.data.chat_template import Encoding

READ_BEFORE_RELEASE = 64 * 2**20  # bytes read of a file before its pages are released


def record_batch(
    sequences: Sequence[Encoding],
    keys: np.ndarray,
    numbers: Sequence[int],
    cut: Sequence[bool],
    per_row: int,
    vocab_size: int,
) -> pa.RecordBatch:
    """Rows as Arrow: one record per sequence, the `per_row` sequences of a row one after the other.

    Args:
        keys: [rows, 2] uint64, of `splits.as_keys`.
        numbers: [rows], the row's number in its source.
        cut: [rows], whether a sequence of the row was cut.
        vocab_size: decides whether a token takes two bytes or four.
    """
    assert len(sequences) == len(keys) * per_row == len(numbers) * per_row == len(cut) * per_row
    kind = np.uint16 if vocab_size <= 2**16 else np.int32
    assert all(not each.tokens.size or int(each.tokens.max()) <= np.iinfo(kind).max for each in sequences)
    spans = [each.spans.reshape(-1) for each in sequences]
    keys = np.repeat(keys, per_row, axis=0)
    columns = {
        "tokens": _lists([each.tokens for each in sequences], kind),
        "spans": _lists(spans, np.int32),
        "held_key": pa.array(keys[:, 0], pa.uint64()),
        "stage_key": pa.array(keys[:, 1], pa.uint64()),
        "score": pa.array([each.score for each in sequences], pa.float32()),
        "number": pa.array(np.repeat(np.array(numbers, np.int64), per_row)),
        "cut": pa.array(np.repeat(np.array(cut, np.uint8), per_row)),
    }
    return pa.RecordBatch.from_pydict(columns)


def _lists(arrays: Sequence[np.ndarray], kind: type) -> pa.ListArray:
    flat = np.concatenate([np.zeros(0, kind), *arrays]).astype(kind)
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def write_store(batches: Iterable[pa.RecordBatch], sink: str | Path | pa.BufferOutputStream, vocab_size: int) -> str:
    """Write the batches as one Arrow file and return a digest of their tokens, spans and scores."""
    schema = record_batch([], np.zeros((0, 2), np.uint64), [], [], 1, vocab_size).schema
    digest = hashlib.blake2b(digest_size=16)
    with pa.ipc.new_file(str(sink) if isinstance(sink, Path) else sink, schema) as file:
        for batch in batches:
            file.write_batch(batch)
            for name in ("tokens", "spans"):
                column = batch.column(name)
                digest.update(np.diff(column.offsets.to_numpy()).tobytes())
                digest.update(column.values.to_numpy().tobytes())
            digest.update(batch.column("score").to_numpy().tobytes())
    return digest.hexdigest()


class Store:
    """The rows of such a file. Of a file on disk only the pages that are read come into memory, until `release`."""

    def __init__(self, place: Path | pa.Buffer, per_row: int, digest: str):
        self.per_row, self.digest = per_row, digest
        self._map: mmap.mmap | None = None
        if isinstance(place, Path):
            with open(place, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            place = pa.py_buffer(self._map)
        file = pa.ipc.open_file(pa.BufferReader(place))
        self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])
        self._lists = [
            tuple(part.to_numpy() for name in ("tokens", "spans") for part in (batch[name].offsets, batch[name].values))
            for batch in self._batches
        ]
        self._scores = [batch["score"].to_numpy() for batch in self._batches]
        lengths = [np.diff(offsets) for offsets, *_ in self._lists]
        self.lengths = np.concatenate([np.zeros(0, np.int32), *lengths]).reshape(-1, per_row)  # [rows, per_row] int32
        self._read = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def keys(self) -> np.ndarray:
        """[rows, 2] uint64."""
        return np.stack([self._column(name, np.uint64) for name in ("held_key", "stage_key")], axis=1)

    def numbers(self) -> np.ndarray:
        """[rows] int64: the row's number in its source."""
        return self._column("number", np.int64)

    def cut(self) -> np.ndarray:
        """[rows] bool: a sequence of the row was cut."""
        return self._column("cut", np.uint8).astype(bool)

    def _column(self, name: str, kind: type) -> np.ndarray:
        columns = [np.zeros(0, kind), *(batch[name].to_numpy() for batch in self._batches)]
        return np.concatenate(columns)[:: self.per_row]

    def row(self, index: int) -> list[Encoding]:
        """The sequences of a row; their arrays are views of the file."""
        first = index * self.per_row
        return [self._sequence(s) for s in range(first, first + self.per_row)]

    def _sequence(self, index: int) -> Encoding:
        at = int(np.searchsorted(self._starts, index, side="right")) - 1
        i = index - int(self._starts[at])
        token_offsets, tokens, span_offsets, spans = self._lists[at]
        part = tokens[token_offsets[i] : token_offsets[i + 1]]
        self._read += max(part.nbytes, mmap.PAGESIZE)
        score = float(self._scores[at][i])
        return Encoding(part, spans[span_offsets[i] : span_offsets[i + 1]].reshape(-1, 2), score)

    def release(self) -> None:
        """Release the pages once READ_BEFORE_RELEASE bytes were read; the system loads them again when needed."""
        if self._map is not None and self._read > READ_BEFORE_RELEASE:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


def memory_store(batches: Iterable[pa.RecordBatch], per_row: int, vocab_size: int) -> Store:
    """A store without a file."""
    sink = pa.BufferOutputStream()
    digest = write_store(batches, sink, vocab_size)
    return Store(sink.getvalue(), per_row, digest)
