"""config.json -> DecoderConfig and tensor names for OPT, the GPTs, CodeGen, BLOOM, Falcon and Phi."""

import json

import numpy as np
import pytest
from parity.variants_gpt import VARIANTS

from rlhf_jax.models.families import (
    FAMILIES,
    alternative_tensors,
    base_prefix,
    decoder_config,
    hf_tensors,
    ignored_names,
)
from rlhf_jax.models.families.tensors import HfTensor, Stripe

# As on the hub, without the keys for generation and classifiers.
GPT2_XL = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 1600,
    "n_head": 25,
    "n_layer": 48,
    "n_positions": 1024,
    "output_past": True,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}
GPT_NEO_1_3B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 12,
    "attention_types": [[["global", "local"], 12]],
    "bos_token_id": 50256,
    "embed_dropout": 0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 16,
    "num_layers": 24,
    "resid_dropout": 0,
    "vocab_size": 50257,
    "window_size": 256,
}
GPT_J_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "vocab_size": 50400,
}
PYTHIA_1_4B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GPT_NEOX_20B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_probs_dropout_prob": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 50432,
}
CODEGEN_350M = {
    "activation_function": "gelu_new",
    "architectures": ["CodeGenForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 2,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "codegen",
    "n_ctx": 2048,
    "n_embd": 1024,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 20,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary_dim": 32,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "unk_token_id": 0,
    "vocab_size": 250880,
}
BLOOMZ_7B1 = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "bloom",
    "n_head": 32,
    "n_inner": None,
    "n_layer": 30,
    "pad_token_id": 3,
    "pretraining_tp": 4,
    "seq_length": 2048,
    "slow_but_exact": False,
    "vocab_size": 250880,
}
FALCON_7B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}
FALCON_40B = FALCON_7B | {
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
FALCON_RW_1B = FALCON_7B | {
    "alibi": True,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 2048,
    "multi_query": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}
PHI_2 = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}


def read(hf, **changes):
    return decoder_config(hf | changes, scalar_head=False)


def sizes(config):
    return (
        config.hidden_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.mlp_size,
        config.max_positions,
    )


def test_gpt2_xl_has_a_position_table_and_fused_kernels_that_are_not_transposed():
    config = read(GPT2_XL)
    assert sizes(config) == (1600, 48, 25, 25, 64, 6400, 1024)
    assert (config.position_rows, config.position_offset, config.residual, config.tied) == (1024, 0, "pre", True)
    assert (config.activation, config.attention_scale, config.qkv_bias, config.o_bias) == (
        "gelu_tanh",
        0.125,
        True,
        True,
    )
    tensors = hf_tensors(config)
    attn = "transformer.h.{i}.attn"
    strip = Stripe(1600, 1600, 4800)
    assert tensors["layers/attention/k/kernel"] == HfTensor(f"{attn}.c_attn.weight", (1600, 4800), strip=strip)
    assert tensors["layers/attention/k/bias"] == HfTensor(f"{attn}.c_attn.bias", (4800,), strip=strip)
    assert tensors["layers/mlp/up/kernel"] == HfTensor("transformer.h.{i}.mlp.c_fc.weight", (1600, 6400))
    assert "head/kernel" not in tensors and base_prefix(config) == "transformer."
    for name in ("h.0.attn.bias", "transformer.h.11.attn.masked_bias", "lm_head.weight"):
        assert ignored_names(config).fullmatch(name), name
    assert not ignored_names(config).fullmatch("h.0.attn.c_attn.bias")


def test_gpt2_can_have_unscaled_scores_and_an_mlp_of_any_width():
    config = read(GPT2_XL, scale_attn_weights=False, n_inner=100, reorder_and_upcast_attn=True)
    assert (config.attention_scale, config.mlp_size) == (1.0, 100)


def test_gpt_neo_alternates_full_attention_and_a_window_of_256_and_does_not_scale_scores():
    config = read(GPT_NEO_1_3B)
    assert sizes(config) == (2048, 24, 16, 16, 128, 8192, 2048)
    assert config.windows == (0, 256) * 12 and config.attention_scale == 1.0
    assert (config.qkv_bias, config.o_bias, config.tied, config.position_rows) == (False, True, True, 2048)
    assert read(GPT_NEO_1_3B, attention_layers=None).windows == config.windows
    assert read(GPT_NEO_1_3B, attention_layers=None, attention_types=[[["global"], 24]]).windows == ()
    with pytest.raises(ValueError, match="has to name 24 layers, each global or local"):
        read(GPT_NEO_1_3B, attention_layers=None, attention_types=[[["global"], 3]])
    with pytest.raises(ValueError, match="sliding"):
        read(GPT_NEO_1_3B, attention_layers=["sliding"] * 24)
    assert ignored_names(config).fullmatch("transformer.h.3.attn.attention.masked_bias")


def test_gpt_j_rotates_pairs_of_64_dimensions_and_has_a_head_with_a_bias():
    config = read(GPT_J_6B)
    assert sizes(config) == (4096, 28, 16, 16, 256, 16384, 2048)
    assert config.rope.interleaved and len(config.rope.frequencies) == 32
    np.testing.assert_allclose(config.rope.frequencies, 10000.0 ** (-np.arange(0, 64, 2) / 64), rtol=1e-6)
    assert (config.residual, config.tied, config.head_bias, config.mlp_bias) == ("parallel_shared", False, True, True)
    assert (config.qkv_bias, config.o_bias, config.attention_scale, config.position_rows) == (False, False, 1 / 16, 0)
    assert hf_tensors(config)["head/bias"] == HfTensor("lm_head.bias", (50400,))
    with pytest.raises(ValueError, match="rotary_dim 258 is more than the size of a head, 256"):
        read(GPT_J_6B, rotary_dim=258)


def test_codegen_has_queries_values_and_keys_in_four_groups():
    config = read(CODEGEN_350M)
    assert sizes(config) == (1024, 20, 16, 16, 64, 4096, 2048)
    assert config.rope.interleaved and len(config.rope.frequencies) == 16
    tensors = hf_tensors(config)
    offsets = {name: tensors[f"layers/attention/{name}/kernel"].strip.offset for name in "qkv"}
    assert offsets == {"q": 0, "v": 256, "k": 512}
    name = "transformer.h.{i}.attn.qkv_proj.weight"
    assert tensors["layers/attention/v/kernel"] == HfTensor(name, (3072, 1024), True, Stripe(256, 256, 768))
    assert ignored_names(config).fullmatch("transformer.h.0.attn.causal_mask")
    with pytest.raises(ValueError, match="n_head has to be a multiple of 4, not 2"):
        read(CODEGEN_350M, n_head=2)


@pytest.mark.parametrize(
    ("hf", "expected", "activation", "rotated"),
    [
        (PYTHIA_1_4B, (2048, 24, 16, 16, 128, 8192, 2048), "gelu", 32),
        (GPT_NEOX_20B, (6144, 44, 64, 64, 96, 24576, 2048), "gelu_tanh", 24),
    ],
)
def test_gpt_neox_has_parallel_halves_and_rotates_a_quarter_of_each_head(hf, expected, activation, rotated):
    config = read(hf)
    assert sizes(config) == expected
    assert (config.residual, config.activation, config.tied) == ("parallel", activation, False)
    assert not config.rope.interleaved and 2 * len(config.rope.frequencies) == rotated
    d = config.head_dim
    value = hf_tensors(config)["layers/attention/v/kernel"]
    assert value.shape == (3 * config.hidden_size, config.hidden_size) and value.strip == Stripe(2 * d, d, 3 * d)


def test_both_spellings_of_the_rotation_and_of_the_head_of_gpt_neox_are_read():
    old = read(PYTHIA_1_4B, rotary_emb_base=500, rotary_pct=0.5)
    bare = {key: value for key, value in PYTHIA_1_4B.items() if not key.startswith("rotary")}
    new = read(bare, rope_parameters={"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.5})
    assert old == new and len(old.rope.frequencies) == 32
    assert read(bare) == read(PYTHIA_1_4B)
    mirrored = {"rope_theta": 500, "partial_rotary_factor": 0.5}  # transformers 4.4x wrote both
    assert read(PYTHIA_1_4B, rotary_emb_base=500, rotary_pct=0.5, **mirrored) == old
    with pytest.raises(ValueError, match="gpt_neox with rope_theta=500"):
        read(PYTHIA_1_4B, rope_theta=500)
    config = read(PYTHIA_1_4B, use_parallel_residual=False, attention_bias=False)
    assert (config.residual, config.qkv_bias, config.o_bias, config.mlp_bias) == ("pre", False, False, True)
    assert hf_tensors(config)["head/kernel"].name == "embed_out.weight"
    assert [table["head/kernel"].name for table in alternative_tensors(config)] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("hf", "expected"),
    [(BLOOM_560M, (1024, 24, 16, 16, 64, 4096, 2048)), (BLOOMZ_7B1, (4096, 30, 32, 32, 128, 16384, 2048))],
)
def test_bloom_has_linear_biases_and_a_norm_after_its_embedding(hf, expected):
    config = read(hf)
    assert sizes(config) == expected
    assert (config.embed_norm, config.tied, config.activation, config.rope) == (True, True, "gelu_tanh", None)
    assert len(config.alibi.slopes) == config.num_heads and (config.alibi.scale, config.alibi.rounded) == (1.0, False)
    d = config.head_dim
    assert hf_tensors(config)["layers/attention/k/kernel"].strip == Stripe(d, d, 3 * d)
    assert read(hf, seq_length=512).max_positions == 512


def test_alibi_slopes_are_powers_of_two_and_further_heads_get_slopes_in_between():
    assert read(BLOOM_560M, num_attention_heads=8).alibi.slopes == tuple(2.0**-i for i in range(1, 9))
    assert read(BLOOM_560M, n_embed=1200, num_attention_heads=12).alibi.slopes == (
        *(2.0**-i for i in range(1, 9)),
        *(2.0**-i for i in (0.5, 1.5, 2.5, 3.5)),
    )


def test_falcon_7b_has_one_key_head_for_its_71_query_heads():
    config = read(FALCON_7B)
    assert sizes(config) == (4544, 32, 71, 1, 64, 18176, 2048)
    assert (config.residual, config.activation, config.tied) == ("parallel_shared", "gelu", True)
    assert 2 * len(config.rope.frequencies) == 64 and not (config.qkv_bias or config.o_bias or config.mlp_bias)
    tensors = hf_tensors(config)
    query, key = (tensors[f"layers/attention/{name}/kernel"] for name in "qk")
    assert query.shape == key.shape == (4672, 4544)
    assert query.strip == Stripe(0, 4544, 4672) and key.strip == Stripe(4544, 64, 4672)
    assert tensors["layers/attention_norm/scale"].name == "transformer.h.{i}.input_layernorm.weight"
    assert read(FALCON_7B, num_kv_heads=71) == config  # newer folders have this key, which has no effect


def test_falcon_40b_has_eight_groups_of_heads_and_two_norms_or_one():
    config = read(FALCON_40B)
    assert sizes(config) == (8192, 60, 128, 8, 64, 32768, 2048)
    tensors = hf_tensors(config)
    assert config.residual == "parallel" and tensors["layers/mlp_norm/bias"].name == "transformer.h.{i}.ln_mlp.bias"
    assert tensors["layers/attention/q/kernel"].strip == Stripe(0, 1024, 1152)
    assert tensors["layers/attention/v/kernel"].strip == Stripe(1088, 64, 1152)
    shared = read(FALCON_40B, num_ln_in_parallel_attn=1)
    assert shared.residual == "parallel_shared"
    assert hf_tensors(shared)["layers/attention_norm/bias"].name == "transformer.h.{i}.input_layernorm.bias"
    # The spelling from before the model was part of transformers, which would use its own defaults for an export.
    old = {"n_head" if key == "num_attention_heads" else key: value for key, value in FALCON_40B.items()}
    with pytest.raises(ValueError, match="num_attention_heads has to be a whole number"):
        read(old)


def test_falcon_rw_is_serial_and_its_biases_are_rounded_and_scaled():
    config = read(FALCON_RW_1B)
    assert sizes(config) == (2048, 24, 32, 32, 64, 8192, 2048)
    assert (config.residual, config.qkv_bias, config.o_bias, config.mlp_bias) == ("pre", True, True, True)
    assert (config.rope, config.alibi.scale, config.alibi.rounded) == (None, 0.125, True)
    np.testing.assert_allclose(config.alibi.slopes, 2.0 ** (-np.arange(1, 33) / 4), rtol=2**-8)
    assert not any(np.float32(slope).view(np.uint32) & 0xFFFF for slope in config.alibi.slopes), "not bfloat16"
    assert hf_tensors(config)["layers/attention/v/bias"].strip == Stripe(128, 64, 192)


def test_phi_2_rotates_32_of_80_dimensions_and_half_of_them_by_default():
    config = read(PHI_2)
    assert sizes(config) == (2560, 32, 32, 32, 80, 10240, 2048)
    assert 2 * len(config.rope.frequencies) == 32
    assert (config.residual, config.head_bias, config.qk_norm) == ("parallel_shared", True, "none")
    assert 2 * len(read(PHI_2, partial_rotary_factor=None).rope.frequencies) == 40
    normed = read(PHI_2, qk_layernorm=True, num_key_value_heads=8)
    tensors = hf_tensors(normed)
    assert (normed.qk_norm, normed.num_kv_heads) == ("head", 8)
    name = "model.layers.{i}.self_attn.k_layernorm.bias"
    assert tensors["layers/attention/k_norm/bias"] == HfTensor(name, (80,))
    assert tensors["layers/attention/k/kernel"].shape == (640, 2560)


@pytest.mark.parametrize(
    ("hf", "changes", "message"),
    [
        (GPT2_XL, {"scale_attn_by_inverse_layer_idx": True}, "gpt2 with scale_attn_by_inverse_layer_idx=True"),
        (GPT2_XL, {"add_cross_attention": True}, "gpt2 with add_cross_attention=True"),
        (GPT2_XL, {"hidden_size": 64}, "n_embd 1600 and hidden_size 64 mean the same and differ"),
        (GPT2_XL, {"n_head": 24}, "hidden_size 1600 is not a multiple of num_attention_heads 24"),
        (GPT2_XL, {"n_layer": None}, "num_hidden_layers has to be a whole number"),
        (GPT_J_6B, {"activation_function": "tanh"}, 'activation_function "tanh" is not supported'),
        (BLOOM_560M, {"apply_residual_connection_post_layernorm": True}, "bloom with apply_residual_connection"),
        (BLOOMZ_7B1, {"slow_but_exact": True}, "bloom with slow_but_exact=True"),
        (FALCON_7B, {"apply_residual_connection_post_layernorm": True}, "falcon with apply_residual_connection"),
        (FALCON_7B, {"num_ln_in_parallel_attn": 2}, "falcon with num_ln_in_parallel_attn=2"),
        (FALCON_7B, {"multi_query": False, "num_kv_heads": 8}, "falcon with num_kv_heads=8"),
        (FALCON_7B, {"partial_rotary_factor": 0.5}, "falcon with partial_rotary_factor=0.5"),
        (FALCON_40B, {"parallel_attn": False}, "falcon with parallel_attn=False"),
        (FALCON_40B, {"num_ln_in_parallel_attn": 3}, "falcon with num_ln_in_parallel_attn=3"),
        (FALCON_40B, {"num_kv_heads": 7}, "128 is not a multiple of num_key_value_heads 7"),
        (PHI_2, {"head_dim": 64}, "phi with head_dim=64"),
    ],
)
def test_unsupported_options_that_change_the_mathematics_are_rejected_by_name(hf, changes, message):
    with pytest.raises(ValueError, match=message):
        read(hf, **changes)


def test_either_spelling_of_a_size_is_read():
    usual = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
    for hf in (GPT2_XL, GPT_J_6B, CODEGEN_350M):
        assert read({usual.get(key, key): value for key, value in hf.items()}) == read(hf)
    usual = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    assert read({usual.get(key, key): value for key, value in GPT_NEO_1_3B.items()}) == read(GPT_NEO_1_3B)


@pytest.mark.parity
@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_names_every_tensor_that_transformers_saves_with_its_shape(name, scalar_head, tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    family = FAMILIES[VARIANTS[name]["model_type"]]
    if scalar_head and family.scalar is None:
        pytest.skip("transformers has no scalar head of this family")
    auto = transformers.AutoModelForSequenceClassification if scalar_head else transformers.AutoModelForCausalLM
    settings = VARIANTS[name] | {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0}
    theirs = auto.from_config(
        transformers.AutoConfig.for_model(**settings, **({"num_labels": 1} if scalar_head else {}))
    )
    theirs.save_pretrained(tmp_path)
    assert type(theirs).__name__ == (family.scalar if scalar_head else family.causal)
    assert theirs.base_model_prefix + "." == family.prefix
    # The saved config.json and the keyword arguments, which have old spellings, describe the same model.
    config = decoder_config(json.loads((tmp_path / "config.json").read_text()), scalar_head=scalar_head)
    assert config == decoder_config(settings, scalar_head=scalar_head)
    ours = {
        tensor.name.replace("{i}", str(layer)): tensor.shape
        for tensor in hf_tensors(config).values()
        for layer in range(config.num_layers)
    }
    assert ours == {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
