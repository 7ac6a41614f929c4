"""Statistics over the true entries of a mask.

`mask` has the shape of `x`, bool (or 0 and 1). Entries outside it are replaced before anything is computed, so that
values there, NaN included, reaches neither the value nor the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def zero_outside(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` as float32 where the mask is true, 0 elsewhere. Any shape."""
    return jnp.where(jnp.asarray(mask, bool), jnp.asarray(x, jnp.float32), 0.0)


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """sum_i m_i x_i / sum_i m_i, a float32 scalar; 0 for an empty mask."""
    return zero_outside(x, mask).sum() / jnp.maximum(jnp.asarray(mask, jnp.float32).sum(), 1.0)


def var(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Population variance, mean((x - mean(x))^2), a float32 scalar; 0 for an empty mask."""
    return mean(jnp.square(zero_outside(x, mask) - mean(x, mask)), mask)


def whiten(x: jax.Array, mask: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over the mask, 0 elsewhere; float32, the shape of `x`.

    Source: advantage normalisation as in detail 7 of "The 37 Implementation Details of PPO" (Huang et al. 2022),
    here over real tokens only.
    """
    return zero_outside((zero_outside(x, mask) - mean(x, mask)) * jax.lax.rsqrt(var(x, mask) + eps), mask)
