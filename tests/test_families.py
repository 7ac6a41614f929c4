"""config.json -> DecoderConfig, and the tables of tensor names."""

import dataclasses

import pytest

from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import TABLES, HfTensor, decoder_config, hf_config, hf_tensors, tolerated_surplus

OPT_350M = {
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
    "torch_dtype": "float16",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def test_opt_350m_is_post_norm_with_projections_and_no_final_norm():
    config = decoder_config(OPT_350M, scalar_head=False)
    assert (config.post_norm, config.final_norm, config.tied, config.rope_theta) == (True, False, True, 0.0)
    assert (config.hidden_size, config.embed_size, config.num_kv_heads, config.head_dim) == (1024, 512, 16, 64)
    assert (config.vocab_size, config.padded_vocab) == (50272, 50304)
    tensors = hf_tensors(config)
    assert tensors["embed/tokens"] == HfTensor("model.decoder.embed_tokens.weight", "rows", (50272, 512))
    assert tensors["embed/positions"] == HfTensor("model.decoder.embed_positions.weight", "same", (2050, 1024))
    assert tensors["project_in/kernel"] == HfTensor("model.decoder.project_in.weight", "transpose", (1024, 512))
    assert tensors["layers/mlp/up/kernel"] == HfTensor("model.decoder.layers.{i}.fc1.weight", "transpose", (4096, 1024))
    assert tensors["layers/mlp/up/bias"] == HfTensor("model.decoder.layers.{i}.fc1.bias", "same", (4096,))
    assert not {"final_norm/scale", "head/kernel", "project_in/bias"} & tensors.keys()


def test_other_opt_sizes_are_pre_norm_and_may_lack_the_final_norm_or_the_biases():
    hf = OPT_350M | {"do_layer_norm_before": True, "word_embed_proj_dim": 1024}
    config = decoder_config(hf, scalar_head=False)
    assert (config.post_norm, config.final_norm, config.embed_size) == (False, True, 1024)
    assert not decoder_config(hf | {"_remove_final_layer_norm": True}, scalar_head=False).final_norm
    unbiased = hf_tensors(decoder_config(hf | {"enable_bias": False}, scalar_head=False))
    assert {path for path in unbiased if path.endswith("bias")} == {
        "final_norm/bias",
        "layers/attention_norm/bias",
        "layers/mlp_norm/bias",
    }


def test_llama_2_70b_has_eight_key_value_heads_of_128():
    config = decoder_config(LLAMA_2_70B, scalar_head=False)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (64, 8, 128)
    assert (config.norm, config.norm_eps, config.rope_theta, config.gated_mlp) == ("rms", 1e-5, 10000.0, True)
    tensors = hf_tensors(config)
    assert tensors["layers/attention/k/kernel"].shape == (1024, 8192)
    assert tensors["head/kernel"] == HfTensor("lm_head.weight", "rows", (32000, 8192))
    assert not any(path.endswith("bias") for path in tensors)


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_parameters": None, "rope_theta": None}, 10000.0),
    ],
)
def test_rope_theta_is_read_in_its_old_and_new_spelling(rope, theta):
    assert decoder_config(LLAMA_2_70B | rope, scalar_head=False).rope_theta == theta


@pytest.mark.parametrize(
    ("hf", "told"),
    [
        ({"model_type": "gpt2"}, '"gpt2" is not supported; supported: llama, opt'),
        ({}, "supported: llama, opt"),
        (LLAMA_2_70B | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 'rope scaling "llama3"'),
        (LLAMA_2_70B | {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope scaling "linear"'),
        (LLAMA_2_70B | {"rope_parameters": {"rope_type": "yarn"}}, 'rope scaling "yarn"'),
        (
            LLAMA_2_70B | {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        (LLAMA_2_70B | {"hidden_act": "gelu_new"}, 'hidden_act "gelu_new" is not supported; supported: relu, gelu'),
        (LLAMA_2_70B | {"quantization_config": {"bits": 4}}, "quantised"),
        (LLAMA_2_70B | {"num_key_value_heads": 7}, "64 is not a multiple of num_key_value_heads 7"),
        (OPT_350M | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ({k: v for k, v in OPT_350M.items() if k != "ffn_dim"}, "ffn_dim has to be a whole number"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(hf, told):
    with pytest.raises(ValueError, match=told):
        decoder_config(hf, scalar_head=False)


@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize(
    "hf",
    [
        OPT_350M,
        OPT_350M | {"do_layer_norm_before": True, "word_embed_proj_dim": None},
        OPT_350M | {"tie_word_embeddings": False},
        LLAMA_2_70B,
        LLAMA_2_70B | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 64},
    ],
)
def test_every_parameter_has_one_name_and_no_two_share_it(hf, scalar_head):
    config = decoder_config(hf, scalar_head=scalar_head)
    tensors = hf_tensors(config)
    assert tensors.keys() == abstract_params(config).keys()
    assert len({tensor.name for tensor in tensors.values()}) == len(tensors)
    assert all((path.startswith("layers/")) == ("{i}" in tensor.name) for path, tensor in tensors.items())
    assert ("score/kernel" in tensors) == scalar_head
    assert ("head/kernel" in tensors) == (not scalar_head and not config.tied)


def test_no_table_gives_two_paths_one_name():
    for table in TABLES.values():
        names = [name for name, _ in table.values()]
        assert len(set(names)) == len(names)


def test_only_an_unused_head_and_rotary_buffers_are_tolerated():
    untied = decoder_config(LLAMA_2_70B, scalar_head=False)
    buffer = "model.layers.3.self_attn.rotary_emb.inv_freq"
    assert tolerated_surplus(untied).fullmatch(buffer)
    assert not tolerated_surplus(untied).fullmatch("lm_head.weight")
    for other in (dataclasses.replace(untied, tied=True), dataclasses.replace(untied, scalar_head=True)):
        assert tolerated_surplus(other).fullmatch("lm_head.weight")
        assert not tolerated_surplus(other).fullmatch("lm_head.weight2")
        assert not tolerated_surplus(other).fullmatch("model.layers.3.self_attn.q_proj.weight")


def test_the_exported_config_is_the_source_with_what_changed():
    config = decoder_config(OPT_350M, scalar_head=False)
    exported = hf_config(OPT_350M, config, dtype="float32", pad_token_id=1)
    kept = {key: value for key, value in OPT_350M.items() if key != "torch_dtype"}
    assert exported == kept | {"architectures": ["OPTForCausalLM"], "dtype": "float32"}
    assert decoder_config(exported, scalar_head=False) == config


def test_a_scalar_head_is_exported_as_one_label_and_a_language_model_as_none():
    scorer = decoder_config(LLAMA_2_70B, scalar_head=True)
    exported = hf_config(LLAMA_2_70B, scorer, dtype="bfloat16", pad_token_id=0)
    assert exported["architectures"] == ["LlamaForSequenceClassification"]
    assert (exported["num_labels"], exported["id2label"], exported["pad_token_id"]) == (1, {"0": "LABEL_0"}, 0)
    back = hf_config(exported, decoder_config(exported, scalar_head=False), dtype="bfloat16", pad_token_id=0)
    assert back["architectures"] == ["LlamaForCausalLM"]
    assert not {"num_labels", "id2label", "label2id"} & back.keys()
