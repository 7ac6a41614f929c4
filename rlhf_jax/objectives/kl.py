"""The KL divergence from a reference, estimated on the tokens that were sampled.

Arrays are [B, T] float32 unless said otherwise, with `mask` [B, T] as in `ppo.py`. With x = log pi_t - log ref_t of a
token sampled from pi, the estimators are

    k1 = x          unbiased; negative for some tokens
    k2 = x^2 / 2    biased, with the gradient of the KL
    k3 = e^-x - 1 + x    unbiased, never negative; its own gradient is not that of the KL

Source: Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.objectives import masked

Estimator = Literal["k1", "k2", "k3"]


def token_kl(
    logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array, *, estimator: Estimator = "k1", limit: float = 0.0
) -> jax.Array:
    """The estimate of each token, clipped to [-limit, limit] if `limit` is positive; [B, T] float32, 0 outside mask.

    The clip bounds what one improbable token costs, as verl does with a limit of 10.
    """
    log_ratio = masked.zero_outside(logprobs, mask) - masked.zero_outside(ref_logprobs, mask)
    if estimator == "k2":
        estimate = 0.5 * jnp.square(log_ratio)
    elif estimator == "k3":
        estimate = jnp.expm1(-log_ratio) + log_ratio
    else:
        estimate = log_ratio
    return jnp.clip(estimate, -limit, limit) if limit else estimate


def kl_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    *,
    estimator: Estimator = "k1",
    limit: float = 0.0,
) -> jax.Array:
    """mean_t w_t k_t, w_t = pi_t / pi_old_t, with the unbiased gradient of the KL; a float32 scalar.

    The gradient is mean_t w_t x_t d log pi_t, x_t = log pi_t - log ref_t clipped to +-limit, for every estimator: over
    tokens sampled from pi_old its expectation is the gradient of KL(pi || ref) at these prefixes.
    Source: Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL" (arXiv 2506.09477),
    section 4, with the importance weight for several updates per rollout.
    """
    now = masked.zero_outside(logprobs, mask)
    ratio = jax.lax.stop_gradient(jnp.exp(now - masked.zero_outside(old_logprobs, mask)))
    slope = jax.lax.stop_gradient(token_kl(logprobs, ref_logprobs, mask, limit=limit))
    value = jax.lax.stop_gradient(token_kl(logprobs, ref_logprobs, mask, estimator=estimator, limit=limit))
    # now - stop_gradient(now) is 0 and has the gradient of `now`.
    return masked.mean(ratio * (value + slope * (now - jax.lax.stop_gradient(now))), mask)


def adapt_coefficient(coefficient: jax.Array, kl: jax.Array, *, target: float, gain: float = 0.1) -> jax.Array:
    """beta (1 + gain e), e = clip(KL / target - 1, -0.2, 0.2): the next coefficient, a float32 scalar.

    kl []: mean over the answers of an iteration, of whole answers. Source: Ziegler et al. 2019 (arXiv 1909.08593),
    section 2.2, with their gain K_beta = 0.1.
    """
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coefficient, jnp.float32) * (1.0 + gain * error)
