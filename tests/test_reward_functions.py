"""Python functions as rewards: how they are called, their time limit, and the errors that name them and an example."""

import time

import numpy as np
import pytest

from rlhf_jax.reward_functions import Answered, call_function, load_function
from rlhf_jax.stages.rewards import RewardsConfig

TEXTS = ["four", "7", "ten"]
ANSWERS = [
    Answered(
        (("user", f"q{i}"),), text, True, {"truth": text if i else "4", "prompts": "a column"}, (), f"a.jsonl, row {i}"
    )
    for i, text in enumerate(TEXTS)
]


def scores(function, seconds=0.0, **options):
    return call_function(function, ANSWERS, as_messages=False, seconds=seconds, **options).tolist()


def test_prompts_responses_and_examples_are_given_by_name_and_by_position():
    def by_name(prompts, responses, examples):
        assert prompts == ["q0", "q1", "q2"]
        return [float(text == row["truth"]) for text, row in zip(responses, examples, strict=True)]

    assert scores(by_name) == [0.0, 1.0, 1.0]
    assert scores(lambda questions, texts, rows: by_name(questions, texts, rows)) == [0.0, 1.0, 1.0]
    assert scores(lambda completions, truth, **rest: [float(len(each)) for each in truth]) == [1.0, 1.0, 3.0]
    assert scores(lambda prompts, answers: [len(answer) for answer in answers]) == [4.0, 1.0, 3.0]


def test_an_async_function_is_awaited():
    async def judge(completions):
        import asyncio

        async def one(text):
            await asyncio.sleep(0.01)
            return len(text)

        return await asyncio.gather(*map(one, completions))

    assert scores(judge, seconds=5.0) == [4.0, 1.0, 3.0]


def test_a_function_that_takes_too_long_is_left_at_its_time_limit():
    def sleeps(prompts, completions):
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(ValueError, match="the reward function sleeps: OutOfTime: no scores after 0.2 seconds, .*row 0"):
        scores(sleeps, seconds=0.2)
    assert time.monotonic() - start < 5


def test_errors_name_the_function_its_line_and_the_answer_that_it_fails_on():
    def parses(prompts, completions):
        return [int(text) for text in completions if text != "four"] * 2

    with pytest.raises(
        ValueError, match=r"reward function parses: ValueError: .*'ten' \(test_reward_functions.py, line"
    ):
        scores(parses)
    with pytest.raises(ValueError, match="for the answer to a.jsonl, row 2: 'ten'"):
        scores(parses)

    def short(prompts, completions):
        return [1.0]

    with pytest.raises(ValueError, match="short must return one finite number for each of 3 answers, and returned 1"):
        scores(short)

    def infinite(prompts, completions):
        return [1.0, float("nan"), 2.0]

    with pytest.raises(ValueError, match="infinite must return .* returned nan for the answer to a.jsonl, row 1: '7'"):
        scores(infinite)


def test_a_file_of_functions_may_hold_dataclasses_and_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("BONUS = 2.0\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom neighbour_of_rewards import BONUS\n"
        "@dataclasses.dataclass\nclass Rule:\n    bonus: float = BONUS\n"
        "def reward(prompts, completions):\n    return [Rule().bonus for _ in completions]\n"
    )
    assert scores(load_function(f"{tmp_path / 'mine.py'}:reward")) == [2.0, 2.0, 2.0]


def test_the_rewards_of_a_stage_have_weights_and_name_functions_or_the_model():
    config = RewardsConfig(rewards=("model", "math:fsum"), reward_weights=(0.5, 2.0))
    assert config.weights == {"model": 0.5, "math:fsum": 2.0} and config.functions == ["math:fsum"]
    assert config.model_weight == 0.5 and RewardsConfig(rewards=("math:fsum",)).model_weight is None
    for wrong, message in [
        (dict(rewards=()), "name at least one"),
        (dict(rewards=("a:b", "a:b")), "each once"),
        (dict(rewards=("length",)), 'has "length", which is neither "model" nor FILE.py:FUNCTION'),
        (dict(rewards=("a:b",), reward_weights=(1.0, 2.0)), "one for each of"),
        (dict(reward_seconds=-1.0), "at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            RewardsConfig(**wrong)
    with pytest.raises(ValueError, match="no attribute 'nothing'"):
        RewardsConfig(rewards=("math:nothing",)).check_functions()
    assert np.isfinite(config.reward_seconds)
