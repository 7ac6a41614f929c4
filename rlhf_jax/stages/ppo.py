"""Stage 3, PPO against the reward model (Ouyang et al. 2022, section 3.5), through the hybrid engine."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.average import start_average
from rlhf_jax.data.ahead import Ahead
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.example import RowSpec
from rlhf_jax.data.selection import select_rows
from rlhf_jax.data.template import prepare_tokenizer
from rlhf_jax.engine import Engine, EngineState, Experience, FrozenParams, make_engine
from rlhf_jax.generate import Rollout, bucket
from rlhf_jax.host_memory import to_devices, to_host
from rlhf_jax.mesh import Layout, check_divides
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.objectives import masked, ppo
from rlhf_jax.optim import OptimConfig, learning_rate, make_optimizer
from rlhf_jax.rollout import Publish, check_positions, check_rows, eos_ids, publish_bytes
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.loop import RunConfig, train_loop
from rlhf_jax.stages.models import (
    ModelConfig,
    export,
    frozen_copy,
    load,
    make_state,
    say_attention,
)
from rlhf_jax.stages.sizes import drawn, micro_batches, total_steps
from rlhf_jax.train_step import Params


@dataclass(frozen=True)
class PPOConfig:
    epochs: int = 1  # passes over the prompts
    steps: int = 0  # iterations of generate, score and update; 0: as `epochs` says
    rollout_batch_size: int = 64  # prompts answered in one iteration, over all devices, each sample.num_samples times
    generate_rows: int = 0  # answers decoded at a time, a row that ends taking the next prompt; 0: all at once
    batch_size: int = 0  # rollouts of one optimizer step; 0: all of an iteration
    micro_batch_size: int = 0  # rollouts of one forward and backward pass, over all devices; 0: batch_size
    ppo_epochs: int = 1  # passes over the rollouts of an iteration
    kl_coef: float = 0.1  # of the penalty for leaving the reference, on every token
    score_clip: float = 5.0  # scores are clipped to +- this before they become a reward
    missing_eos_penalty: float = 0.0  # taken off the score of an answer that was cut at max_new_tokens
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of generalised advantage estimation
    clip: float = 0.2  # of the probability ratio
    value_clip: float = 0.2  # of the change of a value
    ema_decay: float = 0.0  # of a moving average of the actor over optimizer steps, exported beside it; 0: none
    whiten_advantages: bool = True  # to mean 0 and variance 1 over the tokens of an iteration
    sample: SampleConfig = SampleConfig()  # how rollouts are sampled
    actor: OptimConfig = OptimConfig(learning_rate=9.65e-6)  # the actor's optimizer
    critic: OptimConfig = OptimConfig(learning_rate=5e-6)  # the critic's optimizer

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay:g}: at least 0 (no average) and below 1, such as 0.992")

    @property
    def rollouts(self) -> int:
        """Answers of one iteration."""
        return self.rollout_batch_size * self.sample.num_samples


def ppo_sizes(config: PPOConfig, layout: Layout) -> tuple[int, int]:
    """Rollouts and micro-batches of one optimizer step; ValueError where sizes do not divide."""
    check_divides("ppo.rollout_batch_size", config.rollout_batch_size, layout.shards("batch"), "devices of the mesh")
    batch_size = config.batch_size or config.rollouts
    num_micro = micro_batches("ppo", batch_size, config.micro_batch_size, layout)
    name = "ppo.rollout_batch_size" + (" x num_samples" if config.sample.num_samples > 1 else "")
    check_divides(name, config.rollouts, batch_size, "rollouts of ppo.batch_size")
    check_rows(config.generate_rows, layout, "ppo.generate_rows")
    return batch_size, num_micro


def ppo_engine(
    config: PPOConfig,
    model: ModelConfig,
    actor: DecoderConfig,
    critic: DecoderConfig,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation,
    eos_ids: tuple[int, ...],
    layout: Layout,
) -> Engine:
    """The engine that runs these settings; the reward model has the critic's architecture."""
    batch_size, num_micro = ppo_sizes(config, layout)
    return make_engine(
        actor=model.with_lora(actor),
        critic=model.with_lora(critic),
        reward=critic,
        estimate=lambda experience: advantages(experience, config),
        actor_loss=lambda logprobs, entropy, experience: actor_loss(logprobs, entropy, experience, config),
        critic_loss=lambda values, experience: critic_loss(values, experience, config),
        actor_tx=actor_tx,
        critic_tx=critic_tx,
        sample=config.sample,
        eos_ids=eos_ids,
        layout=layout,
        compute=model.compute,
        num_micro=num_micro,
        num_score_micro=num_micro * config.rollouts // batch_size,
        generate_rows=config.generate_rows,
        ema_decay=config.ema_decay,
    )


def ppo_models(
    actor: Pretrained,
    critic: Pretrained,
    model: ModelConfig,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation,
    seed: int,
    *,
    average: bool = False,
) -> tuple[EngineState, FrozenParams]:
    """What PPO trains and what is frozen, from a loaded actor and a loaded reward model that the critic starts from.

    Reference and average lie where `model.offload_reference` and `model.offload_ema` say.

    Args:
        average: a moving average of the actor is kept.
    """
    assert "auto" not in (model.offload_reference, model.offload_ema), "the plan resolves this"
    # What training donates must not be what scores, so of that reference and reward model have copies of their own.
    reference = {} if model.lora.rank else frozen_copy(actor.params, model.frozen_dtype)
    if model.offload_reference:
        reference = to_host(reference)
    critic_state, critic_frozen = make_state(critic, model, critic_tx, seed)
    reward = {path: leaf for path, leaf in critic.params.items() if path in critic_frozen}
    reward |= frozen_copy(
        {path: leaf for path, leaf in critic.params.items() if path not in reward}, model.frozen_dtype
    )
    actor_state, actor_frozen = make_state(actor, model, actor_tx, seed)
    averaged = start_average(actor_state.trainable, offloaded=model.offload_ema) if average else {}
    state = EngineState(actor_state, critic_state, averaged)
    return state, FrozenParams(actor_frozen, critic_frozen, reference, reward)


def say_offload(model: ModelConfig, config: PPOConfig) -> None:
    """Print which switches of offload have nothing to do."""
    if model.offload_reference and model.lora.rank:
        print(
            "ppo: offload_reference has nothing to do: the reference is the actor's base without adapters", flush=True
        )
    if model.offload_ema and not config.ema_decay:
        print("ppo: offload_ema has nothing to do: there is no moving average (ppo.ema_decay = 0)", flush=True)


def say_publish(publish: Publish, params: Params, model: ModelConfig) -> dict[str, float]:
    """`publish_bytes` of a compiled publish; where they cannot be counted that is printed, and they are not logged."""
    try:
        return publish_bytes(publish, params, model.compute.dtype)
    except ValueError as error:
        print(f"ppo: the bytes of publish are not counted: {error}", flush=True)
        return {}


def run_ppo(run: RunConfig, layout: Layout, model: ModelConfig, data: DataConfig, config: PPOConfig) -> None:
    """Train the SFT model against the reward model of the same run.

    Leaves RUN/ppo/export and export_critic, and with `ema_decay` export_ema: the moving average of the actor, which is
    of the adapters under LoRA, and then merged.
    """
    actor = load(run.export("sft"), model, layout, one_copy=model.one_copy)
    critic = load(run.export("reward"), model, layout, scalar_head=True)
    tokenizer = prepare_tokenizer(actor.tokenizer, data.template)
    if tokenizer.get_vocab() != critic.tokenizer.get_vocab():
        raise ValueError("actor and reward model have different vocabularies: PPO scores the actor's own tokens")
    batch_size, _ = ppo_sizes(config, layout)

    rows = select_rows(data, tokenizer, RowSpec("prompt", "ppo"), held_out=False)
    print(f"ppo: prompts: {rows.report}", flush=True)
    prompts = Batches(rows, batch_size=config.rollout_batch_size, seed=run.seed, side="left")
    for each in (actor, critic):
        check_positions(each.config, rows.longest, config.sample.max_new_tokens)
    length, phases = bucket(rows.longest) + config.sample.max_new_tokens, "training and scoring"
    say_attention("ppo, actor", actor, model, length, phases="training, scoring and prefill", decodes=True)
    say_attention("ppo, critic and reward model", critic, model, length, phases=phases)
    steps = total_steps(config.steps, config.epochs, prompts.steps_per_epoch)
    ahead = Ahead(prompts, steps)
    updates = steps * config.ppo_epochs * config.rollouts // batch_size
    actor_tx, critic_tx = make_optimizer(config.actor, updates), make_optimizer(config.critic, updates)

    engine = ppo_engine(config, model, actor.config, critic.config, actor_tx, critic_tx, eos_ids(actor), layout)
    state, frozen = ppo_models(actor, critic, model, actor_tx, critic_tx, run.seed, average=config.ema_decay > 0)
    say_offload(model, config)
    params = state.actor.params(frozen.actor)
    publish = engine.publish.compiled(params)
    moved, shapes = say_publish(publish, params, model), set()
    summarise = jax.jit(lambda experience, rollout: summary(experience, rollout, config))
    pick = jax.jit(lambda experience, index: jax.tree.map(lambda leaf: leaf[index], experience))
    rates = learning_rate(config.actor, updates), learning_rate(config.critic, updates)

    def step_fn(state: EngineState, step: int):
        """One iteration: publish, generate, score, then `ppo_epochs` passes of updates."""
        clock, batch = Clock(), ahead[step]
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        weights = clock.lap("publish", publish(state.actor.params(frozen.actor)))
        rollout = clock.lap("generate", engine.generate(weights, batch.tokens, batch.mask, key))
        del weights  # the generation copy lives for one phase
        shapes.add(rollout.prompts.shape)
        experience = clock.lap("score", engine.score(state, frozen, rollout))
        clock.lap("keep", keep_rollouts(run, step + 1, tokenizer, rollout, experience, config))
        collected = []
        for epoch in range(config.ppo_epochs):
            order = np.random.RandomState([run.seed, step, epoch]).permutation(config.rollouts)
            for index in order.reshape(-1, batch_size):
                part = experience if batch_size == config.rollouts else pick(experience, index)
                state, stats = engine.update(state, frozen, part)
                collected.append(stats)
        collected = clock.lap("update", collected)
        stats = {**summarise(experience, rollout), "decode_steps": rollout.steps.max()}
        stats |= {name: float(np.mean([float(part[name]) for part in collected])) for name in collected[0]}
        stats |= {"actor_learning_rate": rates[0](state.actor.step - 1)}
        stats |= {"critic_learning_rate": rates[1](state.critic.step - 1)}
        tokens = int(experience.mask.sum())
        # Prompts and answers, over the whole iteration.
        stats |= drawn(prompts, step)
        stats |= moved | clock.seconds | {"tokens_per_second": tokens / sum(clock.seconds.values())}
        return state, stats

    state = train_loop(
        run,
        "ppo",
        steps,
        state,
        step_fn,
        rows=rows,
        headline=("score_mean", "kl", "response_length"),
    )
    lengths = len({bucket(n) for n in range(1, rows.longest + 1)})
    print(f"ppo: programs of generation: {len(shapes)}, of at most {lengths} for these prompts", flush=True)
    export(critic, state.critic.params(frozen.critic), model, run.folder("ppo") / "export_critic")
    if state.average:
        # On the devices it takes the room that an update needs for the gradients.
        export(actor, frozen.actor | to_devices(state.average), model, run.folder("ppo") / "export_ema")
    export(actor, state.actor.params(frozen.actor), model, run.export("ppo"))


def rewards(experience: Experience, config: PPOConfig) -> jax.Array:
    """[B, N]: the KL penalty of every token, and the score, less the penalty for no EOS, on the last."""
    score = experience.score - config.missing_eos_penalty * ~experience.ended
    logprobs, mask = (experience.logprobs, experience.ref_logprobs), experience.action_mask
    return ppo.token_rewards(score, *logprobs, mask, kl_coef=config.kl_coef, clip=config.score_clip)


def advantages(experience: Experience, config: PPOConfig) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns, [B, N] each."""
    values, mask = experience.values, experience.action_mask
    gains, returns = ppo.gae(rewards(experience, config), values, mask, gamma=config.gamma, lam=config.lam)
    return masked.whiten(gains, mask) if config.whiten_advantages else gains, returns


def actor_loss(logprobs: jax.Array, entropy: jax.Array, experience: Experience, config: PPOConfig):
    """The clipped policy loss of a micro-batch, and what is logged of it."""
    old, mask = experience.logprobs, experience.action_mask
    loss = ppo.policy_loss(logprobs, old, experience.advantages, mask, clip=config.clip)
    stats = {
        "clip_fraction": ppo.policy_clip_fraction(logprobs, old, experience.advantages, mask, clip=config.clip),
        "approx_kl": ppo.approximate_kl(logprobs, old, mask),
        "entropy": masked.mean(entropy, mask),
    }
    return loss, stats


def critic_loss(values: jax.Array, experience: Experience, config: PPOConfig):
    """The clipped value loss of a micro-batch, and what is logged of it."""
    old, returns, mask = experience.values, experience.returns, experience.action_mask
    loss = ppo.value_loss(values, old, returns, mask, clip=config.value_clip)
    return loss, {"clip_fraction": ppo.value_clip_fraction(values, old, returns, mask, clip=config.value_clip)}


def summary(experience: Experience, rollout: Rollout, config: PPOConfig) -> dict[str, jax.Array]:
    """What an iteration's experience tells: score, KL, lengths, how good the critic was."""
    mask = experience.action_mask
    kl = ppo.sequence_kl(experience.logprobs, experience.ref_logprobs, mask)
    return {
        "score_mean": experience.score.mean(),
        "score_std": experience.score.std(),
        "kl": kl.mean(),
        "reward_mean": rewards(experience, config).sum(axis=1).mean(),
        "value_mean": masked.mean(experience.values, mask),
        "return_mean": masked.mean(experience.returns, mask),
        "explained_variance": ppo.explained_variance(experience.values, experience.returns, mask),
        "response_length": mask.sum(axis=1).mean(),
        "ended_by_eos": experience.ended.mean(),
        # How far what was sampled from is from what is trained; 0 but for rounding.
        "logprob_mismatch": masked.mean(jnp.abs(rollout.logprobs - experience.logprobs), mask),
    }


def keep_rollouts(
    run: RunConfig, step: int, tokenizer, rollout: Rollout, experience: Experience, config: PPOConfig
) -> None:
    """Write every rollout of an iteration to RUN/ppo/rollouts/STEP.jsonl."""
    folder = run.folder("ppo") / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    kl = ppo.sequence_kl(experience.logprobs, experience.ref_logprobs, experience.action_mask)
    numbers = {"score": experience.score, "reward": rewards(experience, config).sum(axis=1), "kl": kl}
    rollout, numbers = jax.device_get((rollout, numbers))
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
    (folder / f"{step:06d}.jsonl").write_text(lines, encoding="utf-8")


class Clock:
    """Seconds of each phase, from the end of the one before to when its arrays are there."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, result):
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"] = now - self._last
        self._last = now
        return result
