"""The keys of every stage that learns from its own answers, and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_jax.mesh import Layout, check_divides
from rlhf_jax.optim import OptimConfig
from rlhf_jax.rollout import check_slots
from rlhf_jax.sampling import SampleConfig, check_learnable
from rlhf_jax.stages.batch_sizes import micro_batches
from rlhf_jax.stages.rewards import RewardsConfig


@dataclass(frozen=True)
class RolloutConfig(RewardsConfig):
    """The keys of every stage that learns from its own answers."""

    epochs: int = 1  # passes over the prompts
    steps: int = 0  # iterations of generate, score and update; 0: as `epochs` says
    rollout_batch_size: int = 64  # prompts answered in one iteration, over all devices, each sample.num_samples times
    generate_rows: int = 0  # answers decoded at a time; a free decode slot takes the next prompt; 0: all at once
    batch_size: int = 0  # rollouts of one optimizer step, in grpo whole groups; 0: all of an iteration
    micro_batch_size: int = 0  # rollouts of one forward and backward pass, over all devices; 0: batch_size
    # Log-probabilities of the policy before an update: of a pass over the answers as it trains ("score"), or those with
    # which they were sampled ("rollout"), which saves that pass; in bfloat16 the two differ by rounding
    old_logprobs: Literal["score", "rollout"] = "score"
    missing_eos_penalty: float = 0.0  # subtracted from the score of an answer that was cut at max_new_tokens
    ema_decay: float = 0.0  # decay of the moving average of the actor, which is exported to export_ema; 0: none
    sample: SampleConfig = SampleConfig()  # how rollouts are sampled
    actor: OptimConfig = OptimConfig(learning_rate=1e-6)  # the actor's optimizer

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay:g}: at least 0 (no average) and below 1, such as 0.992")

    @property
    def rollouts(self) -> int:
        """Number of answers of one iteration."""
        return self.rollout_batch_size * self.sample.num_samples

    @property
    def update_size(self) -> int:
        """Number of rollouts of one optimizer step."""
        return self.batch_size or self.rollouts

    @property
    def num_passes(self) -> int:
        """Passes over the rollouts of an iteration."""
        raise NotImplementedError

    def updates(self, steps: int) -> int:
        """Number of optimizer steps in `steps` iterations."""
        return steps * self.num_passes * self.rollouts // self.update_size

    def check_sizes(self, name: str, layout: Layout) -> int:
        """Micro-batches of one optimizer step. ValueError for sizes that do not divide and for filtered sampling."""
        check_learnable(self.sample)
        size = f"{name}.rollout_batch_size"
        check_divides(size, self.rollout_batch_size, layout.shards("batch"), "devices of the mesh")
        num_micro = micro_batches(name, self.update_size, self.micro_batch_size, layout)
        size += " x num_samples" if self.sample.num_samples > 1 else ""
        check_divides(size, self.rollouts, self.update_size, f"rollouts of {name}.batch_size")
        check_slots(self.generate_rows, layout, f"{name}.generate_rows")
        return num_micro
