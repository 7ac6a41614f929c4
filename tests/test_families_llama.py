"""config.json -> DecoderConfig and tensor names for LLaMA, similar families, the Gemmas and the sparse families."""

import json
import math

import numpy as np
import pytest
from parity.variants_llama import VARIANTS

from rlhf_jax.models.config import Experts
from rlhf_jax.models.families import FAMILIES, alternative_tensors, base_prefix, decoder_config, hf_tensors
from rlhf_jax.models.families.tensors import HfTensor, Stripe

# As on the hub, without the keys for training, generation and remote code.
LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA_3_1_8B = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MIXTRAL_8X7B = MISTRAL_7B | {
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
QWEN_2_5_7B = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_3_8B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_30B_A3B = QWEN_3_8B | {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
PHI_3_MINI_4K = {
    "model_type": "phi3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
PHI_3_MINI_128K = PHI_3_MINI_4K | {
    "max_position_embeddings": 131072,
    # Those on the hub have three digits; here only their number, 48 of each, matters.
    "rope_scaling": {"short_factor": [1.1] * 48, "long_factor": [1.0 + i for i in range(48)], "type": "longrope"},
    "sliding_window": 262144,
}
OLMO_2_7B = {
    "model_type": "olmo2",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
STABLELM_2_1_6B = {
    "model_type": "stablelm",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "use_qkv_bias": True,
    "vocab_size": 100352,
}
GEMMA_2B = {
    "model_type": "gemma",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "vocab_size": 256000,
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def read(hf, **changes):
    return decoder_config(hf | changes, scalar_head=False)


def sizes(config):
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    return (config.hidden_size, config.num_layers, *heads, config.mlp_size, config.max_positions)


def theta(rope, dim):
    """Theta of a rotary embedding without scaling, from its second frequency."""
    return pytest.approx(rope.frequencies[1] ** (-dim / 2), rel=1e-4)


def test_llama_2_70b_has_eight_key_value_heads_of_128():
    config = read(LLAMA_2_70B)
    assert sizes(config) == (8192, 80, 64, 8, 128, 28672, 4096)
    assert (config.norm, config.norm_eps, config.gated_mlp, config.activation) == ("rms", 1e-5, True, "silu")
    assert (config.residual, config.tied, config.windows, config.attention_scale) == ("pre", False, (), 128**-0.5)
    assert 10000.0 == theta(config.rope, 128)
    tensors = hf_tensors(config)
    name = "model.layers.{i}.self_attn.k_proj.weight"
    assert tensors["layers/attention/k/kernel"] == HfTensor(name, (1024, 8192), transpose=True)
    assert tensors["head/kernel"] == HfTensor("lm_head.weight", (32000, 8192))
    assert not any(path.endswith("bias") for path in tensors)


def test_llama_3_scales_its_rotation_and_its_small_models_tie_the_head():
    config = read(LLAMA_3_1_8B)
    assert sizes(config) == (4096, 32, 32, 8, 128, 14336, 131072)
    assert config.rope.frequencies[-1] == pytest.approx(5e5 ** (-126 / 128) / 8, rel=1e-5)
    small = read(LLAMA_3_2_1B)
    assert sizes(small) == (2048, 16, 32, 8, 64, 8192, 131072)
    assert small.tied and "head/kernel" not in hf_tensors(small)
    assert small.rope.frequencies[-1] == pytest.approx(5e5 ** (-62 / 64) / 32, rel=1e-5)


def test_llama_can_have_biases_in_attention_and_mlp():
    biased = hf_tensors(read(LLAMA_2_70B, attention_bias=True, mlp_bias=True))
    linears = ["attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down"]
    assert {path for path in biased if path.endswith("bias")} == {f"layers/{linear}/bias" for linear in linears}


def test_mistral_has_a_window_of_4096_and_later_versions_none():
    assert sizes(read(MISTRAL_7B)) == (4096, 32, 32, 8, 128, 14336, 32768)
    assert read(MISTRAL_7B).windows == (4096,) * 32
    assert read(MISTRAL_7B, sliding_window=None).windows == ()
    absent = {key: value for key, value in MISTRAL_7B.items() if key not in ("sliding_window", "num_key_value_heads")}
    assert (read(absent).windows, read(absent).num_kv_heads) == ((4096,) * 32, 8)
    assert read(MISTRAL_7B, num_key_value_heads=None).num_kv_heads == 32
    assert read(MISTRAL_7B, layer_types=["sliding_attention"] * 32) == read(MISTRAL_7B)


def test_mixtral_routes_each_token_to_two_of_eight_experts():
    config = read(MIXTRAL_8X7B)
    assert sizes(config) == (4096, 32, 32, 8, 128, 14336, 32768)
    assert config.experts == Experts(count=8, per_token=2, renormalised=True, aux_coef=0.02)
    assert config.windows == () and 1e6 == theta(config.rope, 128)
    tensors, moe = hf_tensors(config), "model.layers.{i}.block_sparse_moe"
    assert tensors["layers/router/kernel"] == HfTensor(f"{moe}.gate.weight", (8, 4096), transpose=True)
    experts = {part: tensors[f"layers/experts/{part}/kernel"] for part in ("gate", "up", "down")}
    assert experts["gate"] == HfTensor(f"{moe}.experts.{{j}}.w1.weight", (14336, 4096), transpose=True)
    assert experts["up"] == HfTensor(f"{moe}.experts.{{j}}.w3.weight", (14336, 4096), transpose=True)
    assert experts["down"] == HfTensor(f"{moe}.experts.{{j}}.w2.weight", (4096, 14336), transpose=True)


def test_stacked_experts_are_an_alternative_layout():
    (together,) = alternative_tensors(read(MIXTRAL_8X7B))
    name, strip = "model.layers.{i}.mlp.experts.gate_up_proj", Stripe(14336, 14336, 28672)
    assert together["layers/experts/up/kernel"] == HfTensor(name, (8, 28672, 4096), transpose=True, strip=strip)
    assert together.keys() == hf_tensors(read(MIXTRAL_8X7B)).keys()
    assert alternative_tensors(read(MISTRAL_7B)) == []


def test_qwen_2_has_query_key_and_value_biases_and_windows_only_if_enabled():
    config = read(QWEN_2_5_7B)
    assert sizes(config) == (3584, 28, 28, 4, 128, 18944, 131072)
    assert (config.qkv_bias, config.o_bias, config.windows, config.padded_vocab) == (True, False, (), 152064)
    late = read(QWEN_2_5_7B, use_sliding_window=True, sliding_window=64, max_window_layers=26)
    assert late.windows == (0,) * 26 + (64, 64)
    reported = ["sliding_attention"] + ["full_attention"] * 27
    assert (
        read(QWEN_2_5_7B, use_sliding_window=True, sliding_window=64, layer_types=reported).windows == (64,) + (0,) * 27
    )
    assert read(QWEN_2_5_7B, layer_types=["full_attention"] * 28, sliding_window=None) == config
    assert read(QWEN_2_5_7B, use_sliding_window=True, sliding_window=None).windows == ()
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    assert read(QWEN_2_5_7B, rope_scaling=yarn).rope.factor == pytest.approx(1.1386294)


def test_qwen_3_normalises_each_head_and_has_heads_of_128_at_every_width():
    config = read(QWEN_3_8B)
    assert sizes(config) == (4096, 36, 32, 8, 128, 12288, 40960)
    assert (config.qk_norm, config.qkv_bias, 1e6) == ("head", False, theta(config.rope, 128))
    absent = {key: value for key, value in QWEN_3_8B.items() if key != "head_dim"} | {"hidden_size": 1024}
    assert read(absent).head_dim == 128
    name = "model.layers.{i}.self_attn.k_norm.weight"
    assert hf_tensors(config)["layers/attention/k_norm/scale"] == HfTensor(name, (128,))


def test_sparse_qwen_3_has_128_narrow_experts():
    config = read(QWEN_3_30B_A3B)
    assert sizes(config) == (2048, 48, 32, 4, 128, 768, 40960)
    assert config.experts == Experts(count=128, per_token=8, renormalised=True, aux_coef=0.001)
    name = "model.layers.{i}.mlp.experts.{j}.up_proj.weight"
    assert hf_tensors(config)["layers/experts/up/kernel"] == HfTensor(name, (768, 2048), transpose=True)
    raw = {key: value for key, value in QWEN_3_30B_A3B.items() if key != "norm_topk_prob"}
    assert not read(raw).experts.renormalised
    # transformers 5 writes the number of experts under another name.
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in QWEN_3_30B_A3B.items()}
    assert read(renamed) == config


def test_phi_3_stores_fused_tensors_and_serves_the_positions_of_its_short_factors():
    config = read(PHI_3_MINI_4K)
    assert sizes(config) == (3072, 32, 32, 32, 96, 8192, 4096)
    assert config.windows == (2047,) * 32
    tensors, layer = hf_tensors(config), "model.layers.{i}"
    qkv = HfTensor(f"{layer}.self_attn.qkv_proj.weight", (9216, 3072), True, Stripe(6144, 3072, 9216))
    gate_up = HfTensor(f"{layer}.mlp.gate_up_proj.weight", (16384, 3072), True, Stripe(8192, 8192, 16384))
    assert (tensors["layers/attention/v/kernel"], tensors["layers/mlp/up/kernel"]) == (qkv, gate_up)
    long = read(PHI_3_MINI_128K)
    assert long.max_positions == 4096 and long.rope.factor == pytest.approx(math.sqrt(1 + 5 / 12))
    np.testing.assert_allclose(long.rope.frequencies, np.array(config.rope.frequencies) / 1.1, rtol=1e-6)
    for name in ("su", "yarn"):  # names from its first release
        assert read(PHI_3_MINI_128K, rope_scaling=PHI_3_MINI_128K["rope_scaling"] | {"type": name}) == long
    assert len(read(PHI_3_MINI_4K, partial_rotary_factor=0.75).rope.frequencies) == 36


def test_olmo_2_normalises_the_output_of_each_half_and_all_heads_together():
    config = read(OLMO_2_7B, num_key_value_heads=8)
    assert sizes(config) == (4096, 32, 32, 8, 128, 11008, 4096)
    assert (config.residual, config.qk_norm, config.norm_eps) == ("output", "width", 1e-6)
    tensors, layer = hf_tensors(config), "model.layers.{i}"
    assert tensors["layers/attention/k_norm/scale"] == HfTensor(f"{layer}.self_attn.k_norm.weight", (1024,))
    assert tensors["layers/mlp_out_norm/scale"] == HfTensor(f"{layer}.post_feedforward_layernorm.weight", (4096,))
    assert not {"layers/attention_norm/scale", "layers/mlp_norm/scale"} & tensors.keys()


def test_stablelm_rotates_a_quarter_of_each_head_and_can_have_parallel_halves_and_head_norms():
    config = read(STABLELM_2_1_6B)
    assert sizes(config) == (2048, 24, 32, 32, 64, 5632, 4096)
    assert (config.norm, config.residual, config.qkv_bias, config.o_bias) == ("layer", "pre", True, False)
    absent = {key: value for key, value in STABLELM_2_1_6B.items() if key != "partial_rotary_factor"}
    assert len(config.rope.frequencies) == 8 and read(absent) == config
    big = read(STABLELM_2_1_6B, use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=False)
    assert (big.residual, big.qk_norm) == ("parallel_shared", "each_head")
    name = "model.layers.{i}.self_attn.q_layernorm.norms.{j}.weight"
    assert hf_tensors(big)["layers/attention/q_norm/scale"] == HfTensor(name, (64,))
    assert "layers/mlp_norm/scale" not in hf_tensors(big)


def test_gemma_scales_its_embeddings_and_uses_the_approximate_gelu():
    config = read(GEMMA_2B)
    assert sizes(config) == (2048, 18, 8, 1, 256, 16384, 8192)
    assert (config.norm, config.tied, config.activation) == ("rms_plus_one", True, "gelu_tanh")
    assert config.embed_scale == pytest.approx(2048**0.5)
    assert read(GEMMA_2B, hidden_activation=None, head_dim=None) == config


def test_gemma_2_caps_its_scores_and_has_a_window_in_every_second_layer():
    config = read(GEMMA_2_9B)
    assert sizes(config) == (3584, 42, 16, 8, 256, 14336, 8192)
    assert (config.attention_softcap, config.final_softcap, config.residual) == (50.0, 30.0, "sandwich")
    assert config.windows == (4096, 0) * 21 and config.attention_scale == 1 / 16
    assert read(GEMMA_2_9B, layer_types=["full_attention", "sliding_attention"] * 21).windows == (0, 4096) * 21
    assert read(GEMMA_2_9B, query_pre_attn_scalar=144).attention_scale == pytest.approx(1 / 12)
    uncapped = read(GEMMA_2_9B, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (uncapped.attention_softcap, uncapped.final_softcap) == (0.0, 0.0)
    norms = {"attention_norm": "input", "attention_out_norm": "post_attention"}
    norms |= {"mlp_norm": "pre_feedforward", "mlp_out_norm": "post_feedforward"}
    for ours, theirs in norms.items():
        assert hf_tensors(config)[f"layers/{ours}/scale"].name == f"model.layers.{{i}}.{theirs}_layernorm.weight"


def test_gemma_3_has_full_attention_with_slower_rotation_in_every_sixth_layer():
    config = read(GEMMA_3_1B)
    assert sizes(config) == (1152, 26, 4, 1, 256, 6912, 32768)
    assert config.windows == (512, 512, 512, 512, 512, 0) * 4 + (512, 512)
    assert (config.qk_norm, config.attention_softcap, config.final_softcap) == ("head", 0.0, 0.0)
    assert (1e6, 1e4) == (theta(config.rope, 256), theta(config.local_rope, 256))
    absent = GEMMA_3_1B.keys() - {"rope_theta", "rope_local_base_freq", "sliding_window_pattern"}
    assert read({key: GEMMA_3_1B[key] for key in absent}) == config
    assert read(GEMMA_3_1B, sliding_window_pattern=2).windows == (512, 0) * 13
    everything = read(GEMMA_3_1B, layer_types=["full_attention"] * 26)
    assert (everything.windows, everything.local_rope) == ((), None)


def test_both_spellings_of_the_two_rotations_of_gemma_3_are_read():
    old = read(GEMMA_3_1B, rope_scaling={"factor": 8.0, "rope_type": "linear"}, rope_local_base_freq=500)
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500},
    }
    new = {key: value for key, value in GEMMA_3_1B.items() if not key.startswith("rope")}
    assert read(new, rope_parameters=parameters) == old
    assert old.rope.frequencies[0] == 1 / 8 and 500 == theta(old.local_rope, 256)


@pytest.mark.parametrize(
    ("hf", "changes", "message"),
    [
        (LLAMA_2_70B, {"num_key_value_heads": 7}, "64 is not a multiple of num_key_value_heads 7"),
        (LLAMA_2_70B, {"num_attention_heads": 60}, "hidden_size 8192 is not a multiple of num_attention_heads 60"),
        (LLAMA_2_70B, {"hidden_act": "tanh"}, 'hidden_act "tanh" is not supported; supported: relu, gelu'),
        (LLAMA_2_70B, {"rope_scaling": {"type": "ntk"}}, 'rope scaling "ntk" is not supported'),
        (LLAMA_2_70B, {"partial_rotary_factor": 0.5}, "llama with partial_rotary_factor other than 1"),
        (LLAMA_2_70B, {"layer_types": ["sliding_attention"] * 80}, "sliding_window has to be a whole number"),
        (MISTRAL_7B, {"layer_types": ["full_attention"] * 32}, "mistral with layer_types that differ"),
        (MISTRAL_7B, {"sliding_window": 0}, "sliding_window has to be a whole number of at least 1, not 0"),
        (QWEN_2_5_7B, {"layer_types": ["full_attention"] * 27}, "each of 28 layers, not 27"),
        (QWEN_2_5_7B, {"layer_types": ["linear_attention"] * 28}, "not 28 of them, linear_attention"),
        (QWEN_2_5_7B, {"layer_types": ["sliding_attention"] * 28}, "sliding_window has to be a whole number"),
        (QWEN_2_5_7B, {"rope_parameters": {"full_attention": {}}}, "qwen2 with rope_parameters for full_attention"),
        (PHI_3_MINI_4K, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'phi3 with rope scaling "linear"'),
        (STABLELM_2_1_6B, {"head_dim": 128}, "stablelm with head_dim=128"),
        (GEMMA_2B, {"hidden_activation": "relu"}, "gemma with hidden_activation='relu'"),
        (GEMMA_2B, {"use_bidirectional_attention": True}, "gemma with use_bidirectional_attention=True"),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, "gemma3_text with use_bidirectional_attention=True"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "gemma3_text with attn_logit_softcapping=50.0"),
        (GEMMA_3_1B, {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters for full_attention and sliding"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok 9 of 8 experts"),
        (QWEN_3_30B_A3B, {"decoder_sparse_step": 2}, "qwen3_moe with decoder_sparse_step=2"),
        (QWEN_3_30B_A3B, {"mlp_only_layers": [0]}, r"qwen3_moe with mlp_only_layers=\[0\]"),
    ],
)
def test_unsupported_options_that_change_the_mathematics_are_rejected_by_name(hf, changes, message):
    with pytest.raises(ValueError, match=message):
        read(hf, **changes)


def tensor_names(config, tensors):
    """{name: shape} of all tensors that the patterns in `tensors` name."""
    names = {}
    for path, (name, shape, *_) in tensors.items():
        many = config.experts.count if "/experts/" in path else config.num_heads
        many = config.num_kv_heads if "/k_norm/" in path else many
        for layer in range(config.num_layers):
            for each in range(many):
                names[name.replace("{i}", str(layer)).replace("{j}", str(each))] = shape
    return names


@pytest.mark.parity
@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_names_every_tensor_that_transformers_saves_with_its_shape(name, scalar_head, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    def saved_shapes(**options):
        theirs.save_pretrained(tmp_path, **options)
        return {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}

    family = FAMILIES[VARIANTS[name]["model_type"]]
    auto = transformers.AutoModelForSequenceClassification if scalar_head else transformers.AutoModelForCausalLM
    settings = VARIANTS[name] | {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0}
    labels = {"num_labels": 1} if scalar_head else {}
    theirs = auto.from_config(transformers.AutoConfig.for_model(**settings, **labels))
    names = saved_shapes()
    assert type(theirs).__name__ == (family.scalar if scalar_head else family.causal)
    # The saved config.json and the keyword arguments, which have old spellings, describe the same model.
    config = decoder_config(json.loads((tmp_path / "config.json").read_text()), scalar_head=scalar_head)
    assert config == decoder_config(settings, scalar_head=scalar_head)
    assert theirs.base_model_prefix + "." == base_prefix(config)
    assert tensor_names(config, hf_tensors(config)) == names
    for layout in alternative_tensors(config):
        assert tensor_names(config, layout) == saved_shapes(save_original_format=False)
