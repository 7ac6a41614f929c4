"""Start-up: imports, `--help` and a plan in processes of their own, and the first step with and without compiled
programs in the cache.

    python -m benchmarks.compile [--size A] [--trials 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import timing
from benchmarks.provenance import record

COMMANDS = {
    "import": ("-c", "import rlhf_jax"),
    "help": ("-m", "rlhf_jax", "--help"),
    "plan": ("-m", "rlhf_jax", "plan", "configs/opt-175b-multi_node.toml"),
}


def process_seconds(*arguments: str) -> float:
    """Wall-clock seconds of a Python process; exit code 2 is an error, 1 and 3 say that a plan may not fit."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1, 3):
        sys.exit(f"{arguments}: exit code {done.returncode}: {done.stderr}")
    return time.perf_counter() - start


def first_steps(size: str) -> list[float]:
    """Seconds of the first PPO iteration of two runs, the second of which finds the compiled programs of the first."""
    found = []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}  # as `rlhf_jax.cli` sets it
        command = [sys.executable, "-m", "benchmarks.ppo_iteration", "--size", size, "--warm-up", "1"]
        for _ in range(2):
            options = dict(check=True, stdout=subprocess.PIPE, text=True, env=environment)
            lines = subprocess.run([*command, "--iterations", "1"], **options).stdout
            found.append(json.loads(lines.splitlines()[-1])["first"])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=timing.SIZES, default="A", help="of the models (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=5, help="of each process (default: %(default)s)")
    parser.add_argument("--note", default="", help="about the machine, such as that other processes shared it")
    args = parser.parse_args(argv)
    timings = {name: [process_seconds(*each) for _ in range(args.trials)] for name, each in COMMANDS.items()}
    result = {"size": args.size, "timings": timings, "first_steps": first_steps(args.size)}
    result |= {"seconds": {name: statistics.median(each) for name, each in timings.items()}}
    record("compile", result, "size", note=args.note)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
