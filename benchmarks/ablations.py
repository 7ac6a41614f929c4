"""Ablations of PPO on the demo: one SFT and one reward model, then PPO with each change.

    python -m benchmarks.ablations [--seeds 0] [--only NAME ...] [key=value ...]

`key=value` changes keys of configs/demo.toml for all of them. Runs in runs/benchmark-ablations/SEED.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from benchmarks.demo import seconds_of
from benchmarks.provenance import record

RUNS = Path("runs/benchmark-ablations")
CHANGES = {
    "as configured": [],
    "advantages not whitened": ["ppo.whiten_advantages=false"],
    "scores scaled by rollouts": ["ppo.score_scale=rollouts"],
    "critic from a zero head": ["ppo.critic_head=zero"],
    "KL by k3": ["ppo.kl_estimator=k3"],
    "KL in the loss": ["ppo.kl_in=loss"],
    "with texts (PTX)": ["ppo.texts={coef=1.0, batch_size=64}"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES), metavar="NAME")
    args = parser.parse_intermixed_args(argv)
    for seed in args.seeds:
        base = RUNS / str(seed) / "base"
        shutil.rmtree(base, ignore_errors=True)
        settings = [f"run.seed={seed}", *args.overrides]
        for stage in ("sft", "reward"):
            seconds_of(stage, [*settings, f"run.dir={base}"], base)
        for name in args.only:
            record("ablations", measure(seed, name, base, settings), "seed", "change")


def measure(seed: int, name: str, base: Path, settings: list[str]) -> dict:
    """PPO with the change, from the first two stages of `base`, and its evaluation."""
    run = base.with_name(name.replace(" ", "-"))
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)
    settings = [*settings, f"run.dir={run}", *CHANGES[name]]
    result = {"seed": seed, "change": name, "overrides": CHANGES[name], "seconds": seconds_of("ppo", settings, run)}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        seconds_of("evaluate", [*settings, f"evaluate.sample.temperature={temperature}"], run)
        numbers = json.loads((run / "evaluate.json").read_text())
        result[how] = {name: numbers[name] for name in ("sft_good", "ppo_good", "ppo_score", "ppo_length")}
    records = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    for metric in ("kl", "explained_variance", "actor_entropy"):
        result[metric] = float(np.mean([record[metric] for record in records[-5:]]))
    result["seconds_update"] = float(np.median([record["seconds_update"] for record in records]))
    return result


if __name__ == "__main__":
    main()
