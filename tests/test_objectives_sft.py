import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import sft

# Three positions with target probabilities 1/2, 1/4 and 1/8; the last position has no loss.
LOGITS = jnp.log(
    jnp.array(
        [
            [[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]],
            [[0.5, 0.375, 0.125], [0.8, 0.1, 0.1]] + [[1 / 3] * 3],
        ]
    )
)
TARGETS = jnp.array([[0, 1, 2], [2, 0, 0]])
MASK = jnp.array([[True, True, False], [True, False, False]])


def test_the_loss_is_the_mean_over_tokens_not_over_rows():
    # (log 2 + log 4 + log 8) / 3; the mean of the two rows' means would be 2.25 log 2
    assert sft.next_token_loss(LOGITS, TARGETS, MASK).item() == pytest.approx(2 * 0.6931472)


def test_the_gradient_is_probability_minus_one_hot_over_the_number_of_tokens():
    gradient = jax.grad(sft.next_token_loss)(LOGITS, TARGETS, MASK)
    want = np.zeros((2, 3, 3))
    want[0, 0] = [-0.5, 0.25, 0.25]
    want[0, 1] = [0.5, -0.75, 0.25]
    want[1, 0] = [0.5, 0.375, -0.875]
    np.testing.assert_allclose(gradient, want / 3, atol=1e-7)


def test_an_empty_mask_gives_0_with_a_gradient_of_0():
    loss, gradient = jax.value_and_grad(sft.next_token_loss)(LOGITS, TARGETS, jnp.zeros_like(MASK))
    assert loss.item() == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(LOGITS))


def test_masked_logits_and_targets_do_not_change_the_loss():
    keep = MASK[..., None]
    loss, gradient = jax.value_and_grad(sft.next_token_loss)(LOGITS, TARGETS, MASK)
    other = jax.value_and_grad(sft.next_token_loss)(jnp.where(keep, LOGITS, 7e3), jnp.where(MASK, TARGETS, 1), MASK)
    assert loss.item() == other[0].item()
    np.testing.assert_array_equal(gradient, other[1])


def test_bfloat16_logits_give_a_float32_loss():
    loss = sft.next_token_loss(jnp.zeros((1, 1, 4), jnp.bfloat16), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))
    assert loss.dtype == jnp.float32 and loss.item() == pytest.approx(1.3862944)
