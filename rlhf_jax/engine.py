"""The hybrid engine: one set of weights, laid out by `train_layout` to learn and by GENERATE to answer, on one mesh.

`publish` reshards the actor for generation, `generate` samples answers, `score` runs actor, reference, critic and
reward model over them, `update` takes one optimizer step of actor and critic. What to learn from an experience is the
caller's: the engine is given the estimator of advantages and the two losses as functions.

B rollouts, P prompt positions, N answer tokens, S = P + N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.average import make_average, step_of
from rlhf_jax.generate import Rollout
from rlhf_jax.gpus import RUN_OPTIONS
from rlhf_jax.host_memory import to_devices
from rlhf_jax.mesh import Layout, check_divides
from rlhf_jax.models.architecture import Compute, DecoderConfig
from rlhf_jax.models.cached import Weights
from rlhf_jax.models.decoder import (
    abstract_params,
    bind,
    head_kernel,
    head_options,
    last_hidden,
    scalar,
)
from rlhf_jax.models.layers import roll_rows
from rlhf_jax.objectives.logprobs import token_logprobs, token_logprobs_and_entropy
from rlhf_jax.rollout import generate_program, make_generate, make_publish
from rlhf_jax.sampling import SampleConfig, check_learnable
from rlhf_jax.train_step import Params, TrainState, join_rows, make_update, split_rows
from rlhf_jax.trees import record


@record
class EngineState:
    """What an update changes, and what a checkpoint therefore keeps.

    Attributes:
        actor: with or without adapters.
        critic: with a scalar head.
        average: float32 moving average of what the actor trains, in host memory or not; {}: none is kept.
    """

    actor: TrainState
    critic: TrainState
    average: Params = dataclasses.field(default_factory=dict)


@record
class FrozenParams:
    """The parameters that no update changes. They are never donated, so that models may share them.

    Attributes:
        actor, critic: what of them does not train.
        reference: the policy that the KL is measured to, in device or pinned host memory; {} where the actor has
            adapters: then it is the actor's base without them, and no copy exists.
        reward: the reward model.
    """

    actor: Params
    critic: Params
    reference: Params
    reward: Params


@record
class Experience:
    """Rollouts with all that the losses need. Sequences are right-padded; action n of row b is at starts[b] + n.

    Attributes:
        tokens, mask: [B, S] int32, bool: prompt and answer.
        starts: [B] int32, tokens of the prompt.
        actions, action_mask: [B, N] int32, bool: the answer, up to and including EOS.
        ended: [B] bool, by EOS.
        logprobs, ref_logprobs: [B, N] float32 by the actor before any update, and by the reference.
        values: [B, N] float32, the critic's before each action.
        score: [B] float32, the reward model's at the last token.
        advantages, returns: [B, N] float32.
    """

    tokens: jax.Array
    mask: jax.Array
    starts: jax.Array
    actions: jax.Array
    action_mask: jax.Array
    ended: jax.Array
    logprobs: jax.Array
    ref_logprobs: jax.Array
    values: jax.Array
    score: jax.Array
    advantages: jax.Array
    returns: jax.Array


Stats = dict[str, jax.Array]
Estimator = Callable[[Experience], tuple[jax.Array, jax.Array]]  # -> (advantages, returns), [B, N]
ActorLoss = Callable[[jax.Array, jax.Array, Experience], tuple[jax.Array, Stats]]  # (logprobs, entropy, experience)
CriticLoss = Callable[[jax.Array, Experience], tuple[jax.Array, Stats]]  # (values, experience)


class Engine(NamedTuple):
    """publish(params) -> weights; generate(weights, prompts, prompt_mask, key) -> Rollout, on host arrays [B, P];
    score(state, frozen, rollout) -> Experience; update(state, frozen, experience) -> (state, {name: scalar}), with the
    state donated.

    `programs` are the jitted functions inside, to be lowered: publish, generate(weights, prompts, mask, key), score (of
    models on the devices, without an average), actor and critic(state, frozen, experience), and average(average,
    weights) of one array.
    """

    publish: Callable[[Params], Weights]
    generate: Callable[[Weights, np.ndarray, np.ndarray, jax.Array], Rollout]
    score: Callable[[EngineState, FrozenParams, Rollout], Experience]
    update: Callable[[EngineState, FrozenParams, Experience], tuple[EngineState, Stats]]
    programs: Mapping[str, Any]


def answer_hidden(hidden: jax.Array, starts: jax.Array, num_actions: int) -> jax.Array:
    """[B, S, E] -> [B, N, E]: the states from which each answer token was predicted."""
    index = (starts - 1)[:, None] + jnp.arange(num_actions)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def make_score(
    actor: DecoderConfig,
    critic: DecoderConfig,
    reward: DecoderConfig,
    estimate: Estimator,
    layout: Layout,
    compute: Compute,
    temperature: float,
    num_micro: int,
) -> Callable[[EngineState, FrozenParams, Rollout], Experience]:
    """Compile (state, frozen, rollout) -> Experience: four forward passes in one program, everything by `layout`.

    The passes are over `num_micro` parts of the rollout, one after the other; advantages are of all of it.
    """

    compute = dataclasses.replace(compute, remat="none")

    def forward(config: DecoderConfig, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return bind(config, params)(tokens, mask, compute, layout)

    def score_part(state: EngineState, frozen: FrozenParams, rollout: Rollout) -> Experience:
        starts = rollout.prompt_mask.sum(axis=1, dtype=jnp.int32)
        padding = rollout.prompts.shape[1] - starts
        tokens = roll_rows(jnp.concatenate([rollout.prompts, rollout.tokens], axis=1), padding)
        mask = roll_rows(jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1), padding)
        tokens, mask = (layout.constrain(x, "batch", None) for x in (tokens, mask))
        length = rollout.tokens.shape[1]

        def logprobs(config: DecoderConfig, params: Params) -> jax.Array:
            hidden = answer_hidden(forward(config, params, tokens, mask), starts, length)
            options = dict(chunk=compute.chunk, temperature=temperature, **head_options(config, params))
            return token_logprobs(hidden, head_kernel(config, params), rollout.tokens, **options)

        learned, reference = logprobs(actor, state.actor.params(frozen.actor)), frozen.reference
        if not reference:
            # Of one base the compiler would gather each kernel once for both passes, and where layers are unrolled hold
            # those of the whole model from the first to the second.
            learned, reference = jax.lax.optimization_barrier((learned, frozen.actor))
        values = state.critic.params(frozen.critic)
        blank = jnp.zeros(rollout.tokens.shape, jnp.float32)
        return Experience(
            tokens=tokens,
            mask=mask,
            starts=starts,
            actions=rollout.tokens,
            action_mask=rollout.mask,
            ended=rollout.ended,
            logprobs=learned,
            ref_logprobs=logprobs(actor.without_lora(), reference),
            values=scalar(values, answer_hidden(forward(critic, values, tokens, mask), starts, length)),
            score=scalar(frozen.reward, last_hidden(forward(reward, frozen.reward, tokens, mask), mask)),
            advantages=blank,
            returns=blank,
        )

    def score(state: EngineState, frozen: FrozenParams, rollout: Rollout) -> Experience:
        parts = split_rows(rollout, num_micro, layout)
        experience = join_rows(jax.lax.map(lambda part: score_part(state, frozen, part), parts), layout)
        advantages, returns = estimate(experience)
        experience = dataclasses.replace(experience, advantages=advantages, returns=returns)
        return jax.tree.map(lambda x: layout.constrain(x, "batch", *[None] * (x.ndim - 1)), experience)

    return jax.jit(score, compiler_options=RUN_OPTIONS)


def make_engine(
    *,
    actor: DecoderConfig,
    critic: DecoderConfig,
    reward: DecoderConfig,
    estimate: Estimator,
    actor_loss: ActorLoss,
    critic_loss: CriticLoss,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation,
    sample: SampleConfig,
    eos_ids: tuple[int, ...],
    layout: Layout,
    compute: Compute,
    num_micro: int,
    num_score_micro: int,
    generate_rows: int = 0,
    ema_decay: float = 0.0,
) -> Engine:
    """Build the programs of one actor, critic and reward model; nothing is compiled before the first call.

    A moving average that the models hold follows the actor at every optimizer step, by `ema_decay`. (DeepSpeed-Chat's
    follows at every micro-batch, even those that only accumulate; where an update is one micro-batch they are equal.)

    layout: of all that is trained and scored, as `train_layout` gives it.
    """
    check_learnable(sample)
    mesh = layout.mesh

    def answer_states(config: DecoderConfig, params: Params, experience: Experience) -> tuple[jax.Array, jax.Array]:
        """What the head reads at each answer token, and the balance loss."""
        decoder = bind(config, params)
        hidden, balance = decoder.with_balance_loss(experience.tokens, experience.mask, compute, layout)
        return answer_hidden(hidden, experience.starts, experience.actions.shape[1]), balance

    def actor_objective(params: Params, experience: Experience):
        hidden, balance = answer_states(actor, params, experience)
        head, options = head_kernel(actor, params), head_options(actor, params)
        options |= dict(chunk=compute.chunk, temperature=sample.temperature)
        logprobs, entropy = token_logprobs_and_entropy(hidden, head, experience.actions, **options)
        loss, stats = actor_loss(logprobs, entropy, experience)
        return loss + balance, (experience.action_mask.sum(), stats)

    def critic_objective(params: Params, experience: Experience):
        hidden, balance = answer_states(critic, params, experience)
        loss, stats = critic_loss(scalar(params, hidden), experience)
        return loss + balance, (experience.action_mask.sum(), stats)

    update_actor = make_update(actor_objective, actor_tx, abstract_params(actor), layout, num_micro)
    update_critic = make_update(critic_objective, critic_tx, abstract_params(critic), layout, num_micro)

    step_average = step_of(ema_decay)
    follow = make_average(step_average)

    def update(state: EngineState, frozen: FrozenParams, experience: Experience) -> tuple[EngineState, Stats]:
        rows = experience.tokens.shape[0]
        check_divides("rollouts of one update", rows, num_micro * layout.shards("batch"), "micro-batches x devices")
        actor_state, actor_stats = update_actor(state.actor, frozen.actor, experience)
        critic_state, critic_stats = update_critic(state.critic, frozen.critic, experience)
        stats = {f"actor_{name}": value for name, value in actor_stats.items()}
        stats |= {f"critic_{name}": value for name, value in critic_stats.items()}
        return EngineState(actor_state, critic_state, follow(state.average, actor_state.trainable)), stats

    def score(state: EngineState, frozen: FrozenParams, rollout: Rollout) -> Experience:
        # A reference in host memory is on the devices for this alone.
        fetched = dataclasses.replace(frozen, reference=to_devices(frozen.reference))
        return programs["score"](dataclasses.replace(state, average={}), fetched, rollout)

    programs = {
        "publish": make_publish(actor, mesh, compute.dtype, layout.table),
        "generate": generate_program(actor, sample, eos_ids, mesh, compute.dtype, generate_rows, compute.attention),
        "score": make_score(actor, critic, reward, estimate, layout, compute, sample.temperature, num_score_micro),
        "actor": update_actor,
        "critic": update_critic,
        "average": step_average,
    }
    return Engine(
        publish=programs["publish"],
        generate=make_generate(actor, sample, eos_ids, mesh, compute.dtype, generate_rows, compute.attention),
        score=score,
        update=update,
        programs=programs,
    )
