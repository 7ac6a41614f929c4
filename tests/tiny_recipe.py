"""Whole runs of a few steps through the command line, in the same process."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers  # noqa: F401 - in a test its handler of messages would keep a stderr that is closed afterwards
from safetensors.numpy import load_file

import rlhf_jax.mesh
import rlhf_jax.stages
from rlhf_jax.cli import main
from rlhf_jax.config import dump_config, load_config
from rlhf_jax.mesh import make_mesh
from rlhf_jax.recipe import Recipe

RECIPE = """
[run]
save_every = 2
[model]
actor = "new"
dtype = "float32"
remat = "none"
logprob_chunk = 0
[model.new]
vocab_size = 300
hidden_size = 16
num_layers = 2
num_heads = 2
num_kv_heads = 2
mlp_size = 32
max_positions = 160
[data]
sources = [{ path = "builtin:assistant", answer = "answer" }]
builtin_rows = 260
held_out = 0.15
max_prompt_length = 120
max_length = 144
[sft]
steps = 5
batch_size = 8
eval_every = 2
eval_batches = 1
optim = { learning_rate = 3e-3 }
[reward]
steps = 5
batch_size = 8
eval_batches = 1
optim = { learning_rate = 1e-3 }
[ppo]
steps = 5
rollout_batch_size = 8
batch_size = 8
sample = { max_new_tokens = 12 }
actor = { learning_rate = 1e-3 }
critic = { learning_rate = 1e-3 }
[evaluate]
prompts = 8
pairs = 12
batch_size = 8
show = 2
sample = { max_new_tokens = 12 }
"""
_finished: list[Path] = []


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run(command: str, recipe: Path, *overrides: str, devices: int = 1) -> int:
    """The exit code of `rlhf-jax COMMAND RECIPE OVERRIDES` on a machine with `devices` devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf_jax.mesh, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
        return main([command, str(recipe), *overrides])


def finished_run(factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run, next to its recipe; made once and only read."""
    if not _finished:
        folder = factory.mktemp("finished")
        assert run("train", write_recipe(folder), f"run.dir={folder / 'run'}") == 0
        _finished.append(folder / "run")
    return _finished[0]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def untimed_records(path: Path) -> list[dict]:
    """Records of a metrics.jsonl without the measured times."""
    return [
        {name: value for name, value in record.items() if not name.startswith(("seconds_", "tokens_per_second"))}
        for record in records(path)
    ]


def tensors(export: Path) -> dict[str, np.ndarray]:
    return load_file(export / "model.safetensors")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (bytes, time of the last change)} of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start_before_ppo(folder, finished_folder, *overrides):
    """A run folder with these settings and the SFT and reward stages of the finished run."""
    for stage in ("sft", "reward"):
        shutil.copytree(finished_folder / stage / "export", folder / stage / "export")
    options = [*overrides, f"run.dir={folder}"]
    (folder / "config.toml").write_text(dump_config(load_config(finished_folder.parent / "tiny.toml", options, Recipe)))
    return ["ppo", finished_folder.parent / "tiny.toml", *options]


def interrupt_stage(patch: pytest.MonkeyPatch, stage: str, at: int) -> None:
    """Simulates Ctrl-C in the middle of step `at` (counted from 0) of the stage, when its state has been donated."""
    module = getattr(rlhf_jax.stages, stage if stage == "ppo" else "supervised")
    loop = module.train_loop

    def interrupted_loop(context, total, state, step_fn, **options):
        def stop(state, step):
            result = step_fn(state, step)
            if step == at and context.name == stage:
                raise KeyboardInterrupt
            return result

        return loop(context, total, state, stop, **options)

    patch.setattr(module, "train_loop", interrupted_loop)
