"""The hybrid engine: one set of weights, laid out by TRAIN to learn and by GENERATE to answer, on one mesh.

`publish` reshards the actor for generation, `generate` samples answers, `score` runs actor, reference, critic and
reward model over them, `update` takes one optimizer step of actor and critic. What to learn from an experience is the
caller's: the engine is given the estimator of advantages and the two losses as functions.

B rollouts, P prompt positions, N answer tokens, S = P + N.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rlhf_jax.generate import Rollout, bucket, generate, generate_in_rows
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, check_divides, check_model_divides
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.attention import Choice
from rlhf_jax.models.cached import Weights, for_decoding, quantised_for_decoding
from rlhf_jax.models.decoder import (
    NO_LORA,
    abstract_params,
    bind,
    head_kernel,
    head_options,
    last_hidden,
    scalar,
)
from rlhf_jax.models.layers import roll_rows
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.objectives.logprobs import token_logprobs, token_logprobs_and_entropy
from rlhf_jax.sampling import SampleConfig, check_learnable, check_sample
from rlhf_jax.train_step import Params, TrainState, join_rows, make_update, split_rows
from rlhf_jax.trees import record

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Role:
    """A model that the engine runs: its architecture, and its adapters if it has some."""

    config: DecoderConfig
    lora: LoraConfig = NO_LORA


@dataclass(frozen=True)
class Compute:
    """How the forward and backward passes are computed.

    Attributes:
        dtype: of activations, matrix products, generation weights and cache.
        remat: recompute layers in the backward pass.
        chunk: positions whose logits exist at once; 0: all.
        attention: the kernel of training, scoring and prefill, see `attention_kernel`.
    """

    dtype: jnp.dtype
    remat: bool
    chunk: int
    attention: Choice = "auto"


@record
class Models:
    """The four models of PPO.

    Attributes:
        actor: with or without adapters.
        critic: with a scalar head.
        reference: parameters of the frozen policy that the KL is measured to; {} where the actor has adapters: then it
            is the actor's base without them, and no copy exists.
        reward: parameters of the frozen reward model.
    """

    actor: TrainState
    critic: TrainState
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
    score(models, rollout) -> Experience; update(models, experience) -> (models, {name: scalar}), models donated.

    `programs` are the jitted functions inside, for whoever lowers them: publish, generate(weights, prompts, mask, key),
    score, actor(state, experience) and critic(state, experience).
    """

    publish: Callable[[Params], Weights]
    generate: Callable[[Weights, np.ndarray, np.ndarray, jax.Array], Rollout]
    score: Callable[[Models, Rollout], Experience]
    update: Callable[[Models, Experience], tuple[Models, Stats]]
    programs: Mapping[str, Any]


def answer_hidden(hidden: jax.Array, starts: jax.Array, num_actions: int) -> jax.Array:
    """[B, S, E] -> [B, N, E]: the states from which each answer token was predicted."""
    index = (starts - 1)[:, None] + jnp.arange(num_actions)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


@functools.lru_cache
def make_publish(role: Role, mesh: Mesh, dtype: jnp.dtype) -> Callable[[Params], Weights]:
    """Compile (parameters and adapters, by TRAIN) -> generation weights, by GENERATE: merge, cast, gather, lay out.

    A quantised base is not merged, and on one device not copied: its weights are the arrays of the parameters, and last
    until those are donated. `lower` is of the compiled part.

    Raises:
        ValueError: the tensor axis does not divide the attention heads.
    """
    check_model_divides({"attention heads": role.config.num_heads}, mesh)
    layout = Layout(mesh, GENERATE)
    program = jax.jit(lambda params: for_decoding(role.config, params, layout, dtype, role.lora))

    def publish(params: Params) -> Weights:
        return program(params) | quantised_for_decoding(role.config, params, layout)

    publish.lower = program.lower
    return publish


@functools.lru_cache
def generate_program(
    config: DecoderConfig,
    sample: SampleConfig,
    eos_ids: tuple[int, ...],
    mesh: Mesh,
    dtype: jnp.dtype,
    rows: int = 0,
    attention: Choice = "auto",
):
    """The jitted (weights, prompts [B, P], mask [B, P], key, in_rows) -> Rollout, on arrays laid out by GENERATE.

    in_rows, static: in `rows` rows that are refilled, in place of all at once.
    """
    layout = Layout(mesh, GENERATE)

    @functools.partial(jax.jit, static_argnames="in_rows")
    def program(weights, prompts, prompt_mask, key, in_rows=False):
        options = config, weights, prompts, prompt_mask, key, sample, eos_ids, layout, dtype
        if in_rows:
            return generate_in_rows(*options, rows, attention)
        return generate(*options, attention)

    return program


@functools.lru_cache
def make_generate(
    config: DecoderConfig,
    sample: SampleConfig,
    eos_ids: tuple[int, ...],
    mesh: Mesh,
    dtype: jnp.dtype,
    rows: int = 0,
    attention: Choice = "auto",
) -> Callable[[Weights, np.ndarray, np.ndarray, jax.Array], Rollout]:
    """(weights, prompts [B, P], mask [B, P], key) -> Rollout, for left-padded prompts on the host.

    Padding that all rows share is cut down to a bucket, so that few lengths are compiled (every one is logged); prompts
    are padded to what the mesh divides, and dropped again. Each is answered `sample.num_samples` times.

    Args:
        rows: answers that are decoded at a time, a row that ends taking the next prompt; 0, or as many as there are
            answers to draw: all at once.
    Raises:
        ValueError: the devices do not divide the rows, a prompt is empty, or prompt and answer do not fit the model's
            positions.
    """
    check_sample(sample)
    layout = Layout(mesh, GENERATE)
    check_rows(rows, layout)
    program = generate_program(config, sample, eos_ids, mesh, dtype, rows, attention)
    compiled: set[tuple[int, int]] = set()

    def run(weights, prompts, prompt_mask, key):
        sizes = prompt_mask.sum(axis=1)
        if sizes.min() == 0:
            raise ValueError(f"row {int(sizes.argmin())} of the prompts is empty: give it at least one token")
        check_positions(config, int(sizes.max()), sample.max_new_tokens)
        cut = tuple(x[:, -bucket(int(sizes.max())) :] for x in (prompts, prompt_mask))
        each = tuple(np.repeat(x, sample.num_samples, axis=0) for x in cut)
        count = len(each[0])
        more = -count % layout.shards("batch")
        filled = tuple(np.pad(x, ((0, more), (0, 0)), mode="edge") for x in each)
        in_rows = 0 < rows < count + more
        if (shape := filled[0].shape) not in compiled:
            compiled.add(shape)
            LOGGER.info(
                "generate: compiling program %d, for %d answers%s to prompts of %d tokens; the model's positions allow "
                "%d lengths",
                len(compiled),
                shape[0],
                f" in {rows} rows" if in_rows else "",
                shape[1],
                len({bucket(n) for n in range(1, config.max_positions + 1)}),
            )
        # Whichever device has a free row takes the next prompt, so then every device has all of them.
        there = tuple(layout.put(x, None, None) for x in filled) if in_rows else layout.put_batch(filled)
        rollout = program(weights, *there, key, in_rows=in_rows)
        return rollout if not more else jax.tree.map(lambda leaf: leaf[:count], rollout)

    return run


def check_rows(rows: int, layout: Layout, name: str = "rows") -> None:
    """Raise ValueError unless the devices that share the batch in generation divide so many rows; 0 is all at once."""
    if rows:
        check_divides(name, rows, Layout(layout.mesh, GENERATE).shards("batch"), "devices of mesh.data x mesh.fsdp")


def sample_answers(
    model: Pretrained,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    sample: SampleConfig,
    key: jax.Array,
    *,
    rows: int = 0,
) -> Rollout:
    """Answer prompts by a language model, in the dtype of its parameters.

    Args:
        input_ids, attention_mask: [B, P] int and int or bool; padding may lie on either side.
        key: from jax.random.key; the same key gives the same answers on any number of devices and rows.
        rows: answers decoded at a time, a row that ends taking the next prompt; 0: all at once.
    Returns:
        Rollout with .tokens [B, N] int32, .mask [B, N] bool, true up to and including EOS, .logprobs [B, N] float32;
        B x num_samples rows, the samples of a prompt one after the other.
    Raises:
        ValueError: a scalar head, an empty prompt, no EOS known, or more positions than the model has.
    """
    if model.config.scalar_head:
        raise ValueError("this model has a scalar head and cannot generate: load it with from_pretrained")
    tokens, mask = np.asarray(input_ids, np.int32), np.asarray(attention_mask, bool)
    order = np.argsort(mask, axis=1, kind="stable")  # padding to the left, real tokens in their order
    more = ((0, 0), (bucket(mask.shape[1]) - mask.shape[1], 0))
    tokens, mask = (np.pad(np.take_along_axis(x, order, axis=1), more) for x in (tokens, mask))
    dtype, mesh = model.params["embed/tokens"].dtype, model.layout.mesh
    weights = make_publish(Role(model.config, model.lora), mesh, dtype)(model.params)
    return make_generate(model.config, sample, eos_ids(model), mesh, dtype, rows)(weights, tokens, mask, key)


def eos_ids(model: Pretrained) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's EOS, and what generation_config.json and config.json list.

    Raises:
        ValueError: nobody names one.
    """
    ids = set() if model.tokenizer is None else {model.tokenizer.eos_token_id}
    for source in (model.generation_config, model.hf_config):
        named = source.get("eos_token_id")
        ids |= set(named) if isinstance(named, list) else {named}
    if not ids - {None}:
        raise ValueError("the model names no EOS token, so no answer could end: set eos_token_id in its config.json")
    return tuple(sorted(ids - {None}))


def check_positions(config: DecoderConfig, prompt: int, answer: int) -> None:
    """Raise ValueError unless a prompt and an answer of so many tokens fit the model's positions."""
    if prompt + answer > config.max_positions:
        raise ValueError(
            f"a prompt of {prompt} tokens and {answer} new ones need {prompt + answer} positions, and the model has "
            f"{config.max_positions}: shorten the prompt to {max(0, config.max_positions - answer)} tokens or set "
            f"max_new_tokens to at most {max(0, config.max_positions - prompt)}"
        )


def make_score(
    actor: Role,
    critic: Role,
    reward: DecoderConfig,
    estimate: Estimator,
    mesh: Mesh,
    compute: Compute,
    temperature: float,
    num_micro: int,
) -> Callable[[Models, Rollout], Experience]:
    """Compile (models, rollout) -> Experience: four forward passes in one program, everything by TRAIN.

    The passes are over `num_micro` parts of the rollout, one after the other; advantages are of all of it.
    """
    layout = Layout(mesh, TRAIN)

    def forward(role: Role, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        options = dict(dtype=compute.dtype, layout=layout, remat=False, attention=compute.attention)
        return bind(role.config, params, role.lora)(tokens, mask, **options)

    def score_part(models: Models, rollout: Rollout) -> Experience:
        starts = rollout.prompt_mask.sum(axis=1, dtype=jnp.int32)
        padding = rollout.prompts.shape[1] - starts
        tokens = roll_rows(jnp.concatenate([rollout.prompts, rollout.tokens], axis=1), padding)
        mask = roll_rows(jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1), padding)
        tokens, mask = (layout.constrain(x, "batch", None) for x in (tokens, mask))
        length = rollout.tokens.shape[1]

        def logprobs(role: Role, params: Params) -> jax.Array:
            hidden = answer_hidden(forward(role, params, tokens, mask), starts, length)
            options = dict(chunk=compute.chunk, temperature=temperature, **head_options(role.config, params))
            return token_logprobs(hidden, head_kernel(role.config, params), rollout.tokens, **options)

        reference = models.reference or models.actor.frozen
        blank = jnp.zeros(rollout.tokens.shape, jnp.float32)
        return Experience(
            tokens=tokens,
            mask=mask,
            starts=starts,
            actions=rollout.tokens,
            action_mask=rollout.mask,
            ended=rollout.ended,
            logprobs=logprobs(actor, models.actor.params),
            ref_logprobs=logprobs(Role(actor.config), reference),
            values=scalar(
                models.critic.params, answer_hidden(forward(critic, models.critic.params, tokens, mask), starts, length)
            ),
            score=scalar(models.reward, last_hidden(forward(Role(reward), models.reward, tokens, mask), mask)),
            advantages=blank,
            returns=blank,
        )

    def score(models: Models, rollout: Rollout) -> Experience:
        parts = split_rows(rollout, num_micro, layout)
        experience = join_rows(jax.lax.map(lambda part: score_part(models, part), parts), layout)
        advantages, returns = estimate(experience)
        experience = dataclasses.replace(experience, advantages=advantages, returns=returns)
        return jax.tree.map(lambda x: layout.constrain(x, "batch", *[None] * (x.ndim - 1)), experience)

    return jax.jit(score)


def make_engine(
    *,
    actor: Role,
    critic: Role,
    reward: DecoderConfig,
    estimate: Estimator,
    actor_loss: ActorLoss,
    critic_loss: CriticLoss,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation,
    sample: SampleConfig,
    eos_ids: tuple[int, ...],
    mesh: Mesh,
    compute: Compute,
    num_micro: int,
    num_score_micro: int,
    generate_rows: int = 0,
) -> Engine:
    """Build the four programs of one actor, critic and reward model; nothing is compiled before the first call."""
    check_learnable(sample)
    layout = Layout(mesh, TRAIN)

    def answer_states(role: Role, params: Params, experience: Experience) -> tuple[jax.Array, jax.Array]:
        """What the head reads at each answer token, and the balance loss."""
        decoder = bind(role.config, params, role.lora)
        options = dict(dtype=compute.dtype, layout=layout, remat=compute.remat, attention=compute.attention)
        hidden, balance = decoder.with_balance_loss(experience.tokens, experience.mask, **options)
        return answer_hidden(hidden, experience.starts, experience.actions.shape[1]), balance

    def actor_objective(params: Params, experience: Experience):
        hidden, balance = answer_states(actor, params, experience)
        head, options = head_kernel(actor.config, params), head_options(actor.config, params)
        options |= dict(chunk=compute.chunk, temperature=sample.temperature)
        logprobs, entropy = token_logprobs_and_entropy(hidden, head, experience.actions, **options)
        loss, stats = actor_loss(logprobs, entropy, experience)
        return loss + balance, (experience.action_mask.sum(), stats)

    def critic_objective(params: Params, experience: Experience):
        hidden, balance = answer_states(critic, params, experience)
        loss, stats = critic_loss(scalar(params, hidden), experience)
        return loss + balance, (experience.action_mask.sum(), stats)

    update_actor = make_update(actor_objective, actor_tx, abstract_params(actor.config, actor.lora), layout, num_micro)
    update_critic = make_update(
        critic_objective, critic_tx, abstract_params(critic.config, critic.lora), layout, num_micro
    )

    def update(models: Models, experience: Experience) -> tuple[Models, Stats]:
        rows = experience.tokens.shape[0]
        check_divides("rollouts of one update", rows, num_micro * layout.shards("batch"), "micro-batches x devices")
        actor_state, actor_stats = update_actor(models.actor, experience)
        critic_state, critic_stats = update_critic(models.critic, experience)
        stats = {f"actor_{name}": value for name, value in actor_stats.items()}
        stats |= {f"critic_{name}": value for name, value in critic_stats.items()}
        return dataclasses.replace(models, actor=actor_state, critic=critic_state), stats

    programs = {
        "publish": make_publish(actor, mesh, compute.dtype),
        "generate": generate_program(
            actor.config, sample, eos_ids, mesh, compute.dtype, generate_rows, compute.attention
        ),
        "score": make_score(actor, critic, reward, estimate, mesh, compute, sample.temperature, num_score_micro),
        "actor": update_actor,
        "critic": update_critic,
    }
    return Engine(
        publish=programs["publish"],
        generate=make_generate(actor.config, sample, eos_ids, mesh, compute.dtype, generate_rows, compute.attention),
        score=programs["score"],
        update=update,
        programs=programs,
    )
