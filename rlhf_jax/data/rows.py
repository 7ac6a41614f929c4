"""The rows that a stage trains on or is evaluated on, of one source and of all."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlhf_jax.data.chat_template import Encoding
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.mixture import draw_rows
from rlhf_jax.data.packing import Bins, pack, pack_pairs
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
        """[rows, per_row] int32, tokens of each sequence; of a packed row, of all those of each sub-row together."""
        lengths, bins = self.store.lengths[self.selected], self.bins
        if bins is None:
            return lengths
        shape = len(bins), lengths.shape[1]
        places = np.repeat(np.arange(len(bins)), np.diff(bins.offsets))[:, None] * shape[1] + bins.sub_rows
        tokens = lengths[bins.members].reshape(-1)
        return np.bincount(places.reshape(-1), tokens, math.prod(shape)).astype(np.int32).reshape(shape)

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
        """A digest of every token of every row, of the selection, and of what is packed together."""
        packed = () if self.bins is None else (self.bins.offsets, self.bins.members, self.bins.sub_rows)
        picked = hashlib.blake2b(digest_size=16)
        for each in (self.selected, *packed):
            picked.update(np.ascontiguousarray(each).tobytes())
        return f"{self.store.digest} {picked.hexdigest()} {len(self)}"

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
        members = self.bins.members[self.bins.span(row)]
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
    def most_documents(self) -> int:
        """Documents of a packed row, at most."""
        return max(int(np.diff(part.bins.offsets).max(initial=0)) for part in self.parts)

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
    lengths = part.store.lengths[part.selected]
    bins = pack(lengths[:, 0], length) if lengths.shape[1] == 1 else pack_pairs(lengths, length)
    return dataclasses.replace(part, bins=bins)
