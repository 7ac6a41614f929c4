"""The hybrid engine: one set of weights on one mesh, sharded by `train_layout` to train and GENERATE to generate.

`publish` reshards the actor for generation, `generate` samples answers, `score` runs the models over them, `update`
takes one optimizer step of actor and critic. An `Algorithm` defines advantages and losses. Critic, reference and reward
model are each optional: a model that is None has no parameters, no forward pass and no fields in the experience.

B rollouts, P prompt positions, N answer tokens, S = P + N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.data.batches import Batch
from rlhf_jax.decode import Decoding, Rollout
from rlhf_jax.hardware import RUN_OPTIONS
from rlhf_jax.mesh import Layout, check_divides, to_devices
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel, head_options, last_hidden, scalar_scores
from rlhf_jax.models.inference import Inference, Weights
from rlhf_jax.models.layers import roll_rows
from rlhf_jax.objectives.logprobs import token_logprobs, token_logprobs_and_entropy
from rlhf_jax.policy import answer_hidden, next_token_losses
from rlhf_jax.rollout import Publish, generate_program, make_generate, make_publish
from rlhf_jax.sampling import SampleConfig, check_learnable
from rlhf_jax.train_step import (
    Params,
    TrainState,
    Update,
    ema_update,
    join_micro_batches,
    make_ema_step,
    make_update,
    split_micro_batches,
)
from rlhf_jax.trees import record


@record
class EngineState:
    """The state that an update changes, and that a checkpoint therefore keeps.

    Attributes:
        actor: with or without adapters.
        critic: with a scalar head; None: there is none.
        average: float32 moving average of the actor's trained parameters, in device or pinned host memory; {}: none.
        carried: arrays that the caller carries from one iteration to the next, and that `Algorithm.estimate` receives
            by their names, such as an adaptive KL coefficient; {}: none.
    """

    actor: TrainState
    critic: TrainState | None = None
    average: Params = dataclasses.field(default_factory=dict)
    carried: dict[str, Any] = dataclasses.field(default_factory=dict)


@record
class FrozenParams:
    """The parameters that no update changes. They are never donated, so that models may share them.

    Attributes:
        actor, critic: their parameters that do not train.
        reference: the policy that the KL is measured to, in device or pinned host memory; {} where the actor has
            adapters: the reference is then the actor's base without them, and no copy exists.
        reward: the reward model.
    """

    actor: Params
    critic: Params = dataclasses.field(default_factory=dict)
    reference: Params = dataclasses.field(default_factory=dict)
    reward: Params = dataclasses.field(default_factory=dict)


@record
class ScoredRollout:
    """Rollouts with the outputs of the models. Sequences are right-padded; action n of row b is at starts[b] + n.

    Attributes:
        tokens, mask: [B, S] int32, bool: prompt and answer.
        starts: [B] int32, number of tokens of the prompt.
        actions, action_mask: [B, N] int32, bool: the answer, up to and including EOS.
        ended: [B] bool, whether the answer ended by EOS.
        logprobs: [B, N] float32, of the actor before any update, by `Algorithm.old_logprobs`.
        ref_logprobs: [B, N] float32, of the reference; None: there is none.
        values: [B, N] float32, of the critic before each action; None: there is none.
        score: [B] float32 of the whole answer: by the reward model at the last token, given by the caller, or both.
    """

    tokens: jax.Array
    mask: jax.Array
    starts: jax.Array
    actions: jax.Array
    action_mask: jax.Array
    ended: jax.Array
    logprobs: jax.Array
    ref_logprobs: jax.Array | None
    values: jax.Array | None
    score: jax.Array


@record
class Experience(ScoredRollout):
    """A scored rollout with the estimates of an `Algorithm`: all inputs of the losses.

    Attributes:
        rewards, advantages: [B, N] float32.
        returns: [B, N] float32, targets of the critic; None: there is no critic.
    """

    rewards: jax.Array
    advantages: jax.Array
    returns: jax.Array | None


Stats = dict[str, jax.Array]
Estimates = tuple[jax.Array, jax.Array, jax.Array | None]


@dataclass(frozen=True)
class Algorithm:
    """Advantage estimator and losses: what is learned from rollouts.

    Attributes:
        estimate: scored rollouts of one iteration, and by name what the state carries -> (rewards, advantages,
            returns), see `Experience`.
        actor_loss: (logprobs, entropy, experience) -> (mean loss over the tokens of a micro-batch, {name: mean}).
        critic_loss: (values, experience) -> the same pair; None: there is no critic.
        text_coef: coefficient of the next-token loss on texts, which every update then takes (Ouyang et al. 2022,
            eq. 2, gamma); 0: updates take none.
        actor_weight: (experience) -> the number of things that the actor's loss of a micro-batch is a mean over; None:
            the tokens of its answers.
        score_weight: of the reward model's score in the sum with scores that the caller gives.
        old_logprobs: the actor's before any update, by a pass of its own ("score") or as it sampled ("rollout").
    """

    estimate: Callable[..., Estimates]
    actor_loss: Callable[[jax.Array, jax.Array, Experience], tuple[jax.Array, Stats]]
    critic_loss: Callable[[jax.Array, Experience], tuple[jax.Array, Stats]] | None = None
    text_coef: float = 0.0
    actor_weight: Callable[[Experience], jax.Array] | None = None
    score_weight: float = 1.0
    old_logprobs: Literal["score", "rollout"] = "score"


@dataclass(frozen=True)
class Architectures:
    """The models that an engine runs; None: there is no such model."""

    actor: DecoderConfig
    critic: DecoderConfig | None = None
    reference: DecoderConfig | None = None
    reward: DecoderConfig | None = None


@dataclass(frozen=True)
class Optimizers:
    """The optimizers of an engine.

    Attributes:
        ema_decay: decay of the moving average that a state may hold, updated at every optimizer step of the actor.
            (DeepSpeed-Chat updates it at every micro-batch; both are equal where an update is one micro-batch.)
    """

    actor: optax.GradientTransformation
    critic: optax.GradientTransformation | None = None
    ema_decay: float = 0.0


@dataclass(frozen=True)
class Sampling:
    """How an engine generates.

    Attributes:
        config: temperature, filters and lengths.
        eos_ids: tokens that end an answer.
        rows: answers decoded at a time, a slot that ends taking the next prompt; 0: all at once.
    """

    config: SampleConfig
    eos_ids: tuple[int, ...]
    rows: int = 0


@dataclass(frozen=True)
class Execution:
    """Where and how an engine computes.

    Attributes:
        layout: layout of all models that train or score, from `train_layout`.
        num_micro: micro-batches of one update.
        num_score_micro: parts in which a rollout is scored, one after the other.
    """

    layout: Layout
    compute: Compute
    num_micro: int = 1
    num_score_micro: int = 1


class Programs(NamedTuple):
    """The jitted functions inside an engine, to be lowered.

    Attributes:
        publish: (params) -> weights.
        generate: (weights, prompts [B, P], mask, key) -> Rollout, on the devices.
        score: (state, frozen, rollout, scores) -> Experience, of models on the devices, without an average.
        actor, critic: (state, frozen, experience) -> (state, {name: scalar}); None: there is no critic. With texts
            the actor's third argument is that of `with_texts`.
        average: (average, weights, is_taken) -> average, for one array.
    """

    publish: Publish
    generate: Any
    score: Any
    actor: Update
    critic: Update | None
    average: Any


class HybridEngine(NamedTuple):
    """publish(params) -> weights; generate(weights, prompts, prompt_mask, key) -> Rollout, on host arrays [B, P];
    score(state, frozen, rollout, scores=None) -> Experience, `scores` [B] instead of a reward model or added to its;
    update(state, frozen, experience, texts=None, models=("actor", "critic")) -> (state, {name: scalar}), with the state
    donated: one optimizer step of those of its models, `texts` a `Batch` of rows where the algorithm learns texts.
    """

    models: Architectures
    publish: Publish
    generate: Callable[[Weights, np.ndarray, np.ndarray, jax.Array], Rollout]
    score: Callable[..., Experience]
    update: Callable[..., tuple[EngineState, Stats]]
    programs: Programs


def with_texts(experience: Experience, texts: Batch) -> tuple[Experience, Batch, jax.Array, jax.Array]:
    """What the actor's update takes where the algorithm learns texts: both, and the token counts of each as rows."""
    actions = jnp.broadcast_to(experience.action_mask.sum(), experience.action_mask.shape[:1])
    learned = jnp.broadcast_to(texts.loss_mask[:, 1:].sum(), texts.loss_mask.shape[:1])
    return experience, texts, actions, learned


def _tokens_after(tokens: jax.Array, before: jax.Array | None, layout: Layout) -> jax.Array:
    """Tokens [B, T] int32, which on a single CPU the compiler takes to depend on `before`, of any shape: else it would
    run several passes at once, which compete for the cache. A zero that it cannot see is added."""
    if before is None or not layout.on_one_cpu:
        return tokens
    return tokens + jnp.minimum(jnp.isinf(before.ravel()[0]).astype(jnp.int32), 0)


def make_score(
    models: Architectures, algorithm: Algorithm, execution: Execution, temperature: float
) -> Callable[..., Experience]:
    """The jitted (state, frozen, rollout, scores) -> Experience: up to four forward passes in one program.

    The passes run over parts of the rollout, one after the other; advantages are estimated over the whole rollout.
    """
    layout, compute = execution.layout, dataclasses.replace(execution.compute, remat="none")

    def score_part(state: EngineState, frozen: FrozenParams, rollout: Rollout, scores) -> ScoredRollout:
        starts = rollout.prompt_mask.sum(axis=1, dtype=jnp.int32)
        padding = rollout.prompts.shape[1] - starts
        tokens = roll_rows(jnp.concatenate([rollout.prompts, rollout.tokens], axis=1), padding)
        mask = roll_rows(jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1), padding)
        tokens, mask = (layout.constrain(x, "batch", None) for x in (tokens, mask))

        def forward(config: DecoderConfig, params: Params, before: jax.Array | None) -> jax.Array:
            return bind(config, params)(_tokens_after(tokens, before, layout), mask, compute, layout)[0]

        def answers(config: DecoderConfig, params: Params, before: jax.Array | None) -> jax.Array:
            return answer_hidden(forward(config, params, before), starts, rollout.tokens.shape[1])

        def logprobs(config: DecoderConfig, params: Params, before: jax.Array | None) -> jax.Array:
            options = dict(chunk=compute.chunk, temperature=temperature, **head_options(config, params))
            hidden = answers(config, params, before)
            return token_logprobs(hidden, head_kernel(config, params), rollout.tokens, **options)

        reference, own_pass = frozen.reference or frozen.actor, algorithm.old_logprobs == "score"
        learned = logprobs(models.actor, state.actor.params(frozen.actor), None) if own_pass else rollout.logprobs
        if models.reference and not frozen.reference and own_pass:
            # For a shared base the compiler would gather each kernel once for both passes, and with unrolled layers
            # keep those of the whole model from the first pass to the second.
            learned, reference = jax.lax.optimization_barrier((learned, reference))
        ref_logprobs = logprobs(models.reference, reference, learned) if models.reference else None
        values, critic = None, state.critic.params(frozen.critic) if models.critic else {}
        if models.critic:
            values = scalar_scores(critic, answers(models.critic, critic, ref_logprobs))
        if models.reward:
            given, before = 0.0 if scores is None else scores, ref_logprobs if values is None else values
            hidden = last_hidden(forward(models.reward, frozen.reward, before), mask)
            scores = given + algorithm.score_weight * scalar_scores(frozen.reward, hidden)
        answer = dict(actions=rollout.tokens, action_mask=rollout.mask, ended=rollout.ended, score=scores)
        outputs = dict(logprobs=learned, ref_logprobs=ref_logprobs, values=values)
        return ScoredRollout(tokens=tokens, mask=mask, starts=starts, **answer, **outputs)

    def score(state: EngineState, frozen: FrozenParams, rollout: Rollout, scores: jax.Array | None) -> Experience:
        parts = split_micro_batches((rollout, scores), execution.num_score_micro, layout)
        scored = join_micro_batches(jax.lax.map(lambda part: score_part(state, frozen, *part), parts), layout)
        rewards, advantages, returns = algorithm.estimate(scored, **state.carried)
        experience = Experience(**vars(scored), rewards=rewards, advantages=advantages, returns=returns)
        return jax.tree.map(lambda x: layout.constrain(x, "batch", *[None] * (x.ndim - 1)), experience)

    return jax.jit(score, compiler_options=RUN_OPTIONS)


def make_updates(
    models: Architectures, algorithm: Algorithm, optimizers: Optimizers, execution: Execution, temperature: float
) -> tuple[Update, Update | None]:
    """One optimizer step of the actor, and one of the critic if there is one, each from `make_update`."""
    layout, compute = execution.layout, execution.compute

    def answer_states(config: DecoderConfig, params: Params, experience: Experience) -> tuple[jax.Array, jax.Array]:
        """The input of the head at each answer token, and the balance loss."""
        hidden, balance = bind(config, params)(experience.tokens, experience.mask, compute, layout)
        return answer_hidden(hidden, experience.starts, experience.actions.shape[1]), balance

    def actor_objective(params: Params, experience: Experience):
        hidden, balance = answer_states(models.actor, params, experience)
        head, options = head_kernel(models.actor, params), head_options(models.actor, params)
        options |= dict(chunk=compute.chunk, temperature=temperature)
        logprobs, entropy = token_logprobs_and_entropy(hidden, head, experience.actions, **options)
        loss, stats = algorithm.actor_loss(logprobs, entropy, experience)
        weight = algorithm.actor_weight(experience) if algorithm.actor_weight else experience.action_mask.sum()
        return loss + balance, (weight, stats, experience.action_mask.sum())

    def mixed_objective(params: Params, batch):
        """Both losses, each a mean over the tokens of its kind in the whole update, whatever its micro-batches hold."""
        experience, texts, actions, learned = batch
        loss, (count, stats, _) = actor_objective(params, experience)
        text_loss, balance, text_count = next_token_losses(models.actor, params, texts, compute, layout)
        # Every micro-batch weighs 1, and the update divides by their number.
        share, text_share = (
            execution.num_micro * part / jnp.maximum(whole[0], 1)
            for part, whole in ((count, actions), (text_count, learned))
        )
        text_loss = text_share * text_loss
        stats = {name: share * value for name, value in stats.items()} | {"text_loss": text_loss}
        return share * loss + algorithm.text_coef * text_loss + balance, (jnp.float32(1), stats)

    def critic_objective(params: Params, experience: Experience):
        hidden, balance = answer_states(models.critic, params, experience)
        loss, stats = algorithm.critic_loss(scalar_scores(params, hidden), experience)
        return loss + balance, (experience.action_mask.sum(), stats)

    def step(objective, tx: optax.GradientTransformation, config: DecoderConfig) -> Update:
        return make_update(objective, tx, abstract_params(config), layout, execution.num_micro, compute.scaling)

    actor = step(mixed_objective if algorithm.text_coef else actor_objective, optimizers.actor, models.actor)
    return actor, step(critic_objective, optimizers.critic, models.critic) if models.critic else None


def make_hybrid_engine(
    models: Architectures, algorithm: Algorithm, optimizers: Optimizers, sampling: Sampling, execution: Execution
) -> HybridEngine:
    """The engine of these models; nothing is compiled before the first call."""
    check_learnable(sampling.config)
    own_models = ("actor", "critic") if (has_critic := models.critic is not None) else ("actor",)
    assert has_critic == (algorithm.critic_loss is not None) == (optimizers.critic is not None), "all three or none"
    layout, compute, temperature = execution.layout, execution.compute, sampling.config.temperature
    publish = make_publish(models.actor, layout.mesh, compute.dtype, layout.table)
    model = Inference(models.actor, publish.layout, compute.dtype, compute.attention)
    decoding = Decoding(model, sampling.config, sampling.eos_ids)
    programs = Programs(
        publish,
        generate_program(decoding, sampling.rows),
        make_score(models, algorithm, execution, temperature),
        *make_updates(models, algorithm, optimizers, execution, temperature),
        make_ema_step(optimizers.ema_decay),
    )

    def score(state: EngineState, frozen: FrozenParams, rollout: Rollout, scores=None) -> Experience:
        if scores is None and models.reward is None:
            raise ValueError("give the scores of the answers: the engine has no reward model")
        # A reference in host memory is on the devices only while it scores.
        frozen = dataclasses.replace(frozen, reference=to_devices(frozen.reference))
        scores = None if scores is None else np.asarray(scores, np.float32)
        return programs.score(dataclasses.replace(state, average={}), frozen, rollout, scores)

    def update(
        state: EngineState, frozen: FrozenParams, experience: Experience, texts: Batch | None = None, models=own_models
    ) -> tuple[EngineState, Stats]:
        rows, parts = experience.tokens.shape[0], execution.num_micro * layout.shards("batch")
        check_divides("rollouts of one update", rows, parts, "micro-batches x devices")
        if (texts is None) == bool(algorithm.text_coef and "actor" in models):
            raise ValueError("give texts to an update of the actor where the algorithm has a text_coef, and only there")
        if texts is not None:
            check_divides("texts of one update", texts.tokens.shape[0], parts, "micro-batches x devices")
        states, stats, average = {}, {}, state.average
        before = jnp.copy(state.actor.step)  # the state is donated
        for name in models:
            batch = with_texts(experience, texts) if texts is not None and name == "actor" else experience
            states[name], each = getattr(programs, name)(getattr(state, name), getattr(frozen, name), batch)
            stats |= {f"{name}_{key}": value for key, value in each.items()}
        state = dataclasses.replace(state, **states)
        if "actor" in states and average:
            average = ema_update(programs.average, average, state.actor.trainable, state.actor.step > before)
        return dataclasses.replace(state, average=average), stats

    return HybridEngine(models, publish, make_generate(decoding, sampling.rows), score, update, programs)
