"""Trackers: what each is sent, that a resumed run sends nothing twice, and that a failing one costs no training."""

import contextlib
import importlib.util
import json
import math
import sqlite3
import threading
import time

import pytest
import tiny_recipe

from rlhf_jax import trackers
from rlhf_jax.metrics import Metrics
from rlhf_jax.stages.stopping import StopRun
from rlhf_jax.trackers import TRACKERS, Sink, Trackers

CONFIG = {"run": {"seed": 3}, "ppo": {"actor": {"learning_rate": 0.5}}}


class Fake:
    """A tracker of this test: all that it was sent, by key; `fails_at` a step it raises."""

    def __init__(self):
        self.sent, self.closed, self.opened, self.fails_at = [], [], [], None

    def open(self, folder, key, config):
        self.opened.append((key, config))

        def log(stage, step, numbers):
            if self.fails_at == step:
                raise RuntimeError("the server\nis gone")
            self.sent.append((stage, step, numbers))

        return Sink(key or "new-key", "here", log, self.closed.append)


@pytest.fixture
def fake(monkeypatch):
    made = Fake()
    monkeypatch.setitem(TRACKERS, "fake", made.open)
    return made


def train(run_dir, stage, steps, *, start_step=0, names=("fake",)):
    with Trackers(names, run_dir, CONFIG) as found:
        with Metrics(run_dir, stage, total_steps=9, start_step=start_step, trackers=found) as metrics:
            for step in steps:
                metrics.write(step, {"loss": 1 / step})


def test_a_tracker_is_sent_every_record_and_the_configuration(fake, tmp_path):
    with Trackers(["fake"], tmp_path, CONFIG) as found:
        for stage in ("sft", "ppo"):
            with Metrics(tmp_path, stage, total_steps=2, trackers=found) as metrics:
                metrics.write(1, {"loss": 0.5, "rows/a": 3})
                metrics.write(2, {"loss": math.inf}, must_be_finite=False)
    expected = [(1, {"loss": 0.5, "rows/a": 3}), (2, {"loss": math.inf})]
    assert fake.sent == [(stage, *record) for stage in ("sft", "ppo") for record in expected]
    assert (fake.opened, fake.closed) == ([("", CONFIG)], [True])
    assert json.loads((tmp_path / "trackers.json").read_text()) == {
        "fake": {"key": "new-key", "stages": ["sft", "ppo"]}
    }


def test_a_resumed_run_continues_the_same_run_of_the_tracker_and_sends_nothing_twice(fake, tmp_path):
    train(tmp_path, "sft", [1, 2, 3, 4])  # the last checkpoint is at step 2
    train(tmp_path, "sft", [3, 4, 5], start_step=2)
    assert [step for _, step, _ in fake.sent] == [1, 2, 3, 4, 5]
    assert [key for key, _ in fake.opened] == ["", "new-key"]


def test_a_stage_that_starts_over_sends_only_what_is_new(fake, tmp_path):
    train(tmp_path, "sft", [1, 2])
    train(tmp_path, "sft", [1, 2, 3])
    assert [step for _, step, _ in fake.sent] == [1, 2, 3]


def test_a_tracker_that_a_later_command_adds_is_sent_the_records_before_it(fake, tmp_path):
    train(tmp_path, "sft", [1, 2, 3, 4], names=())
    assert not (tmp_path / "trackers.json").exists()
    train(tmp_path, "sft", [3, 4, 5], start_step=2)
    assert [step for _, step, _ in fake.sent] == [1, 2, 3, 4, 5]


def test_a_tracker_that_fails_is_reported_once_and_sent_the_stage_again_when_it_resumes(fake, tmp_path, caplog):
    fake.fails_at = 3
    train(tmp_path, "sft", [1, 2, 3, 4])
    message = (
        "fake failed (RuntimeError: the server is gone): of sft it gets nothing more; metrics.jsonl and TensorBoard"
    )
    assert [message in line for line in caplog.messages if "failed" in line] == [True]
    assert [step for _, step, _ in fake.sent] == [1, 2] and fake.closed == []
    assert [each["step"] for each in tiny_recipe.records(tmp_path / "sft/metrics.jsonl")] == [1, 2, 3, 4]
    fake.fails_at = None
    train(tmp_path, "sft", [3, 4, 5], start_step=2)
    assert [step for _, step, _ in fake.sent] == [1, 2, 1, 2, 3, 4, 5]


def test_a_tracker_that_hangs_delays_no_step_and_the_end_says_what_is_missing(fake, tmp_path, monkeypatch, caplog):
    gone = threading.Event()
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setitem(TRACKERS, "fake", lambda *_: Sink("k", "here", lambda *_: gone.wait(60), lambda good: None))
    train(tmp_path, "sft", [1, 2, 3])
    gone.set()
    # The first was taken from the queue; two others and the end are in it.
    assert "fake has not taken the last 4 record(s) within 0.2 s; metrics.jsonl has all" in caplog.messages


def test_a_run_that_fails_closes_its_trackers_as_failed(fake, tmp_path):
    with pytest.raises(FloatingPointError), Trackers(["fake"], tmp_path, CONFIG) as found:
        with Metrics(tmp_path, "sft", total_steps=2, trackers=found) as metrics:
            metrics.write(1, {"loss": math.nan})
    assert fake.closed == [False]


def test_a_run_that_a_signal_stops_is_not_closed_as_failed(fake, tmp_path):
    with pytest.raises(StopRun), Trackers(["fake"], tmp_path, CONFIG):
        raise StopRun("stopped by SIGTERM", 75)
    assert fake.closed == [True]


def test_unknown_and_missing_trackers_are_refused_with_the_fix_before_training(tmp_path, capsys, monkeypatch):
    recipe = tiny_recipe.write_recipe(tmp_path)
    where = f"run.dir={tmp_path / 'run'}"
    assert tiny_recipe.run("sft", recipe, where, 'run.trackers=["tensorboard"]') == 2
    assert "trackers names tensorboard; the trackers are wandb, mlflow, trackio" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in TRACKERS else find(name, *a))
    assert tiny_recipe.run("sft", recipe, where, 'run.trackers=["wandb", "mlflow"]') == 2
    error = capsys.readouterr().err
    assert "run.trackers asks for wandb and mlflow, not installed here: pip install wandb mlflow, or take" in error
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_refused_in_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setitem(TRACKERS, "fake", fail)
    message = r"^fake does not start \(RuntimeError: api_key not configured \(no-tty\)\): log in or reach its server"
    with pytest.raises(ValueError, match=message):
        Trackers(["fake"], tmp_path, CONFIG)
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(ValueError, match="trackers.json is damaged: delete it"):
        Trackers(["fake"], tmp_path, CONFIG)


# Against the packages, where they are installed: pip install -e '.[trackers]'.


def write_two_stages(folder, name, pause=0.0):
    """A run of three commands, of which the second resumes sft; values that JSON does not hold."""
    folder.mkdir()
    train(folder, "sft", [1, 2, 3], names=[name])
    time.sleep(pause)
    train(folder, "sft", [3, 4], start_step=2, names=[name])
    time.sleep(pause)
    with Trackers([name], folder, CONFIG) as found:
        with Metrics(folder, "ppo", total_steps=2, trackers=found) as metrics:
            metrics.write(1, {"rows/ü?.jsonl": 2, "kl": math.inf, "score_mean": math.nan}, must_be_finite=False)
    return json.loads((folder / "trackers.json").read_text())[name]["key"]


@pytest.mark.filterwarnings("default")
def test_mlflow_holds_the_metrics_and_the_configuration_of_a_resumed_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs pip install -e '.[trackers]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    key, client = write_two_stages(tmp_path / "demo", "mlflow"), mlflow.MlflowClient()
    run = client.get_run(key)
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params == {"run.seed": "3", "ppo.actor.learning_rate": "0.5"}
    history = client.get_metric_history(key, "sft/loss")
    assert [(each.step, each.value) for each in history] == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert run.data.metrics["ppo/rows/__.jsonl"] == 2 and math.isnan(run.data.metrics["ppo/kl"])


@pytest.mark.filterwarnings("default")
def test_trackio_holds_the_metrics_of_a_resumed_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="needs pip install -e '.[trackers]'")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")  # where it was imported before
    key = write_two_stages(tmp_path / "demo", "trackio")
    assert key.startswith("demo-") and capsys.readouterr().out == ""
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio/rlhf_jax.db")) as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    sft = [(key, step, {"sft/loss": 1 / step}) for step in (1, 2, 3, 4)]
    ppo = (key, 1, {"ppo/rows/ü?.jsonl": 2, "ppo/kl": "Infinity", "ppo/score_mean": "NaN"})
    assert [(name, step, json.loads(text)) for name, step, text in rows] == [*sft, ppo]


@pytest.mark.filterwarnings("default")
def test_weights_and_biases_gets_the_metrics_of_a_resumed_run(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb", reason="needs pip install -e '.[trackers]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    key = write_two_stages(tmp_path / "demo", "wandb", pause=1.5)  # offline, W&B names folders by the second
    wandb.teardown()  # as at the end of a process: its service writes what `finish` may have left in its buffers
    files = sorted((tmp_path / "demo/wandb").glob(f"offline-run-*-{key}/*.wandb"))
    assert len(files) == 3 and capsys.readouterr().out == ""
    sent = b"".join(file.read_bytes() for file in files)  # records whose names and JSON values are plain text
    assert sent.count(b"0.3333333333333333") >= 1 and b"ppo/score_mean" in sent and b"learning_rate" in sent
    # Of the second command only step 4 is new.
    assert b"0.25" in files[1].read_bytes() and b"0.3333333333333333" not in files[1].read_bytes()
