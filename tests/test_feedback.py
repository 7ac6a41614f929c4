"""Once round: answers of a server are voted on, the votes train a policy and a reward model, and these are served."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the server: pip install -e '.[serve]'")

import tiny_server  # noqa: E402
from tiny_recipe import records, run  # noqa: E402

from rlhf_jax.serve.votes import open_votes  # noqa: E402

DOCUMENT = Path(__file__).parents[1] / "docs/feedback.md"
QUESTIONS = [f"What is {a} + {b}?" for a in range(1, 5) for b in range(1, 5)]
SMALL = ["model.dtype=float32", "data.max_prompt_length=60", "data.max_length=100", "data.held_out=0.0"]
SMALL += ["dpo.eval_batches=0", "reward.eval_batches=0"]


def request(url, path, body):
    """The JSON of a reply."""
    status, found = tiny_server.ask(url, body, path)
    assert status in (200, 201), found
    return found


def answer(url, model, question, seed):
    """One answer of a model with what a vote says of it."""
    settings = {"model": model, "temperature": 1.0, "top_p": 1.0, "max_tokens": 12, "seed": seed}
    messages = [{"role": "user", "content": question}]
    (choice,) = request(url, "/v1/chat/completions", {"messages": messages, **settings})["choices"]
    return settings | {"text": choice["message"]["content"], "finish_reason": choice["finish_reason"]}


def two_answers(url, question):
    """The first two answers that differ and have text, as random models end some at once."""
    found = {}
    for seed in range(100):
        each = answer(url, "policy", question, seed)
        if each["text"].strip():
            found[each["text"].strip()] = each
        if len(found) == 2:
            return found.values()
    raise AssertionError("no two answers")


def count_e(side):
    return side["text"].count("e")


def test_served_answers_are_voted_on_train_and_are_served_again(tmp_path):
    policy = tiny_server.write_model(tmp_path / "policy")
    judge = tiny_server.write_model(tmp_path / "judge", scalar=True, seed=1)
    votes = open_votes(tmp_path / "votes.jsonl")
    with tiny_server.running([policy], votes=votes) as (url, _):
        for question in QUESTIONS:
            left, right = two_answers(url, question)
            vote = "left" if count_e(left) > count_e(right) else "right"
            body = {"messages": [{"role": "user", "content": question}], "left": left, "right": right, "vote": vote}
            assert request(url, "/votes", body)["row"]["chosen_side"] == vote
    assert len(votes.pairs.lines()) == len(QUESTIONS) == 16

    (text,) = re.findall(r"^```toml\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text.replace("votes.jsonl", str(votes.pairs.path)))
    options = [*SMALL, f"model.actor={policy}", "dpo.optim.learning_rate=3e-3", "dpo.epochs=6"]
    assert run("train", recipe, f"run.dir={tmp_path / 'dpo'}", *options) == 0
    first, *_, last = [each for each in records(tmp_path / "dpo/dpo/metrics.jsonl") if "loss" in each]
    assert first["margin"] == pytest.approx(0, abs=1e-4) and last["margin"] > 0.05 and last["loss"] < first["loss"]

    options = [*SMALL, 'run.stages=["reward"]', f"model.reward={judge}", "reward.batch_size=16", "reward.epochs=6"]
    assert run("train", recipe, f"run.dir={tmp_path / 'judge-run'}", "reward.optim.learning_rate=3e-3", *options) == 0
    losses = [each["loss"] for each in records(tmp_path / "judge-run/reward/metrics.jsonl") if "loss" in each]
    assert losses[-1] < losses[0]

    new, score = tmp_path / "dpo/dpo/export", tmp_path / "judge-run/reward/export"
    with tiny_server.running([f"before={policy}", f"after={new}", f"judge={score}"]) as (url, _):
        before, after = ([answer(url, name, question, 0) for question in QUESTIONS[:4]] for name in ("before", "after"))
        assert [each["text"] for each in before] != [each["text"] for each in after]
        row = json.loads(votes.pairs.lines()[0])
        dialogues = [[*row["prompt"], {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")]
        assert len(request(url, "/v1/score", {"model": "judge", "input": dialogues})["data"]) == 2
