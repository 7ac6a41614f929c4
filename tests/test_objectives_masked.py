import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import masked

X = jnp.array([[1.0, 2.0, 900.0], [6.0, -900.0, 900.0]])
MASK = jnp.array([[True, True, False], [True, False, False]])


def test_mean_and_variance_of_1_2_6():
    assert masked.mean(X, MASK).item() == 3.0
    assert masked.var(X, MASK).item() == pytest.approx(14 / 3)  # (4 + 1 + 9) / 3


def test_whitened_1_2_6_has_mean_0_and_variance_1():
    whitened = masked.whiten(X, MASK)
    np.testing.assert_allclose(whitened, [[-0.9258201, -0.4629100, 0.0], [1.3887301, 0.0, 0.0]], rtol=1e-6)


def test_whitening_equal_entries_gives_zeros():
    np.testing.assert_array_equal(masked.whiten(jnp.full((1, 4), 3.0), jnp.ones((1, 4), bool)), np.zeros((1, 4)))


@pytest.mark.parametrize("statistic", [masked.mean, masked.var])
def test_an_empty_mask_gives_0_with_a_gradient_of_0(statistic):
    value, gradient = jax.value_and_grad(statistic)(X, jnp.zeros_like(MASK))
    assert value.item() == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(X))


def test_one_entry_has_variance_0_and_whitens_to_0():
    mask = jnp.zeros_like(MASK).at[1, 0].set(True)
    assert masked.mean(X, mask).item() == 6.0
    assert masked.var(X, mask).item() == 0.0
    np.testing.assert_array_equal(masked.whiten(X, mask), np.zeros_like(X))


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_values_outside_the_mask_affect_neither_value_nor_gradient(junk):
    def loss(x):
        return masked.var(x, MASK) + masked.mean(x, MASK) + (masked.whiten(x, MASK) ** 3).sum()

    value, gradient = jax.value_and_grad(loss)(X)
    other_value, other_gradient = jax.value_and_grad(loss)(jnp.where(MASK, X, junk))
    assert value.item() == other_value.item()
    np.testing.assert_array_equal(gradient, other_gradient)
    np.testing.assert_array_equal(gradient[~MASK], np.zeros(3))


def test_sums_over_bfloat16_are_float32():
    x = jnp.ones((1, 1000), jnp.bfloat16)  # a bfloat16 sum of ones stops at 256
    assert masked.mean(x, jnp.ones((1, 1000), bool)).item() == 1.0
    assert masked.mean(x, x).dtype == jnp.float32
