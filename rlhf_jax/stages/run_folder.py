"""The run folder, and the configuration that it belongs to."""

from __future__ import annotations

import logging
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.config import differences, with_defaults
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.splits import named_shares
from rlhf_jax.stages.stopping import parse_duration
from rlhf_jax.trackers import check_tracker_names

LOGGER = logging.getLogger(__name__)
# Settings of how and where models are computed, which change results by rounding only.
EXECUTION_KEYS = ("remat", "one_copy", "offload_optimizer", "offload_reference", "offload_ema")


@dataclass(frozen=True)
class RunConfig:
    """The folder of a run, its stages, and how often it is saved."""

    dir: str = "runs/run"  # the run folder
    # The stages in order. Each starts from the latest exports before it of the kinds that it needs.
    stages: tuple[str, ...] = ("sft", "reward", "ppo")
    seed: int = 0  # seed of initialisation, data order and sampling, but not of the split of the data
    overwrite: bool = False  # start over in a folder that holds a run of another configuration, deleting that run
    save_every: int = 200  # optimizer or PPO steps between checkpoints; one is always saved at the end
    keep: int = 2  # newest checkpoints of a stage that are kept
    # Metric by which the best checkpoint is kept too, in the stages that have it, among the checkpoints whose step was
    # measured: "held_out_loss" keeps the least, "-score_mean" the greatest; "": the newest alone are kept
    keep_best: str = ""
    log_every: int = 1  # steps between records of metrics.jsonl
    # Experiment trackers that get the metrics too, next to TensorBoard: "wandb", "mlflow", "trackio", where installed
    trackers: tuple[str, ...] = ()
    # Optimizer steps in a row whose loss or gradient is not finite, after which the run stops. Each is skipped: it
    # changes nothing. float16: those at the smallest loss scale count.
    max_skipped: int = 3
    # Time from the start of the command after which it saves and ends with exit code 75, such as "3h50m" for a job of
    # four hours; "": none. The command run again continues.
    stop_after: str = ""
    watchdog: float = 20.0  # times the usual time of a step after which it counts as hung, which ends the run; 0: never
    watchdog_floor: float = 900.0  # seconds below which no step counts as hung

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("dir is empty: name the folder of the run")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: from 0 to {2**32 - 1}")
        check_tracker_names(self.trackers)
        counts = {name: getattr(self, name) for name in ("save_every", "log_every", "keep", "max_skipped")}
        if min(counts.values()) < 1:
            raise ValueError(", ".join(f"{name}={value}" for name, value in counts.items()) + ": all at least 1")
        if (self.watchdog and not self.watchdog > 1) or not 0 < self.watchdog_floor < float("inf"):
            raise ValueError(
                f"watchdog={self.watchdog:g}, watchdog_floor={self.watchdog_floor:g}: a factor above 1, or 0 for no "
                "watchdog, and a positive number of seconds"
            )
        try:
            parse_duration(self.stop_after)
        except ValueError as error:
            raise ValueError(f"stop_after: {error}") from error

    def folder(self, stage: str) -> Path:
        return Path(self.dir) / stage

    def export(self, stage: str) -> Path:
        """The stage's Hugging Face folder; it appears complete, so if it exists the stage is finished."""
        return self.folder(stage) / "export"


def open_run(run: RunConfig, merged: str, schema: type) -> None:
    """Create the run folder and write its config.toml, or check that the existing one is the same.

    A key that the existing one lacks has its default: an older version wrote it. The learning rates of a stage that has
    begun and is not finished may change, since a lower one is the usual way on from steps that are not finite.

    Args:
        merged: the merged configuration as TOML, of a `schema`.
    Raises:
        ValueError: the folder belongs to a run of another configuration and run.overwrite is false.
    """
    folder, path = Path(run.dir), Path(run.dir) / "config.toml"
    if (old := _read_settings(folder)) is not None:
        old, new = with_defaults(schema, old), tomllib.loads(merged)
        names = list(dict.fromkeys([*_stages(old), *_stages(new)]))
        # A stage that has not begun has nothing to lose: its corrected section replaces the old one.
        begun = [name for name in names if (folder / name).exists()]
        changed = differences(_result_settings(old, begun), _result_settings(new, begun))
        rates = [text for text in changed if _is_open_rate(run, text.partition(":")[0])]
        if rates == changed and not run.overwrite:
            changed = []
            for text in rates:
                LOGGER.warning(f"the run goes on with another learning rate, {text}")
        if changed and begun and not run.overwrite:
            fix = "choose another run.dir, or set run.overwrite=true to delete that run and start over"
            raise ValueError(f"{folder} holds a run of another configuration ({'; '.join(changed)}): {fix}")
        if changed:
            for name in (*names, "base", "tensorboard"):
                if (folder / name).exists():  # a failure to delete is an error: a stage would resume from the rest
                    shutil.rmtree(folder / name)
            for name in ("evaluate.json", "evaluate.jsonl", "events.jsonl", "trackers.json", "report.html"):
                (folder / name).unlink(missing_ok=True)
    elif folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no run (no config.toml): choose another run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    # Written to another name and then renamed, so that a kill or a full disk at this moment loses nothing.
    unfinished = path.with_name("config.toml.unfinished")
    unfinished.write_text(merged)
    unfinished.replace(path)


def _is_open_rate(run: RunConfig, key: str) -> bool:
    """Whether a dotted key is a learning rate of a stage that is not finished."""
    stage, *_, name = key.split(".")
    return name == "learning_rate" and not run.export(stage).exists()


def run_date(folder: str | Path) -> str:
    """`data.date` of the run in this folder; "" where there is no run, or one whose template writes no date."""
    return (_read_settings(Path(folder)) or {}).get("data", {}).get("date", "")


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """config.toml of a run folder; None where there is none. ValueError for a damaged one."""
    path = folder / "config.toml"
    if not path.exists():
        return None
    try:
        tables = tomllib.loads(path.read_text())
        missing = sorted({"run", "model", "data"} - tables.keys())
    except ValueError as error:
        missing, tables = [str(error)], {}
    if missing:
        fix = "restore it, or delete the folder to start over"
        raise ValueError(f"{path}, the configuration of this run, is damaged ({', '.join(missing)}): {fix}")
    return tables


def date_of_export(folder: Path | None) -> str:
    """`data.date` of the run in whose RUN/STAGE/export this folder is; "" where it belongs to no run."""
    return "" if folder is None else run_date(folder.absolute().parent.parent)


def check_same_data(run: RunConfig, merged: str) -> None:
    """Check that the run was trained on the data of this configuration, so that held-out rows were never trained on.

    Raises:
        ValueError: it was not.
    """
    path = Path(run.dir) / "config.toml"
    if path.exists():
        found = (tomllib.loads(text) for text in (path.read_text(), merged))
        before, now = ({"data": _data({"data": with_defaults(DataConfig, each["data"])})} for each in found)
        if changed := differences(before, now):
            other = f"other data ({'; '.join(changed)}), so it may have trained on held-out rows"
            raise ValueError(f"{run.dir} was trained on {other}: evaluate it with its own configuration, {path}")


def _stages(tables: Mapping[str, Any]) -> list[str]:
    return tables["run"].get("stages", list(RunConfig.stages))


def _result_settings(tables: Mapping[str, Any], begun: Sequence[str]) -> dict[str, Any]:
    """The settings that the results of the stages that have begun depend on.

    Without the folder of the run, save interval, hardware, and stages that come later.
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
    """The data settings of a configuration, except for the folder that caches tokens."""
    split = tables["data"]["split"]
    if isinstance(split, str):  # the notation of older versions
        split = named_shares(split, RunConfig.stages, {})
    return {key: value for key, value in tables["data"].items() if key != "cache_dir"} | {"split": split}
