"""Advantages, losses and metrics of GRPO and its relatives, as their configuration composes them from `objectives`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.decode import Rollout
from rlhf_jax.engine import Experience, ScoredRollout
from rlhf_jax.objectives import grpo, masked, ppo
from rlhf_jax.stages.grpo_config import GRPOConfig


def estimate_advantages(scored: ScoredRollout, config: GRPOConfig, **carried) -> tuple[jax.Array, jax.Array, None]:
    """Rewards [B, N], the score on the last token of an answer; and its advantage on every token."""
    score, mask = scored.score - config.missing_eos_penalty * ~scored.ended, scored.action_mask
    if config.kl_coef and config.kl_in == "score":
        score = score - config.kl_coef * ppo.sequence_kl(scored.logprobs, scored.ref_logprobs, mask)
    advantages = grpo.group_advantages(score, config.sample.num_samples, config.advantage)
    is_last = jnp.arange(mask.shape[1]) == mask.sum(axis=1, keepdims=True) - 1
    return jnp.where(is_last, score[:, None], 0.0), masked.zero_outside(advantages[:, None], mask), None


def group_loss(logprobs: jax.Array, entropy: jax.Array, experience: Experience, config: GRPOConfig):
    """The loss of a micro-batch, and its metrics."""
    old, mask, advantages = experience.logprobs, experience.action_mask, experience.advantages
    log_ratio = grpo.log_ratios(logprobs, old, mask, config.ratio)
    bounds = dict(low=config.clip_low, high=config.clip_high)
    if config.surrogate == "cispo":
        now = masked.zero_outside(logprobs, mask)
        losses = grpo.cispo_losses(log_ratio, now, advantages, high=config.clip_high)
        clipped = (jnp.exp(log_ratio) > 1.0 + config.clip_high) & (advantages != 0)
    else:
        losses = grpo.clipped_losses(log_ratio, advantages, **bounds)
        clipped = grpo.is_clipped(log_ratio, advantages, **bounds)
    stats = {"clip_fraction": masked.mean(clipped, mask), "ratio": masked.mean(jnp.exp(log_ratio), mask)}
    stats |= {"approx_kl": ppo.approximate_kl(logprobs, old, mask), "entropy": masked.mean(entropy, mask)}
    if config.kl_coef and config.kl_in == "loss":
        kl = grpo.kl_losses(logprobs, old, experience.ref_logprobs, mask)
        losses, stats["kl_loss"] = losses + config.kl_coef * kl, masked.mean(kl, mask)
    loss, _ = grpo.scaled_mean(losses, mask, config.scale, length=config.sample.max_new_tokens)
    return loss, stats


def loss_weight(experience: Experience, config: GRPOConfig) -> jax.Array:
    """The weight of a micro-batch in an optimizer step, see `objectives.grpo.scaled_mean`."""
    mask = experience.action_mask
    return grpo.scaled_mean(mask, mask, config.scale, length=config.sample.max_new_tokens)[1]


@jax.jit
def answer_metrics(experience: Experience, rollout: Rollout) -> dict[str, jax.Array]:
    """Metrics of an iteration's answers."""
    mask = experience.action_mask
    stats = {
        "score_mean": experience.score.mean(),
        "score_std": experience.score.std(),
        "reward_mean": experience.rewards.sum(axis=1).mean(),
        "response_length": mask.sum(axis=1).mean(),
        "ended_by_eos": experience.ended.mean(),
        # Difference between the policy that sampled and the one that trains; 0 except for rounding.
        "logprob_mismatch": masked.mean(jnp.abs(rollout.logprobs - experience.logprobs), mask),
    }
    if experience.ref_logprobs is not None:
        stats["kl"] = ppo.sequence_kl(experience.logprobs, experience.ref_logprobs, mask).mean()
    return stats
