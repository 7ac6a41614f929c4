"""Ablations of PPO on the demo: from one SFT and one reward model, PPO with each change.

    python -m benchmarks.ablations [--seeds 0] [--only NAME ...] [--note TEXT] [key=value ...]

SFT and reward model are those of `benchmarks.demo`, which trains them where they are missing; runs are next to them, a
finished one is only judged again. `key=value` changes keys of configs/demo.toml for all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo import RUNS, branch, judge_policy, train_base, use_cache
from benchmarks.provenance import record

CHANGES = {
    "as configured": [],
    "advantages not whitened": ["ppo.whiten_advantages=false"],
    "scores not normalised": ["ppo.score_scale=none"],
    "scores normalised by rollouts": ["ppo.score_scale=rollouts"],
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
    parser.add_argument("--note", default="", help="about the machine, such as that other processes shared it")
    args = parser.parse_intermixed_args(argv)
    use_cache(RUNS / "cache")
    for seed in args.seeds:
        settings = [f"run.seed={seed}", *args.overrides]
        base, _ = train_base(seed, settings)
        for name in args.only:
            record("ablations", measure(seed, name, base, settings), "seed", "change", note=args.note)


def measure(seed: int, name: str, base: Path, settings: list[str]) -> dict[str, Any]:
    """PPO with the change, from the models of `base`: numbers of its policy, and metrics of its last five steps."""
    run, seconds = branch(base, f"ablation-{name.replace(' ', '-')}", [*settings, *CHANGES[name]], "ppo")
    result = {"seed": seed, "change": name, "overrides": CHANGES[name], "seconds": seconds}
    result |= judge_policy(run / "ppo" / "export", base, settings)
    records = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    last = {metric: [each[metric] for each in records[-5:]] for metric in ("explained_variance", "actor_entropy")}
    result |= {metric: float(np.mean(values)) for metric, values in last.items()}
    return result | {"seconds_update": float(np.median([each["seconds_update"] for each in records]))}


if __name__ == "__main__":
    main()
