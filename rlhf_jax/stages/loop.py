"""The run folder, and the loop that every stage runs in: resume, step, log, evaluate, save."""

from __future__ import annotations

import math
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import differences
from rlhf_jax.data.rows import Rows
from rlhf_jax.metrics import Metrics

State = TypeVar("State")
STAGES = ("sft", "reward", "ppo")
# Of the models, what says how and where they are computed and leaves the results alone but for rounding.
HOW = ("remat", "one_copy", "offload_optimizer", "offload_reference", "offload_ema")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lies and how often it is saved."""

    dir: str = "runs/run"  # the run folder
    seed: int = 0  # of initialisation, data order and sampling; the split of the data does not depend on it
    overwrite: bool = False  # begin anew in a folder that holds a run of another configuration, deleting that run
    save_every: int = 200  # optimizer or PPO steps between checkpoints; one is always saved at the end
    log_every: int = 1  # steps between records of metrics.jsonl

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("dir is empty: name the folder of the run")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: from 0 to {2**32 - 1}")
        if self.save_every < 1 or self.log_every < 1:
            raise ValueError(f"save_every={self.save_every}, log_every={self.log_every}: both at least 1")

    def folder(self, stage: str) -> Path:
        return Path(self.dir) / stage

    def export(self, stage: str) -> Path:
        """The stage's Hugging Face folder; it appears whole, so where it is the stage is finished."""
        return self.folder(stage) / "export"


def open_run(run: RunConfig, merged: str) -> None:
    """Make the run folder and write its config.toml, or check that the one there says the same.

    Args:
        merged: the merged configuration as TOML.
    Raises:
        ValueError: the folder belongs to a run of another configuration and run.overwrite is false.
    """
    folder, path = Path(run.dir), Path(run.dir) / "config.toml"
    if path.exists():
        # A stage that has not begun has nothing to lose: its mended section takes the place of the old one.
        begun = [stage for stage in STAGES if (folder / stage).exists()]
        changed = differences(_description(path.read_text(), begun), _description(merged, begun))
        if changed and begun and not run.overwrite:
            raise ValueError(
                f"{folder} holds a run of another configuration ({'; '.join(changed)}): choose another run.dir, or set "
                "run.overwrite=true to delete that run and begin anew"
            )
        if changed:
            for name in (*STAGES, "base", "tensorboard"):
                if (folder / name).exists():  # what cannot be deleted is an error: a stage would resume from it
                    shutil.rmtree(folder / name)
            for name in ("evaluate.json", "evaluate.jsonl"):
                (folder / name).unlink(missing_ok=True)
    elif folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no run (no config.toml): choose another run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(merged)


def same_data(run: RunConfig, merged: str) -> None:
    """Check that the run was trained on the data of this configuration, so that what is held out was never seen.

    Raises:
        ValueError: it was not.
    """
    path = Path(run.dir) / "config.toml"
    if path.exists():
        before, now = ({"data": _data(tomllib.loads(text))} for text in (path.read_text(), merged))
        if changed := differences(before, now):
            raise ValueError(
                f"{run.dir} was trained on other data ({'; '.join(changed)}), so nobody knows what it has seen of "
                f"these: evaluate it with its own configuration, {path}"
            )


def _description(merged: str, begun: Sequence[str]) -> dict[str, Any]:
    """What of a configuration a run's results depend on: not where it lies, how often it is saved, on what it runs."""
    tables = tomllib.loads(merged)
    for key in ("overwrite", "dir", "save_every", "log_every"):
        tables["run"].pop(key)
    tables["data"] = _data(tables)
    for key in HOW:  # which the run of an older version does not have
        tables["model"].pop(key, None)
    for section in ("mesh", "evaluate", *(stage for stage in STAGES if stage not in begun)):
        tables.pop(section)
    return tables


def _data(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a configuration, but for where their tokens are kept."""
    return {key: value for key, value in tables["data"].items() if key != "cache_dir"}


def say_rows(stage: str, rows: Rows, held_out: Rows | None) -> None:
    """Print what the data gave."""
    print(f"{stage}: training data: {rows.report}; held out: {held_out.report if held_out else 'unused'}", flush=True)


def train_loop(
    run: RunConfig,
    stage: str,
    total_steps: int,
    state: State,
    step_fn: Callable[[State, int], tuple[State, Mapping[str, Any]]],
    *,
    rows: Rows,
    headline: tuple[str, ...],
    evaluate: Callable[[State], Mapping[str, float]] = lambda state: {},
    eval_every: int = 0,
) -> State:
    """Run steps up to `total_steps` from the last checkpoint, or from `state` where there is none.

    Args:
        state: what a checkpoint keeps, a pytree of arrays. They are the loop's own: deleted where a checkpoint
            replaces them.
        step_fn: (state, step counted from 0) -> (state, metrics of the step). It depends on nothing else, so a resumed
            run equals an uninterrupted one.
        rows: what the stage trains on; a run resumes only on the same.
        headline: metrics beside the progress bar.
        evaluate: held-out metrics: before the first step, every `eval_every` steps (0: never) and after the last.
    Raises:
        ValueError: the rows have changed since the checkpoint.
    """

    def measure(step: int) -> None:
        if held_out := evaluate(state):
            metrics.write(step, held_out)
            metrics.say(f"{stage} {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in held_out.items()))

    def log(step: int, stats: Mapping[str, Any]) -> None:
        # What is not finite is always written, which stops the run before a checkpoint can keep it.
        is_wrong = not all(map(math.isfinite, stats.values()))
        if is_wrong or step == total_steps or step % run.log_every == 0:
            metrics.write(step, stats)
        metrics.advance(step, {name: stats[name] for name in headline})

    with Checkpoints(run.folder(stage) / "checkpoints") as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            # Freed before the saved ones come, as the caller may hold them too, and memory may have room for one state.
            jax.tree.map(lambda x: x.delete(), state)
            state, meta = checkpoints.restore(start, abstract)
            if meta["data"] != rows.fingerprint:
                raise ValueError(
                    f"{stage}: the training data is no longer what the first {start} steps saw: bring it back, choose "
                    f"another run.dir, or delete {run.folder(stage)} to begin the stage anew"
                )
        with Metrics(Path(run.dir), stage, total_steps=total_steps, start_step=start) as metrics:
            if start:
                metrics.say(f"{stage}: resumed at step {start} of {total_steps}")
            else:
                measure(0)
            late: tuple[int, Mapping[str, Any]] | None = None
            for step in range(start, total_steps):
                state, stats = step_fn(state, step)
                done = step + 1
                is_last = done == total_steps
                is_measured = is_last or (eval_every > 0 and done % eval_every == 0)
                is_saved = is_last or done % run.save_every == 0
                # A step's metrics are read one step later, so that the host never waits for what it has just started.
                if late:
                    log(*late)
                late = (done, stats)
                if is_measured or is_saved:
                    log(*late)
                    late = None
                if is_measured:
                    measure(done)
                if is_saved:
                    checkpoints.save(done, state, {"data": rows.fingerprint})
    return state
