"""The [grpo] section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_jax.mesh import Layout, check_divides
from rlhf_jax.objectives import grpo
from rlhf_jax.optim import learning_rate
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.rollout_config import RolloutConfig


@dataclass(frozen=True)
class GRPOConfig(RolloutConfig):
    """The [grpo] section."""

    start: str = ""  # earlier stage whose policy it starts from; "": the latest, or without one model.actor
    rollout_batch_size: int = 32  # prompts of one iteration, over all devices, each answered sample.num_samples times
    passes: int = 1  # passes over the rollouts of an iteration
    # Advantage of an answer: its score minus the group's mean, over the group's standard deviation, "group_std" (GRPO),
    # over that of all answers, "batch_std", or over nothing, "group_mean" (Dr. GRPO); minus the mean of the others,
    # "leave_one_out" (RLOO); or normalised over all answers, "global" (REINFORCE++)
    advantage: grpo.Advantage = "group_std"
    # Probability ratio of each "token", of the "sequence" as a mean over its tokens (GSPO), or their "product" (RLOO)
    ratio: grpo.Ratio = "token"
    surrogate: Literal["clip", "cispo"] = "clip"  # a clipped ratio as in PPO; a clipped weight without gradient (CISPO)
    clip_low: float = 0.2  # the ratio is clipped below at 1 - this
    clip_high: float = 0.2  # the ratio is clipped above at 1 + this; DAPO takes 0.28
    # The loss is a mean over all tokens ("token", DAPO), over answers of their means ("sequence", GRPO), or a sum
    # over answers x max_new_tokens ("constant", Dr. GRPO)
    scale: grpo.Scale = "token"
    kl_coef: float = 0.0  # coefficient of the KL to the reference; 0: no reference is held
    # Folder or hub id of the model that the KL is measured to; "": the policy at the start. A teacher with the same
    # tokenizer, kl_coef = 1.0 and rewards = [] are on-policy distillation.
    reference: str = ""
    # Where the KL is: each token's k3 in the "loss", or the whole answer's k1 in its "score"
    kl_in: Literal["loss", "score"] = "loss"
    # Rounds of new prompts, at most, that replace groups whose answers all have one score (dynamic sampling of DAPO)
    refill_rounds: int = 0
    sample: SampleConfig = SampleConfig(num_samples=8)  # how rollouts are sampled

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference and not self.kl_coef:
            raise ValueError(f'reference="{self.reference}" has no effect with kl_coef=0: set kl_coef, such as 1.0')
        if self.rewards and self.sample.num_samples < 2 and self.advantage != "global":
            raise ValueError(
                f'sample.num_samples={self.sample.num_samples}: advantage="{self.advantage}" compares the answers to a '
                'prompt with each other: at least 2, or advantage = "global"'
            )
        if min(self.kl_coef, self.clip_low, self.clip_high, self.refill_rounds) < 0 or self.passes < 1:
            raise ValueError("kl_coef, clip_low, clip_high and refill_rounds: at least 0; passes: at least 1")

    def check(self, name: str, layout: Layout) -> None:
        """Raise ValueError for sizes that do not divide, filtered sampling, and schedules that do not fit the steps."""
        self.check_sizes(name, layout)
        self.check_functions()
        if self.steps:
            learning_rate(self.actor, self.updates(self.steps))

    @property
    def num_passes(self) -> int:
        """Passes over the rollouts of an iteration."""
        return self.passes

    def check_sizes(self, name: str, layout: Layout) -> int:
        """Micro-batches of one optimizer step, which takes whole groups. Raises ValueError as `RolloutConfig`."""
        num_micro = super().check_sizes(name, layout)
        check_divides(f"{name}.batch_size", self.update_size, self.sample.num_samples, "answers of a group")
        return num_micro
