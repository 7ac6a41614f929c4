"""Warnings of known failures, from histories written by hand."""

import fnmatch
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_recipe

from rlhf_jax.stages.grpo_config import GRPOConfig
from rlhf_jax.stages.rewards import RewardFunctions
from rlhf_jax.stages.symptoms import LONG, SymptomLog, find_symptoms

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
HEALTHY = {
    "first_ratio_deviation": 1e-6,
    "kl": 5.0,
    "actor_entropy": 1.0,
    "response_length": 100.0,
    "ended_by_eos": 0.9,
    "explained_variance": 0.3,
}
FAILURES = [
    ("first_ratio_deviation", 0.05, 1, 'model.attention="xla"'),
    ("kl", 21.0, LONG, "raise kl_coef"),
    ("actor_entropy", 0.04, LONG, "entropy_coef"),
    ("response_length", 24.0, LONG, "read RUN/"),
    ("ended_by_eos", 0.05, LONG, "missing_eos_penalty"),
    ("explained_variance", -0.1, LONG, "critic_warmup_steps"),
]


def test_a_healthy_run_has_no_symptom():
    assert find_symptoms([HEALTHY] * 30) == {}


@pytest.mark.parametrize(("name", "value", "iterations", "advice"), FAILURES)
def test_a_failure_shows_once_it_has_lasted_and_is_logged_once_with_what_to_try(
    name, value, iterations, advice, caplog
):
    bad = HEALTHY | {name: value}
    assert find_symptoms([HEALTHY] * 3 + [bad] * (iterations - 1)) == {}
    assert list(find_symptoms([HEALTHY] * 3 + [bad] * iterations)) == [name]
    log = SymptomLog("ppo")
    with caplog.at_level(logging.WARNING):
        for step, record in enumerate([HEALTHY] * 3 + [bad] * (iterations + 5), 1):
            log.add(step, record)
    (message,) = caplog.messages
    assert message.startswith(f"ppo {3 + iterations}: {name} = {value:.4g}: ") and advice in message


def test_one_good_iteration_restarts_the_count_and_a_target_replaces_the_limit_of_the_kl():
    bad = HEALTHY | {"kl": 21.0}
    assert find_symptoms([bad] * (LONG - 1) + [HEALTHY] + [bad] * (LONG - 1)) == {}
    assert find_symptoms([bad] * LONG, kl_limit=25.0) == {} != find_symptoms([HEALTHY] * LONG, kl_limit=4.0)


def test_a_judge_that_falls_while_the_score_rises_is_a_symptom_and_one_that_follows_it_is_none():
    rng = np.random.default_rng(0)
    rising, noise = np.linspace(0.0, 1.0, 60), rng.normal(0, 0.02, (2, 60))
    peak = np.where(np.arange(60) < 30, np.arange(60), 60 - np.arange(60)) / 60

    def symptoms(scores, judged, steps=60):
        history = [
            {"score_mean": a, "reward/judge": b} | HEALTHY
            for a, b in zip(scores + noise[0], judged + noise[1], strict=True)
        ]
        return find_symptoms(history[:steps], judges=["reward/judge"])

    ((name, advice),) = symptoms(rising, peak).items()
    assert name == "reward/judge" and "raise kl_coef" in advice
    assert symptoms(rising, peak, steps=35) == {}  # still near its best
    assert symptoms(rising, rising) == symptoms(rising, 0 * rising) == {}
    assert symptoms(-rising, -rising) == symptoms(0 * rising, -rising) == {}  # the score does not rise
    assert find_symptoms([HEALTHY] * 30, judges=["reward/judge"]) == {}
    # A judge that only fluctuates, tested at each of 200 iterations against the best earlier ones.
    rising, noise = np.linspace(0.0, 20.0, 200), rng.normal(0, 1.0, (2, 200))
    assert not any(symptoms(rising, 0 * rising, steps) for steps in range(1, 201))


def test_a_function_of_weight_0_is_a_judge_that_nothing_learns_from():
    config = GRPOConfig(rewards=("a.py:good", "b:short"), reward_weights=(1.0, 0.0))
    assert config.judges == ["reward/short"] and GRPOConfig(rewards=("a.py:good",)).judges == []
    functions = RewardFunctions(config, {}, [], {}, False, None)
    total = functions.total({"a.py:good": np.array([1.0, 2.0]), "b:short": np.array([5.0, -7.0])})
    assert total.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="nothing to learn from, all are 0"):
        GRPOConfig(rewards=("a.py:good",), reward_weights=(0.0,))
    with pytest.raises(ValueError, match='"model" of weight 0 has no effect'):
        GRPOConfig(rewards=("model", "a.py:good"), reward_weights=(0.0, 1.0))


def test_every_metric_of_a_run_is_in_the_table_of_the_documents(tmp_path_factory):
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    unknown, run = set(), tiny_recipe.finished_run(tmp_path_factory)
    for file in run.glob("*/metrics.jsonl"):
        written = {name for record in tiny_recipe.records(file) for name in record} - {"step", "stage"}
        unknown |= {name for name in written if not any(fnmatch.fnmatch(name, pattern) for pattern in names)}
    assert unknown == set()
    assert {"kl", "actor_ratio_deviation", "held_out_*"} <= set(names)
