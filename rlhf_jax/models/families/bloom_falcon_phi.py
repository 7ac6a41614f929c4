"""BLOOM, Falcon and Phi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import Alibi, DecoderConfig
from rlhf_jax.models.families.hf_fields import (
    biases,
    common_fields,
    kv_heads,
    multi_head_sizes,
    positive_int,
    refuse,
    value_or,
    with_standard_keys,
)
from rlhf_jax.models.families.rope import rope, rope_parameters, rotary_dim
from rlhf_jax.models.families.tensors import (
    Tensors,
    embedding_and_heads,
    family,
    grouped_attention,
    layer_norms,
    mlp,
    norms,
    separate_attention,
)


def _slopes(heads: int) -> tuple[float, ...]:
    """ALiBi slopes: 2^(-8 i / n) of head i of n; past a power of two, every second one of 2 n heads (Press et al.)."""
    power = 1 << (heads.bit_length() - 1)
    between = range(1, 2 * (heads - power), 2)
    return tuple([2.0 ** (-8 * i / power) for i in range(1, power + 1)] + [2.0 ** (-4 * i / power) for i in between])


def _read_bloom(hf: Mapping[str, Any]) -> dict[str, Any]:
    refuse(hf, apply_residual_connection_post_layernorm=False)
    if value_or(hf, "pretraining_tp", 1) > 1:
        refuse(hf, slow_but_exact=False)  # it leaves out the biases of the output projections
    usual = with_standard_keys(
        hf,
        n_embed="hidden_size",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        seq_length="max_position_embeddings",
    )
    fields = multi_head_sizes(usual, max_position_embeddings=2048)  # as in its training; ALiBi itself has no limit
    return (fields | biases(True)) | dict(
        embed_norm=True,
        norm_eps=value_or(hf, "layer_norm_epsilon", 1e-5),
        alibi=Alibi(_slopes(fields["num_heads"])),
        activation="gelu_tanh",
        tied=value_or(hf, "tie_word_embeddings", True),
    )


def _bloom(
    config: DecoderConfig, attention_norm: str = "input_layernorm", mlp_norm: str = "post_attention_layernorm"
) -> Tensors:
    layer = "transformer.h.{i}"
    return (
        embedding_and_heads(config, "transformer.word_embeddings")
        | norms(config.hidden_size, {"embed/norm": "transformer.word_embeddings_layernorm"})
        | layer_norms(config, f"{layer}.{attention_norm}", f"{layer}.{mlp_norm}", "transformer.ln_f")
        | grouped_attention(config, f"{layer}.self_attention.query_key_value", f"{layer}.self_attention.dense")
        | mlp(config, up=f"{layer}.mlp.dense_h_to_4h", down=f"{layer}.mlp.dense_4h_to_h")
    )


def _read_falcon(hf: Mapping[str, Any]) -> dict[str, Any]:
    refuse(hf, apply_residual_connection_post_layernorm=False)
    hf = with_standard_keys(hf, ffn_hidden_size="intermediate_size")
    fields = multi_head_sizes(hf, max_position_embeddings=2048)
    heads, d = fields["num_heads"], fields["head_dim"]
    if value_or(hf, "new_decoder_architecture", False):  # Falcon 40B
        refuse(hf, parallel_attn=True)
        keys, norms_per_layer = value_or(hf, "num_kv_heads", heads), value_or(hf, "num_ln_in_parallel_attn", 2)
        if norms_per_layer != 1:
            refuse(hf, num_ln_in_parallel_attn=2)
        residual = "parallel" if norms_per_layer == 2 else "parallel_shared"
    else:
        keys = 1 if value_or(hf, "multi_query", True) else heads
        if keys == heads:
            refuse(hf, num_kv_heads=heads)
        residual = "parallel_shared" if value_or(hf, "parallel_attn", True) else "pre"
        if residual == "parallel_shared":
            refuse(hf, num_ln_in_parallel_attn=1)
    if value_or(hf, "alibi", False):
        # In training, position, slope and their product were all rounded, and the biases scaled as the scores are.
        rounded = np.asarray(_slopes(heads), jnp.dtype("bfloat16")).astype(float)
        fields["alibi"] = Alibi(tuple(rounded.tolist()), scale=d**-0.5, rounded=True)
    else:
        refuse({**rope_parameters(hf), "model_type": "falcon"}, partial_rotary_factor=1.0)
        fields["rope"], fields["max_positions"] = rope(hf, d, positions=fields["max_positions"])
    usual = dict(num_attention_heads=heads, num_key_value_heads=keys)
    fields |= dict(num_kv_heads=kv_heads(usual), residual=residual)
    return fields | biases(value_or(hf, "bias", False)) | common_fields(hf, ("activation", "gelu"), tied=True)


def _falcon(config: DecoderConfig) -> Tensors:
    return _bloom(config, "ln_attn", "ln_mlp") if config.residual == "parallel" else _bloom(config)


def _read_phi(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = multi_head_sizes(hf) | dict(mlp_size=positive_int(hf, "intermediate_size"))
    fields |= biases(True) | common_fields(hf, ("hidden_act", "gelu_new"), tied=False, eps="layer_norm_eps")
    refuse(hf, head_dim=fields["head_dim"])
    fields["rope"], fields["max_positions"] = rope(hf, rotary_dim(hf, fields["head_dim"], default=0.5))
    return fields | dict(
        num_kv_heads=kv_heads(hf),
        residual="parallel_shared",
        qk_norm="head" if value_or(hf, "qk_layernorm", False) else "none",
        head_bias=True,
    )


def _phi(config: DecoderConfig) -> Tensors:
    layer = "model.layers.{i}"
    names = {"layers/attention_norm": f"{layer}.input_layernorm", "final_norm": "model.final_layernorm"}
    return (
        embedding_and_heads(config, "model.embed_tokens")
        | norms(config.hidden_size, names)
        | norms(config.head_dim, {f"layers/attention/{x}_norm": f"{layer}.self_attn.{x}_layernorm" for x in "qk"})
        | separate_attention(config, f"{layer}.self_attn", "dense")
        | mlp(config, up=f"{layer}.mlp.fc1", down=f"{layer}.mlp.fc2")
    )


FAMILIES = {
    "bloom": family(_read_bloom, _bloom, "Bloom", "transformer."),
    "falcon": family(_read_falcon, _falcon, "Falcon", "transformer."),
    "phi": family(_read_phi, _phi, "Phi"),
}
