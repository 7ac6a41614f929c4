"""The mathematics that training and cached decoding share.

B batch, T query positions, S key positions, D hidden, H query heads, K key-value heads, G = H / K, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from rlhf_jax.models.architecture import Alibi, Rope
from rlhf_jax.objectives.logprobs import softcapped

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
Turns = tuple[jax.Array, jax.Array]  # cosine and sine, [B, T, pairs] float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows [..., D] in `dtype` of a table [V, D]; its gradient is summed in the dtype of the table.

    The table is cast first, which changes no value: where the compiler gathers a split table, or sums what each device
    found in its part, it moves numbers of `dtype`.
    """
    return jnp.take(table.astype(dtype), ids, axis=0)


def _looked_up(table, ids, dtype):
    return look_up(table, ids, dtype), (table, ids)


def _table_gradient(dtype, looked, gradient):
    table, ids = looked
    return jnp.zeros_like(table).at[ids].add(gradient.astype(table.dtype)), None


look_up.defvjp(_looked_up, _table_gradient)


def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, *, kind: str, eps: float) -> jax.Array:
    """LayerNorm ("layer") or RMSNorm ("rms", "rms_plus_one") over the last dimension, in float32 within."""
    y, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = (
        y
        * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
        * (1 + scale if kind == "rms_plus_one" else scale)
    )
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def normalise_heads(x: jax.Array, scale: jax.Array, bias: jax.Array | None, *, over: str, kind: str, eps: float):
    """Norm of queries or keys [B, T, ..., d]: each head alone ("head", "each_head") or all heads together ("width")."""
    if over == "width":
        flat = x.reshape(*x.shape[:2], -1)
        return normalise(flat, scale, bias, kind=kind, eps=eps).reshape(x.shape)
    scale = scale if over == "head" else scale.reshape(x.shape[2:])
    return normalise(x, scale, bias, kind=kind, eps=eps)


def positions_of(mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """[B, T] bool -> [B, T] int32: the index of each real token among the real ones of its row; 0 on padding before.

    With `segments` [B, T] int32, the document of each token in a row of several (0: padding): among those of its
    document. Padding behind has the position of the last real token, so that it is one that tables have.
    """
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    if segments is None:
        return positions
    first = mask & (segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1])
    return positions - jax.lax.cummax(jnp.where(first, positions, 0), axis=1)


def roll_rows(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Roll row b of [B, T, ...] by shift[b] to the left, around the end.

    Left padding of `shift` becomes right padding, and -shift undoes it.
    """
    index = (jnp.arange(x.shape[1]) + shift[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def turns_of(rope: Rope, positions: jax.Array) -> Turns:
    """What `rotate` takes for tokens at positions [B, T]."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(rope.frequencies, jnp.float32)
    return jnp.cos(angles) * rope.factor, jnp.sin(angles) * rope.factor


def rotate(x: jax.Array, turns: Turns, *, interleaved: bool) -> jax.Array:
    """Rotary embedding (Su et al. 2021, eq. 34) of the first 2 x pairs dimensions of x [B, T, ..., d].

    A pair is dimension n and n + pairs, or, interleaved, 2n and 2n + 1.
    """
    pairs = turns[0].shape[-1]
    cos, sin = (y.reshape(*y.shape[:2], *[1] * (x.ndim - 3), pairs) for y in turns)
    turned, passed = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    parts = first * cos - second * sin, second * cos + first * sin
    turned = jnp.stack(parts, -1).reshape(turned.shape) if interleaved else jnp.concatenate(parts, -1)
    return jnp.concatenate([turned.astype(x.dtype), passed], -1)


def alibi_bias(alibi: Alibi, key_positions: jax.Array, kv_heads: int) -> jax.Array:
    """[B, S] -> [B, K, G, 1, S] float32, to be added to the scores.

    Softmax forgets what all keys of a query share, so slope x position of the key is slope x distance.
    """

    def rounded(x: jax.Array) -> jax.Array:
        # Not by a cast to bfloat16 and back, which the compiler may leave out.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if alibi.rounded else x

    slopes = jnp.asarray(alibi.slopes, jnp.float32).reshape(kv_heads, -1)[None, :, :, None, None]
    places = key_positions.astype(jnp.float32)[:, None, None, None, :]
    return rounded(rounded(slopes) * rounded(places)) * alibi.scale


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    cap: float = 0.0,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention with softmax in float32.

    q: [B, T, K, G, d]; k, v: [B, K, S, d]; mask: [B, T, S] bool, true where a query may look; scores are scaled,
    soft-capped, and biased by [B, K, G, 1, S]. -> [B, T, K, G, d].
    A query that may look nowhere (padding) gives a finite average, which nobody reads.
    """
    scores = softcapped(jnp.einsum("btkgd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * scale, cap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksd->btkgd", weights, v)


def attend_fused(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int, implementation: str = "cudnn"
) -> jax.Array:
    """What `attend` gives where a query may look at itself and all before it, or `window` keys back (0: all).

    q: [B, T, K, G, d]; k, v: [B, T, K, d] -> [B, T, K, G, d], in bfloat16 or float16. No length is given: behind the
    end of a right-padded row stands what nobody reads, and before it causality hides the padding.
    """
    y = jax.nn.dot_product_attention(
        rearrange(q, "b t k g d -> b t (k g) d"),
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )
    return y.reshape(q.shape)


Half = Callable[[jax.Array], jax.Array]


def block(kind: str, x: jax.Array, norm: Callable[[str, jax.Array], jax.Array], attention: Half, mlp: Half):
    """One layer: x [B, T, D] -> [B, T, D]. `norm(name, x)` applies the norm of that name; `kind` as in BLOCK_NORMS."""
    if kind == "pre":
        x = x + attention(norm("attention_norm", x))
        return x + mlp(norm("mlp_norm", x))
    if kind == "post":
        x = norm("attention_norm", x + attention(x))
        return norm("mlp_norm", x + mlp(x))
    if kind == "output":
        x = x + norm("attention_out_norm", attention(x))
        return x + norm("mlp_out_norm", mlp(x))
    if kind == "sandwich":
        x = x + norm("attention_out_norm", attention(norm("attention_norm", x)))
        return x + norm("mlp_out_norm", mlp(norm("mlp_norm", x)))
    if kind == "parallel":
        return x + attention(norm("attention_norm", x)) + mlp(norm("mlp_norm", x))
    assert kind == "parallel_shared", kind
    normed = norm("attention_norm", x)
    return x + attention(normed) + mlp(normed)
