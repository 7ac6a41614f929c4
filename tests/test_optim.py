import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.optim import (
    OptimConfig,
    decay_mask,
    join_states,
    learning_rate,
    make_optimizer,
    select_path,
    with_counters,
)


def rates(config, total, steps):
    rate = learning_rate(config, total)
    return [float(rate(step)) for step in steps]


def test_cosine_rises_over_the_warmup_and_decays_to_zero():
    config = OptimConfig(learning_rate=2.0, schedule="cosine", warmup_steps=4)
    np.testing.assert_allclose(
        rates(config, 12, [0, 1, 3, 4, 8, 10, 12, 20]),
        [0.5, 1.0, 2.0, 2.0, 1.0, 2.0 * 0.146446609, 0.0, 0.0],
        atol=1e-6,
    )


def test_linear_decays_to_the_configured_final_share():
    config = OptimConfig(learning_rate=1.0, schedule="linear", final_lr_share=0.2)
    np.testing.assert_allclose(rates(config, 10, [0, 5, 10]), [1.0, 0.6, 0.2], rtol=1e-6)


def test_constant_stays_at_the_peak_after_the_warmup():
    config = OptimConfig(learning_rate=3.0, schedule="constant", warmup_steps=2, final_lr_share=0.5)
    np.testing.assert_allclose(rates(config, 10, [0, 1, 9]), [1.5, 3.0, 3.0])


def test_a_run_of_only_warmup_ends_at_the_peak():
    config = OptimConfig(learning_rate=1.0, warmup_steps=4)
    np.testing.assert_allclose(rates(config, 4, [0, 3]), [0.25, 1.0])


def test_the_rate_is_float32_under_jit_for_a_traced_step():
    rate = jax.jit(learning_rate(OptimConfig(learning_rate=1.0, schedule="linear"), 4))(jnp.int32(1))
    assert rate.dtype == jnp.float32 and float(rate) == 0.75


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0, give a positive number"),
        ({"schedule": "cosin"}, "schedule is 'cosin', give one of cosine, linear, constant"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.5}, "beta2 is -0.5"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"final_lr_share": 1.5}, "final_lr_share is 1.5"),
    ],
)
def test_invalid_settings_are_rejected_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{"learning_rate": 1e-3, **wrong})


def test_all_invalid_fields_are_reported_at_once():
    with pytest.raises(ValueError, match="beta1 .*; eps "):
        OptimConfig(learning_rate=1e-3, beta1=2.0, eps=-1.0)


def test_a_warmup_longer_than_the_run_is_rejected():
    config = OptimConfig(learning_rate=1e-3, warmup_steps=100)
    with pytest.raises(ValueError, match="warmup_steps is 100, longer than the run of 30 steps"):
        learning_rate(config, 30)
    with pytest.raises(ValueError, match="longer than the run"):
        make_optimizer(config, 30)
    with pytest.raises(ValueError, match="0 optimizer steps"):
        learning_rate(config, 0)


def test_biases_and_scales_do_not_decay_at_any_path():
    leaf = jnp.zeros(1)
    flat = {"layers/attention/q/kernel": leaf, "layers/attention/q/bias": leaf, "final_norm/scale": leaf}
    plain = {"layers/attention/q/kernel": True, "layers/attention/q/bias": False, "final_norm/scale": False}
    assert decay_mask(flat) == plain
    assert decay_mask({"actor": flat}) == {"actor": plain}


def test_a_zero_gradient_applies_only_weight_decay():
    params = {"a/kernel": jnp.full(2, 3.0), "a/bias": jnp.full(2, 3.0)}
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["a/kernel"], [-0.15, -0.15], rtol=1e-6)
    np.testing.assert_array_equal(updates["a/bias"], [0.0, 0.0])


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_updating_parameters_one_by_one_after_the_clip_equals_updating_them_together(clip_norm, rng):
    config = OptimConfig(learning_rate=0.01, schedule="linear", weight_decay=0.1, clip_norm=clip_norm)
    optimizer = make_optimizer(config, 10)
    params = {path: jnp.asarray(rng.normal(size=4), jnp.float32) for path in ("a/kernel", "a/bias", "b/scale")}
    together = apart = optimizer.init(params)
    for _ in range(3):
        grads = {path: jnp.asarray(rng.normal(size=4), jnp.float32) for path in params}
        updates, together = optimizer.update(grads, together, params)
        clipped, steps, states = optimizer.clip(grads), {}, []
        assert (optax.tree.norm(clipped) < 1.0001) == bool(clip_norm)
        for path in params:
            state = with_counters(*select_path(apart, path))
            step, state = optimizer.update_each({path: clipped[path]}, state, {path: params[path]})
            steps |= step
            states.append(state)
        apart = functools.reduce(join_states, states)
        # To one or two units in the last place: loops over arrays of other sizes round in another order.
        close = functools.partial(np.testing.assert_allclose, rtol=2.5e-7)
        jax.tree.map(close, steps, updates)
        jax.tree.map(close, apart, together)


def test_the_state_of_one_path_has_its_moments_and_shares_the_counters():
    state = make_optimizer(OptimConfig(learning_rate=0.1), 10).init({"a": jnp.zeros(2), "b": jnp.zeros(3)})
    moments, counters = select_path(state, "b")
    assert [leaf.shape for leaf in jax.tree.leaves(moments)] == [(3,), (3,)]
    assert [leaf.shape for leaf in jax.tree.leaves(counters)] == [(), ()]


@pytest.mark.parity
def test_three_steps_equal_torch_adamw_with_clipping_and_parameter_groups():
    import torch

    rng = np.random.default_rng(0)
    start = {"a/kernel": rng.normal(size=(3, 2)), "a/bias": rng.normal(size=2)}
    gradients = [{path: 4 * rng.normal(size=x.shape) for path, x in start.items()} for _ in range(3)]
    gradients[1] = {path: 0.01 * x for path, x in gradients[1].items()}  # a gradient below the clip norm

    config = OptimConfig(learning_rate=0.01, schedule="linear", warmup_steps=1, weight_decay=0.1)
    optimizer = make_optimizer(config, 4)
    params = {path: jnp.asarray(x, jnp.float32) for path, x in start.items()}
    state = optimizer.init(params)
    for gradient in gradients:
        gradient = {path: jnp.asarray(x, jnp.float32) for path, x in gradient.items()}
        updates, state = optimizer.update(gradient, state, params)
        params = {path: params[path] + updates[path] for path in params}

    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in start.items()}
    groups = [
        {"params": [theirs["a/kernel"]], "weight_decay": 0.1},
        {"params": [theirs["a/bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for gradient, rate in zip(gradients, [0.01, 0.01, 0.01 * 2 / 3], strict=True):
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[path])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for path, parameter in theirs.items():
        np.testing.assert_allclose(params[path], parameter.detach().numpy(), rtol=2e-6, atol=2e-6)


def running_mean_after(config, gradient):
    """The first moment (1 - beta1) g after one step, which shows the norm of the gradient; Adam's update does not."""
    params = {"kernel": jnp.zeros(1)}
    optimizer = make_optimizer(config, 5)
    _, state = optimizer.update({"kernel": jnp.full(1, gradient)}, optimizer.init(params), params)
    return optax.tree.get(state, "mu")["kernel"].item()


def test_a_gradient_of_norm_50_is_clipped_to_1_unless_the_clip_is_off():
    assert running_mean_after(OptimConfig(learning_rate=1.0), 50.0) == pytest.approx(0.1)
    assert running_mean_after(OptimConfig(learning_rate=1.0, clip_norm=0.0), 50.0) == pytest.approx(5.0)
