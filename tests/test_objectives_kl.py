"""Estimators of the KL divergence, its loss, the adaptive coefficient, and moments of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.kl import adapt_coefficient, kl_loss, token_kl
from rlhf_jax.objectives.moments import add_moments, no_moments

# Rows: a full answer, one that ended on its second token, one of a single token, one without any token.
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


def estimate_by_loop(logprobs, ref_logprobs, estimator, limit):
    """The estimates token by token in float64, and 0 outside the mask."""
    found = np.zeros(MASK.shape)
    for b, t in zip(*MASK.nonzero(), strict=True):
        x = float(logprobs[b, t]) - float(ref_logprobs[b, t])
        found[b, t] = {"k1": x, "k2": x * x / 2, "k3": np.exp(-x) - 1 + x}[estimator]
        if limit:
            found[b, t] = min(max(found[b, t], -limit), limit)
    return found


@pytest.mark.parametrize("limit", [0.0, 0.4])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_of_each_token_equals_a_loop_over_ragged_answers(rng, estimator, limit):
    logprobs, ref_logprobs = (np.where(MASK, rng.normal(size=MASK.shape), np.nan).astype(np.float32) for _ in range(2))
    found = token_kl(logprobs, ref_logprobs, MASK, estimator=estimator, limit=limit)
    np.testing.assert_allclose(found, estimate_by_loop(logprobs, ref_logprobs, estimator, limit), rtol=1e-5, atol=1e-6)


POLICY, OLD, REF = (np.log(np.array(p, np.float32)) for p in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.25, 0.25, 0.5]))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_loss_has_the_gradient_of_the_kl_in_expectation_over_tokens_of_the_old_policy(estimator):
    """Tokens are enumerated, and each weighs by its probability under the policy that sampled it."""

    def expected_loss(logits):
        logprobs = jax.nn.log_softmax(logits)
        each = [
            kl_loss(*(x.reshape(1, 1) for x in (logprobs[v], OLD[v], REF[v])), np.ones((1, 1)), estimator=estimator)
            for v in range(3)
        ]
        return (jnp.exp(OLD) * jnp.stack(each)).sum()

    def kl(logits):
        logprobs = jax.nn.log_softmax(logits)
        return (jnp.exp(logprobs) * (logprobs - REF)).sum()

    np.testing.assert_allclose(jax.grad(expected_loss)(POLICY), jax.grad(kl)(POLICY), rtol=1e-5)
    if estimator != "k2":
        assert float(expected_loss(POLICY)) == pytest.approx(float(kl(POLICY)), rel=1e-5)


def test_an_iteration_without_any_token_has_a_kl_loss_and_a_gradient_of_zero():
    x, nothing = np.full((2, 3), np.nan, np.float32), np.zeros((2, 3), bool)
    loss, gradient = jax.value_and_grad(kl_loss)(x, x, x, nothing)
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)])
def test_the_coefficient_rises_above_the_target_and_falls_below_it_by_at_most_two_percent(kl, factor):
    assert adapt_coefficient(jnp.float32(0.2), jnp.float32(kl), target=6.0) == pytest.approx(0.2 * factor, rel=1e-5)


def test_moments_of_three_batches_equal_those_of_all_numbers(rng):
    batches, seen = [rng.normal(3.0, 2.0, size).astype(np.float32) for size in (5, 1, 11)], no_moments()
    for batch in batches:
        seen = add_moments(seen, batch)
    together = np.concatenate(batches)
    found = [float(x) for x in (seen.count, seen.mean, seen.std)]
    np.testing.assert_allclose(found, [17, together.mean(), together.std()], rtol=1e-5)
    assert no_moments().std == 1.0 and add_moments(no_moments(), np.float32([2.0])).std == 1.0
