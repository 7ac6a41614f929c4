"""Mean and variance of all numbers seen so far, from one batch after another."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.trees import record


@record
class Moments:
    """Float32 scalars: how many numbers, their mean, and the sum of their squared distances from it."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    @property
    def std(self) -> jax.Array:
        """The population standard deviation; 1 where the numbers are fewer than two or all equal."""
        variance = self.squares / jnp.maximum(self.count, 1.0)
        return jnp.where(variance > 1e-12, jnp.sqrt(jnp.maximum(variance, 1e-12)), 1.0)


def no_moments() -> Moments:
    """The moments of no numbers."""
    return Moments(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def add_moments(seen: Moments, x: jax.Array) -> Moments:
    """The moments of what was seen and of the numbers x [B], one or more.

    Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    x = jnp.asarray(x, jnp.float32)
    count, change = seen.count + x.size, x.mean() - seen.mean
    squares = seen.squares + jnp.square(x - x.mean()).sum() + jnp.square(change) * seen.count * x.size / count
    return Moments(count, seen.mean + change * x.size / count, squares)
