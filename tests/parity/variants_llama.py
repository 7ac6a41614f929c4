"""Tiny configurations of the LLaMA-like, Gemma-like and sparse families: every option at least once.

Sequences of the tests have 12 tokens, so windows of 3 and 4 hide most of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SIZES = dict(
    vocab_size=150,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
)


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=500.0, **values))


def _family(model_type: str, **usual: Any) -> Callable[..., dict[str, Any]]:
    def config(**choices: Any) -> dict[str, Any]:
        return _SIZES | dict(model_type=model_type) | usual | choices

    return config


# Heads of 16 are wider in total than hidden_size, and no head has size 24.
_llama, _mistral, _qwen2, _olmo2 = (_family(name) for name in ("llama", "mistral", "qwen2", "olmo2"))
_qwen3 = _family("qwen3", head_dim=16)
_phi3 = _family("phi3", original_max_position_embeddings=64)
_stablelm = _family("stablelm", partial_rotary_factor=0.5)
_gemma = _family("gemma", head_dim=16)
_later = dict(num_hidden_layers=4, head_dim=16, sliding_window=4, query_pre_attn_scalar=24)
_gemma2 = _family("gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **_later)
_gemma3 = _family("gemma3_text", **_later)
_mixtral = _family("mixtral", num_local_experts=8, num_experts_per_tok=2)
_qwen3_moe = _family("qwen3_moe", head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)

_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16)
_SHORT, _LONG = [1.0, 1.5, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0]
_LONGROPE = _rope("longrope", short_factor=_SHORT, long_factor=_LONG) | dict(original_max_position_embeddings=32)
_LOCAL_ROPE = dict(
    rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
        sliding_attention=dict(rope_type="default", rope_theta=100.0),
    )
)
_ALTERNATING = dict(layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"])

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": _llama(),
    "llama-mha": _llama(num_key_value_heads=8),
    "llama-mqa": _llama(num_key_value_heads=1),
    "llama-tied": _llama(tie_word_embeddings=True),
    "llama-biased": _llama(
        attention_bias=True, mlp_bias=True, head_dim=16, rms_norm_eps=0.05, hidden_act="gelu_pytorch_tanh"
    ),
    "llama-llama3": _llama(**_LLAMA3),
    "llama-linear": _llama(**_rope("linear", factor=3.0)),
    "llama-dynamic": _llama(**_rope("dynamic", factor=3.0)),
    "llama-yarn": _llama(**_YARN),
    "llama-yarn-mscale": _llama(
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=1.5,
            mscale_all_dim=0.5,
            truncate=False,
        )
    ),
    "mistral": _mistral(sliding_window=None),
    "mistral-window": _mistral(sliding_window=4, head_dim=16, num_key_value_heads=2),
    "mistral-tied": _mistral(tie_word_embeddings=True, num_key_value_heads=8, **_rope("default")),
    "qwen2": _qwen2(num_key_value_heads=2),
    "qwen2-window": _qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1, rms_norm_eps=0.01),
    "qwen2-tied": _qwen2(tie_word_embeddings=True, **_YARN),
    "qwen3": _qwen3(),
    "qwen3-tied": _qwen3(tie_word_embeddings=True, num_key_value_heads=2),
    "qwen3-window-biased": _qwen3(
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        head_dim=8,
    ),
    "phi3": _phi3(),
    "phi3-window": _phi3(sliding_window=4, num_key_value_heads=2, partial_rotary_factor=0.5),
    "phi3-longrope": _phi3(**_LONGROPE),
    "phi3-tied": _phi3(tie_word_embeddings=True, num_key_value_heads=8),
    "olmo2": _olmo2(),
    "olmo2-mha-biased": _olmo2(num_key_value_heads=8, attention_bias=True, rms_norm_eps=0.02),
    "olmo2-tied": _olmo2(tie_word_embeddings=True, num_key_value_heads=1, **_rope("linear", factor=2.0)),
    "stablelm": _stablelm(),
    "stablelm-parallel": _stablelm(use_parallel_residual=True, qk_layernorm=True, layer_norm_eps=0.01),
    "stablelm-biased": _stablelm(use_qkv_bias=True, num_key_value_heads=8, partial_rotary_factor=0.25),
    "stablelm-qk-norm": _stablelm(use_qkv_bias=True, qk_layernorm=True, tie_word_embeddings=True),
    "gemma": _gemma(),
    "gemma-mqa": _gemma(num_key_value_heads=1, hidden_act="gelu", attention_bias=True),
    "gemma-untied": _gemma(tie_word_embeddings=False, head_dim=8, **_rope("default")),
    "gemma2": _gemma2(),
    "gemma2-uncapped": _gemma2(attn_logit_softcapping=None, final_logit_softcapping=None, num_key_value_heads=2),
    "gemma2-layer-types": _gemma2(**_ALTERNATING, attention_bias=True, tie_word_embeddings=False),
    "gemma3": _gemma3(),
    "gemma3-pattern": _gemma3(sliding_window_pattern=2, final_logit_softcapping=3.0, num_key_value_heads=1),
    "gemma3-local-rope": _gemma3(**_LOCAL_ROPE, **_ALTERNATING, attention_bias=True, tie_word_embeddings=False),
    "mixtral": _mixtral(),
    "mixtral-window": _mixtral(sliding_window=4, num_local_experts=4, num_experts_per_tok=3, head_dim=16),
    "mixtral-tied": _mixtral(tie_word_embeddings=True, num_experts_per_tok=1, num_key_value_heads=8),
    "qwen3_moe": _qwen3_moe(norm_topk_prob=True),
    "qwen3_moe-raw": _qwen3_moe(norm_topk_prob=False, num_experts_per_tok=3, tie_word_embeddings=True),
    "qwen3_moe-window-biased": _qwen3_moe(
        norm_topk_prob=True, use_sliding_window=True, sliding_window=4, attention_bias=True, num_experts=4, head_dim=8
    ),
}
