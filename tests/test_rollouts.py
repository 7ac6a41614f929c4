"""`rlhf-jax rollouts`: filters, orders, text of the terminal, and files that a killed run leaves."""

import json
import math
import os
import subprocess
import sys

import pytest
import tiny_recipe

from rlhf_jax.cli import main
from rlhf_jax.report.rollouts import Filters, parse_steps, select_rollouts, visible


def row(score, response="yes", kl=0.5, **more):
    return {"prompt": "Why?", "response": response, "score": score, "kl": kl, "reward": 1.0, "length": 3} | more


@pytest.fixture
def folder(tmp_path):
    """Two steps of ppo and one of grpo; scores 1, 3, 2, not finite, 5."""
    steps = {
        "ppo/rollouts/000001.jsonl": [row(1.0, finish_reason="eos"), row(3.0, "NO", kl=0.25, finish_reason="length")],
        "ppo/rollouts/000012.jsonl": [row(2.0, "perhaps", length=9), row("nan")],
        "grpo/rollouts/000002.jsonl": [row(5.0, kl=2.0) | {"reward/judge.py:score": 0.5}],
    }
    for name, rows in steps.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def scores(folder, **filters):
    faults = []
    found = [each["score"] for each in select_rollouts(folder, Filters(**filters), faults)]
    assert faults == []
    return found


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [5.0, 1.0, 3.0, 2.0, "nan"]),
        ({"stage": "ppo"}, [1.0, 3.0, 2.0, "nan"]),
        ({"stage": "ppo", "steps": (2, math.inf)}, [2.0, "nan"]),
        ({"search": "no"}, [3.0]),
        ({"search": "WHY", "limit": 2}, [5.0, 1.0]),
        ({"finish": "length"}, [3.0]),
        ({"sort": "score"}, [1.0, 2.0, 3.0, 5.0, "nan"]),
        ({"sort": "-score", "limit": 3}, [5.0, 3.0, 2.0]),
        ({"sort": "kl"}, [3.0, 1.0, 2.0, "nan", 5.0]),
        ({"sort": "-length", "limit": 1}, [2.0]),
        ({"sort": "step"}, [1.0, 3.0, 5.0, 2.0, "nan"]),
    ],
)
def test_filters_and_orders(folder, filters, expected):
    assert scores(folder, **filters) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", (0, math.inf)), ("7", (7, 7)), ("3-9", (3, 9)), ("3-", (3, math.inf)), ("-9", (0, 9))],
)
def test_steps_are_one_or_a_range(text, expected):
    assert parse_steps(text) == expected


def test_every_rollout_of_a_run_is_printed_as_plain_lines_or_as_the_records_of_the_files(capsys, tmp_path_factory):
    run = tiny_recipe.finished_run(tmp_path_factory)
    written = [each for path in sorted((run / "ppo/rollouts").iterdir()) for each in tiny_recipe.records(path)]
    assert main(["rollouts", str(run), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{"stage": "ppo"} | each for each in written]
    assert main(["rollouts", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.count("--- ppo step ") == len(written) == 40 and "\x1b" not in text
    assert f"score {written[0]['score']:.4g}, kl 0, length {written[0]['length']}, reward" in text


def test_characters_that_control_a_terminal_are_printed_as_escapes(folder, capsys):
    path = folder / "ppo/rollouts/000003.jsonl"
    path.write_text(json.dumps(row(0.0, "a\x1b[2Jb\rc\td\u202ee\x9bf\nnext é 漢")) + "\n")
    assert main(["rollouts", str(folder), "--step", "3"]) == 0
    assert ">>> a\\x1b[2Jb\\rc\\td\\u202ee\\x9bf\nnext é 漢" in capsys.readouterr().out
    assert visible("\ud800") == "\\ud800"


def test_what_cannot_be_read_is_left_out_with_a_warning(folder, capsys):
    (folder / "ppo/rollouts/000012.jsonl").write_text(json.dumps(row(2.0)) + "\n" + '{"prompt": "Why?", "resp')
    (folder / "ppo/rollouts/000013.jsonl").write_text('[1]\n{"prompt": "Why?"}\n' + json.dumps(row(math.inf)) + "\n")
    assert main(["rollouts", str(folder), "--stage", "ppo", "--json"]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["score"] for line in printed.out.splitlines()] == [1.0, 3.0, 2.0, "inf"]
    assert printed.err.splitlines() == [
        "ppo/rollouts/000012.jsonl: the last line is incomplete, as a killed run leaves it, and is left out",
        "ppo/rollouts/000013.jsonl: 1 line(s) are not JSON objects and are left out, first 1",
        "rollouts: 1 without the texts of prompt and response are left out",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "sft"], "has no rollouts of sft: those of grpo, ppo"),
        (["--step", "40-"], "passes these filters: leave some out"),
        (["--step", "3x"], '--step "3x": a step, or a range such as 3-9, 3- or -9'),
        (["--sort", "loss"], 'sort "loss": one of score, kl, length, reward, step, or'),
        (["--limit", "-1"], "limit -1: at least 0"),
    ],
)
def test_a_wrong_filter_is_one_line(folder, capsys, options, message):
    assert main(["rollouts", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_without_rollouts_is_one_line(tmp_path, capsys):
    assert main(["rollouts", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"rlhf-jax: {tmp_path} has no rollouts: PPO and GRPO write them while they train\n"
    )


def test_a_reader_that_closes_the_pipe_is_no_error(folder):
    path = folder / "ppo/rollouts/000001.jsonl"
    path.write_text((json.dumps(row(1.0, "x" * 1000)) + "\n") * 2000)  # more than a pipe holds
    command = [sys.executable, "-m", "rlhf_jax", "rollouts", str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    with subprocess.Popen(command, **options) as process:
        assert process.stdout.readline().startswith(b"--- grpo step 2: score 5")
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (0, b"")


def test_a_terminal_gets_colours_and_the_pager(folder, monkeypatch, capsys):
    paged = []
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("pydoc.pager", paged.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["rollouts", str(folder), "--stage", "grpo"]) == 0
    (text,) = paged
    assert text.startswith(
        "\x1b[1m--- grpo step 2: score 5, kl 2, length 3, reward 1, reward/judge.py:score 0.5\x1b[0m\n"
    )
