"""Which models fit which card, by plans compiled for cards that are not attached; nothing is run or timed.

    python -m benchmarks.fit [NAME ...]            # DeepSpeed-Chat's largest model per card, and what fits here
    python -m benchmarks.fit --headers [NAME ...]  # writes each configuration's plan into its header
    python -m benchmarks.fit --check [NAME ...]    # lists headers that differ from the plan

Needs JAX's CUDA plugin, no GPU, no network (rlhf_jax/plan/known_models.toml describes the models). NAME is
a file of configs/ without its suffix.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.provenance import record
from rlhf_jax.config import load_config
from rlhf_jax.hardware import compile_obstacle, parse_machine
from rlhf_jax.plan import hardware_of_config, make_plan
from rlhf_jax.recipe import Recipe

CONFIGS = Path(__file__).parent.parent / "configs"
GIB = 2**30
PHASES = ("publish", "generate", "score", "actor", "critic")
# The largest models in DeepSpeed-Chat's published tables, with ZeRO, LoRA and offloading as used there; and ours.
LARGEST = (
    ("1xA6000-48GB", "OPT-6.7B", ("opt-13b-a6000-single_gpu", "opt-30b-nf4-single_gpu")),
    ("1xA100-40GB", "OPT-6.7B", ("opt-13b-single_gpu",)),
    ("1xA100-80GB", "OPT-13B", ("opt-30b-single_gpu", "opt-66b-single_gpu")),
    ("8xA100-80GB", "OPT-66B", ("opt-66b-single_node", "opt-30b-single_node")),
    ("8x8xA100-80GB", "OPT-175B", ("opt-175b-multi_node",)),
)
PLAN_LINE = re.compile(r"^# Plan: .*$", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", action="store_true", help="rewrite the plan's line of each configuration")
    parser.add_argument("--check", action="store_true", help="compare that line with a plan made now")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of configurations (default: all with hardware)")
    args = parser.parse_args()
    named = [path.stem for path in planned_configs()]
    if unknown := [name for name in args.names if name not in named]:
        parser.error(f"no configuration with hardware is called {', '.join(unknown)}; there are {', '.join(named)}")
    if not (args.headers or args.check):
        for row in largest_models(args.names):
            record("fit", row, "config")
        return 0
    stale = 0
    for path in planned_configs():
        if args.names and path.stem not in args.names:
            continue
        line, text = header(plan_of(path)), path.read_text(encoding="utf-8")
        is_stale = PLAN_LINE.search(text)[0] != line
        stale += is_stale
        print(f"{path.name}: {'stale, now ' if is_stale else ''}{line}", flush=True)
        if args.headers and is_stale:
            path.write_text(PLAN_LINE.sub(line, text, count=1), encoding="utf-8")
    return int(args.check and stale > 0)


def planned_configs() -> list[Path]:
    """The configurations that name their hardware."""
    return [path for path in sorted(CONFIGS.glob("*.toml")) if hardware_of_config(path)]


def plan_of(path: Path) -> dict[str, Any]:
    gpus = hardware_of_config(path)
    if obstacle := compile_obstacle(parse_machine(gpus).gpu):
        sys.exit(obstacle)
    return make_plan(load_config(path, [], Recipe), gpus, search=False)


def header(plan: dict[str, Any]) -> str:
    """The line of a configuration's header that states its plan."""
    worst = max(plan["phases"], key=lambda row: row["peak"])
    ppo = plan["seconds"]["ppo"]
    return (
        f"# Plan: peak {worst['peak'] / GIB:.1f} GiB per GPU ({worst['stage']} {worst['phase']}), headroom "
        f"{worst['headroom'] / GIB:.1f} of {plan['usable'] / GIB:.1f}; a PPO iteration {ppo['floor']:.3g} s at least, "
        f"{ppo['expected']:.3g} expected; compiled for {plan['compiled_for']}, not run"
    )


def largest_models(names: list[str]) -> Iterator[dict[str, Any]]:
    """For each entry of LARGEST: card, models, how the actor trains, and bytes on one GPU per phase of PPO."""
    for gpus, largest, configs in LARGEST:
        for name in configs:
            if names and name not in names:
                continue
            path = CONFIGS / f"{name}.toml"
            assert parse_machine(hardware_of_config(path)) == parse_machine(gpus), (
                f"{path} is of another machine than {gpus}"
            )
            recipe, plan = load_config(path, [], Recipe), plan_of(path)
            yield {
                "card": gpus,
                "deepspeed_chat": largest,
                "config": name,
                "model": recipe.model.actor.split("/")[-1],
                "trains": f"LoRA {recipe.model.lora.rank} on {recipe.model.frozen_dtype}"
                if recipe.model.lora.rank
                else "all weights",
                "rollouts": recipe.ppo.rollouts,
                "micro_batch": recipe.ppo.micro_batch_size or recipe.ppo.rollouts,
                "peaks": {row["phase"]: row["peak"] for row in plan["phases"] if row["stage"] == "ppo"},
                "headroom": min(row["headroom"] for row in plan["phases"]),
            }


if __name__ == "__main__":
    sys.exit(main())
