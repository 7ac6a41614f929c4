"""Stage 3: PPO against the reward model (Ouyang et al. 2022, section 3.5), run by the hybrid engine."""

from __future__ import annotations

import functools
import json
import logging
import time
from dataclasses import dataclass

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
    Engine,
    EngineState,
    Execution,
    Experience,
    FrozenParams,
    Optimizers,
    Sampling,
    ScoredRollout,
    Stats,
    make_engine,
)
from rlhf_jax.mesh import Layout, check_divides, to_devices, to_host
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.objectives import masked, ppo
from rlhf_jax.optim import OptimConfig, learning_rate, make_optimizer
from rlhf_jax.rollout import Publish, check_positions, check_slots, eos_ids, publish_bytes
from rlhf_jax.sampling import SampleConfig, check_learnable
from rlhf_jax.stages.batch_sizes import micro_batches, rows_per_source, total_steps
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.loop import train_loop
from rlhf_jax.stages.models import ModelConfig, copy_frozen, export_model, load_model, log_attention, make_state
from rlhf_jax.stages.tokenizers import adopt_tokenizer
from rlhf_jax.train_step import Params, start_ema, taken_before
from rlhf_jax.trees import partition

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class PPOConfig:
    """The [ppo] section."""

    epochs: int = 1  # passes over the prompts
    steps: int = 0  # iterations of generate, score and update; 0: as `epochs` says
    rollout_batch_size: int = 64  # prompts answered in one iteration, over all devices, each sample.num_samples times
    generate_rows: int = 0  # answers decoded at a time; a free decode slot takes the next prompt; 0: all at once
    batch_size: int = 0  # rollouts of one optimizer step; 0: all of an iteration
    micro_batch_size: int = 0  # rollouts of one forward and backward pass, over all devices; 0: batch_size
    ppo_epochs: int = 1  # passes over the rollouts of an iteration
    kl_coef: float = 0.1  # coefficient of the KL penalty against the reference, on every token
    score_clip: float = 5.0  # scores are clipped to +- this before they become a reward
    missing_eos_penalty: float = 0.0  # subtracted from the score of an answer that was cut at max_new_tokens
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of generalised advantage estimation
    clip: float = 0.2  # largest change of the probability ratio in the actor loss
    value_clip: float = 0.2  # largest change of a value in the critic loss
    ema_decay: float = 0.0  # decay of the moving average of the actor, which is exported to export_ema; 0: none
    whiten_advantages: bool = True  # scale advantages to mean 0 and variance 1 over the tokens of an iteration
    sample: SampleConfig = SampleConfig()  # how rollouts are sampled
    actor: OptimConfig = OptimConfig(learning_rate=9.65e-6)  # the actor's optimizer
    critic: OptimConfig = OptimConfig(learning_rate=5e-6)  # the critic's optimizer

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay:g}: at least 0 (no average) and below 1, such as 0.992")

    def check(self, name: str, layout: Layout) -> None:
        """Raise ValueError for sizes that do not divide, filtered sampling, and schedules that do not fit the steps."""
        ppo_sizes(self, layout)
        check_learnable(self.sample)
        if self.steps:
            for optim in (self.actor, self.critic):
                learning_rate(optim, self.updates(self.steps))

    @property
    def rollouts(self) -> int:
        """Number of answers of one iteration."""
        return self.rollout_batch_size * self.sample.num_samples

    @property
    def update_size(self) -> int:
        """Number of rollouts of one optimizer step."""
        return self.batch_size or self.rollouts

    def updates(self, steps: int) -> int:
        """Number of optimizer steps in `steps` iterations."""
        return steps * self.ppo_epochs * self.rollouts // self.update_size


def ppo_sizes(config: PPOConfig, layout: Layout) -> tuple[int, int]:
    """Rollouts and micro-batches of one optimizer step. Raises ValueError where sizes do not divide."""
    check_divides("ppo.rollout_batch_size", config.rollout_batch_size, layout.shards("batch"), "devices of the mesh")
    batch_size = config.update_size
    num_micro = micro_batches("ppo", batch_size, config.micro_batch_size, layout)
    name = "ppo.rollout_batch_size" + (" x num_samples" if config.sample.num_samples > 1 else "")
    check_divides(name, config.rollouts, batch_size, "rollouts of ppo.batch_size")
    check_slots(config.generate_rows, layout, "ppo.generate_rows")
    return batch_size, num_micro


def ppo_optimizers(config: PPOConfig, updates: int) -> Optimizers:
    """The optimizers of a run of `updates` optimizer steps."""
    return Optimizers(make_optimizer(config.actor, updates), make_optimizer(config.critic, updates), config.ema_decay)


def ppo_algorithm(config: PPOConfig) -> Algorithm:
    """Generalised advantages, clipped policy loss, clipped value loss."""
    return Algorithm(*(functools.partial(part, config=config) for part in (estimate, actor_loss, critic_loss)))


def ppo_engine(
    config: PPOConfig,
    model: ModelConfig,
    actor: DecoderConfig,
    critic: DecoderConfig,
    optimizers: Optimizers,
    eos_ids: tuple[int, ...],
    layout: Layout,
) -> Engine:
    """The engine that runs these settings; the reward model has the critic's architecture."""
    batch_size, num_micro = ppo_sizes(config, layout)
    return make_engine(
        Architectures(model.with_lora(actor), model.with_lora(critic), actor.without_lora(), critic.without_lora()),
        ppo_algorithm(config),
        optimizers,
        Sampling(config.sample, eos_ids, config.generate_rows),
        Execution(layout, model.compute, num_micro, num_micro * config.rollouts // batch_size),
    )


def ppo_models(
    actor: Pretrained, critic: Pretrained, model: ModelConfig, optimizers: Optimizers, seed: int
) -> tuple[EngineState, FrozenParams]:
    """The trained state and the frozen parameters, from a loaded actor and a loaded reward model.

    The critic starts from the reward model. Reference and moving average are in host memory if
    `model.offload_reference` and `model.offload_ema` are set, else on the devices.
    """
    assert "auto" not in (model.offload_reference, model.offload_ema), "the plan resolves this"
    # Training donates its parameters, so reference and reward model have copies of all parameters that train.
    reference = {} if model.lora.rank else copy_frozen(actor.params, model.frozen_dtype)
    if model.offload_reference:
        reference = to_host(reference)
    critic_state, critic_frozen = make_state(critic, model, optimizers.critic, seed)
    reward, copied = partition(critic.params, lambda path: path in critic_frozen)
    reward |= copy_frozen(copied, model.frozen_dtype)
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
    critic = load_model(context.start["scorer"], model, layout, scalar_head=True)
    tokenizer = prepare_tokenizer(actor.tokenizer, *context.data.rendering)
    prepare_tokenizer(critic.tokenizer, *context.data.rendering)
    critic = adopt_tokenizer(name, critic, tokenizer)
    rows = select_rows(context.data, tokenizer, context.rows, held_out=False)
    LOGGER.info(f"{name}: prompts: {rows.report}")
    log_models(name, actor, critic, model, config, rows.longest)
    prompts = Batches(rows, batch_size=config.rollout_batch_size, seed=run.seed, side="left")
    steps = total_steps(config.steps, config.epochs, prompts.steps_per_epoch)
    prefetch, updates = Prefetch(prompts, steps), config.updates(steps)

    optimizers = ppo_optimizers(config, updates)
    engine = ppo_engine(config, model, actor.config, critic.config, optimizers, eos_ids(actor), layout)
    state, frozen = ppo_models(actor, critic, model, optimizers, run.seed)
    publish = engine.publish.compile(state.actor.params(frozen.actor))
    constants, shapes = count_publish_bytes(name, publish, state.actor.params(frozen.actor), model), set()
    rates = learning_rate(config.actor, updates), learning_rate(config.critic, updates)

    def update_passes(state: EngineState, experience: Experience, step: int) -> tuple[EngineState, list[Stats]]:
        """`ppo_epochs` passes over the rollouts, each in its own order; also the metrics of each optimizer step."""
        collected = []
        for epoch in range(config.ppo_epochs):
            order = np.random.RandomState([run.seed, step, epoch]).permutation(config.rollouts)
            for index in order.reshape(-1, config.update_size):
                part = experience if len(index) == config.rollouts else take_rows(experience, index)
                state, stats = engine.update(state, frozen, part)
                collected.append(stats)
        return state, collected

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
        experience = clock.lap("score", engine.score(state, frozen, rollout))
        clock.lap("keep", write_rollouts(context, step + 1, tokenizer, rollout, experience))
        # 4. The rewards are used to update the policy, and the critic, by PPO.
        state, collected = update_passes(state, experience, step)
        clock.lap("update", collected)
        stats = {**rollout_metrics(experience, rollout), "decode_steps": rollout.steps.max()}
        stats |= {key: float(np.mean([float(part[key]) for part in collected])) for key in collected[0]}
        stats |= {key: collected[-1][key] for key in collected[0] if key.endswith(("loss_scale", "skipped_steps"))}
        stats |= {"actor_learning_rate": rates[0](taken_before(state.actor))}
        stats |= {"critic_learning_rate": rates[1](taken_before(state.critic))}
        stats |= rows_per_source(prompts, step) | constants | clock.seconds
        tokens = int(experience.mask.sum())  # prompts and answers of the whole iteration
        return state, stats | {"tokens_per_second": tokens / sum(clock.seconds.values())}

    headline = ("score_mean", "kl", "response_length")
    state = train_loop(context, steps, state, step_fn, rows=rows, headline=headline)
    lengths = len({bucket_length(n) for n in range(1, rows.longest + 1)})
    LOGGER.info(f"{name}: programs of generation: {len(shapes)}, of at most {lengths} for these prompts")
    export_model(critic, state.critic.params(frozen.critic), model, context.folder / "export_critic")
    if state.average:
        # On the devices the average takes the memory that an update needs for the gradients.
        export_model(actor, frozen.actor | to_devices(state.average), model, context.folder / "export_ema")
    export_model(actor, state.actor.params(frozen.actor), model, context.export)


@jax.jit
def take_rows(experience: Experience, index: np.ndarray) -> Experience:
    """The rollouts at `index` [n] of the batch."""
    return jax.tree.map(lambda leaf: leaf[index], experience)


def shaped_rewards(scored: ScoredRollout, config: PPOConfig) -> jax.Array:
    """[B, N]: the KL penalty on every token, and on the last the score minus the penalty for a missing EOS."""
    score = scored.score - config.missing_eos_penalty * ~scored.ended
    logprobs, mask = (scored.logprobs, scored.ref_logprobs), scored.action_mask
    return ppo.token_rewards(score, *logprobs, mask, kl_coef=config.kl_coef, clip=config.score_clip)


def estimate(scored: ScoredRollout, config: PPOConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards, advantages and returns, [B, N] each."""
    rewards, mask = shaped_rewards(scored, config), scored.action_mask
    advantages, returns = ppo.gae(rewards, scored.values, mask, gamma=config.gamma, lam=config.lam)
    return rewards, masked.whiten(advantages, mask) if config.whiten_advantages else advantages, returns


def actor_loss(logprobs: jax.Array, entropy: jax.Array, experience: Experience, config: PPOConfig):
    """The clipped policy loss of a micro-batch, and its metrics."""
    old, mask = experience.logprobs, experience.action_mask
    ratios = logprobs, old, experience.advantages, mask
    stats = {"clip_fraction": ppo.policy_clip_fraction(*ratios, clip=config.clip)}
    stats |= {"approx_kl": ppo.approximate_kl(logprobs, old, mask), "entropy": masked.mean(entropy, mask)}
    return ppo.policy_loss(*ratios, clip=config.clip), stats


def critic_loss(values: jax.Array, experience: Experience, config: PPOConfig):
    """The clipped value loss of a micro-batch, and its metrics."""
    old, returns, mask = experience.values, experience.returns, experience.action_mask
    loss = ppo.value_loss(values, old, returns, mask, clip=config.value_clip)
    return loss, {"clip_fraction": ppo.value_clip_fraction(values, old, returns, mask, clip=config.value_clip)}


@jax.jit
def rollout_metrics(experience: Experience, rollout: Rollout) -> dict[str, jax.Array]:
    """Metrics of an iteration's experience: score, KL, lengths, quality of the critic."""
    mask = experience.action_mask
    kl = ppo.sequence_kl(experience.logprobs, experience.ref_logprobs, mask)
    return {
        "score_mean": experience.score.mean(),
        "score_std": experience.score.std(),
        "kl": kl.mean(),
        "reward_mean": experience.rewards.sum(axis=1).mean(),
        "value_mean": masked.mean(experience.values, mask),
        "return_mean": masked.mean(experience.returns, mask),
        "explained_variance": ppo.explained_variance(experience.values, experience.returns, mask),
        "response_length": mask.sum(axis=1).mean(),
        "ended_by_eos": experience.ended.mean(),
        # Difference between the policy that sampled and the one that trains; 0 except for rounding.
        "logprob_mismatch": masked.mean(jnp.abs(rollout.logprobs - experience.logprobs), mask),
    }


def write_rollouts(context: StageContext, step: int, tokenizer, rollout: Rollout, experience: Experience) -> None:
    """Write every rollout of an iteration to RUN/NAME/rollouts/STEP.jsonl."""
    kl = ppo.sequence_kl(experience.logprobs, experience.ref_logprobs, experience.action_mask)
    numbers = {"score": experience.score, "reward": experience.rewards.sum(axis=1), "kl": kl}
    rollout, numbers = hosts.fetch((rollout, numbers))
    if not hosts.is_main():
        return
    records = [
        {
            "step": step,
            "prompt": tokenizer.decode(rollout.prompts[i][rollout.prompt_mask[i]]),
            "response": tokenizer.decode(rollout.tokens[i][rollout.mask[i]]),
            **{name: float(column[i]) for name, column in numbers.items()},
            "finish_reason": "eos" if rollout.ended[i] else "length",
        }
        for i in range(len(rollout.ended))
    ]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    folder = context.folder / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{step:06d}.jsonl").write_text(lines, encoding="utf-8")


class PhaseTimer:
    """Seconds of each phase, from the end of the previous phase until its arrays are ready."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, result):
        """End `phase` when the arrays of `result` are ready, and return `result`."""
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"] = now - self._last
        self._last = now
        return result
