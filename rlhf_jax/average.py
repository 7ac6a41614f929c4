"""A moving average of what trains: average <- average + (1 - decay) (weights - average), in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.host_memory import rests, to_devices, to_host
from rlhf_jax.train_step import Params


def start_average(trainable: Params, *, offloaded: bool) -> Params:
    """The average of step 0: copies of what trains, split as that is; `offloaded`: in pinned host memory."""
    return to_host(trainable) if offloaded else jax.tree.map(jnp.copy, trainable)


def step_of(decay: float):
    """The jitted (average, weights) -> average of one array; the average is donated."""
    return jax.jit(lambda average, weights: average + (1 - decay) * (weights - average), donate_argnums=0)


def make_average(step) -> Callable[[Params, Params], Params]:
    """(average, trainable) -> average, path by path by a `step_of`; the old one is deleted.

    An average in host memory comes to the devices one path at a time, and the next when that one is back, so no more
    than the largest array of it is ever there.
    """

    def follow(average: Params, trainable: Params) -> Params:
        return {path: move(leaf, trainable[path]) for path, leaf in average.items()}

    def move(leaf: jax.Array, weights: jax.Array) -> jax.Array:
        if not rests(leaf):
            return step(leaf, weights)
        back = jax.block_until_ready(jax.device_put(step(to_devices(leaf), weights), leaf.sharding))
        leaf.delete()
        return back

    return follow
