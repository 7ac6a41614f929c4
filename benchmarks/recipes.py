"""Recipes on real data, trained and evaluated on a CPU: what their rewards and reward models come to.

    python -m benchmarks.recipes gsm8k ../shared/data/gsm8k
    python -m benchmarks.recipes alpaca_pairs ../shared/data/alpaca-eval-preferences

The folder has train.jsonl and test.jsonl, and replaces that of configs/RECIPE.toml. Of gsm8k the rewards of training
and of held-out answers are recorded, of alpaca_pairs the accuracy on held-out pairs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import record

FIVE = 5  # iterations at the start and at the end of a training
FORM = "configs/rewards/gsm8k.py:is_formatted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("data", help="a folder with train.jsonl and test.jsonl")
    args = parser.parse_args()
    config, run = f"configs/{args.recipe}.toml", Path("runs") / "recipes" / args.recipe
    shutil.rmtree(run, ignore_errors=True)
    source = tomllib.loads(Path(config).read_text(encoding="utf-8"))["data"]["sources"][0]
    source |= {"path": f"{args.data}/train.jsonl", "eval_path": f"{args.data}/test.jsonl"}
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in source.items())
    settings = [config, f"run.dir={run}", f"data.sources=[{{ {table} }}]"]
    start = time.monotonic()
    rlhf_jax("train", *settings)
    seconds = time.monotonic() - start
    found = RECIPES[args.recipe](run, settings)
    record("recipes", {"recipe": args.recipe, "train_seconds": seconds, **found}, "recipe")


def rlhf_jax(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rlhf_jax", *arguments], check=True)


def evaluation(run: Path, settings: list[str], *more: str) -> dict[str, Any]:
    rlhf_jax("evaluate", *settings, *more)
    return json.loads((run / "evaluate.json").read_text(encoding="utf-8"))


def gsm8k(run: Path, settings: list[str]) -> dict[str, Any]:
    """The rewards of the first and the last iterations, and the form of held-out answers, sampled, by stage."""
    lines = (run / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    found: dict[str, Any] = {"iterations": len(history)}
    for name in ("reward/is_formatted", "reward/is_correct", "response_length", "ended_by_eos"):
        values = [each[name] for each in history]
        found[name] = {"first": float(np.mean(values[:FIVE])), "last": float(np.mean(values[-FIVE:]))}
    held_out = evaluation(run, settings, f"evaluate.reward={FORM}", "evaluate.sample.max_new_tokens=128")
    return found | {"held_out": held_out}


def alpaca_pairs(run: Path, settings: list[str]) -> dict[str, Any]:
    """The accuracy of the reward model on held-out pairs, all and by the difference of their lengths."""
    return {"reward_pairs": evaluation(run, settings)["reward_pairs"]}


RECIPES = {"gsm8k": gsm8k, "alpaca_pairs": alpaca_pairs}


if __name__ == "__main__":
    main()
