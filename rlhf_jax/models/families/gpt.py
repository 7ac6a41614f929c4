"""OPT, and the GPTs of OpenAI, EleutherAI and Salesforce."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.hf_fields import (
    activation,
    attention_biases,
    biases,
    common_fields,
    multi_head_sizes,
    positive_int,
    refuse,
    value_or,
    with_standard_keys,
)
from rlhf_jax.models.families.rope import rope, rotary_dim
from rlhf_jax.models.families.tensors import (
    Family,
    Tensors,
    conv1d,
    embedding_and_heads,
    family,
    fused_linears,
    grouped_attention,
    layer_norms,
    linear,
    mlp,
    positions,
    separate_attention,
)

_STANDARD_KEYS = dict(  # for GPT-2, GPT-J and CodeGen
    n_embd="hidden_size",
    n_layer="num_hidden_layers",
    n_head="num_attention_heads",
    n_positions="max_position_embeddings",
    n_inner="intermediate_size",
)
_GELU_NEW = ("activation_function", "gelu_new")
_BUFFERS = r"(bias|masked_bias)"


def _read_opt(hf: Mapping[str, Any]) -> dict[str, Any]:
    refuse(hf, layer_norm_elementwise_affine=True)
    fields = multi_head_sizes(hf) | biases(value_or(hf, "enable_bias", True))
    pre_norm = value_or(hf, "do_layer_norm_before", True)
    return fields | dict(
        embed_size=value_or(hf, "word_embed_proj_dim", fields["hidden_size"]),
        mlp_size=positive_int(hf, "ffn_dim"),
        position_rows=fields["max_positions"] + 2,
        position_offset=2,
        residual="pre" if pre_norm else "post",
        final_norm=pre_norm and not value_or(hf, "_remove_final_layer_norm", False),
        activation=activation(hf, "activation_function", "relu"),
        tied=value_or(hf, "tie_word_embeddings", True),
    )


def _opt(config: DecoderConfig) -> Tensors:
    layer = "model.decoder.layers.{i}"
    return (
        embedding_and_heads(config, "model.decoder.embed_tokens")
        | positions(config, "model.decoder.embed_positions")
        | linear("project_in", "model.decoder.project_in", config.embed_size, config.hidden_size)
        | linear("project_out", "model.decoder.project_out", config.hidden_size, config.embed_size)
        | layer_norms(
            config, f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm", "model.decoder.final_layer_norm"
        )
        | separate_attention(config, f"{layer}.self_attn", "out_proj")
        | mlp(config, up=f"{layer}.fc1", down=f"{layer}.fc2")
    )


def _read_gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    refuse(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    fields = multi_head_sizes(with_standard_keys(hf, **_STANDARD_KEYS))
    scale = fields["attention_scale"] if value_or(hf, "scale_attn_weights", True) else 1.0
    fields |= biases(True) | common_fields(hf, _GELU_NEW, tied=True)
    return fields | dict(position_rows=fields["max_positions"], attention_scale=scale)


def _gpt2(config: DecoderConfig) -> Tensors:
    width = config.hidden_size
    thirds = dict.fromkeys(("layers/attention/q", "layers/attention/k", "layers/attention/v"), width)
    attention = fused_linears(thirds, f"{_LAYER}.attn.c_attn", width, groups=1)
    attention |= linear("layers/attention/o", f"{_LAYER}.attn.c_proj", width, width)
    table = _gpt(config, attention, "c_fc", "c_proj")
    return table | conv1d({path: row for path, row in table.items() if path.startswith("layers/")})


_LAYER = "transformer.h.{i}"


def _gpt(config: DecoderConfig, attention: Tensors, up: str, down: str) -> Tensors:
    """The table of GPT-2, GPT-Neo, GPT-J and CodeGen; the last two have neither wpe nor ln_2.

    Args:
        attention: entries of the projections of attention.
        up, down: names of the projections of the MLP.
    """
    return (
        embedding_and_heads(config, "transformer.wte")
        | positions(config, "transformer.wpe")
        | layer_norms(config, f"{_LAYER}.ln_1", f"{_LAYER}.ln_2", "transformer.ln_f")
        | attention
        | mlp(config, up=f"{_LAYER}.mlp.{up}", down=f"{_LAYER}.mlp.{down}")
    )


def _read_gpt_neo(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = multi_head_sizes(with_standard_keys(hf, num_layers="num_hidden_layers", num_heads="num_attention_heads"))
    pattern = value_or(hf, "attention_types", [[["global", "local"], 12]])
    kinds = value_or(hf, "attention_layers", [kind for group, times in pattern for kind in group * times])
    if len(kinds) != fields["num_layers"] or not set(kinds) <= {"global", "local"}:
        raise ValueError(
            f"config.json: attention_types has to name {fields['num_layers']} layers, each global or local, not {kinds}"
        )
    window = value_or(hf, "window_size", 256)
    return (
        fields
        | biases(True)
        | common_fields(hf, _GELU_NEW, tied=True)
        | dict(
            position_rows=fields["max_positions"],
            windows=tuple(window if kind == "local" else 0 for kind in kinds) if "local" in kinds else (),
            attention_scale=1.0,
            qkv_bias=False,
        )
    )


def _gpt_neo(config: DecoderConfig) -> Tensors:
    return _gpt(config, separate_attention(config, f"{_LAYER}.attn.attention", "out_proj"), "c_fc", "c_proj")


def _read_gptj(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of GPT-J and of CodeGen, which differs from it only in its tensors."""
    fields = multi_head_sizes(with_standard_keys(hf, **_STANDARD_KEYS))
    rotated = value_or(hf, "rotary_dim", 64)
    if rotated > fields["head_dim"]:
        raise ValueError(f"config.json: rotary_dim {rotated} is more than the size of a head, {fields['head_dim']}")
    fields["rope"], _ = rope({}, rotated, positions=fields["max_positions"], interleaved=True)
    fields |= common_fields(hf, _GELU_NEW, tied=False)
    return fields | dict(residual="parallel_shared", mlp_bias=True, head_bias=True)


def _gptj(config: DecoderConfig) -> Tensors:
    return _gpt(config, separate_attention(config, f"{_LAYER}.attn", "out_proj"), "fc_in", "fc_out")


_CODEGEN_SHARDS = 4  # number of TPUs that it was trained on: each has its queries, values and keys in a row


def _read_codegen(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = _read_gptj(hf)
    if fields["num_heads"] % _CODEGEN_SHARDS:
        raise ValueError(f"config.json: CodeGen's n_head has to be a multiple of 4, not {fields['num_heads']}")
    return fields


def _codegen(config: DecoderConfig) -> Tensors:
    width = config.hidden_size
    each = dict.fromkeys(("layers/attention/q", "layers/attention/v", "layers/attention/k"), width // _CODEGEN_SHARDS)
    qkv = fused_linears(each, f"{_LAYER}.attn.qkv_proj", width, groups=_CODEGEN_SHARDS)
    o = linear("layers/attention/o", f"{_LAYER}.attn.out_proj", width, width)
    return _gpt(config, qkv | o, "fc_in", "fc_out")


def _read_gpt_neox(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = multi_head_sizes(hf) | common_fields(hf, ("hidden_act", "gelu"), tied=False, eps="layer_norm_eps")
    theta, partial = value_or(hf, "rotary_emb_base", 10000), value_or(hf, "rotary_pct", 0.25)
    old = dict(rope_theta=theta, partial_rotary_factor=partial)
    refuse(hf, **old)  # outside the old spelling, transformers 5 has these two in rope_parameters only
    fields["rope"], fields["max_positions"] = rope({**hf, **old}, rotary_dim({**hf, **old}, fields["head_dim"]))
    return fields | dict(
        mlp_size=positive_int(hf, "intermediate_size"),
        residual="parallel" if value_or(hf, "use_parallel_residual", True) else "pre",
        mlp_bias=True,
        **attention_biases(hf, True),
    )


def _gpt_neox(config: DecoderConfig, head: str = "embed_out") -> Tensors:
    layer = "gpt_neox.layers.{i}"
    return (
        embedding_and_heads(config, "gpt_neox.embed_in", head)
        | layer_norms(
            config, f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "gpt_neox.final_layer_norm"
        )
        | grouped_attention(config, f"{layer}.attention.query_key_value", f"{layer}.attention.dense")
        | mlp(config, up=f"{layer}.mlp.dense_h_to_4h", down=f"{layer}.mlp.dense_4h_to_h")
    )


_NEOX = family(_read_gpt_neox, _gpt_neox, "GPTNeoX", "gpt_neox.", rf"layers\.\d+\.attention\.{_BUFFERS}")
FAMILIES = {
    "opt": family(_read_opt, _opt, "OPT", buffers=r"decoder\.version"),
    "gpt2": dataclasses.replace(
        family(_read_gpt2, _gpt2, "GPT2", "transformer.", rf"h\.\d+\.attn\.{_BUFFERS}"), causal="GPT2LMHeadModel"
    ),
    "gpt_neo": family(_read_gpt_neo, _gpt_neo, "GPTNeo", "transformer.", rf"h\.\d+\.attn\.attention\.{_BUFFERS}"),
    "gptj": family(_read_gptj, _gptj, "GPTJ", "transformer.", rf"h\.\d+\.attn\.{_BUFFERS}"),
    # transformers 5 calls the head lm_head in memory.
    "gpt_neox": dataclasses.replace(_NEOX, alternatives=lambda config: [_gpt_neox(config, head="lm_head")]),
    "codegen": Family(
        _read_codegen, _codegen, "CodeGenForCausalLM", None, "transformer.", rf"h\.\d+\.attn\.(causal_mask|{_BUFFERS})"
    ),
}
