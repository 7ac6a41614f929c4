"""Packs sequences of many lengths into bins of one capacity, so that rows of documents have next to no padding.

Best-fit decreasing (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing
algorithms"), computed on the histogram of the lengths: its result for all sequences of one length
is known in advance, so they are placed by whole ranges of equal bins, however many those are.

Pairs go into bins of two sub-rows, by the tokens of both answers and one pair after the other.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

PAIRS_AT_ONCE = 4096  # pairs that are packed together, so that time is linear in their number


@dataclass(frozen=True)
class Bins:
    """The documents of each bin: bin b has `members[offsets[b] : offsets[b + 1]]`, in ascending order.

    A document is a sequence, or K = 2 of them, and a bin has as many sub-rows.
    """

    offsets: np.ndarray  # [number of bins + 1] int64
    members: np.ndarray  # [n] int64: every document once
    sub_rows: np.ndarray  # [n, K] int8: the sub-row of each sequence of each of `members`
    fill: float  # share of the positions of all bins that have a token; 1 where there is no bin

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def span(self, number: int) -> slice:
        """Where `members` and `sub_rows` have the documents of a bin."""
        return slice(self.offsets[number], self.offsets[number + 1])


def pack(lengths: np.ndarray, capacity: int) -> Bins:
    """Few bins that hold sequences of these lengths, none more than `capacity` tokens; the same for the same lengths.

    Neither the order of the bins nor that of the sequences in a bin depends on their lengths.

    Args:
        lengths: [n] integers, tokens of each sequence.
    Raises:
        ValueError: a length is below 1 or above the capacity.
    """
    lengths = _check_lengths(np.asarray(lengths)[:, None], capacity)[:, 0]
    # RandomState, because NumPy keeps its stream the same in all versions. The order of the bins is random, and so is
    # which sequence of a length goes where, so that neighbours in the data are not neighbours in a row.
    chance = np.random.RandomState(0)
    shuffled = chance.permutation(lengths.size)
    # A small type is sorted by radix, in linear time.
    room_left = (capacity - lengths[shuffled]).astype(np.min_scalar_type(capacity))
    largest_first = shuffled[np.argsort(room_left, kind="stable")]
    bin_of = np.empty(lengths.size, np.int64)
    bin_of[largest_first] = _assign_bins(np.bincount(lengths), capacity)
    return _make_bins(bin_of, np.zeros((lengths.size, 1), np.int8), lengths, capacity, chance)


def pack_pairs(lengths: np.ndarray, capacity: int) -> Bins:
    """Few bins of two sub-rows of `capacity` tokens each, which hold these pairs; the same for the same lengths.

    Both answers of a pair are in one bin, in either of its sub-rows: bins of the longer answer of each pair alone would
    leave the room next to the shorter ones empty. Orders are as those of `pack`.

    Args:
        lengths: [n, 2] integers, tokens of both answers of each pair.
    Raises:
        ValueError: as `pack`.
    """
    lengths = _check_lengths(np.asarray(lengths), capacity)
    chance = np.random.RandomState(0)
    shuffled = chance.permutation(len(lengths))
    bin_of, sub_rows, num_bins = np.empty(len(lengths), np.int64), np.empty(lengths.shape, np.int8), 0
    for start in range(0, len(lengths), PAIRS_AT_ONCE):
        block = shuffled[start : start + PAIRS_AT_ONCE]
        room, opened = np.full((2, len(block)), capacity), 0
        for pair in block[np.argsort(-lengths[block].sum(axis=1), kind="stable")].tolist():
            longer = int(lengths[pair].argmax())
            long, short = lengths[pair, [longer, 1 - longer]]
            # With an empty bin, which has the most room and is taken only where no other suffices.
            one, two = room[:, : opened + 1]
            most, least = np.maximum(one, two), np.minimum(one, two)
            fits = (most >= long) & (np.maximum(most - long, least) >= short)
            best = int(np.where(fits, one + two, 2 * capacity + 1).argmin())
            for answer in (longer, 1 - longer):
                sub_row = room[:, best].argmax()
                room[sub_row, best] -= lengths[pair, answer]
                sub_rows[pair, answer] = sub_row
            bin_of[pair], opened = num_bins + best, max(opened, best + 1)
        num_bins += opened
    return _make_bins(bin_of, sub_rows, lengths, capacity, chance)


def _check_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """[n, K] as int64. ValueError for one that is below 1 or above the capacity."""
    assert lengths.ndim == 2 and (not lengths.size or np.issubdtype(lengths.dtype, np.integer)), lengths.dtype
    (wrong,) = np.nonzero(((lengths < 1) | (lengths > capacity)).any(axis=1))
    if wrong.size:
        what, tokens = ("sequence", "pair")[lengths.shape[1] - 1], " and ".join(map(str, lengths[wrong[0]].tolist()))
        raise ValueError(
            f"{what} {wrong[0]} has {tokens} tokens ({wrong.size:,} such): rows of {capacity} tokens hold "
            f"sequences of 1 to {capacity}; cut or drop longer ones and drop empty ones, or make rows longer"
        )
    return lengths.astype(np.int64)


def _make_bins(
    bin_of: np.ndarray, sub_rows: np.ndarray, lengths: np.ndarray, capacity: int, chance: np.random.RandomState
) -> Bins:
    """The bins in random order. bin_of: [n], of each document; sub_rows: [n, K], of its sequences."""
    num_bins = int(bin_of.max(initial=-1)) + 1
    bin_of = chance.permutation(num_bins)[bin_of]
    members, positions = np.argsort(bin_of, kind="stable"), num_bins * capacity * sub_rows.shape[1]
    return Bins(
        offsets=np.concatenate([[0], np.bincount(bin_of, minlength=num_bins).cumsum()]).astype(np.int64),
        members=members,
        sub_rows=sub_rows[members],
        fill=float(lengths.sum() / positions) if num_bins else 1.0,
    )


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
