"""The single script: choose a recipe in configs/ by the actor and the machine, and train some or all stages.

    python scripts/train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m \
        --deployment-type single_gpu [--step 1 2 3] [--output-dir runs/mine] [key=value ...]
"""

from __future__ import annotations

import argparse
import glob
import shlex
import sys
from pathlib import Path

from rlhf_jax import hosts
from rlhf_jax.cli import main as rlhf_jax
from rlhf_jax.hardware import parse_machine
from rlhf_jax.plan import hardware_of_config, local_gpus
from rlhf_jax.stages.run_folder import RunConfig

CONFIGS = Path(__file__).parent.parent / "configs"
DEPLOYMENTS = ("single_gpu", "single_node", "multi_node")
STAGES = dict(enumerate(RunConfig.stages, 1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train SFT, reward model and PPO by a recipe of configs/.")
    parser.add_argument("--actor-model", default="facebook/opt-1.3b", help="hub id or folder (default: %(default)s)")
    parser.add_argument("--reward-model", default="", help="hub id or folder (default: as the recipe says)")
    parser.add_argument("--deployment-type", default="single_gpu", choices=DEPLOYMENTS, help="default: %(default)s")
    parser.add_argument("--step", type=int, nargs="+", default=[1, 2, 3], choices=STAGES, help="1 SFT, 2 reward, 3 PPO")
    parser.add_argument("--output-dir", default="", help="run folder (default: as the recipe says)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the recipe; put these first")
    args = parser.parse_args(argv)

    try:
        hosts.start()  # before JAX is asked for the memory of its devices
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    name = Path(args.actor_model).name
    config = choose(name, args.deployment_type, memory_here())
    if config is None:
        known = sorted(path.stem for kind in DEPLOYMENTS for path in CONFIGS.glob(f"*-{kind}.toml"))
        reported = f"{name}-{args.deployment_type}.toml; there are {', '.join(known)}"
        print(f"train.py: there is no recipe {reported}", file=sys.stderr)
        return 2
    if hosts.is_main():
        print(f"train.py: {config}, made for {hardware_of_config(config)}", flush=True)
    overrides = [f"model.actor={args.actor_model}", *args.overrides]
    if args.reward_model:
        overrides.insert(1, f"model.reward={args.reward_model}")
    if args.output_dir:
        overrides.append(f"run.dir={args.output_dir}")
    if args.deployment_type == "multi_node" and hosts.count() == 1:
        print(how_to_launch(config, overrides), file=sys.stderr)
        return 2
    if set(args.step) == set(STAGES):
        return rlhf_jax(["train", str(config), *overrides])
    for step in sorted(args.step):
        if code := rlhf_jax([STAGES[step], str(config), *overrides]):
            return code
    return 0


def how_to_launch(config: Path, overrides: list[str]) -> str:
    """The commands that start a recipe on its number of nodes."""
    nodes, command = parse_machine(hardware_of_config(config)).nodes, shlex.join([str(config), *overrides])
    return f"""train.py: this is one process, and multi_node needs one on every node. With SLURM:
  sbatch --nodes={nodes} scripts/slurm_train.sbatch {command}
Without a launcher, on node I of 0 to {nodes - 1}, with HOST the name of node 0:
  {hosts.COORDINATOR}=HOST:61440 {hosts.PROCESSES}={nodes} {hosts.PROCESS_ID}=I .venv/bin/rlhf-jax train {command}"""


def choose(name: str, deployment: str, memory: int) -> Path | None:
    """The recipe NAME-DEPLOYMENT or NAME-VARIANT-DEPLOYMENT of the largest card that is no larger than this machine's.

    Args:
        memory: bytes of each card here; 0: unknown. If unknown or too small for all, the recipe without a variant.
    """
    stem = glob.escape(name)
    files = [*CONFIGS.glob(f"{stem}-{deployment}.toml"), *sorted(CONFIGS.glob(f"{stem}-*-{deployment}.toml"))]
    wanted = {path: parse_machine(hardware_of_config(path)).gpu.memory for path in files}
    suitable = [path for path in files if wanted[path] <= memory]
    return max(suitable, key=wanted.get) if suitable else next(iter(files), None)


def memory_here() -> int:
    """Bytes of a card of this machine; 0 if unknown."""
    try:
        return parse_machine(local_gpus()).gpu.memory
    except ValueError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
