"""LLaMA, and the families that differ from it in a few choices and few names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.hf_fields import (
    activation,
    attention_biases,
    equal_windows,
    head_size,
    kv_heads,
    multi_head_sizes,
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
    mlp,
    norms,
    separate_attention,
)

_NORMS = {  # names of the norms of a layer, by config.residual
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
    """Fields of a LLaMA without biases and windows; families replace those in which they differ.

    Args:
        kv, head_dim, theta, tied: values of absent keys; without head_dim, hidden_size over the number of heads.
        partial: value of an absent partial_rotary_factor; None: heads are rotated whole, and any other factor is an
            error.
        eps: key of the norms' epsilon, and its default.
    """
    head_dim = value_or(hf, "head_dim", head_dim) or head_size(hf, "hidden_size", "num_attention_heads")
    dim = rotary_dim(hf, head_dim, 1.0 if partial is None else partial)
    if partial is None and dim != head_dim:
        raise ValueError(f"{hf['model_type']} with partial_rotary_factor other than 1 is not supported (config.json)")
    rotary, positions = rope(hf, dim, theta=theta)
    return multi_head_sizes(hf, head_dim) | dict(
        num_kv_heads=kv_heads(hf, kv),
        mlp_size=positive_int(hf, "intermediate_size"),
        max_positions=positions,
        norm="rms",
        norm_eps=float(value_or(hf, *eps)),
        rope=rotary,
        activation=activation(hf, "hidden_act", "silu"),
        gated_mlp=True,
        tied=value_or(hf, "tie_word_embeddings", tied),
    )


def _upper_layer_windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """Windows of Qwen: none without use_sliding_window, with it in the layers from max_window_layers on."""
    window = hf.get("sliding_window", 4096) if value_or(hf, "use_sliding_window", False) else None
    first, layers = value_or(hf, "max_window_layers", 28), range(positive_int(hf, "num_hidden_layers"))
    return windows(hf, window, [window is not None and i >= first for i in layers])


def _llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    equal_windows(hf, None)
    return llama_fields(hf) | attention_biases(hf) | dict(mlp_bias=value_or(hf, "mlp_bias", False))


def _mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return llama_fields(hf, kv=8) | dict(windows=equal_windows(hf, hf.get("sliding_window", 4096)))


def _qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return llama_fields(hf, kv=32) | dict(qkv_bias=True, windows=_upper_layer_windows(hf))


def _qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = llama_fields(hf, kv=32, head_dim=128) | attention_biases(hf)
    return fields | dict(qk_norm="head", windows=_upper_layer_windows(hf))


def _phi3(hf: Mapping[str, Any]) -> dict[str, Any]:
    parameters = rope_parameters(hf)
    kind = parameters["rope_type"]
    if kind in ("su", "yarn"):  # names of longrope in its first checkpoints
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise ValueError(f'phi3 with rope scaling "{kind}" is not supported; supported: default, longrope')
    original = value_or(hf, "original_max_position_embeddings", 4096)
    hf = {**hf, "rope_scaling": parameters | {"rope_type": kind}, "original_max_position_embeddings": original}
    fields = llama_fields(hf, partial=1.0, eps=("rms_norm_eps", 1e-5))
    return fields | dict(windows=equal_windows(hf, hf.get("sliding_window")))


def _olmo2(hf: Mapping[str, Any]) -> dict[str, Any]:
    equal_windows(hf, None)
    fields = llama_fields(hf, eps=("rms_norm_eps", 1e-5)) | attention_biases(hf)
    return fields | dict(residual="output", qk_norm="width")


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
    """Names outside the layers and within each, without those of its MLP."""
    layer = "model.layers.{i}"
    kind = "{x}_layernorm.norms.{{j}}" if config.qk_norm == "each_head" else "{x}_norm"
    table = (
        embedding_and_heads(config, "model.embed_tokens")
        | norms(config.hidden_size, {"final_norm": "model.norm"})
        | norms(config.hidden_size, {f"layers/{k}": f"{layer}.{name}" for k, name in _NORMS[config.residual].items()})
        | separate_attention(config, f"{layer}.self_attn", "o_proj")
    )
    for x, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        width = config.head_dim * (heads if config.qk_norm == "width" else 1)
        table |= norms(width, {f"layers/attention/{x}_norm": f"{layer}.self_attn.{kind.format(x=x)}"})
    return table


def llama_tensors(config: DecoderConfig) -> Tensors:
    name = "model.layers.{i}.mlp"
    return (
        block_tensors(config)
        | linear("layers/mlp/gate", f"{name}.gate_proj", config.hidden_size, config.mlp_size)
        | mlp(config, up=f"{name}.up_proj", down=f"{name}.down_proj")
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
