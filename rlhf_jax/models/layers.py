"""The mathematics that training and cached decoding share.

B batch, T query positions, S key positions, D hidden, H query heads, K key-value heads, G = H / K, d head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False), "silu": jax.nn.silu}
POSITION_OFFSET = 2  # rows that OPT keeps free at the head of its table of learned positions


def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, *, kind: str, eps: float) -> jax.Array:
    """LayerNorm ("layer") or RMSNorm ("rms") over the last dimension, in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def positions_of(mask: jax.Array) -> jax.Array:
    """[B, T] bool -> [B, T] int32: the index of each real token among the real ones of its row; 0 on padding before."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def roll_rows(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Roll row b of [B, T] by shift[b] to the left, around the end: left padding of `shift` becomes right padding."""
    return jnp.take_along_axis(x, (jnp.arange(x.shape[1]) + shift[:, None]) % x.shape[1], axis=1)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding (Su et al. 2021, eq. 34), halves convention of LLaMA checkpoints.

    x: [B, T, ..., d]; positions: [B, T].
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(*positions.shape, *[1] * (x.ndim - 3), half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention with softmax in float32.

    q: [B, T, K, G, d]; k, v: [B, K, S, d]; mask: [B, T, S] bool, true where a query may look. -> [B, T, K, G, d].
    A query that may look nowhere (padding) gives a finite average, which nobody reads.
    """
    scores = jnp.einsum("btkgd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksd->btkgd", weights, v)
