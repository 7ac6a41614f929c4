"""Which prompt serves what: decided by a hash of the prompt alone.

The same prompt falls on the same side in every run, whatever its answers, its source or its place in the file, so the
splits are disjoint by construction and stay as they are when rows are added.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Literal

Stage = Literal["sft", "reward", "ppo"]
STAGES: tuple[Stage, ...] = ("sft", "reward", "ppo")
Turns = tuple[tuple[str, str], ...]  # (("user", text), ("assistant", text), ..., ("user", text))


def prompt_key(turns: Turns) -> bytes:
    """16 bytes, blake2b of the roles and texts; runs of white space count as one blank, so copies of a prompt agree."""
    text = "\x1e".join(f"{role}\x1f{' '.join(content.split())}" for role, content in turns)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_held_out(key: bytes, share: float) -> bool:
    """Whether the prompt is kept for evaluation: true of `share` of all prompts, and for no stage in particular."""
    return _uniform(key[:8]) < share


def stage_of(key: bytes, shares: Sequence[float]) -> Stage:
    """The one stage that trains on this prompt. `shares`: those of `STAGES`, in any unit, as `parse_shares` gives."""
    *_, total = bounds = list(itertools.accumulate(shares))
    # Other bytes than `is_held_out` reads: else the held-out share would come out of the first stage alone.
    position = _uniform(key[8:])
    return next(stage for stage, bound in zip(STAGES, bounds, strict=True) if position < bound / total)


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


def _uniform(eight_bytes: bytes) -> float:
    """In [0, 1): 53 bits, because all 64 could round up to 1."""
    return (int.from_bytes(eight_bytes, "big") >> 11) / 2**53
