"""The run folder: where a run lies, and which configuration it belongs to."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.config import differences
from rlhf_jax.data.splits import named_shares

# Of the models, what says how and where they are computed and leaves the results alone but for rounding.
EXECUTION_KEYS = ("remat", "one_copy", "offload_optimizer", "offload_reference", "offload_ema")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lies, its stages, and how often it is saved."""

    dir: str = "runs/run"  # the run folder
    # The stages in their order. Each starts from what the latest stage before it left of what it needs.
    stages: tuple[str, ...] = ("sft", "reward", "ppo")
    seed: int = 0  # seed of initialisation, data order and sampling, but not of the split of the data
    overwrite: bool = False  # start over in a folder that holds a run of another configuration, deleting that run
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
        old, new = tomllib.loads(path.read_text()), tomllib.loads(merged)
        names = list(dict.fromkeys([*_stages(old), *_stages(new)]))
        # A stage that has not begun has nothing to lose: its corrected section takes the place of the old one.
        begun = [name for name in names if (folder / name).exists()]
        changed = differences(_result_settings(old, begun), _result_settings(new, begun))
        if changed and begun and not run.overwrite:
            raise ValueError(
                f"{folder} holds a run of another configuration ({'; '.join(changed)}): choose another run.dir, or set "
                "run.overwrite=true to delete that run and begin anew"
            )
        if changed:
            for name in (*names, "base", "tensorboard"):
                if (folder / name).exists():  # what cannot be deleted is an error: a stage would resume from it
                    shutil.rmtree(folder / name)
            for name in ("evaluate.json", "evaluate.jsonl"):
                (folder / name).unlink(missing_ok=True)
    elif folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no run (no config.toml): choose another run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(merged)


def check_same_data(run: RunConfig, merged: str) -> None:
    """Check that the run was trained on the data of this configuration, so that what is held out was never seen.

    Raises:
        ValueError: it was not.
    """
    path = Path(run.dir) / "config.toml"
    if path.exists():
        before, now = ({"data": _data(tomllib.loads(text))} for text in (path.read_text(), merged))
        if changed := differences(before, now):
            raise ValueError(
                f"{run.dir} was trained on other data ({'; '.join(changed)}), so it may have seen what these hold out: "
                f"evaluate it with its own configuration, {path}"
            )


def _stages(tables: Mapping[str, Any]) -> list[str]:
    return tables["run"].get("stages", list(RunConfig.stages))


def _result_settings(tables: Mapping[str, Any], begun: Sequence[str]) -> dict[str, Any]:
    """What of a configuration the results of the stages that have begun depend on.

    Not where the run lies, how often it is saved, what it runs on, or which stages come later.
    """
    names = _stages(tables)
    last = max((names.index(name) for name in begun if name in names), default=-1)
    return {
        "run": {"seed": tables["run"]["seed"], "stages": names[: last + 1]},
        "model": {key: value for key, value in tables["model"].items() if key not in EXECUTION_KEYS},
        "data": _data(tables),
        **{name: tables[name] for name in begun if name in tables},
    }


def _data(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a configuration, but for where their tokens are kept."""
    split = tables["data"]["split"]
    if isinstance(split, str):  # as older versions wrote it
        split = named_shares(split, RunConfig.stages, {})
    return {key: value for key, value in tables["data"].items() if key != "cache_dir"} | {"split": split}
