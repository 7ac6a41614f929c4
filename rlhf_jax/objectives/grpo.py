"""Policy gradients from several answers to each prompt, without a critic: GRPO and its relatives.

B answers of T tokens, [B, T] float32 unless said otherwise; the G answers to a prompt, a group, are adjacent rows.
`mask` [B, T] is true on the tokens that were sampled, as in `ppo.py`; outside it every result is 0 and every argument
may hold anything.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.objectives import masked

Advantage = Literal["group_std", "group_mean", "batch_std", "leave_one_out", "global"]
Ratio = Literal["token", "sequence", "product"]
Scale = Literal["token", "sequence", "constant"]
EPS = 1e-4  # added to standard deviations, as TRL does


def group_advantages(scores: jax.Array, group: int, kind: Advantage) -> jax.Array:
    """The advantage of each answer from the scores [B] of all, [B] float32; std is over n - 1. 0 in groups of one.

    group_std      (r - mean of the group) / (std of the group + EPS): Shao et al. 2024 (GRPO, arXiv 2402.03300), 4.1
    group_mean     r - mean of the group: Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783), section 3.2
    batch_std      (r - mean of the group) / (std of all + EPS): Hu et al. 2025 (REINFORCE++-baseline)
    leave_one_out  r - mean of the others of the group: Ahmadian et al. 2024 (RLOO, arXiv 2402.14740), eq. 7
    global         (r - mean of all) / (std of all + EPS): Hu et al. 2025 (REINFORCE++, arXiv 2501.03262)
    """
    scores = jnp.asarray(scores, jnp.float32)
    groups = scores.reshape(-1, group)
    if kind == "global":
        return (scores - scores.mean()) / (scores.std(ddof=1) + EPS)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if group == 1:
        return centred.reshape(-1)
    if kind == "group_std":
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + EPS)
    elif kind == "batch_std":
        centred = centred / (scores.std(ddof=1) + EPS)
    elif kind == "leave_one_out":  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)
        centred = centred * (group / (group - 1))
    return centred.reshape(-1)


def has_signal(scores: jax.Array, group: int) -> jax.Array:
    """[B / G] bool: whether the answers of a group have different scores [B], so that one is better than another."""
    groups = jnp.asarray(scores, jnp.float32).reshape(-1, group)
    return groups.max(axis=1) - groups.min(axis=1) > 1e-6


def log_ratios(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array, kind: Ratio) -> jax.Array:
    """log w of every token, [B, T].

    token     log pi_t - log pi_old_t
    sequence  the mean of those over the answer: Zheng et al. 2025 (GSPO, arXiv 2507.18071), eq. 7
    product   their sum, the ratio of the whole answer: Ahmadian et al. 2024 (RLOO), with TRL's clipping
    """
    each = masked.zero_outside(logprobs, mask) - masked.zero_outside(old_logprobs, mask)
    if kind == "token":
        return each
    total = each.sum(axis=1, keepdims=True)
    if kind == "sequence":
        total = total / jnp.maximum(jnp.asarray(mask).sum(axis=1, keepdims=True), 1)
    return jnp.broadcast_to(total, each.shape)


def clipped_losses(log_ratio: jax.Array, advantages: jax.Array, *, low: float, high: float) -> jax.Array:
    """max(-A w, -A clip(w, 1 - low, 1 + high)) of every token, [B, T].

    Source: Schulman et al. 2017 (PPO, arXiv 1707.06347), eq. 7; a `high` above `low` is the clip-higher of Yu et al.
    2025 (DAPO, arXiv 2503.14476), eq. 10.
    """
    ratio = jnp.exp(log_ratio)
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - low, 1.0 + high))


def cispo_losses(log_ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array, *, high: float) -> jax.Array:
    """-min(w, 1 + high) A log pi of every token, [B, T], with a weight w that has no gradient.

    Source: MiniMax 2025 (CISPO, arXiv 2506.13585), eqs. 4 and 5, without a lower bound, as there.
    """
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), 1.0 + high))
    return -weight * advantages * logprobs


def is_clipped(log_ratio: jax.Array, advantages: jax.Array, *, low: float, high: float) -> jax.Array:
    """[B, T] bool: the tokens whose gradient `clipped_losses` takes away."""
    ratio = jnp.exp(log_ratio)
    return ((ratio < 1.0 - low) & (advantages < 0)) | ((ratio > 1.0 + high) & (advantages > 0))


def kl_losses(logprobs: jax.Array, old_logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """w (e^-x - 1 + x) of every token, x = log pi - log ref and w = pi / pi_old, [B, T].

    Its value is k3 of Schulman 2020; with the factor w, whose gradient counts, its gradient w x d log pi is that of
    KL(pi || ref). Source: DeepSeek-AI 2025 (DeepSeek-V3.2, arXiv 2512.02556), section 3.1.
    """
    now, old, ref = (masked.zero_outside(x, mask) for x in (logprobs, old_logprobs, ref_logprobs))
    return jnp.exp(now - old) * (jnp.expm1(ref - now) + now - ref)


def scaled_mean(losses: jax.Array, mask: jax.Array, scale: Scale, *, length: int) -> tuple[jax.Array, jax.Array]:
    """The losses [B, T] as one float32 scalar, and the weight of that mean among those of other answers.

    token     the sum / all tokens of the mask: DAPO, eq. 8; the weight is the number of tokens
    sequence  the mean over answers of the mean over their tokens: GRPO, eq. 3; the weight is B
    constant  the sum / (B length): Dr. GRPO, listing 1, where `length` is the longest possible answer; the weight is B
    """
    losses, mask = masked.zero_outside(losses, mask), jnp.asarray(mask)
    counts, rows = mask.sum(axis=1), jnp.asarray(losses.shape[0])
    if scale == "token":
        return losses.sum() / jnp.maximum(counts.sum(), 1), counts.sum()
    if scale == "sequence":
        return (losses.sum(axis=1) / jnp.maximum(counts, 1)).mean(), rows
    return losses.sum() / (losses.shape[0] * length), rows
