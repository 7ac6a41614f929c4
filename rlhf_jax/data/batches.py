"""Batches of token rows in a few fixed shapes; each is a function of its step number alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from rlhf_jax.data.mixture import permute
from rlhf_jax.data.rows import Rows
from rlhf_jax.trees import record

BUCKET_WINDOW = 32  # steps whose rows are sorted by padded length among themselves


@record
class Batch:
    """B rows of T tokens; [B, T], or [B, K, T] for pairs (K = 2) and rankings, the best answer first. Host arrays.

    A packed row holds several documents: of pairs at most D, whose answers are in either of its two sub-rows.
    """

    tokens: np.ndarray  # int32; 0 where there is no token
    mask: np.ndarray  # bool: real tokens
    loss_mask: np.ndarray  # bool: tokens whose prediction is trained; never the first token of a document
    # int32, the sequence of its row that each token belongs to: d K + k + 1 for answer k of document d, which is d + 1
    # for K = 1; 0: no token. None where rows hold one document.
    segments: np.ndarray | None = None
    # [B, 2] float32, or [B, D, 2] of packed rows: log-probability of each answer of a pair by the reference. None where
    # the loss has no reference.
    reference: np.ndarray | None = None
    # [B, K] float32, or [B, D, K] of packed rows: how good each answer is by its source, descending; NaN for those that
    # only fill a row. None where rows are no pairs or rankings.
    scores: np.ndarray | None = None


class Batches:
    """Endless batches of `rows`: batches[step] depends on the step alone, so a run resumes from its step number.

    Step s is position s % steps_per_epoch of epoch s // steps_per_epoch, whose draws the mixture orders by (seed,
    epoch), or without `shuffle` by the order of the rows. An epoch's last, incomplete batch is left out.

    Every batch has one of `lengths` as its T: the longest row rounded up to a multiple of 8, and with `buckets` up to
    so many shorter lengths. Then the rows of `BUCKET_WINDOW` steps are sorted by the length that they are padded to,
    and each step takes neighbours, so that long rows pad long rows; the steps of a window come in random order.
    """

    __iter__ = None  # it would never end

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        seed: int,
        side: Literal["right", "left"] = "right",  # where the padding goes
        shuffle: bool = True,
        buckets: int = 1,
        width: int = 0,  # T of all batches; 0: as above
        own: np.ndarray | None = None,
    ):
        """
        Args:
            own: [n] int, the rows of each batch that are read here, as `Layout.own_rows` says; None: all.
        Raises:
            ValueError: `batch_size` is not from 1 to the number of rows.
        """
        if not 1 <= batch_size <= len(rows):
            raise ValueError(f"batch size {batch_size} does not fit {len(rows)} rows: choose 1 to {len(rows)}")
        assert side == "right" or not rows.is_packed
        self.rows, self.batch_size, self.seed, self.side, self.shuffle = rows, batch_size, seed, side, shuffle
        self.own = np.arange(batch_size) if own is None else own
        self.reference: Sequence[np.ndarray] = ()  # `Batch.reference` of the rows of each part, where there is one
        # The shape of `Batch.scores` and `Batch.reference` without B. D is a multiple of 8: fewer shapes to compile.
        self.answers = (-(-rows.most_documents // 8) * 8, rows.per_row) if rows.is_packed else (rows.per_row,)
        self.steps_per_epoch = len(rows) // batch_size
        longest = width or -(-max(part.longest_row for part in rows.parts if len(part)) // 8) * 8
        lengths = np.concatenate([part.lengths.max(axis=1) for part in rows.parts])
        self.lengths = bucket_lengths(lengths, longest, buckets)

    def draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(part, row of that part) of each row of this step's batch, [B] int64."""
        assert step >= 0, step
        epoch, position = divmod(step, self.steps_per_epoch)
        if len(self.lengths) == 1:
            positions = np.arange(position * self.batch_size, (position + 1) * self.batch_size)
            return self.rows.draw(self.seed, epoch, positions, shuffle=self.shuffle)
        window, place = divmod(position, BUCKET_WINDOW)
        steps = min(BUCKET_WINDOW, self.steps_per_epoch - window * BUCKET_WINDOW)
        first = window * BUCKET_WINDOW * self.batch_size
        positions = np.arange(first, first + steps * self.batch_size)
        part, row = self.rows.draw(self.seed, epoch, positions, shuffle=self.shuffle)
        # By the length that they are padded to and no further: batches of equal rows would be far from random.
        order = np.argsort(np.searchsorted(self.lengths, self._lengths_of(part, row)), kind="stable")
        turn = permute(np.array([place]), steps, self.seed, epoch, window)[0] if self.shuffle else place
        chosen = order[turn * self.batch_size : (turn + 1) * self.batch_size]
        return part[chosen], row[chosen]

    def _lengths_of(self, part: np.ndarray, row: np.ndarray) -> np.ndarray:
        lengths = np.zeros(len(part), np.int64)
        for p in np.unique(part):
            lengths[part == p] = self.rows.parts[p].row_lengths(row[part == p])
        return lengths

    def counts(self, step: int) -> dict[str, int]:
        """How many rows of this step's batch are of each source; {} where there is one source."""
        if len(self.rows.parts) == 1:
            return {}
        drawn = np.bincount(self.draws(step)[0], minlength=len(self.rows.parts))
        found: dict[str, int] = {}
        for part, count in zip(self.rows.parts, drawn, strict=True):
            found[part.source.path] = found.get(part.source.path, 0) + int(count)
        return found

    def __getitem__(self, step: int) -> Batch:
        return self.make(*self.draws(step), own=self.own)

    def make(self, part: np.ndarray, row: np.ndarray, own: np.ndarray | slice = slice(None)) -> Batch:
        """The `own` rows of the batch of these, [B] int64 each: which part, and which row of that part."""
        longest = int(self._lengths_of(part, row).max())
        length = next(length for length in self.lengths if length >= longest)
        rows = list(zip(part[own].tolist(), row[own].tolist(), strict=True))
        documents = [self.rows.parts[p].documents(r) for p, r in rows]
        for each in self.rows.parts:
            each.release()
        packed = [bins.sub_rows[bins.span(r)] for p, r in rows if (bins := self.rows.parts[p].bins) is not None]
        batch = make_batch(documents, length, self.answers, self.side, packed)
        if not self.reference:
            return batch
        return dataclasses.replace(batch, reference=np.stack([self.reference[p][r] for p, r in rows]))


def bucket_lengths(row_lengths: np.ndarray, longest: int, buckets: int) -> tuple[int, ...]:
    """At most `buckets` lengths, ascending, multiples of 8 except the last, `longest`, with the least padding.

    By dynamic programming over the lengths that rows have: with k lengths the rows up to length j take least room when
    those up to some shorter i are best placed with k - 1 and the others all have length j.
    """
    rounded = np.minimum(-(-row_lengths // 8) * 8, longest)
    lengths, counts = np.unique(np.append(rounded, longest), return_counts=True)
    rows = np.concatenate([[0], np.cumsum(counts)])  # rows[i]: how many are shorter than lengths[i]
    # room[i, j]: of the rows from lengths[i] up to lengths[j], all of them as long as the last
    room = lengths * (rows[1:] - rows[:-1, None])
    room = np.where(np.tri(len(lengths), k=-1, dtype=bool), np.inf, room)
    best, cuts = room[0], []
    for _ in range(min(buckets, len(lengths)) - 1):
        with_one_more = np.concatenate([[np.inf], best[:-1]])[:, None] + room
        cuts.append(with_one_more.argmin(axis=0))
        best = with_one_more.min(axis=0)
    found, end = [longest], len(lengths) - 1
    for cut in reversed(cuts):
        end = int(cut[end]) - 1
        found.append(int(lengths[end]))
    return tuple(reversed(found))


def make_batch(
    rows: Sequence[Sequence[Sequence]],
    length: int,
    answers: tuple[int, ...],
    side: Literal["right", "left"],
    packed: Sequence[np.ndarray] = (),
) -> Batch:
    """A batch of width `length`.

    Args:
        rows: rows[i] are the documents of row i, each with K `Encoding` sequences.
        answers: (K,), or (D, K) of packed rows.
        packed: of packed rows, [documents, K] the sub-row of each sequence.
    """
    per_row = answers[-1]
    segments = np.zeros((len(rows), per_row, length), np.int32)
    tokens, mask, loss_mask = np.zeros_like(segments), np.zeros(segments.shape, bool), np.zeros(segments.shape, bool)
    scores = np.full((len(rows), *answers), np.nan, np.float32)
    for i, documents in enumerate(rows):
        sub_rows, ends = packed[i].tolist() if packed else [range(per_row)], [0] * per_row
        for d, document in enumerate(documents):
            for k, (each, j) in enumerate(zip(document, sub_rows[d], strict=True)):
                at = ends[j] if side == "right" else length - len(each.tokens)
                stop = ends[j] = at + len(each.tokens)
                tokens[i, j, at:stop] = each.tokens
                mask[i, j, at:stop] = True
                segments[i, j, at:stop] = d * per_row + k + 1
                for first, last in each.spans.tolist():
                    loss_mask[i, j, at + max(first, 1) : at + last] = True
                scores[(i, d, k) if packed else (i, k)] = each.score
    arrays = tokens, mask, loss_mask, *[segments] * bool(packed)
    return Batch(*arrays, scores=scores) if per_row > 1 else Batch(*(x[:, 0] for x in arrays))


PREFETCH_DEPTH = 2  # batches made in advance


class Prefetch:
    """`batches[step]`, with a thread that makes the next ones meanwhile; its errors are raised by [step].

    Any step may be requested; only the ones right after it are made in advance.
    """

    __iter__ = None

    def __init__(self, batches: Any, stop: int):
        """batches: indexed by the step. stop: the step after the last one that will be requested."""
        self._batches, self._stop = batches, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: dict[int, Future] = {}

    @property
    def rows(self) -> Rows:
        return self._batches.rows

    def __getitem__(self, step: int):
        for prefetch in range(step, min(step + PREFETCH_DEPTH + 1, max(self._stop, step + 1))):
            if prefetch not in self._made:
                self._made[prefetch] = self._pool.submit(self._batches.__getitem__, prefetch)
        self._made = {at: future for at, future in self._made.items() if at >= step}
        return self._made.pop(step).result()
