"""Sends the metrics of a run to experiment trackers: Weights & Biases, MLflow and Trackio, each by one function.

A tracker is imported only when a run asks for it. Accounts, servers and projects are set as each package documents it:
WANDB_PROJECT, WANDB_MODE; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME; TRACKIO_PROJECT, TRACKIO_DIR.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from rlhf_jax.config import leaves

LOGGER = logging.getLogger(__name__)
PROJECT = "rlhf_jax"  # where the environment names none
CLOSE_SECONDS = 60.0  # that the end of a run waits for trackers to take what is left
Numbers = Mapping[str, float]


class Sink(NamedTuple):
    """An open run of a tracker.

    Attributes:
        key: by which the tracker finds the run again.
        where: how a user finds it.
        log: (stage, step, {metric: value}) -> None.
        close: (whether nothing failed) -> None.
    """

    key: str
    where: str
    log: Callable[[str, int, Numbers], None]
    close: Callable[[bool], None]


def open_wandb(folder: Path, key: str, config: Mapping[str, Any]) -> Sink:
    """Weights & Biases: metrics as STAGE/NAME over STAGE/step, because its own step may not start again at 1."""
    import wandb

    key = key or _new_key(folder)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    settings = wandb.Settings(console="off", silent=True)
    options = dict(id=key, name=folder.name, dir=str(folder), resume="allow", settings=settings)
    run = wandb.init(project=project, config=dict(config), **options)
    seen: set[str] = set()

    def log(stage: str, step: int, numbers: Numbers) -> None:
        if stage not in seen:
            seen.add(stage)
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in numbers.items()})

    where = f"wandb sync {Path(run.dir).parent}" if run.offline else run.url
    return Sink(key, where, log, lambda is_good: run.finish(exit_code=1 - is_good))


def open_mlflow(folder: Path, key: str, config: Mapping[str, Any]) -> Sink:
    """MLflow: metrics as STAGE/NAME, in the characters that it allows; the configuration as parameters.

    It records an infinite value as the largest float, so those are sent as NaN.
    """
    from mlflow import MlflowClient, get_tracking_uri
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client, name = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    if key:
        client.update_run(key, status="RUNNING")
    else:
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        key = client.create_run(experiment, run_name=folder.name).info.run_id
        for param, value in leaves(dict(config), ""):
            client.log_batch(key, params=[Param(_mlflow_name(param), str(value))])

    def log(stage: str, step: int, numbers: Numbers) -> None:
        now = int(time.time() * 1000)
        sent = {_mlflow_name(f"{stage}/{name}"): value for name, value in numbers.items()}
        finite = {name: value if math.isfinite(value) else math.nan for name, value in sent.items()}
        client.log_batch(key, metrics=[Metric(name, value, now, step) for name, value in finite.items()])

    where = f"experiment {name} of {get_tracking_uri()}, run {key}"
    return Sink(key, where, log, lambda is_good: client.set_terminated(key, "FINISHED" if is_good else "FAILED"))


def open_trackio(folder: Path, key: str, config: Mapping[str, Any]) -> Sink:
    """Trackio: metrics as STAGE/NAME; it finds a run again by its name."""
    import trackio

    key, project = key or _new_key(folder), os.environ.get("TRACKIO_PROJECT", PROJECT)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints, and stdout belongs to the command
        run = trackio.init(project=project, name=key, config=dict(config), resume="allow", embed=False)

    def close(is_good: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            run.finish()

    def log(stage: str, step: int, numbers: Numbers) -> None:
        run.log({f"{stage}/{name}": value for name, value in numbers.items()}, step=step)

    return Sink(key, f"trackio show --project {project}, run {key}", log, close)


# {package: its function (run folder, key of the run or "" for a new one, configuration) -> Sink}.
TRACKERS = {"wandb": open_wandb, "mlflow": open_mlflow, "trackio": open_trackio}


def check_tracker_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is no tracker."""
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"trackers names {', '.join(unknown)}; the trackers are {', '.join(TRACKERS)}")


def check_packages(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker whose package is missing."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        fix = f"pip install {' '.join(missing)}, or take it out of run.trackers"
        raise ValueError(f"run.trackers asks for {' and '.join(missing)}, not installed here: {fix}")


class Trackers:
    """The trackers that a run asks for, fed by a thread of their own: a slow or absent server delays no step.

    A context manager. RUN/trackers.json keeps the key of each tracker's run, and the stages that it has been sent, so
    that a command that resumes continues the same run there and sends nothing twice. A tracker that fails is reported
    once and gets no more; training goes on, and what it missed of the stage is sent again when the stage resumes.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]):
        self._path = folder / "trackers.json"
        self._sinks: dict[str, Sink] = {}
        text = self._path.read_text(encoding="utf-8") if names and self._path.exists() else "{}"
        try:
            self._state: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self._path} is damaged: delete it, and trackers get this run as a new one") from error
        for name in names:
            state = self._state.setdefault(name, {"key": "", "stages": []})
            try:
                sink = TRACKERS[name](folder, state["key"], config)
            except Exception as error:  # each package has its own; nothing has been trained yet
                fix = "log in or reach its server as its documentation says, or take it out of run.trackers"
                raise ValueError(f"{name} does not start ({_one_line(error)}): {fix}") from error
            LOGGER.info(f"{name}: {sink.where}")
            self._sinks[name], state["key"] = sink, sink.key
        self._lock = threading.Lock()
        self._skip: dict[str, int] = {}  # records of this stage that a tracker has already
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        if self._sinks:
            self._save()
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._sinks:
            # A signal or a stop by time is no failure: the same command continues, here and in the tracker.
            self._queue.put(kind is None or not issubclass(kind, Exception))
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                lost = f"has not taken the last {self._queue.qsize() + 1} record(s)"
                LOGGER.warning(f"{' or '.join(self._sinks)} {lost} within {CLOSE_SECONDS:g} s; metrics.jsonl has all")

    def start_stage(self, stage: str, records: Sequence[Mapping[str, Any]], dropped: int) -> None:
        """Begin a stage, whose `records` of earlier commands are kept, and of which `dropped` will be written again."""
        for name in list(self._sinks):
            with self._lock:
                known = self._state[name]["stages"]
                is_known = stage in known
                known += [] if is_known else [stage]
            self._skip[name] = dropped if is_known else 0
            if records and not is_known:
                self._queue.put((stage, [_split(record) for record in records], [name]))
        self._save()

    def log(self, stage: str, step: int, numbers: Numbers) -> None:
        """Queue the metrics of a step for every tracker that does not have them."""
        wanting = [name for name in list(self._sinks) if not self._skip[name]]
        self._skip = {name: max(0, left - 1) for name, left in self._skip.items()}
        if wanting:
            self._queue.put((stage, [(step, dict(numbers))], wanting))

    def _work(self) -> None:
        while not isinstance(work := self._queue.get(), bool):
            stage, records, wanting = work
            for name, (step, numbers) in itertools.product(wanting, records):
                if name in self._sinks:
                    self._guard(name, stage, lambda sink: sink.log(stage, step, numbers))  # noqa: B023
        for name in list(self._sinks):
            self._guard(name, "", lambda sink: sink.close(work))

    def _guard(self, name: str, stage: str, send: Callable[[Sink], Any]) -> None:
        try:
            send(self._sinks[name])
        except Exception as error:  # whatever a package raises, training goes on
            del self._sinks[name]
            with self._lock:
                self._state[name]["stages"] = [each for each in self._state[name]["stages"] if each != stage]
            self._save()
            missed = f"of {stage} it gets nothing more" if stage else "its run may not be closed"
            LOGGER.warning(f"{name} failed ({_one_line(error)}): {missed}; metrics.jsonl and TensorBoard have all")

    def _save(self) -> None:
        with self._lock:
            if self._state:  # written to another name and then renamed, so that a kill at this moment loses nothing
                unfinished = self._path.with_name(self._path.name + ".unfinished")
                unfinished.write_text(json.dumps(self._state) + "\n", encoding="utf-8")
                unfinished.replace(self._path)


def _split(record: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """(step, {metric: value}) of a record of metrics.jsonl."""
    return record["step"], {name: float(value) for name, value in record.items() if name not in ("step", "stage")}


def _new_key(folder: Path) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', folder.name)}-{secrets.token_hex(4)}"


def _mlflow_name(name: str) -> str:
    """The name with "_" for what MLflow does not allow in one."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
