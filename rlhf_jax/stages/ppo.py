"""Stage 3: PPO against the reward model (Ouyang et al. 2022, section 3.5), run by the hybrid engine."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.batches import Batch, Batches, Prefetch
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
    Stats,
    make_hybrid_engine,
)
from rlhf_jax.mesh import Layout, to_devices, to_host
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.objectives import ppo
from rlhf_jax.objectives.kl import adapt_coefficient
from rlhf_jax.objectives.moments import add_moments, no_moments
from rlhf_jax.optim import learning_rate, make_optimizer
from rlhf_jax.rollout import Publish, check_positions, eos_ids, publish_bytes
from rlhf_jax.skipping import select
from rlhf_jax.stages.batch_sizes import rows_per_source, total_steps
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.loop import train_loop
from rlhf_jax.stages.models import ModelConfig, copy_frozen, export_model, load_model, log_attention, make_state
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.ppo_losses import actor_loss, critic_loss, estimate, rollout_metrics
from rlhf_jax.stages.rewards import open_functions, reward_metrics
from rlhf_jax.stages.score_scale import demonstration_moments
from rlhf_jax.stages.symptoms import SymptomLog
from rlhf_jax.stages.texts import open_texts
from rlhf_jax.stages.tokenizers import adopt_tokenizer
from rlhf_jax.train_step import Params, TrainState, start_ema, taken_before
from rlhf_jax.trees import partition

LOGGER = logging.getLogger(__name__)


def ppo_optimizers(config: PPOConfig, updates: int, actor_updates: int = 0) -> Optimizers:
    """The optimizers of a run of `updates` optimizer steps, of which the actor takes `actor_updates`; 0: all."""
    actor = make_optimizer(config.actor, actor_updates or updates)
    return Optimizers(actor, make_optimizer(config.critic, updates), config.ema_decay)


def ppo_algorithm(config: PPOConfig) -> Algorithm:
    """Generalised advantages, clipped policy loss, clipped value loss."""
    parts = (functools.partial(part, config=config) for part in (estimate, actor_loss, critic_loss))
    scored = dict(score_weight=config.model_weight or 0.0, old_logprobs=config.old_logprobs)
    return Algorithm(*parts, config.texts.coef, **scored)


def ppo_engine(
    config: PPOConfig,
    model: ModelConfig,
    actor: DecoderConfig,
    critic: DecoderConfig,
    optimizers: Optimizers,
    eos_ids: tuple[int, ...],
    layout: Layout,
) -> HybridEngine:
    """The engine that runs these settings; the reward model has the critic's architecture."""
    num_micro = config.check_sizes("ppo", layout)
    reward = critic.without_lora() if config.model_weight is not None else None
    return make_hybrid_engine(
        Architectures(model.with_lora(actor), model.with_lora(critic), actor.without_lora(), reward),
        ppo_algorithm(config),
        optimizers,
        Sampling(config.sample, eos_ids, config.generate_rows),
        Execution(layout, model.compute, num_micro, num_micro * config.rollouts // config.update_size),
    )


def ppo_models(
    actor: Pretrained, critic: Pretrained, model: ModelConfig, optimizers: Optimizers, seed: int, config: PPOConfig
) -> tuple[EngineState, FrozenParams]:
    """The trained state and the frozen parameters, from a loaded actor and a loaded reward model.

    The critic starts from the reward model, which is held itself only if `config.rewards` name it. Reference and moving
    average are in host memory if `model.offload_reference` and `model.offload_ema` are set, else on the devices.
    """
    assert "auto" not in (model.offload_reference, model.offload_ema), "the plan resolves this"
    # Training donates its parameters, so reference and reward model have copies of all parameters that train.
    reference = {} if model.lora.rank else copy_frozen(actor.params, model.frozen_dtype)
    if model.offload_reference:
        reference = to_host(reference)
    critic_state, critic_frozen = make_state(critic, model, optimizers.critic, seed)
    reward, copied = partition(critic.params, lambda path: path in critic_frozen)
    reward = reward | copy_frozen(copied, model.frozen_dtype) if config.model_weight is not None else {}
    actor_state, actor_frozen = make_state(actor, model, optimizers.actor, seed)
    average = start_ema(actor_state.trainable, offload=model.offload_ema) if optimizers.ema_decay else {}
    state = EngineState(actor_state, critic_state, average)
    return state, FrozenParams(actor_frozen, critic_frozen, reference, reward)


def log_models(name: str, actor: Pretrained, critic: Pretrained, model: ModelConfig, config: PPOConfig, longest: int):
    """Log the attention of both models on prompts of up to `longest` tokens, and offload settings without effect.

    Raises:
        ValueError: a model has too few positions.
    """
    for each in (actor, critic):
        check_positions(each.config, longest, config.sample.max_new_tokens)
    length = bucket_length(longest) + config.sample.max_new_tokens
    log_attention(f"{name}, actor", actor, model, length, phases="training, scoring and prefill", decodes=True)
    log_attention(f"{name}, critic and reward model", critic, model, length, phases="training and scoring")
    if model.offload_reference and model.lora.rank:
        LOGGER.info(f"{name}: offload_reference has nothing to do: the reference is the actor's base without adapters")
    if model.offload_ema and not config.ema_decay:
        LOGGER.info(f"{name}: offload_ema has nothing to do: there is no moving average ({name}.ema_decay = 0)")


def count_publish_bytes(name: str, publish: Publish, params: Params, model: ModelConfig) -> dict[str, float]:
    """`publish_bytes` of a compiled publish; {} where they cannot be counted, with the reason logged."""
    try:
        return publish_bytes(publish, params, model.compute.dtype)
    except ValueError as error:
        LOGGER.info(f"{name}: the bytes of publish are not counted: {error}")
        return {}


def run_ppo(context: StageContext, config: PPOConfig) -> None:
    """Train a policy against the reward model of the same run.

    Writes RUN/NAME/export and export_critic, and with `ema_decay` export_ema: the moving average of the actor; under
    LoRA that of the adapters, merged.
    """
    name, run, layout, model = context.name, context.run, context.layout, context.model
    actor = load_model(context.start["policy"], model, layout, one_copy=model.one_copy)
    has_reward = config.model_weight is not None
    # Without a reward model the critic starts from the policy.
    critic = load_model(context.start["scorer" if has_reward else "policy"], model, layout, scalar_head=True)
    tokenizer = prepare_tokenizer(actor.tokenizer, *context.data.rendering)
    prepare_tokenizer(critic.tokenizer, *context.data.rendering)
    critic = adopt_tokenizer(name, critic, tokenizer)
    rows = select_rows(context.data, tokenizer, context.rows, held_out=False)
    LOGGER.info(f"{name}: prompts: {rows.report}")
    log_models(name, actor, critic, model, config, rows.longest)
    prompts = Batches(rows, batch_size=config.rollout_batch_size, seed=run.seed, side="left")
    steps = total_steps(config.steps, config.epochs, prompts.steps_per_epoch)
    prefetch, updates = Prefetch(prompts, steps), config.updates(steps)
    functions = open_functions(context, config, tokenizer, (prompts, steps))

    optimizers = ppo_optimizers(config, updates, config.actor_updates(steps))
    engine = ppo_engine(config, model, actor.config, critic.config, optimizers, eos_ids(actor), layout)
    carried = carried_at_start(context, config, critic, tokenizer)
    state, frozen = ppo_models(actor, critic, model, optimizers, run.seed, config)
    state = dataclasses.replace(state, critic=first_critic(state.critic, config), carried=carried)
    texts = open_texts(context, config.texts, tokenizer, actor.config.max_positions, updates)
    publish = engine.publish.compile(state.actor.params(frozen.actor))
    constants, shapes = count_publish_bytes(name, publish, state.actor.params(frozen.actor), model), set()
    rates = learning_rate(config.actor, config.actor_updates(steps)), learning_rate(config.critic, updates)
    symptoms = SymptomLog(name, kl_limit=2 * config.kl_target, judges=config.judges)
    update_passes = make_passes(engine, frozen, texts, config, run.seed)

    def step_fn(state: EngineState, step: int):
        """One iteration, in the steps of Ouyang et al. 2022, figure 2, step 3."""
        # 1. New prompts are sampled from the data set.
        clock, batch = PhaseTimer(), prefetch[step]
        # 2. The policy generates outputs.
        weights = clock.lap("publish", publish(state.actor.params(frozen.actor)))
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        rollout = clock.lap("generate", engine.generate(weights, batch.tokens, batch.mask, key))
        del weights  # the generation copy lives for one phase
        shapes.add(rollout.prompts.shape)
        # 3. The reward model calculates a reward for each output; critic and reference add values and the KL penalty.
        scores = functions(prompts, step, rollout) if functions else {}
        total = clock.lap("rewards", functions.total(scores)) if functions else None
        experience = clock.lap("score", engine.score(state, frozen, rollout, total))
        if config.mismatch != "none":
            experience = correct_mismatch(experience, rollout.logprobs, config=config)
        kept = dict(scores=scores, keep_tokens=config.save_tokens)
        clock.lap("keep", write_rollouts(context, step + 1, tokenizer, rollout, experience, **kept))
        # 4. The rewards are used to update the policy, and the critic, by PPO.
        state, collected = update_passes(state, experience, step)
        clock.lap("update", collected)
        stats = {**rollout_metrics(experience, rollout), "decode_steps": rollout.steps.max()}
        stats |= {key: float(np.mean([float(part[key]) for part in collected])) for key in collected[0]}
        stats |= {key: collected[-1][key] for key in collected[0] if key.endswith(("loss_scale", "skipped_steps"))}
        if "actor_ratio_deviation" in collected[0]:
            stats["first_ratio_deviation"] = collected[0]["actor_ratio_deviation"]
        stats |= carried_metrics(state.carried) | {"updates": len(collected)} | reward_metrics(scores)
        symptoms.add(step + 1, stats)
        if state.carried:
            state = dataclasses.replace(state, carried=carry(state.carried, experience, config=config))
        stats |= {"actor_learning_rate": rates[0](taken_before(state.actor))}
        stats |= {"critic_learning_rate": rates[1](taken_before(state.critic))}
        stats |= rows_per_source(prompts, step) | constants | clock.seconds
        tokens = int(experience.mask.sum())  # prompts and answers of the whole iteration
        return state, stats | {"tokens_per_second": tokens / sum(clock.seconds.values())}

    headline = ("score_mean", "kl", "response_length", "actor_entropy", "explained_variance", "actor_clip_fraction")
    headline += ("seconds_generate", "seconds_score", "seconds_update")
    state = train_loop(context, steps, state, step_fn, batches=prefetch, headline=headline)
    lengths = len({bucket_length(n) for n in range(1, rows.longest + 1)})
    LOGGER.info(f"{name}: programs of generation: {len(shapes)}, of at most {lengths} for these prompts")
    export_model(critic, state.critic.params(frozen.critic), model, context.folder / "export_critic")
    if state.average:
        # On the devices the average takes the memory that an update needs for the gradients.
        export_model(actor, frozen.actor | to_devices(state.average), model, context.folder / "export_ema")
    export_model(actor, state.actor.params(frozen.actor), model, context.export)


def first_critic(critic: TrainState, config: PPOConfig) -> TrainState:
    """The critic before the first step, with the head that `critic_head` names."""
    if config.critic_head == "scorer" and config.model_weight is not None:
        return critic
    head = {path: jnp.zeros_like(leaf) for path, leaf in critic.trainable.items() if path.startswith("score/")}
    return dataclasses.replace(critic, trainable=critic.trainable | head)


def carried_at_start(context: StageContext, config: PPOConfig, scorer: Pretrained, tokenizer) -> dict[str, Any]:
    """`EngineState.carried` before the first iteration: what these settings change from one to the next."""
    carried: dict[str, Any] = {"kl_coef": jnp.float32(config.kl_coef)} if config.kl_target else {}
    if config.score_scale == "rollouts":
        carried["score_moments"] = no_moments()
    elif config.score_scale == "demonstrations":
        carried["score_moments"] = demonstration_moments(context, scorer, tokenizer)
    return jax.device_put(carried, context.layout.sharding(()))


def carried_metrics(carried: dict[str, Any]) -> dict[str, jax.Array]:
    """Metrics of what the state carries, as the iteration used it."""
    found = {"kl_coef": carried["kl_coef"]} if "kl_coef" in carried else {}
    moments = carried.get("score_moments")
    return found | ({"score_scale_mean": moments.mean, "score_scale_std": moments.std} if moments else {})


def make_passes(
    engine: HybridEngine, frozen: FrozenParams, texts: Callable[[int], Batch] | None, config: PPOConfig, seed: int
) -> Callable[[EngineState, Experience, int], tuple[EngineState, list[Stats]]]:
    """(state, experience, step) -> the state after `ppo_epochs` passes over the rollouts, each in its own order, and
    the metrics of each optimizer step. The passes end early where `stop_kl` says so.
    """

    def run(state: EngineState, experience: Experience, step: int) -> tuple[EngineState, list[Stats]]:
        models = ("critic",) if step < config.critic_warmup_steps else ("actor", "critic")
        collected: list[Stats] = []
        for epoch in range(config.ppo_epochs):
            order = np.random.RandomState([seed, step, epoch]).permutation(config.rollouts)
            for index in order.reshape(-1, config.update_size):
                part = experience if len(index) == config.rollouts else take_rows(experience, index)
                batch = texts(config.updates(step) + len(collected)) if texts and "actor" in models else None
                state, stats = engine.update(state, frozen, part, batch, models)
                collected.append(stats)
                if config.stop_kl and float(stats.get("actor_approx_kl", 0.0)) > config.stop_kl:
                    return state, collected
        return state, collected

    return run


@jax.jit
def take_rows(experience: Experience, index: np.ndarray) -> Experience:
    """The rollouts at `index` [n] of the batch."""
    return jax.tree.map(lambda leaf: leaf[index], experience)


@functools.partial(jax.jit, static_argnames="config")
def carry(carried: dict[str, Any], experience: Experience, *, config: PPOConfig) -> dict[str, Any]:
    """What the state carries to the next iteration: the adapted KL coefficient, and the moments of all scores.

    As a skipped step, an iteration whose scores or KL are not finite changes nothing.
    """
    before, carried = carried, dict(carried)
    if "kl_coef" in carried:
        kl = ppo.sequence_kl(experience.logprobs, experience.ref_logprobs, experience.action_mask).mean()
        carried["kl_coef"] = adapt_coefficient(carried["kl_coef"], kl, target=config.kl_target)
    if config.score_scale == "rollouts":
        carried["score_moments"] = add_moments(carried["score_moments"], experience.score)
    is_finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(carried)]).all()
    return select(is_finite, carried, before)


@functools.partial(jax.jit, static_argnames="config")
def correct_mismatch(experience: Experience, sampler_logprobs: jax.Array, *, config: PPOConfig) -> Experience:
    """The experience with its advantages weighted for the policy that sampled, see `ppo.mismatch_weights`."""
    policies = experience.logprobs, sampler_logprobs, experience.action_mask
    weights = ppo.mismatch_weights(*policies, level=config.mismatch, limit=config.mismatch_limit)
    return dataclasses.replace(experience, advantages=experience.advantages * weights)


def write_rollouts(
    context: StageContext,
    step: int,
    tokenizer,
    rollout: Rollout,
    experience: Experience,
    *,
    scores: Mapping[str, np.ndarray] | None = None,
    keep_tokens: bool = False,
) -> None:
    """Write every rollout of an iteration to RUN/NAME/rollouts/STEP.jsonl; `keep_tokens`: and each token.

    scores: {name of a reward function: [B] its scores}.
    """
    numbers = {"score": experience.score, "reward": experience.rewards.sum(axis=1), **(scores or {})}
    if experience.ref_logprobs is not None:
        numbers["kl"] = ppo.sequence_kl(experience.logprobs, experience.ref_logprobs, experience.action_mask)
    names = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns") if keep_tokens else ()
    each_token = {name: values for name in names if (values := getattr(experience, name)) is not None}
    rollout, numbers, each_token = hosts.fetch((rollout, numbers, each_token))
    if not hosts.is_main():
        return
    records = [
        {
            "step": step,
            "prompt": tokenizer.decode(rollout.prompts[i][rollout.prompt_mask[i]]),
            "response": tokenizer.decode(rollout.tokens[i][rollout.mask[i]]),
            **{name: _json_number(column[i]) for name, column in numbers.items()},
            "length": int(rollout.mask[i].sum()),
            "finish_reason": "eos" if rollout.ended[i] else "length",
            **({"prompt_ids": rollout.prompts[i][rollout.prompt_mask[i]].tolist()} if keep_tokens else {}),
            **({"response_ids": rollout.tokens[i][rollout.mask[i]].tolist()} if keep_tokens else {}),
            **{name: [*map(_json_number, column[i][rollout.mask[i]])] for name, column in each_token.items()},
        }
        for i in range(len(rollout.ended))
    ]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    folder = context.folder / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{step:06d}.jsonl").write_text(lines, encoding="utf-8")


def _json_number(value: np.floating) -> float | str:
    return float(value) if np.isfinite(value) else str(value)


class PhaseTimer:
    """Seconds of each phase, from the end of the previous phase until its arrays are ready."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, result):
        """End `phase` when the arrays of `result` are ready, and return `result`."""
        jax.block_until_ready(result)
        now = time.perf_counter()
        name = f"seconds_{phase}"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        return result
