import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import masked, ppo

# Rows: a full answer, one that ended on its second token, one of a single token, one without any token.
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


@pytest.fixture
def draw(rng):
    return lambda: jnp.asarray(rng.normal(size=MASK.shape), jnp.float32)


# Rewards


def test_the_last_real_token_carries_the_clipped_score_and_every_token_pays_its_kl():
    logprobs = jnp.array([[-1.0, -2.0, -3.0, -1.0]] * 4)
    ref_logprobs = jnp.array([[-1.5, -2.0, -2.0, -4.0]] * 4)
    rewards = ppo.token_rewards(jnp.array([9.0, -1.0, -8.0, 3.0]), logprobs, ref_logprobs, MASK, kl_coef=0.1, clip=5.0)
    want = [
        [-0.05, 0.0, 0.1, 5.0 - 0.3],  # 9 is clipped to 5
        [-0.05, 0.0 - 1.0, 0.0, 0.0],  # the second token is the EOS
        [-0.05 - 5.0, 0.0, 0.0, 0.0],  # -8 is clipped to -5
        [0.0, 0.0, 0.0, 0.0],  # no token, no score
    ]
    np.testing.assert_allclose(rewards, want, rtol=1e-6, atol=1e-7)
    assert rewards.dtype == jnp.float32


def test_rewards_sum_to_the_score_minus_the_kl_of_the_answer(draw):
    logprobs, ref_logprobs, score = draw(), draw(), jnp.array([1.0, -2.0, 0.5, 4.0])
    rewards = ppo.token_rewards(score, logprobs, ref_logprobs, MASK, kl_coef=0.2, clip=5.0)
    kl = ppo.sequence_kl(logprobs, ref_logprobs, MASK)
    np.testing.assert_allclose(rewards.sum(1)[:3], (score - 0.2 * kl)[:3], rtol=1e-5)


# Advantages


def test_gae_of_two_tokens_equals_hand_arithmetic():
    rewards, values = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 1.0]])
    advantages, returns = ppo.gae(rewards, values, jnp.ones((1, 2), bool), gamma=0.9, lam=0.5)
    # d_2 = 2 - 1 = 1;  d_1 = 1 + 0.9 * 1 - 0.5 = 1.4;  A_1 = 1.4 + 0.45 * 1
    np.testing.assert_allclose(advantages, [[1.85, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[2.35, 2.0]], rtol=1e-6)


def test_gae_of_one_token_is_its_reward_minus_its_value():
    advantages, returns = ppo.gae(
        jnp.array([[3.0, 9.0]]), jnp.array([[1.0, 9.0]]), jnp.array([[True, False]]), gamma=0.9, lam=0.95
    )
    np.testing.assert_array_equal(advantages, [[2.0, 0.0]])
    np.testing.assert_array_equal(returns, [[3.0, 0.0]])


def test_with_gamma_and_lambda_1_the_return_is_the_sum_of_future_rewards(draw):
    rewards = draw()
    _, returns = ppo.gae(rewards, draw(), MASK, gamma=1.0, lam=1.0)
    to_come = np.cumsum(np.where(MASK, rewards, 0.0)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, np.where(MASK, to_come, 0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (0.0, 0.5)])
def test_gae_equals_the_sum_of_its_definition(draw, gamma, lam):
    """A_t = sum_l (gamma lam)^l d_{t+l} (eq. 16), written out for each token in float64."""
    rewards, values = draw(), draw()
    want = np.zeros(MASK.shape)
    for row, length in enumerate([4, 2, 1, 0]):
        r, v = np.float64(rewards[row, :length]), np.append(np.float64(values[row, :length]), 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        for t in range(length):
            want[row, t] = sum((gamma * lam) ** step * deltas[t + step] for step in range(length - t))
    advantages, returns = ppo.gae(rewards, values, MASK, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(MASK, want + values, 0.0), rtol=1e-5, atol=1e-6)


def test_gae_skips_masked_positions_between_tokens(draw):
    rewards, values = draw()[:1], draw()[:1]
    closed = ppo.gae(rewards[:, [0, 1, 3]], values[:, [0, 1, 3]], jnp.ones((1, 3), bool), gamma=0.9, lam=0.8)
    holed = ppo.gae(rewards, values, jnp.array([[True, True, False, True]]), gamma=0.9, lam=0.8)
    for one, other in zip(closed, holed, strict=True):
        np.testing.assert_allclose(one, other[:, [0, 1, 3]], rtol=1e-6)
        assert other[0, 2] == 0.0


def test_gae_does_not_whiten():
    advantages, _ = ppo.gae(jnp.full((1, 1), 7.0), jnp.zeros((1, 1)), jnp.ones((1, 1), bool), gamma=1.0, lam=1.0)
    assert advantages.item() == 7.0


# Losses

# Ratios 1.5, 0.5, 1.1 and 1.5 against advantages 1, 1, -2 and -1, clipped to [0.8, 1.2].
RATIOS = jnp.array([[1.5, 0.5], [1.1, 1.5]])
ADVANTAGES = jnp.array([[1.0, 1.0], [-2.0, -1.0]])
WHOLE = jnp.ones((2, 2), bool)


def test_policy_loss_of_four_ratios_equals_hand_arithmetic():
    old = jnp.full((2, 2), -1.0)
    loss = ppo.policy_loss(old + jnp.log(RATIOS), old, ADVANTAGES, WHOLE, clip=0.2)
    assert loss.item() == pytest.approx((-1.2 - 0.5 + 2.2 + 1.5) / 4, rel=1e-6)
    fraction = ppo.policy_clip_fraction(old + jnp.log(RATIOS), old, ADVANTAGES, WHOLE, clip=0.2)
    assert fraction.item() == 0.25  # only the first, whose ratio is already beyond the clip


def test_policy_gradient_is_zero_exactly_where_the_clip_is_active():
    old = jnp.full((2, 2), -1.0)
    gradient = jax.grad(ppo.policy_loss)(old + jnp.log(RATIOS), old, ADVANTAGES, WHOLE, clip=0.2)
    np.testing.assert_allclose(gradient, [[0.0, -0.5 / 4], [2.2 / 4, 1.5 / 4]], rtol=1e-5)


def test_before_the_first_update_the_gradient_is_the_plain_policy_gradient(draw):
    logprobs, advantages = draw(), draw()
    loss, gradient = jax.value_and_grad(ppo.policy_loss)(logprobs, logprobs, advantages, MASK, clip=0.2)
    assert loss.item() == pytest.approx(-masked.mean(advantages, MASK).item(), rel=1e-5)
    np.testing.assert_allclose(gradient, np.where(MASK, -advantages / 7, 0.0), rtol=1e-5)
    assert ppo.policy_clip_fraction(logprobs, logprobs, advantages, MASK, clip=0.2).item() == 0.0


def test_the_eos_token_has_a_gradient(draw):
    logprobs = draw()
    gradient = jax.grad(ppo.policy_loss)(logprobs, logprobs, jnp.ones(MASK.shape), MASK, clip=0.2)
    assert gradient[1, 1].item() == pytest.approx(-1 / 7)


def test_value_loss_of_three_values_equals_hand_arithmetic():
    values, old, returns = jnp.array([[1.0, 0.5, 3.0]]), jnp.array([[0.0, 0.5, 0.0]]), jnp.array([[2.0, 1.0, 0.1]])
    arguments = (values, old, returns, jnp.ones((1, 3), bool))
    # free: 1, 0.25, 8.41; clipped to 0.2, 0.5, 0.2: 3.24, 0.25, 0.01
    assert ppo.value_loss(*arguments, clip=0.2).item() == pytest.approx((3.24 + 0.25 + 8.41) / 6, rel=1e-6)
    assert ppo.value_clip_fraction(*arguments, clip=0.2).item() == pytest.approx(1 / 3)
    gradient = jax.grad(ppo.value_loss)(*arguments, clip=0.2)
    np.testing.assert_allclose(gradient, [[0.0, -0.5 / 3, 2.9 / 3]], rtol=1e-5)


# Metrics


def test_approximate_kl_equals_hand_arithmetic():
    # (2 - 1) - log 2, and (1/2 - 1) + log 2
    logprobs = jnp.log(jnp.array([[2.0, 0.5]]))
    kl = ppo.approximate_kl(logprobs, jnp.zeros((1, 2)), jnp.ones((1, 2), bool))
    assert kl.item() == pytest.approx((0.3068528 + 0.1931472) / 2, rel=1e-6)


def test_approximate_kl_is_unbiased():
    """Weights all tokens by their old probabilities, which gives the exact expectation under the old policy."""
    old, new = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    per_token = [
        ppo.approximate_kl(jnp.log(jnp.full((1, 1), q)), jnp.log(jnp.full((1, 1), p)), jnp.ones((1, 1), bool)).item()
        for p, q in zip(old, new, strict=True)
    ]
    assert np.dot(old, per_token) == pytest.approx((old * np.log(old / new)).sum(), rel=1e-5)
    assert min(per_token) > 0


def test_sequence_kl_is_the_sum_over_each_answer():
    ref = jnp.array([[-2.0, -0.5, -3.0, -1.0]] * 4)
    np.testing.assert_allclose(ppo.sequence_kl(jnp.full((4, 4), -1.0), ref, MASK), [2.5, 0.5, 1.0, 0.0])


def test_explained_variance_of_perfect_constant_and_bad_values():
    returns, mask = jnp.array([[1.0, 2.0, 6.0, 99.0]]), jnp.array([[True, True, True, False]])
    assert ppo.explained_variance(returns, returns, mask).item() == 1.0
    assert ppo.explained_variance(jnp.full((1, 4), 5.0), returns, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert ppo.explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0)
    assert ppo.explained_variance(returns, jnp.full((1, 4), 5.0), mask).item() == 0.0  # returns without variance
    assert ppo.explained_variance(returns, returns, mask & False).item() == 0.0


# Masks

IN_TOKENS = {  # name: (function of [B, T] arrays and the mask, how many arrays)
    "token_rewards": (lambda a, b, mask: ppo.token_rewards(jnp.ones(4), a, b, mask, kl_coef=0.1, clip=5.0), 2),
    "advantages": (lambda a, b, mask: ppo.gae(a, b, mask, gamma=0.9, lam=0.8)[0], 2),
    "returns": (lambda a, b, mask: ppo.gae(a, b, mask, gamma=0.9, lam=0.8)[1], 2),
    "policy_loss": (lambda a, b, c, mask: ppo.policy_loss(a, b, c, mask, clip=0.2), 3),
    "policy_clip_fraction": (lambda a, b, c, mask: ppo.policy_clip_fraction(a, b, c, mask, clip=0.2), 3),
    "value_loss": (lambda a, b, c, mask: ppo.value_loss(a, b, c, mask, clip=0.2), 3),
    "value_clip_fraction": (lambda a, b, c, mask: ppo.value_clip_fraction(a, b, c, mask, clip=0.2), 3),
    "approximate_kl": (ppo.approximate_kl, 2),
    "sequence_kl": (ppo.sequence_kl, 2),
    "explained_variance": (ppo.explained_variance, 2),
}


@pytest.mark.parametrize("name", IN_TOKENS)
def test_masked_positions_affect_neither_result_nor_gradient(draw, name):
    function, count = IN_TOKENS[name]
    arrays = [draw() for _ in range(count)]
    weights = draw()

    def total(*arrays):
        result = function(*arrays, MASK)
        return (result * (weights if result.ndim == 2 else 1.0)).sum()

    def outcome(arrays):
        return function(*arrays, MASK), jax.grad(total, tuple(range(count)))(*arrays)

    result, gradients = outcome(arrays)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[~MASK], np.zeros(9))
    if result.ndim == 2:
        np.testing.assert_array_equal(result[~MASK], np.zeros(9))
    for spoilt in range(count):
        dirty = [jnp.where(MASK, x, np.nan) if i == spoilt else x for i, x in enumerate(arrays)]
        jax.tree.map(np.testing.assert_array_equal, outcome(dirty), (result, gradients))


@pytest.mark.parametrize("name", IN_TOKENS)
def test_an_empty_mask_gives_zeros_with_gradients_of_zero(draw, name):
    function, count = IN_TOKENS[name]
    arrays = [draw() for _ in range(count)]
    nothing = jnp.zeros_like(MASK)
    gradients = jax.grad(lambda *xs: function(*xs, nothing).sum(), tuple(range(count)))(*arrays)
    for array in (function(*arrays, nothing), *gradients):
        np.testing.assert_array_equal(array, np.zeros_like(array))


@pytest.mark.parametrize("name", IN_TOKENS)
def test_a_mask_of_floats_means_the_same_as_one_of_bools(draw, name):
    function, count = IN_TOKENS[name]
    arrays = [draw() for _ in range(count)]
    np.testing.assert_array_equal(function(*arrays, MASK), function(*arrays, MASK.astype(jnp.float32)))


# Options


def test_scores_of_cut_and_of_long_answers_equal_hand_arithmetic():
    """Answers of 4 (cut), 2, 1 and 0 tokens, of at most 4."""
    score, ended = jnp.array([2.0, 1.0, -1.0, 0.5]), jnp.array([False, True, True, True])
    penalised = ppo.shaped_score(score, ended, MASK, missing_eos_penalty=1.5)
    np.testing.assert_allclose(penalised, [0.5, 1.0, -1.0, 0.5])
    replaced = ppo.shaped_score(score, ended, MASK, missing_eos="replace", missing_eos_penalty=1.5)
    np.testing.assert_allclose(replaced, [-1.5, 1.0, -1.0, 0.5])
    # The last 3 tokens cost 0.6 together: 4 tokens lose all of it, 2 a third, 1 and 0 nothing.
    shaped = ppo.shaped_score(score, ended, MASK, overlong_tokens=3, overlong_penalty=0.6)
    np.testing.assert_allclose(shaped, [1.4, 0.8, -1.0, 0.5], rtol=1e-6)


def policy_loss_by_loop(logprobs, old, advantages, clip, clip_high, dual_clip):
    """(loss, clip fraction) token by token in float64."""
    losses, clipped = [], []
    for b, t in zip(*np.asarray(MASK).nonzero(), strict=True):
        ratio, gain = np.exp(float(logprobs[b, t]) - float(old[b, t])), float(advantages[b, t])
        loss = max(-gain * ratio, -gain * min(max(ratio, 1 - clip), 1 + clip_high))
        is_clipped = loss != -gain * ratio
        if dual_clip and gain < 0 and loss > -dual_clip * gain:
            loss, is_clipped = -dual_clip * gain, True
        losses.append(loss)
        clipped.append(is_clipped)
    return np.mean(losses), np.mean(clipped)


@pytest.mark.parametrize(("clip_high", "dual_clip"), [(0.0, 0.0), (0.6, 0.0), (0.0, 1.3), (0.6, 1.3)])
def test_the_policy_loss_with_two_clips_and_a_dual_clip_equals_a_loop(draw, clip_high, dual_clip):
    logprobs, old, advantages = draw(), draw(), draw()
    clips = dict(clip=0.2, clip_high=clip_high, dual_clip=dual_clip)
    want = policy_loss_by_loop(logprobs, old, advantages, 0.2, clip_high or 0.2, dual_clip)
    assert ppo.policy_loss(logprobs, old, advantages, MASK, **clips) == pytest.approx(want[0], rel=1e-5)
    assert ppo.policy_clip_fraction(logprobs, old, advantages, MASK, **clips) == pytest.approx(want[1])


def test_the_gradient_of_the_policy_loss_with_all_clips_equals_finite_differences(draw):
    logprobs, old, advantages = (np.float64(draw()) for _ in range(3))
    gradient = jax.grad(ppo.policy_loss)(*map(jnp.float32, (logprobs, old, advantages)), MASK, **CLIPS)
    for b, t in zip(*np.asarray(MASK).nonzero(), strict=True):
        step = np.zeros(MASK.shape)
        step[b, t] = 1e-6
        high, low = (policy_loss_by_loop(logprobs + s, old, advantages, 0.2, 0.6, 1.3)[0] for s in (step, -step))
        assert gradient[b, t].item() == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-6)


CLIPS = dict(clip=0.2, clip_high=0.6, dual_clip=1.3)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_mismatch_weights_are_truncated_ratios_of_tokens_or_of_whole_answers(draw, level):
    logprobs, sampler = draw(), draw()
    ratio = np.where(MASK, np.float64(logprobs) - np.float64(sampler), 0.0)
    ratio = ratio if level == "token" else np.broadcast_to(ratio.sum(axis=1, keepdims=True), ratio.shape)
    want = np.where(MASK, np.minimum(np.exp(ratio), 0.9), 0.0)
    spoilt = jnp.where(MASK, sampler, np.nan)
    weights = ppo.mismatch_weights(logprobs, spoilt, MASK, level=level, limit=0.9)
    np.testing.assert_allclose(weights, want, rtol=1e-5)
    assert (want == 0.9).any() and (want[np.asarray(MASK)] < 0.9).any()


def test_a_long_answer_far_from_its_sampler_has_the_limit_as_its_weight():
    far = jnp.full((1, 500), 3.0)  # the product of the ratios is e^1500
    weights = ppo.mismatch_weights(far, jnp.zeros_like(far), jnp.ones((1, 500)), level="sequence", limit=2.0)
    np.testing.assert_allclose(weights, 2.0, rtol=1e-6)


def test_the_value_loss_of_ragged_answers_equals_a_loop_and_its_gradient_finite_differences(draw):
    values, old, returns = np.float64(draw()), np.float64(draw()), np.float64(draw())
    tokens = [(b, t) for b in range(4) for t in range(4) if MASK[b, t]]

    def loop(values):
        total = 0.0
        for b, t in tokens:
            bounded = min(max(values[b, t], old[b, t] - 0.4), old[b, t] + 0.4)
            total += max((values[b, t] - returns[b, t]) ** 2, (bounded - returns[b, t]) ** 2)
        return 0.5 * total / len(tokens)

    given = (jnp.asarray(x, jnp.float32) for x in (values, old, returns))
    loss, gradient = jax.value_and_grad(ppo.value_loss)(*given, MASK, clip=0.4)
    assert loss.item() == pytest.approx(loop(values), rel=1e-5)
    for b, t in tokens:
        step = np.zeros((4, 4))
        step[b, t] = 1e-5
        slope = (loop(values + step) - loop(values - step)) / 2e-5
        assert gradient[b, t].item() == pytest.approx(slope, abs=1e-5)
    kept = [float(gradient[b, t]) != 0 for b, t in tokens]
    assert any(kept) and not all(kept), "some values are clipped"
