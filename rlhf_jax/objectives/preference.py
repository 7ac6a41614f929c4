"""Learning from pairs of answers of which one was preferred. Every array is [B], one entry a pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pairwise_loss(chosen_scores: jax.Array, rejected_scores: jax.Array) -> jax.Array:
    """L = -mean_b log sigmoid(r_chosen - r_rejected), a float32 scalar.

    chosen_scores, rejected_scores [B]: the reward of each whole answer, one number a sequence.
    Source: Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1, with K = 2 answers a prompt.
    """
    margin = jnp.asarray(chosen_scores, jnp.float32) - jnp.asarray(rejected_scores, jnp.float32)
    return -jax.nn.log_sigmoid(margin).mean()


def dpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    *,
    beta: float,
    label_smoothing: float,
) -> jax.Array:
    """L = -mean_b [(1 - s) log sigmoid(d) + s log sigmoid(-d)], a float32 scalar, with

    d = beta ((log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))) and s = label_smoothing,
    the share of the labels taken to be wrong. Each argument [B]: log-probability of the whole answer, summed over its
    tokens.
    Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290), eq. 7; smoothing as in Mitchell 2023, "A note on DPO with
    noisy preferences".
    """
    chosen = jnp.asarray(policy_chosen, jnp.float32) - jnp.asarray(ref_chosen, jnp.float32)
    rejected = jnp.asarray(policy_rejected, jnp.float32) - jnp.asarray(ref_rejected, jnp.float32)
    margin = beta * (chosen - rejected)
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -((1.0 - label_smoothing) * right + label_smoothing * wrong).mean()
