"""Gemma 1 to 3 (the text models): scaled embeddings, norms by 1 + their scale, caps and windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.families.hf_fields import activation, attention_biases, positive_int, refuse, value_or, windows
from rlhf_jax.models.families.llama import llama_fields, llama_tensors
from rlhf_jax.models.families.rope import rope
from rlhf_jax.models.families.tensors import family


def _gemma_fields(hf: Mapping[str, Any], kv: int, theta: float = 10000.0) -> dict[str, Any]:
    refuse(hf, use_bidirectional_attention=False)
    fields = llama_fields(hf, kv=kv, head_dim=256, theta=theta, tied=True) | attention_biases(hf)
    return fields | dict(
        norm="rms_plus_one",
        embed_scale=fields["hidden_size"] ** 0.5,
        activation=activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
    )


def _gemma(hf: Mapping[str, Any]) -> dict[str, Any]:
    # The first checkpoints have "gelu" but were trained with its approximation.
    act = value_or(hf, "hidden_act", "gelu_pytorch_tanh")
    act = "gelu_pytorch_tanh" if act == "gelu" else act
    refuse(hf, hidden_activation=act)
    return _gemma_fields({**hf, "hidden_activation": act}, 16)


def _windowed_fields(hf: Mapping[str, Any], pattern: int, theta: float = 10000.0) -> dict[str, Any]:
    """Fields of Gemma 2 and 3. One layer in `pattern` attends to all positions, the others have a window."""
    usual = [(i + 1) % pattern != 0 for i in range(positive_int(hf, "num_hidden_layers"))]
    return _gemma_fields(hf, 4, theta) | dict(
        residual="sandwich",
        windows=windows(hf, hf.get("sliding_window", 4096), usual),
        attention_scale=value_or(hf, "query_pre_attn_scalar", 256) ** -0.5,
    )


def _gemma2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _windowed_fields(hf, 2) | dict(
        attention_softcap=float(hf.get("attn_logit_softcapping", 50.0) or 0.0),
        final_softcap=float(hf.get("final_logit_softcapping", 30.0) or 0.0),
    )


def _gemma3(hf: Mapping[str, Any]) -> dict[str, Any]:
    # transformers reads attn_logit_softcapping and ignores it; no released checkpoint has one.
    refuse(hf, attn_logit_softcapping=None)
    each = hf.get("rope_parameters") or {}
    if each.keys() - {"full_attention", "sliding_attention"}:
        raise ValueError("gemma3_text has rope_parameters for full_attention and sliding_attention (config.json)")
    # The old spelling describes the layers without a window: rope_theta, and rope_scaling with the scaling only.
    full = {**(each.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    local = each.get("sliding_attention") or {"rope_theta": hf.get("rope_local_base_freq")}
    fields = _windowed_fields({**hf, "rope_scaling": full}, value_or(hf, "sliding_window_pattern", 6), theta=1e6)
    local_hf = {**hf, "rope_scaling": local, "rope_parameters": None, "rope_theta": None}
    local_rope, positions = rope(local_hf, fields["head_dim"])
    return fields | dict(
        local_rope=local_rope if fields["windows"] else None,
        max_positions=min(fields["max_positions"], positions),
        qk_norm="head",
        final_softcap=float(hf.get("final_logit_softcapping") or 0.0),
    )


_GEMMA3 = "Gemma3TextForSequenceClassification"
FAMILIES = {
    "gemma": family(_gemma, llama_tensors, "Gemma"),
    "gemma2": family(_gemma2, llama_tensors, "Gemma2"),
    "gemma3_text": dataclasses.replace(family(_gemma3, llama_tensors, "Gemma3"), scalar=_GEMMA3),
}
