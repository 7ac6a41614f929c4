"""Families with experts instead of the MLP: Mixtral, and the sparse Qwen 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import DecoderConfig, Experts
from rlhf_jax.models.families.hf_fields import attention_biases, equal_windows, refuse, value_or, with_standard_keys
from rlhf_jax.models.families.llama import block_tensors, llama_fields
from rlhf_jax.models.families.tensors import HfTensor, Stripe, Tensors, family, linear


def _experts(hf: Mapping[str, Any], count: int, per_token: int, renormalised: bool) -> Experts:
    """The experts of a config.json. The router's jitter is noise for training, as dropout is: neither is used here.

    Args:
        count, per_token: values of absent keys.
    """
    hf = with_standard_keys(hf, num_experts="num_local_experts")  # transformers 5 writes the latter for both families
    count, per_token = value_or(hf, "num_local_experts", count), value_or(hf, "num_experts_per_tok", per_token)
    if not 1 <= per_token <= count:
        raise ValueError(f"config.json: num_experts_per_tok {per_token} of {count} experts is not possible")
    return Experts(count, per_token, renormalised, float(value_or(hf, "router_aux_loss_coef", 0.001)))


def _mixtral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return llama_fields(hf, kv=8, theta=1e6, eps=("rms_norm_eps", 1e-5)) | dict(
        windows=equal_windows(hf, hf.get("sliding_window")), experts=_experts(hf, 8, 2, renormalised=True)
    )


def _qwen3_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    refuse(hf, decoder_sparse_step=1, mlp_only_layers=[])  # layers with an MLP among those with experts
    window = hf.get("sliding_window", 4096) if value_or(hf, "use_sliding_window", False) else None
    fields = llama_fields({**hf, "intermediate_size": value_or(hf, "moe_intermediate_size", 768)}, kv=4)
    experts = _experts(hf, 128, 8, renormalised=value_or(hf, "norm_topk_prob", False))
    return fields | attention_biases(hf) | dict(windows=equal_windows(hf, window), qk_norm="head", experts=experts)


def _block_and_router(config: DecoderConfig, name: str) -> Tensors:
    assert config.experts is not None
    return block_tensors(config) | linear("layers/router", name, config.hidden_size, config.experts.count)


def _separate_experts(config: DecoderConfig, name: str, gate: str, up: str, down: str) -> Tensors:
    """The table of a family in which each expert has its own tensors."""
    hidden, width, expert = config.hidden_size, config.mlp_size, f"{name}.experts.{{j}}"
    return (
        _block_and_router(config, f"{name}.gate")
        | linear("layers/experts/gate", f"{expert}.{gate}", hidden, width)
        | linear("layers/experts/up", f"{expert}.{up}", hidden, width)
        | linear("layers/experts/down", f"{expert}.{down}", width, hidden)
    )


def _mixtral_tensors(config: DecoderConfig) -> Tensors:
    return _separate_experts(config, "model.layers.{i}.block_sparse_moe", "w1", "w3", "w2")


def _qwen3_moe_tensors(config: DecoderConfig) -> Tensors:
    return _separate_experts(config, "model.layers.{i}.mlp", "gate_proj", "up_proj", "down_proj")


def _stacked_experts(config: DecoderConfig) -> list[Tensors]:
    """The layout of transformers 5 (save_original_format=False), in which the experts of a layer are one tensor."""
    assert config.experts is not None
    count, hidden, width = config.experts.count, config.hidden_size, config.mlp_size
    name = "model.layers.{i}.mlp"
    gate_up = HfTensor(f"{name}.experts.gate_up_proj", (count, 2 * width, hidden), transpose=True)
    kernels = {
        "layers/experts/gate/kernel": gate_up._replace(strip=Stripe(0, width, 2 * width)),
        "layers/experts/up/kernel": gate_up._replace(strip=Stripe(width, width, 2 * width)),
        "layers/experts/down/kernel": HfTensor(f"{name}.experts.down_proj", (count, hidden, width), transpose=True),
    }
    return [_block_and_router(config, f"{name}.gate") | kernels]


FAMILIES = {
    "mixtral": dataclasses.replace(family(_mixtral, _mixtral_tensors, "Mixtral"), alternatives=_stacked_experts),
    "qwen3_moe": dataclasses.replace(family(_qwen3_moe, _qwen3_moe_tensors, "Qwen3Moe"), alternatives=_stacked_experts),
}
