"""One update of every method is the same with more padding, in micro-batches, and on eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_stage_grpo import rollout_of

from rlhf_jax.data.batches import Batch
from rlhf_jax.engine import (
    Architectures,
    EngineState,
    Execution,
    FrozenParams,
    Optimizers,
    Sampling,
    make_hybrid_engine,
)
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.dpo import DPOConfig, dpo_objective
from rlhf_jax.stages.ppo import ppo_algorithm
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.reference import Reference
from rlhf_jax.stages.reward import RewardConfig, reward_objective
from rlhf_jax.stages.sft import sft_objective
from rlhf_jax.train_step import init_state, make_update

# With Adam's usual eps a gradient that is zero except for rounding becomes a full step.
ADAM = make_optimizer(OptimConfig(0.02, "constant", eps=1e-3), 10)
COMPUTE = Compute(jnp.dtype("float32"), "none", 4)
FORMS = (("one", 16, 1), ("one", 24, 4), ("fsdp4-tensor2", 16, 2))  # mesh, positions, micro-batches


def assert_all_same(start, found):
    """The updates (metrics, parameters, ...), of which the first has moved every parameter, are equal."""
    first, *others = found
    assert all(np.abs(first[1][path] - leaf).max() > 1e-4 for path, leaf in start.items())
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-4, atol=3e-5), other, first)


SUPERVISED = {
    "sft": lambda config, layout: sft_objective(config, COMPUTE, layout),
    "reward": lambda config, layout: reward_objective(
        config, COMPUTE, layout, RewardConfig(label_smoothing=0.1, centring=0.01, margin_coef=0.5)
    ),
    **{
        f"dpo-{name}": lambda config, layout, name=name: dpo_objective(
            config, COMPUTE, layout, DPOConfig(loss=name, beta=0.5)
        )
        for name in ("hinge", "ipo", "simpo", "orpo")
    },
}


@pytest.mark.parametrize("method", SUPERVISED)
def test_padding_micro_batches_and_eight_devices_change_no_step_of_rows_or_pairs(method):
    """Rows of 4 to 16 tokens: the first learns nothing where a row is a single answer; rankings are of two or three."""
    answers, rng = {"sft": (), "reward": (3,)}.get(method, (2,)), np.random.default_rng(0)
    shape = (16, *answers)
    tokens, lengths = rng.integers(1, 61, (*shape, 24), np.int32), rng.integers(4, 17, (*shape, 1))
    mask = np.arange(24) < lengths
    learned = mask & (np.arange(24) >= 3)
    if method == "sft":
        learned[0] = False
    scores = np.tile(np.float32([2, 0.5, -1]), (16, 1))
    if method == "reward":
        scores[::2, 2], mask[::2, 2] = np.nan, False
    config = tiny.scalar(tiny.LLAMA) if method == "reward" else tiny.LLAMA
    found, leaves = [], abstract_params(config)
    for mesh, width, num_micro in FORMS:
        layout = Layout(tiny.mesh_of(mesh), TRAIN)
        objective = SUPERVISED[method](config, layout)
        batch = Batch(*(x[..., :width] for x in (np.where(mask, tokens, 0), mask, learned)))
        if method == "reward":
            batch = dataclasses.replace(batch, scores=scores)
        if objective.reference:
            reference = Reference(jax.jit(objective.reference), tiny.random_params(config, layout.mesh, 1), layout)
            batch = dataclasses.replace(batch, reference=reference(batch))
        state = init_state(tiny.random_params(config, layout.mesh), ADAM, leaves, layout)
        if not found:
            start = jax.device_get(jax.tree.map(jnp.copy, state.trainable))
        update = make_update(objective.loss, ADAM, leaves, layout, num_micro)
        state, stats = update(state, {}, layout.put_batch(batch))
        found.append(jax.device_get((stats, state.trainable)))
    assert_all_same(start, found)


PPO = {
    "plain": PPOConfig(kl_coef=0.2),
    "options": PPOConfig(
        kl_in="loss", kl_coef=0.2, kl_estimator="k3", dual_clip=1.5, clip_high=0.3, entropy_coef=0.05, critic_lam=1.0
    ),
}


@pytest.mark.parametrize("case", PPO)
def test_padding_micro_batches_and_eight_devices_change_no_step_of_actor_and_critic(case):
    """Four models; answers of one token among those of up to six, and ratios and values of which some are clipped."""
    config, critic, found = tiny.LLAMA, tiny.scalar(tiny.LLAMA), []
    noise = [np.random.default_rng(seed).normal(0, 0.3, (16, 6)).astype(np.float32) for seed in (2, 3)]
    for mesh, width, num_micro in (("one", 5, 1), ("one", 8, 4), ("fsdp4-tensor2", 5, 2)):
        layout = Layout(tiny.mesh_of(mesh), TRAIN)
        params = [tiny.random_params(c, layout.mesh, i) for i, c in enumerate((config, critic, config, critic))]
        engine = make_hybrid_engine(
            Architectures(config, critic, config, critic),
            ppo_algorithm(PPO[case]),
            Optimizers(ADAM, ADAM),
            Sampling(SampleConfig(6), (3,)),
            Execution(layout, COMPUTE, num_micro, num_micro),
        )
        both = (init_state(p, ADAM, abstract_params(c), layout) for p, c in zip(params, (config, critic), strict=False))
        state, frozen = EngineState(*both), FrozenParams({}, {}, params[2], params[3])
        if not found:
            start = jax.device_get(jax.tree.map(jnp.copy, state.actor.trainable))
        rollout = engine.publish.layout.put_batch(rollout_of(width))
        experience = engine.score(state, frozen, rollout)
        moved = {name: getattr(experience, name) + x for name, x in zip(("logprobs", "values"), noise, strict=True)}
        state, stats = engine.update(state, frozen, dataclasses.replace(experience, **moved))
        found.append(jax.device_get((stats, state.actor.trainable, state.critic.trainable)))
    assert min(found[0][0][f"{model}_clip_fraction"] for model in ("actor", "critic")) > 0.02
    assert_all_same(start, found)
