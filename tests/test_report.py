"""`rlhf-jax report`: its numbers against the files of the run, folders that killed runs leave, and its size."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import tiny_recipe

import rlhf_jax.train
from rlhf_jax.cli import main
from rlhf_jax.report import write_report
from rlhf_jax.report.run_data import METRICS
from rlhf_jax.report.sample_rollouts import Known, choose


@pytest.fixture
def finished_folder(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory)


def data_of(path):
    """The values that a report shows."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"))
    return json.loads(text)


def report_of(folder, tmp_path):
    return data_of(write_report([folder], tmp_path / "report.html"))["runs"][0]


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def rollout(step, **fields):
    prompt = fields.pop("prompt", "Why?")
    return {"step": step, "prompt": prompt, "response": "yes", "score": 1.5, "reward": 1.0, "kl": 0.25} | fields


# What a report says of a run.


def test_every_value_of_every_metrics_jsonl_is_in_the_report_that_training_writes(finished_folder):
    run = data_of(finished_folder / "report.html")["runs"][0]
    assert [stage["name"] for stage in run["stages"]] == ["sft", "reward", "ppo"]
    count = 0
    for stage in run["stages"]:
        expected = {}
        for record in tiny_recipe.records(finished_folder / stage["name"] / "metrics.jsonl"):
            for name in record.keys() - {"step", "stage"}:
                expected.setdefault(name, []).append((record["step"], record[name]))
        shown = {name: list(zip(each["steps"], each["values"], strict=True)) for name, each in stage["series"].items()}
        assert shown == expected and stage["finished"]
        count += sum(map(len, expected.values()))
    assert count > 200 and run["faults"] == []


def test_configuration_machine_warnings_and_throughput_are_those_of_the_run(finished_folder):
    run = data_of(finished_folder / "report.html")["runs"][0]
    assert run["config"] == (finished_folder / "config.toml").read_text()
    assert run["keys"]["ppo.actor.learning_rate"] == "0.001"
    start, *warnings, end = run["events"]
    assert start["machine"]["devices"].endswith("x cpu") and start["machine"]["cores"] >= 1
    assert end["event"] == "end" and end["outcome"] == "finished"
    assert [each["event"] for each in warnings] == ["warning"] and "scalar head starts at random" in str(warnings)
    for stage in run["stages"]:
        records = [each for each in tiny_recipe.records(finished_folder / stage["name"] / "metrics.jsonl")]
        timed = [each for each in records if "seconds_step" in each]
        assert stage["throughput"]["seconds"] == np.median([each["seconds_step"] for each in timed])
        assert stage["throughput"]["tokens_per_second"] == np.median([each["tokens_per_second"] for each in timed])
        assert stage["throughput"]["steps"] == 5 and stage["throughput"]["limit"] is None
        if stage["name"] != "ppo":
            assert [each["tokens"] / each["seconds_step"] for each in timed] == pytest.approx(
                [each["tokens_per_second"] for each in timed]
            )


def test_every_metric_of_a_run_is_in_the_table_of_metrics(finished_folder):
    patterns = [re.sub(r"\\\*|[A-Z_]{4,}", ".*", re.escape(name)) for each in METRICS for name in each["names"]]
    names = {
        name for path in finished_folder.glob("*/metrics.jsonl") for row in tiny_recipe.records(path) for name in row
    }
    unknown = [name for name in names - {"step", "stage"} if not any(re.fullmatch(each, name) for each in patterns)]
    assert unknown == []


def test_every_rollout_of_a_small_run_is_in_the_report(finished_folder):
    found = data_of(finished_folder / "report.html")["runs"][0]["rollouts"]
    written = [
        each for path in sorted((finished_folder / "ppo/rollouts").iterdir()) for each in tiny_recipe.records(path)
    ]
    assert found["of"] == len(found["rows"]) == len(written) == 40
    for row, expected in zip(found["rows"], written, strict=True):
        shown = dict(zip(found["fields"], row, strict=True))
        assert found["prompts"][shown["prompt"]] == expected["prompt"]
        assert [shown[name] for name in ("step", "response", "finish_reason", "length")] == [
            expected[name] for name in ("step", "response", "finish_reason", "length")
        ]
        assert [shown["score"], shown["kl"]] == pytest.approx([expected["score"], expected["kl"]], rel=1e-5)


def test_the_evaluation_has_intervals_over_the_prompts(tmp_path):
    rows = [{"prompt": [["user", "a"]], "x_answer": "b", "x_score": score, "x_good": True} for score in (1.0, 2.0, 6.0)]
    write(tmp_path, "evaluate.jsonl", lines(rows))
    numbers = {"prompts": 3, "x_score": 3.0, "x_good": 1.0, "y_win_rate": 0.5, "y_win_rate_interval": [0.2, 0.8]}
    write(tmp_path, "evaluate.json", json.dumps(numbers))
    write(tmp_path, "config.toml", "")
    found = report_of(tmp_path, tmp_path)["evaluation"]
    assert found["rows"] == rows and found["numbers"] == {k: v for k, v in numbers.items() if "interval" not in k}
    # Scores: standard deviation sqrt(7), over sqrt(3). Wilson for 3 of 3: n / (n + z^2) to 1.
    half, z2 = 1.959964 * math.sqrt(7 / 3), 1.959964**2
    assert found["intervals"]["x_score"] == pytest.approx([3 - half, 3 + half])
    assert found["intervals"]["x_good"] == pytest.approx([3 / (3 + z2), 1.0])
    assert found["intervals"]["y_win_rate"] == [0.2, 0.8]


def test_the_accuracy_on_pairs_is_listed_by_length_and_source(tmp_path):
    part = {"pairs": 4, "accuracy": 0.75, "accuracy_interval": [0.3, 0.95]}
    figures = part | {"by_length": [part | {"from": -3, "to": 2}], "by_source": {"a.jsonl": part}}
    write(tmp_path, "evaluate.json", json.dumps({"reward_accuracy": 0.75, "reward_pairs": figures}))
    write(tmp_path, "config.toml", "")
    found = report_of(tmp_path, tmp_path)["evaluation"]
    assert [each["of"] for each in found["pairs"]] == [
        "all held-out pairs",
        "chosen -3 to 2 tokens longer",
        "a.jsonl",
    ]
    assert all(each["accuracy_interval"] == [0.3, 0.95] for each in found["pairs"])
    assert found["numbers"] == {"reward_accuracy": 0.75}


def test_the_share_of_the_limit_is_measured_over_what_the_start_recorded(tmp_path):
    write(tmp_path, "sft/metrics.jsonl", lines([{"step": i, "tokens_per_second": 100.0 * i} for i in (1, 2, 3)]))
    events = [{"event": "start", "limits": {"sft": 800.0}}, {"event": "warning", "message": "w"}]
    write(tmp_path, "events.jsonl", lines(events))
    found = report_of(tmp_path, tmp_path)["stages"][0]["throughput"]
    assert (found["tokens_per_second"], found["limit"], found["share"]) == (200.0, 800.0, 0.25)


def test_several_runs_are_drawn_over_each_other(finished_folder, tmp_path):
    other = tmp_path / "x" / finished_folder.name
    shutil.copytree(finished_folder, other)
    output = tmp_path / "both.html"
    assert main(["report", str(finished_folder), str(other), "--output", str(output)]) == 0
    runs = data_of(output)["runs"]
    assert [run["name"] for run in runs] == [str(finished_folder), str(other)]
    assert runs[0]["stages"] == runs[1]["stages"]


# Texts of models are not to be trusted.


def test_text_of_a_model_cannot_leave_its_place_in_the_page(tmp_path):
    text = "</script><script>alert(1)</script><!-- \u2028 & \ud800 é"
    write(tmp_path, "ppo/rollouts/000001.jsonl", lines([rollout(1, response=text, prompt=text, score=math.nan)]))
    write(tmp_path, "ppo/metrics.jsonl", '{"step": 1, "<b>": 1}\n')
    write(tmp_path, "config.toml", "# </script>\n")
    path = write_report([tmp_path])
    page = path.read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script") == 2 and "alert(1)<" not in page
    run = data_of(path)["runs"][0]
    row = dict(zip(run["rollouts"]["fields"], run["rollouts"]["rows"][0], strict=True))
    assert (row["response"], row["score"]) == (text.replace("\ud800", "\ufffd"), "nan")
    assert not re.search(r"""(src|href)=["'](?!data:,)|@import|url\(""", page.partition('id="data"')[0])
    assert "default-src 'none'" in page


# Folders that a killed run, an older version or a full disk leaves.

PARTS = {
    "a last line that is cut": (
        {"sft/metrics.jsonl": '{"step": 1, "loss": 2.0}\n{"step": 2, "lo'},
        ["sft/metrics.jsonl: the last line is incomplete, as a killed run leaves it, and is left out", "config.toml"],
    ),
    "values that are not finite": (
        {"sft/metrics.jsonl": '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN, "b": -Infinity, "c": "inf"}\n'},
        ["config.toml is missing"],
    ),
    "lines that are no records": (
        {"sft/metrics.jsonl": '[]\n{"step": 1, "loss": 2.0, "x": "many"}\n{"loss": 1}\n\n{"step": "2", "loss": 1}\n'},
        ["1 line(s) are not JSON objects and are left out, first 1", "3 step(s) or value(s) are no numbers"],
    ),
    "bytes that are no text": ({"sft/metrics.jsonl": b'\xff\xfe\n{"step": 1, "loss": 2.0}\n'}, ["first 1"]),
    "a damaged configuration": (
        {"sft/metrics.jsonl": '{"step": 1, "loss": 2.0}\n', "config.toml": "[run"},
        ["config.toml is damaged"],
    ),
    "damaged evaluation, events and rollouts": (
        {
            "sft/metrics.jsonl": '{"step": 1, "loss": 2.0}\n',
            "evaluate.json": "[1]",
            "evaluate.jsonl": "{",
            "events.jsonl": '"start"\n',
            "ppo/rollouts/000001.jsonl": '{"prompt": 1}\n',
        },
        ["evaluate.json is damaged", "evaluate.jsonl: the last line", "events.jsonl: 1 line(s)", "1 without the texts"],
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_partial_run_folder_gives_a_report_that_says_what_is_left_out(tmp_path, name):
    files, faults = PARTS[name]
    for path, text in files.items():
        write(tmp_path, path, "")
        (tmp_path / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    run = report_of(tmp_path, tmp_path)
    loss = run["stages"][0]["series"]["loss"]
    assert (loss["steps"][0], loss["values"][0]) == (1, 2.0)
    for fault in faults:
        assert any(fault in each for each in run["faults"]), run["faults"]
    if name == "values that are not finite":
        values = {key: each["values"] for key, each in run["stages"][0]["series"].items()}
        assert values == {"loss": [2.0, "nan"], "b": ["-inf"], "c": ["inf"]}


def test_a_run_that_has_written_no_step_gives_a_report(tmp_path):
    write(tmp_path, "config.toml", "[run]\nseed = 1\n")
    write(tmp_path, "sft/metrics.jsonl", "")
    run = report_of(tmp_path, tmp_path)
    assert run["stages"][0]["series"] == {} and run["rollouts"]["of"] == 0


@pytest.mark.parametrize("folders", [["nothing"], ["empty"], ["run", "run"], ["run", "./run"]])
def test_what_is_no_run_is_one_line(tmp_path, monkeypatch, capsys, folders):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "run/config.toml", "")
    (tmp_path / "empty").mkdir()
    assert main(["report", *folders]) == 2
    error = capsys.readouterr().err
    expected = "name each run once" if len(folders) > 1 else f"{folders[0]} holds no run (no config.toml, no STAGE/"
    assert expected in error and error.count("\n") == 1


def test_a_report_that_cannot_be_written_does_not_fail_the_training(tmp_path, monkeypatch, capsys):
    def refuse(folders):
        raise OSError("No space left on device")

    monkeypatch.setattr(rlhf_jax.train, "write_report", refuse)
    recipe, folder = tiny_recipe.write_recipe(tmp_path), tmp_path / "run"
    options = (f"run.dir={folder}", "sft.steps=1", "sft.eval_batches=0")
    assert tiny_recipe.run("sft", recipe, *options) == 0
    error = capsys.readouterr().err
    assert f"no report was written: No space left on device; `rlhf-jax report {folder}` writes it" in error
    assert (folder / "sft/export").exists() and not (folder / "report.html").exists()


# Size.


def demo_like(folder, *, rollouts_per_step=128, response="The answer is 7, because 3 and 4 are 7. " * 3):
    """A folder with the numbers of steps and metrics of configs/demo.toml."""
    chance = np.random.default_rng(0)
    for stage, steps, metrics in (("sft", 350, 6), ("reward", 700, 9), ("ppo", 50, 45)):
        rows = [{"step": i + 1} | {f"m{k}": float(chance.normal()) for k in range(metrics)} for i in range(steps)]
        write(folder, f"{stage}/metrics.jsonl", lines(rows))
    for step in range(1, 51):
        numbers = chance.normal(size=(rollouts_per_step, 3)).tolist()
        rows = [
            rollout(step, prompt=f"Question {step % 25}.{i}?", response=response, score=s, kl=k, reward=r)
            for i, (s, k, r) in enumerate(numbers)
        ]
        write(folder, f"ppo/rollouts/{step:06d}.jsonl", lines(rows))


def test_the_report_of_a_run_as_large_as_the_demo_is_smaller_than_3_megabytes(tmp_path):
    demo_like(tmp_path)
    path = write_report([tmp_path])
    run = data_of(path)["runs"][0]
    assert path.stat().st_size < 3_000_000
    assert all(each["of"] == len(each["values"]) for stage in run["stages"] for each in stage["series"].values())
    assert run["rollouts"]["of"] == 6400 and 3000 < len(run["rollouts"]["rows"]) <= 6400


def test_rollouts_that_do_not_fit_are_left_out_by_a_rule_that_keeps_the_extremes(tmp_path):
    # 100 steps of 20 rollouts, of which the third has the best score and prompts repeat after 50 steps.
    known = [
        Known(20 * step + i, "ppo", step, (step % 50) * 20 + i, 10, (float(i == 3), float(i == 5), i))
        for step in range(100)
        for i in range(20)
    ]
    assert choose(known, 20_000) == set(range(2000))
    kept = [known[number] for number in choose(known, 8_000)]
    assert len(kept) == 800
    best = {each.step for each in kept if each.numbers[0] == 1}
    assert best == {each.step for each in kept if each.numbers[1] == 1} == set(range(100))
    apart = {each.prompt for each in kept if each.step < 50} & {each.prompt for each in kept if each.step >= 50}
    assert len(apart) >= 40
    # So few that not every step has one: those kept are spread over the run, after the repeated prompts.
    few = sorted({known[number].step for number in choose(known, 800 + 160)} - set(range(0, 3)) - {50, 51, 52})
    assert len(few) >= 10 and max(np.diff(few)) <= 20


def test_long_curves_keep_their_ends_and_extremes(tmp_path):
    values = np.sin(np.arange(100_000) / 500).tolist()
    values[70_001], values[12_345] = 9.0, -9.0
    write(tmp_path, "sft/metrics.jsonl", lines({"step": i, "loss": value} for i, value in enumerate(values)))
    loss = report_of(tmp_path, tmp_path)["stages"][0]["series"]["loss"]
    assert loss["of"] == 100_000 and 30_000 < len(loss["values"]) <= 60_000
    assert (loss["steps"][0], loss["steps"][-1]) == (0, 99_999) and {9.0, -9.0} < set(loss["values"])
    assert all(values[step] == value for step, value in zip(loss["steps"], loss["values"], strict=True))


def test_a_long_text_keeps_both_ends_with_a_note(tmp_path):
    write(tmp_path, "ppo/rollouts/000001.jsonl", lines([rollout(1, response="a" * 10_000 + "z" * 10_000)]))
    write(tmp_path, "config.toml", "")
    (row,) = report_of(tmp_path, tmp_path)["rollouts"]["rows"]
    assert row[3] == "a" * 3000 + "\n[… 14,000 characters left out …]\n" + "z" * 3000


def test_the_table_of_metrics_names_each_once():
    names = [name for each in METRICS for name in each["names"]]
    assert len(names) == len(set(names)) and all(each["meaning"] and each["stages"] for each in METRICS)
