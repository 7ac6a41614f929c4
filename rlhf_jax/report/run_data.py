"""What a report shows of a run, read from its folder as plain values for JSON."""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.config import leaves
from rlhf_jax.report.json_lines import NOT_FINITE, read_objects
from rlhf_jax.scoring import mean_interval, wilson

MAX_VALUES = 60_000  # of all curves of a report; above, curves are thinned
LEAST_VALUES = 200  # that a thinned curve keeps
ANSWER_BYTES = 300_000  # of the answers of evaluate.jsonl, over all runs
METRICS = tomllib.loads(resources.files(__package__).joinpath("metrics.toml").read_text(encoding="utf-8"))["metric"]
Values = Sequence[float | str]


def read_run(folder: Path, share: float) -> dict[str, Any]:
    """One run of a report, without its rollouts; "faults" says what could not be read.

    Args:
        share: of the limits of a report, for this run.
    Raises:
        ValueError: the folder holds no run.
    """
    faults: list[str] = []
    paths = {path.parent.name: path for path in folder.glob("*/metrics.jsonl")}
    if not paths and not (folder / "config.toml").exists():
        raise ValueError(f"{folder} holds no run (no config.toml, no STAGE/metrics.jsonl): give the run.dir of one")
    text, config = _read_config(folder, faults)
    order = config.get("run", {}).get("stages", [])
    names = sorted(paths, key=lambda name: (order.index(name) if name in order else len(order), name))
    series = {name: read_series(paths[name], faults) for name in names}
    events = list(read_objects(folder / "events.jsonl", faults)) if (folder / "events.jsonl").exists() else []
    limits = next((each["limits"] for each in reversed(events) if each.get("limits")), {})
    return {
        "name": folder.absolute().name,
        "config": text,
        "keys": {name: _text(value) for name, value in leaves(config, "")},
        "stages": [
            {
                "name": name,
                "finished": (folder / name / "export").exists(),
                "throughput": throughput(found, limits.get(name)),
                "series": thin(found, _longest(series, share)),
            }
            for name, found in series.items()
        ],
        "events": events,
        "evaluation": read_evaluation(folder, int(ANSWER_BYTES * share), faults),
        "faults": faults,
    }


def read_series(path: Path, faults: list[str]) -> dict[str, tuple[list[int], Values]]:
    """{metric: (steps, values)} of a metrics.jsonl; values that are not finite are "nan", "inf" or "-inf"."""
    found: dict[str, tuple[list[int], list]] = {}
    wrong = 0
    for record in read_objects(path, faults):
        if not isinstance(record.get("step"), int):
            wrong += 1
            continue
        for name, value in record.items():
            if name in ("step", "stage"):
                continue
            if not (isinstance(value, int | float) or value in NOT_FINITE):
                wrong += 1
                continue
            steps, values = found.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    if wrong:
        faults.append(f"{path.parent.name}/metrics.jsonl: {wrong} step(s) or value(s) are no numbers and are left out")
    return found


def _longest(series: Mapping[str, Mapping[str, tuple]], share: float) -> int:
    """How many values a curve may have, so that all together are at most MAX_VALUES."""
    lengths = [len(steps) for found in series.values() for steps, _ in found.values()]
    limit = max(lengths, default=0)
    while sum(min(each, limit) for each in lengths) > MAX_VALUES * share and limit > LEAST_VALUES:
        limit = max(LEAST_VALUES, int(0.9 * limit))
    return limit


def thin(series: Mapping[str, tuple[list[int], Values]], limit: int) -> dict[str, dict[str, Any]]:
    """{metric: {"steps", "values", "of": number of values before}}, each of at most `limit` values or a few more.

    Of each range of steps the least and the greatest value are kept, and the first and last of all.
    """
    found = {}
    for name, (steps, values) in series.items():
        kept = range(len(values))
        if len(values) > limit:
            numbers = np.array([float(value) for value in values])
            parts = np.array_split(np.arange(len(values)), max(1, limit // 2))
            finite = [part[np.isfinite(numbers[part])] for part in parts]
            ends = [(part[numbers[part].argmin()], part[numbers[part].argmax()]) for part in finite if len(part)]
            kept = sorted({0, len(values) - 1, *(int(index) for pair in ends for index in pair)})
        found[name] = {"steps": [steps[i] for i in kept], "values": [values[i] for i in kept], "of": len(values)}
    return found


def throughput(series: Mapping[str, tuple[list[int], Values]], limit: float | None) -> dict[str, Any]:
    """Medians of the steps: seconds, tokens per second and their share of `limit`, seconds of each phase."""
    timed = {name: [each for each in values if isinstance(each, int | float)] for name, (_, values) in series.items()}
    middle = {name: statistics.median(values) for name, values in timed.items() if values}
    rate = middle.get("tokens_per_second")
    return {
        "steps": max((steps[-1] for steps, _ in series.values() if steps), default=0),
        "seconds": middle.get("seconds_step"),
        "total": sum(timed.get("seconds_step", [])) or None,
        "tokens_per_second": rate,
        "limit": limit,
        "share": rate / limit if rate and limit else None,
        "phases": {
            name.removeprefix("seconds_"): value
            for name, value in middle.items()
            if name.startswith("seconds_") and name != "seconds_step"
        },
    }


def read_evaluation(folder: Path, limit: int, faults: list[str]) -> dict[str, Any]:
    """The numbers of evaluate.json with 95% intervals, and answers of evaluate.jsonl up to `limit` bytes."""
    numbers: dict[str, Any] = {}
    if (folder / "evaluate.json").exists():
        try:
            numbers = json.loads((folder / "evaluate.json").read_text(encoding="utf-8"))
            numbers = dict(numbers)
        except (ValueError, TypeError) as error:
            faults.append(f"evaluate.json is damaged and left out: {error}")
            numbers = {}
    answers = folder / "evaluate.jsonl"
    rows = list(read_objects(answers, faults)) if answers.exists() else []
    policies = [name.removesuffix("_answer") for name in (rows[0] if rows else {}) if name.endswith("_answer")]
    kept = first_rows(rows, limit)
    pairs = numbers.pop("reward_pairs", None)
    flat = dict(leaves(numbers, ""))
    intervals = {name.removesuffix("_interval"): flat.pop(name) for name in list(flat) if name.endswith("_interval")}
    return {
        "numbers": flat,
        "intervals": sampling_intervals(rows, policies, numbers) | intervals,
        "pairs": list_pairs(pairs) if isinstance(pairs, dict) else [],
        "policies": policies,
        "rows": kept,
        "of": len(rows),
    }


def sampling_intervals(rows: Sequence[Mapping[str, Any]], policies: Sequence[str], numbers: Mapping[str, Any]) -> dict:
    """{metric: [low, high]}, 95% over the prompts: Wilson's of shares, that of the normal distribution of scores."""
    found = {}
    for policy in policies:
        for name in (f"{policy}_good", f"{policy}_ended"):
            if isinstance(numbers.get(name), int | float):
                found[name] = list(wilson(numbers[name], len(rows)))
        name = f"{policy}_score"
        scores = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        if len(scores) > 1:
            found[name] = list(mean_interval(np.array(scores))[1:])
    return found


def list_pairs(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{"of": which pairs, "pairs", "accuracy", "longer" and their intervals}] of `pair_accuracy`: all, then parts."""
    lengths = [
        each | {"of": f"chosen {each.get('from')} to {each.get('to')} tokens longer"}
        for each in figures.get("by_length", [])
    ]
    sources = [each | {"of": name} for name, each in figures.get("by_source", {}).items()]
    whole = {name: value for name, value in figures.items() if name not in ("by_length", "by_source")}
    return [whole | {"of": "all held-out pairs"}, *lengths, *sources]


def first_rows(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """The first rows whose JSON is at most `limit` bytes together."""
    kept, size = [], 0
    for row in rows:
        size += len(json.dumps(row))
        if size > limit:
            break
        kept.append(row)
    return kept


def _read_config(folder: Path, faults: list[str]) -> tuple[str, dict[str, Any]]:
    path = folder / "config.toml"
    if not path.exists():
        faults.append("config.toml is missing")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        faults.append(f"config.toml is damaged: {error}")
        return text, {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
