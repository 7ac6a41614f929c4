"""SFT, reward model and PPO in order, skipping what is finished."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from rlhf_jax.data.sources import DataConfig
from rlhf_jax.stages.base import make_base
from rlhf_jax.stages.loop import RunConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo import PPOConfig, run_ppo
from rlhf_jax.stages.reward import RewardConfig, run_reward
from rlhf_jax.stages.sft import SFTConfig, run_sft


def train(
    run: RunConfig,
    mesh: Mesh,
    model: ModelConfig,
    data: DataConfig,
    sft: SFTConfig,
    reward: RewardConfig,
    ppo: PPOConfig,
    stages: tuple[str, ...] = ("sft", "reward", "ppo"),
) -> None:
    """Run `stages`, each unless its export is there already.

    Raises:
        ValueError: a stage is asked for whose predecessors in the run folder are not finished.
    """
    steps: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
        "sft": ((), lambda: run_sft(run, mesh, model, data, sft, make_base(run, mesh, model, data))),
        "reward": (("sft",) if model.reward == "sft" else (), lambda: run_reward(run, mesh, model, data, reward)),
        "ppo": (("sft", "reward"), lambda: run_ppo(run, mesh, model, data, ppo)),
    }
    for stage in stages:
        needed, start = steps[stage]
        if run.export(stage).exists():
            print(f"{stage}: finished already, {run.export(stage)} is there", flush=True)
            continue
        missing = [name for name in needed if not run.export(name).exists()]
        if missing:
            raise ValueError(
                f"{stage} starts from what {' and '.join(missing)} leaves in {run.dir}, which is not finished: "
                f"run it first, or `train`, which runs all in order"
            )
        start()
