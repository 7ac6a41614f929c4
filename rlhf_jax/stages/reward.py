"""Stage 2, the reward model: one score a sequence, at its last real token, higher for the preferred answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import optax

from rlhf_jax.data.ahead import Ahead
from rlhf_jax.data.batches import Batch, Batches
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.example import RowSpec
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import select_rows
from rlhf_jax.data.template import prepare_tokenizer
from rlhf_jax.gpus import RUN_OPTIONS
from rlhf_jax.mesh import Layout
from rlhf_jax.models.architecture import Compute, DecoderConfig
from rlhf_jax.models.decoder import abstract_params, bind, last_hidden, scalar
from rlhf_jax.objectives.preference import pairwise_loss
from rlhf_jax.optim import OptimConfig, learning_rate, make_optimizer
from rlhf_jax.stages.loop import RunConfig, say_rows, train_loop
from rlhf_jax.stages.models import ModelConfig, export, load, make_state, say_attention
from rlhf_jax.stages.sizes import (
    check_rows,
    drawn,
    held_out_batches,
    micro_batches,
    total_steps,
)
from rlhf_jax.train_step import Params, TrainState, make_update


@dataclass(frozen=True)
class RewardConfig:
    epochs: int = 1  # passes over the rows
    steps: int = 0  # optimizer steps; 0: as `epochs` says
    batch_size: int = 64  # pairs of one optimizer step, over all devices
    micro_batch_size: int = 0  # pairs of one forward and backward pass, over all devices; 0: batch_size
    length_buckets: int = 1  # lengths that rows are padded to, at most; each is compiled once
    eval_every: int = 0  # steps between held-out accuracies; 0: only at the start and the end
    eval_batches: int = 16  # held-out batches, at most; 0: never measure
    optim: OptimConfig = OptimConfig(learning_rate=5e-5, weight_decay=0.1)  # the optimizer


def reward_programs(
    decoder: DecoderConfig, compute: Compute, layout: Layout, tx: optax.GradientTransformation, num_micro: int
) -> tuple[Callable, Callable]:
    """The jitted update(state, frozen, batch) of `make_update`, and measure(params, batch) -> scores [B, 2]."""

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """[B, 2] of the chosen and the rejected answer, and the balance loss."""
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
        hidden, balance = bind(decoder, params).with_balance_loss(tokens, mask, compute, layout)
        return scalar(params, last_hidden(hidden, mask)).reshape(-1, 2), balance

    def loss_fn(params: Params, batch: Batch):
        both, balance = scores(params, batch)
        chosen, rejected = both.T
        stats = {"accuracy": (chosen > rejected).mean(), "margin": (chosen - rejected).mean()}
        return pairwise_loss(chosen, rejected) + balance, (chosen.shape[0], stats)

    update = make_update(loss_fn, tx, abstract_params(decoder), layout, num_micro)
    return update, jax.jit(lambda params, batch: scores(params, batch)[0], compiler_options=RUN_OPTIONS)


def run_reward(run: RunConfig, layout: Layout, model: ModelConfig, data: DataConfig, config: RewardConfig) -> None:
    """Train a scalar head, and the model under it, on preference pairs; leaves RUN/reward/export."""
    start = run.export("sft") if model.reward == "sft" else model.reward
    pretrained = load(start, model, layout, scalar_head=True, seed=run.seed)
    decoder = pretrained.config
    tokenizer = prepare_tokenizer(pretrained.tokenizer, data.template)
    num_micro = micro_batches("reward", config.batch_size, config.micro_batch_size, layout)

    def rows_of(held_out: bool) -> Rows:
        rows = select_rows(data, tokenizer, RowSpec("pair", "reward"), held_out=held_out)
        check_rows("reward", rows, decoder.max_positions)
        return rows

    rows = rows_of(held_out=False)
    held_out = rows_of(held_out=True) if config.eval_batches else None
    say_rows("reward", rows, held_out)
    say_attention("reward", pretrained, model, rows.longest)
    batches = Batches(
        rows,
        batch_size=config.batch_size,
        seed=run.seed,
        buckets=config.length_buckets,
    )
    measured = held_out_batches(held_out, config.batch_size // num_micro, config.eval_batches * num_micro, layout)
    steps = total_steps(config.steps, config.epochs, batches.steps_per_epoch)

    tx, rate = make_optimizer(config.optim, steps), learning_rate(config.optim, steps)
    update, measure = reward_programs(model.with_lora(decoder), model.compute, layout, tx, num_micro)

    state, frozen = make_state(pretrained, model, tx, run.seed)
    ahead = Ahead(batches, steps)

    def step_fn(state: TrainState, step: int):
        state, stats = update(state, frozen, layout.put_batch(ahead[step]))
        return state, {**stats, "learning_rate": rate(step), **drawn(batches, step)}

    def evaluate(state: TrainState):
        if not measured:
            return {}
        scored = np.concatenate(
            [np.asarray(measure(state.params(frozen), layout.put_batch(batch))) for batch in measured]
        )
        lengths = np.concatenate([batch.mask.sum(-1) for batch in measured])
        return {
            "held_out_accuracy": float((scored[:, 0] > scored[:, 1]).mean()),
            # What a judge of length alone would reach; ties count half.
            "held_out_longer_is_chosen": float((0.5 + 0.5 * np.sign(lengths[:, 0] - lengths[:, 1])).mean()),
            "held_out_chosen_score": float(scored[:, 0].mean()),
            "held_out_rejected_score": float(scored[:, 1].mean()),
            "held_out_score_std": float(scored.std()),
        }

    state = train_loop(
        run,
        "reward",
        steps,
        state,
        step_fn,
        rows=rows,
        evaluate=evaluate,
        eval_every=config.eval_every,
        headline=("loss", "accuracy"),
    )
    export(pretrained, state.params(frozen), model, run.export("reward"))
