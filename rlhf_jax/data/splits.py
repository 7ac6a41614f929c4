"""Assigns prompts to stages and to evaluation by a hash of the prompt alone.

The same prompt has the same assignment in every run, whatever its answers, its source or its position in the file, so
the splits are disjoint by construction and do not change when rows are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_jax.data.mixture import splitmix64
from rlhf_jax.data.records import Turns


def prompt_key(turns: Turns) -> bytes:
    """16 bytes, blake2b of the roles and texts; whitespace counts as one space, so that copies of a prompt agree."""
    text = "\x1e".join([f"{role}\x1f{' '.join(content.split())}" for role, content, *_ in turns])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def as_keys(keys: Sequence[bytes], seed: int = 0) -> np.ndarray:
    """[n, 2] uint64 of n keys: the first column decides what is held out, the second which share it falls in.

    Another `seed` gives another split; equal prompts still have equal keys.
    """
    words = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)
    return splitmix64(words ^ splitmix64(np.array([seed], np.uint64))) if seed else words


def is_held_out(keys: np.ndarray, share: float) -> np.ndarray:
    """[n] bool: held out for evaluation: `share` of all prompts, and `share` of every stage's. keys: [n, 2]."""
    return _uniform(keys[:, 0]) < share


def is_trained_by(keys: np.ndarray, name: str, shares: Mapping[str, float]) -> np.ndarray:
    """[n] bool: whether the prompt falls in the share `name`, and so in no other one.

    Args:
        shares: in any unit. Their order counts: each begins where the one before it ends.
    """
    bounds = np.cumsum(list(shares.values()))
    # Not the bytes that `is_held_out` reads: otherwise all held-out prompts would belong to the first share.
    return np.searchsorted(bounds / bounds[-1], _uniform(keys[:, 1]), side="right") == list(shares).index(name)


def named_shares(
    split: Mapping[str, float] | str, names: Sequence[str], defaults: Mapping[str, float]
) -> dict[str, float]:
    """The table of `data.split`, in the order of `names`.

    Args:
        split: the table, or as text the shares of the first three names ("2,4,4").
        defaults: the shares of an empty table.
    Raises:
        ValueError: the table has a name that is not in `names`.
    """
    given = dict(zip(names, map(float, split.split(",")), strict=False)) if isinstance(split, str) else split
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"data.split has a share for {', '.join(unknown)}; it may have shares for {', '.join(names)}")
    return {name: float(share) for name in names if (share := (given or defaults).get(name)) is not None}


def _uniform(words: np.ndarray) -> np.ndarray:
    """In [0, 1): 53 bits, because all 64 could round up to 1."""
    return (words >> np.uint64(11)).astype(np.float64) / 2**53
