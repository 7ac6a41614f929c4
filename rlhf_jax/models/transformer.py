"""The composition of a decoder: embedding, attention block, MLP block and tail, for training and for cached decoding.

Each function takes `parts`, which multiplies by the weights: a module of `decoder.py` or the weights of `inference.py`.
Those of a layer are

    norm(name, x, over)      a norm by its name in BLOCK_NORMS; "q_norm" and "k_norm" `over` heads
    qkv(x, context)          [B, T, D] -> queries [B, T, K, G, d], keys and values [B, T, K, d]
    out(y, context)          [B, T, H d] -> [B, T, D]
    gate_up(x, context)      [B, T, D] -> the gate, or None, and the other half of the MLP, [B, T, F]
    down(y, context)         [B, T, F] -> [B, T, D]
    router_kernel()          [D, X]
    expert_kernels(x)        gate and up [X, D, F], down [X, F, D], dense or quantised, for tokens x

and outside the layers rows(name, ids, dtype) of an embedding, project(name, x) and norm(name, x).

B batch, T query positions, S key positions, D hidden, E embedding (= D except for OPT-350M), F MLP width, X experts,
K key-value heads, G query heads of each, d head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from rlhf_jax.models.attention import uniform_window
from rlhf_jax.models.config import BLOCK_NORMS, DecoderConfig
from rlhf_jax.models.experts import Routing, apply_experts, route
from rlhf_jax.models.layers import (
    ACTIVATIONS,
    AttentionContext,
    apply_rope,
    attention,
    causal_attention,
    fused_attention,
    roll_rows,
)
from rlhf_jax.models.quantised import Quantised, dequantise


class LayerCache(NamedTuple):
    """Keys and values of one layer, and where new ones are written.

    Attributes:
        keys, values: [B, K, S, d].
        index: [] or [B], the position in the cache of the first new token; one for all rows costs less.
        padding: [B], of rows that are right-padded for fused attention, and left-padded in the cache; None elsewhere.
        length: positions that one query attends to, the first of S; None: all.
    """

    keys: jax.Array
    values: jax.Array
    index: jax.Array | int
    padding: jax.Array | None = None
    length: int | None = None

    def extend(self, k: jax.Array, v: jax.Array) -> LayerCache:
        """The cache with keys and values [B, T, K, d] of the new tokens."""
        if self.padding is not None:
            k, v = (roll_rows(y, -self.padding) for y in (k, v))
        k, v = (rearrange(y, "b t k d -> b k t d").astype(self.keys.dtype) for y in (k, v))
        return self._replace(
            keys=write(self.keys, k, self.index, axis=2), values=write(self.values, v, self.index, axis=2)
        )

    def first(self, rows: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the first `rows`, up to `length`."""
        if self.length is None:
            return self.keys, self.values
        return self.keys[:rows, :, : self.length], self.values[:rows, :, : self.length]


def write(old: jax.Array, new: jax.Array, index: jax.Array | int, *, axis: int) -> jax.Array:
    """`old` [B, ...] with `new` from `index`, [] or [B], on along `axis`; rows of `old` after those of `new` stay."""
    if len(new) < len(old):  # in place, and before anything reads it: else all of it would be copied
        assert new.shape[axis] == 1, "one token of some rows"
        at = (jnp.arange(len(new)), *[slice(None)] * (axis - 1), index)
        return old.at[at].set(jnp.squeeze(new, axis))
    if jnp.ndim(index) == 1:
        return jax.vmap(lambda o, n, i: jax.lax.dynamic_update_slice_in_dim(o, n, i, axis - 1))(old, new, index)
    return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis)


def embed_tokens(
    config: DecoderConfig, parts: Any, tokens: jax.Array, positions: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """[B, T] -> [B, T, D], the input of the first layer."""
    x = parts.rows("tokens", tokens, dtype) * jnp.asarray(config.embed_scale, dtype)
    if config.embed_size != config.hidden_size:
        x = parts.project("project_in", x)
    if config.position_rows:
        x = x + parts.rows("positions", positions + config.position_offset, dtype)
    return parts.norm("embed/norm", x) if config.embed_norm else x


def tail(config: DecoderConfig, parts: Any, x: jax.Array) -> jax.Array:
    """[B, T, D] after the last layer -> [B, T, E], which the head reads."""
    if config.final_norm:
        x = parts.norm("final_norm", x)
    return parts.project("project_out", x) if config.embed_size != config.hidden_size else x


def attention_block(
    config: DecoderConfig,
    parts: Any,
    x: jax.Array,
    context: AttentionContext,
    window: jax.Array | int | None = None,
    cache: LayerCache | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """x [B, T, D] -> ([B, T, D], the cache with the new keys and values).

    Args:
        window: how many keys back a query of this layer sees; 0 or None: all.
        cache: T = 1 attends to what is in it, T > 1 is a prefill and attends to the new tokens alone.
    """
    q, k, v = parts.qkv(x, context)
    if config.qk_norm != "none":
        q, k = parts.norm("q_norm", q, config.qk_norm), parts.norm("k_norm", k, config.qk_norm)
    if config.rope:
        angles = context.angles_within(window)
        q, k = (apply_rope(y, angles, interleaved=config.rope.interleaved) for y in (q, k))
    cache = None if cache is None else cache.extend(k, v)
    if context.visible is None:
        y = fused_attention(q, k, v, scale=config.attention_scale, window=uniform_window(config, x.shape[1]))
    else:
        keys, values = (rearrange(y, "b t k d -> b k t d") for y in (k, v))
        if cache is not None and x.shape[1] == 1:
            keys, values = cache.first(len(x))
        visible, cap = context.visible_within(window), config.attention_softcap
        on_cpus = context.layout is not None and context.layout.on_cpus
        attend = causal_attention if on_cpus and keys.shape[2] == x.shape[1] else attention
        q = q.astype(keys.dtype)  # the cache may be in another
        y = attend(q, keys, values, visible, scale=config.attention_scale, cap=cap, bias=context.bias)
        y = y.astype(x.dtype)
    return parts.out(rearrange(y, "b t k g d -> b t (k g d)"), context), cache


def mlp_block(
    config: DecoderConfig, parts: Any, x: jax.Array, context: AttentionContext
) -> tuple[jax.Array, Routing | None]:
    """x [B, T, D] -> ([B, T, D], how the tokens were routed; None without experts)."""
    if config.experts:
        routing, kernels = route(config.experts, x, parts.router_kernel()), parts.expert_kernels(x)

        def apply(x: jax.Array, routing: Routing, kernels: list) -> jax.Array:
            dense = [dequantise(kernel, x.dtype) if isinstance(kernel, Quantised) else kernel for kernel in kernels]
            return apply_experts(x, routing, dense, activation=config.activation, layout=context.layout)

        # As in `multiply`: the backward pass dequantises again, and so computes the experts again.
        if isinstance(kernels[0], Quantised):
            apply = jax.checkpoint(apply, prevent_cse=False)
        return apply(x, routing, kernels), routing
    act, (gate, up) = ACTIVATIONS[config.activation], parts.gate_up(x, context)
    return parts.down(act(up) if gate is None else act(gate) * up, context), None


def transformer_block(
    config: DecoderConfig,
    parts: Any,
    x: jax.Array,
    context: AttentionContext,
    window: jax.Array | int | None = None,
    cache: LayerCache | None = None,
) -> tuple[jax.Array, LayerCache | None, Routing | None]:
    """One layer, its norms as BLOCK_NORMS says: x [B, T, D] -> ([B, T, D], the cache, the routing of `mlp_block`)."""
    kind, names = config.residual, BLOCK_NORMS[config.residual]

    def norm(name: str, x: jax.Array, *, of_sum: bool = False) -> jax.Array:
        is_of_sum = kind == "post" and not name.endswith("out_norm")
        return parts.norm(name, x) if name in names and is_of_sum == of_sum else x

    normed = norm("attention_norm", x)
    y, cache = attention_block(config, parts, normed, context, window, cache)
    if kind in ("parallel", "parallel_shared"):
        x, normed = x + y, normed if kind == "parallel_shared" else norm("mlp_norm", x)
        z, routing = mlp_block(config, parts, normed, context)
        return x + z, cache, routing
    x = norm("attention_norm", x + norm("attention_out_norm", y), of_sum=True)
    z, routing = mlp_block(config, parts, norm("mlp_norm", x), context)
    return norm("mlp_norm", x + norm("mlp_out_norm", z), of_sum=True), cache, routing
