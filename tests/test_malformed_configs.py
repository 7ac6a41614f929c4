"""Malformed configurations, made from a good one by chance: each is refused in one line, and starts nothing."""

import copy
import tomllib

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_recipe import RECIPE

from rlhf_jax.cli import main

GOOD = tomllib.loads(RECIPE)
SECTIONS = sorted(GOOD)
NUMBERS = [
    ("run", "save_every"),
    ("run", "keep"),
    ("run", "max_skipped"),
    ("run", "watchdog"),
    ("run", "watchdog_floor"),
    ("sft", "batch_size"),
    ("sft", "steps"),
    ("sft", "micro_batch_size"),
    ("reward", "batch_size"),
    ("ppo", "rollout_batch_size"),
    ("ppo", "batch_size"),
    ("ppo", "ema_decay"),
    ("ppo", "sample", "max_new_tokens"),
    ("ppo", "sample", "temperature"),
    ("sft", "optim", "learning_rate"),
    ("sft", "optim", "beta1"),
    ("model", "new", "hidden_size"),
    ("model", "new", "num_layers"),
    ("model", "loss_scale", "initial"),
    ("mesh", "fsdp"),
    ("mesh", "zero"),
    ("data", "held_out"),
    ("data", "max_length"),
]
TEXTS = [
    ("run", "stop_after"),
    ("run", "stages"),
    ("model", "dtype"),
    ("model", "remat"),
    ("model", "attention"),
    ("model", "frozen_dtype"),
    ("sft", "optim", "schedule"),
    ("data", "sources"),
    ("data", "split"),
    ("mesh", "zero"),
]
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=5, max_size=12).map("zz".__add__)


def put(tables, path, value):
    tables = copy.deepcopy(tables)
    *parents, last = path
    node = tables
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return tables


@st.composite
def bad_text(draw):
    """The text of a configuration with one fault."""
    kind = draw(st.sampled_from(["unknown key", "wrong type", "out of range", "no choice", "missing", "cut", "bytes"]))
    if kind == "unknown key":
        section = draw(st.sampled_from([*SECTIONS, ""]))
        return tomli_w.dumps(put(GOOD, (section, draw(WORDS)) if section else (draw(WORDS),), 1))
    if kind == "wrong type":
        wrong = draw(st.sampled_from(["text", [1, 2], {"x": 1}, True, [[]]]))
        return tomli_w.dumps(put(GOOD, draw(st.sampled_from(NUMBERS)), wrong))
    if kind == "out of range":
        wrong = draw(st.sampled_from([float("nan"), float("-inf"), -3, -0.5, -(2**70)]))
        return tomli_w.dumps(put(GOOD, draw(st.sampled_from(NUMBERS)), wrong))
    if kind == "no choice":
        return tomli_w.dumps(put(GOOD, draw(st.sampled_from(TEXTS)), draw(st.one_of(WORDS, st.integers(50, 99)))))
    if kind == "missing":
        tables = copy.deepcopy(GOOD)
        del tables["data"]["sources"]
        return tomli_w.dumps(tables)
    if kind == "cut":
        return RECIPE[: draw(st.integers(10, 900))].rstrip() + draw(st.sampled_from(["[", " = ", "= {", '"', "\n]"]))
    return RECIPE + "\x00" + draw(st.text(max_size=5))


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(text=bad_text())
def test_a_malformed_configuration_is_refused_in_one_line_and_starts_no_run(tmp_path_factory, capsys_of, text):
    folder = tmp_path_factory.mktemp("malformed")
    recipe, run = folder / "bad.toml", folder / "run"
    recipe.write_text(text, encoding="utf-8")
    assert main(["train", str(recipe), f"run.dir={run}"]) == 2, text
    said = capsys_of().strip().splitlines()
    assert len(said) == 1 and said[0].startswith("rlhf-jax: ") and "Traceback" not in said[0], (said, text)
    assert not run.exists(), text


@pytest.fixture
def capsys_of(capsys):
    return lambda: capsys.readouterr().err
