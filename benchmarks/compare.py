"""The seconds of this package's programs and of the same work by its peers, in turn on one machine, and their ratios.

    python -m benchmarks.compare [SUBJECT/SIZE ...] [--note TEXT]

Every side runs in each of its dtypes, then each once more in its fastest dtype and in the reverse order; every run is a
process of its own that leaves its first iterations out. A ratio is that of the medians over both orders. Writes a row
of benchmarks/results/compare.json for each peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.environments import run_module
from benchmarks.provenance import record

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
        warm_up, iterations: of each run, of which every side has two in its fastest dtype.
    """

    subject: str
    size: str
    ratios: dict[str, float]
    warm_up: int = 2
    iterations: int = 5

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.size}"


COMPARISONS = (
    Comparison("ppo_iteration", "A", {"torch": 1.5, "TRL 1.9.2": 1.8}),
    Comparison("ppo_iteration", "opt-125m", {"torch": 1.5, "TRL 1.9.2": 1.8}, warm_up=1, iterations=3),
    Comparison("grpo_iteration", "qwen3", {"tunix 0.1.7": 2.0, "TRL 1.16": 1.5}),
    Comparison("generate", "A", {"torch": 2.0}),
    Comparison("train_step", "A", {"torch": 1.15}),
    Comparison("score", "A", {"torch": 1.3}),
)
Run = Callable[[Comparison, str, str], dict[str, Any]]  # (comparison, side, dtype) -> the JSON line


def run_side(comparison: Comparison, side: str, dtype: str) -> dict[str, Any]:
    """Run a side in a process of its own."""
    shared = ["--size", comparison.size, "--dtype", dtype]
    shared += ["--warm-up", str(comparison.warm_up), "--iterations", str(comparison.iterations)]
    if side == OWN:
        command = [sys.executable, "-m", f"benchmarks.{comparison.subject}", *shared]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": "runs/compiled"}
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    else:
        peer = PEERS[side]
        given = [comparison.subject] if peer.takes_subject else []
        lines = run_module(peer.environment, peer.module, *given, *shared, capture=True)
    result = json.loads(lines.splitlines()[-1])
    seconds, memory = result["seconds"], result["peak_bytes"] / 2**30
    print(f"{comparison.name}: {side}, {dtype}: {seconds:.3f} s, {memory:.1f} GiB", file=sys.stderr, flush=True)
    return result


def compare(comparison: Comparison, run: Run) -> list[dict[str, Any]]:
    """The row of each peer."""
    dtypes = {OWN: ("float32", "bfloat16")} | {peer: PEERS[peer].dtypes for peer in comparison.ratios}
    first = {side: {dtype: run(comparison, side, dtype) for dtype in own} for side, own in dtypes.items()}
    fastest = {
        side: min(found, key=lambda dtype, found=found: found[dtype]["seconds"]) for side, found in first.items()
    }
    again = {side: run(comparison, side, fastest[side]) for side in reversed(dtypes)}
    sides = {side: summary(first[side], again[side]) for side in dtypes}
    own = sides[OWN]
    return [
        {
            "subject": comparison.subject,
            "size": comparison.size,
            "peer": peer,
            "ratio": sides[peer]["seconds"] / own["seconds"],
            "wanted": wanted,
            "memory_ratio": own["peak_bytes"] / sides[peer]["peak_bytes"],
            "own": own,
            "other": sides[peer],
        }
        for peer, wanted in comparison.ratios.items()
    ]


def fastest_dtype(found: dict[str, dict[str, Any]]) -> str:
    return min(found, key=lambda dtype: found[dtype]["seconds"])


def summary(first: dict[str, dict[str, Any]], again: dict[str, Any]) -> dict[str, Any]:
    """Of a side in its fastest dtype, over both orders: timings, their median, and the more memory; of each phase the
    mean of both medians; and the seconds of every dtype in the first order."""
    both = [first[again["dtype"]], again]
    timings = [seconds for each in both for seconds in each["timings"]]
    return {
        "dtype": again["dtype"],
        "seconds": statistics.median(timings),
        "timings": timings,
        "phases": {phase: statistics.mean(each["phases"][phase] for each in both) for phase in again["phases"]},
        "flops_share": statistics.mean(each["flops_share"] for each in both),
        "bytes_share": statistics.mean(each["bytes_share"] for each in both),
        "peak_bytes": max(each["peak_bytes"] for each in both),
        "by_dtype": {dtype: each["seconds"] for dtype, each in first.items()},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [comparison.name for comparison in COMPARISONS]
    parser.add_argument("names", nargs="*", metavar="SUBJECT/SIZE", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--note", default="", help="about the machine, such as that other processes shared it")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names):
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    for comparison in COMPARISONS:
        if comparison.name in (args.names or names):
            for row in compare(comparison, run_side):
                record("compare", row, "subject", "size", "peer", note=args.note)
                print(json.dumps({key: row[key] for key in ("subject", "size", "peer", "ratio", "memory_ratio")}))


if __name__ == "__main__":
    main()
