"""Dynamic loss scaling: its sequence of scales, what a skipped step leaves, and whole float16 runs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_recipe
from test_engine import CASES, LENGTHS, WIDTH, engine_of
from test_train import interrupt_stage
from test_train_step import batch_of, copy_to_host, make_loss

from rlhf_jax.hardware import GPUS
from rlhf_jax.loss_scale import LossScaleConfig, first_scale, next_scale
from rlhf_jax.mesh import train_layout
from rlhf_jax.models.decoder import Leaf, abstract_params
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.plan.roofline import matmul_rate
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.train_step import init_state, make_update, start_ema

OPTIM = OptimConfig(learning_rate=0.02, schedule="constant", eps=1e-3)
SCALING = LossScaleConfig(growth_steps=3)


def test_the_sequence_of_scales_equals_that_of_torch():
    torch = pytest.importorskip("torch")
    patterns = [*(np.random.RandomState(0).rand(3, 60) < 0.25), np.zeros(60, bool), np.arange(60) < 12]
    for overflows in patterns:
        weight = torch.nn.Parameter(torch.zeros(1))
        scaler = torch.amp.GradScaler("cpu", growth_interval=SCALING.growth_steps)
        optimizer = torch.optim.SGD([weight], 1.0)
        config = dataclasses.replace(SCALING, smallest=2.0**-40, largest=2.0**60)
        scale, step = first_scale(config), jax.jit(functools.partial(next_scale, config))
        for overflow in overflows:
            weight.grad = scaler.scale(torch.tensor([float("inf") if overflow else 1.0]))
            scaler.step(optimizer)
            scaler.update()
            scale = step(scale, ~jnp.bool(overflow))
            assert float(scale.value) == scaler.get_scale()


def test_a_scale_stays_within_its_bounds():
    config = LossScaleConfig(initial=4.0, smallest=2.0, largest=8.0, growth_steps=1)
    scale, seen = first_scale(config), []
    for is_finite in (True, True, False, False, False, True):
        scale = next_scale(config, scale, jnp.bool(is_finite))
        seen.append(float(scale.value))
    assert seen == [8, 8, 4, 2, 2, 4]


@pytest.mark.parametrize("values", [{"initial": 1000.0}, {"smallest": 2.0**20}, {"largest": 2.0}, {"growth_steps": 0}])
def test_scales_that_are_no_ascending_powers_of_two_are_rejected(values):
    with pytest.raises(ValueError, match=r"powers of two in ascending order|growth_steps=0: 1 or more"):
        LossScaleConfig(**values)


def linear_loss(dtype, num_micro=1, offload=False, scaling=SCALING, factor=1.0):
    """loss = factor x the mean of x w, with products in `dtype`: the gradient of w is factor x the mean of x."""
    layout = train_layout(tiny.mesh_of("one"), 3, offload_moments=offload)

    def loss_fn(params, batch):
        products = batch["x"].astype(dtype) * params["w"].astype(dtype)
        return factor * products.astype(jnp.float32).mean(), (batch["x"].shape[0], {})

    tx, leaves = make_optimizer(OPTIM, 10), {"w": Leaf((1,), (None,))}
    start = {"w": layout.put(np.array([1.0], np.float32), None)}
    update = make_update(loss_fn, tx, leaves, layout, num_micro, scaling)
    return update, init_state(start, tx, leaves, layout, scaling), layout


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("num_micro", [1, 4])
def test_a_step_that_overflows_changes_nothing_except_the_scale(num_micro, offload):
    update, state, layout = linear_loss(jnp.float16, num_micro, offload, factor=2.0**-6)

    def step(state, last):
        return update(state, {}, layout.put_batch({"x": np.array([1, 2, 3, last], np.float32)}))

    state, stats = step(state, 4.0)
    assert (float(stats["loss_scale"]), int(stats["skipped_steps"]), float(stats["grad_norm"])) == (65536, 0, 2.5 / 64)
    before = copy_to_host(dataclasses.replace(state, scale=None, skips=None))
    state, stats = step(state, np.inf)
    after = copy_to_host(dataclasses.replace(state, scale=None, skips=None))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert (float(state.scale.value), int(state.skips.total), int(state.step)) == (32768, 1, 1)
    assert int(state.skips.in_a_row) == 0, "the next scale may be small enough"
    assert (float(stats["loss_scale"]), int(stats["skipped_steps"]), float(stats["grad_norm"])) == (65536, 1, np.inf)
    state, stats = step(state, 4.0)
    assert int(state.step) == 2 and float(state.trainable["w"][0]) != float(before.trainable["w"][0])
    assert (float(stats["loss_scale"]), float(stats["grad_norm"])) == (32768, 2.5 / 64)


def test_a_gradient_below_the_smallest_float16_is_lost_without_scaling_and_exact_with_it():
    found = []
    for scaling in (None, SCALING):
        update, state, layout = linear_loss(jnp.float16, scaling=scaling, factor=2.0**-28)
        _, stats = update(state, {}, layout.put_batch({"x": np.ones(4, np.float32)}))
        found.append(float(stats["grad_norm"]))
    assert found == [0.0, 2.0**-28]


@pytest.mark.parametrize("name", ["one", "fsdp4-tensor2"])
def test_in_float32_any_scale_gives_the_same_bits_and_those_of_no_scaling_up_to_rounding(name):
    config, layout = tiny.FAMILIES["opt"], train_layout(tiny.mesh_of(name), 3)
    tx, leaves, after = make_optimizer(OPTIM, 10), abstract_params(config), []
    loss_fn, batch = make_loss(config, config.lora, layout), layout.put_batch(batch_of(config))
    scaled = make_update(loss_fn, tx, leaves, layout, 2, LossScaleConfig())
    plain = make_update(loss_fn, tx, leaves, layout, 2)
    for scaling in (LossScaleConfig(initial=1.0), LossScaleConfig(), LossScaleConfig(initial=2.0**24), None):
        state = init_state(tiny.random_params(config, layout.mesh), tx, leaves, layout, scaling)
        for _ in range(2):
            state, stats = (scaled if scaling else plain)(state, {}, batch)
        after.append(copy_to_host((state.trainable, state.opt_state, state.step, stats["loss"], stats["grad_norm"])))
    for other in after[1:3]:
        jax.tree.map(np.testing.assert_array_equal, after[0], other)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after[0], after[3])


def test_the_moving_average_does_not_move_with_a_skipped_step():
    engine, state, frozen = engine_of("llama", tiny.mesh_of("one"), ema_decay=0.5, scaling=SCALING)
    state = dataclasses.replace(state, average=start_ema(state.actor.trainable, offload=False))
    prompts = tiny.prompts(tiny.FAMILIES[CASES["llama"][0]], LENGTHS, WIDTH)
    weights = engine.publish(state.actor.params(frozen.actor))
    experience = engine.score(state, frozen, engine.generate(weights, *prompts, jax.random.key(7)))
    state, _ = engine.update(state, frozen, experience)
    before = copy_to_host((state.average, state.actor.trainable))
    broken = dataclasses.replace(experience, advantages=experience.advantages * np.inf)
    state, stats = engine.update(state, frozen, broken)
    jax.tree.map(np.testing.assert_array_equal, copy_to_host((state.average, state.actor.trainable)), before)
    assert (int(stats["actor_skipped_steps"]), int(stats["critic_skipped_steps"])) == (1, 0)
    assert int(state.actor.step) == 1 and int(state.critic.step) == 2


def test_overflow_at_the_smallest_scale_counts_towards_the_end_of_the_run():
    update, state, layout = linear_loss(jnp.float16, scaling=LossScaleConfig(initial=2.0))
    for in_a_row in (0, 1, 2):
        state, stats = update(state, {}, layout.put_batch({"x": np.array([1, 2, 3, np.inf], np.float32)}))
        assert (float(state.scale.value), int(state.skips.in_a_row)) == (1, in_a_row)
    assert int(stats["skipped_steps"]) == 3


def test_a_float16_run_scales_every_loss_and_resumes_bit_equal(tmp_path, capsys):
    path = tiny_recipe.write_recipe(tmp_path)
    settings = ["model.dtype=float16", "model.loss_scale={initial=16777216.0,growth_steps=2}", "sft.steps=4"]
    settings += ["reward.steps=1", "ppo.steps=1", "sft.eval_batches=0", "reward.eval_batches=0"]
    assert tiny_recipe.run("train", path, f"run.dir={tmp_path / 'whole'}", *settings) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_stage(patch, "sft", 3)
        assert tiny_recipe.run("train", path, f"run.dir={tmp_path / 'resumed'}", *settings) == 130
    assert tiny_recipe.run("sft", path, f"run.dir={tmp_path / 'resumed'}", *settings) == 0
    assert "resumed at step 2 of 4" in capsys.readouterr().err
    exports = [(tmp_path / name / "sft/export/model.safetensors").read_bytes() for name in ("whole", "resumed")]
    rows, (reward,), (ppo,) = (metrics_of(tmp_path / "whole", stage) for stage in ("sft", "reward", "ppo"))
    assert exports[0] == exports[1] and rows == metrics_of(tmp_path / "resumed", "sft")
    assert rows[-1]["skipped_steps"] > 0 and rows[0]["loss_scale"] == 2.0**24 > rows[-1]["loss_scale"]
    names = {f"{who}_{key}" for who in ("actor", "critic") for key in ("loss_scale", "skipped_steps")}
    assert names <= ppo.keys() and {"loss_scale", "skipped_steps"} <= reward.keys()


def metrics_of(run, stage):
    rows = map(json.loads, (run / stage / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.mark.parametrize("frozen", ["float16", "bfloat16", "nf4"])
def test_adapters_train_in_float16_over_a_frozen_base(frozen, tmp_path):
    path = tiny_recipe.write_recipe(tmp_path)
    settings = ["model.dtype=float16", f"model.frozen_dtype={frozen}", "model.lora.rank=2", "sft.steps=2"]
    settings += ["reward.steps=1", "ppo.steps=1", f"model.one_copy={str(frozen != 'bfloat16').lower()}"]
    assert tiny_recipe.run("train", path, f"run.dir={tmp_path / 'run'}", *settings) == 0
    (*_, last) = metrics_of(tmp_path / "run", "ppo")
    assert last["logprob_mismatch"] < 0.02, "what is sampled is what trains, up to float16"


def test_float16_is_a_choice_and_its_speed_is_that_of_the_cards_without_bfloat16():
    assert ModelConfig().scaling is None and ModelConfig(dtype="float16").compute.scaling == LossScaleConfig()
    rates = {dtype: matmul_rate(GPUS["V100-32GB"], dtype) for dtype in ("float16", "bfloat16", "float32")}
    assert rates == {"float16": 125e12, "bfloat16": 125e12 / 8, "float32": 125e12 / 8}
    assert matmul_rate(GPUS["T4"], "float16") == 65e12 == 8 * matmul_rate(GPUS["T4"], "bfloat16")
    assert matmul_rate(GPUS["A100-80GB"], "float16") == matmul_rate(GPUS["A100-80GB"], "bfloat16") == 312e12
