"""What the methods of an `Engine` take and return."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.train_step import Params, Sums, TrainState


@functools.partial(jax.tree_util.register_dataclass, data_fields=["train", "frozen", "sums"], meta_fields=["over"])
@dataclass(frozen=True)
class PolicyState:
    """A policy between two calls of an `Engine`.

    Attributes:
        train: the parameters that train, the optimizer's state and the number of steps taken, `.step`.
        frozen: the parameters that do not train; {} without adapters.
        sums: gradients since the last optimizer step; None: there are none.
        over: what the losses of those calls are means over; "": there are none.
    """

    train: TrainState
    frozen: Params
    sums: Sums | None = None
    over: str = ""

    @property
    def params(self) -> Params:
        """All parameters and adapters of the model."""
        return self.train.params(self.frozen)


class PolicyAnswer(NamedTuple):
    """An answer to one prompt.

    Attributes:
        tokens: ids, with the one that ended it.
        logprobs: of each of them, under the distribution that was sampled from.
        ended: whether it ended by itself, and was not cut at max_new_tokens.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool


@jax.jit
def _bit_sums(arrays):
    def each(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return sum(map(each, jax.tree.leaves(arrays)), jnp.uint32(0))


def bit_sum(arrays: Any) -> int:
    """The sum of the bits of all values, as unsigned integers modulo 2^32: the same on any number of devices."""
    return int(_bit_sums(arrays))
