"""Python functions as rewards: how they are called, their time limit, and the errors that name them and an example."""

import http.server
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.reward_functions import Answered, call_function, load_function
from rlhf_jax.stages.rewards import RewardsConfig

ROOT = Path(__file__).parents[1]
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


class Judge(http.server.BaseHTTPRequestHandler):
    """A server that marks a response by its length, after refusing the first request."""

    requests: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers["Authorization"], body))
        response = re.search(r"<response>\n(.*)\n</response>", body["messages"][0]["content"])[1]
        marks = json.dumps({"helpful": len(response), "correct": 10, "concise": 20})
        said = "no marks" if response == "mute" else f"Here they are: {marks}"
        is_refused = len(self.requests) == 1
        self.send_response(503 if is_refused else 200)
        self.end_headers()
        if not is_refused:
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    def log_message(self, *_):
        pass


def test_the_judge_marks_answers_by_its_rubric_over_http_and_a_mute_one_is_an_error(monkeypatch):
    server = http.server.ThreadingHTTPServer(("localhost", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://localhost:{server.server_port}/v1")
    monkeypatch.setenv("JUDGE_MODEL", "a-judge")
    judge = load_function(str(ROOT / "configs/rewards/judge.py") + ":judge")
    try:
        # 0.5 length / 10 + 0.4 + 0.1, whose mark is cut at 10
        assert scores(judge, seconds=30.0) == pytest.approx([0.7, 0.55, 0.65])
        path, key, body = Judge.requests[-1]
        assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer none", "a-judge") and len(
            Judge.requests
        ) == 4
        mute = [ANSWERS[0], ANSWERS[1]._replace(answer="mute")]
        with pytest.raises(ValueError, match="judge: ValueError: the judge gave no mark for helpful, correct, concise"):
            call_function(judge, mute, as_messages=False, seconds=30.0)
    finally:
        server.shutdown()
        server.server_close()


def test_the_rewards_of_gsm8k_read_the_number_at_the_end():
    is_formatted, is_correct = (
        load_function(f"{ROOT}/configs/rewards/gsm8k.py:{name}") for name in ("is_formatted", "is_correct")
    )
    answers = ["so 3\n#### 3", "#### 1,200", "3", "#### $18.0 ", "#### 3 #### 3", "#### three"]
    assert is_formatted(answers) == [1.0, 1.0, 0.0, 1.0, 0.5, 0.5]
    assert is_correct(answers, ["x\n#### 3", "#### 1200", "#### 3", "#### 18", "#### 3", "#### 3"]) == [
        1,
        1,
        0,
        1,
        1,
        0,
    ]
