import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import preference


def test_pairwise_loss_of_two_pairs_equals_hand_arithmetic():
    # -log sigmoid(log 3) = log(4/3); -log sigmoid(0) = log 2
    loss = preference.pairwise_loss(jnp.array([1.0986123, 2.0]), jnp.array([0.0, 2.0]))
    assert loss.item() == pytest.approx((0.2876821 + 0.6931472) / 2, rel=1e-6)


def test_pairwise_loss_is_stable_at_margins_of_a_thousand():
    chosen = jnp.array([1000.0, -1000.0])
    loss, gradient = jax.value_and_grad(preference.pairwise_loss)(chosen, jnp.zeros(2))
    assert loss.item() == 500.0
    np.testing.assert_array_equal(gradient, [0.0, -0.5])


def test_pairwise_gradient_is_minus_the_probability_of_the_wrong_order():
    gradients = jax.grad(preference.pairwise_loss, (0, 1))(jnp.array([1.0986123]), jnp.array([0.0]))
    np.testing.assert_allclose(gradients, [[-0.25], [0.25]], rtol=1e-6)


def test_pairwise_loss_depends_only_on_the_difference():
    chosen, rejected = jnp.array([0.5, -1.0]), jnp.array([0.25, 1.0])
    assert preference.pairwise_loss(chosen + 8, rejected + 8) == preference.pairwise_loss(chosen, rejected)


def test_dpo_loss_equals_hand_arithmetic():
    # margin = 0.1 ((-10 + 12) - (-20 + 11)) = 1.1, and 0.1 ((-5 + 5) - (-7 + 7)) = 0
    arguments = jnp.array([[-10.0, -5.0], [-20.0, -7.0], [-12.0, -5.0], [-11.0, -7.0]])
    loss = preference.dpo_loss(*arguments, beta=0.1, label_smoothing=0.0)
    assert loss.item() == pytest.approx((0.2873351 + 0.6931472) / 2, rel=1e-6)
    # smoothing adds share * margin, since -log sigmoid(-d) = -log sigmoid(d) + d
    smoothed = preference.dpo_loss(*arguments, beta=0.1, label_smoothing=0.2)
    assert smoothed.item() - loss.item() == pytest.approx(0.2 * 1.1 / 2, rel=1e-5)


def test_dpo_loss_of_the_reference_itself_is_log_2_for_any_smoothing():
    logprobs = jnp.array([[-3.0], [-4.0], [-3.0], [-4.0]])
    for share in (0.0, 0.3):
        assert preference.dpo_loss(*logprobs, beta=0.5, label_smoothing=share).item() == pytest.approx(0.6931472)


def test_dpo_gradient_is_beta_times_the_probability_of_the_wrong_order():
    # margin = log 3 when beta is 0.5, so that order is wrong with probability 1/4
    arguments = [jnp.array([x]) for x in (2 * 1.0986123, 0.0, 0.0, 0.0)]
    gradients = jax.grad(preference.dpo_loss, (0, 1))(*arguments, beta=0.5, label_smoothing=0.0)
    np.testing.assert_allclose(gradients, [[-0.125], [0.125]], rtol=1e-6)


def test_losses_of_bfloat16_scores_are_float32():
    half = jnp.ones(3, jnp.bfloat16)
    assert preference.pairwise_loss(half, half).dtype == jnp.float32
    assert preference.dpo_loss(half, half, half, half, beta=0.1, label_smoothing=0.0).dtype == jnp.float32


def test_smoothing_and_centring_add_their_terms_to_the_pairwise_loss():
    chosen, rejected = jnp.array([1.0986123, 2.0]), jnp.array([0.0, 1.0])
    plain = preference.pairwise_losses(chosen, rejected, 0.0, 0.0)
    # -log sigmoid(-d) = -log sigmoid(d) + d
    smoothed = preference.pairwise_losses(chosen, rejected, 0.2, 0.0)
    np.testing.assert_allclose(smoothed - plain, [0.2 * 1.0986123, 0.2 * 1.0], rtol=1e-5)
    centred = preference.pairwise_losses(chosen, rejected, 0.0, 0.01)
    np.testing.assert_allclose(centred - plain, [0.01 * 1.0986123**2, 0.01 * 9.0], rtol=1e-4)
