"""Supervised fine-tuning: cross-entropy of the next token."""

from __future__ import annotations

import jax

from rlhf_jax.objectives import logprobs, masked


def nll(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """L = -sum_bt m_bt log p(y_bt) / sum_bt m_bt, a float32 scalar; 0 for an empty mask.

    logprobs [B, T] of the token that follows each position; mask [B, T], true where that token is to be learned. The
    mean is over tokens, not over rows: a long answer weighs more than a short one.
    Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1, per token.
    """
    return -masked.mean(logprobs, mask)


def next_token_loss(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """`nll` from logits [B, T, V] of any float dtype and targets [B, T] int, the token that follows each position."""
    return nll(logprobs.from_logits(logits, targets)[0], mask)
