"""Optimizer steps that change nothing because the loss or a gradient is not finite, and the record of them.

A single value that is not finite would spread to every parameter and moment. Every step is therefore computed, and its
result is used only if the loss and the norm of the gradient are finite; the choice is part of the compiled step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.trees import record


@record
class Skips:
    """The optimizer steps that were skipped, as a part of a training state.

    Attributes:
        total: [] int32, number of them so far.
        in_a_row: [] int32, number since the last step that was taken; those that a lower loss scale may prevent do not
            count.
        wrong: [L] bool, parameters, in the order of their paths, whose gradient was not finite in the last of them.
    """

    total: jax.Array
    in_a_row: jax.Array
    wrong: jax.Array


def no_skips(parameters: int) -> Skips:
    """The record of step 0."""
    return Skips(jnp.int32(0), jnp.int32(0), jnp.zeros(parameters, bool))


def wrong_gradients(grads: Mapping[str, jax.Array]) -> jax.Array:
    """[L] bool: gradients, in the order of their paths, of which some value, or the sum of squares, is not finite.

    The sums are those of the gradient's norm, so the compiler computes them once.
    """
    return ~jnp.isfinite(jnp.stack([jnp.sum(jnp.square(grads[path])) for path in sorted(grads)]))


def next_skips(skips: Skips, is_finite: jax.Array, wrong: jax.Array, is_helped: jax.Array | bool) -> Skips:
    """The record after a step that is finite, [] bool, or not; `is_helped`: a lower loss scale may prevent the next."""
    in_a_row = jnp.where(is_finite, 0, skips.in_a_row + jnp.where(is_helped, 0, 1))
    return Skips(skips.total + ~is_finite, in_a_row, jnp.where(is_finite, skips.wrong, wrong))


def select(is_finite: jax.Array, new: Any, old: Any) -> Any:
    """The tree `new` after a finite step, else `old`."""
    return jax.tree.map(lambda one, other: jnp.where(is_finite, one, other), new, old)


def describe_skips(skips: Skips, paths: list[str], shown: int = 3) -> str:
    """What was not finite in the last skipped step of the parameters with these paths."""
    wrong = [path for path, is_wrong in zip(sorted(paths), np.asarray(skips.wrong), strict=True) if is_wrong]
    more = f" and {len(wrong) - shown} more" if len(wrong) > shown else ""
    if not wrong:
        return "the loss or the norm of all gradients together"
    return f"the gradient of {', '.join(wrong[:shown])}{more} ({len(wrong)} of {len(paths)} parameters)"
