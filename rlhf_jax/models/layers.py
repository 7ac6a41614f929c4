"""The operations of a layer, and what all layers read besides their input (`AttentionContext`).

B batch, T query positions, S key positions, D hidden, H query heads, K key-value heads, G = H / K, d head size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Alibi, DecoderConfig, Rope
from rlhf_jax.objectives.logprobs import softcap_logits
from rlhf_jax.products import einsum

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
RopeAngles = tuple[jax.Array, jax.Array]  # cosine and sine, [B, T, pairs] float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows [..., D] in `dtype` of a table [V, D]; its gradient is summed in the dtype of the table.

    The table is cast first, which changes no value: where the compiler gathers a split table, or sums what each device
    found in its part, it moves numbers of `dtype`.
    """
    return jnp.take(table.astype(dtype), ids, axis=0)


def _embed_forward(table, ids, dtype):
    return embed(table, ids, dtype), (table, ids)


def _table_gradient(dtype, looked, gradient):
    table, ids = looked
    return jnp.zeros_like(table).at[ids].add(gradient.astype(table.dtype)), None


embed.defvjp(_embed_forward, _table_gradient)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., F] + bias [F] in x's dtype; the gradient of the bias is summed in float32."""
    return x + bias.astype(x.dtype)


def _bias_gradient(bias, gradient):
    summed = gradient.astype(jnp.float32).sum(range(gradient.ndim - bias.ndim))
    return gradient, summed.astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _bias_gradient)


def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, *, kind: str, eps: float, over: str = ""
) -> jax.Array:
    """LayerNorm ("layer") or RMSNorm ("rms", "rms_plus_one") over the last dimension, in float32 within.

    Args:
        over: of queries or keys [B, T, ..., d]: each head alone ("head", "each_head") or all heads together ("width").
    """
    if over == "width":
        return normalise(x.reshape(*x.shape[:2], -1), scale, bias, kind=kind, eps=eps).reshape(x.shape)
    if over == "each_head":
        scale = scale.reshape(x.shape[2:])
    y, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    scale = 1 + scale if kind == "rms_plus_one" else scale
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * scale
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def token_positions(mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """[B, T] bool -> [B, T] int32: the index of each real token among the real ones of its row; 0 on padding before.

    With `segments` [B, T] int32, the document of each token in a row of several (0: padding): among those of its
    document. Padding after the tokens has the position of the last real one, so that tables have it.
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


def rope_angles(rope: Rope, positions: jax.Array) -> RopeAngles:
    """What `apply_rope` takes for tokens at positions [B, T]."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(rope.frequencies, jnp.float32)
    return jnp.cos(angles) * rope.factor, jnp.sin(angles) * rope.factor


def apply_rope(x: jax.Array, angles: RopeAngles, *, interleaved: bool) -> jax.Array:
    """Rotary embedding (Su et al. 2021, eq. 34) of the first 2 x pairs dimensions of x [B, T, ..., d].

    A pair is dimension n and n + pairs, or, interleaved, 2n and 2n + 1.
    """
    pairs = angles[0].shape[-1]
    cos, sin = (y.reshape(*y.shape[:2], *[1] * (x.ndim - 3), pairs) for y in angles)
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

    def to_alibi_precision(x: jax.Array) -> jax.Array:
        # Not by a cast to bfloat16 and back, which the compiler may leave out.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if alibi.rounded else x

    slopes = jnp.asarray(alibi.slopes, jnp.float32).reshape(kv_heads, -1)[None, :, :, None, None]
    places = key_positions.astype(jnp.float32)[:, None, None, None, :]
    return to_alibi_precision(to_alibi_precision(slopes) * to_alibi_precision(places)) * alibi.scale


def attention(
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
    A query that may look nowhere (padding) gives a finite average, which is ignored.
    """
    scores = softcap_logits(einsum("btkgd,bksd->bkgts", q, k, jnp.float32) * scale, cap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return einsum("bkgts,bksd->btkgd", softmax(scores, v.dtype), v)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, bias: jax.Array | None = None, **options
) -> jax.Array:
    """`attention` of T tokens to themselves where no query sees a later key: a block of queries and the keys up to its
    last at a time. Of a long row that is little more than half of the products, and a block's scores are fewer.
    Shapes are those of `attention` with S = T, bias [B, K, G, 1, T].
    """
    length = q.shape[1]
    size = max(_QUERIES, -(-length // _BLOCKS))

    def block(start: int) -> jax.Array:
        end = min(start + size, length)
        near = None if bias is None else bias[..., :end]
        seen = q[:, start:end], k[:, :, :end], v[:, :, :end], mask[:, start:end, :end]
        return attention(*seen, bias=near, **options)

    return jnp.concatenate([block(start) for start in range(0, length, size)], axis=1)


_QUERIES = 128  # of a block at least, where there are as many
_BLOCKS = 8  # at most: each is compiled


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(scores: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Over the last axis, computed in float32 and rounded to `dtype`.

    The gradient is w (g - sum(w g)), from the result alone, which the next product keeps anyway: JAX (0.10.2)
    differentiates exponential, sum and quotient one by one and keeps the exponentials too
    (`findings/jax_softmax_gradient.sh`). scores [..., S] float32 -> [..., S].
    """
    return jax.nn.softmax(scores, axis=-1).astype(dtype)


def _softmax_forward(scores: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    weights = softmax(scores, dtype)
    return weights, weights


def _softmax_backward(dtype: jnp.dtype, weights: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    weights, gradient = weights.astype(jnp.float32), gradient.astype(jnp.float32)
    product = weights * gradient
    return (product - weights * product.sum(axis=-1, keepdims=True),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int, implementation: str = "cudnn"
) -> jax.Array:
    """What `attention` gives where a query may look at itself and all before it, or `window` keys back (0: all).

    q: [B, T, K, G, d]; k, v: [B, T, K, d] -> [B, T, K, G, d], in bfloat16 or float16. No length is passed:
    outputs after the end of a right-padded row are ignored, and before it the causal mask hides the padding.
    """
    options = dict(is_causal=True, local_window_size=(window - 1, 0) if window else None, implementation=implementation)
    y = jax.nn.dot_product_attention(rearrange(q, "b t k g d -> b t (k g) d"), k, v, scale=scale, **options)
    return y.reshape(q.shape)


class AttentionContext(NamedTuple):
    """What every layer reads besides its input.

    Attributes:
        real: [B, T] bool, of the tokens.
        visible: [B, T, S] bool, see `visible_keys`; None where fused attention needs no mask.
        back: [(B,) T, S] int32, how many places before its query each key is; None without windows.
        angles: of rotary embeddings, and `local_angles` of the layers with a window where theirs differ.
        bias: [B, K, G, 1, S] float32 of ALiBi.
        layout: of the activations; None leaves that to the compiler.
    """

    real: jax.Array
    visible: jax.Array | None
    back: jax.Array | None
    angles: RopeAngles | None
    local_angles: RopeAngles | None
    bias: jax.Array | None
    layout: Layout | None

    def constrain(self, x: jax.Array) -> jax.Array:
        """Keep [B, T, ...] split by its batch: left alone, XLA also tries heads, badly."""
        return x if self.layout is None else self.layout.constrain(x, "batch", None, None)

    def angles_within(self, window: jax.Array | int | None) -> RopeAngles | None:
        """Of a layer with this window; 0 or None: without one."""
        if window is None or self.local_angles is None:
            return self.angles
        return jax.tree.map(lambda local, all: jnp.where(window > 0, local, all), self.local_angles, self.angles)

    def visible_within(self, window: jax.Array | int | None) -> jax.Array:
        """[B, T, S] bool: what a layer with this window sees; 0 or None: everything visible."""
        if window is None:
            return self.visible
        return self.visible & ((self.back < window) | (window == 0))


def attention_context(
    config: DecoderConfig,
    mask: jax.Array,
    positions: jax.Array,
    layout: Layout | None,
    *,
    visible: jax.Array | None,
    back: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    kv_heads: int = 0,
) -> AttentionContext:
    """For queries [B, T] at `positions`; `visible` and `back` as in AttentionContext.

    Windows count places in the row, which within a document are positions: its tokens are adjacent.

    Args:
        back, key_positions: where keys are not the queries' own tokens; the latter [B, S].
        kv_heads: as often as they are repeated; 0: as in the configuration.
    """
    if back is None:
        places = jnp.arange(mask.shape[1])
        back = places[:, None] - places
    keys_at, heads = positions if key_positions is None else key_positions, kv_heads or config.num_kv_heads
    return AttentionContext(
        real=mask,
        visible=visible,
        back=back if config.windows else None,
        angles=rope_angles(config.rope, positions) if config.rope else None,
        local_angles=rope_angles(config.local_rope, positions) if config.local_rope else None,
        bias=alibi_bias(config.alibi, keys_at, heads) if config.alibi else None,
        layout=layout,
    )


def visible_keys(mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """[B, T] bool, and [B, T] int32 of packed rows -> [B, T, T] bool: the keys that each query may look at.

    Those are the real tokens up to the query itself, of its own document where there are several.
    """
    visible = jnp.tril(jnp.ones((mask.shape[1],) * 2, bool)) & mask[:, None, :]
    return visible if segments is None else visible & (segments[:, :, None] == segments[:, None, :])
