"""Proximal policy optimisation on token sequences.

Arrays are [B, T] float32 unless said otherwise: B sequences, T response tokens. `mask` [B, T] is true on the tokens
that were sampled, the closing EOS among them: it is an action like the others and carries the score. Outside the mask
every result is 0 and every argument may hold anything.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.objectives import masked
from rlhf_jax.objectives.kl import Estimator, token_kl


def shaped_score(
    score: jax.Array,
    ended: jax.Array,
    mask: jax.Array,
    *,
    missing_eos: Literal["penalty", "replace"] = "penalty",
    missing_eos_penalty: float = 0.0,
    overlong_tokens: int = 0,
    overlong_penalty: float = 1.0,
) -> jax.Array:
    """The score of each answer with the rules for answers that are cut at the length limit, or near it; [B] float32.

    score [B]; ended [B] bool, whether the answer ended by EOS. A cut answer has `missing_eos_penalty` subtracted
    ("penalty"), or has the score -missing_eos_penalty ("replace", which TRL calls missing_eos_penalty of a score).
    With L = T - overlong_tokens, an answer of n > L tokens loses overlong_penalty (n - L) / overlong_tokens: nothing
    at L, all of it at the limit T. Source of the latter: Yu et al. 2025 (DAPO, arXiv 2503.14476), eq. 13.
    """
    score = jnp.asarray(score, jnp.float32)
    kept = jnp.where(ended, score, 0.0) if missing_eos == "replace" else score
    score = kept - missing_eos_penalty * ~ended
    if not overlong_tokens:
        return score
    over = jnp.asarray(mask, bool).sum(axis=1) - (mask.shape[1] - overlong_tokens)
    return score - overlong_penalty * jnp.clip(over / overlong_tokens, 0.0, 1.0)


def token_rewards(
    score: jax.Array,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: float | jax.Array,
    clip: float,
    estimator: Estimator = "k1",
    limit: float = 0.0,
) -> jax.Array:
    """r_t = -kl_coef k_t, plus clip(score, -clip, clip) at the last token of the mask.

    score [B]: the reward model's verdict on the whole answer. A row with an empty mask gets no score. k_t is
    `token_kl`, by default log pi_t - log ref_t; kl_coef may be a float32 scalar array.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, spread over tokens as in Ouyang et al. 2022 (arXiv
    2203.02155), eq. 2; the clip of the score is DeepSpeed-Chat's.
    """
    mask = jnp.asarray(mask, bool)
    to_come = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    bounded = jnp.clip(jnp.asarray(score, jnp.float32), -clip, clip)[:, None]
    penalty = token_kl(logprobs, ref_logprobs, mask, estimator=estimator, limit=limit)
    return jnp.where(mask & (to_come == 1), bounded, 0.0) - kl_coef * penalty


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Advantages A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t, and returns A_t + V_t.

    t + 1 is the next token of the mask; after the last one V and A are 0, whether it is an EOS or the length limit.
    The advantages are not whitened: `masked.whiten` does that. Both results [B, T] float32.
    Source: Schulman et al. 2016 (GAE, arXiv 1506.02438), eq. 16; recursion of Schulman et al. 2017 (PPO, arXiv
    1707.06347), eqs. 11 and 12.
    """
    mask = jnp.asarray(mask, bool)
    rewards, values = masked.zero_outside(rewards, mask), masked.zero_outside(values, mask)

    def step(following: tuple[jax.Array, jax.Array], token: tuple[jax.Array, jax.Array, jax.Array]):
        next_value, next_advantage = following
        reward, value, real = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        here = (jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage))
        return here, jnp.where(real, advantage, 0.0)

    nothing = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(step, (nothing, nothing), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float,
    clip_high: float = 0.0,
    dual_clip: float = 0.0,
) -> jax.Array:
    """L = mean_t max(-A_t w_t, -A_t clip(w_t, 1 - clip, 1 + clip_high)), w_t = pi_t / pi_old_t; a float32 scalar.

    The mean is over the tokens of the mask, all rows together. clip_high 0 is `clip`. With a dual clip c > 1 a token
    of negative A_t adds at most -c A_t, whatever its ratio.
    Source: Schulman et al. 2017 (PPO, arXiv 1707.06347), eq. 7, with the sign turned so that it is minimised;
    clip_high: Yu et al. 2025 (DAPO, arXiv 2503.14476), eq. 10; dual clip: Ye et al. 2020 (arXiv 1912.09729), eq. 8.
    """
    free, clipped, most = _policy_terms(logprobs, old_logprobs, advantages, mask, clip, clip_high, dual_clip)
    return masked.mean(jnp.minimum(jnp.maximum(free, clipped), most), mask)


def policy_clip_fraction(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float,
    clip_high: float = 0.0,
    dual_clip: float = 0.0,
) -> jax.Array:
    """Share of the tokens on which the clips of `policy_loss` take the gradient away; a float32 scalar."""
    free, clipped, most = _policy_terms(logprobs, old_logprobs, advantages, mask, clip, clip_high, dual_clip)
    return masked.mean((clipped > free) | (free > most), mask)


def _policy_terms(
    logprobs, old_logprobs, advantages, mask, clip: float, clip_high: float, dual_clip: float
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """[B, N] each: a token's loss without a clip, with the clip of its ratio, and the most that it may be."""
    ratio, gain = policy_ratio(logprobs, old_logprobs, mask), masked.zero_outside(advantages, mask)
    most = jnp.where(gain < 0, -dual_clip * gain, jnp.inf) if dual_clip else jnp.inf
    return -gain * ratio, -gain * jnp.clip(ratio, 1.0 - clip, 1.0 + (clip_high or clip)), most


def policy_ratio(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """w_t = pi_t / pi_old_t, [B, T] float32; 1 outside the mask."""
    return jnp.exp(masked.zero_outside(logprobs, mask) - masked.zero_outside(old_logprobs, mask))


def mismatch_weights(
    logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    mask: jax.Array,
    *,
    level: Literal["token", "sequence"],
    limit: float,
) -> jax.Array:
    """min(pi_t / mu_t, limit): weights of tokens that were sampled from mu and train pi; [B, T] float32, 0 outside.

    Both policies have the same weights, and differ in how they are computed (dtype, kernels, sharding).
    level: "token" takes the ratio of each token, "sequence" for all tokens the product over their answer.
    To be multiplied with the advantages. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training" (truncated importance sampling); Espeholt et al. 2018 (IMPALA, arXiv 1802.01561).
    """
    log_ratio = masked.zero_outside(logprobs, mask) - masked.zero_outside(sampler_logprobs, mask)
    if level == "sequence":
        log_ratio = log_ratio.sum(axis=1, keepdims=True) * jnp.ones_like(log_ratio)
    # The limit is applied to the logarithm, so that a long answer does not overflow.
    return masked.zero_outside(jnp.exp(jnp.minimum(log_ratio, jnp.log(limit))), mask)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float
) -> jax.Array:
    """L = 1/2 mean_t max((V_t - G_t)^2, (clip(V_t, V_old_t - clip, V_old_t + clip) - G_t)^2); a float32 scalar.

    Source: the clipped value loss of OpenAI's baselines (`ppo2`), detail 9 of "The 37 Implementation Details of PPO"
    (Huang et al. 2022); factor 1/2 and mean over the tokens of the mask as in DeepSpeed-Chat.
    """
    return 0.5 * masked.mean(jnp.maximum(*_value_terms(values, old_values, returns, mask, clip)), mask)


def value_clip_fraction(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float
) -> jax.Array:
    """Share of the tokens on which the clip of `value_loss` takes the gradient away; a float32 scalar."""
    free, clipped = _value_terms(values, old_values, returns, mask, clip)
    return masked.mean(clipped > free, mask)


def _value_terms(values, old_values, returns, mask, clip: float) -> tuple[jax.Array, jax.Array]:
    values, old_values, returns = (masked.zero_outside(x, mask) for x in (values, old_values, returns))
    bounded = jnp.clip(values, old_values - clip, old_values + clip)
    return jnp.square(values - returns), jnp.square(bounded - returns)


def approximate_kl(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(old || new) per token, estimated on tokens sampled from old: mean_t (w_t - 1) - log w_t; a float32 scalar.

    w_t = pi_t / pi_old_t. Unbiased, and never negative.
    Source: k3 of Schulman 2020, "Approximating KL Divergence".
    """
    return masked.mean(token_kl(old_logprobs, logprobs, mask, estimator="k3"), mask)


def sequence_kl(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(pi || ref) of each whole answer, estimated on the one sampled: sum_t log pi_t - log ref_t; [B] float32.

    May be negative for one answer; its mean is unbiased. Source: k1 of Schulman 2020, "Approximating KL Divergence".
    """
    return token_kl(logprobs, ref_logprobs, mask).sum(axis=1)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - Var(G - V) / Var(G) over the tokens of the mask, a float32 scalar: 1 is a perfect critic, 0 a constant one.

    0 where all returns are equal, since then nothing is there to explain.
    Source: `explained_variance` of OpenAI's baselines.
    """
    error = masked.zero_outside(returns, mask) - masked.zero_outside(values, mask)
    total = masked.var(returns, mask)
    return jnp.where(total > 1e-12, 1.0 - masked.var(error, mask) / jnp.maximum(total, 1e-12), 0.0)
