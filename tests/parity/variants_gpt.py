"""Tiny configurations of the GPTs, BLOOM, Falcon and Phi: for each family, every option of its checkpoints.

They are keyword arguments of transformers' configuration classes. Norms have an epsilon large enough to change logits.
"""

from __future__ import annotations

from typing import Any

_OPT = dict(
    model_type="opt",
    vocab_size=150,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    ffn_dim=96,
    max_position_embeddings=64,
    word_embed_proj_dim=64,
)
_GPT2 = dict(
    model_type="gpt2",
    vocab_size=150,
    n_embd=64,
    n_layer=3,
    n_head=8,
    n_positions=64,
    layer_norm_epsilon=1e-2,
)
_GPT_NEO = dict(
    model_type="gpt_neo",
    vocab_size=150,
    hidden_size=64,
    num_layers=4,
    num_heads=8,
    max_position_embeddings=64,
    attention_types=[[["global", "local"], 2]],
    window_size=4,
    layer_norm_epsilon=1e-2,
)
_GPTJ = _GPT2 | dict(model_type="gptj", rotary_dim=4)
_GPT_NEOX = dict(
    model_type="gpt_neox",
    vocab_size=150,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    intermediate_size=96,
    max_position_embeddings=64,
    layer_norm_eps=1e-2,
)
_BLOOM = dict(
    model_type="bloom",
    vocab_size=150,
    hidden_size=64,
    n_layer=3,
    n_head=8,
    layer_norm_epsilon=1e-2,
)
_FALCON = dict(
    model_type="falcon",
    vocab_size=150,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    max_position_embeddings=64,
    layer_norm_epsilon=1e-2,
)
_FALCON_RW = _FALCON | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)
_PHI = dict(
    model_type="phi",
    vocab_size=150,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    intermediate_size=96,
    max_position_embeddings=64,
    layer_norm_eps=1e-2,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "opt": _OPT,
    "opt-350m": _OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-unbiased-gelu": _OPT | dict(enable_bias=False, activation_function="gelu"),
    "opt-untied-without-final-norm": _OPT | dict(tie_word_embeddings=False, _remove_final_layer_norm=True),
    "gpt2": _GPT2,
    "gpt2-untied-narrow-unscaled": _GPT2
    | dict(tie_word_embeddings=False, n_inner=96, scale_attn_weights=False, activation_function="relu"),
    "gpt_neo": _GPT_NEO,
    "gpt_neo-local-first": _GPT_NEO
    | dict(attention_types=[[["local"], 1], [["global"], 2]], num_layers=3, intermediate_size=96),
    "gpt_neo-global": _GPT_NEO | dict(attention_types=[[["global"], 3]], num_layers=3),
    "gptj": _GPTJ,
    "gptj-tied-whole-head": _GPTJ | dict(tie_word_embeddings=True, rotary_dim=8, n_inner=96),
    "gpt_neox": _GPT_NEOX | dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "gpt_neox-serial-whole-head": _GPT_NEOX | dict(use_parallel_residual=False, rotary_pct=1.0, rotary_emb_base=500),
    "gpt_neox-unbiased-tied": _GPT_NEOX
    | dict(attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new", rotary_pct=0.5),
    "codegen": _GPT2 | dict(model_type="codegen", rotary_dim=4),
    "bloom": _BLOOM,
    "bloom-twelve-heads-untied": _BLOOM | dict(hidden_size=96, n_head=12, tie_word_embeddings=False),
    "falcon-7b": _FALCON,
    "falcon-7b-many-heads": _FALCON | dict(multi_query=False, tie_word_embeddings=False),
    "falcon-40b": _FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=96),
    "falcon-11b": _FALCON
    | dict(new_decoder_architecture=True, num_kv_heads=4, num_ln_in_parallel_attn=1, rope_theta=500.0),
    "falcon-rw": _FALCON_RW,
    "falcon-rw-twelve-heads": _FALCON_RW | dict(hidden_size=96, num_attention_heads=12),
    "phi": _PHI,
    "phi-normed-heads": _PHI | dict(qk_layernorm=True, num_key_value_heads=4, partial_rotary_factor=1.0),
}
