"""One decoder for every family, as an NNX module with stacked layers; other modules read its abstract tree.

B batch, T positions, D hidden, E embedding (= D except for OPT-350M), V vocabulary, F MLP width, H query heads,
K key-value heads, d head size, L layers, X experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from rlhf_jax.mesh import Layout
from rlhf_jax.models.attention import kernel_for_mesh
from rlhf_jax.models.config import BLOCK_NORMS, Compute, DecoderConfig
from rlhf_jax.models.experts import balance_loss, router_load
from rlhf_jax.models.layers import (
    AttentionContext,
    add_bias,
    attention_context,
    embed,
    normalise,
    token_positions,
    visible_keys,
)
from rlhf_jax.models.lora import NO_LORA
from rlhf_jax.models.quantised import Quantised, multiply
from rlhf_jax.models.transformer import embed_tokens, tail, transformer_block
from rlhf_jax.models.unstacked import Param, has_unstacked, remat_layer, scan_layers
from rlhf_jax.objectives.logprobs import head_logits
from rlhf_jax.products import matmul


def _param(init, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


# Variance 1 / in, whatever the width: a fixed 0.02, as large checkpoints use, keeps a small model from learning.
_kernel = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_expert_kernel = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
_embedding = jax.nn.initializers.variance_scaling(1.0, "fan_out", "normal")
_zeros, _ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
# Kaiming uniform with a = sqrt(5), as torch and PEFT start A: U(-1/sqrt(in), 1/sqrt(in)).
_lora_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Linear(nnx.Module):
    """x [..., in] -> [..., out], with its adapter where the configuration asks for one."""

    def __init__(self, sizes, axes, rngs: nnx.Rngs, *, bias=False, lora=NO_LORA, name="", init=_kernel):
        self.kernel = _param(init, rngs, sizes, axes)
        self.bias = _param(_zeros, rngs, sizes[1:], axes[1:]) if bias else None
        adapted = lora.rank > 0 and name in lora.targets
        self.lora_a = _param(_lora_a, rngs, (sizes[0], lora.rank), (axes[0], "rank")) if adapted else None
        self.lora_b = _param(_zeros, rngs, (lora.rank, sizes[1]), ("rank", axes[1])) if adapted else None
        self.lora_scale = lora.scale if adapted else 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        y = multiply(x, self.kernel[...])
        if self.lora_a is not None:
            scaled = (self.lora_scale * self.lora_b[...]).astype(x.dtype)
            y = y + matmul(matmul(x, self.lora_a[...].astype(x.dtype)), scaled)
        return y if self.bias is None else add_bias(y, self.bias[...])


class Norm(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, shape: tuple[int, ...] = (), *, bias: bool = True):
        axes = (None,) * len(shape) if shape else ("embed",)
        shape = shape or (config.hidden_size,)
        self.scale = _param(_zeros if config.norm == "rms_plus_one" else _ones, rngs, shape, axes)
        self.bias = _param(_zeros, rngs, shape, axes) if bias and config.norm == "layer" else None
        self.kind, self.eps = config.norm, config.norm_eps

    def __call__(self, x: jax.Array, *, over: str = "") -> jax.Array:
        scale, bias = self.scale[...], None if self.bias is None else self.bias[...]
        return normalise(x, scale, bias, kind=self.kind, eps=self.eps, over=over)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        hidden, head, heads, kv_heads = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        linear = functools.partial(Linear, rngs=rngs, lora=config.lora)
        project = functools.partial(linear, bias=config.qkv_bias)
        self.q = project((hidden, heads * head), ("embed", "heads"), name="q")
        self.k = project((hidden, kv_heads * head), ("embed", "kv_heads"), name="k")
        self.v = project((hidden, kv_heads * head), ("embed", "kv_heads"), name="v")
        self.o = linear((heads * head, hidden), ("heads", "embed"), bias=config.o_bias, name="o")
        if config.qk_norm != "none":
            shapes = {"head": lambda n: (head,), "each_head": lambda n: (n, head), "width": lambda n: (n * head,)}
            shape, bias = shapes[config.qk_norm], config.qk_norm == "head"
            self.q_norm, self.k_norm = (Norm(config, rngs, shape(n), bias=bias) for n in (heads, kv_heads))


class Mlp(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        linear = functools.partial(Linear, rngs=rngs, bias=config.mlp_bias, lora=config.lora)
        up = (config.hidden_size, config.mlp_size), ("embed", "mlp")
        self.gate = linear(*up, name="gate") if config.gated_mlp else None
        self.up = linear(*up, name="up")
        self.down = linear((config.mlp_size, config.hidden_size), ("mlp", "embed"), name="down")


class ExpertKernels(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        up = (config.experts.count, config.hidden_size, config.mlp_size), ("experts", "embed", "mlp")
        down = (config.experts.count, config.mlp_size, config.hidden_size), ("experts", "mlp", "embed")
        self.gate, self.up, self.down = (Linear(*sizes, rngs, init=_expert_kernel) for sizes in (up, up, down))


class Block(nnx.Module):
    """One layer, as the parts of `transformer`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        for name in BLOCK_NORMS[config.residual]:
            setattr(self, name, Norm(config, rngs))
        self.attention = Attention(config, rngs)
        if config.experts:
            self.router = Linear((config.hidden_size, config.experts.count), ("positions", "experts"), rngs)
            self.experts = ExpertKernels(config, rngs)
        else:
            self.mlp = Mlp(config, rngs)

    def __call__(self, x: jax.Array, context: AttentionContext, window: jax.Array | None):
        """x [B, T, D], window [] int32 -> ([B, T, D], the loads [2, X] of the experts; None where there are none)."""
        x, _, routing = transformer_block(self.config, self, x, context, window)
        return x, None if routing is None else router_load(self.config.experts, routing, context.real)

    def norm(self, name: str, x: jax.Array, over: str = "") -> jax.Array:
        return getattr(self.attention if over else self, name)(x, over=over)

    def qkv(self, x: jax.Array, context: AttentionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = (context.constrain(project(x)) for project in (self.attention.q, self.attention.k, self.attention.v))
        q = rearrange(q, "b t (k g d) -> b t k g d", k=self.config.num_kv_heads, d=self.config.head_dim)
        return q, *(rearrange(y, "b t (k d) -> b t k d", d=self.config.head_dim) for y in (k, v))

    def out(self, y: jax.Array, context: AttentionContext) -> jax.Array:
        return context.constrain(self.attention.o(context.constrain(y)))

    def gate_up(self, x: jax.Array, context: AttentionContext) -> tuple[jax.Array | None, jax.Array]:
        up = context.constrain(self.mlp.up(x))
        return None if self.mlp.gate is None else context.constrain(self.mlp.gate(x)), up

    def down(self, y: jax.Array, context: AttentionContext) -> jax.Array:
        return context.constrain(self.mlp.down(y))

    def router_kernel(self) -> jax.Array:
        return self.router.kernel[...]

    def expert_kernels(self, x: jax.Array) -> list[jax.Array | Quantised]:
        return [linear.kernel[...] for linear in (self.experts.gate, self.experts.up, self.experts.down)]


class Embedding(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.tokens = _param(_embedding, rngs, (config.padded_vocab, config.embed_size), ("vocab", "embed"))
        if config.position_rows:
            shape = (config.position_rows, config.hidden_size)
            self.positions = _param(_embedding, rngs, shape, (None, "positions"))
        if config.embed_norm:
            self.norm = Norm(config, rngs)


class Head(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape, axes = (config.padded_vocab, config.embed_size), ("vocab", "embed")
        self.kernel = None if config.tied else _param(_embedding, rngs, shape, axes)
        self.bias = _param(_zeros, rngs, shape[:1], axes[:1]) if config.head_bias else None


class Decoder(nnx.Module):
    """Token ids to the hidden states that the head reads, [B, T] -> [B, T, E], and the balance loss."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        self.config = config
        rngs = nnx.Rngs(key)
        hidden, embed = config.hidden_size, config.embed_size
        self.embed = Embedding(config, rngs)
        if embed != hidden:
            self.project_in = Linear((embed, hidden), ("embed", "positions"), rngs)
            self.project_out = Linear((hidden, embed), ("positions", "embed"), rngs)
        if config.final_norm:
            self.final_norm = Norm(config, rngs)
        if config.scalar_head:
            self.score = Linear((embed, 1), ("embed", None), rngs)
        else:
            self.head = Head(config, rngs)
        graph, _ = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.merge(graph, jax.vmap(lambda k: nnx.state(Block(config, nnx.Rngs(k))))(keys))

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        compute: Compute,
        layout: Layout | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The states that the head reads and, to be added to the loss that trains them, the balance loss of experts.

        Args:
            tokens: [B, T] int32.
            mask: [B, T] bool, true on real tokens; padding may be on either side, and on the right only where
                attention is fused.
            compute: of which `chunk` is for the head, see `token_logprobs`.
            layout: of the activations; None leaves that to the compiler, and attention to XLA.
            segments: [B, T] int32 of rows that hold several documents end to end: the document of each token, counted
                from 1 in its row, 0 on padding. None of them sees another, and positions start at 0 in each: a document
                has the states that it has alone. None: a row is one document. Packed rows are never fused.
        Returns:
            [B, T, E] in `dtype`, finite but meaningless on padding; [] float32, 0 without experts.
        """
        packed = segments is not None
        chex.assert_equal_shape((tokens, mask, segments) if packed else (tokens, mask))
        c, dtype, remat, positions = self.config, compute.dtype, compute.remat, token_positions(mask, segments)
        length, choice = tokens.shape[1], compute.attention
        fused = layout and kernel_for_mesh(layout.mesh, c, dtype, length, choice, packed=packed).name == "cudnn"
        x = embed_tokens(c, self, tokens, positions, dtype)
        visible = None if fused else visible_keys(mask, segments)
        context = attention_context(c, mask, positions, layout, visible=visible)
        graph, layers = nnx.split(self.layers)

        def layer(x, weights_and_window, context=context):
            weights, window = weights_and_window
            return nnx.merge(graph, weights)(x, context._replace(layout=layout), window)

        step, alone = layer, layout is None or layout.mesh.size == 1
        if remat == "layers" and has_unstacked(layers) and alone:
            step = remat_layer(layer, context._replace(layout=None))
        elif remat != "none":
            kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            # A scan keeps what is computed twice apart by itself.
            step = jax.checkpoint(layer, prevent_cse=has_unstacked(layers), policy=kept)
        windows = jnp.asarray(c.windows, jnp.int32) if c.windows else None
        x, loads = scan_layers(step, context.constrain(x), (layers, windows), unroll=is_unrolled(layout, compute))
        return tail(c, self, x), balance_loss(c.experts, loads) if c.experts else jnp.float32(0)

    def rows(self, name: str, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return embed(getattr(self.embed, name)[...], ids, dtype)

    def project(self, name: str, x: jax.Array) -> jax.Array:
        return getattr(self, name)(x)

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        return (self.embed.norm if name == "embed/norm" else self.final_norm)(x)


def is_unrolled(layout: Layout | None, compute: Compute) -> bool:
    """Whether layers follow one another in the program, in place of a loop: on a single CPU, where what a loop keeps
    for the backward pass is filled with zeros and copied first."""
    return layout is not None and layout.on_one_cpu and compute.remat == "none"


class Leaf(NamedTuple):
    """One parameter of the abstract tree: its shape, and the logical axis of each dimension (None: never split)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@functools.lru_cache
def _skeleton(config: DecoderConfig):
    """(graphdef, tree structure of the state, {path: Leaf} in the order of its leaves)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    leaves = {}
    for path, variable in nnx.to_flat_state(state):
        stacked = ("layers",) if path[0] == "layers" else ()
        leaves["/".join(path)] = Leaf(tuple(variable.shape), stacked + tuple(variable.get_metadata("axes")))
    return graph, jax.tree.structure(state), leaves


def abstract_params(config: DecoderConfig) -> dict[str, Leaf]:
    """{path: Leaf} of every parameter and adapter; nothing is allocated."""
    return dict(_skeleton(config)[2])


def bind(config: DecoderConfig, params: Mapping[str, Param]) -> Decoder:
    """The module around these parameters (and adapters), kernels quantised, stacked or neither: free inside jit."""
    graph, structure, leaves = _skeleton(config)
    assert params.keys() == leaves.keys(), sorted(params.keys() ^ leaves.keys())
    return nnx.merge(graph, jax.tree.unflatten(structure, [params[path] for path in leaves]))


def init_params(
    config: DecoderConfig, key: jax.Array, layout: Layout, only: Callable[[str], bool] = lambda path: True
) -> dict[str, jax.Array]:
    """Random float32 parameters and adapters, each created in its shard; `only` picks by path."""
    leaves = {path: leaf for path, leaf in abstract_params(config).items() if only(path)}

    def init(key):
        _, state = nnx.split(Decoder(config, key))
        drawn = {"/".join(path): variable[...] for path, variable in nnx.to_flat_state(state)}
        return {path: drawn[path] for path in leaves}

    return jax.jit(init, out_shardings={path: layout.sharding(leaf.axes) for path, leaf in leaves.items()})(key)


def head_rows(config: DecoderConfig, params: Mapping[str, jax.Array]) -> jax.Array:
    """[V', E] over the padded vocabulary: the embedding where tied."""
    return params["embed/tokens" if config.tied else "head/kernel"]


def head_kernel(config: DecoderConfig, params: Mapping[str, jax.Array]) -> jax.Array:
    """[E, V'], `head_rows` as `token_logprobs` takes it."""
    return head_rows(config, params).T


def head_options(config: DecoderConfig, params: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The remaining arguments of `token_logprobs` that describe the head."""
    return dict(num_real=config.vocab_size, bias=params.get("head/bias"), softcap=config.final_softcap)


def logits(config: DecoderConfig, params: Mapping[str, jax.Array], hidden: jax.Array) -> jax.Array:
    """[..., E] -> [..., V] float32, without the padding of the vocabulary."""
    bias = params.get("head/bias")
    return head_logits(hidden, head_rows(config, params), bias, config.final_softcap)[..., : config.vocab_size]


def last_hidden(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, S, E] -> [B, E]: the state at the last real token of each row, on whichever side its padding is."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def scalar_scores(params: Mapping[str, jax.Array], hidden: jax.Array) -> jax.Array:
    """[..., E] -> [...] float32 by the scalar head."""
    kernel = params["score/kernel"].astype(jnp.float32)
    return jnp.matmul(hidden.astype(jnp.float32), kernel, precision="highest")[..., 0]
