"""Group advantages and policy losses against loops in plain Python, and gradients against finite differences."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.objectives import grpo

# Four answers of at most five tokens: all, one token, none, three.
LENGTHS, JUNK = [5, 1, 0, 3], 77.0
RNG = np.random.default_rng(0)
MASK = np.arange(5) < np.array(LENGTHS)[:, None]
NOW, OLD, REF = (np.where(MASK, RNG.normal(-2, 0.4, (4, 5)), JUNK).astype(np.float32) for _ in range(3))
ADVANTAGES = np.where(MASK, np.array([1.5, -0.5, 2.0, -1.0])[:, None], 0.0).astype(np.float32)
SCORES = [1.0, 0.0, 0.0, 1.0, 3.0, -1.0, 2.0, 2.0]  # two groups of four


def advantages_by_hand(scores, group, kind):
    found = []
    for start in range(0, len(scores), group):
        own = scores[start : start + group]
        for i, score in enumerate(own):
            others = own[:i] + own[i + 1 :]
            mean = {"global": statistics.mean(scores), "leave_one_out": statistics.mean(others)}.get(
                kind, statistics.mean(own)
            )
            std = {"group_std": own, "batch_std": scores, "global": scores}.get(kind)
            found.append((score - mean) / (statistics.stdev(std) + 1e-4 if std else 1.0))
    return found


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "batch_std", "leave_one_out", "global"])
def test_advantages_equal_a_loop_over_groups(kind):
    found = grpo.group_advantages(jnp.array(SCORES), 4, kind)
    np.testing.assert_allclose(found, advantages_by_hand(SCORES, 4, kind), rtol=1e-5, atol=1e-6)


def test_a_group_of_equal_scores_has_no_signal_and_advantages_of_0():
    scores = jnp.array([2.0, 2.0, 2.0, 1.0, 1.0, 0.0])
    assert grpo.has_signal(scores, 3).tolist() == [False, True]
    for kind in ("group_std", "group_mean", "batch_std", "leave_one_out"):
        assert grpo.group_advantages(scores, 3, kind)[:3].tolist() == [0.0, 0.0, 0.0]
        assert grpo.group_advantages(scores, 1, kind).tolist() == [0.0] * 6


def loss_by_hand(ratio, surrogate, scale, low=0.2, high=0.3, length=5):
    """The loss by loops over answers and tokens."""
    per_answer = []
    for now, old, advantages, n in zip(NOW, OLD, ADVANTAGES, LENGTHS, strict=True):
        each = [float(a) - float(b) for a, b in zip(now[:n], old[:n], strict=True)]
        logs = {"token": each, "sequence": [sum(each) / max(n, 1)] * n, "product": [sum(each)] * n}[ratio]
        losses = []
        for t, log in enumerate(logs):
            w, a = math.exp(log), float(advantages[t])
            if surrogate == "cispo":
                losses.append(-min(w, 1 + high) * a * float(now[t]))
            else:
                losses.append(-min(w * a, min(max(w, 1 - low), 1 + high) * a))
        per_answer.append(losses)
    if scale == "sequence":
        return sum(sum(losses) / max(len(losses), 1) for losses in per_answer) / len(per_answer)
    total = sum(map(sum, per_answer))
    return total / sum(LENGTHS) if scale == "token" else total / (len(per_answer) * length)


def loss_of(now, ratio="token", surrogate="clip", scale="token"):
    logs = grpo.log_ratios(now, OLD, MASK, ratio)
    if surrogate == "cispo":
        losses = grpo.cispo_losses(logs, jnp.where(MASK, now, 0.0), ADVANTAGES, high=0.3)
    else:
        losses = grpo.clipped_losses(logs, ADVANTAGES, low=0.2, high=0.3)
    return grpo.scaled_mean(losses, MASK, scale, length=5)


@pytest.mark.parametrize("scale", ["token", "sequence", "constant"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "product"])
def test_the_loss_of_ragged_answers_equals_a_loop_whatever_is_outside_the_mask(ratio, surrogate, scale):
    loss, weight = loss_of(jnp.asarray(NOW), ratio, surrogate, scale)
    assert loss.item() == pytest.approx(loss_by_hand(ratio, surrogate, scale), rel=1e-5)
    assert weight == (sum(LENGTHS) if scale == "token" else 4)
    gradient = jax.grad(lambda now: loss_of(now, ratio, surrogate, scale)[0])(jnp.asarray(NOW))
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[~MASK] == 0).all()


@pytest.mark.parametrize("ratio", ["token", "sequence", "product"])
def test_gradients_equal_finite_differences(ratio):
    check_grads(lambda now: loss_of(now, ratio)[0], (jnp.asarray(NOW),), 1, ["rev"], 2e-2, 2e-2)


def test_the_gradient_of_cispo_is_the_bounded_weight_times_that_of_the_log_probability():
    gradient = jax.grad(lambda now: loss_of(now, surrogate="cispo")[0])(jnp.asarray(NOW))
    weight = np.minimum(np.exp(np.where(MASK, NOW - OLD, 0)), 1.3)
    np.testing.assert_allclose(gradient, np.where(MASK, -weight * ADVANTAGES, 0) / sum(LENGTHS), rtol=1e-5)


def test_the_clip_takes_the_gradient_of_exactly_the_tokens_that_is_clipped_names():
    logs = grpo.log_ratios(jnp.asarray(NOW), OLD, MASK, "token")
    gradient = jax.grad(lambda now: loss_of(now)[0])(jnp.asarray(NOW))
    clipped = grpo.is_clipped(logs, ADVANTAGES, low=0.2, high=0.3) & MASK
    assert 0 < clipped.sum() < sum(LENGTHS)
    np.testing.assert_array_equal((np.asarray(gradient) == 0) & MASK, clipped)


def test_the_kl_loss_is_k3_times_the_ratio_with_the_gradient_of_the_kl():
    loss = lambda now: jnp.where(MASK, grpo.kl_losses(now, OLD, REF, MASK), 0).sum()  # noqa: E731
    w, x = np.exp(np.where(MASK, NOW - OLD, 0)), np.where(MASK, NOW - REF, 0)
    assert loss(jnp.asarray(NOW)).item() == pytest.approx((w * (np.exp(-x) - 1 + x)).sum(), rel=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(NOW)), w * x, rtol=1e-4, atol=1e-6)
