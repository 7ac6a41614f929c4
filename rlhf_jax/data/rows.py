"""The rows that a stage trains on or is evaluated on, of one source and of all."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlhf_jax.data.chat_template import Encoding
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.mixture import draw_rows
from rlhf_jax.data.packing import Bins, pack
from rlhf_jax.data.store import Store
from rlhf_jax.data.stream import StreamRows
from rlhf_jax.data.tokenize import RowStats


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source that are used."""

    source: SourceConfig
    store: Store
    selected: np.ndarray  # [rows] int32, which rows of the store
    stats: RowStats
    bins: Bins | None = None  # of packed rows: which of `selected` share a row

    def __len__(self) -> int:
        return len(self.selected) if self.bins is None else len(self.bins)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows, per_row] int32, tokens of each sequence; of a packed row, of all its documents together."""
        lengths = self.store.lengths[self.selected]
        if self.bins is None:
            return lengths
        ends = np.cumsum(np.concatenate([[0], lengths[self.bins.members, 0]]), dtype=np.int64)[self.bins.offsets]
        return np.diff(ends).astype(np.int32)[:, None]

    @property
    def cut(self) -> int:
        """Documents of which a sequence was cut."""
        return int(self.store.cut()[self.selected].sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.store.lengths[self.selected].max(initial=0))

    @property
    def longest_row(self) -> int:
        return int(self.lengths.max(initial=0))

    @property
    def digest(self) -> str:
        """A digest of every token of every row, and of the selection."""
        picked = hashlib.blake2b(np.ascontiguousarray(self.selected).tobytes(), digest_size=16).hexdigest()
        return f"{self.store.digest} {picked} {len(self)}"

    def row_lengths(self, rows: np.ndarray) -> np.ndarray:
        """[n] tokens of the longest sequence of each of rows [n]."""
        return self.lengths[rows].max(axis=1)

    def number(self, row: int) -> int:
        """A row's number in its source; of a packed row, that of its first document."""
        first = row if self.bins is None else self.bins.members[self.bins.offsets[row]]
        return int(self.store.numbers()[self.selected[first]])

    def release(self) -> None:
        self.store.release()

    def documents(self, row: int) -> list[list[Encoding]]:
        """The documents of a row end to end, one or those of a bin; each is the list of its sequences."""
        if self.bins is None:
            return [self.store.row(int(self.selected[row]))]
        members = self.bins.members[self.bins.offsets[row] : self.bins.offsets[row + 1]]
        return [self.store.row(int(self.selected[member])) for member in members]


@dataclass(frozen=True)
class Rows:
    """Rows of one or two token sequences each. The length is the number of draws in one epoch of the mixture."""

    parts: tuple[SourceRows | StreamRows, ...]
    per_row: int
    quota: tuple[int, ...]  # draws of each part in an epoch
    report: str  # "1,735 rows, 12 dropped: prompt over 256 tokens, 3 cut at 512 tokens"

    def __len__(self) -> int:
        return sum(self.quota)

    def draw(self, seed: int, epoch: int, positions: np.ndarray, *, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
        """(part, row of that part), [n] int64 each, for positions [n] of an epoch: `mixture.draw_rows`."""
        streams = [isinstance(part, StreamRows) for part in self.parts]
        sizes = list(map(len, self.parts))
        return draw_rows(sizes, self.quota, seed, epoch, positions, endless=streams, shuffle=shuffle)

    @property
    def endless(self) -> bool:
        """Whether a source is streamed, so that epochs are meaningless."""
        return any(isinstance(part, StreamRows) for part in self.parts)

    @property
    def is_packed(self) -> bool:
        return any(part.bins is not None for part in self.parts)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document: positions that a model needs."""
        return max(part.longest for part in self.parts)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every token of every row, and of the draws of each part."""
        digest = hashlib.blake2b(digest_size=16)
        for part, count in zip(self.parts, self.quota, strict=True):
            digest.update(f"{part.digest} {count}".encode())
        return digest.hexdigest()


def pack_rows(part: SourceRows, length: int) -> SourceRows:
    """The rows with several documents packed into each; `max_rows` of the source counts packed rows."""
    return dataclasses.replace(part, bins=pack(part.store.lengths[part.selected, 0], length))
