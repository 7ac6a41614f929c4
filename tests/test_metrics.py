import io
import json
import math
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rlhf_jax import metrics
from rlhf_jax.metrics import Metrics


class Screen(io.StringIO):
    def isatty(self):
        return True


def run(run_dir, stage, steps, *, start_step=0, total_steps=5, value=lambda step: 1 / step):
    with Metrics(run_dir, stage, total_steps=total_steps, start_step=start_step) as writer:
        for step in steps:
            writer.write(step, {"loss": value(step), "tokens": 10 * step})
            writer.advance(step, {"loss": value(step)})


def records(run_dir, stage):
    return [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]


def scalars(run_dir):
    """{(tag, step): [values]} of every event file, read as TensorBoard does: length, crc, event, crc."""
    found = {}
    for path in sorted((run_dir / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


def test_a_record_holds_step_stage_and_values_as_tensorboard_does(tmp_path):
    run(tmp_path, "sft", [1, 2, 4])
    assert records(tmp_path, "sft") == [
        {"step": 1, "stage": "sft", "loss": 1.0, "tokens": 10},
        {"step": 2, "stage": "sft", "loss": 0.5, "tokens": 20},
        {"step": 4, "stage": "sft", "loss": 0.25, "tokens": 40},
    ]
    assert scalars(tmp_path)[("sft/loss", 4)] == [0.25] and scalars(tmp_path)[("sft/tokens", 2)] == [20.0]


def test_jax_and_numpy_scalars_are_written_as_plain_numbers(tmp_path):
    with Metrics(tmp_path, "ppo", total_steps=1) as writer:
        values = {
            "a": jnp.float32(0.5),
            "b": np.float64(0.25),
            "c": np.int32(3),
            "d": jnp.bfloat16(2),
            "e": np.ones(()),
        }
        writer.write(1, values)
        writer.advance(1, values)
    assert records(tmp_path, "ppo") == [{"step": 1, "stage": "ppo", "a": 0.5, "b": 0.25, "c": 3, "d": 2.0, "e": 1.0}]


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with Metrics(tmp_path, "sft", total_steps=2) as writer:
        writer.write(1, {"loss": 1.0})
        assert [record["step"] for record in records(tmp_path, "sft")] == [1]


def test_a_nan_stops_the_run_after_all_metrics_are_recorded(tmp_path):
    with Metrics(tmp_path, "reward", total_steps=9) as writer:
        message = "reward step 7: 'loss' is nan, 'scale' is -inf; lower"
        with pytest.raises(FloatingPointError, match=message):
            writer.write(7, {"loss": jnp.nan, "accuracy": 0.5, "scale": -np.inf})
    line = (tmp_path / "reward" / "metrics.jsonl").read_text()
    assert line == '{"step": 7, "stage": "reward", "loss": "nan", "accuracy": 0.5, "scale": "-inf"}\n'
    assert math.isnan(scalars(tmp_path)[("reward/loss", 7)][0]) and scalars(tmp_path)[("reward/accuracy", 7)] == [0.5]


def test_a_resumed_stage_ends_with_the_files_of_an_uninterrupted_one(tmp_path):
    run(tmp_path / "whole", "sft", [1, 2, 3, 4, 5])
    # Killed in the middle of writing step 4, with the last checkpoint at step 2.
    run(tmp_path / "cut", "sft", [1, 2, 3])
    with (tmp_path / "cut" / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sta')
    run(tmp_path / "cut", "sft", [3, 4, 5], start_step=2)
    whole, cut = (tmp_path / name / "sft" / "metrics.jsonl" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()
    assert scalars(tmp_path / "cut") == scalars(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "cut" / "sft").iterdir()] == ["metrics.jsonl"]


def test_a_stage_that_starts_over_drops_all_its_earlier_records(tmp_path):
    run(tmp_path, "sft", [1, 2, 3])
    run(tmp_path, "sft", [1], value=lambda step: 7.0)
    assert records(tmp_path, "sft") == [{"step": 1, "stage": "sft", "loss": 7.0, "tokens": 10}]
    assert scalars(tmp_path) == {("sft/loss", 1): [7.0], ("sft/tokens", 1): [10.0]}


def test_resuming_one_stage_keeps_the_scalars_of_the_others(tmp_path):
    run(tmp_path, "sft", [1, 2, 3, 4, 5])
    run(tmp_path, "ppo", [1, 2, 3])
    run(tmp_path, "ppo", [2, 3], start_step=1)
    found = scalars(tmp_path)
    assert [step for tag, step in found if tag == "sft/loss"] == [1, 2, 3, 4, 5]
    assert sorted(step for tag, step in found if tag == "ppo/loss") == [1, 2, 3]
    assert all(len(values) == 1 for values in found.values())


def test_a_terminal_shows_a_bar_with_stage_step_and_headline(tmp_path, monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with Metrics(tmp_path, "sft", total_steps=5, start_step=3) as writer:
        writer.advance(4, {"loss": 0.123456})
        writer.advance(5, {"loss": 0.1})
    assert "sft" in screen.getvalue() and "5/5" in screen.getvalue() and "loss=0.1" in screen.getvalue()


def test_progress_in_a_file_is_an_occasional_plain_line(tmp_path, monkeypatch, caplog):
    clock = iter(range(10_000))  # every reading of the clock is one second later
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO", "rlhf_jax"), Metrics(tmp_path, "sft", total_steps=25) as writer:
        for step in range(1, 26):
            writer.advance(step, {"loss": 1 / step})
    lines = caplog.messages
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[1] == "sft 11/25 eta 00:14 loss=0.09091" and not any(re.search(r"\r", line) for line in lines)
