"""The demo for several seeds: seconds of each stage, and held-out metrics with sampled and with greedy answers.

    python -m benchmarks.demo [--seeds 0 1 2] [key=value ...]

About ten minutes on two free cores per seed. Runs in runs/benchmark-demo/SEED with separate caches, so that the seconds
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
from rlhf_jax.config import load_config
from rlhf_jax.data.builtin_judge import judge
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import read_examples
from rlhf_jax.models.pretrained import reward_from_pretrained
from rlhf_jax.recipe import Recipe
from rlhf_jax.scoring import score_texts

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
    figures: dict = {"content": content_accuracy(run, settings)}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        took = seconds_of("evaluate", [*settings, f"evaluate.sample.temperature={temperature}"], run)
        figures[name] = json.loads((run / "evaluate.json").read_text()) | {"seconds": took}
    return {"seed": seed, "seconds": seconds, **figures}


def content_accuracy(run: Path, settings: list[str]) -> dict:
    """The reward model's accuracy on held-out pairs that differ only in right and wrong content, by the judge."""
    data = load_config(CONFIG, settings, Recipe).data
    pairs = []
    for example in read_examples(data, RowSpec("pair", "reward"), held_out=True):
        prompt = example.turns[-1][1]
        chosen, rejected = (judge(prompt, text, ended=True).faults for text in (example.chosen, example.rejected))
        if sorted([*chosen, "wrong"]) == sorted(rejected):
            pairs.append((prompt, example.chosen, example.rejected))
    scorer = reward_from_pretrained(run / "reward" / "export")
    chosen, rejected = (
        score_texts(scorer, [dialogue(pair[0], pair[side]) for pair in pairs], batch_size=256) for side in (1, 2)
    )
    return {"pairs": len(pairs), "accuracy": float((chosen > rejected).mean())}


def dialogue(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def seconds_of(command: str, settings: list[str], run: Path) -> float:
    """Run one command of `rlhf-jax` with caches in `run`."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(run.absolute() / "cache")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rlhf_jax", command, CONFIG, *settings], env=environment, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
