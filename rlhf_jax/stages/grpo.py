"""Group-relative policy optimisation: several answers to each prompt, compared with each other, and no critic.

The family of GRPO, Dr. GRPO, RLOO, REINFORCE++, DAPO, GSPO and CISPO is one loss with choices, see `objectives.grpo`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.batches import Batches, Prefetch
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.selection import select_rows
from rlhf_jax.decode import Rollout, bucket_length
from rlhf_jax.engine import (
    Algorithm,
    Architectures,
    EngineState,
    Execution,
    Experience,
    FrozenParams,
    HybridEngine,
    Optimizers,
    Sampling,
    make_hybrid_engine,
)
from rlhf_jax.mesh import Layout, to_devices, to_host
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.objectives import grpo
from rlhf_jax.optim import learning_rate, make_optimizer
from rlhf_jax.rollout import check_positions, eos_ids
from rlhf_jax.stages.batch_sizes import rows_per_source, total_steps
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.from_scratch import make_base_model
from rlhf_jax.stages.grpo_config import GRPOConfig
from rlhf_jax.stages.grpo_losses import answer_metrics, estimate_advantages, group_loss, loss_weight
from rlhf_jax.stages.loop import train_loop
from rlhf_jax.stages.models import ModelConfig, copy_frozen, export_model, load_model, log_attention, make_state
from rlhf_jax.stages.ppo import PhaseTimer, count_publish_bytes, take_rows, write_rollouts
from rlhf_jax.stages.rewards import open_functions, reward_metrics
from rlhf_jax.stages.symptoms import SymptomLog
from rlhf_jax.stages.tokenizers import adopt_tokenizer
from rlhf_jax.train_step import start_ema, taken_before

LOGGER = logging.getLogger(__name__)


def grpo_algorithm(config: GRPOConfig) -> Algorithm:
    """Advantages from groups, and the policy loss of these settings."""
    estimate, loss = (functools.partial(part, config=config) for part in (estimate_advantages, group_loss))
    weight = functools.partial(loss_weight, config=config)
    scored = dict(score_weight=config.model_weight or 0.0, old_logprobs=config.old_logprobs)
    return Algorithm(estimate, loss, actor_weight=weight, **scored)


def grpo_optimizers(config: GRPOConfig, updates: int) -> Optimizers:
    """The optimizer of a run of `updates` optimizer steps."""
    return Optimizers(make_optimizer(config.actor, updates), ema_decay=config.ema_decay)


def grpo_engine(
    config: GRPOConfig,
    model: ModelConfig,
    actor: DecoderConfig,
    scorer: DecoderConfig,
    optimizers: Optimizers,
    eos_ids: tuple[int, ...],
    layout: Layout,
    reference: DecoderConfig | None = None,
) -> HybridEngine:
    """The engine that runs these settings; reference: the architecture of the model that `reference` names, if any."""
    num_micro = config.update_size // (config.micro_batch_size or config.update_size)
    has_scorer = config.model_weight is not None
    models = Architectures(
        model.with_lora(actor),
        reference=(reference or actor).without_lora() if config.kl_coef else None,
        reward=scorer.without_lora() if has_scorer else None,
    )
    execution = Execution(layout, model.compute, num_micro, num_micro * config.rollouts // config.update_size)
    sampling = Sampling(config.sample, eos_ids, config.generate_rows)
    return make_hybrid_engine(models, grpo_algorithm(config), optimizers, sampling, execution)


def grpo_models(
    actor: Pretrained,
    scorer: Pretrained | None,
    model: ModelConfig,
    optimizers: Optimizers,
    seed: int,
    config: GRPOConfig,
    teacher: Pretrained | None = None,
) -> tuple[EngineState, FrozenParams]:
    """The trained state and the frozen parameters, from a loaded actor and, if any, a reward model and a teacher."""
    assert "auto" not in (model.offload_reference, model.offload_ema), "the plan resolves this"
    # Training donates its parameters, so the reference is a copy.
    source = teacher or (actor if config.kl_coef and not model.lora.rank else None)
    reference = copy_frozen(source.params, model.frozen_dtype) if source else {}
    if model.offload_reference:
        reference = to_host(reference)
    reward = {} if scorer is None else copy_frozen(scorer.params, model.frozen_dtype)
    state, frozen = make_state(actor, model, optimizers.actor, seed)
    average = start_ema(state.trainable, offload=model.offload_ema) if optimizers.ema_decay else {}
    return EngineState(state, average=average), FrozenParams(frozen, reference=reference, reward=reward)


def load_scorer(context: StageContext, config: GRPOConfig, tokenizer) -> Pretrained | None:
    """This run's reward model, with the tokenizer of the actor; None where the rewards do not name it."""
    if config.model_weight is None:
        return None
    scorer = load_model(context.start["scorer"], context.model, context.layout, scalar_head=True)
    prepare_tokenizer(scorer.tokenizer, *context.data.rendering)
    return adopt_tokenizer(context.name, scorer, tokenizer)


class Answers(NamedTuple):
    """The answers of one iteration, or of one round of it.

    Attributes:
        scores: {name of a reward function: [B] its scores}.
    """

    rollout: Rollout
    experience: Experience
    scores: dict[str, np.ndarray]


def refill_groups(
    first: Answers, sample: Callable[[int], Answers], config: GRPOConfig
) -> tuple[Answers, dict[str, float]]:
    """The answers with groups of equal rewards replaced by groups of later rounds, and metrics.

    Those that `refill_rounds` rounds cannot replace stay, with advantages of 0. Source: Yu et al. 2025 (DAPO, arXiv
    2503.14476), section 3.2, with a limit.

    Args:
        sample: (round, from 1) -> answers to as many other prompts.
    """
    group, rounds = config.sample.num_samples, [first]
    signal = find_signal(first, group)
    chosen, missing = np.arange(len(signal)), np.flatnonzero(~signal)
    stats = {"groups_without_signal": len(missing) / len(signal)}
    while len(missing) and len(rounds) <= config.refill_rounds:
        rounds.append(sample(len(rounds)))
        found = np.flatnonzero(find_signal(rounds[-1], group))[: len(missing)] + (len(rounds) - 1) * len(signal)
        chosen[missing[: len(found)]] = found
        missing = missing[len(found) :]
    if config.refill_rounds:
        stats |= {"refill_rounds": len(rounds) - 1, "groups_left_without_signal": len(missing) / len(signal)}
    if len(rounds) == 1:
        return first, stats
    index = (chosen[:, None] * group + np.arange(group)).reshape(-1)
    rollout, experience = take_from_rounds([(each.rollout, each.experience) for each in rounds], index)
    scores = {name: np.concatenate([each.scores[name] for each in rounds])[index] for name in first.scores}
    return Answers(rollout, estimate_again(experience, config=config), scores), stats


@functools.partial(jax.jit, static_argnames="config")
def estimate_again(experience: Experience, *, config: GRPOConfig) -> Experience:
    """The experience with rewards and advantages over all of its groups."""
    rewards, advantages, _ = estimate_advantages(experience, config)
    return dataclasses.replace(experience, rewards=rewards, advantages=advantages)


def find_signal(answers: Answers, group: int) -> np.ndarray:
    """[groups] bool on the host, see `objectives.grpo.has_signal`."""
    return hosts.fetch(grpo.has_signal(answers.experience.rewards.sum(axis=1), group))


def take_from_rounds(rounds: Sequence[tuple[Rollout, Experience]], index: np.ndarray) -> tuple[Rollout, Experience]:
    """The rows at `index` [B] of all rounds, one after the other, padded to the longest prompts among them."""
    prompt = max(rollout.prompts.shape[1] for rollout, _ in rounds)
    total = max(experience.tokens.shape[1] for _, experience in rounds)

    def widen(rollout: Rollout, experience: Experience) -> tuple[Rollout, Experience]:
        left = ((0, 0), (prompt - rollout.prompts.shape[1], 0))
        right = ((0, 0), (0, total - experience.tokens.shape[1]))
        prompts = {name: jnp.pad(getattr(rollout, name), left) for name in ("prompts", "prompt_mask")}
        sequences = {name: jnp.pad(getattr(experience, name), right) for name in ("tokens", "mask")}
        return dataclasses.replace(rollout, **prompts), dataclasses.replace(experience, **sequences)

    each = [widen(*one) for one in rounds]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[index], *each)


def update_order(config: GRPOConfig, seed: int, step: int) -> list[np.ndarray]:
    """The rollouts of each optimizer step of an iteration, [update_size] each; a group is never split."""
    group, orders = config.sample.num_samples, []
    for number in range(config.passes):
        order = np.random.RandomState([seed, step, number]).permutation(config.rollout_batch_size)
        orders += list((order[:, None] * group + np.arange(group)).reshape(-1, config.update_size))
    return orders


def load_teacher(context: StageContext, config: GRPOConfig, tokenizer) -> Pretrained | None:
    """The model that `reference` names; None where it names none. ValueError where its ids are not the actor's."""
    if not config.reference:
        return None
    teacher = load_model(config.reference, context.model, context.layout)
    if teacher.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{config.reference} has another vocabulary than the actor: take a teacher of the same family")
    return teacher


def log_attention_of(
    name: str, models: Mapping[str, Pretrained | None], model: ModelConfig, config: GRPOConfig, longest: int
) -> None:
    """Log the attention of the models on prompts of up to `longest` tokens. ValueError for too few positions."""
    length = bucket_length(longest) + config.sample.max_new_tokens
    for what, each in models.items():
        if each is not None:
            check_positions(each.config, longest, config.sample.max_new_tokens)
            phases = "training, scoring and prefill" if what == "actor" else "scoring"
            log_attention(f"{name}, {what}", each, model, length, phases=phases, decodes=what == "actor")


def run_grpo(context: StageContext, config: GRPOConfig) -> None:
    """Train this run's policy, or without one the model that model.actor names, by the scores of its own answers.

    Writes RUN/NAME/export, and with `ema_decay` export_ema: the moving average of the actor; under LoRA that of the
    adapters, merged.
    """
    name, run, layout, model = context.name, context.run, context.layout, context.model
    start = context.start.get("policy") or make_base_model(context)
    actor = load_model(start, model, layout, one_copy=model.one_copy)
    tokenizer = prepare_tokenizer(actor.tokenizer, *context.data.rendering)
    scorer, teacher = load_scorer(context, config, tokenizer), load_teacher(context, config, tokenizer)
    rows = select_rows(context.data, tokenizer, context.rows, held_out=False)
    LOGGER.info(f"{name}: prompts: {rows.report}")
    models = {"actor": actor, "reward model": scorer, "reference": teacher}
    log_attention_of(name, models, model, config, rows.longest)
    # The same prompts in another order replace groups without a signal.
    seeds = run.seed, (run.seed + 1) % 2**32
    prompts, others = (Batches(rows, batch_size=config.rollout_batch_size, seed=seed, side="left") for seed in seeds)
    steps = total_steps(config.steps, config.epochs, prompts.steps_per_epoch)
    prefetch, updates = Prefetch(prompts, steps), config.updates(steps)
    drawn = (prompts, steps), *[(others, steps * config.refill_rounds)] * (config.refill_rounds > 0)
    functions = open_functions(context, config, tokenizer, *drawn)

    optimizers = grpo_optimizers(config, updates)
    architectures = actor.config, scorer and scorer.config
    given = optimizers, eos_ids(actor), layout, teacher and teacher.config
    engine = grpo_engine(config, model, *architectures, *given)
    state, frozen = grpo_models(actor, scorer, model, optimizers, run.seed, config, teacher)
    del scorer, teacher, models
    publish = engine.publish.compile(state.actor.params(frozen.actor))
    constants = count_publish_bytes(name, publish, state.actor.params(frozen.actor), model)
    rate, symptoms = learning_rate(config.actor, updates), SymptomLog(name, judges=config.judges)

    def sample_answers(state: EngineState, weights, clock: PhaseTimer, step: int, number: int) -> Answers:
        """The scored answers of a round of a step; round 0 is the step's own prompts."""
        batches, at = (others, step * config.refill_rounds + number - 1) if number else (prompts, step)
        batch = batches[at] if number else prefetch[at]
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        key = jax.random.fold_in(key, number) if number else key
        rollout = clock.lap("generate", engine.generate(weights, batch.tokens, batch.mask, key))
        scores = functions(batches, at, rollout) if functions else {}
        total = clock.lap("rewards", functions.total(scores)) if functions else None
        if not config.rewards:
            total = np.zeros(len(rollout.ended), np.float32)
        return Answers(rollout, clock.lap("score", engine.score(state, frozen, rollout, total)), scores)

    def step_fn(state: EngineState, step: int):
        clock = PhaseTimer()
        weights = clock.lap("publish", publish(state.actor.params(frozen.actor)))
        sample = functools.partial(sample_answers, state, weights, clock, step)
        answers, stats = refill_groups(sample(0), sample, config)
        del weights, sample  # the generation copy lives for one phase
        rollout, experience, scores = answers
        clock.lap("keep", write_rollouts(context, step + 1, tokenizer, rollout, experience, scores=scores))
        collected = []
        for index in update_order(config, run.seed, step):
            state, each = engine.update(state, frozen, take_rows(experience, index))
            collected.append(each)
        clock.lap("update", collected)
        stats |= {**answer_metrics(experience, rollout), "decode_steps": rollout.steps.max()}
        stats |= reward_metrics(scores)
        stats |= {key: float(np.mean([float(part[key]) for part in collected])) for key in collected[0]}
        stats |= {key: collected[-1][key] for key in collected[0] if key.endswith(("loss_scale", "skipped_steps"))}
        symptoms.add(step + 1, stats)
        stats |= {"actor_learning_rate": rate(taken_before(state.actor))}
        stats |= rows_per_source(prompts, step) | constants | clock.seconds
        tokens = int(experience.mask.sum())  # prompts and answers of the whole iteration
        return state, stats | {"tokens_per_second": tokens / sum(clock.seconds.values())}

    headline = ("score_mean", "groups_without_signal", "response_length")
    state = train_loop(context, steps, state, step_fn, batches=prefetch, headline=headline)
    if state.average:
        export_model(actor, frozen.actor | to_devices(state.average), model, context.folder / "export_ema")
    export_model(actor, state.actor.params(frozen.actor), model, context.export)
