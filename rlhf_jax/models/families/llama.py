"""LLaMA, and the families that differ from it in a few choices and hardly in their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.hf_fields import (
    activation,
    equal_windows,
    head_size,
    kv_heads,
    positive_int,
    refuse,
    value_or,
    windows,
)
from rlhf_jax.models.families.rope import rope, rope_parameters, rotary_dim
from rlhf_jax.models.families.tensors import (
    Tensors,
    embedding_and_heads,
    family,
    fused_linears,
    linear,
    norms,
    separate_attention,
)

_NORMS = {  # of a block, by config.residual
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "parallel_shared": {"attention_norm": "input_layernorm"},
    "output": {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}


def llama_fields(
    hf: Mapping[str, Any],
    *,
    kv: int | None = None,
    head_dim: int | None = None,
    theta: float = 10000.0,
    partial: float | None = None,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    tied: bool = False,
) -> dict[str, Any]:
    """Fields of a LLaMA without biases and windows, of which families replace what they do otherwise.

    Args:
        kv, head_dim, theta, tied: what an absent key means; no head_dim: hidden_size over heads.
        partial: the same of partial_rotary_factor; None: heads are rotated whole, and another factor is refused.
        eps: key of the norms' epsilon, and what it means where absent.
    """
    head_dim = value_or(hf, "head_dim", head_dim) or head_size(hf, "hidden_size", "num_attention_heads")
    dim = rotary_dim(hf, head_dim, 1.0 if partial is None else partial)
    if partial is None and dim != head_dim:
        raise ValueError(f"{hf['model_type']} with partial_rotary_factor other than 1 is not supported (config.json)")
    rotary, positions = rope(hf, dim, theta=theta)
    return dict(
        vocab_size=positive_int(hf, "vocab_size"),
        hidden_size=positive_int(hf, "hidden_size"),
        embed_size=hf["hidden_size"],
        num_layers=positive_int(hf, "num_hidden_layers"),
        num_heads=positive_int(hf, "num_attention_heads"),
        num_kv_heads=kv_heads(hf, kv),
        head_dim=head_dim,
        mlp_size=positive_int(hf, "intermediate_size"),
        max_positions=positions,
        norm="rms",
        norm_eps=float(value_or(hf, *eps)),
        rope=rotary,
        attention_scale=head_dim**-0.5,
        activation=activation(hf, "hidden_act", "silu"),
        gated_mlp=True,
        tied=value_or(hf, "tie_word_embeddings", tied),
    )


def attention_biases(hf: Mapping[str, Any]) -> dict[str, bool]:
    """The fields that attention_bias stands for."""
    return dict.fromkeys(("qkv_bias", "o_bias"), value_or(hf, "attention_bias", False))


def upper_layer_windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """Qwen's: none without use_sliding_window, and with it in the layers from max_window_layers on."""
    window = hf.get("sliding_window", 4096) if value_or(hf, "use_sliding_window", False) else None
    first = value_or(hf, "max_window_layers", 28)
    return windows(
        hf, window, [window is not None and i >= first for i in range(positive_int(hf, "num_hidden_layers"))]
    )


def _llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    equal_windows(hf, None)
    return llama_fields(hf) | attention_biases(hf) | dict(mlp_bias=value_or(hf, "mlp_bias", False))


def _mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return llama_fields(hf, kv=8) | dict(windows=equal_windows(hf, hf.get("sliding_window", 4096)))


def _qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return llama_fields(hf, kv=32) | dict(qkv_bias=True, windows=upper_layer_windows(hf))


def _qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    return (
        llama_fields(hf, kv=32, head_dim=128)
        | attention_biases(hf)
        | dict(qk_norm="head", windows=upper_layer_windows(hf))
    )


def _phi3(hf: Mapping[str, Any]) -> dict[str, Any]:
    parameters = rope_parameters(hf)
    kind = parameters["rope_type"]
    if kind in ("su", "yarn"):  # as longrope was called in its first checkpoints
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise ValueError(f'phi3 with rope scaling "{kind}" is not supported; supported: default, longrope')
    original = value_or(hf, "original_max_position_embeddings", 4096)
    hf = {**hf, "rope_scaling": parameters | {"rope_type": kind}, "original_max_position_embeddings": original}
    fields = llama_fields(hf, partial=1.0, eps=("rms_norm_eps", 1e-5))
    return fields | dict(windows=equal_windows(hf, hf.get("sliding_window")))


def _olmo2(hf: Mapping[str, Any]) -> dict[str, Any]:
    equal_windows(hf, None)
    return (
        llama_fields(hf, eps=("rms_norm_eps", 1e-5)) | attention_biases(hf) | dict(residual="output", qk_norm="width")
    )


def _stablelm(hf: Mapping[str, Any]) -> dict[str, Any]:
    equal_windows(hf, None)
    refuse(hf, head_dim=head_size(hf, "hidden_size", "num_attention_heads"))
    return llama_fields(hf, kv=32, partial=0.25, eps=("layer_norm_eps", 1e-5)) | dict(
        norm="layer",
        residual="parallel_shared" if value_or(hf, "use_parallel_residual", False) else "pre",
        qkv_bias=value_or(hf, "use_qkv_bias", False),
        qk_norm="each_head" if value_or(hf, "qk_layernorm", False) else "none",
    )


def block_tensors(config: DecoderConfig) -> Tensors:
    """Names around and within each block, but for its MLP."""
    layer = "model.layers.{i}"
    heads, d = f"{layer}.self_attn", config.head_dim
    q_norm, k_norm, q_width, k_width = f"{heads}.q_norm", f"{heads}.k_norm", d, d
    if config.qk_norm == "each_head":
        q_norm, k_norm = f"{heads}.q_layernorm.norms.{{j}}", f"{heads}.k_layernorm.norms.{{j}}"
    elif config.qk_norm == "width":
        q_width, k_width = config.num_heads * d, config.num_kv_heads * d
    return (
        embedding_and_heads(config, "model.embed_tokens")
        | norms(config.hidden_size, {"final_norm": "model.norm"})
        | norms(config.hidden_size, {f"layers/{k}": f"{layer}.{name}" for k, name in _NORMS[config.residual].items()})
        | norms(q_width, {"layers/attention/q_norm": q_norm})
        | norms(k_width, {"layers/attention/k_norm": k_norm})
        | separate_attention(config, f"{heads}.q_proj", f"{heads}.k_proj", f"{heads}.v_proj", f"{heads}.o_proj")
    )


def llama_tensors(config: DecoderConfig) -> Tensors:
    mlp = "model.layers.{i}.mlp"
    return (
        block_tensors(config)
        | linear("layers/mlp/gate", f"{mlp}.gate_proj", config.hidden_size, config.mlp_size)
        | linear("layers/mlp/up", f"{mlp}.up_proj", config.hidden_size, config.mlp_size)
        | linear("layers/mlp/down", f"{mlp}.down_proj", config.mlp_size, config.hidden_size)
    )


def _phi3_tensors(config: DecoderConfig) -> Tensors:
    layer = "model.layers.{i}"
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    qkv = {f"layers/attention/{part}": count * config.head_dim for part, count in heads.items()}
    gate_up = {f"layers/mlp/{part}": config.mlp_size for part in ("gate", "up")}
    return (
        llama_tensors(config)
        | fused_linears(qkv, f"{layer}.self_attn.qkv_proj", config.hidden_size, groups=1)
        | fused_linears(gate_up, f"{layer}.mlp.gate_up_proj", config.hidden_size, groups=1)
    )


FAMILIES = {
    "llama": family(_llama, llama_tensors, "Llama"),
    "mistral": family(_mistral, llama_tensors, "Mistral"),
    "qwen2": family(_qwen2, llama_tensors, "Qwen2"),
    "qwen3": family(_qwen3, llama_tensors, "Qwen3"),
    "phi3": family(_phi3, _phi3_tensors, "Phi3"),
    "olmo2": family(_olmo2, llama_tensors, "Olmo2"),
    "stablelm": family(_stablelm, llama_tensors, "StableLm"),
}
