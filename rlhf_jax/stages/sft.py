"""Stage 1, supervised fine-tuning: the next token of the answer, given the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import optax

from rlhf_jax.data.ahead import Ahead
from rlhf_jax.data.batches import Batch, Batches
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.example import Learn, RowSpec
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import select_rows
from rlhf_jax.data.template import prepare_tokenizer
from rlhf_jax.gpus import RUN_OPTIONS
from rlhf_jax.mesh import Layout
from rlhf_jax.models.architecture import Compute, DecoderConfig
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel, head_options
from rlhf_jax.objectives.logprobs import token_logprobs
from rlhf_jax.objectives.sft import nll
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
class SFTConfig:
    epochs: int = 1  # passes over the rows
    steps: int = 0  # optimizer steps; 0: as `epochs` says
    batch_size: int = 64  # sequences of one optimizer step, over all devices
    micro_batch_size: int = 0  # sequences of one forward and backward pass, over all devices; 0: batch_size
    learn: Learn = "answer"  # the last answer, every turn of the "assistant", or "everything"
    pack_length: int = 0  # tokens of a row that holds several documents, none of which sees another; 0: one document
    length_buckets: int = 1  # lengths that rows are padded to, at most; each is compiled once
    eval_every: int = 0  # steps between held-out losses; 0: only at the start and the end
    eval_batches: int = 8  # held-out batches, at most; 0: never measure
    optim: OptimConfig = OptimConfig(learning_rate=9.65e-6)  # the optimizer


def sft_programs(
    decoder: DecoderConfig, compute: Compute, layout: Layout, tx: optax.GradientTransformation, num_micro: int
) -> tuple[Callable, Callable]:
    """The jitted update(state, frozen, batch) of `make_update`, and measure(params, batch) -> what `losses` gives."""

    def losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The mean over the learned tokens, the balance loss, and how many tokens are learned."""
        hidden, balance = bind(decoder, params).with_balance_loss(
            batch.tokens, batch.mask, compute, layout, batch.segments
        )
        logprobs = token_logprobs(
            hidden[:, :-1],
            head_kernel(decoder, params),
            batch.tokens[:, 1:],
            chunk=compute.chunk,
            **head_options(decoder, params),
        )
        learned = batch.loss_mask[:, 1:]
        return nll(logprobs, learned), balance, learned.sum()

    def loss_fn(params: Params, batch: Batch):
        loss, balance, count = losses(params, batch)
        return loss + balance, (count, {})

    update = make_update(loss_fn, tx, abstract_params(decoder), layout, num_micro)
    return update, jax.jit(losses, compiler_options=RUN_OPTIONS)


def run_sft(run: RunConfig, layout: Layout, model: ModelConfig, data: DataConfig, config: SFTConfig, base: str) -> None:
    """Fine-tune the language model in the folder (or with the hub id) `base`; leaves RUN/sft/export."""
    pretrained = load(base, model, layout)
    decoder = pretrained.config
    tokenizer = prepare_tokenizer(pretrained.tokenizer, data.template)
    num_micro = micro_batches("sft", config.batch_size, config.micro_batch_size, layout)

    def rows_of(held_out: bool) -> Rows:
        spec = RowSpec("demonstration", "sft", config.learn, config.pack_length)
        rows = select_rows(data, tokenizer, spec, held_out=held_out)
        check_rows("sft", rows, decoder.max_positions)
        return rows

    rows = rows_of(held_out=False)
    held_out = rows_of(held_out=True) if config.eval_batches else None
    say_rows("sft", rows, held_out)
    batches = Batches(
        rows,
        batch_size=config.batch_size,
        seed=run.seed,
        buckets=config.length_buckets,
        width=config.pack_length,
    )
    say_attention("sft", pretrained, model, batches.lengths[-1], packed=rows.packed)
    measured = held_out_batches(held_out, config.batch_size // num_micro, config.eval_batches * num_micro, layout)
    if rows.endless and not config.steps:
        raise ValueError("a streamed source has no end, and so no epochs: set sft.steps")
    steps = total_steps(config.steps, config.epochs, batches.steps_per_epoch)

    tx, rate = make_optimizer(config.optim, steps), learning_rate(config.optim, steps)
    update, measure = sft_programs(model.with_lora(decoder), model.compute, layout, tx, num_micro)

    state, frozen = make_state(pretrained, model, tx, run.seed)
    ahead = Ahead(batches, steps)

    def step_fn(state: TrainState, step: int):
        state, stats = update(state, frozen, layout.put_batch(ahead[step]))
        return state, {**stats, "learning_rate": rate(step), **drawn(batches, step)}

    def evaluate(state: TrainState):
        if not measured:
            return {}
        each = [measure(state.params(frozen), layout.put_batch(batch)) for batch in measured]
        weights = [int(count) for _, _, count in each]
        return {"held_out_loss": float(np.average([float(loss) for loss, _, _ in each], weights=weights))}

    state = train_loop(
        run,
        "sft",
        steps,
        state,
        step_fn,
        rows=rows,
        evaluate=evaluate,
        eval_every=config.eval_every,
        headline=("loss", "grad_norm"),
    )
    export(pretrained, state.params(frozen), model, run.export("sft"))
