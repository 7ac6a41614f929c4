"""The moving average of trainable weights against hand arithmetic, on the devices and in host memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.train_step import ema_update, make_ema_step, start_ema


def ema_with_decay(decay):
    """The compiled update (average, weights) -> average."""
    return functools.partial(ema_update, make_ema_step(decay), is_taken=jnp.array(True))


def test_three_steps_equal_hand_arithmetic():
    follow, weights = (
        ema_with_decay(0.75),
        [{"w": jnp.array(w)} for w in ([4.0, 1.0], [8.0, 1.0], [0.0, 1.0])],
    )
    average = start_ema({"w": jnp.array([0.0, 1.0])}, offload=False)
    # A quarter of the way: 0 -> 1 -> 2.75 -> 2.0625; unchanged weights keep their average to the last bit.
    for each, expected in zip(weights, ([1.0, 1.0], [2.75, 1.0], [2.0625, 1.0]), strict=True):
        average = follow(average, each)
        np.testing.assert_array_equal(average["w"], expected)


def test_weights_of_a_skipped_step_leave_the_average_as_it_was():
    average, step = start_ema({"w": jnp.array([0.5, -0.0])}, offload=False), make_ema_step(0.75)
    after = ema_update(step, average, {"w": jnp.array([4.0, jnp.inf])}, jnp.array(False))
    np.testing.assert_array_equal(
        np.asarray(after["w"]).view(np.int32), np.array([0.5, -0.0], np.float32).view(np.int32)
    )


def test_constant_weights_are_their_own_average():
    weights = {"w": jax.random.normal(jax.random.key(0), (64,))}
    average, follow = start_ema(weights, offload=False), ema_with_decay(0.992)
    for _ in range(5):
        average = follow(average, weights)
    np.testing.assert_array_equal(average["w"], weights["w"])


@pytest.mark.parametrize("name", ["one", "fsdp4-tensor2"])
def test_an_average_in_host_memory_is_bit_equal_to_that_on_the_devices_and_stays_there(name):
    mesh, follow = tiny.mesh_of(name), ema_with_decay(0.992)
    start, *later = (tiny.random_params(tiny.LLAMA, mesh, seed=seed) for seed in range(4))
    there, away = (start_ema(start, offload=offloaded) for offloaded in (False, True))
    for weights in later:
        before = there, away
        there, away = follow(there, weights), follow(away, weights)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    for path, leaf in start.items():
        assert there[path].sharding == leaf.sharding and not leaf.is_deleted()
        assert away[path].sharding == leaf.sharding.with_memory_kind("pinned_host")
        np.testing.assert_array_equal(away[path], there[path], err_msg=path)
        expected = np.asarray(start[path], np.float64)
        for weights in later:
            expected = 0.992 * expected + 0.008 * np.asarray(weights[path], np.float64)
        np.testing.assert_allclose(there[path], expected, atol=1e-6, err_msg=path)


def test_at_most_one_array_of_an_average_in_host_memory_is_on_the_devices_at_a_time(monkeypatch):
    weights = tiny.random_params(tiny.LLAMA, tiny.mesh_of("one"))
    average, follow, put = (
        start_ema(weights, offload=True),
        ema_with_decay(0.9),
        jax.device_put,
    )
    follow(start_ema(weights, offload=True), weights)

    def on_devices():
        live = (leaf for leaf in jax.live_arrays() if leaf.sharding.memory_kind != "pinned_host")
        return sum(leaf.nbytes for leaf in live)

    extra, seen = on_devices(), []

    def check_put(leaf, where):
        seen.append(on_devices() - extra)
        return put(leaf, where)

    monkeypatch.setattr(jax, "device_put", check_put)
    follow(average, weights)
    # Each array is fetched when none is on the devices and is the only one when it returns.
    assert seen == [size for leaf in weights.values() for size in (0, leaf.nbytes)]
    assert on_devices() == extra


def test_a_second_step_compiles_nothing():
    weights, follow = (
        tiny.random_params(tiny.OPT, tiny.mesh_of("fsdp4-tensor2")),
        ema_with_decay(0.5),
    )
    for offloaded in (False, True):
        average = follow(start_ema(weights, offload=offloaded), weights)
        with tiny.compilations() as names:
            follow(average, weights)
        assert names == []
