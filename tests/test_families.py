"""All families: selection, rejected configurations, ignored tensors, and the config.json of an export."""

import dataclasses

import pytest
from parity.variants_gpt import VARIANTS as GPTS
from parity.variants_llama import VARIANTS as LLAMAS

from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import (
    FAMILIES,
    VOCAB_MULTIPLE,
    alternative_tensors,
    base_prefix,
    decoder_config,
    hf_config,
    hf_tensors,
    ignored_names,
)
from rlhf_jax.models.families.spellings import with_all_spellings
from rlhf_jax.models.families.tensors import HfTensor

VARIANTS = GPTS | LLAMAS
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
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}
CODEGEN = GPTS["codegen"]


def test_opt_350m_is_post_norm_with_projections_and_without_a_final_norm():
    config = decoder_config(OPT_350M, scalar_head=False)
    assert (config.residual, config.final_norm, config.tied, config.rope) == ("post", False, True, None)
    assert (config.hidden_size, config.embed_size, config.num_kv_heads, config.head_dim) == (1024, 512, 16, 64)
    assert (config.position_rows, config.position_offset) == (2050, 2)
    assert (config.vocab_size, config.padded_vocab) == (50272, 50304)
    tensors = hf_tensors(config)
    decoder = "model.decoder"
    assert tensors["embed/tokens"] == HfTensor(f"{decoder}.embed_tokens.weight", (50272, 512))
    assert tensors["embed/positions"] == HfTensor(f"{decoder}.embed_positions.weight", (2050, 1024))
    assert tensors["project_in/kernel"] == HfTensor(f"{decoder}.project_in.weight", (1024, 512), transpose=True)
    name = f"{decoder}.layers.{{i}}.fc1"
    assert tensors["layers/mlp/up/kernel"] == HfTensor(f"{name}.weight", (4096, 1024), transpose=True)
    assert tensors["layers/mlp/up/bias"] == HfTensor(f"{name}.bias", (4096,))
    assert not {"final_norm/scale", "head/kernel", "project_in/bias"} & tensors.keys()


def test_other_opt_sizes_are_pre_norm_and_can_lack_the_final_norm_or_the_biases():
    hf = OPT_350M | {"do_layer_norm_before": True, "word_embed_proj_dim": 1024}
    config = decoder_config(hf, scalar_head=False)
    assert (config.residual, config.final_norm, config.embed_size) == ("pre", True, 1024)
    assert not decoder_config(hf | {"_remove_final_layer_norm": True}, scalar_head=False).final_norm
    unbiased = hf_tensors(decoder_config(hf | {"enable_bias": False}, scalar_head=False))
    assert {path for path in unbiased if path.endswith("bias")} == {
        "final_norm/bias",
        "layers/attention_norm/bias",
        "layers/mlp_norm/bias",
    }


@pytest.mark.parametrize(
    ("hf", "reported"),
    [
        ({"model_type": "mamba"}, '"mamba" is not supported; supported: bloom, codegen, falcon, gemma, gemma2'),
        ({}, '"None" is not supported; supported: bloom'),
        (
            {"model_type": "gemma3n", "text_config": {}},
            '"gemma3n" are not supported; supported, .*gemma3',
        ),
        ({"model_type": "mistral3", "text_config": {"model_type": "gpt2"}}, "mistral3 over gpt2 is not supported"),
        ({"model_type": "gemma3"}, "has no text_config"),
        (LLAMA_2_7B | {"quantization_config": {"bits": 4}}, "quantised"),
        (LLAMA_2_7B | {"is_causal": False}, "llama with is_causal=False is not supported"),
        (LLAMA_2_7B | {"per_layer_config": {"0": {"hidden_act": "relu"}}}, "llama with per_layer_config="),
        (OPT_350M | {"layer_norm_elementwise_affine": False}, "opt with layer_norm_elementwise_affine=False"),
        ({k: v for k, v in OPT_350M.items() if k != "ffn_dim"}, "ffn_dim has to be a whole number"),
        ({k: v for k, v in LLAMA_2_7B.items() if k != "vocab_size"}, "vocab_size has to be a whole number"),
    ],
)
def test_unsupported_configurations_are_rejected_by_name(hf, reported):
    with pytest.raises(ValueError, match=reported):
        decoder_config(hf, scalar_head=False)


@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_name_in_every_layout_and_none_is_named_twice(name, scalar_head):
    config = decoder_config(VARIANTS[name], scalar_head=scalar_head)
    assert config.padded_vocab % VOCAB_MULTIPLE == 0 <= config.padded_vocab - config.vocab_size < VOCAB_MULTIPLE
    for tensors in (hf_tensors(config), *alternative_tensors(config)):
        assert tensors.keys() == abstract_params(config).keys()
        assert ("score/kernel" in tensors) == scalar_head
        assert ("head/kernel" in tensors) == (not scalar_head and not config.tied)
        assert all(path.startswith("layers/") == ("{i}" in tensor.name) for path, tensor in tensors.items())
        # Two parameters share a tensor only where each has a strip of its own.
        places = [(tensor.name, tensor.strip) for tensor in tensors.values()]
        assert len(set(places)) == len(places)
        whole = [tensor.name for tensor in tensors.values() if tensor.strip is None]
        assert not set(whole) & {tensor.name for tensor in tensors.values() if tensor.strip is not None}
        assert len(set(whole)) == len(whole)


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_tensors_are_divided_among_their_parts_without_remainder(name):
    config = decoder_config(VARIANTS[name], scalar_head=False)
    leaves = abstract_params(config)
    for tensors in (hf_tensors(config), *alternative_tensors(config)):
        parts = {}
        for path, tensor in tensors.items():
            if tensor.strip is not None:
                outputs = tensor.shape[-2] if tensor.transpose else tensor.shape[-1]
                assert outputs % tensor.strip.period == 0
                assert leaves[path].shape[-1] == outputs // tensor.strip.period * tensor.strip.length
                parts.setdefault((tensor.name, tensor.strip.period), []).append(tensor.strip)
        for (_, period), strips in parts.items():
            covered = sorted(place for strip in strips for place in range(strip.offset, strip.offset + strip.length))
            assert covered == list(range(period))


def test_only_an_unused_head_and_buffers_are_ignored():
    untied = decoder_config(LLAMA_2_7B, scalar_head=False)
    assert ignored_names(untied).fullmatch("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not ignored_names(untied).fullmatch("lm_head.weight")
    for other in (dataclasses.replace(untied, tied=True), dataclasses.replace(untied, scalar_head=True)):
        assert ignored_names(other).fullmatch("lm_head.weight")
        for name in ("lm_head.weight2", "lm_headxweight", "", "model.", "model.layers.3.self_attn.q_proj.weight"):
            assert not ignored_names(other).fullmatch(name)


def test_buffers_and_heads_of_a_family_are_ignored_with_and_without_the_prefix():
    gpt2 = ignored_names(decoder_config(GPTS["gpt2"], scalar_head=False))
    for buffer in ("h.0.attn.bias", "h.11.attn.masked_bias"):
        assert gpt2.fullmatch(buffer) and gpt2.fullmatch(f"transformer.{buffer}")
        assert not gpt2.fullmatch(f"model.{buffer}") and not gpt2.fullmatch(f"{buffer}.weight")
    buffers = {
        "opt": ("model.", "decoder.version"),  # of fairseq
        "gpt_neo": ("transformer.", "h.3.attn.attention.bias", "h.3.attn.attention.masked_bias"),
        "gptj": ("transformer.", "h.3.attn.bias", "h.3.attn.masked_bias"),
        "codegen": ("transformer.", "h.3.attn.causal_mask"),
        "gpt_neox": (
            "gpt_neox.",
            "layers.3.attention.bias",
            "layers.3.attention.masked_bias",
            "layers.3.attention.rotary_emb.inv_freq",
        ),
        "llama": ("model.", "layers.3.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "embeddings.position_ids"),
    }
    for name, (prefix, *old) in buffers.items():
        ignored = ignored_names(decoder_config(VARIANTS[name], scalar_head=False))
        assert all(ignored.fullmatch(each) and ignored.fullmatch(prefix + each) for each in old)
    for name, head in (("gpt_neox", "embed_out.weight"), ("gptj", "lm_head.bias")):
        scorer = decoder_config(GPTS[name], scalar_head=True)
        assert ignored_names(scorer).fullmatch(head)
        assert not ignored_names(dataclasses.replace(scorer, scalar_head=False)).fullmatch(head)


def test_base_models_lack_the_prefix_of_their_family():
    for name, prefix in (("llama", "model."), ("gpt2", "transformer."), ("gpt_neox", "gpt_neox.")):
        assert base_prefix(decoder_config(VARIANTS[name], scalar_head=False)) == prefix


def test_the_exported_config_is_that_of_the_source_with_the_changes_and_what_transformers_assumes():
    config = decoder_config(OPT_350M, scalar_head=False)
    exported = hf_config(OPT_350M, config, dtype="bfloat16", pad_token_id=1)
    changes = {"architectures": ["OPTForCausalLM"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert exported.items() >= (OPT_350M | changes).items()
    assert (exported["layerdrop"], exported["tie_word_embeddings"], exported["model_type"]) == (0.0, True, "opt")
    assert decoder_config(exported, scalar_head=False) == config
    assert hf_config(exported, config, dtype="bfloat16", pad_token_id=None) == exported


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
OLDER = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3},
    "olmo2": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "stablelm": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_emb_base": 500, "rotary_pct": 0.5},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    "qwen3_moe": {"num_experts": 8, "num_local_experts": 8},
    "gpt2": {"n_ctx": 1024, "n_positions": 1024},
    "falcon": {"num_kv_heads": 1},  # transformers' config has 71 there, which it does not use
}
NEWER = {
    "llama": {"rope_parameters": {"rope_theta": 5e5} | LLAMA3},
    "olmo2": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
    "stablelm": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
    "gpt_neox": {"rope_parameters": {"rope_theta": 500, "rope_type": "default", "partial_rotary_factor": 0.5}},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "layer_types": 2 * [*5 * ["sliding_attention"], "full_attention"],
        "num_hidden_layers": 12,
    },
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0],
            "long_factor": [2.0],
            "original_max_position_embeddings": 4096,
        },
        "hidden_size": 2,
        "num_attention_heads": 1,
    },
    "qwen3_moe": {"num_local_experts": 8},
    "gpt2": {},
    "falcon": {},
}


@pytest.mark.parametrize("family", NEWER)
def test_older_keys_are_written_next_to_the_newer_ones(family):
    source = {"model_type": family} | NEWER[family]
    written = with_all_spellings(source)
    assert written.items() >= (source | OLDER[family]).items()


def test_a_config_that_transformers_refuses_is_written_with_a_warning(caplog):
    source = {"model_type": "llama", "rope_theta": 5e5, "rms_norm_eps": "small"}
    assert with_all_spellings(source) == source
    assert "transformers does not read this config.json" in caplog.text


def test_a_value_that_transformers_assumes_is_written_and_no_id_of_a_token():
    written = with_all_spellings({"model_type": "qwen2"})  # mlx-lm assumes a theta of 1,000,000, transformers 10,000
    assert (written["rope_theta"], written["num_key_value_heads"], written["use_sliding_window"]) == (1e4, 32, False)
    assert not {key for key in written if key.endswith("_token_id")} and "rope_scaling" not in written


def test_an_exported_config_adds_no_pad_token_and_names_no_remote_code():
    source = LLAMA_2_7B | {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}}
    exported = hf_config(source, decoder_config(source, scalar_head=False), dtype="bfloat16", pad_token_id=None)
    assert exported.items() >= (LLAMA_2_7B | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}).items()
    assert exported.keys() & {"auto_map", "pad_token_id"} == LLAMA_2_7B.keys() & {"pad_token_id"}


def test_a_scalar_head_is_exported_as_one_label_with_its_name_kept():
    scorer = decoder_config(LLAMA_2_7B, scalar_head=True)
    source = LLAMA_2_7B | {"num_labels": 3, "problem_type": "single_label_classification"}
    exported = hf_config(source, scorer, dtype="bfloat16", pad_token_id=0)
    assert "problem_type" not in exported
    assert exported["architectures"] == ["LlamaForSequenceClassification"]
    assert (exported["num_labels"], exported["id2label"], exported["pad_token_id"]) == (1, {"0": "LABEL_0"}, 0)
    named = exported | {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}
    assert hf_config(named, scorer, dtype="bfloat16", pad_token_id=0) == named


def test_a_classifier_with_two_labels_is_rejected_as_a_reward_model():
    hf = LLAMA_2_7B | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}
    with pytest.raises(ValueError, match="the model has 2 labels, and a reward model has one"):
        decoder_config(hf, scalar_head=True)


def test_the_vocabulary_is_padded_to_a_multiple_of_any_number_of_devices():
    for parts, rows in ((1, 32000), (8, 32000), (3, 32256), (96, 32256), (256, 32000), (512, 32256)):
        config = decoder_config(LLAMA_2_7B, scalar_head=False, vocab_parts=parts)
        assert (config.vocab_size, config.padded_vocab) == (32000, rows) and rows % parts == 0


@pytest.mark.parametrize("wrong", [{"rms_norm_eps": []}, {"head_dim": "64"}])
def test_a_config_value_of_a_wrong_type_is_reported_without_a_crash(wrong):
    with pytest.raises(ValueError, match="config.json of this llama has a value of a wrong kind"):
        decoder_config(LLAMA_2_7B | wrong, scalar_head=False)


def test_a_scalar_head_that_transformers_lacks_is_exported_under_a_name_of_this_package():
    assert FAMILIES["codegen"].scalar is None
    exported = hf_config(CODEGEN, decoder_config(CODEGEN, scalar_head=True), dtype="float32", pad_token_id=1)
    assert exported["architectures"] == ["CodeGenForScalarHead"]
