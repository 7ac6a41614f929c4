"""One decoder for every family, as an NNX module with stacked layers; its abstract tree is what everybody else reads.

B batch, T positions, D hidden, E embedding (= D but for OPT-350M), V vocabulary, F MLP width, H query heads,
K key-value heads, d head size, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from rlhf_jax.mesh import Layout
from rlhf_jax.models.layers import ACTIVATIONS, POSITION_OFFSET, attend, normalise, positions_of, rotate
from rlhf_jax.models.lora import LoraConfig

NO_LORA = LoraConfig()
Pin = Callable[[jax.Array], jax.Array]  # keeps [B, T, ...] split by its batch: left alone, XLA also tries heads, badly


@dataclass(frozen=True)
class DecoderConfig:
    """What distinguishes one checkpoint's architecture from another's."""

    family: str  # "opt" | "llama": the table of tensor names
    vocab_size: int  # as in the checkpoint
    padded_vocab: int  # rows of the embedding and head; those past vocab_size are never drawn and never seen outside
    hidden_size: int
    embed_size: int  # hidden_size, but for OPT-350M, which projects in and out
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    activation: str  # a key of layers.ACTIVATIONS
    gated_mlp: bool
    norm: str  # "layer" | "rms"
    norm_eps: float
    post_norm: bool  # norms after the residual sums (OPT-350M)
    final_norm: bool
    rope_theta: float  # 0.0: learned positions
    attention_bias: bool
    mlp_bias: bool
    tied: bool  # the head is the embedding
    scalar_head: bool  # a reward model or critic: one number a position in place of the vocabulary


def _param(init, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


# Variance 1 / in, whatever the width: a fixed 0.02, as large checkpoints use, keeps a small model from learning.
_kernel = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_embedding = jax.nn.initializers.variance_scaling(1.0, "fan_out", "normal")
_zeros, _ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
# Kaiming uniform with a = sqrt(5), as torch and PEFT start A: U(-1/sqrt(in), 1/sqrt(in)).
_lora_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Linear(nnx.Module):
    """x [..., in] -> [..., out], with its adapter where the configuration asks for one."""

    def __init__(self, sizes, axes, *, bias: bool, lora: LoraConfig, name: str, rngs: nnx.Rngs, init=_kernel):
        self.kernel = _param(init, rngs, sizes, axes)
        self.bias = _param(_zeros, rngs, sizes[1:], axes[1:]) if bias else None
        adapted = lora.rank > 0 and name in lora.targets
        self.lora_a = _param(_lora_a, rngs, (sizes[0], lora.rank), (axes[0], "rank")) if adapted else None
        self.lora_b = _param(_zeros, rngs, (lora.rank, sizes[1]), ("rank", axes[1])) if adapted else None
        self.lora_scale = lora.scale if adapted else 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.lora_a is not None:
            y = y + (x @ self.lora_a[...].astype(x.dtype)) @ (self.lora_scale * self.lora_b[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.scale = _param(_ones, rngs, (config.hidden_size,), ("embed",))
        has_bias = config.norm == "layer"
        self.bias = _param(_zeros, rngs, (config.hidden_size,), ("embed",)) if has_bias else None
        self.kind, self.eps = config.norm, config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return normalise(
            x, self.scale[...], None if self.bias is None else self.bias[...], kind=self.kind, eps=self.eps
        )


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, lora: LoraConfig, rngs: nnx.Rngs):
        self.config = config
        hidden, head = config.hidden_size, config.head_dim
        linear = functools.partial(Linear, bias=config.attention_bias, lora=lora, rngs=rngs)
        self.q = linear((hidden, config.num_heads * head), ("embed", "heads"), name="q")
        self.k = linear((hidden, config.num_kv_heads * head), ("embed", "kv_heads"), name="k")
        self.v = linear((hidden, config.num_kv_heads * head), ("embed", "kv_heads"), name="v")
        self.o = linear((config.num_heads * head, hidden), ("heads", "embed"), name="o")

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array, pin: Pin) -> jax.Array:
        """x [B, T, D], positions [B, T], mask [B, T, T] -> [B, T, D]."""
        c = self.config
        q, k, v = pin(self.q(x)), pin(self.k(x)), pin(self.v(x))
        q = rearrange(q, "b t (k g d) -> b t k g d", k=c.num_kv_heads, d=c.head_dim)
        k, v = (rearrange(y, "b t (k d) -> b t k d", d=c.head_dim) for y in (k, v))
        if c.rope_theta:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        k, v = (rearrange(y, "b t k d -> b k t d") for y in (k, v))
        return pin(self.o(pin(rearrange(attend(q, k, v, mask), "b t k g d -> b t (k g d)"))))


class Mlp(nnx.Module):
    def __init__(self, config: DecoderConfig, lora: LoraConfig, rngs: nnx.Rngs):
        linear = functools.partial(Linear, bias=config.mlp_bias, lora=lora, rngs=rngs)
        up = (config.hidden_size, config.mlp_size), ("embed", "mlp")
        self.gate = linear(*up, name="gate") if config.gated_mlp else None
        self.up = linear(*up, name="up")
        self.down = linear((config.mlp_size, config.hidden_size), ("mlp", "embed"), name="down")
        self.activation = config.activation

    def __call__(self, x: jax.Array, pin: Pin) -> jax.Array:
        act, up = ACTIVATIONS[self.activation], pin(self.up(x))
        return pin(self.down(act(up) if self.gate is None else act(pin(self.gate(x))) * up))


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, lora: LoraConfig, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = Norm(config, rngs), Norm(config, rngs)
        self.attention, self.mlp = Attention(config, lora, rngs), Mlp(config, lora, rngs)
        self.post_norm = config.post_norm

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array, pin: Pin) -> jax.Array:
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x, positions, mask, pin))
            return self.mlp_norm(x + self.mlp(x, pin))
        x = x + self.attention(self.attention_norm(x), positions, mask, pin)
        return x + self.mlp(self.mlp_norm(x), pin)


class Table(nnx.Module):
    """A lookup table; `tokens`, `positions` and `kernel` name it in the tree."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.tokens = _param(_embedding, rngs, (config.padded_vocab, config.embed_size), ("vocab", "embed"))
        if not config.rope_theta:
            rows = config.max_positions + POSITION_OFFSET
            self.positions = _param(_embedding, rngs, (rows, config.hidden_size), (None, "positions"))


class Decoder(nnx.Module):
    """Token ids to the hidden states that the head reads: [B, T] -> [B, T, E]."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig, key: jax.Array):
        self.config = config
        rngs = nnx.Rngs(key)
        linear = functools.partial(Linear, bias=False, lora=NO_LORA, name="", rngs=rngs)
        hidden, embed = config.hidden_size, config.embed_size
        self.embed = Table(config, rngs)
        if embed != hidden:
            self.project_in = linear((embed, hidden), ("embed", "positions"))
            self.project_out = linear((hidden, embed), ("positions", "embed"))
        if config.final_norm:
            self.final_norm = Norm(config, rngs)
        if config.scalar_head:
            self.score = linear((embed, 1), ("embed", None))
        elif not config.tied:
            self.head = linear((config.padded_vocab, embed), ("vocab", "embed"), init=_embedding)
        graph, _ = nnx.split(nnx.eval_shape(lambda: Block(config, lora, nnx.Rngs(0))))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.merge(graph, jax.vmap(lambda k: nnx.state(Block(config, lora, nnx.Rngs(k))))(keys))

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, *, dtype: jnp.dtype, layout: Layout | None = None, remat: bool = True
    ) -> jax.Array:
        """The states that the head reads, [B, T, E] in `dtype`; on padding finite and of no meaning.

        Args:
            tokens: [B, T] int32.
            mask: [B, T] bool, true on real tokens; padding may lie on either side.
            dtype: of the activations and of every matrix product.
            layout: where activations lie; None leaves that to the compiler.
            remat: recompute each layer in the backward pass, keeping only its input.
        """
        pin: Pin = (lambda x: x) if layout is None else (lambda x: layout.constrain(x, "batch", None, None))
        positions = positions_of(mask)
        x = jnp.take(self.embed.tokens[...], tokens, axis=0).astype(dtype)
        if self.config.embed_size != self.config.hidden_size:
            x = self.project_in(x)
        if not self.config.rope_theta:
            x = x + jnp.take(self.embed.positions[...], positions + POSITION_OFFSET, axis=0).astype(dtype)
        chex.assert_equal_shape((tokens, mask))
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        visible = causal & mask[:, None, :]
        graph, layers = nnx.split(self.layers)

        def layer(x, weights):
            return nnx.merge(graph, weights)(x, positions, visible, pin), None

        step = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        x, _ = jax.lax.scan(step, pin(x), layers)
        if self.config.final_norm:
            x = self.final_norm(x)
        return x if self.config.embed_size == self.config.hidden_size else self.project_out(x)


class Leaf(NamedTuple):
    """One parameter of the abstract tree: its shape, and the logical axis of each dimension (None: never split)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@functools.lru_cache
def _skeleton(config: DecoderConfig, lora: LoraConfig):
    """(graphdef, tree structure of the state, {path: Leaf} in the order of its leaves)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, lora, jax.random.key(0))))
    leaves = {}
    for path, variable in nnx.to_flat_state(state):
        stacked = ("layers",) if path[0] == "layers" else ()
        leaves["/".join(path)] = Leaf(tuple(variable.shape), stacked + tuple(variable.get_metadata("axes")))
    return graph, jax.tree.structure(state), leaves


def abstract_params(config: DecoderConfig, lora: LoraConfig = NO_LORA) -> dict[str, Leaf]:
    """{path: Leaf} of every parameter, adapters included where `lora` asks for them; nothing is allocated."""
    return dict(_skeleton(config, lora)[2])


def bind(config: DecoderConfig, params: Mapping[str, jax.Array], lora: LoraConfig = NO_LORA) -> Decoder:
    """The module around these parameters (and adapters): free inside jit."""
    graph, structure, leaves = _skeleton(config, lora)
    assert params.keys() == leaves.keys(), sorted(params.keys() ^ leaves.keys())
    return nnx.merge(graph, jax.tree.unflatten(structure, [params[path] for path in leaves]))


def init_params(
    config: DecoderConfig,
    key: jax.Array,
    layout: Layout,
    lora: LoraConfig = NO_LORA,
    only: Callable[[str], bool] = lambda path: True,
) -> dict[str, jax.Array]:
    """Random float32 parameters and adapters, each born in its shard; `only` picks by path."""
    leaves = {path: leaf for path, leaf in abstract_params(config, lora).items() if only(path)}

    def init(key):
        _, state = nnx.split(Decoder(config, lora, key))
        drawn = {"/".join(path): variable[...] for path, variable in nnx.to_flat_state(state)}
        return {path: drawn[path] for path in leaves}

    return jax.jit(init, out_shardings={path: layout.sharding(leaf.axes) for path, leaf in leaves.items()})(key)


def head_kernel(config: DecoderConfig, params: Mapping[str, jax.Array]) -> jax.Array:
    """[E, V'] over the padded vocabulary, as `token_logprobs` takes it: the transposed embedding where tied."""
    return params["embed/tokens" if config.tied else "head/kernel"].T


def last_hidden(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, S, E] -> [B, E]: the state at the last real token of each row, wherever its padding lies."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def scalar(params: Mapping[str, jax.Array], hidden: jax.Array) -> jax.Array:
    """[..., E] -> [...] float32 by the scalar head."""
    kernel = params["score/kernel"].astype(jnp.float32)
    return jnp.matmul(hidden.astype(jnp.float32), kernel, precision="highest")[..., 0]
