"""Packs sequences of many lengths into bins of one capacity, so that rows of documents have next to no padding.

Best-fit decreasing (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing
algorithms"), computed on the histogram of the lengths: its result for all sequences of one length
is known in advance, so they are placed by whole ranges of equal bins, however many those are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bins:
    """The sequences of each bin: bin b has `members[offsets[b] : offsets[b + 1]]`, in ascending order."""

    offsets: np.ndarray  # [number of bins + 1] int64
    members: np.ndarray  # [n] int64: every sequence once
    fill: float  # share of the positions of all bins that have a token; 1 where there is no bin

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(lengths: np.ndarray, capacity: int) -> Bins:
    """Few bins that hold sequences of these lengths, none more than `capacity` tokens; the same for the same lengths.

    Neither the order of the bins nor that of the sequences in a bin depends on their lengths.

    Args:
        lengths: [n] integers, tokens of each sequence.
    Raises:
        ValueError: a length is below 1 or above the capacity.
    """
    lengths = np.asarray(lengths)
    assert lengths.ndim == 1 and (not lengths.size or np.issubdtype(lengths.dtype, np.integer)), lengths.dtype
    lengths = lengths.astype(np.int64)
    (wrong,) = np.nonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        raise ValueError(
            f"sequence {wrong[0]} has {lengths[wrong[0]]} tokens ({wrong.size:,} such): rows of {capacity} tokens hold "
            f"sequences of 1 to {capacity}; cut or drop longer ones and drop empty ones, or make rows longer"
        )
    # RandomState, because NumPy keeps its stream the same in all versions. The order of the bins is random, and so is
    # which sequence of a length goes where, so that neighbours in the data are not neighbours in a row.
    chance = np.random.RandomState(0)
    shuffled = chance.permutation(lengths.size)
    # A small type is sorted by radix, in linear time.
    room_left = (capacity - lengths[shuffled]).astype(np.min_scalar_type(capacity))
    largest_first = shuffled[np.argsort(room_left, kind="stable")]
    place = _assign_bins(np.bincount(lengths), capacity)
    num_bins = int(place.max(initial=-1)) + 1
    bin_of = np.empty(lengths.size, np.int64)
    bin_of[largest_first] = chance.permutation(num_bins)[place]
    return Bins(
        offsets=np.concatenate([[0], np.bincount(bin_of, minlength=num_bins).cumsum()]).astype(np.int64),
        members=np.argsort(bin_of, kind="stable"),
        fill=float(lengths.sum() / (num_bins * capacity)) if num_bins else 1.0,
    )


def segment_ids(lengths: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    """[width] int32, the `Batch.segments` of a row with documents of these lengths end to end: 1, 1, 2, ..., 0, 0."""
    lengths = np.asarray(lengths, np.int64)
    assert lengths.sum() <= width, (lengths.sum(), width)
    documents = np.repeat(np.arange(1, lengths.size + 1, dtype=np.int32), lengths)
    return np.pad(documents, (0, width - documents.size))


def _assign_bins(histogram: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each sequence, [n] int64, the longest first; `histogram[l]` sequences have length l.

    The best fit of a sequence is the open bin with the least room that suffices. One that takes a sequence and has room
    for another of the same length is the best fit of the next one too: so bins of the least room take as many as they
    hold, one after the other, then those of the next larger room, and at last new ones.
    """
    open_bins: dict[int, list[tuple[int, int]]] = {}  # by room: ranges of bins, [start, stop)
    rooms: list[int] = []  # keys of open_bins with at least one range, ascending
    taken: list[tuple[int, int, int]] = []  # start and stop of a range of bins, and sequences added to each
    num_bins = 0

    def put(room: int, start: int, stop: int) -> None:
        if room and start < stop:
            ranges = open_bins.setdefault(room, [])
            if not ranges:
                insort(rooms, room)
            ranges.append((start, stop))

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            nth = bisect_left(rooms, length)
            if nth < len(rooms):
                room = rooms[nth]
                start, stop = open_bins[room].pop()
                if not open_bins[room]:
                    del rooms[nth]
            else:  # as many new bins as are needed
                room, start = capacity, num_bins
                stop = num_bins = num_bins + -(-left // (capacity // length))
            each = room // length
            full = start + min(stop - start, left // each)
            left -= (full - start) * each
            taken.append((start, full, each))
            put(room - each * length, start, full)
            if left and full < stop:  # the last one takes what is left
                taken.append((full, full + 1, left))
                put(room - left * length, full, full + 1)
                full, left = full + 1, 0
            put(room, full, stop)
    if not taken:
        return np.zeros(0, np.int64)
    starts, stops, each = np.array(taken, np.int64).T
    counts = stops - starts
    bins = np.repeat(starts - (counts.cumsum() - counts), counts) + np.arange(counts.sum())
    return np.repeat(bins, np.repeat(each, counts))
