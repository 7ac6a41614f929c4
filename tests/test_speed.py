"""Benchmarks of speed: the JSON line of every program at tiny size, the work that it states, and ratios by hand."""

import importlib
import json
import math

import pytest

from benchmarks import ceilings, compare, timing

TINY = ["--hidden", "16", "--layers", "1", "--heads", "2", "--kv-heads", "1", "--mlp", "24", "--vocab", "32"]
TINY += ["--prompts", "2", "--prompt", "8", "--answer", "4", "--iterations", "2", "--warm-up", "1"]
PHASES = {
    "publish": ["publish"],
    "generate": ["generate"],
    "score": ["score"],
    "train_step": ["update"],
    "ppo_iteration": ["publish", "generate", "score", "actor", "critic"],
    "grpo_iteration": ["publish", "generate", "reward", "score", "update"],
}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "ROWS", 8)
    monkeypatch.setattr(ceilings, "NUMBERS", 64)


def check_line(result, line, side, subject):
    assert json.loads(line) == result and (result["side"], result["subject"]) == (side, subject)
    assert list(result["phases"]) == PHASES[subject] and len(result["timings"]) == 2
    low, high = sorted(result["timings"])
    assert result["seconds"] == (low + high) / 2 and result["phases"].keys() <= {*PHASES[subject]}
    tokens = result["sizes"]["prompts"] * result["sizes"]["samples"] * 12
    assert math.isclose(result["tokens_per_second"] * result["seconds"], tokens, rel_tol=1e-9)
    found = result["ceilings"]
    share = result["flops"] / result["seconds"] / max(found["float32"], found["bfloat16"])
    assert math.isclose(result["flops_share"], share, rel_tol=1e-9)
    assert math.isclose(result["bytes_share"], result["bytes"] / result["seconds"] / found["memory"], rel_tol=1e-9)
    assert result["peak_bytes"] > 2**20


@pytest.mark.parametrize("subject", PHASES)
def test_a_program_prints_its_phases_tokens_and_shares_of_the_ceilings_in_one_line(subject, capsys):
    result = importlib.import_module(f"benchmarks.{subject}").main(TINY)
    check_line(result, capsys.readouterr().out.splitlines()[-1], "rlhf_jax", subject)


@pytest.mark.parity
@pytest.mark.parametrize("subject", ["generate", "score", "train_step", "ppo_iteration"])
def test_the_same_work_in_torch_prints_the_same_line(subject, capsys):
    from benchmarks.peers import plain_torch

    result = plain_torch.main([subject, *TINY, "--dtype", "mixed"])
    check_line(result, capsys.readouterr().out.splitlines()[-1], "torch", subject)


def test_the_work_of_a_small_model_is_that_of_its_products_by_hand():
    sizes = timing.Sizes("opt", 4, 1, 2, 2, 8, 10, 3, 1, 2, 2)
    # Linears: four of 4 x 4 and two of 4 x 8, 128 weights; attention: 2 products of 4 numbers for half of 4 x 4 pairs.
    forward = 3 * (2 * 128 * 4 + 2 * 40 * 2 + 4 * 4 * 8)
    assert timing.forward_work(sizes, 4, 2, 2) == (forward, 2 * (128 + 40))
    assert timing.update_work(sizes, 2, 2) == (3 * forward, 3 * 2 * 168 + 32 * 168)
    # Decoding makes one token from the prompt and one from the first: it reads the weights twice, and the keys and
    # values of 2 tokens of 3 rows once.
    generate = 3 * (2 * 128 * 3 + 2 * 40 * 2 + 4 * 4 * 9 / 2)
    assert timing.generate_work(sizes, 2) == (generate, 2 * 2 * 168 + 3 * (2 * 4) * 2 * 2)


def test_ratios_are_those_of_medians_over_both_orders_in_the_fastest_dtype():
    seconds = {
        ("rlhf_jax", "float32"): [[4.0, 4.0, 4.0]],
        ("rlhf_jax", "bfloat16"): [[1.0, 3.0, 2.0], [2.0, 2.0, 9.0]],
        ("torch", "float32"): [[6.0, 6.0, 6.0]],
        ("torch", "bfloat16"): [[9.0, 9.0, 9.0]],
        ("torch", "mixed"): [[5.0, 5.0, 5.0], [3.0, 3.0, 5.0]],
    }
    order = []

    def run(comparison, side, dtype):
        order.append((side, dtype))
        timings = seconds[side, dtype].pop(0)
        found = {"dtype": dtype, "seconds": sorted(timings)[1], "timings": timings, "phases": {"all": timings[0]}}
        return found | {"flops_share": 0.5, "bytes_share": 0.25, "peak_bytes": 100 if side == "torch" else 60}

    (row,) = compare.compare(compare.Comparison("score", "A", {"torch": 1.3}), run)
    assert order == [*[("rlhf_jax", "float32"), ("rlhf_jax", "bfloat16")]] + [
        *[("torch", "float32"), ("torch", "bfloat16"), ("torch", "mixed"), ("torch", "mixed"), ("rlhf_jax", "bfloat16")]
    ]
    assert row["own"]["dtype"] == "bfloat16" and row["own"]["timings"] == [1.0, 3.0, 2.0, 2.0, 2.0, 9.0]
    assert (row["own"]["seconds"], row["other"]["seconds"], row["ratio"]) == (2.0, 5.0, 2.5)
    assert row["memory_ratio"] == 0.6 and row["other"]["by_dtype"] == {"float32": 6.0, "bfloat16": 9.0, "mixed": 5.0}
    assert row["own"]["phases"] == {"all": 1.5}
