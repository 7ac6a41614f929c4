"""The loop of steps with a state of one number: how it stops, resumes, keeps checkpoints and finds a hung step."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from rlhf_jax.mesh import Layout, single_device_mesh
from rlhf_jax.stages import stopping
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.loop import train_loop
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.run_folder import RunConfig
from rlhf_jax.stages.stopping import StopRun, parse_duration, stop_on_signals


class Numbers:
    """Batches of one number."""

    rows = SimpleNamespace(fingerprint="rows")

    def __getitem__(self, step):
        return {"x": step}


def loop(folder, total=6, at_step=lambda step: None, value=lambda step: 1.0 * step, **run):
    """Steps that multiply the state by 3 and add their number; {} or the record of what they did."""
    settings = RunConfig(dir=str(folder), **{"save_every": 100, **run})
    context = StageContext("sft", None, settings, Layout(single_device_mesh(), {}), ModelConfig(), None, "", {})
    context.folder.mkdir(parents=True, exist_ok=True)

    def step_fn(state, step):
        at_step(step)
        return {"x": 3 * state["x"] + step}, {"loss": value(step)}

    state = {"x": jnp.ones(4, jnp.int32)}
    return int(train_loop(context, total, state, step_fn, batches=Numbers(), headline=("loss",))["x"][0])


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "sft/checkpoints").iterdir())


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "sft/metrics.jsonl").read_text().splitlines()]


def send(number, at):
    return lambda step: os.kill(os.getpid(), number) if step == at else None


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 75, "stopped by SIGTERM; the same command resumes from the last checkpoint"),
        (signal.SIGUSR1, 75, "stopped by SIGUSR1; the same command resumes from the last checkpoint"),
        (signal.SIGINT, 130, "interrupted; the same command resumes from the last checkpoint"),
    ],
)
def test_a_signal_finishes_the_step_saves_it_and_the_same_command_continues(tmp_path, number, code, said):
    whole, stopped, before = tmp_path / "whole", tmp_path / "stopped", signal.getsignal(number)
    with stop_on_signals(), pytest.raises(StopRun, match=said) as stop:
        loop(stopped, at_step=send(number, at=2))
    assert stop.value.code == code and signal.getsignal(number) == before
    assert checkpoints_of(stopped) == ["3"] and steps_of(stopped) == [1, 2, 3]
    assert loop(stopped) == loop(whole) and steps_of(stopped) == steps_of(whole) == [1, 2, 3, 4, 5, 6]


def test_a_signal_in_the_last_step_ends_the_run_before_what_follows_the_loop(tmp_path):
    with stop_on_signals(), pytest.raises(StopRun):
        loop(tmp_path, at_step=send(signal.SIGTERM, at=5))
    assert checkpoints_of(tmp_path) == ["6"]


def test_a_signal_between_loops_stops_at_once():
    with stop_on_signals(), pytest.raises(StopRun, match="stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h50m", 13800), ("90m", 5400), ("1d2h30m15s", 95415), ("20s", 20), ("", float("inf"))]
)
def test_a_duration_is_days_hours_minutes_and_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["3", "3.5h", "h", "50m3h", "-3h", "3h 50m", "0s"])
def test_anything_else_is_no_duration(text):
    with pytest.raises(ValueError, match=r'stop_after: ".*" is no duration: write days, hours'):
        RunConfig(stop_after=text)


def test_a_run_stops_before_its_time_ends_whatever_the_wall_clock_says(tmp_path, monkeypatch):
    """100 s of 120 have passed at step 2, when the clock on the wall jumps back a day."""
    passed, wall = [0.0], time.time
    monkeypatch.setattr(stopping, "STARTED", time.monotonic())
    monkeypatch.setattr(stopping.time, "monotonic", lambda now=time.monotonic: now() + passed[0])

    def advance(step):
        if step == 2:
            passed[0] += 121
            monkeypatch.setattr(time, "time", lambda: wall() - 86400)

    with pytest.raises(StopRun, match=r"run.stop_after: 12\d s have passed; the same command resumes"):
        loop(tmp_path, at_step=advance, stop_after="2m")
    assert checkpoints_of(tmp_path) == ["3"]
    monkeypatch.setattr(stopping, "STARTED", time.monotonic())
    assert loop(tmp_path, stop_after="2m") == loop(tmp_path / "whole")


def test_the_margin_of_a_stop_is_a_step_and_a_save(monkeypatch):
    monkeypatch.setattr(stopping, "STARTED", time.monotonic() - 100)
    assert stopping.stop_request(120, margin=10) is None and stopping.stop_request(120, margin=21) is not None


def test_the_best_checkpoint_is_kept_by_the_metrics_of_its_step(tmp_path):
    loop(tmp_path, value=lambda step: abs(step - 2), save_every=1, keep=1, keep_best="loss")
    assert checkpoints_of(tmp_path) == ["3", "6"]


def test_what_belongs_to_steps_after_the_checkpoint_is_deleted_on_resume(tmp_path):
    with stop_on_signals(), pytest.raises(StopRun):
        loop(tmp_path, at_step=send(signal.SIGTERM, at=3))
    for name in ("rollouts/000003.jsonl", "rollouts/000005.jsonl", "bad_batches/000004.npz", "bad_batches/000007.npz"):
        (tmp_path / "sft" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "sft" / name).write_text("x")
    loop(tmp_path)
    left = sorted(path.name for name in ("rollouts", "bad_batches") for path in (tmp_path / "sft" / name).iterdir())
    assert left == ["000003.jsonl", "000004.npz"]


HANGING = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_loop import loop

    def wait(step):
        time.sleep(60 if step == 8 else 0.01)

    loop(Path(sys.argv[1]), total=10, at_step=wait, **eval(sys.argv[2]))
"""


def run_python(program, *arguments):
    code = textwrap.dedent(program).format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True)


def test_a_hung_step_ends_the_process_with_the_stacks_of_all_threads(tmp_path):
    process = run_python(HANGING, tmp_path, dict(watchdog=5.0, watchdog_floor=1.0, save_every=4))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 70
    (path,) = (tmp_path / "sft").glob("stacks-*.txt")
    (line,) = [line for line in said.splitlines() if "has not ended" in line]
    assert path.name == "stacks-8.txt" and line.endswith(f"stacks are in {path}")
    assert "in wait" in path.read_text() and path.read_text().count("hread 0x") > 1
    assert loop(tmp_path, total=10) == loop(tmp_path / "whole", total=10)


ENDLESS = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_loop import loop
    from rlhf_jax.stages.stopping import stop_on_signals

    def wait(step):
        (Path(sys.argv[1]) / "started").touch()
        while True:
            time.sleep(0.1)

    with stop_on_signals():
        loop(Path(sys.argv[1]), at_step=wait)
"""


def test_a_second_interrupt_ends_at_once(tmp_path):
    with run_python(ENDLESS, tmp_path) as process:
        try:
            while not (tmp_path / "started").exists():
                time.sleep(0.05)
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert "SIGINT: the step is finished and saved, Ctrl-C again ends at once" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=5) == 130
            assert "interrupted twice" in process.stderr.read()
        finally:
            process.kill()
