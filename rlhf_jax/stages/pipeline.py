"""SFT, reward model and PPO in order, skipping what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf_jax.data.config import DataConfig
from rlhf_jax.mesh import Layout
from rlhf_jax.optim import learning_rate
from rlhf_jax.sampling import check_learnable
from rlhf_jax.stages.base import make_base
from rlhf_jax.stages.loop import RunConfig
from rlhf_jax.stages.models import ModelConfig, say_devices
from rlhf_jax.stages.ppo import PPOConfig, ppo_sizes, run_ppo
from rlhf_jax.stages.reward import RewardConfig, run_reward
from rlhf_jax.stages.sft import SFTConfig, run_sft
from rlhf_jax.stages.sizes import micro_batches


def train(
    run: RunConfig,
    layout: Layout,
    model: ModelConfig,
    data: DataConfig,
    sft: SFTConfig,
    reward: RewardConfig,
    ppo: PPOConfig,
    stages: tuple[str, ...] = ("sft", "reward", "ppo"),
) -> None:
    """Run `stages`, each unless its export is there already.

    layout: of all that is trained, as `train_layout` gives it.
    Raises:
        ValueError: a stage is asked for whose predecessors in the run folder are not finished, or what a stage says.
    """
    steps: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
        "sft": ((), lambda: run_sft(run, layout, model, data, sft, make_base(run, layout.mesh, model, data))),
        "reward": (("sft",) if model.reward == "sft" else (), lambda: run_reward(run, layout, model, data, reward)),
        "ppo": (("sft", "reward"), lambda: run_ppo(run, layout, model, data, ppo)),
    }
    check_sizes(layout, sft, reward, ppo, stages)
    say_devices(layout.mesh, model)
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
        with naming(stage):
            start()


def check_sizes(layout: Layout, sft: SFTConfig, reward: RewardConfig, ppo: PPOConfig, stages: tuple[str, ...]) -> None:
    """Raise ValueError now for what would otherwise stop a later stage, when the earlier ones have run."""
    for stage, config in {"sft": sft, "reward": reward}.items():
        if stage in stages:
            with naming(stage):
                micro_batches(stage, config.batch_size, config.micro_batch_size, layout)
                if config.steps:
                    learning_rate(config.optim, config.steps)
    if "ppo" in stages:
        with naming("ppo"):
            batch_size, _ = ppo_sizes(ppo, layout)
            check_learnable(ppo.sample)
            if ppo.steps:
                updates = ppo.steps * ppo.ppo_epochs * ppo.rollouts // batch_size
                for optim in (ppo.actor, ppo.critic):
                    learning_rate(optim, updates)


@contextmanager
def naming(stage: str) -> Iterator[None]:
    """Let a ValueError of the body begin with the stage that it is of."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(stage):
            raise
        raise ValueError(f"{stage}: {error}") from error
