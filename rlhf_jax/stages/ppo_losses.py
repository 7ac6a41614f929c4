"""Rewards, advantages, losses and metrics of PPO, as its configuration composes them from `objectives`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.decode import Rollout
from rlhf_jax.engine import Experience, ScoredRollout
from rlhf_jax.objectives import masked, ppo
from rlhf_jax.objectives.kl import kl_loss
from rlhf_jax.objectives.moments import Moments, add_moments
from rlhf_jax.stages.ppo_config import PPOConfig


def shaped_rewards(
    scored: ScoredRollout, config: PPOConfig, kl_coef: jax.Array | None = None, score_moments: Moments | None = None
) -> jax.Array:
    """[B, N]: the KL penalty on every token, and on the last the score by the rules for cut answers.

    kl_coef [], score_moments: what the state carries; None: the configuration's coefficient, the score as it is.
    """
    score = scored.score
    if score_moments is not None:
        scale = add_moments(score_moments, score) if config.score_scale == "rollouts" else score_moments
        score = (score - scale.mean) / scale.std
    names = ("missing_eos", "missing_eos_penalty", "overlong_tokens", "overlong_penalty")
    rules = {name: getattr(config, name) for name in names}
    score = ppo.shaped_score(score, scored.ended, scored.action_mask, **rules)
    coefficient = config.kl_coef if kl_coef is None else kl_coef
    penalty = dict(kl_coef=coefficient if config.kl_in == "rewards" else 0.0, clip=config.score_clip)
    penalty |= dict(estimator=config.kl_estimator, limit=config.kl_limit)
    return ppo.token_rewards(score, scored.logprobs, scored.ref_logprobs, scored.action_mask, **penalty)


def estimate(scored: ScoredRollout, config: PPOConfig, **carried) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards, advantages and returns, [B, N] each; `carried` as `shaped_rewards` takes it."""
    rewards, mask = shaped_rewards(scored, config, **carried), scored.action_mask
    advantages, returns = ppo.gae(rewards, scored.values, mask, gamma=config.gamma, lam=config.lam)
    if config.critic_lam >= 0:
        _, returns = ppo.gae(rewards, scored.values, mask, gamma=config.gamma, lam=config.critic_lam)
    return rewards, masked.whiten(advantages, mask) if config.whiten_advantages else advantages, returns


def actor_loss(logprobs: jax.Array, entropy: jax.Array, experience: Experience, config: PPOConfig):
    """The clipped policy loss of a micro-batch with the terms that are on, and its metrics."""
    old, mask = experience.logprobs, experience.action_mask
    ratios, clips = (logprobs, old, experience.advantages, mask), dict(clip=config.clip, clip_high=config.clip_high)
    clips |= dict(dual_clip=config.dual_clip)
    ratio = ppo.policy_ratio(logprobs, old, mask)
    stats = {"clip_fraction": ppo.policy_clip_fraction(*ratios, **clips)}
    stats |= {"approx_kl": ppo.approximate_kl(logprobs, old, mask), "entropy": masked.mean(entropy, mask)}
    stats |= {"ratio": masked.mean(ratio, mask), "ratio_deviation": masked.mean(jnp.abs(ratio - 1.0), mask)}
    loss = ppo.policy_loss(*ratios, **clips)
    if config.entropy_coef:
        loss -= config.entropy_coef * stats["entropy"]
    if config.kl_in == "loss":
        kinds = dict(estimator=config.kl_estimator, limit=config.kl_limit)
        stats["kl_loss"] = kl_loss(logprobs, old, experience.ref_logprobs, mask, **kinds)
        loss += config.kl_coef * stats["kl_loss"]
    return loss, stats


def critic_loss(values: jax.Array, experience: Experience, config: PPOConfig):
    """The clipped value loss of a micro-batch, and its metrics."""
    old, returns, mask = experience.values, experience.returns, experience.action_mask
    loss = ppo.value_loss(values, old, returns, mask, clip=config.value_clip)
    return loss, {"clip_fraction": ppo.value_clip_fraction(values, old, returns, mask, clip=config.value_clip)}


@jax.jit
def rollout_metrics(experience: Experience, rollout: Rollout) -> dict[str, jax.Array]:
    """Metrics of an iteration's experience: score, KL, lengths, quality of the critic."""
    mask = experience.action_mask
    kl = ppo.sequence_kl(experience.logprobs, experience.ref_logprobs, mask)
    return {
        "score_mean": experience.score.mean(),
        "score_std": experience.score.std(),
        "kl": kl.mean(),
        "reward_mean": experience.rewards.sum(axis=1).mean(),
        "value_mean": masked.mean(experience.values, mask),
        "return_mean": masked.mean(experience.returns, mask),
        "explained_variance": ppo.explained_variance(experience.values, experience.returns, mask),
        "response_length": mask.sum(axis=1).mean(),
        "ended_by_eos": experience.ended.mean(),
        # Difference between the policy that sampled and the one that trains; 0 except for rounding.
        "logprob_mismatch": masked.mean(jnp.abs(rollout.logprobs - experience.logprobs), mask),
    }
