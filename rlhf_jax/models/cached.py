"""The decoder laid out for generation, and its forward pass with a KV cache.

Training keeps layers stacked and every product apart; decoding is bound by reading weights, so it wants each layer's
arrays by themselves, query, key and value in one product, gate and up in one, and the head ready as [E, V]. What is
fused is stacked on an axis that is not sharded (the G query heads of a KV head beside its key and its value; gate
beside up), so that every shard stays where it is. Where there are fewer KV heads than tensor shards, each is repeated
until every shard has one of its own.

What both phases share stays as it is, and on one device, or where it is laid out for generation at rest, the very
arrays of training: kernels that are quantised (stacked, and each layer dequantised whenever it is used) or an array for
each layer, with the adapters beside them, and then embedding and head. That costs time and saves the memory of a copy.

B batch, T new positions, S cache length, D hidden, E embedding, V padded vocabulary, F MLP width, K key-value heads
(repeated), G query heads per KV head, d head size, L layers, X experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from rlhf_jax.mesh import TRAIN, Layout, Table
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.attention import Choice, kernel_on, uniform_window
from rlhf_jax.models.decoder import Leaf, abstract_params, head_kernel
from rlhf_jax.models.experts import apply_experts, route
from rlhf_jax.models.layers import (
    ACTIVATIONS,
    alibi_bias,
    attend,
    attend_fused,
    block,
    normalise,
    normalise_heads,
    positions_of,
    roll_rows,
    rotate,
    turns_of,
)
from rlhf_jax.models.lora import is_adapter, merge
from rlhf_jax.models.per_layer import PerLayer, is_shareable
from rlhf_jax.models.quantised import Quantised, dequantise, shardings
from rlhf_jax.objectives.logprobs import head_logits
from rlhf_jax.trees import record

# "layers/0/qkv/kernel" [D, K, G+2, d], "layers/0/gate_up/kernel" [D, 2, F], ..., "head/kernel" [E, V].
# Shared: "layers/0/q/kernel", "layers/0/up/kernel", ..., or, quantised, of all layers together, "layers/q/kernel", ...;
# of each its adapters, "layers/0/q/lora_a" [D, rank], ...; and "head/rows" [V, E], or the embedding where tied.
Weights = dict[str, jax.Array | Quantised]


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


def _repeats(config: DecoderConfig, layout: Layout) -> int:
    """How often each KV head is repeated so that the shards of the layout divide them."""
    shards = layout.shards("kv_heads")
    assert config.num_heads % shards == 0, "heads are checked where models are published"
    return shards // math.gcd(config.num_kv_heads, shards)


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype, layout: Layout) -> Cache:
    """A cache of `length` positions with nothing in it, split by batch and KV heads."""
    shape = (batch, config.num_kv_heads * _repeats(config, layout), length, config.head_dim)

    def zeros() -> tuple[jax.Array, ...]:
        return tuple(
            layout.constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None) for _ in range(config.num_layers)
        )

    return Cache(zeros(), zeros(), layout.constrain(jnp.zeros((batch, length), bool), "batch", None))


def for_decoding(
    config: DecoderConfig,
    params: Mapping[str, jax.Array | Quantised | PerLayer],
    layout: Layout,
    dtype: jnp.dtype,
    home: Table = TRAIN,
) -> Weights:
    """Training parameters, which lie by `home` -> generation weights in `dtype`, by `layout` (the GENERATE table).

    Adapters are merged. Every parameter is cast, then gathered over fsdp, then cut into layers: in one jit, one
    all-gather a weight. Norms keep their dtype, as training applies them in float32 too.

    What is `shared` is left to `shared_for_decoding`; adapters then are not merged, but weights of their own.
    """
    kept = shared(params)
    gathered, at_home = {}, Layout(layout.mesh, home)

    def gather(array: jax.Array, leaf: Leaf) -> jax.Array:
        # Without the first pin the compiler gathers what is to be cast, and moves twice the bytes.
        return layout.constrain(at_home.constrain(array, *leaf.axes), *serving_axes(config, leaf, layout))

    weights = _adapters(config, params, layout, dtype, gather) if kept else {}
    if not kept:
        params = merge(params, config.lora)
    kv_heads, repeats = config.num_kv_heads, _repeats(config, layout)
    leaves = {path: leaf for path, leaf in abstract_params(config.without_lora()).items() if path not in kept}
    for path, leaf in leaves.items():
        cast = params[path] if "norm/" in path else params[path].astype(dtype)
        gathered[path] = gather(cast, leaf)

    def heads(name: str, kind: str) -> jax.Array:  # -> [L, (D,) K, heads per KV head, d]
        leaf = gathered[f"layers/attention/{name}/{kind}"]
        if name == "q":
            return rearrange(leaf, "... (k g d) -> ... k g d", k=kv_heads * repeats, d=config.head_dim)
        return repeat(leaf, "... (k d) -> ... (k r) 1 d", k=kv_heads, r=repeats)

    stacked = {}
    for kind in ("kernel", "bias"):
        if "layers/attention/q/" + kind in gathered:
            stacked[f"qkv/{kind}"] = jnp.concatenate([heads(name, kind) for name in "qkv"], axis=-2)
        if "layers/mlp/up/" + kind in gathered:
            names = ("gate", "up") if config.gated_mlp else ("up",)
            stacked[f"gate_up/{kind}"] = jnp.stack([gathered[f"layers/mlp/{name}/{kind}"] for name in names], axis=-2)
    if config.qk_norm in ("each_head", "width") and repeats > 1:
        scale = gathered["layers/attention/k_norm/scale"].reshape(config.num_layers, kv_heads, -1)
        shape = (config.num_layers, -1, config.head_dim)[: 3 if config.qk_norm == "each_head" else 2]
        gathered["layers/attention/k_norm/scale"] = jnp.repeat(scale, repeats, axis=1).reshape(shape)
    axes = {"qkv/kernel": ("embed", "kv_heads", None, None), "qkv/bias": ("kv_heads", None, None)}
    axes |= {"gate_up/kernel": ("embed", None, "mlp"), "gate_up/bias": (None, "mlp")}
    if not kept:
        weights["head/kernel"] = layout.constrain(head_kernel(config, gathered), "embed", "vocab")
    for path, leaf in leaves.items():
        if not path.startswith(("layers/", "head/kernel", "score/")):
            weights[path] = gathered[path]
        elif path.startswith("layers/") and path.removeprefix("layers/").rpartition("/")[0] not in _FUSED:
            stacked[_name(path)], axes[_name(path)] = gathered[path], leaf.axes[1:]
    for name, leaf in stacked.items():
        weights |= {f"layers/{i}/{name}": layout.constrain(leaf[i], *axes[name]) for i in range(config.num_layers)}
    return weights


def _name(path: str) -> str:
    """What follows the layer in a weight's name: layers/attention/q/kernel -> q/kernel."""
    return path.removeprefix("layers/").removeprefix("attention/").removeprefix("mlp/")


def shared(params: Mapping[str, jax.Array | Quantised | PerLayer]) -> set[str]:
    """Paths of what generation reads as training has it: such kernels, and where there are any, embedding and head."""
    kept = any(isinstance(leaf, Quantised | PerLayer) for leaf in params.values())
    return set(filter(is_shareable, params)) if kept else set()


def shared_for_decoding(
    config: DecoderConfig,
    params: Mapping[str, jax.Array | Quantised | PerLayer],
    layout: Layout,
    put: Callable[[Any, Any], Any] = jax.device_put,
) -> Weights:
    """What is `shared`, in its own dtypes: gathered over fsdp, or, outside jit, handed on where it lies by `layout`
    already. The weights last until the training parameters are gone.

    Args:
        put: (array, sharding) -> array, for whoever wants no arrays.
    """
    weights: Weights = {}
    for path in shared(params):
        leaf, where, name = params[path], shared_shardings(config, path, params[path], layout), f"layers/{_name(path)}"
        placed = jax.tree.map(put, leaf, where)
        if isinstance(leaf, PerLayer):
            weights |= {f"layers/{i}/{_name(path)}": each for i, each in enumerate(placed.layers)}
        elif isinstance(leaf, Quantised):
            weights[name] = placed
        else:
            weights["head/rows" if path == "head/kernel" else path] = placed
    return weights


def shared_leaves(config: DecoderConfig, layout: Layout) -> dict[str, Leaf]:
    """`abstract_params`, where the axes of what may be shared are those of generation by `layout`."""
    return {
        path: Leaf(leaf.shape, serving_axes(config, leaf, layout)) if is_shareable(path) else leaf
        for path, leaf in abstract_params(config).items()
    }


def shared_shardings(config: DecoderConfig, path: str, leaf: Any, layout: Layout) -> Any:
    """Where each array of a shared parameter lies by `layout`; `leaf` tells its kind."""
    axes = shared_leaves(config, layout)[path].axes
    if isinstance(leaf, Quantised):
        return shardings(axes, leaf.kind, layout)
    if isinstance(leaf, PerLayer):
        return PerLayer((layout.sharding(axes[1:]),) * len(leaf.layers))
    return layout.sharding(axes)


def _adapters(config: DecoderConfig, params, layout: Layout, dtype, gather) -> Weights:
    """The adapters of each layer, B times the scale."""
    weights: Weights = {}
    for path, leaf in abstract_params(config).items():
        if is_adapter(path):
            adapter = (config.lora.scale * params[path] if path.endswith("lora_b") else params[path]).astype(dtype)
            adapter = gather(adapter, leaf)
            axes = serving_axes(config, leaf, layout)[1:]
            weights |= {
                f"layers/{i}/{_name(path)}": layout.constrain(adapter[i], *axes) for i in range(config.num_layers)
            }
    return weights


def serving_axes(config: DecoderConfig, leaf: Leaf, layout: Layout) -> tuple[str | None, ...]:
    """A KV head that several shards need goes to all of them."""
    few = _repeats(config, layout) > 1
    return tuple(None if axis == "kv_heads" and few else axis for axis in leaf.axes)


_FUSED = ("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up")


def forward(
    config: DecoderConfig,
    weights: Weights,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    cache: Cache,
    index: jax.Array | int,
    layout: Layout,
    attention: Choice = "auto",
) -> tuple[jax.Array, Cache]:
    """Hidden states of T new tokens, whose keys and values are written to the cache at `index` .. `index` + T - 1.

    Args:
        tokens, mask, positions: [B, T]; a token with a false mask is padding and is never looked at.
        index: where to write; 0 with T > 1 is a prefill, which looks at the new tokens only; its rows are left-padded.
            [B]: where to write in each row; one place for all rows costs less.
        attention: the kernel of a prefill, see `attention_kernel`; one query is XLA's.

    Returns:
        ([B, T, E] in the cache's dtype, the cache with the new tokens in it)
    """
    c, dtype = config, cache.keys[0].dtype
    chex.assert_equal_shape((tokens, mask, positions))
    length = tokens.shape[1]
    is_prefill = length > 1
    by_row = jnp.ndim(index) == 1
    assert not is_prefill or (not by_row and index == 0), "several tokens at once are a prefill, at the cache's head"

    def written(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        if by_row:
            return jax.vmap(lambda o, n, i: jax.lax.dynamic_update_slice_in_dim(o, n, i, axis - 1))(old, new, index)
        return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis)

    visible = written(cache.visible, mask, 1)
    queries = jnp.asarray(index)[..., None] + jnp.arange(length)
    keys_at = jnp.arange(length if is_prefill else visible.shape[1])
    back = queries[..., None] - keys_at  # [(B,) T, S], how many places before its query each key lies
    looks_at = (back >= 0) & (mask if is_prefill else visible)[:, None, :]
    fused = is_prefill and kernel_on(layout.mesh, c, dtype, length, attention).name == "cudnn"
    if fused:  # which takes right-padded rows: all is computed so, and keys and values are rolled back as they are kept
        padding = jnp.argmax(mask, axis=1)
        tokens, positions = roll_rows(tokens, padding), roll_rows(positions, padding)
    all_turns = {rope: turns_of(rope, positions) for rope in (c.rope, c.local_rope) if rope}
    bias = None
    if c.alibi:
        bias = alibi_bias(c.alibi, positions if is_prefill else positions_of(visible), cache.keys[0].shape[1])

    def norm(name, x, *, over=""):
        scale, shift, options = weights[f"{name}/scale"], weights.get(f"{name}/bias"), dict(kind=c.norm, eps=c.norm_eps)
        return normalise_heads(x, scale, shift, over=over, **options) if over else normalise(x, scale, shift, **options)

    def biased(name, x):
        return x if f"{name}/bias" not in weights else x + weights[f"{name}/bias"].astype(dtype)

    def kernel(i, name, x):
        """One of a layer's, dense. Its index is made to depend on x, by a zero that the compiler cannot see: it would
        move what depends on nothing before the layer, or out of the decoding loop, and all layers be dense at once."""
        if f"layers/{i}/{name}/kernel" in weights:
            return weights[f"layers/{i}/{name}/kernel"].astype(dtype)
        zero = jnp.minimum(jnp.isinf(x[0, 0, 0]).astype(jnp.int32), 0)
        return dequantise(weights[f"layers/{name}/kernel"][i + zero], dtype)

    def linear(i, name, x):
        y, adapter = x @ kernel(i, name, x), [weights.get(f"layers/{i}/{name}/{part}") for part in ("lora_a", "lora_b")]
        return y if adapter[0] is None else y + (x @ adapter[0]) @ adapter[1]

    def queries_keys_values(i, x):
        """[B, T, K, G + 2, d]."""
        if f"layers/{i}/qkv/kernel" in weights:
            return jnp.einsum("btd,dkgh->btkgh", x, weights[f"layers/{i}/qkv/kernel"].astype(dtype))
        heads = cache.keys[0].shape[1]
        q, k, v = (linear(i, name, x) for name in "qkv")
        q = rearrange(q, "b t (k g d) -> b t k g d", k=heads, d=c.head_dim)
        repeats = heads // c.num_kv_heads
        k, v = (repeat(y, "b t (k d) -> b t (k r) 1 d", r=repeats, d=c.head_dim) for y in (k, v))
        return jnp.concatenate([q, k, v], axis=-2)

    def gate_up(i, x):
        """[B, T, 2, F], without a gate [B, T, 1, F]."""
        if f"layers/{i}/gate_up/kernel" in weights:
            return jnp.einsum("btd,dnf->btnf", x, weights[f"layers/{i}/gate_up/kernel"].astype(dtype))
        return jnp.stack([linear(i, name, x) for name in (("gate", "up") if c.gated_mlp else ("up",))], axis=-2)

    new_keys, new_values = [], []

    def attend_layer(i, x):
        name, rope, window = f"layers/{i}", c.layer_rope(i), c.window(i)
        qkv = layout.constrain(biased(f"{name}/qkv", queries_keys_values(i, x)), "batch", None, "kv_heads", None, None)
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        if c.qk_norm != "none":
            q, k = norm(f"{name}/q_norm", q, over=c.qk_norm), norm(f"{name}/k_norm", k, over=c.qk_norm)
        if rope:
            q, k = (rotate(y, all_turns[rope], interleaved=rope.interleaved) for y in (q, k))
        if fused:
            y = attend_fused(q, k, v, scale=c.attention_scale, window=uniform_window(c, length))
            k, v = (roll_rows(y, -padding) for y in (k, v))
        k, v = (rearrange(y, "b t k d -> b k t d") for y in (k, v))
        new_keys.append(written(cache.keys[i], k, 2))
        new_values.append(written(cache.values[i], v, 2))
        if not fused:
            keys, values = (k, v) if is_prefill else (new_keys[i], new_values[i])
            within = looks_at & (back < window) if window else looks_at
            y = attend(q, keys, values, within, scale=c.attention_scale, cap=c.attention_softcap, bias=bias)
        y = layout.constrain(rearrange(y, "b t k g d -> b t (k g d)"), "batch", None, "heads")
        return biased(f"{name}/o", linear(i, "o", y))

    def mlp(i, x):
        name, act = f"layers/{i}", ACTIVATIONS[c.activation]
        if c.experts:
            routing = route(c.experts, x, weights[f"{name}/router/kernel"])
            kernels = [kernel(i, f"experts/{kind}", x) for kind in ("gate", "up", "down")]
            return apply_experts(x, routing, *kernels, activation=c.activation, layout=layout)
        y = biased(f"{name}/gate_up", gate_up(i, x))
        y = layout.constrain(y, "batch", None, None, "mlp")
        y = act(y[:, :, 0]) * y[:, :, 1] if c.gated_mlp else act(y[:, :, 0])
        return biased(f"{name}/down", linear(i, "down", y))

    x = jnp.take(weights["embed/tokens"], tokens, axis=0).astype(dtype) * jnp.asarray(c.embed_scale, dtype)
    if c.embed_size != c.hidden_size:
        x = x @ weights["project_in/kernel"].astype(dtype)
    if c.position_rows:
        x = x + jnp.take(weights["embed/positions"], positions + c.position_offset, axis=0).astype(dtype)
    if c.embed_norm:
        x = norm("embed/norm", x)
    for i in range(c.num_layers):
        x = layout.constrain(x, "batch", None, None)
        parts = (lambda x, i=i: attend_layer(i, x)), (lambda x, i=i: mlp(i, x))
        x = block(c.residual, x, lambda name, x, i=i: norm(f"layers/{i}/{name}", x), *parts)
    if c.final_norm:
        x = norm("final_norm", x)
    if fused:
        x = roll_rows(x, -padding)
    if c.embed_size != c.hidden_size:
        x = x @ weights["project_out/kernel"].astype(dtype)
    return layout.constrain(x, "batch", None, None), Cache(tuple(new_keys), tuple(new_values), visible)


def logits_of(config: DecoderConfig, weights: Weights, hidden: jax.Array) -> jax.Array:
    """[..., E] -> [..., V] float32; rows that only pad the vocabulary are the lowest finite number."""
    kernel = weights.get("head/kernel")
    if kernel is None:
        kernel = weights["embed/tokens" if config.tied else "head/rows"].T
    logits = head_logits(hidden, kernel, weights.get("head/bias"), config.final_softcap)
    real = jnp.arange(config.padded_vocab) < config.vocab_size
    return jnp.where(real, logits, jnp.finfo(jnp.float32).min)
