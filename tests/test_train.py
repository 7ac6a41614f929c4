"""Whole runs: the files they write, that nothing is done twice, and that a resumed run equals an uninterrupted one."""

import json
import math
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipe
from tiny_recipe import interrupt_stage, records, start_before_ppo, tensors, tree, untimed_records, write_recipe

import rlhf_jax.collectives
import rlhf_jax.rollout
import rlhf_jax.stages.ppo
import rlhf_jax.stages.supervised
from rlhf_jax.cli import main
from rlhf_jax.data import builtin
from rlhf_jax.models.pretrained import from_pretrained

STAGES = ("sft", "reward", "ppo")


@pytest.fixture
def finished_folder(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory)


def test_a_finished_run_has_the_documented_folders(finished_folder):
    names = {path.name for path in finished_folder.iterdir()}
    files = {"config.toml", "tensorboard", "events.jsonl", "report.html"}
    assert names - {"evaluate.json", "evaluate.jsonl"} == {*files, "base", *STAGES}
    assert {path.name for path in (finished_folder / "sft").iterdir()} == {"metrics.jsonl", "checkpoints", "export"}
    assert {path.name for path in (finished_folder / "reward").iterdir()} == {"metrics.jsonl", "checkpoints", "export"}
    assert {path.name for path in (finished_folder / "ppo").iterdir()} == {
        *("metrics.jsonl", "checkpoints", "rollouts", "export", "export_critic")
    }
    for export in ("base", "sft/export", "reward/export", "ppo/export", "ppo/export_critic"):
        files = {path.name for path in (finished_folder / export).iterdir()}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        assert ("generation_config.json" in files) == (export not in ("reward/export", "ppo/export_critic"))
    for stage in STAGES:  # the newest two: save_every is 2, and the last step is always saved
        assert {path.name for path in (finished_folder / stage / "checkpoints").iterdir()} == {"4", "5"}
        assert len(list((finished_folder / "tensorboard").glob(f"events.out.tfevents.*.{stage}"))) == 1


def test_config_toml_is_the_merged_configuration(finished_folder):
    merged = tomllib.loads((finished_folder / "config.toml").read_text())
    assert merged["run"]["dir"] == str(finished_folder)  # from the command line
    assert merged["sft"]["steps"] == 5  # from the file
    assert merged["ppo"]["lam"] == 0.95  # from the defaults


def test_metrics_have_one_record_per_step_with_step_and_stage(finished_folder):
    for stage in STAGES:
        lines = records(finished_folder / stage / "metrics.jsonl")
        assert {line["stage"] for line in lines} == {stage}
        trained = [line["step"] for line in lines if not any(name.startswith("held_out") for name in line)]
        assert trained == [1, 2, 3, 4, 5]
    measured = [line["step"] for line in records(finished_folder / "sft" / "metrics.jsonl") if "held_out_loss" in line]
    assert measured == [0, 2, 4, 5]  # before the first step, every second, and after the last


def test_ppo_logs_all_documented_metrics(finished_folder):
    promised = {
        *("score_mean", "score_std", "kl", "actor_loss", "critic_loss", "actor_clip_fraction", "critic_clip_fraction"),
        *("actor_approx_kl", "actor_entropy", "explained_variance", "response_length", "ended_by_eos"),
        *("seconds_publish", "seconds_generate", "seconds_score", "seconds_update", "tokens_per_second"),
    }
    for record in records(finished_folder / "ppo" / "metrics.jsonl"):
        assert promised - record.keys() == set()
        assert all(math.isfinite(record[name]) for name in promised)
    first = records(finished_folder / "ppo" / "metrics.jsonl")[0]
    assert first["kl"] == pytest.approx(0, abs=1e-4)  # the actor is the reference before its first update
    assert first["actor_approx_kl"] == pytest.approx(0, abs=1e-6)  # and the ratio is 1
    assert first["actor_clip_fraction"] == 0
    assert first["logprob_mismatch"] < 1e-5  # sampling and training see the same distribution
    assert first["actor_entropy"] == pytest.approx(math.log(300), abs=0.5)


def test_every_rollout_is_written_and_agrees_with_the_metrics(finished_folder):
    files = sorted((finished_folder / "ppo" / "rollouts").iterdir())
    assert [file.name for file in files] == [f"{step:06d}.jsonl" for step in range(1, 6)]
    for step, (file, metrics) in enumerate(
        zip(files, records(finished_folder / "ppo" / "metrics.jsonl"), strict=True), 1
    ):
        rollouts = records(file)
        assert len(rollouts) == 8
        for rollout in rollouts:
            assert set(rollout) == {"step", "prompt", "response", "score", "reward", "kl", "length", "finish_reason"}
            assert rollout["step"] == step
            assert rollout["prompt"].startswith("\n\nHuman: ") and rollout["prompt"].endswith("\n\nAssistant:")
            assert rollout["finish_reason"] == ("eos" if rollout["response"].endswith("</s>") else "length")
            # kl_coef 0.1, score_clip 5: the reward of an answer is its score minus the penalties of its tokens
            clipped = min(max(rollout["score"], -5), 5)
            assert rollout["reward"] == pytest.approx(clipped - 0.1 * rollout["kl"], abs=1e-5)
        for name, column in {
            "score_mean": "score",
            "kl": "kl",
            "reward_mean": "reward",
            "response_length": "length",
        }.items():
            assert metrics[name] == pytest.approx(np.mean([rollout[column] for rollout in rollouts]), abs=1e-5)
        assert metrics["ended_by_eos"] == np.mean([rollout["finish_reason"] == "eos" for rollout in rollouts])


def test_a_second_train_skips_all_three_stages_and_changes_nothing(finished_folder, capsys):
    before = tree(finished_folder)
    assert tiny_recipe.run("train", finished_folder.parent / "tiny.toml", f"run.dir={finished_folder}") == 0
    said = capsys.readouterr().err
    assert [f"{stage}: finished already" in said for stage in STAGES] == [True, True, True]
    after = tree(finished_folder)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {"config.toml"}
    assert before["config.toml"][0] == after["config.toml"][0]


LORA = [f"model.{name}={{rank=2, alpha=4.0}}" for name in ("lora", "reward_lora")]
MESH = ["mesh.fsdp=4", "mesh.tensor=2"]
AVERAGED = ["ppo.ema_decay=0.75", "model.offload_ema=true", "model.offload_reference=true"]


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        pytest.param([], 1, id="whole-model"),
        pytest.param(
            [*LORA, "ppo.ppo_epochs=2", "ppo.batch_size=4", "sft.micro_batch_size=4", "ppo.ema_decay=0.9"],
            1,
            id="lora",
        ),
        pytest.param([*MESH, *AVERAGED], 8, id="fsdp4-tensor2"),
    ],
)
def test_a_run_stopped_in_every_stage_ends_bit_equal_to_an_uninterrupted_one(
    tmp_path, tmp_path_factory, monkeypatch, capsys, overrides, devices
):
    recipe = write_recipe(tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    if overrides:
        assert tiny_recipe.run("train", recipe, f"run.dir={whole}", *overrides, devices=devices) == 0
    else:
        whole = tiny_recipe.finished_run(tmp_path_factory)
    # Between two checkpoints, before the first one, and just after one was saved.
    for stage, at in (("sft", 3), ("reward", 1), ("ppo", 4)):
        with monkeypatch.context() as patch:
            interrupt_stage(patch, stage, at)
            assert tiny_recipe.run("train", recipe, f"run.dir={stopped}", *overrides, devices=devices) == 130
        assert "resumes from the last checkpoint" in capsys.readouterr().err
        assert not (stopped / stage / "export").exists()
    assert tiny_recipe.run("train", recipe, f"run.dir={stopped}", *overrides, devices=devices) == 0
    assert "ppo: resumed at step 4 of 5" in capsys.readouterr().err

    for stage in STAGES:
        assert untimed_records(stopped / stage / "metrics.jsonl") == untimed_records(whole / stage / "metrics.jsonl")
    averaged = ["ppo/export_ema"] if any("ema_decay" in each for each in overrides) else []
    for export in ("sft/export", "reward/export", "ppo/export", "ppo/export_critic", *averaged):
        ours, theirs = tensors(stopped / export), tensors(whole / export)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    for file in (whole / "ppo" / "rollouts").iterdir():
        assert (stopped / "ppo" / "rollouts" / file.name).read_bytes() == file.read_bytes()


def test_a_run_does_not_resume_with_the_same_configuration_on_other_data(tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "mine.jsonl", tmp_path / "run"
    rows = list(builtin.make_rows(0, 260))

    def write(rows):
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(rows)
    source = f'data.sources=[{{path="{data}", answer="answer"}}]'
    arguments = ["sft", write_recipe(tmp_path), f"run.dir={run}", source]
    with monkeypatch.context() as patch:
        interrupt_stage(patch, "sft", 3)
        assert tiny_recipe.run(*arguments) == 130
    write([{**row, "answer": row["answer"] + "!"} for row in rows])
    capsys.readouterr()
    assert tiny_recipe.run(*arguments) == 2
    assert "the training data is no longer what the first 2 steps saw" in capsys.readouterr().err
    write(rows)
    assert tiny_recipe.run(*arguments) == 0


def test_training_changes_every_weight_and_depends_on_the_seed(finished_folder):
    base, sft, ppo = (tensors(finished_folder / export) for export in ("base", "sft/export", "ppo/export"))
    assert base.keys() == sft.keys() == ppo.keys()
    assert [name for name in base if np.array_equal(base[name], sft[name])] == []
    assert [name for name in base if np.array_equal(sft[name], ppo[name])] == []
    first, second = (records(finished_folder / "ppo" / "rollouts" / f"00000{step}.jsonl") for step in (1, 2))
    assert first[0]["prompt"] != second[0]["prompt"] and first[0]["response"] != second[0]["response"]


def test_one_device_and_eight_give_the_same_sft_run_up_to_float32_rounding(tmp_path, finished_folder):
    recipe, eight = write_recipe(tmp_path), tmp_path / "eight"
    assert tiny_recipe.run("sft", recipe, f"run.dir={eight}", *MESH, devices=8) == 0
    ours, theirs = tensors(eight / "base"), tensors(finished_folder / "base")
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    for a, b in zip(
        untimed_records(eight / "sft/metrics.jsonl"),
        untimed_records(finished_folder / "sft/metrics.jsonl"),
        strict=True,
    ):
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=1e-5)
    ours, theirs = tensors(eight / "sft/export"), tensors(finished_folder / "sft/export")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, theirs)
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        assert np.abs(a - b).mean() < 1e-6


def test_adapters_do_not_change_the_base_and_are_merged_into_the_export(tmp_path, finished_folder):
    recipe, folder = write_recipe(tmp_path), tmp_path / "run"
    assert tiny_recipe.run("sft", recipe, f"run.dir={folder}", 'model.lora={rank=2, targets=["q", "v"]}') == 0
    base, sft = tensors(folder / "base"), tensors(folder / "sft/export")
    assert {name.split(".")[-2] for name in base if not np.array_equal(base[name], sft[name])} == {"q_proj", "v_proj"}
    update = sft["model.layers.0.self_attn.q_proj.weight"] - base["model.layers.0.self_attn.q_proj.weight"]
    assert np.linalg.matrix_rank(update, tol=1e-5) == 2


def test_a_run_killed_between_the_last_checkpoint_and_the_export_resumes_with_the_export(tmp_path, monkeypatch, capsys):
    recipe, folder = write_recipe(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:

        def kill(*args):
            raise KeyboardInterrupt

        patch.setattr(rlhf_jax.stages.supervised, "export_model", kill)
        assert tiny_recipe.run("sft", recipe, f"run.dir={folder}", "sft.steps=2") == 130
    before = untimed_records(folder / "sft/metrics.jsonl")
    capsys.readouterr()
    assert tiny_recipe.run("sft", recipe, f"run.dir={folder}", "sft.steps=2") == 0
    assert "sft: resumed at step 2 of 2" in capsys.readouterr().err
    assert untimed_records(folder / "sft/metrics.jsonl") == before
    assert (folder / "sft/export/model.safetensors").exists()


def record_trainable(patch, kept):
    """Appends the trained weights of the actor to `kept`, before PPO and after each of its steps."""
    loop = rlhf_jax.stages.ppo.train_loop

    def record_loop(context, total, state, step_fn, **options):
        def record_step(state, step):
            state, stats = step_fn(state, step)
            kept.append(jax.device_get(jax.tree.map(jnp.copy, state.actor.trainable)))
            return state, stats

        kept.append(jax.device_get(jax.tree.map(jnp.copy, state.actor.trainable)))
        return loop(context, total, state, record_step, **options)

    patch.setattr(rlhf_jax.stages.ppo, "train_loop", record_loop)


@pytest.mark.parametrize("lora", [False, True])
def test_the_exported_average_equals_hand_arithmetic_and_is_bit_equal_when_resumed_and_in_host_memory(
    lora, tmp_path, finished_folder, monkeypatch, capsys
):
    overrides = ["ppo.steps=3", "ppo.ema_decay=0.75", *(LORA[:1] if lora else [])]
    whole, stopped, kept = tmp_path / "whole", tmp_path / "stopped", []
    with monkeypatch.context() as patch:
        record_trainable(patch, kept)
        assert tiny_recipe.run(*start_before_ppo(whole, finished_folder, *overrides)) == 0
    assert re.search("programs of generation: [123], of at most 3 for these prompts", capsys.readouterr().err)
    command = start_before_ppo(stopped, finished_folder, *overrides, *AVERAGED[1:])
    with monkeypatch.context() as patch:
        interrupt_stage(patch, "ppo", 2)
        assert tiny_recipe.run(*command) == 130
    assert tiny_recipe.run(*command) == 0
    said = capsys.readouterr()
    assert "ppo: resumed at step 2 of 3" in said.err
    assert ("offload_reference has nothing to do" in said.err) == lora and "offload_ema" not in said.err

    start, *after = kept
    average = {path: leaf.astype(np.float64) for path, leaf in start.items()}
    for trained in after:
        average = {path: 0.75 * leaf + 0.25 * trained[path] for path, leaf in average.items()}
    assert max(np.abs(average[path] - after[-1][path]).max() for path in average) > 1e-3
    if lora:
        base, scale = from_pretrained(whole / "sft/export").params, 4.0 / 2
        for path in [path for path in average if path.endswith("lora_a")]:
            kernel = path.replace("lora_a", "kernel")
            average[kernel] = base[kernel] + scale * average.pop(path) @ average.pop(path.replace("lora_a", "lora_b"))
        assert (whole / "ppo/export_ema_adapter/adapter_model.safetensors").exists()
    exported = from_pretrained(whole / "ppo/export_ema").params
    assert average.keys() <= exported.keys()
    for path, leaf in average.items():
        np.testing.assert_allclose(exported[path], leaf, atol=1e-6, err_msg=path)

    assert untimed_records(stopped / "ppo/metrics.jsonl") == untimed_records(whole / "ppo/metrics.jsonl")
    for export in ("ppo/export", "ppo/export_critic", "ppo/export_ema"):
        ours, theirs = tensors(stopped / export), tensors(whole / export)
        assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []
    assert main(["export", str(whole), str(tmp_path / "out"), "--stage", "ema"]) == 0
    jax.tree.map(np.testing.assert_array_equal, tensors(tmp_path / "out"), tensors(whole / "ppo/export_ema"))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_resumed_on_four_and_then_on_one_of_eight_devices_ends_the_same_up_to_rounding(
    tmp_path, finished_folder, monkeypatch, capsys, stage
):
    if stage == "ppo":
        command = start_before_ppo(tmp_path / "run", finished_folder)
    else:
        command = ["sft", write_recipe(tmp_path), f"run.dir={tmp_path / 'run'}"]
    for devices, at in ((8, 2), (4, 4)):
        with monkeypatch.context() as patch:
            interrupt_stage(patch, stage, at)
            assert tiny_recipe.run(*command, devices=devices) == 130
    assert tiny_recipe.run(*command) == 0
    shown = capsys.readouterr().err
    assert f"{stage}: resumed at step 2 of 5" in shown and f"{stage}: resumed at step 4 of 5" in shown
    path = f"{stage}/metrics.jsonl"
    for a, b in zip(untimed_records(tmp_path / "run" / path), untimed_records(finished_folder / path), strict=True):
        numbers = {name: value for name, value in b.items() if isinstance(value, float)}
        assert {name: a[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)
    for export in ("sft/export",) if stage == "sft" else ("ppo/export", "ppo/export_critic"):
        ours, theirs = tensors(tmp_path / "run" / export), tensors(finished_folder / export)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_a_run_resumed_with_other_memory_settings_ends_the_same_up_to_rounding(
    tmp_path, finished_folder, monkeypatch, capsys
):
    overrides, whole, stopped = ["ppo.steps=3", "ppo.ema_decay=0.75", *LORA], tmp_path / "whole", tmp_path / "stopped"
    changed = ["model.remat=layers", "model.one_copy=true", "model.offload_optimizer=true", *AVERAGED[1:]]
    assert tiny_recipe.run(*start_before_ppo(whole, finished_folder, *overrides)) == 0
    command = start_before_ppo(stopped, finished_folder, *overrides)
    with monkeypatch.context() as patch:
        interrupt_stage(patch, "ppo", 2)
        assert tiny_recipe.run(*command) == 130
    capsys.readouterr()
    assert tiny_recipe.run(*command, *changed, "mesh.zero=1", devices=2) == 0
    assert "ppo: resumed at step 2 of 3" in capsys.readouterr().err
    assert tomllib.loads((stopped / "config.toml").read_text())["model"]["one_copy"] is True
    for export in ("ppo/export", "ppo/export_critic", "ppo/export_ema"):
        ours, theirs = tensors(stopped / export), tensors(whole / export)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_without_an_average_none_is_exported_and_requesting_it_is_an_error(tmp_path, finished_folder, capsys):
    assert not (finished_folder / "ppo/export_ema").exists()
    assert main(["export", str(finished_folder), str(tmp_path / "out"), "--stage", "ema"]) == 2
    assert "was trained without (ppo.ema_decay = 0)" in capsys.readouterr().err


def test_publish_is_logged_with_its_bytes_their_lower_bound_and_the_ratio(
    tmp_path, finished_folder, monkeypatch, capsys
):
    for record in records(finished_folder / "ppo" / "metrics.jsonl"):
        assert (record["publish_bytes"], record["publish_bytes_least"]) == (0, 0), "one device"
        assert "publish_bytes_ratio" not in record
    eight = tmp_path / "eight"
    assert tiny_recipe.run(*start_before_ppo(eight, finished_folder, "ppo.steps=1", *MESH), devices=8) == 0
    (record,) = records(eight / "ppo/metrics.jsonl")
    # float32: the embedding, 300 ids padded to 384 rows, and the kernels; a device receives 3/8 of each.
    split = sum(leaf.size for leaf in tensors(eight / "sft/export").values() if leaf.ndim == 2) + (384 - 300) * 16
    assert record["publish_bytes"] == record["publish_bytes_least"] == split * 4 * 3 // 8
    assert record["publish_bytes_ratio"] == 1

    monkeypatch.setattr(rlhf_jax.rollout, "received_bytes", lambda text: rlhf_jax.collectives.received_bytes(""))
    assert tiny_recipe.run(*start_before_ppo(tmp_path / "mute", finished_folder, "ppo.steps=1")) == 0
    assert "the bytes of publish are not counted: the compiled program comes without" in capsys.readouterr().err
    assert not {name for name in records(tmp_path / "mute/ppo/metrics.jsonl")[0] if name.startswith("publish")}


def test_ppo_with_slot_refill_samples_and_trains_as_without_it(tmp_path, finished_folder):
    options = ("ppo.steps=1", "ppo.batch_size=0", "ppo.sample.num_samples=2")
    said, logged = [], []
    for rows in (0, 4):
        folder = tmp_path / str(rows)
        assert tiny_recipe.run(*start_before_ppo(folder, finished_folder, *options, f"ppo.generate_rows={rows}")) == 0
        said.append([(line["prompt"], line["response"]) for line in records(folder / "ppo/rollouts/000001.jsonl")])
        logged += untimed_records(folder / "ppo/metrics.jsonl")
    assert len(said[0]) == 16 and said[0] == said[1]
    assert [said[0][i][0] for i in range(0, 16, 2)] == [said[0][i][0] for i in range(1, 16, 2)]
    at_once, in_rows = logged
    assert at_once.pop("stage") == in_rows.pop("stage")
    assert at_once.pop("decode_steps") < in_rows.pop("decode_steps") < 11 * 16
    assert at_once == pytest.approx(in_rows, rel=1e-3, abs=1e-4)
