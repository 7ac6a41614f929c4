"""The [ppo] section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_jax.mesh import Layout, check_divides
from rlhf_jax.objectives.kl import Estimator
from rlhf_jax.optim import OptimConfig, learning_rate
from rlhf_jax.stages.rollout_config import RolloutConfig
from rlhf_jax.stages.score_scale import ScoreScale
from rlhf_jax.stages.texts import TextsConfig


@dataclass(frozen=True)
class PPOConfig(RolloutConfig):
    """The [ppo] section."""

    ppo_epochs: int = 1  # passes over the rollouts of an iteration
    stop_kl: float = 0.0  # the passes end after an optimizer step with an approximate KL per token above it; 0: never
    kl_coef: float = 0.1  # coefficient of the KL penalty against the reference, on every token
    kl_in: Literal["rewards", "loss"] = "rewards"  # "loss": a term of the actor loss, with the gradient of the KL
    # The penalty of a token, with x the log of the policy's probability over the reference's: "k1" x, "k2" x^2 / 2,
    # "k3" exp(-x) - 1 + x.
    kl_estimator: Estimator = "k1"
    kl_limit: float = 0.0  # the penalty of a token is clipped to +- this, before the coefficient; 0: not clipped
    kl_target: float = 0.0  # KL per answer to which the coefficient adapts, starting from kl_coef; 0: it is fixed
    # What scores are shifted and divided by, to mean 0 and variance 1: those of "demonstrations", measured before the
    # first step and kept in RUN/ppo/score_scale.json, or those of all "rollouts" so far.
    score_scale: ScoreScale = "none"
    score_clip: float = 5.0  # scores are clipped to +- this before they become a reward
    missing_eos: Literal["penalty", "replace"] = "penalty"  # "replace": minus the penalty takes the place of the score
    overlong_tokens: int = 0  # the last tokens before max_new_tokens, whose use costs score in proportion; 0: none
    overlong_penalty: float = 1.0  # subtracted from the score of an answer that uses all overlong_tokens
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of generalised advantage estimation
    critic_lam: float = -1.0  # lambda of the returns that the critic learns; -1: lam
    clip: float = 0.2  # largest change of the probability ratio in the actor loss
    clip_high: float = 0.0  # largest rise of the probability ratio; 0: clip
    dual_clip: float = 0.0  # where the advantage is negative, the ratio counts at most as this, such as 3; 0: no bound
    entropy_coef: float = 0.0  # coefficient of the mean entropy of a token, which the actor loss then raises
    value_clip: float = 0.2  # largest change of a value in the critic loss
    critic_head: Literal["scorer", "zero"] = "scorer"  # head of the critic at the start: the reward model's, or zeros
    critic_warmup_steps: int = 0  # iterations at the start in which only the critic learns
    # Weights for the difference between the policy as it generates and as it trains: of each "token", or of a whole
    # answer, the "sequence"; at most mismatch_limit.
    mismatch: Literal["none", "token", "sequence"] = "none"
    mismatch_limit: float = 2.0  # largest such weight
    texts: TextsConfig = TextsConfig()  # texts that the actor also learns (PTX)
    save_tokens: bool = False  # ids, log-probabilities and advantages of every token in RUN/ppo/rollouts
    whiten_advantages: bool = True  # scale advantages to mean 0 and variance 1 over the tokens of an iteration
    actor: OptimConfig = OptimConfig(learning_rate=9.65e-6)  # the actor's optimizer
    critic: OptimConfig = OptimConfig(learning_rate=5e-6)  # the critic's optimizer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_scale == "demonstrations" and self.functions:
            raise ValueError('score_scale="demonstrations" is that of the reward model alone: set "rollouts" or "none"')
        if self.kl_target and self.kl_in == "loss":
            raise ValueError(f'kl_target={self.kl_target:g} adapts the penalty in the reward: set kl_in = "rewards"')
        if self.dual_clip and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip:g}: above 1, such as 3, or 0 for no bound")
        if self.mismatch != "none" and self.old_logprobs == "rollout":
            raise ValueError(
                f'mismatch="{self.mismatch}" compares two policies, and old_logprobs="rollout" has one: set "score"'
            )
        if self.mismatch_limit <= 0:
            raise ValueError(f"mismatch_limit={self.mismatch_limit:g}: above 0, such as 2")
        if not 0 <= self.overlong_tokens <= self.sample.max_new_tokens:
            raise ValueError(
                f"overlong_tokens={self.overlong_tokens}: from 0 to max_new_tokens, {self.sample.max_new_tokens}"
            )
        negative = ("stop_kl", "kl_limit", "kl_target", "clip_high", "entropy_coef", "critic_warmup_steps")
        if wrong := [name for name in negative if getattr(self, name) < 0]:
            raise ValueError(f"{', '.join(wrong)}: 0 (off) or more")
        if self.steps and self.critic_warmup_steps >= self.steps:
            raise ValueError(f"critic_warmup_steps={self.critic_warmup_steps} leaves none of {self.steps} to the actor")

    def check(self, name: str, layout: Layout) -> None:
        """Raise ValueError for sizes that do not divide, filtered sampling, and schedules that do not fit the steps."""
        self.check_sizes(name, layout)
        self.check_functions()
        if self.steps:
            learning_rate(self.actor, self.actor_updates(self.steps))
            learning_rate(self.critic, self.updates(self.steps))

    @property
    def num_passes(self) -> int:
        """Passes over the rollouts of an iteration."""
        return self.ppo_epochs

    def actor_updates(self, steps: int) -> int:
        """Number of those that the actor takes."""
        return self.updates(steps - self.critic_warmup_steps)

    def check_sizes(self, name: str, layout: Layout) -> int:
        """Micro-batches of one optimizer step. Raises ValueError as `RolloutConfig`."""
        num_micro = super().check_sizes(name, layout)
        if self.texts.coef:
            parts = num_micro * layout.shards("batch")
            check_divides(f"{name}.texts.batch_size", self.texts.batch_size, parts, "micro-batches x devices")
        return num_micro
