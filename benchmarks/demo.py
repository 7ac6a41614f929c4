"""The demo for several seeds: seconds of each stage, and held-out metrics with sampled and with greedy answers.

    python -m benchmarks.demo [--seeds 0 1 2] [key=value ...]

Five minutes on two cores per seed. Runs in runs/benchmark-demo/SEED with separate caches, so that the seconds
include compiling and tokenising. `key=value` changes keys of configs/demo.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.provenance import record

CONFIG, RUNS = "configs/demo.toml", Path("runs/benchmark-demo")
STAGES = ("sft", "reward", "ppo")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_intermixed_args(argv)
    for seed in args.seeds:
        record("demo", measure(seed, RUNS / str(seed), args.overrides), "seed")


def measure(seed: int, run: Path, overrides: list[str]) -> dict:
    """Train and evaluate in `run`, which is deleted first."""
    shutil.rmtree(run, ignore_errors=True)
    settings = [f"run.seed={seed}", f"run.dir={run}", *overrides]
    seconds = {stage: seconds_of(stage, settings, run) for stage in STAGES}
    figures = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        took = seconds_of("evaluate", [*settings, f"evaluate.sample.temperature={temperature}"], run)
        figures[name] = json.loads((run / "evaluate.json").read_text()) | {"seconds": took}
    return {"seed": seed, "seconds": seconds, **figures}


def seconds_of(command: str, settings: list[str], run: Path) -> float:
    """Run one command of `rlhf-jax` with caches in `run`."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(run.absolute() / "cache")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rlhf_jax", command, CONFIG, *settings], env=environment, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
