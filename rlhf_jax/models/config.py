"""What distinguishes one checkpoint's architecture from another's: a choice for every real difference, and no code.

`families/` reads these choices from a config.json; `decoder.py` and `inference.py` act on them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from rlhf_jax.loss_scale import LossScaleConfig
from rlhf_jax.models.lora import NO_LORA, LoraConfig

Remat = Literal["layers", "dots", "none"]
Choice = Literal["auto", "xla", "cudnn"]

# What a block does with its norms; the names are those of the parameters.
BLOCK_NORMS = {
    "pre": ("attention_norm", "mlp_norm"),  # before each half
    "post": ("attention_norm", "mlp_norm"),  # after each sum (OPT-350M)
    "output": ("attention_out_norm", "mlp_out_norm"),  # on what each half gives, before the sum (OLMo 2)
    "sandwich": ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"),  # before and after (Gemma 2)
    "parallel": ("attention_norm", "mlp_norm"),  # both halves read the block's input (GPT-NeoX)
    "parallel_shared": ("attention_norm",),  # and share its norm (GPT-J)
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first 2 x len(frequencies) dimensions of each head; the others are not rotated."""

    frequencies: tuple[float, ...]  # radians per position, of each pair of dimensions; any scaling is in them
    interleaved: bool = False  # pairs are (0, 1), (2, 3), ... in place of (0, n/2), (1, n/2 + 1), ...
    factor: float = 1.0  # multiplies cosine and sine (yarn)


@dataclass(frozen=True)
class Alibi:
    """Linear biases of attention (Press et al. 2022): slope of the head x position of the key x scale."""

    slopes: tuple[float, ...]  # of each query head
    scale: float = 1.0
    rounded: bool = False  # slope x position is rounded to bfloat16, as Falcon was trained


@dataclass(frozen=True)
class Experts:
    """A sparse MLP: each token goes to a few of many gated MLPs, whose width is `mlp_size`."""

    count: int
    per_token: int
    renormalised: bool  # the weights of the chosen experts sum to 1
    aux_coef: float  # of the router's load-balancing loss (Fedus et al. 2021, eq. 4) in training


@dataclass(frozen=True)
class Compute:
    """How the forward and backward passes are computed.

    Attributes:
        dtype: of activations, matrix products, generation weights and cache.
        remat: "layers" keeps the input of each layer and recomputes the rest in the backward pass; "dots" keeps the
            outputs of its matrix products too, attention's scores apart; "none" keeps everything. Where kernels are
            `Unstacked`, "dots" on a GPU is "none": see `recomputed`.
        chunk: positions whose logits exist at once; 0: all.
        attention: the kernel of training, scoring and prefill, see `kernel_for_mesh`.
        scaling: of the loss, in float16; None: the loss is not scaled.
    """

    dtype: jnp.dtype
    remat: Remat = "layers"
    chunk: int = 0
    attention: Choice = "auto"
    scaling: LossScaleConfig | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """One architecture. Sizes, then embedding, block, attention, MLP, head."""

    family: str  # a key of families.FAMILIES
    vocab_size: int  # as in the checkpoint
    padded_vocab: int  # rows of the embedding and head; those past vocab_size are never drawn and never seen outside
    hidden_size: int
    embed_size: int  # hidden_size, except for OPT-350M, which projects in and out
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int

    embed_scale: float = 1.0  # multiplies embeddings (Gemma)
    embed_norm: bool = False  # LayerNorm after the embedding (BLOOM)
    position_rows: int = 0  # of a table of learned positions; 0: there is none
    position_offset: int = 0  # rows of it that come before position 0 (OPT)

    norm: Literal["layer", "rms", "rms_plus_one"] = "layer"  # rms_plus_one scales by 1 + its parameter (Gemma)
    norm_eps: float = 1e-5
    residual: str = "pre"  # a key of BLOCK_NORMS
    final_norm: bool = True

    rope: Rope | None = None
    local_rope: Rope | None = None  # of layers with a window, where theirs differs (Gemma 3)
    alibi: Alibi | None = None
    windows: tuple[int, ...] = ()  # of each layer: how many keys back a query sees, itself included; 0: all. (): none
    attention_scale: float = 1.0  # multiplies the products of queries and keys
    attention_softcap: float = 0.0  # cap x tanh(scores / cap); 0: none (Gemma 2)
    qkv_bias: bool = False
    o_bias: bool = False
    # A norm of queries and keys before they are rotated: of each head by one scale (Qwen3; under "layer" with a bias:
    # Phi), by a scale a head (StableLM), or of all heads together (OLMo 2).
    qk_norm: Literal["none", "head", "each_head", "width"] = "none"

    activation: str = "gelu"  # a key of layers.ACTIVATIONS
    gated_mlp: bool = False
    mlp_bias: bool = False
    experts: Experts | None = None  # in place of the MLP, in every layer

    tied: bool = False  # the head is the embedding
    head_bias: bool = False
    final_softcap: float = 0.0  # of the logits; 0: none
    scalar_head: bool = False  # a reward model or critic: one number a position in place of the vocabulary
    lora: LoraConfig = NO_LORA  # adapters of its linears; rank 0: none

    def without_lora(self) -> DecoderConfig:
        return dataclasses.replace(self, lora=NO_LORA)

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0
