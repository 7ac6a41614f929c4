"""Learning from pairs and rankings of answers. Every array is [B], one entry a pair, unless said otherwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.objectives.masked import zero_outside


def pairwise_loss(chosen_scores: jax.Array, rejected_scores: jax.Array) -> jax.Array:
    """L = -mean_b log sigmoid(r_chosen - r_rejected), a float32 scalar.

    chosen_scores, rejected_scores [B]: the reward of each whole answer, one number a sequence.
    Source: Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1, with K = 2 answers a prompt.
    """
    return pairwise_losses(chosen_scores, rejected_scores, 0.0, 0.0).mean()


def pairwise_losses(
    chosen_scores: jax.Array,
    rejected_scores: jax.Array,
    label_smoothing: float,
    centring: float,
    wanted: jax.Array | float = 0.0,
) -> jax.Array:
    """`smoothed_logistic_loss` of r_chosen - r_rejected - m, plus centring (r_chosen + r_rejected)^2; float32.

    Arrays of one shape. `wanted`: m, how much better the chosen answer should score. Source: Touvron et al. 2023 (Llama
    2, arXiv 2307.09288), eq. 2. The pairs' order leaves a constant of all scores free; the second term keeps their mean
    near 0. Source: Eisenstein et al. 2023 (arXiv 2312.09244), section 2, as TRL's center_rewards_coefficient.
    """
    margin = pair_margin(chosen_scores, rejected_scores) - wanted
    total = jnp.asarray(chosen_scores, jnp.float32) + jnp.asarray(rejected_scores, jnp.float32)
    return smoothed_logistic_loss(margin, label_smoothing) + centring * jnp.square(total)


def ranking_pairs(values: jax.Array, given: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`values` [B, K] of both answers of each of the K (K - 1) / 2 pairs, and whether one is better; [B, P] each.

    given: [B, K], descending, the scores that rank the answers; NaN where there is no answer. P pairs (i, j), i < j, of
    which the first is the better one where given[i] > given[j].
    """
    first, second = np.triu_indices(given.shape[1], 1)
    return values[:, first], values[:, second], given[:, first] > given[:, second]


def mean_of_rankings(each: jax.Array, counts: jax.Array) -> jax.Array:
    """The mean over the B rankings, those without a pair left out, of the mean over their pairs; a float32 scalar.

    each, counts: [B, P] of every pair, and whether it counts. A prompt weighs the same whatever its number of answers:
    1 / C(K, 2) for each pair. Source: Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1.
    """
    number = counts.sum(axis=1)
    means = zero_outside(each, counts).sum(axis=1) / jnp.maximum(number, 1)
    return means.sum() / jnp.maximum((number > 0).sum(), 1)


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
    Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290), eq. 7; smoothing as `smoothed_logistic_loss`.
    """
    chosen, rejected = pair_margin(policy_chosen, ref_chosen), pair_margin(policy_rejected, ref_rejected)
    return smoothed_logistic_loss(beta * (chosen - rejected), label_smoothing).mean()


def pair_margin(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """chosen - rejected, [B] float32."""
    return jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32)


def smoothed_logistic_loss(margin: jax.Array, label_smoothing: float) -> jax.Array:
    """-[(1 - s) log sigmoid(d) + s log sigmoid(-d)] of each margin d, [B] float32; s = label_smoothing, the share of
    the labels taken to be wrong. Source: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    return -((1.0 - label_smoothing) * jax.nn.log_sigmoid(margin) + label_smoothing * jax.nn.log_sigmoid(-margin))


def hinge_loss(margin: jax.Array) -> jax.Array:
    """max(0, 1 - d) of each margin d = beta (log ratio of the chosen - log ratio of the rejected); [B] float32.

    Source: Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), with the policy's ratio to the reference as its score.
    """
    return jax.nn.relu(1.0 - jnp.asarray(margin, jnp.float32))


def ipo_loss(chosen: jax.Array, rejected: jax.Array, *, beta: float) -> jax.Array:
    """(h_chosen - h_rejected - 1 / (2 beta))^2 of each pair, [B] float32.

    chosen, rejected [B]: h, the mean over an answer's tokens of log pi - log ref.
    Source: Azar et al. 2023 (IPO, arXiv 2310.12036), eq. 17 with tau = beta. Its text sums over tokens; the mean is
    what its authors used (TRL's `DPOTrainer`), so that beta does not depend on the length of the answers.
    """
    return jnp.square(pair_margin(chosen, rejected) - 1.0 / (2.0 * beta))


def orpo_loss(chosen: jax.Array, rejected: jax.Array, *, beta: float) -> jax.Array:
    """-log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)) of each pair, [B] float32.

    chosen, rejected [B]: log p, the mean log-probability of an answer's tokens; odds = p / (1 - p).
    Source: Hong et al. 2024 (ORPO, arXiv 2403.07691), eqs. 6 and 7.
    """

    def log_odds(log_p: jax.Array) -> jax.Array:
        # log(1 - p) is -inf at p = 1, which no float32 mean of log-probabilities below 0 reaches.
        return log_p - jnp.log1p(-jnp.exp(jnp.minimum(log_p, -1e-7)))

    chosen, rejected = jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32)
    return -chosen - beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))
