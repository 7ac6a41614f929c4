"""Models of a stage: precision of merged adapters, EOS tokens of exports, frozen copies."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file
from tiny_tokenizer import chatml_like

from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.pretrained import Pretrained, from_pretrained
from rlhf_jax.rollout import eos_ids
from rlhf_jax.stages.models import ModelConfig, copy_frozen, export_model, make_state

HF = {
    "model_type": "opt",
    "vocab_size": 360,
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}


def model(dtype: str = "float32") -> Pretrained:
    config = decoder_config(HF, scalar_head=False)
    params = tiny.random_params(config, single_device_mesh())
    params = {path: leaf.astype(dtype) for path, leaf in params.items()}
    layout = Layout(single_device_mesh(), TRAIN)
    return Pretrained(config, params, prepare_tokenizer(chatml_like()), HF, {}, layout)


def test_an_export_has_both_the_end_of_turn_of_the_template_and_eos_as_eos_tokens(tmp_path):
    settings = ModelConfig()
    pretrained = model()
    assert eos_ids(pretrained) == (1,)
    state, frozen = make_state(pretrained, settings, optax.sgd(0.1), 0)
    export_model(pretrained, state.params(frozen), settings, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 3]
    assert eos_ids(from_pretrained(tmp_path / "out")) == (1, 3)


def test_an_export_keeps_adapter_updates_below_the_rounding_of_a_frozen_bfloat16_base(tmp_path):
    settings = ModelConfig(lora=LoraConfig(rank=2, alpha=2.0, targets=("up",)), frozen_dtype="bfloat16")
    pretrained = model("bfloat16")
    state, frozen = make_state(pretrained, settings, optax.sgd(0.1), 0)
    for path in state.trainable:
        state.trainable[path] = jnp.full_like(state.trainable[path], 1e-3)
    export_model(pretrained, state.params(frozen), settings, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")["model.decoder.layers.1.fc1.weight"].T
    base = np.asarray(pretrained.params["layers/mlp/up/kernel"][1].astype("float32"))
    np.testing.assert_allclose(got - base, 2e-6, rtol=0.2)  # 2 ranks of 1e-3 times 1e-3


def test_adapters_on_linears_that_the_family_lacks_are_rejected():
    settings = ModelConfig(lora=LoraConfig(rank=2, targets=("gate",)))
    with pytest.raises(ValueError, match="targets gate is a linear of this model"):
        make_state(model(), settings, optax.sgd(0.1), 0)


def test_reward_adapters_on_linears_that_the_family_lacks_are_rejected_although_the_head_would_train():
    settings = ModelConfig(reward_lora=LoraConfig(rank=2, targets=("gate",)))
    scorer = model()
    config = dataclasses.replace(scorer.config, scalar_head=True)
    scorer = dataclasses.replace(scorer, config=config, params=tiny.random_params(config, single_device_mesh()))
    with pytest.raises(ValueError, match="targets gate is a linear of this model"):
        make_state(scorer, settings, optax.sgd(0.1), 0)


def test_a_frozen_copy_remains_valid_after_its_source_arrays_are_deleted():
    params = {"w": jnp.arange(4.0)}
    copies = {dtype: copy_frozen(params, dtype) for dtype in ("float32", "bfloat16")}
    jax.tree.map(lambda x: x.delete(), params)
    for dtype, copy in copies.items():
        assert copy["w"].dtype == dtype
        np.testing.assert_array_equal(copy["w"].astype("float32"), [0.0, 1.0, 2.0, 3.0])
