"""Decoder weights in the generation layout, and the forward pass with a KV cache.

Training keeps layers stacked and every product apart; decoding is bound by reading weights, so it wants each layer's
arrays by themselves, query, key and value in one product and gate and up in one. What is fused is stacked on an axis
that is not sharded (the G query heads of a KV head with its key and value; gate with up), so that no shard moves. Where
there are fewer KV heads than tensor shards, each is repeated until every shard has one of its own. In bfloat16 a
weight has a row for each output, as the head always has: that is the order that products of few activations want. In
other dtypes CPUs are slower with it.

Parameters that both phases share are used as they are; on one device, or where the training layout already is the
generation layout, they are the training arrays themselves: kernels that are quantised (stacked, and each layer
dequantised whenever it is used) or an array for each layer, with separate adapters, and then embedding and head. That
costs time and saves the memory of a copy.

B batch, T new positions, S cache length, D hidden, E embedding, V padded vocabulary, F MLP width, K key-value heads
(repeated), G query heads per KV head, d head size, L layers, X experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from rlhf_jax.mesh import TRAIN, Layout, Table
from rlhf_jax.models.attention import kernel_for_mesh
from rlhf_jax.models.config import Choice, DecoderConfig
from rlhf_jax.models.decoder import Leaf, abstract_params, head_rows
from rlhf_jax.models.layers import (
    AttentionContext,
    attention_context,
    normalise,
    roll_rows,
    token_positions,
    visible_keys,
)
from rlhf_jax.models.lora import is_adapter, merge_adapters
from rlhf_jax.models.quantised import Quantised, dequantise, quantised_shardings
from rlhf_jax.models.transformer import LayerCache, embed_tokens, tail, transformer_block, write
from rlhf_jax.models.unstacked import Param, Unstacked, is_shareable
from rlhf_jax.objectives.logprobs import head_logits
from rlhf_jax.products import einsum, matmul
from rlhf_jax.trees import record

# "layers/0/qkv/rows" [K, G+2, d, D], "layers/0/gate_up/rows" [2, F, D], ..., "head/rows" [V, E]; in other
# dtypes than bfloat16 "layers/0/qkv/kernel" [D, K, G+2, d], ...
# Shared: "layers/0/q/kernel", "layers/0/up/kernel", ..., or, quantised, of all layers together, "layers/q/kernel", ...;
# of each its adapters, "layers/0/q/lora_a" [D, rank], ...; and "head/rows", or the embedding where tied.
Weights = dict[str, jax.Array | Quantised]


@record
class Cache:
    """Keys and values of every layer, in the activations' dtype or, as `empty_cache` says, in float32.

    Attributes:
        keys: L arrays [B, K, S, d], rotated already.
        values: L arrays [B, K, S, d].
        visible: [B, S] bool, true where a real token was written.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    visible: jax.Array


def _kv_repeats(config: DecoderConfig, layout: Layout) -> int:
    """How often each KV head is repeated so that the shards of the layout divide them."""
    shards = layout.shards("kv_heads")
    assert config.num_heads % shards == 0, "heads are checked where models are published"
    return shards // math.gcd(config.num_kv_heads, shards)


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype, layout: Layout) -> Cache:
    """A cache of `length` positions with nothing in it, split by batch and KV heads.

    In `dtype`, of the activations; on CPUs in float32 for bfloat16 and heads with keys of their own: there each write
    converts the whole of an array in bfloat16 to float32 and back, and products of one query are faster.
    """
    if dtype == jnp.bfloat16 and config.num_kv_heads == config.num_heads and layout.on_cpus:
        dtype = jnp.dtype(jnp.float32)
    shape = (batch, config.num_kv_heads * _kv_repeats(config, layout), length, config.head_dim)

    def zeros() -> tuple[jax.Array, ...]:
        return tuple(
            layout.constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None) for _ in range(config.num_layers)
        )

    return Cache(zeros(), zeros(), layout.constrain(jnp.zeros((batch, length), bool), "batch", None))


def inference_weights(
    config: DecoderConfig, params: Mapping[str, Param], layout: Layout, dtype: jnp.dtype, home: Table = TRAIN
) -> Weights:
    """Training parameters, sharded by `home` -> generation weights in `dtype`, by `layout` (the GENERATE table).

    Adapters are merged. Every parameter is cast, then gathered over fsdp, then cut into layers: in one jit, one
    all-gather per weight. Norms keep their dtype, as training applies them in float32 too.

    The parameters of `shared_paths` are left to `shared_inference_weights`; adapters are then not merged, but separate
    weights.
    """
    kept = shared_paths(params)
    gathered, at_home = {}, Layout(layout.mesh, home)

    def gather(array: jax.Array, leaf: Leaf) -> jax.Array:
        # Without the first pin the compiler gathers what is to be cast, and moves twice the bytes.
        return layout.constrain(at_home.constrain(array, *leaf.axes), *inference_axes(config, leaf, layout))

    weights = _adapters(config, params, layout, dtype, gather) if kept else {}
    if not kept:
        params = merge_adapters(params, config.lora)
    kv_heads, repeats = config.num_kv_heads, _kv_repeats(config, layout)
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
        weights["head/rows"] = layout.constrain(head_rows(config, gathered), "vocab", "embed")
    for path, leaf in leaves.items():
        if not path.startswith(("layers/", "head/kernel", "score/")):
            weights[path] = gathered[path]
        elif path.startswith("layers/") and path.removeprefix("layers/").rpartition("/")[0] not in _FUSED:
            stacked[_name(path)], axes[_name(path)] = gathered[path], leaf.axes[1:]
    for name in ("qkv", "o", "gate_up", "down"):
        if f"{name}/kernel" in stacked and dtype == jnp.bfloat16:
            stacked[f"{name}/rows"] = jnp.moveaxis(stacked.pop(f"{name}/kernel"), 1, -1)
            of_input, *of_output = axes[f"{name}/kernel"]
            axes[f"{name}/rows"] = (*of_output, of_input)
    for name, leaf in stacked.items():
        weights |= {f"layers/{i}/{name}": layout.constrain(leaf[i], *axes[name]) for i in range(config.num_layers)}
    return weights


def _name(path: str) -> str:
    """The part of a weight's name after the layer: layers/attention/q/kernel -> q/kernel."""
    return path.removeprefix("layers/").removeprefix("attention/").removeprefix("mlp/")


def shared_paths(params: Mapping[str, Param]) -> set[str]:
    """Paths of what generation reads as training has it: such kernels, and where there are any, embedding and head."""
    kept = any(isinstance(leaf, Quantised | Unstacked) for leaf in params.values())
    return set(filter(is_shareable, params)) if kept else set()


def shared_inference_weights(
    config: DecoderConfig, params: Mapping[str, Param], layout: Layout, put: Callable[[Any, Any], Any] = jax.device_put
) -> Weights:
    """The shared parameters in their own dtypes: gathered over fsdp or, outside jit, returned as they are where already
    sharded by `layout`. The weights last until the training parameters are gone.

    Args:
        put: (array, sharding) -> array, for callers that want no arrays.
    """
    weights: Weights = {}
    for path in shared_paths(params):
        leaf, where, name = params[path], shared_shardings(config, path, params[path], layout), f"layers/{_name(path)}"
        placed = jax.tree.map(put, leaf, where)
        if isinstance(leaf, Unstacked):
            weights |= {f"layers/{i}/{_name(path)}": each for i, each in enumerate(placed.layers)}
        elif isinstance(leaf, Quantised):
            weights[name] = placed
        else:
            weights["head/rows" if path == "head/kernel" else path] = placed
    return weights


def shared_leaves(config: DecoderConfig, layout: Layout) -> dict[str, Leaf]:
    """`abstract_params`, where the axes of what may be shared are those of generation by `layout`."""
    return {
        path: Leaf(leaf.shape, inference_axes(config, leaf, layout)) if is_shareable(path) else leaf
        for path, leaf in abstract_params(config).items()
    }


def shared_shardings(config: DecoderConfig, path: str, leaf: Any, layout: Layout) -> Any:
    """The sharding of each array of a shared parameter by `layout`; its kind is that of `leaf`."""
    axes = shared_leaves(config, layout)[path].axes
    if isinstance(leaf, Quantised):
        return quantised_shardings(axes, leaf.kind, layout)
    if isinstance(leaf, Unstacked):
        return Unstacked((layout.sharding(axes[1:]),) * len(leaf.layers))
    return layout.sharding(axes)


def _adapters(config: DecoderConfig, params, layout: Layout, dtype, gather) -> Weights:
    """The adapters of each layer, B times the scale."""
    weights: Weights = {}
    for path, leaf in abstract_params(config).items():
        if is_adapter(path):
            adapter = (config.lora.scale * params[path] if path.endswith("lora_b") else params[path]).astype(dtype)
            adapter = gather(adapter, leaf)
            axes = inference_axes(config, leaf, layout)[1:]
            weights |= {
                f"layers/{i}/{_name(path)}": layout.constrain(adapter[i], *axes) for i in range(config.num_layers)
            }
    return weights


def inference_axes(config: DecoderConfig, leaf: Leaf, layout: Layout) -> tuple[str | None, ...]:
    """A KV head that several shards need goes to all of them."""
    few = _kv_repeats(config, layout) > 1
    return tuple(None if axis == "kv_heads" and few else axis for axis in leaf.axes)


_FUSED = ("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up")


@dataclass(frozen=True)
class Inference:
    """How a model generates.

    Attributes:
        layout: of weights and cache, by GENERATE.
        dtype: of activations, matrix products and, as `empty_cache` says, cache.
        attention: the kernel of a prefill, see `kernel_for_mesh`; one query is XLA's.
    """

    config: DecoderConfig
    layout: Layout
    dtype: jnp.dtype
    attention: Choice = "auto"


def forward(
    model: Inference,
    weights: Weights,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    cache: Cache,
    index: jax.Array | int,
    reach: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Hidden states of T new tokens, whose keys and values are written to the cache at `index` .. `index` + T - 1.

    Args:
        tokens, mask, positions: [B, T]; a token with a false mask is padding and is never looked at.
        index: where to write; 0 with T > 1 is a prefill, which looks at the new tokens only; its rows are left-padded.
            [B]: where to write in each row; one place for all rows costs less.
        reach: positions of the cache that one new token of each row attends to, the first of S; None: all. The cache
            may then have more rows than B, which stay as they are.

    Returns:
        ([B, T, E] in the model's dtype, the cache with the new tokens in it)
    """
    chex.assert_equal_shape((tokens, mask, positions))
    c, layout, length = model.config, model.layout, tokens.shape[1]
    assert length == 1 or (jnp.ndim(index) == 0 and index == 0), "several tokens at once are a prefill, at index 0"
    whole, padding = write(cache.visible, mask, index, axis=1), None
    stored = whole if reach is None else whole[: len(tokens), :reach]
    if length > 1 and kernel_for_mesh(layout.mesh, c, model.dtype, length, model.attention).name == "cudnn":
        padding = jnp.argmax(mask, axis=1)  # fused attention takes right-padded rows
        tokens, positions = roll_rows(tokens, padding), roll_rows(positions, padding)
    if length > 1:
        back, key_positions, visible = None, positions, None if padding is not None else visible_keys(mask)
    else:
        back, key_positions = jnp.asarray(index)[..., None, None] - jnp.arange(stored.shape[1]), token_positions(stored)
        visible = (back >= 0) & stored[:, None, :]
    keys = dict(visible=visible, back=back, key_positions=key_positions, kv_heads=cache.keys[0].shape[1])
    context, outside = attention_context(c, mask, positions, layout, **keys), _Parts(c, weights)
    x, layers = embed_tokens(c, outside, tokens, positions, model.dtype), []
    for i in range(c.num_layers):
        layer = LayerCache(cache.keys[i], cache.values[i], index, padding, reach)
        x, parts = layout.constrain(x, "batch", None, None), _Parts(c, weights, f"layers/{i}/", i)
        x, layer, _ = transformer_block(c, parts, x, context, c.window(i) or None, layer)
        layers.append(layer)
    x = tail(c, outside, x)
    if padding is not None:
        x = roll_rows(x, -padding)
    new = Cache(tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers), whole)
    return layout.constrain(x, "batch", None, None), new


class _Parts(NamedTuple):
    """Weights as the parts of `transformer`: those of one layer, by its prefix and number, or those outside."""

    config: DecoderConfig
    weights: Weights
    prefix: str = ""
    layer: int = 0

    def get(self, name: str) -> jax.Array | None:
        return self.weights.get(self.prefix + name)

    def rows(self, name: str, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.take(self.weights[f"embed/{name}"], ids, axis=0).astype(dtype)

    def project(self, name: str, x: jax.Array) -> jax.Array:
        return matmul(x, self.weights[f"{name}/kernel"].astype(x.dtype))

    def norm(self, name: str, x: jax.Array, over: str = "") -> jax.Array:
        scale, bias = self.get(f"{name}/scale"), self.get(f"{name}/bias")
        return normalise(x, scale, bias, kind=self.config.norm, eps=self.config.norm_eps, over=over)

    def add_bias(self, name: str, x: jax.Array) -> jax.Array:
        bias = self.get(f"{name}/bias")
        return x if bias is None else x + bias.astype(x.dtype)

    def kernel(self, name: str, x: jax.Array) -> jax.Array:
        """Dense. Its index is made to depend on x, by a zero that the compiler cannot see: it would move what depends
        on nothing before the layer, or out of the decoding loop, and all layers be dense at once."""
        kernel = self.get(f"{name}/kernel")
        if kernel is not None:
            return kernel.astype(x.dtype)
        zero = jnp.minimum(jnp.isinf(x[0, 0, 0]).astype(jnp.int32), 0)
        return dequantise(self.weights[f"layers/{name}/kernel"][self.layer + zero], x.dtype)

    def product(self, x: jax.Array, name: str, by_rows: str, by_kernel: str = "") -> jax.Array | None:
        """x [B, T, D] by a weight, by the `einsum` of the order that it has; None: there is none of this name."""
        for order, spec in (("rows", by_rows), ("kernel", by_kernel)):
            weight = self.get(f"{name}/{order}") if spec else None
            if weight is not None:
                return einsum(spec, x, weight.astype(x.dtype))
        return None

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        y = self.product(x, name, "btd,fd->btf")
        if y is not None:
            return y
        y, a = matmul(x, self.kernel(name, x)), self.get(f"{name}/lora_a")
        return y if a is None else y + matmul(matmul(x, a), self.get(f"{name}/lora_b"))

    def qkv(self, x: jax.Array, context: AttentionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        layout = context.layout
        qkv = self.product(x, "qkv", "btd,kghd->btkgh", "btd,dkgh->btkgh")
        if qkv is None:
            head, repeats = self.config.head_dim, _kv_repeats(self.config, layout)
            q, k, v = (self.linear(name, x) for name in "qkv")
            q = rearrange(q, "b t (k g d) -> b t k g d", k=self.config.num_kv_heads * repeats, d=head)
            k, v = (repeat(y, "b t (k d) -> b t (k r) 1 d", r=repeats, d=head) for y in (k, v))
            qkv = jnp.concatenate([q, k, v], axis=-2)
        qkv = layout.constrain(self.add_bias("qkv", qkv), "batch", None, "kv_heads", None, None)
        return qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]

    def out(self, y: jax.Array, context: AttentionContext) -> jax.Array:
        return self.add_bias("o", self.linear("o", context.layout.constrain(y, "batch", None, "heads")))

    def gate_up(self, x: jax.Array, context: AttentionContext) -> tuple[jax.Array | None, jax.Array]:
        gated = self.config.gated_mlp
        y = self.product(x, "gate_up", "btd,nfd->btnf", "btd,dnf->btnf")
        if y is None:
            y = jnp.stack([self.linear(name, x) for name in (("gate", "up") if gated else ("up",))], axis=-2)
        y = context.layout.constrain(self.add_bias("gate_up", y), "batch", None, None, "mlp")
        return y[:, :, 0] if gated else None, y[:, :, -1]

    def down(self, y: jax.Array, context: AttentionContext) -> jax.Array:
        return self.add_bias("down", self.linear("down", y))

    def router_kernel(self) -> jax.Array:
        return self.get("router/kernel")

    def expert_kernels(self, x: jax.Array) -> list[jax.Array]:
        return [self.kernel(f"experts/{kind}", x) for kind in ("gate", "up", "down")]


def inference_logits(config: DecoderConfig, weights: Weights, hidden: jax.Array) -> jax.Array:
    """[..., E] -> [..., V] float32; rows that only pad the vocabulary are the lowest finite number."""
    rows = weights.get("head/rows", weights["embed/tokens"])
    logits = head_logits(hidden, rows, weights.get("head/bias"), config.final_softcap)
    real = jnp.arange(config.padded_vocab) < config.vocab_size
    return jnp.where(real, logits, jnp.finfo(jnp.float32).min)
