"""Families with experts in place of the MLP: Mixtral, and the sparse Qwen 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.models.config import DecoderConfig, Experts
from rlhf_jax.models.families.hf_fields import equal_windows, refuse, value_or, with_standard_keys
from rlhf_jax.models.families.llama import attention_biases, block_tensors, llama_fields
from rlhf_jax.models.families.tensors import Family, HfTensor, Tensors, family, fused_linears, linear


def _experts(hf: Mapping[str, Any], count: int, per_token: int, renormalised: bool) -> Experts:
    """The router's jitter is noise of training, as dropout is: neither is used here.

    Args:
        count, per_token: what an absent key means.
    """
    hf = with_standard_keys(hf, num_experts="num_local_experts")  # transformers 5 writes the latter for both families
    count, per_token = value_or(hf, "num_local_experts", count), value_or(hf, "num_experts_per_tok", per_token)
    if not 1 <= per_token <= count:
        raise ValueError(f"config.json: num_experts_per_tok {per_token} of {count} experts is not possible")
    return Experts(count, per_token, renormalised, float(value_or(hf, "router_aux_loss_coef", 0.001)))


def _mixtral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return llama_fields(hf, kv=8, theta=1e6, eps=("rms_norm_eps", 1e-5)) | dict(
        windows=equal_windows(hf, hf.get("sliding_window")),
        experts=_experts(hf, 8, 2, renormalised=True),
    )


def _qwen3_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    refuse(hf, decoder_sparse_step=1, mlp_only_layers=[])  # layers with an MLP among those with experts
    window = hf.get("sliding_window", 4096) if value_or(hf, "use_sliding_window", False) else None
    return (
        llama_fields({**hf, "intermediate_size": value_or(hf, "moe_intermediate_size", 768)}, kv=4)
        | attention_biases(hf)
        | dict(
            windows=equal_windows(hf, window),
            qk_norm="head",
            experts=_experts(hf, 128, 8, renormalised=value_or(hf, "norm_topk_prob", False)),
        )
    )


def _router(config: DecoderConfig, name: str) -> Tensors:
    assert config.experts is not None
    return linear("layers/router", name, config.hidden_size, config.experts.count)


def _separate_experts(router: str, expert: str, gate: str, up: str, down: str) -> Callable[[DecoderConfig], Tensors]:
    """The table of a family whose experts lie one by one."""

    def tensors(config: DecoderConfig) -> Tensors:
        hidden, width = config.hidden_size, config.mlp_size
        return (
            block_tensors(config)
            | _router(config, router)
            | linear("layers/experts/gate", f"{expert}.{{j}}.{gate}", hidden, width)
            | linear("layers/experts/up", f"{expert}.{{j}}.{up}", hidden, width)
            | linear("layers/experts/down", f"{expert}.{{j}}.{down}", width, hidden)
        )

    return tensors


def _stacked_experts(config: DecoderConfig) -> list[Tensors]:
    """What transformers 5 writes with save_original_format=False: its own layout, in which the experts lie as one."""
    assert config.experts is not None
    count, hidden, width = config.experts.count, config.hidden_size, config.mlp_size
    mlp = "model.layers.{i}.mlp"
    parts = {"layers/experts/gate": width, "layers/experts/up": width}
    gate_up = fused_linears(parts, f"{mlp}.experts.gate_up_proj", hidden, groups=1)
    down = HfTensor(f"{mlp}.experts.down_proj", (count, hidden, width), transpose=True)
    kernels = {
        path: row._replace(name=row.name.removesuffix(".weight"), shape=(count, *row.shape))
        for path, row in gate_up.items()
        if path.endswith("/kernel")
    }
    return [block_tensors(config) | _router(config, f"{mlp}.gate") | kernels | {"layers/experts/down/kernel": down}]


def _family(read, name: str, tensors: Callable[[DecoderConfig], Tensors]) -> Family:
    return dataclasses.replace(family(read, tensors, name), alternatives=_stacked_experts)


_MIXTRAL, _QWEN = "model.layers.{i}.block_sparse_moe", "model.layers.{i}.mlp"
_QWEN_KERNELS = ("gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "mixtral": _family(
        _mixtral, "Mixtral", _separate_experts(f"{_MIXTRAL}.gate", f"{_MIXTRAL}.experts", "w1", "w3", "w2")
    ),
    "qwen3_moe": _family(
        _qwen3_moe, "Qwen3Moe", _separate_experts(f"{_QWEN}.gate", f"{_QWEN}.experts", *_QWEN_KERNELS)
    ),
}
