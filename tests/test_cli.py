"""The command line: help, exit codes, and one clear line for every mistake that a user can make."""

import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_recipe
import tomli_w
from safetensors.numpy import load_file, save_file
from tiny_recipe import RECIPE, records, tensors, tree, write_recipe

from rlhf_jax.cli import main, set_compile_cache, set_logging, set_xla_flags
from rlhf_jax.config import dump_config, load_config
from rlhf_jax.metrics import Metrics
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.run_folder import RunConfig, check_same_data
from rlhf_jax.stages.table import STAGES, check_stages, sources


@pytest.fixture
def finished_folder(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory)


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


@pytest.fixture
def error_line(tmp_path, recipe, capsys):
    """`error_line("key=value", ...)` runs `train` and returns the last line on stderr, which is the only one."""

    def run(*overrides: str, command: str = "train", devices: int = 1, text: str = "") -> str:
        if text:
            recipe.write_text(text, encoding="utf-8")
        where = [] if any(override.startswith("run.dir") for override in overrides) else [f"run.dir={tmp_path / 'run'}"]
        capsys.readouterr()
        assert tiny_recipe.run(command, recipe, *where, *overrides, devices=devices) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("rlhf-jax: ")
        assert not any("Traceback" in line or line.startswith("rlhf-jax: ") for line in lines[:-1])
        return lines[-1].removeprefix("rlhf-jax: ")

    return run


def one_line_error(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("rlhf-jax: ")
    return error.removeprefix("rlhf-jax: ").rstrip("\n")


# Help and exit codes.


def test_python_m_runs_the_command_and_exits_with_the_codes_of_main(tmp_path):
    def run(*argv: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, "-m", "rlhf_jax", *argv], capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    helped = run("--help")
    assert helped.returncode == 0 and helped.stderr == ""
    for command in ("train", "sft", "reward", "ppo", "evaluate", "chat"):
        assert f"\n    {command}" in helped.stdout
    wrong = run("train", "nothing.toml")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "rlhf-jax: nothing.toml: no such file; give the path of a TOML file\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["train"],
        ["chat"],
        ["import", "x"],
        ["export", "x"],
        ["chat", "x", "--top-p", "much"],
        ["train", "--x"],
    ],
)
def test_a_wrong_command_line_exits_with_2_and_prints_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: rlhf-jax")


# The configuration.


def test_a_missing_or_malformed_configuration_file_is_reported_by_name(tmp_path, capsys, recipe):
    assert main(["train", str(tmp_path / "tinny.toml")]) == 2
    assert one_line_error(capsys) == f"{tmp_path / 'tinny.toml'}: no such file; did you mean '{recipe}'?"
    recipe.write_text("[run]\ndir = oops\n")
    assert main(["train", str(recipe)]) == 2
    error = one_line_error(capsys)
    assert error.startswith(f"{recipe}: not valid TOML: ") and "line 2" in error


@pytest.mark.parametrize(
    ("override", "reported"),
    [
        ("sft.batchsize=4", "unknown key 'sft.batchsize'; did you mean 'sft.batch_size'?"),
        ("ppo.actor.learning_rat=1.0", "did you mean 'ppo.actor.learning_rate'?"),
        ("sft.batch_size=many", "'sft.batch_size' is \"many\", but wants a whole number"),
        ("model.dtype=float23", "did you mean 'float32'?"),
        ("sft.batch_size", "an override is written section.key=value"),
        ("ppo.actor.learning_rate=-1.0", "[ppo.actor] learning_rate is -1.0, give a positive number"),
        ("run.save_every=0", "[run] save_every=0, log_every=1, keep=2, max_skipped=3: all at least 1"),
        ("run.seed=-1", "[run] seed=-1: from 0 to 4294967295"),
        ('run.dir=""', "[run] dir is empty: name the folder of the run"),
    ],
)
def test_a_wrong_key_or_value_is_reported_with_the_right_one(error_line, override, reported):
    error = error_line(override)
    assert reported in error


def test_an_unknown_key_is_reported_with_the_name_of_the_file(error_line, recipe):
    error = error_line(text=RECIPE.replace("eval_every = 2", "eval_evry = 2"))
    assert error == f"{recipe}: unknown key 'sft.eval_evry'; did you mean 'sft.eval_every'?"


# Sizes.


@pytest.mark.parametrize(
    ("overrides", "reported"),
    [
        (
            ["sft.batch_size=12"],
            "sft.batch_size=12 does not divide over 8 devices of the mesh; nearest that do: [8, 16]",
        ),
        (
            ["reward.batch_size=4"],
            "reward.batch_size=4 does not divide over 8 devices of the mesh; nearest that do: [8]",
        ),
        (["ppo.rollout_batch_size=20", "ppo.batch_size=0"], "ppo.rollout_batch_size=20 does not divide over 8 devices"),
        (["sft.batch_size=24", "sft.micro_batch_size=16"], "does not divide batch_size=24; these do: [8, 24]"),
        (
            ["ppo.rollout_batch_size=24", "ppo.batch_size=16"],
            "over 16 rollouts of ppo.batch_size; nearest that do: [16",
        ),
        (["mesh.fsdp=3"], "mesh data 1 x fsdp 3 x tensor 1 does not cover 8 device(s)"),
        (["mesh.data=-1"], "mesh.data=-1 and mesh.fsdp=-1: every size is at least 1, and at most one is -1"),
        (["ppo.sample.max_new_tokens=0"], "max_new_tokens=0: at least 1"),
        (["ppo.sample.temperature=0.0"], "ppo: sample.temperature=0: a greedy policy has no probability ratios"),
        (["ppo.sample.top_k=5"], "set top_k=0 and top_p=1.0"),
        (["ppo.sample.top_p=0.9"], "set top_k=0 and top_p=1.0"),
        (["reward.optim.warmup_steps=6"], "reward: warmup_steps is 6, longer than the run of 5 steps"),
        (["ppo.critic.warmup_steps=6"], "ppo: warmup_steps is 6, longer than the run of 5 steps"),
    ],
)
def test_sizes_that_do_not_divide_are_rejected_before_anything_runs(error_line, tmp_path, overrides, reported):
    assert reported in error_line(*overrides, devices=8)
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {"config.toml"}


def test_a_tensor_axis_that_does_not_divide_the_heads_is_rejected_with_the_sizes_that_do(error_line):
    error = error_line("mesh.tensor=8", devices=8)
    assert "mesh.tensor=8 does not divide 2 attention heads" in error and "sizes that divide: 1, 2" in error


def test_rows_longer_than_the_positions_of_the_model_are_rejected(error_line):
    error = error_line("model.new.max_positions=64")
    assert "tokens, and the model has 64 positions: set data.max_length to at most 64" in error


def test_prompt_and_answer_longer_than_the_positions_are_rejected_with_the_longest_that_fit(
    error_line, finished_folder
):
    error = error_line(f"run.dir={finished_folder}", "evaluate.sample.max_new_tokens=150", command="evaluate")
    assert "positions, and the model has 160: shorten the prompt to 10 tokens or set max_new_tokens to at most" in error


def test_ppo_rejects_answers_that_do_not_fit(error_line, finished_folder, tmp_path):
    shutil.copytree(finished_folder, tmp_path / "run", ignore=shutil.ignore_patterns("ppo", "config.toml"))
    config = (finished_folder / "config.toml").read_text().replace(str(finished_folder), str(tmp_path / "run"))
    (tmp_path / "run/config.toml").write_text(config.replace("max_new_tokens = 12", "max_new_tokens = 150"))
    error = error_line("ppo.sample.max_new_tokens=150", "evaluate.sample.max_new_tokens=150", command="ppo")
    assert "positions, and the model has 160: shorten the prompt to 10 tokens or set max_new_tokens to at most" in error


def test_a_batch_larger_than_the_data_is_rejected_with_the_largest_that_fits(error_line):
    error = error_line("sft.batch_size=4096")
    assert error.startswith("sft: batch size 4096 does not fit") and "choose 1 to" in error


def test_training_without_held_out_rows_is_rejected_unless_evaluation_is_off(error_line, recipe, tmp_path):
    assert "sft: there are no held-out rows to evaluate on (0 rows): raise data.held_out" in error_line(
        "data.held_out=0.0"
    )
    options = ("data.held_out=0.0", "sft.eval_batches=0", "sft.steps=1", f"run.dir={tmp_path / 'run'}")
    assert tiny_recipe.run("sft", recipe, *options) == 0
    assert [line["step"] for line in records(tmp_path / "run/sft/metrics.jsonl")] == [1]


# The data.


def test_faults_of_a_data_file_are_reported_with_file_and_line(error_line, write_jsonl, tmp_path):
    assert "gone.jsonl: no such file" in error_line('data.sources=[{path="gone.jsonl"}]')
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write_jsonl([good, good])
    path.write_text(path.read_text() + '{"prompt": "a", \n')
    assert f"{path}, line 3: malformed JSON" in error_line(f'data.sources=[{{path="{path}"}}]')
    path = write_jsonl([good, {"prompt": "a", "picked": "b"}])
    assert f"{path}, line 2: no field 'chosen'; the fields are prompt, picked." in error_line(
        f'data.sources=[{{path="{path}"}}]'
    )


def test_a_hub_dataset_without_network_is_reported_in_one_line(error_line):
    assert "absent/model" in error_line('data.sources=[{path="absent/model"}]')


# Models.


@pytest.fixture
def checkpoint(finished_folder, tmp_path):
    """A copy of a valid folder, without its checksums, for the test to damage."""
    without = shutil.ignore_patterns("SHA256SUMS")
    return Path(shutil.copytree(finished_folder / "base", tmp_path / "checkpoint", ignore=without))


def test_an_unknown_architecture_is_rejected_with_the_known_ones(error_line, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "foo"}))
    assert 'model_type "foo" is not supported; supported: bloom, codegen, falcon, gemma, gemma2,' in error_line(
        f"model.actor={checkpoint}"
    )


def test_missing_surplus_and_wrongly_shaped_tensors_are_all_listed(error_line, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    gone = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    kept = {name: array for name, array in weights.items() if name not in gone}
    kept |= {"model.extra.weight": np.zeros(3, np.float32), "another.bias": np.zeros(2, np.float32)}
    kept["model.layers.0.mlp.up_proj.weight"] = np.zeros((5, 16), np.float32)
    save_file(kept, checkpoint / "model.safetensors")
    error = error_line(f"model.actor={checkpoint}")
    assert f"missing: {', '.join(gone)}; surplus: another.bias, model.extra.weight; misshaped: " in error
    assert "model.layers.0.mlp.up_proj.weight ([5, 16] in place of [32, 16])" in error


def test_a_pickle_of_anything_but_tensors_is_rejected_with_the_command_that_converts_it(error_line, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    error = error_line(f"model.actor={checkpoint}")
    assert "pytorch_model.bin names builtins.print, which is no part of a tensor: a pickle can run any code" in error
    assert "where you trust it, convert what it has of tensors, with torch installed: python -c" in error


def test_a_folder_without_a_model_and_a_hub_id_without_network_are_rejected(error_line, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "config.json: is" in error_line(f"model.actor={tmp_path / 'empty'}")
    assert f"there is no folder {tmp_path / 'gone'}" in error_line(f"model.actor={tmp_path / 'gone'}")
    error = error_line("model.actor=absent/model")
    assert "absent/model is neither a folder here nor to be had from the Hugging Face hub" in error
    assert main(["chat", str(tmp_path / "empty")]) == 2
    assert one_line_error(capsys).endswith(
        "empty is no Hugging Face folder (no config.json): name RUN/ppo/export or RUN/sft/export"
    )
    assert main(["chat", str(tmp_path / "gone")]) == 2
    assert one_line_error(capsys) == f"there is no folder {tmp_path / 'gone'}"


def test_a_model_without_a_tokenizer_cannot_be_trained(error_line, checkpoint):
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    assert f"{checkpoint} has no tokenizer: save one into the folder" in error_line(f"model.actor={checkpoint}")


# Run folders.


def test_a_stage_without_its_predecessor_is_rejected_with_the_missing_stage(error_line, tmp_path):
    error = error_line(command="ppo")
    assert error.startswith(
        f"ppo starts from the export of sft and reward in {tmp_path / 'run'}, which is not finished"
    )
    assert "reward starts from the export of sft" in error_line(command="reward")


def test_a_run_of_another_configuration_is_never_overwritten_unless_the_user_asks_for_it(error_line, finished_folder):
    before = tree(finished_folder)
    error = error_line(f"run.dir={finished_folder}", "sft.steps=7", "ppo.kl_coef=0.2")
    assert error == (
        f"{finished_folder} holds a run of another configuration (sft.steps: 5 -> 7; ppo.kl_coef: 0.1 -> 0.2): "
        "choose another "
        "run.dir, or set run.overwrite=true to delete that run and start over"
    )
    assert tree(finished_folder) == before


def test_tokenised_rows_can_be_cached_outside_the_run_folder(recipe, finished_folder, tmp_path, capsys):
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    folder = Path(shutil.copytree(finished_folder, tmp_path / "run"))
    assert tiny_recipe.run("sft", recipe, f"run.dir={folder}", cache) == 0
    assert "sft: finished already" in capsys.readouterr().err
    check_same_data(RunConfig(dir=str(folder)), dump_config(load_config(recipe, [cache], Recipe)))
    with pytest.raises(ValueError, match="was trained on other data"):
        check_same_data(
            RunConfig(dir=str(folder)), dump_config(load_config(recipe, [cache, "data.held_out=0.3"], Recipe))
        )


def test_overwrite_deletes_the_old_run_and_starts_over(recipe, finished_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(finished_folder, tmp_path / "run"))
    config = (finished_folder / "config.toml").read_text().replace(str(finished_folder), str(folder))
    (folder / "config.toml").write_text(config)
    (folder / "evaluate.json").write_text("{}")
    (folder / "mine.txt").write_text("not of the run")
    options = (f"run.dir={folder}", "sft.steps=1", "run.overwrite=true")
    assert tiny_recipe.run("sft", recipe, *options) == 0
    written = {"config.toml", "base", "sft", "tensorboard", "events.jsonl", "report.html"}
    assert {path.name for path in folder.iterdir()} == written | {"mine.txt"}
    assert {line["step"] for line in records(folder / "sft/metrics.jsonl")} == {0, 1}
    capsys.readouterr()
    # The same command again: nothing differs, so nothing is deleted, with or without the key.
    for again in (options, options[:2]):
        assert tiny_recipe.run("sft", recipe, *again) == 0
        assert "sft: finished already" in capsys.readouterr().err


def test_overwrite_deletes_nothing_if_the_new_sizes_are_rejected(error_line, finished_folder, tmp_path):
    folder = Path(shutil.copytree(finished_folder, tmp_path / "old"))
    before = tree(folder)
    options = (f"run.dir={folder}", "run.overwrite=true", "sft.batch_size=8", "sft.micro_batch_size=3")
    assert error_line(*options).startswith("sft.micro_batch_size=3 does not divide batch_size=8; these do: ")
    assert tree(folder) == before


def test_a_rejected_configuration_can_be_fixed_in_the_same_run_folder(error_line, recipe, tmp_path):
    error_line("sft.batch_size=4096")
    assert (tmp_path / "run/config.toml").exists()
    assert tiny_recipe.run("sft", recipe, f"run.dir={tmp_path / 'run'}", "sft.steps=1") == 0


def test_a_folder_of_other_files_is_not_mistaken_for_a_run(error_line, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    reported = "is not empty and holds no run (no config.toml): choose another run.dir"
    assert reported in error_line(f"run.dir={tmp_path / 'mine'}")
    assert reported in error_line(f"run.dir={tmp_path / 'mine/thesis.tex'}")
    assert (tmp_path / "mine/thesis.tex").read_text() == "x"


def test_an_unwritable_folder_is_reported_in_one_line(error_line, tmp_path):
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'}" in error_line(f"run.dir={tmp_path / 'file' / 'run'}")


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint_is_saved(error_line, tmp_path):
    # The first step has a finite loss and leaves huge weights; only the last step would be logged.
    error = error_line("sft.optim.learning_rate=1e30", "run.log_every=100", "run.save_every=1", command="sft")
    assert error.startswith("sft step 4: 3 optimizer steps in a row were skipped (run.max_skipped), not finite: ")
    assert "; lower the learning rate, or look at these batches" in error
    assert [path.name for path in (tmp_path / "run/sft/checkpoints").iterdir()] == ["1"]
    assert not (tmp_path / "run/sft/export").exists()


def test_another_seed_counts_as_another_run(recipe, finished_folder, tmp_path):
    options = ("run.seed=1", "sft.steps=1", f"run.dir={tmp_path / 'run'}")
    assert tiny_recipe.run("sft", recipe, *options) == 0
    ours, theirs = (tensors(run / "base")["model.embed_tokens.weight"] for run in (tmp_path / "run", finished_folder))
    assert np.abs(ours - theirs).max() > 0.01


# Stages.


@pytest.mark.parametrize(
    ("stages", "reported"),
    [
        ('["sft", "rm"]', "run.stages names rm; the stages are sft, reward, ppo"),
        ('["sft", "sft"]', "run.stages = ['sft', 'sft']: name at least one stage, and each once"),
        ("[]", "run.stages = []: name at least one stage, and each once"),
        ('["sft", "ppo"]', "ppo starts from a scorer, which no stage before it leaves: put reward before ppo"),
        ('["reward", "sft", "ppo"]', "reward starts from a policy, which no stage before it leaves: put sft or ppo"),
    ],
)
def test_stages_in_an_impossible_order_are_rejected_with_the_fix(error_line, stages, reported):
    assert reported in error_line(f"run.stages={stages}")


def test_a_stage_that_the_run_does_not_have_is_rejected_with_the_fix(error_line):
    error = error_line('run.stages=["sft"]', command="reward")
    assert error == "reward is not a stage of this run, run.stages = ['sft']: add it there"


def test_a_separate_reward_model_needs_no_policy_and_can_come_first():
    model = ModelConfig(reward="facebook/opt-350m")
    check_stages(["reward", "sft", "ppo"], model, dict.fromkeys(STAGES) | {"ppo": PPOConfig()})
    assert sources("reward", ["reward", "sft", "ppo"], model, None) == {}
    assert sources("ppo", ["reward", "sft", "ppo"], model, PPOConfig()) == {"policy": "sft", "scorer": "reward"}


def test_a_run_of_an_older_version_has_the_default_stages(recipe, finished_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(finished_folder, tmp_path / "run"))
    tables = tomllib.loads((folder / "config.toml").read_text())
    del tables["run"]["stages"]
    tables["data"]["split"] = "2,4,4"
    (folder / "config.toml").write_text(tomli_w.dumps(tables))
    assert tiny_recipe.run("train", recipe, f"run.dir={folder}") == 0
    assert "ppo: finished already" in capsys.readouterr().err
    # A run with one stage fewer is another run once that stage has started; one more stage is the same run.
    fewer = (f"run.dir={folder}", 'run.stages=["sft", "reward"]', "data.split={sft=2, reward=4, ppo=4}")
    assert tiny_recipe.run("train", recipe, *fewer) == 2
    assert '(run.stages: ["sft", "reward", "ppo"] -> ["sft", "reward"])' in capsys.readouterr().err
    shutil.rmtree(folder / "ppo")
    assert tiny_recipe.run("train", recipe, *fewer) == 0
    assert f"talk to the result: rlhf-jax chat {folder / 'sft/export'}" in capsys.readouterr().err


# Messages.


@pytest.mark.parametrize("before", [True, False])
def test_messages_go_to_stderr_as_text_or_json_or_not_at_all(finished_folder, capsys, before):
    command = ["sft", str(finished_folder.parent / "tiny.toml"), f"run.dir={finished_folder}"]

    def log_lines(*options: str) -> list[str]:
        assert main([*options, *command] if before else [*command, *options]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    plain = log_lines()
    assert plain[0].startswith("devices: ") and plain[1].startswith("sft: finished already")
    assert log_lines("--quiet") == []
    lines = [json.loads(line) for line in log_lines("--json-logs")]
    assert [line["message"] for line in lines] == plain
    assert {tuple(line) for line in lines} == {("time", "level", "logger", "message")}
    assert lines[1]["level"] == "INFO" and lines[1]["logger"] == "rlhf_jax.train"


@pytest.mark.parametrize("options", [["--quiet"], ["--json-logs"]])
def test_an_error_is_reported_in_every_log_format(tmp_path, capsys, options):
    assert main([*options, "train", str(tmp_path / "gone.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    reported = f"rlhf-jax: {tmp_path / 'gone.toml'}: no such file; give the path of a TOML file"
    assert line == reported if options == ["--quiet"] else json.loads(line)["message"] == reported


def test_a_message_is_printed_on_its_own_line_above_the_progress_bar(tmp_path, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    set_logging(Namespace())
    with Metrics(tmp_path, "sft", total_steps=5) as writer:
        writer.advance(1, {})
        logging.getLogger("rlhf_jax").info("a sentence")
        writer.advance(5, {})
    assert "a sentence\n" in screen.getvalue().replace("\r", "\n").splitlines(keepends=True)
    assert "5/5" in screen.getvalue()


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/rlhf_jax/compiled"),
        ({"HOME": "/home/me"}, str(Path.home() / ".cache/rlhf_jax/compiled")),
        ({"XDG_CACHE_HOME": "/caches", "JAX_COMPILATION_CACHE_DIR": "/mine"}, None),
        ({"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "2"}, None),
    ],
)
def test_compiled_programs_are_cached_in_the_users_cache_unless_the_environment_names_a_folder(
    environ, folder, monkeypatch
):
    reported = {}
    monkeypatch.setattr(jax.config, "update", reported.__setitem__)
    set_compile_cache(environ)
    seconds = (
        {}
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" in environ
        else {"jax_persistent_cache_min_compile_time_secs": 0.1}
    )
    assert reported == seconds | ({"jax_compilation_cache_dir": folder} if folder else {})


def test_a_run_caches_its_compiled_programs_for_the_next_unless_the_environment_disables_the_cache(tmp_path):
    script = (
        "import os, jax; from rlhf_jax.cli import set_compile_cache; "
        "set_compile_cache(os.environ); jax.jit(lambda x: x + 1)(2)"
    )
    environ = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environ |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for more, count in (({"JAX_COMPILATION_CACHE_DIR": ""}, 0), ({}, 1)):
        subprocess.run([sys.executable, "-c", script], env=environ | more, check=True)
        assert len(list(tmp_path.glob("rlhf_jax/compiled/jit__lambda*-cache"))) == count


def test_simulated_devices_get_spare_threads_unless_the_user_sets_their_number():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    for given, wanted in (({}, None), (flags, "64"), (flags | {"PJRT_NPROC": "9"}, "9")):
        environ = dict(given)
        set_xla_flags(environ)
        assert environ.get("PJRT_NPROC") == wanted
    script = (
        "import os, jax; from rlhf_jax.cli import set_xla_flags; set_xla_flags(os.environ); jax.devices()\n"
        "tasks = [open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')]\n"
        "print(tasks.count('tf_XLAEigen\\n'))"
    )
    environ = {key: value for key, value in os.environ.items() if key != "PJRT_NPROC"} | flags
    done = subprocess.run([sys.executable, "-c", script], env=environ, check=True, capture_output=True, text=True)
    assert int(done.stdout) == 64, "XLA no longer reads this flag"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="jax 0.12 reports no temporary memory of programs for CPUs")
@pytest.mark.parametrize(("given", "peak"), [("", 3), ("--xla_cpu_enable_concurrency_optimized_scheduler=true", 9)])
def test_programs_on_cpus_run_in_the_order_that_holds_least_unless_the_user_sets_another(given, peak):
    script = (
        "import os, jax, jax.numpy as jnp; from rlhf_jax.cli import set_xla_flags; set_xla_flags(os.environ)\n"
        "def sums(x, ws): return [jnp.sin(jnp.tanh(x @ w) @ x).sum(0) for w in ws]\n"
        "x = jnp.ones((512, 512)); program = jax.jit(sums).lower(x, [x] * 8).compile()\n"
        "print(program.memory_analysis().temp_size_in_bytes)"
    )
    environ = os.environ | {"XLA_FLAGS": given, "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environ, check=True, capture_output=True, text=True)
    assert (peak - 2) * 2**20 < int(done.stdout) <= peak * 2**20  # one matrix is 2**20 bytes, and there are 8 sums


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
@pytest.mark.parametrize("has_plugin", [False, True])
def test_on_cpus_freed_memory_is_used_again_without_new_pages(has_plugin, tmp_path):
    (tmp_path / ("jax_plugins" if has_plugin else "other")).mkdir()  # JAX's plugins for GPUs are in a package like it
    script = (
        "import ctypes, os, resource; from rlhf_jax.cli import keep_freed_memory; keep_freed_memory(os.environ)\n"
        "library = ctypes.CDLL(None); library.malloc.restype = ctypes.c_void_p\n"
        "def use():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    place = ctypes.c_void_p(library.malloc(ctypes.c_size_t(2**26)))\n"
        "    library.memset(place, 1, ctypes.c_size_t(2**26)); library.free(place)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "use(); print(use())"
    )
    environ = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "JAX_PLATFORMS")}
    environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", script], env=environ, check=True, capture_output=True, text=True)
    assert (int(done.stdout) < 10) != has_plugin
