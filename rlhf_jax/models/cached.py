"""The decoder laid out for generation, and its forward pass with a KV cache.

Training keeps layers stacked and every product apart; decoding is bound by reading weights, so it wants each layer's
arrays by themselves, query, key and value in one product, gate and up in one, and the head ready as [E, V]. What is
fused is stacked on an axis that is not sharded (the G query heads of a KV head beside its key and its value; gate
beside up), so that every shard stays where it is.

B batch, T new positions, S cache length, D hidden, E embedding, V padded vocabulary, F MLP width, K key-value heads,
G query heads per KV head, d head size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from einops import rearrange

from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.decoder import DecoderConfig, abstract_params, head_kernel
from rlhf_jax.models.layers import ACTIVATIONS, POSITION_OFFSET, attend, normalise, rotate
from rlhf_jax.trees import record

Weights = dict[str, jax.Array]  # "layers/0/qkv/kernel" [D, K, G+2, d], "layers/0/gate_up/kernel" [D, 2, F], ...


@record
class Cache:
    """Keys and values of every layer, in the activations' dtype.

    Attributes:
        keys: L arrays [B, K, S, d], rotated already.
        values: L arrays [B, K, S, d].
        visible: [B, S] bool, true where a real token was written.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    visible: jax.Array


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype, layout: Layout) -> Cache:
    """A cache of `length` positions with nothing in it, split by batch and KV heads."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)

    def zeros() -> tuple[jax.Array, ...]:
        return tuple(
            layout.constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None) for _ in range(config.num_layers)
        )

    return Cache(zeros(), zeros(), layout.constrain(jnp.zeros((batch, length), bool), "batch", None))


def for_decoding(config: DecoderConfig, params: Mapping[str, jax.Array], layout: Layout, dtype: jnp.dtype) -> Weights:
    """Merged training parameters -> generation weights in `dtype`, laid out by `layout` (the GENERATE table).

    Every parameter is cast, then gathered over fsdp, then cut into layers: in one jit, one all-gather a weight.
    Norms keep their dtype, as training applies them in float32 too.
    """
    gathered, at_home = {}, Layout(layout.mesh, TRAIN)
    for path, leaf in abstract_params(config).items():
        cast = params[path] if "norm/" in path else params[path].astype(dtype)
        # Without the first pin the compiler gathers what is to be cast, and moves twice the bytes.
        gathered[path] = layout.constrain(at_home.constrain(cast, *leaf.axes), *leaf.axes)

    def heads(name: str, kind: str) -> jax.Array:  # -> [L, (D,) K, heads per KV head, d]
        leaf = gathered[f"layers/attention/{name}/{kind}"]
        return rearrange(leaf, "... (k g d) -> ... k g d", k=config.num_kv_heads, d=config.head_dim)

    stacked = {}
    for kind in ("kernel", "bias"):
        if kind == "kernel" or config.attention_bias:
            stacked[f"qkv/{kind}"] = jnp.concatenate([heads(name, kind) for name in "qkv"], axis=-2)
        if kind == "kernel" or config.mlp_bias:
            names = ("gate", "up") if config.gated_mlp else ("up",)
            stacked[f"gate_up/{kind}"] = jnp.stack([gathered[f"layers/mlp/{name}/{kind}"] for name in names], axis=-2)
    axes = {"qkv/kernel": ("embed", "kv_heads", None, None), "qkv/bias": ("kv_heads", None, None)}
    axes |= {"gate_up/kernel": ("embed", None, "mlp"), "gate_up/bias": (None, "mlp")}
    weights = {"head/kernel": layout.constrain(head_kernel(config, gathered), "embed", "vocab")}
    for path, leaf in abstract_params(config).items():
        if not path.startswith(("layers/", "head/", "score/")):
            weights[path] = gathered[path]
        elif path.startswith("layers/") and path.split("/")[-2] not in ("q", "k", "v", "gate", "up"):
            name = path.removeprefix("layers/").removeprefix("attention/").removeprefix("mlp/")
            stacked[name], axes[name] = gathered[path], leaf.axes[1:]
    for name, leaf in stacked.items():
        weights |= {f"layers/{i}/{name}": layout.constrain(leaf[i], *axes[name]) for i in range(config.num_layers)}
    return weights


def forward(
    config: DecoderConfig,
    weights: Weights,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    cache: Cache,
    index: jax.Array | int,
    layout: Layout,
) -> tuple[jax.Array, Cache]:
    """Hidden states of T new tokens, whose keys and values are written to the cache at `index` .. `index` + T - 1.

    Args:
        tokens, mask, positions: [B, T]; a token with a false mask is padding and is never looked at.
        index: where to write; 0 with T > 1 is a prefill, which looks at the new tokens only.

    Returns:
        ([B, T, E] in the cache's dtype, the cache with the new tokens in it)
    """
    c, dtype = config, cache.keys[0].dtype
    chex.assert_equal_shape((tokens, mask, positions))
    length = tokens.shape[1]
    is_prefill = length > 1
    assert not is_prefill or index == 0, "several tokens at once are a prefill, at the head of the cache"
    visible = jax.lax.dynamic_update_slice(cache.visible, mask, (0, index))
    if is_prefill:
        looks_at = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, :]
    else:
        looks_at = visible[:, None, :]

    def norm(x, name):
        bias = weights.get(f"{name}/bias")
        return normalise(x, weights[f"{name}/scale"], bias, kind=c.norm, eps=c.norm_eps)

    def biased(x, name):
        return x if f"{name}/bias" not in weights else x + weights[f"{name}/bias"].astype(dtype)

    def attention(x, i, name):
        qkv = jnp.einsum("btd,dkgh->btkgh", x, weights[f"{name}/qkv/kernel"].astype(dtype))
        qkv = layout.constrain(biased(qkv, f"{name}/qkv"), "batch", None, "kv_heads", None, None)
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        if c.rope_theta:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        k, v = (rearrange(y, "b t k d -> b k t d") for y in (k, v))
        keys = jax.lax.dynamic_update_slice(cache.keys[i], k, (0, 0, index, 0))
        values = jax.lax.dynamic_update_slice(cache.values[i], v, (0, 0, index, 0))
        y = attend(q, k, v, looks_at) if is_prefill else attend(q, keys, values, looks_at)
        y = layout.constrain(rearrange(y, "b t k g d -> b t (k g d)"), "batch", None, "heads")
        return biased(y @ weights[f"{name}/o/kernel"].astype(dtype), f"{name}/o"), keys, values

    def mlp(x, name):
        act = ACTIVATIONS[c.activation]
        y = biased(jnp.einsum("btd,dnf->btnf", x, weights[f"{name}/gate_up/kernel"].astype(dtype)), f"{name}/gate_up")
        y = layout.constrain(y, "batch", None, None, "mlp")
        y = act(y[:, :, 0]) * y[:, :, 1] if c.gated_mlp else act(y[:, :, 0])
        return biased(y @ weights[f"{name}/down/kernel"].astype(dtype), f"{name}/down")

    x = jnp.take(weights["embed/tokens"], tokens, axis=0).astype(dtype)
    if c.embed_size != c.hidden_size:
        x = x @ weights["project_in/kernel"].astype(dtype)
    if not c.rope_theta:
        x = x + jnp.take(weights["embed/positions"], positions + POSITION_OFFSET, axis=0).astype(dtype)
    all_keys, all_values = [], []
    for i in range(c.num_layers):
        x = layout.constrain(x, "batch", None, None)
        name = f"layers/{i}"
        y, keys, values = attention(x if c.post_norm else norm(x, f"{name}/attention_norm"), i, name)
        all_keys.append(keys)
        all_values.append(values)
        if c.post_norm:
            x = norm(x + y, f"{name}/attention_norm")
            x = norm(x + mlp(x, name), f"{name}/mlp_norm")
        else:
            x = x + y
            x = x + mlp(norm(x, f"{name}/mlp_norm"), name)
    if c.final_norm:
        x = norm(x, "final_norm")
    if c.embed_size != c.hidden_size:
        x = x @ weights["project_out/kernel"].astype(dtype)
    return layout.constrain(x, "batch", None, None), Cache(tuple(all_keys), tuple(all_values), visible)


def logits_of(config: DecoderConfig, weights: Weights, hidden: jax.Array) -> jax.Array:
    """[..., E] -> [..., V] float32; rows that only pad the vocabulary are the lowest finite number."""
    kernel = weights["head/kernel"].astype(hidden.dtype)
    # Kept in float32, as `token_logprobs` does: rounded to bfloat16, what is sampled would not be what trains.
    logits = jnp.einsum("...e,ev->...v", hidden, kernel, preferred_element_type=jnp.float32)
    real = jnp.arange(config.padded_vocab) < config.vocab_size
    return jnp.where(real, logits, jnp.finfo(jnp.float32).min)
