"""`rlhf-jax import` and `rlhf-jax export`, and the adapters that a LoRA stage exports."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file
from tiny_tokenizer import chatml_like

from rlhf_jax.cli import main
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.lora import LoraConfig, merge_adapters
from rlhf_jax.models.pretrained import (
    Pretrained,
    apply,
    from_pretrained,
    reward_from_pretrained,
    save_pretrained,
    score,
)
from rlhf_jax.stages.models import ModelConfig, export_model, make_state

HF = {
    "model_type": "llama",
    "vocab_size": 360,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "eos_token_id": 1,
    "an_unknown_key": [1, 2],
}
SETTINGS = ModelConfig(lora=LoraConfig(rank=2, alpha=6.0), reward_lora=LoraConfig(rank=3, targets=("q", "v")))


def model(*, scalar_head: bool = False) -> Pretrained:
    config, layout = decoder_config(HF, scalar_head=scalar_head), Layout(single_device_mesh(), TRAIN)
    params = tiny.random_params(config, layout.mesh)
    return Pretrained(config, params, prepare_tokenizer(chatml_like()), HF, {}, layout)


def trained_state(base: Pretrained, settings: ModelConfig = SETTINGS):
    """Parameters with adapters that have an effect."""
    state, frozen = make_state(base, settings, optax.sgd(0.1), 0)
    rng = np.random.default_rng(0)
    for path, leaf in state.trainable.items():
        state.trainable[path] = jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)
    return state.params(frozen)


@pytest.fixture
def run(tmp_path):
    """A run folder written by LoRA stages: SFT and reward model finished, PPO not."""
    folder = tmp_path / "run"
    save_pretrained(model(), tmp_path / "base")
    folder.mkdir()
    (folder / "config.toml").write_text("[run]\n")
    base = from_pretrained(tmp_path / "base")
    export_model(base, trained_state(base), SETTINGS, folder / "sft" / "export")
    scorer = reward_from_pretrained(tmp_path / "base")
    export_model(scorer, trained_state(scorer), SETTINGS, folder / "reward" / "export")
    return folder


def one_line_error(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("rlhf-jax: ")
    return error.removeprefix("rlhf-jax: ").rstrip("\n")


def inputs():
    ids, mask = tiny.prompts(model().config, [9, 4, 7], 9)
    return jnp.asarray(ids), jnp.asarray(mask)


def test_a_lora_stage_exports_an_adapter_and_a_merged_model_that_are_equivalent(run, tmp_path):
    merged = apply(from_pretrained(run / "sft" / "export"), *inputs())
    assert main(["export", str(run), str(tmp_path / "adapter"), "--stage", "sft", "--adapter"]) == 0
    extra = from_pretrained(tmp_path / "base", tmp_path / "adapter")
    assert extra.config.lora == SETTINGS.lora
    np.testing.assert_allclose(apply(extra, *inputs()), merged, atol=1e-5)
    assert np.abs(apply(from_pretrained(tmp_path / "base"), *inputs()) - merged).max() > 0.1
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    assert (tmp_path / "adapter" / "tokenizer_config.json").exists()


def test_adapters_are_merged_shard_by_shard_on_eight_devices(tmp_path):
    lora = LoraConfig(rank=4, alpha=8.0)
    config = decoder_config({**HF, "vocab_size": 360, "num_key_value_heads": 4}, scalar_head=False)
    config = tiny.with_lora(config, lora)
    mesh = tiny.mesh_of("fsdp4-tensor2")
    params = tiny.random_params(config, mesh)
    base = Pretrained(config, params, None, HF, {}, Layout(mesh, TRAIN))
    save_pretrained(base, tmp_path / "out")
    want = merge_adapters({path: jnp.asarray(np.asarray(leaf)) for path, leaf in params.items()}, lora)
    got = load_file(tmp_path / "out" / "model.safetensors")
    for ours, theirs in {"attention/k": "self_attn.k_proj", "attention/o": "self_attn.o_proj"}.items():
        kernel = want[f"layers/{ours}/kernel"][1].T
        assert np.abs(kernel - params[f"layers/{ours}/kernel"][1].T).max() > 0.05
        np.testing.assert_allclose(got[f"model.layers.1.{theirs}.weight"], kernel, atol=1e-6)


def test_the_adapter_of_a_reward_model_carries_its_scalar_head(run, tmp_path):
    merged = score(reward_from_pretrained(run / "reward" / "export"), *inputs())
    adapter = run / "reward" / "export_adapter"
    np.testing.assert_allclose(score(reward_from_pretrained(tmp_path / "base", adapter), *inputs()), merged, atol=1e-5)


def test_import_merges_an_adapter_casts_and_keeps_all_other_keys_of_the_configuration(run, tmp_path, capsys):
    out = tmp_path / "out"
    adapter = ["--adapter", str(run / "sft" / "export_adapter")]
    assert main(["import", str(tmp_path / "base"), str(out), *adapter, "--dtype", "bfloat16"]) == 0
    # 360 ids, which are padded to 384 here, and no adapters.
    count = sum(array.size for array in load_file(tmp_path / "base" / "model.safetensors").values())
    assert f"a llama language model of {count:,} parameters" in capsys.readouterr().err
    assert {array.dtype for array in load_file(out / "model.safetensors").values()} == {jnp.dtype("bfloat16")}
    source, copy = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "base", out))
    assert {key for key in source.keys() | copy.keys() if source.get(key) != copy.get(key)} == {"dtype", "torch_dtype"}
    # Merged in the base's float32 and rounded once.
    got, want = (load_file(folder / "model.safetensors") for folder in (out, run / "sft" / "export"))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name].astype(jnp.bfloat16), err_msg=name)


def test_import_keeps_dtype_and_kind_and_changes_no_bit(run, tmp_path):
    for name, place in {"language": tmp_path / "base", "scalar": run / "reward" / "export"}.items():
        assert main(["import", str(place), str(tmp_path / name)]) == 0
        source, copy = (load_file(folder / "model.safetensors") for folder in (place, tmp_path / name))
        jax.tree.map(np.testing.assert_array_equal, source, copy)
        assert (place / "config.json").read_text() == (tmp_path / name / "config.json").read_text()


def test_import_uses_the_dtype_of_the_files_regardless_of_the_configuration(run, tmp_path):
    save_pretrained(from_pretrained(tmp_path / "base"), tmp_path / "half", dtype="bfloat16")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps(config | {"dtype": None}))
    assert main(["import", str(tmp_path / "half"), str(tmp_path / "out")]) == 0
    assert {array.dtype for array in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        jnp.dtype("bfloat16")
    }


def test_importing_a_reward_adapter_over_a_language_model_gives_the_reward_model(run, tmp_path):
    arguments = [str(tmp_path / "base"), str(tmp_path / "out"), "--adapter", str(run / "reward" / "export_adapter")]
    assert main(["import", *arguments]) == 0
    got, want = (score(reward_from_pretrained(f), *inputs()) for f in (tmp_path / "out", run / "reward" / "export"))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_missing_parts_of_a_run_are_reported_in_one_line(run, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "base"), out]) == 2
    assert "is no run folder (it has no config.toml)" in one_line_error(capsys)
    (tmp_path / "no_policy").mkdir()
    (tmp_path / "no_policy" / "config.toml").write_text('[run]\nstages = ["reward"]\n')
    assert main(["export", str(tmp_path / "no_policy"), str(tmp_path / "out")]) == 2
    assert "none of its stages (reward) exports a policy: choose one with --stage" in one_line_error(capsys)
    assert main(["export", str(run), out]) == 2
    assert one_line_error(capsys).endswith("does not exist); finished: sft, reward")
    whole = ModelConfig()
    base = from_pretrained(tmp_path / "base")
    export_model(base, trained_state(base, whole), whole, run / "ppo" / "export")
    assert main(["export", str(run), out, "--adapter"]) == 2
    assert one_line_error(capsys).endswith("was trained whole, without LoRA, so it has no adapter: leave --adapter out")
    assert main(["export", str(run), out, "--stage", "sft", "--adapter", "--dtype", "float16"]) == 2
    assert "an adapter is float32: leave one of them out" in one_line_error(capsys)
    assert main(["export", str(run), str(run)]) == 2
    assert "exists and is not empty" in one_line_error(capsys)


def test_an_adapter_or_a_reward_model_in_place_of_a_model_is_identified_in_the_error(run):
    with pytest.raises(ValueError, match="is a PEFT adapter: give the folder of its base, and this one as `adapter`"):
        from_pretrained(run / "sft" / "export_adapter")
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification\), such as a reward model.*reward_from_pre"):
        from_pretrained(run / "reward" / "export")
