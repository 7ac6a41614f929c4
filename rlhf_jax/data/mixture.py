"""How sources are mixed: how many rows of each an epoch has, and which row is drawn at which position.

Every draw is a function of (seed, epoch, position) alone, computed without the draws before it and without any table of
the size of the data, so that a run resumes at any step and its memory does not grow with its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.config import SourceConfig

ROUNDS = 6  # of the Feistel network; four make it a good permutation in Luby and Rackoff's sense
SMALL = 4096  # rows up to which a permutation is computed by sorting: for few rows the network reaches few permutations


def draws_per_epoch(sizes: Sequence[int], sources: Sequence[SourceConfig], temperature: float = 1.0) -> np.ndarray:
    """[parts] int64: draws of each source, which has `sizes` rows, in one epoch of the mixture.

    Without weights each has size x epochs draws, at most max_rows. A `temperature` T other than 1 keeps their sum and
    makes each source's share proportional to its draws to the power 1/T: above 1 gives small sources more weight, as in
    multilingual pretraining (Conneau and Lample 2019, section 3.1, alpha = 1/T). With weights those are the shares;
    the sum of the draws is that without weights, or less where it would exceed a max_rows.

    Raises:
        ValueError: weights for some sources and not for others, or both weights and a temperature.
    """
    wanted = np.array([size * source.epochs for size, source in zip(sizes, sources, strict=True)], np.float64)
    caps = np.array([source.max_rows or np.inf for source in sources], np.float64)
    base = np.minimum(np.maximum(np.round(wanted), np.sign(wanted)), caps)
    weights = np.array([source.weight for source in sources], np.float64)
    if weights.any() and not weights.all():
        raise ValueError("data.sources: give every source a weight, or none; max_rows and epochs bound single sources")
    if weights.any() and temperature != 1:
        raise ValueError("data.temperature is for sources without weights: leave it at 1 or take the weights away")
    if not weights.any() and temperature == 1:
        return base.astype(np.int64)
    shares = weights if weights.any() else base ** (1 / temperature)
    shares = np.where(base > 0, shares, 0)
    shares = shares / shares.sum()
    held = shares > 0
    total = min(base.sum(), np.min(caps[held] / shares[held]))
    return _apportion(shares, int(total))


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers with that sum, each within one of share x total (largest remainders)."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def draw_rows(
    sizes: Sequence[int],
    quota: Sequence[int],
    seed: int,
    epoch: int,
    positions: np.ndarray,
    *,
    endless: Sequence[bool] = (),
    shuffle: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """(part, row of that part), [n] int64 each, for positions [n] from 0 to sum(quota) - 1 of an epoch.

    Over the epochs the draws of a part go through its rows again and again, each time in another order: it has drawn
    every row k times before it draws one k + 1 times. An endless part continues from window to window, in random order
    within each. Without `shuffle` the parts and rows come in order.

    Args:
        sizes: rows of each part; of an endless one, the rows of a window.
        quota: draws of each part in an epoch.
        endless: which parts continue with new rows where others start again; (): none.
    """
    places = permute(positions, sum(quota), seed, epoch) if shuffle else np.asarray(positions, np.int64)
    ends = np.cumsum(quota)
    part = np.searchsorted(ends, places, side="right")
    # How many draws of its part come before this one, over all epochs.
    number = places - (ends - quota)[part] + epoch * np.array(quota)[part]
    turn, row = np.divmod(number, np.array(sizes)[part])
    if shuffle:
        for p, t in {*zip(part.tolist(), turn.tolist(), strict=True)}:
            here = (part == p) & (turn == t)
            row[here] = permute(row[here], sizes[p], seed, p + 1, t)
    if endless:
        row = row + np.where(np.array(endless)[part], turn * np.array(sizes)[part], 0)
    return part, row


def permute(positions: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where a permutation of range(size) that `key` chooses sends each of `positions`, [n] int64.

    A Feistel network over the next power of four with cycle walking (Black and Rogaway 2002): each place is computed
    independently, without a table of `size`.
    """
    keys = _round_keys(key)
    if size <= SMALL:
        return np.argsort(splitmix64(np.arange(size, dtype=np.uint64) ^ keys[0]), kind="stable")[positions]
    half = ((size - 1).bit_length() + 1) // 2
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    places = np.array(positions, np.uint64)
    outside = np.ones(places.shape, bool)
    while outside.any():
        left, right = places[outside] >> shift, places[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (splitmix64(right ^ round_key) & mask)
        places[outside] = left << shift | right
        outside = places >= size
    return places.astype(np.int64)


def _round_keys(key: tuple[int, ...]) -> list[np.uint64]:
    state = np.array([0x9E3779B97F4A7C15], np.uint64)
    for part in key:
        state = splitmix64(state ^ np.uint64(part) + np.uint64(0x9E3779B97F4A7C15))
    return [splitmix64(state + np.uint64(i))[0] for i in range(ROUNDS)]


def splitmix64(words: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), modulo 2**64."""
    words = np.asarray(words, np.uint64)
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
