"""Which prompt serves what: decided by a hash of the prompt alone.

The same prompt falls on the same side in every run, whatever its answers, its source or its place in the file, so the
splits are disjoint by construction and stay as they are when rows are added.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhf_jax.data.blend import mixed
from rlhf_jax.data.example import Turns

Stage = Literal["sft", "reward", "ppo"]
STAGES: tuple[Stage, ...] = ("sft", "reward", "ppo")


def prompt_key(turns: Turns) -> bytes:
    """16 bytes, blake2b of the roles and texts; runs of white space count as one blank, so copies of a prompt agree."""
    text = "\x1e".join([f"{role}\x1f{' '.join(content.split())}" for role, content in turns])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def as_keys(keys: Sequence[bytes], seed: int = 0) -> np.ndarray:
    """[n, 2] uint64 of n keys: the first column says who is held out, the second which stage trains.

    Another `seed` splits the prompts in another way; equal prompts still have equal keys.
    """
    words = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)
    return mixed(words ^ mixed(np.array([seed], np.uint64))) if seed else words


def held_out(keys: np.ndarray, share: float) -> np.ndarray:
    """[n] bool: kept for evaluation: true of `share` of all prompts, and for no stage in particular. keys: [n, 2]."""
    return _uniform(keys[:, 0]) < share


def trains(keys: np.ndarray, stage: Stage, shares: Sequence[float]) -> np.ndarray:
    """[n] bool: whether `stage` is the one that trains on the prompt.

    Args:
        shares: those of `STAGES`, in any unit, as `parse_shares` gives.
    """
    bounds = np.cumsum(shares)
    # Other bytes than `held_out` reads: else the held-out share would come out of the first stage alone.
    return np.searchsorted(bounds / bounds[-1], _uniform(keys[:, 1]), side="right") == STAGES.index(stage)


def parse_shares(split: str) -> tuple[float, ...]:
    """ "2,4,4" -> (2.0, 4.0, 4.0), the shares of `STAGES`. ValueError unless three numbers >= 0 with a positive sum."""
    mend = f"data.split must be three shares as in '2,4,4', for {', '.join(STAGES)}; not {split!r}"
    try:
        shares = tuple(float(part) for part in split.split(","))
    except ValueError as error:
        raise ValueError(mend) from error
    if len(shares) != len(STAGES) or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise ValueError(mend)
    return shares


def _uniform(words: np.ndarray) -> np.ndarray:
    """In [0, 1): 53 bits, because all 64 could round up to 1."""
    return (words >> np.uint64(11)).astype(np.float64) / 2**53
