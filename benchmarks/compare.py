"""The seconds of this package's programs and of the same work by its peers, in turn on one machine, and their ratios.

    python -m benchmarks.compare [SUBJECT/SIZE ...] [--peers NAME ...] [--dtypes DTYPE ...] [--note TEXT]

Short runs find the fastest dtype of each side; in it all sides run one after the other, and again in the reverse order.
Every run is a process of its own that leaves its first iterations out. A ratio is that of the medians over both orders.
All sides get large pages from the C library, as the scripts do.
Writes a row for each peer: where this machine has an NVIDIA GPU, all sides compute on it, and rows are in
benchmarks/results/compare_gpu.json; of a processor with AMX in compare_amx.json, of others that multiply in bfloat16 in
compare.json, and of the rest in compare_float32.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.environments import gpu, run_module
from benchmarks.provenance import RESULTS, record, vector_instructions

OWN = "rlhf_jax"


@dataclass(frozen=True)
class Peer:
    """A program: its environment, its module, whether that takes the subject as an argument, and its dtypes."""

    environment: str
    module: str
    takes_subject: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "mixed")


PEERS = {
    "torch": Peer("trl-1.16.0", "benchmarks.peers.plain_torch"),
    "TRL 1.9.2": Peer("trl-1.9.2", "benchmarks.peers.trl_iterations"),
    "TRL 1.16": Peer("trl-1.16.0", "benchmarks.peers.trl_iterations"),
    "tunix 0.1.7": Peer("tunix-0.1.7", "benchmarks.peers.tunix_grpo", False, ("float32", "bfloat16")),
}


@dataclass(frozen=True)
class Comparison:
    """Work that this package and its peers do.

    Attributes:
        ratios: by peer, the ratio to reach: its seconds over this package's.
        warm_up: iterations before those that are timed, in each of a side's two runs in its fastest dtype.
        iterations: that are timed in both runs together.
        dtypes: of which each side has some, or all.
        dtypes_of: the comparison whose fastest dtypes are taken; "": short runs find them.
        settings: keys of this package's configuration.
    """

    subject: str
    size: str
    ratios: dict[str, float]
    warm_up: int = 2
    iterations: int = 10
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "mixed")
    dtypes_of: str = ""
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.size}"


PPO = {"torch": 1.5, "TRL 1.9.2": 1.8}
COMPARISONS = (
    Comparison("generate", "A", {"torch": 2.0}, dtypes=("float32", "bfloat16")),
    Comparison("train_step", "A", {"torch": 1.15}),
    Comparison("score", "A", {"torch": 1.3}),
    # As its peers, which make no forward pass for the log-probabilities before an update.
    Comparison(
        "grpo_iteration", "qwen3", {"tunix 0.1.7": 2.0, "TRL 1.16": 1.5}, settings=("grpo.old_logprobs=rollout",)
    ),
    Comparison("ppo_iteration", "A", PPO, iterations=6),
    Comparison(
        "ppo_iteration",
        "opt-125m",
        PPO,
        warm_up=1,
        iterations=5,
        dtypes_of="ppo_iteration/A",
        settings=("model.logprob_chunk=32",),  # logits of fewer positions stay in the cache
    ),
)
ON_GPU = (
    Comparison("generate", "opt-1.3b", {"torch": 2.0}, dtypes=("bfloat16",)),
    Comparison("train_step", "opt-1.3b", {"torch": 1.15}, dtypes=("bfloat16", "mixed")),
    Comparison("ppo_iteration", "opt-1.3b", PPO, dtypes=("bfloat16", "mixed")),
)
SHORT = (1, 1)  # iterations of a short run: of warm-up, and timed
Run = Callable[[Comparison, str, str, tuple[int, int]], dict[str, Any]]  # of `run_side`


def run_side(comparison: Comparison, side: str, dtype: str, iterations: tuple[int, int]) -> dict[str, Any]:
    """The JSON line of a side in a process of its own; `iterations`: of warm-up, and timed."""
    subject, size = comparison.subject, comparison.size
    shared = ["--size", size, "--dtype", dtype, "--warm-up", str(iterations[0]), "--iterations", str(iterations[1])]
    if side == OWN:
        command = [sys.executable, "-m", f"benchmarks.{subject}", *shared, *comparison.settings]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": "runs/compiled"}
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    else:
        peer = PEERS[side]
        given = [subject] if peer.takes_subject else []
        lines = run_module(peer.environment, peer.module, *given, *shared, capture=True)
    result = json.loads(lines.splitlines()[-1])
    seconds, memory = result["seconds"], result["peak_bytes"] / 2**30
    print(f"{subject}/{size}: {side}, {dtype}: {seconds:.3f} s, {memory:.1f} GiB", file=sys.stderr, flush=True)
    return result


def short_runs(comparison: Comparison, run: Run) -> dict[str, dict[str, float]]:
    """{side: {dtype: seconds}}, by runs of their own or those recorded of `dtypes_of`.

    Raises:
        ValueError: none are recorded.
    """
    if not comparison.dtypes_of:
        every = {OWN: ("float32", "bfloat16")} | {peer: PEERS[peer].dtypes for peer in comparison.ratios}
        dtypes = {side: [each for each in own if each in comparison.dtypes] for side, own in every.items()}
        return {
            side: {each: run(comparison, side, each, SHORT)["seconds"] for each in own} for side, own in dtypes.items()
        }
    path = RESULTS / f"{file_name()}.json"
    recorded = [each["result"] for each in json.loads(path.read_text())] if path.exists() else []
    rows = {row["peer"]: row for row in recorded if f"{row['subject']}/{row['size']}" == comparison.dtypes_of}
    if missing := comparison.ratios.keys() - rows.keys():
        raise ValueError(f"{', '.join(missing)}: run {comparison.dtypes_of} before {comparison.name}")
    return {OWN: next(iter(rows.values()))["own"]["by_dtype"]} | {
        peer: rows[peer]["other"]["by_dtype"] for peer in comparison.ratios
    }


def compare(comparison: Comparison, run: Run) -> list[dict[str, Any]]:
    """The row of each peer."""
    by_dtype = short_runs(comparison, run)
    fastest = {side: min(seconds, key=seconds.get) for side, seconds in by_dtype.items()}
    second = comparison.iterations // 2
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in fastest}
    for order, count in ((fastest, comparison.iterations - second), (reversed(fastest), second)):
        for side in order:
            runs[side].append(run(comparison, side, fastest[side], (comparison.warm_up, count)))
    sides = {side: summary(each) | {"by_dtype": by_dtype[side]} for side, each in runs.items()}
    own = sides[OWN]
    return [
        {
            "subject": comparison.subject,
            "size": comparison.size,
            "peer": peer,
            "ratio": sides[peer]["seconds"] / own["seconds"],
            "wanted": wanted,
            "memory_ratio": own["peak_bytes"] / sides[peer]["peak_bytes"],
            "settings": list(comparison.settings),
            "own": own,
            "other": sides[peer],
        }
        for peer, wanted in comparison.ratios.items()
    ]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of a side: all timings and their median, the largest peak, and means of all else."""
    timings = [seconds for run in runs for seconds in run["timings"]]
    means = ("tokens_per_second", "flops_share", "bytes_share")
    return {
        "dtype": runs[0]["dtype"],
        "seconds": statistics.median(timings),
        "timings": timings,
        "phases": {phase: statistics.mean(run["phases"][phase] for run in runs) for phase in runs[0]["phases"]},
        **{name: statistics.mean(run[name] for run in runs) for name in means},
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def file_name() -> str:
    """Of the results of this machine, without its suffix."""
    if gpu():
        return "compare_gpu"
    return {"AMX": "compare_amx", "AVX512-BF16": "compare"}.get(vector_instructions(), "compare_float32")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = gpu()
    comparisons = ON_GPU if device else COMPARISONS
    names = [comparison.name for comparison in comparisons]
    parser.add_argument("names", nargs="*", metavar="SUBJECT/SIZE", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="(default: all)")
    parser.add_argument("--note", default="", help="about the machine, such as that other processes shared it")
    parser.add_argument("--iterations", type=int, help="that are timed, in place of the comparison's")
    dtypes = ("float32", "bfloat16")  # which every side has
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help="of all sides, in place of the comparison's")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names):
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as scripts/venv.sh sets it
    for comparison in comparisons:
        ratios = {peer: wanted for peer, wanted in comparison.ratios.items() if peer in args.peers}
        if ratios and comparison.name in (args.names or names):
            given = {name: getattr(args, name) or getattr(comparison, name) for name in ("iterations", "dtypes")}
            for row in compare(dataclasses.replace(comparison, ratios=ratios, **given), run_side):
                record(file_name(), row, "subject", "size", "peer", machine=device, note=args.note)
                print(json.dumps({key: value for key, value in row.items() if key not in ("own", "other")}))


if __name__ == "__main__":
    main()
