"""The single script: pick a recipe of configs/ by the actor and the machine, and train all stages or some.

    python scripts/train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m \
        --deployment-type single_gpu [--step 1 2 3] [--output-dir runs/mine] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhf_jax.cli import main as rlhf_jax

CONFIGS = Path(__file__).parent.parent / "configs"
DEPLOYMENTS = ("single_gpu", "single_node", "multi_node")
STAGES = {1: "sft", 2: "reward", 3: "ppo"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train SFT, reward model and PPO by a recipe of configs/.")
    parser.add_argument("--actor-model", default="facebook/opt-1.3b", help="hub id or folder (default: %(default)s)")
    parser.add_argument("--reward-model", default="facebook/opt-350m", help="hub id or folder (default: %(default)s)")
    parser.add_argument("--deployment-type", default="single_gpu", choices=DEPLOYMENTS, help="default: %(default)s")
    parser.add_argument("--step", type=int, nargs="+", default=[1, 2, 3], choices=STAGES, help="1 SFT, 2 reward, 3 PPO")
    parser.add_argument("--output-dir", default="", help="run folder (default: as the recipe says)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the recipe; put these first")
    args = parser.parse_args(argv)

    config = CONFIGS / f"{Path(args.actor_model).name}-{args.deployment_type}.toml"
    if not config.exists():
        known = sorted(path.stem for kind in DEPLOYMENTS for path in CONFIGS.glob(f"*-{kind}.toml"))
        print(f"train.py: there is no recipe {config.name}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    overrides = [f"model.actor={args.actor_model}", f"model.reward={args.reward_model}", *args.overrides]
    if args.output_dir:
        overrides.append(f"run.dir={args.output_dir}")
    if set(args.step) == set(STAGES):
        return rlhf_jax(["train", str(config), *overrides])
    for step in sorted(args.step):
        if code := rlhf_jax([STAGES[step], str(config), *overrides]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
