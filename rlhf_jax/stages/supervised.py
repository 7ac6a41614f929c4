"""What supervised stages share: model, batches, held-out rows, training loop, export."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from rlhf_jax import hosts
from rlhf_jax.data.batches import Batch, Batches, Prefetch
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import select_rows
from rlhf_jax.hardware import RUN_OPTIONS
from rlhf_jax.loss_scale import LossScaleConfig
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.optim import OptimConfig, learning_rate, make_optimizer
from rlhf_jax.stages.batch_sizes import check_row_lengths, held_out_batches, micro_batches, rows_per_source, total_steps
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.loop import train_loop
from rlhf_jax.stages.models import export_model, load_model, log_attention, make_state
from rlhf_jax.stages.reference import Reference
from rlhf_jax.stages.tokenizers import adopt_tokenizer, load_tokenizer
from rlhf_jax.train_step import TrainState, make_update, taken_before

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupervisedConfig:
    """The keys of every supervised stage."""

    epochs: int = 1  # passes over the rows
    steps: int = 0  # optimizer steps; 0: as `epochs` says
    batch_size: int = 64  # rows of one optimizer step, over all devices; a pair is one row, unless rows are packed
    micro_batch_size: int = 0  # rows of one forward and backward pass, over all devices; 0: batch_size
    length_buckets: int = 1  # number of lengths that rows are padded to, at most; each is compiled once
    eval_every: int = 0  # steps between held-out measurements; 0: only at the start and the end
    eval_batches: int = 8  # held-out batches, at most; 0: never measure
    optim: OptimConfig = OptimConfig(learning_rate=1e-5)  # the optimizer

    def check(self, name: str, layout: Layout) -> None:
        """Raise ValueError for sizes that do not divide and for a schedule that does not fit the steps."""
        micro_batches(name, self.batch_size, self.micro_batch_size, layout)
        if self.steps:
            learning_rate(self.optim, self.steps)


class Objective(NamedTuple):
    """Loss and held-out metrics of a supervised stage.

    Attributes:
        loss: (params, batch) -> (loss, (weight, metrics)), the `LossFn` of `make_update`.
        measure: (params, batch) -> arrays of a held-out batch; to be jitted.
        summarize: (results of `measure` for each held-out batch, those batches) -> held-out metrics.
        headline: metrics on the progress bar.
        reference: (params, batch) -> `Batch.reference`, computed once for each row with the parameters that
            training starts from; to be jitted. None: the loss has no reference.
    """

    loss: Callable
    measure: Callable
    summarize: Callable[[Sequence[Any], Sequence[Batch]], Mapping[str, float]]
    headline: tuple[str, ...]
    reference: Callable | None = None


def make_programs(
    objective: Objective,
    decoder: DecoderConfig,
    layout: Layout,
    tx: optax.GradientTransformation,
    num_micro: int,
    scaling: LossScaleConfig | None = None,
) -> tuple[Callable, Callable]:
    """The jitted update(state, frozen, batch) of `make_update`, and the jitted `objective.measure`."""
    update = make_update(objective.loss, tx, abstract_params(decoder), layout, num_micro, scaling)
    return update, jax.jit(objective.measure, compiler_options=RUN_OPTIONS)


def jit_reference(objective: Objective) -> Callable:
    """The jitted `objective.reference`."""
    return jax.jit(objective.reference, compiler_options=RUN_OPTIONS)


def run_supervised_stage(
    context: StageContext,
    config: SupervisedConfig,
    start: str | Path,
    make_objective: Callable[[DecoderConfig, Compute, Layout, Any], Objective],
    *,
    scalar_head: bool = False,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Train the model in the folder (or with the hub id) `start`; writes RUN/NAME/export.

    `make_objective` is also given `config`.

    `tokenizer_from`: the folder or hub id whose tokenizer and template replace those of `start`.
    """
    name, run, layout, model = context.name, context.run, context.layout, context.model
    pretrained = load_model(start, model, layout, scalar_head=scalar_head, seed=run.seed)
    tokenizer = prepare_tokenizer(pretrained.tokenizer, *context.data.rendering)
    if tokenizer_from is not None:
        tokenizer = load_tokenizer(tokenizer_from, context.data)
        pretrained = adopt_tokenizer(name, pretrained, tokenizer)
    num_micro = micro_batches(name, config.batch_size, config.micro_batch_size, layout)

    def rows_of(held_out: bool) -> Rows:
        rows = select_rows(context.data, tokenizer, context.rows, held_out=held_out)
        check_row_lengths(name, rows, pretrained.config.max_positions)
        return rows

    rows = rows_of(held_out=False)
    held_out = rows_of(held_out=True) if config.eval_batches else None
    LOGGER.info(f"{name}: training data: {rows.report}; held out: {held_out.report if held_out else 'unused'}")
    lengths = dict(buckets=config.length_buckets, width=context.rows.pack_length)
    batches = Batches(
        rows, batch_size=config.batch_size, seed=run.seed, own=layout.own_rows(config.batch_size), **lengths
    )
    log_attention(name, pretrained, model, batches.lengths[-1], packed=rows.is_packed)
    measured = held_out_batches(held_out, config.batch_size // num_micro, config.eval_batches * num_micro, layout)
    if rows.endless and not config.steps:
        raise ValueError(f"a streamed source has no end, and so no epochs: set {name}.steps")
    steps = total_steps(config.steps, config.epochs, batches.steps_per_epoch)

    tx, rate = make_optimizer(config.optim, steps), learning_rate(config.optim, steps)
    decoder = model.with_lora(pretrained.config)
    objective = make_objective(decoder, model.compute, layout, config)
    if objective.reference:
        reference = Reference(jit_reference(objective), pretrained.params, layout)
        batches.reference = reference.read_or_compute(context, batches, steps, config.batch_size // num_micro)
        measured = [dataclasses.replace(batch, reference=reference(batch)) for batch in measured]
    update, measure = make_programs(objective, decoder, layout, tx, num_micro, model.scaling)
    state, frozen = make_state(pretrained, model, tx, run.seed)
    prefetch = Prefetch(batches, steps)

    def step_fn(state: TrainState, step: int):
        batch = layout.put_own_rows(prefetch[step], config.batch_size)
        counts = {"tokens": batch.mask.sum(), **rows_per_source(batches, step)}
        state, stats = update(state, frozen, batch)
        return state, {**stats, "learning_rate": rate(taken_before(state)), **counts}

    def evaluate(state: TrainState) -> Mapping[str, float]:
        each = [hosts.fetch(measure(state.params(frozen), layout.put_batch(batch))) for batch in measured]
        return objective.summarize(each, measured) if measured else {}

    held_out_metrics = dict(evaluate=evaluate, eval_every=config.eval_every)
    state = train_loop(
        context, steps, state, step_fn, batches=prefetch, headline=objective.headline, **held_out_metrics
    )
    export_model(pretrained, state.params(frozen), model, context.export)
