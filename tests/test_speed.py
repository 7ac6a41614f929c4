"""Benchmarks of speed: the JSON line of every program at tiny size, the work that it states, and ratios by hand."""

import importlib
import json
import math
import types

import pytest

from benchmarks import ceilings, compare, host_time, provenance, timing, train_step
from benchmarks.gpu import decode, table
from benchmarks.peers import environments

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
    share = result["flops"] / result["seconds"] / max(found.get(dtype, 0) for dtype in ("float32", "bfloat16"))
    assert math.isclose(result["flops_share"], share, rel_tol=1e-9)
    assert math.isclose(result["bytes_share"], result["bytes"] / result["seconds"] / found["memory"], rel_tol=1e-9)
    assert result["peak_bytes"] > 2**20


@pytest.mark.parametrize("subject", PHASES)
def test_a_program_prints_its_phases_tokens_and_shares_of_the_ceilings_in_one_line(subject, capsys):
    result = importlib.import_module(f"benchmarks.{subject}").main(TINY)
    check_line(result, capsys.readouterr().out.splitlines()[-1], "rlhf_jax", subject)


def test_a_step_of_adapters_states_its_own_work(capsys):
    result = train_step.main([*TINY, "--dtype", "bfloat16", "model.lora.rank=2", "sft.micro_batch_size=1"])
    forward = timing.forward_work(timing.Sizes(**result["sizes"]), 12, 11, 2)
    assert (result["subject"], result["flops"], result["bytes"]) == (
        "adapter_step",
        2 * forward.flops,
        2 * forward.bytes,
    )


def test_goals_of_a_gpu_are_scaled_by_the_products_that_it_can_do():
    line = {"flops": 1.0e15, "seconds": 2.0, "tokens_per_second": 15_000.0}
    phases = dict.fromkeys(table.PHASES, [9.0, 0.5])
    row = {"subject": "score", "size": "A", "peer": "torch", "ratio": 1.25, "wanted": 1.3}
    parts = {
        "decode": {"runs": [{"batch": 64, "share_of_bandwidth": 0.7}, {"batch": 1, "share_of_bandwidth": 0.5}]},
        "training": {"lines": [line]},
        "training adapters": {"lines": [line]},
        "phases": {"seconds": phases, "tokens": {"rows": 32}},
        "peers": {"lines": [row]},
    }
    # 32 rollouts in 2.5 s; an H100 does 989.4 / 312 times the products of an A100, whose rate is 6.275 a second.
    assert table.goals(parts, "NVIDIA H100 80GB HBM3", 1)[5:] == [
        "| memory bandwidth, decoding 64 answers | 65% | 70% |",
        "| MFU, training all weights | 50% | 51% |",
        "| tokens/s, training adapters of 8B | 12,000 | 15,000 |",
        "| PPO rollouts/s, of those of DeepSpeed-Chat | 2.0 | 0.64 |",
        "| score/A: seconds of torch, of these | 1.30 | 1.25 |",
    ]
    assert len(table.goals(parts, "an unknown card", 1)) == 5 + 2 and len(table.goals({}, "cpu", 1)) == 4


@pytest.mark.parametrize(("part", "more"), [("decode", []), ("phases", []), ("memory", ["350m-lora"])])
def test_the_parts_of_the_gpu_script_run_at_toy_size(part, more, tmp_path):
    importlib.import_module(f"benchmarks.gpu.{part}").main(str(tmp_path / "out.json"), True, *more)
    found = json.loads((tmp_path / "out.json").read_text())
    if part == "decode":
        shares = [run["share_of_bandwidth"] for run in found["runs"]]
        assert len(shares) == len(decode.BATCHES) * len(decode.VARIANTS) and min(shares) > 0
    elif part == "phases":
        assert [*found["seconds"]] == [*table.PHASES] and all(len(each) == 3 for each in found["seconds"].values())
    else:
        assert [*found["phases"]] == [*found["plan"]] == [*table.PHASES]


def test_the_time_between_programs_is_that_of_iterations_in_which_none_executes():
    spans = [host_time.Span(*each) for each in ((0, 10), (20, 30))]
    # Covered: 2 to 6 and 9 to 10 of the first iteration, 20 to 25 of the second.
    busy = [host_time.Span(*each) for each in ((22, 25), (4, 6), (2, 5), (9, 22), (12, 15), (40, 50))]
    assert host_time.idle_time(spans, busy) == 10 - 5 + 10 - 5 and host_time.idle_time(spans, []) == 20


def test_a_trace_of_an_iteration_has_its_programs(monkeypatch):
    monkeypatch.setattr(host_time, "record", lambda *args, **more: None)
    result = host_time.main(TINY)
    assert result["iterations"] == 2 and 0 < result["idle"] < result["seconds"]
    assert math.isclose(result["share"], result["idle"] / result["seconds"], rel_tol=1e-9)


def test_environments_of_peers_have_jax_for_the_driver_of_the_machines_gpu(monkeypatch):
    for driver, wanted in (("", "jax==0.10.2"), ("570.86", "jax[cuda12]==0.10.2"), ("580.95", "jax[cuda13]==0.10.2")):
        monkeypatch.setattr(environments, "gpu", lambda field="name", driver=driver: driver)
        assert environments.packages("tunix-0.1.7")[:2] == ["google-tunix==0.1.7", wanted]
        assert environments.packages("trl-1.9.2") == list(environments.PACKAGES["trl-1.9.2"])


@pytest.mark.parity
@pytest.mark.parametrize("subject", ["generate", "score", "train_step", "ppo_iteration"])
def test_the_same_work_in_torch_prints_the_same_line(subject, capsys):
    from benchmarks.peers import plain_torch

    result = plain_torch.main([subject, *TINY, "--dtype", "mixed"])
    check_line(result, capsys.readouterr().out.splitlines()[-1], "torch", subject)


def test_a_processor_has_a_ceiling_in_bfloat16_and_the_file_of_one_only_where_it_multiplies_in_bfloat16(monkeypatch):
    monkeypatch.setattr(compare, "gpu", lambda: "")
    for flags, name, dtypes, file in (
        ("avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "AMX", {"float32", "bfloat16"}, "compare_amx"),
        ("fma avx2 avx512f avx512_bf16", "AVX512-BF16", {"float32", "bfloat16"}, "compare"),
        ("avx512f avx2", "AVX-512", {"float32"}, "compare_float32"),
        ("fma avx2", "AVX2", {"float32"}, "compare_float32"),
        ("neon", "", {"float32"}, "compare_float32"),
    ):
        text = f"model name\t: A processor\nflags\t\t: {flags}\n"
        monkeypatch.setattr(provenance, "_read_cpuinfo", lambda text=text: text)
        assert provenance.vector_instructions() == name and compare.file_name() == file
        assert provenance.cpu().startswith("A processor, " + name)
        assert ceilings.ceilings(lambda *given: lambda: None, lambda numbers: lambda: None).keys() == {
            *dtypes,
            "memory",
        }


def test_the_settings_of_a_comparison_are_those_of_this_package_alone(monkeypatch):
    commands, line = [], json.dumps({"seconds": 1.0, "peak_bytes": 1})

    def run(command, **more):
        commands.append(command)
        return types.SimpleNamespace(stdout=line)

    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "run_module", lambda *command, capture: commands.append(command) or line)
    comparison = compare.Comparison("ppo_iteration", "A", {"torch": 1.5}, settings=("ppo.micro_batch_size=2",))
    for side in (compare.OWN, "torch"):
        compare.run_side(comparison, side, "float32", (1, 1))
    assert ["ppo.micro_batch_size=2" in command for command in commands] == [True, False]


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


def make_run(seconds, order):
    """The `run` of a comparison, with the timings of each side and dtype in turn; appends the runs to `order`."""

    def run(comparison, side, dtype, iterations):
        order.append((side, dtype, iterations))
        timings = seconds[side, dtype].pop(0)
        found = {"dtype": dtype, "seconds": sorted(timings)[1], "timings": timings, "phases": {"all": timings[0]}}
        found |= {"flops_share": 0.5, "bytes_share": timings[0] / 8, "tokens_per_second": 10.0}
        return found | {"peak_bytes": timings[-1] * (10 if side == "torch" else 6)}

    return run


def test_ratios_are_those_of_medians_over_both_orders_in_the_fastest_dtype_of_each_side():
    seconds = {
        ("rlhf_jax", "float32"): [[4.0, 4.0, 4.0]],
        ("rlhf_jax", "bfloat16"): [[3.0, 3.0, 3.0], [1.0, 3.0, 2.0], [2.0, 2.0, 9.0]],
        ("torch", "float32"): [[6.0, 6.0, 6.0]],
        ("torch", "bfloat16"): [[9.0, 9.0, 9.0]],
        ("torch", "mixed"): [[5.0, 4.0, 5.0], [5.0, 5.0, 5.0], [3.0, 3.0, 6.0]],
    }
    order, comparison = [], compare.Comparison("score", "A", {"torch": 1.3}, iterations=5)
    (row,) = compare.compare(comparison, make_run(seconds, order))
    sides = [("rlhf_jax", "float32"), ("rlhf_jax", "bfloat16"), *[("torch", each) for each in ("float32", "bfloat16")]]
    assert order[:5] == [(*each, (1, 1)) for each in [*sides, ("torch", "mixed")]]
    every = [(sides[1], 3), (("torch", "mixed"), 3), (("torch", "mixed"), 2), (sides[1], 2)]
    assert order[5:] == [(*each, (2, count)) for each, count in every]
    own, other = row["own"], row["other"]
    assert own["dtype"] == "bfloat16" and own["timings"] == [1.0, 3.0, 2.0, 2.0, 2.0, 9.0]
    assert (own["seconds"], other["seconds"], row["ratio"]) == (2.0, 5.0, 2.5)
    assert row["memory_ratio"] == 54 / 60 and other["by_dtype"] == {"float32": 6.0, "bfloat16": 9.0, "mixed": 5.0}
    assert own["phases"] == {"all": 1.5} and own["bytes_share"] == 1.5 / 8


def test_a_comparison_takes_the_fastest_dtypes_that_are_recorded_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    large = compare.Comparison("score", "opt-125m", {"torch": 1.3}, 1, 6, dtypes_of="score/A")
    with pytest.raises(ValueError, match="torch: run score/A before score/opt-125m"):
        compare.compare(large, make_run({}, []))
    by_dtype = {"own": {"by_dtype": {"float32": 1.0, "bfloat16": 2.0}}, "other": {"by_dtype": {"mixed": 1.0}}}
    row = {"subject": "score", "size": "A", "peer": "torch", **by_dtype}
    (tmp_path / f"{compare.file_name()}.json").write_text(json.dumps([{"result": row}]))
    seconds = {("rlhf_jax", "float32"): [[2.0] * 3] * 2, ("torch", "mixed"): [[3.0] * 3] * 2}
    (found,) = compare.compare(large, make_run(seconds, order := []))
    assert found["ratio"] == 1.5 and [each[2] for each in order] == [(1, 3)] * 4
