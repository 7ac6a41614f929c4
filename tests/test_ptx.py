"""Texts in the actor's optimizer steps: their exact gradient, however the batch is split, and their effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.data.batches import Batch
from rlhf_jax.engine import (
    Algorithm,
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
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel
from rlhf_jax.objectives import masked, ppo
from rlhf_jax.policy import next_token_losses
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.train_step import init_state

CONFIG, COMPUTE, NEW, WIDTH = tiny.LLAMA, Compute(jnp.dtype("float32"), "none", 0), 6, 8
LENGTHS = [8, 1, 5, 3, 8, 2, 7, 4]
SCORES = np.linspace(-1.0, 1.0, 8, dtype=np.float32)


def estimate(scored):
    """Every token has its answer's score as its advantage."""
    score = jnp.broadcast_to(scored.score[:, None], scored.logprobs.shape)
    advantages = masked.zero_outside(score, scored.action_mask)
    return advantages, advantages, None


def actor_loss(logprobs, entropy, experience):
    old, mask = experience.logprobs, experience.action_mask
    return ppo.policy_loss(logprobs, old, experience.advantages, mask, clip=0.2), {
        "entropy": masked.mean(entropy, mask)
    }


def start(mesh_name, tx, coef, num_micro=1):
    """(engine, its state, frozen parameters, rollouts with scores)."""
    layout = Layout(tiny.mesh_of(mesh_name), TRAIN)
    engine = make_hybrid_engine(
        Architectures(CONFIG),
        Algorithm(estimate, actor_loss, text_coef=coef),
        Optimizers(tx),
        Sampling(SampleConfig(NEW), (3, 15, 24)),
        Execution(layout, COMPUTE, num_micro),
    )
    params = tiny.random_params(CONFIG, layout.mesh, seed=0)
    state = EngineState(init_state(params, tx, abstract_params(CONFIG), layout))
    weights, frozen = engine.publish(params), FrozenParams({})
    rollout = engine.generate(weights, *tiny.prompts(CONFIG, LENGTHS, WIDTH), jax.random.key(1))
    return engine, state, frozen, engine.score(state, frozen, rollout, SCORES)


def texts_from(seed, rows=8):
    """Rows that count upwards modulo 50 from a random number, of several lengths, the first of them without a token."""
    rng = np.random.default_rng(seed)
    tokens = (rng.integers(0, 50, (rows, 1)) + np.arange(12)) % 50
    mask = np.arange(12) < np.append([0], rng.integers(2, 13, rows - 1))[:, None]
    return Batch(np.where(mask, tokens, 0).astype(np.int32), mask, mask & (np.arange(12) > 0))


@functools.cache
def expected_change():
    """Of one step of gradient descent: minus the gradient of both means, of the whole batch on one device."""
    engine, state, frozen, experience = start("one", optax.sgd(1.0), 0.5)
    layout = Layout(tiny.mesh_of("one"), TRAIN)

    def loss(params):
        text_loss, _, _ = next_token_losses(CONFIG, params, texts_from(3), COMPUTE, layout)
        hidden, _ = bind(CONFIG, params)(experience.tokens, experience.mask, COMPUTE, layout)
        logits = (hidden @ head_kernel(CONFIG, params))[..., : CONFIG.vocab_size]
        at = (experience.starts - 1)[:, None] + jnp.arange(NEW)
        answers = jnp.take_along_axis(jax.nn.log_softmax(logits), at[..., None], axis=1)
        logprobs = jnp.take_along_axis(answers, experience.actions[..., None], axis=-1)[..., 0]
        return actor_loss(logprobs, jnp.zeros_like(logprobs), experience)[0] + 0.5 * text_loss

    return jax.device_get(jax.tree.map(lambda g: -g, jax.jit(jax.grad(loss))(state.actor.trainable)))


@pytest.mark.parametrize(("mesh_name", "num_micro"), [("one", 1), ("one", 4), ("data2-fsdp2-tensor2", 1)])
def test_one_step_takes_the_gradient_of_both_token_means_for_any_micro_batches_and_devices(mesh_name, num_micro):
    engine, state, frozen, experience = start(mesh_name, optax.sgd(1.0), 0.5, num_micro)
    before = jax.device_get(jax.tree.map(jnp.copy, state.actor.trainable))
    texts = engine.publish.layout.put_batch(texts_from(3))
    state, stats = engine.update(state, frozen, experience, texts)
    for path, change in expected_change().items():
        np.testing.assert_allclose(
            np.asarray(state.actor.trainable[path]) - before[path], change, atol=2e-5, err_msg=path
        )
    assert stats["actor_text_loss"] == pytest.approx(4.3, abs=0.7)


def test_an_update_without_its_texts_or_with_texts_that_nothing_learns_is_an_error():
    engine, state, frozen, experience = start("one", optax.sgd(1.0), 0.5)
    with pytest.raises(ValueError, match="give texts to an update"):
        engine.update(state, frozen, experience)
    engine, state, frozen, experience = start("one", optax.sgd(1.0), 0.0)
    with pytest.raises(ValueError, match="give texts to an update"):
        engine.update(state, frozen, experience, texts_from(3))


@pytest.mark.parametrize("mesh_name", ["one", "data2-fsdp2-tensor2"])
def test_with_texts_the_loss_on_held_out_texts_falls_and_without_it_does_not(mesh_name):
    losses = {}
    for coef in (0.0, 5.0):
        engine, state, frozen, experience = start(mesh_name, optax.adam(3e-3), coef)
        for step in range(25):
            texts = engine.publish.layout.put_batch(texts_from(10 + step)) if coef else None
            state, _ = engine.update(state, frozen, experience, texts)
        measure = jax.jit(
            lambda p, t, layout=engine.publish.layout: next_token_losses(CONFIG, p, t, COMPUTE, layout)[0]
        )
        losses[coef] = float(measure(state.actor.trainable, texts_from(99, rows=64)))
    assert losses[0.0] > 4.0 and losses[5.0] < losses[0.0] - 0.5, losses
