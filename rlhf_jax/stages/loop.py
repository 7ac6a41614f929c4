"""The training loop of every stage: resume, step, log, evaluate, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.data.rows import Rows
from rlhf_jax.metrics import Metrics
from rlhf_jax.stages.context import StageContext

LOGGER = logging.getLogger(__name__)
State = TypeVar("State")


def train_loop(
    context: StageContext,
    total_steps: int,
    state: State,
    step_fn: Callable[[State, int], tuple[State, Mapping[str, Any]]],
    *,
    rows: Rows,
    headline: tuple[str, ...],
    evaluate: Callable[[State], Mapping[str, float]] = lambda state: {},
    eval_every: int = 0,
) -> State:
    """Run steps up to `total_steps` from the last checkpoint, or from `state` where there is none.

    Args:
        state: the checkpointed pytree of arrays. The loop owns them: it deletes them where a checkpoint replaces them.
        step_fn: (state, step counted from 0) -> (state, metrics of the step). It depends on nothing else, so a resumed
            run equals an uninterrupted one.
        rows: the training rows; a run resumes only with the same ones.
        headline: metrics on the progress bar.
        evaluate: returns held-out metrics: called before the first step, every `eval_every` steps (0: never) and after
            the last.
    Raises:
        ValueError: the rows have changed since the checkpoint.
    """
    run, stage = context.run, context.name

    def measure(step: int) -> Mapping[str, float]:
        if held_out := evaluate(state):
            metrics.write(step, held_out)
            LOGGER.info(f"{stage} {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in held_out.items()))
        return held_out

    def log(step: int, stats: Mapping[str, Any]) -> None:
        # Values that are not finite are always written, which stops the run before they reach a checkpoint.
        is_wrong = not all(map(math.isfinite, stats.values()))
        if is_wrong or step == total_steps or step % run.log_every == 0:
            metrics.write(step, stats)
        metrics.advance(step, {name: stats[name] for name in headline})

    kept = dict(keep=run.keep, keep_best=run.keep_best)
    with Checkpoints(context.folder / "checkpoints", **kept) as checkpoints:
        start = checkpoints.newest_intact() or 0
        if start:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            # Freed before the saved arrays are read: the caller may hold these too, and memory may fit only one state.
            jax.tree.map(lambda x: x.delete(), state)
            state, meta = checkpoints.restore(start, abstract)
            if meta["data"] != rows.fingerprint:
                fix = f"restore it, choose another run.dir, or delete {context.folder} to restart the stage"
                raise ValueError(f"{stage}: the training data is no longer what the first {start} steps saw: {fix}")
        with Metrics(Path(run.dir), stage, total_steps=total_steps, start_step=start) as metrics:
            if start:
                LOGGER.info(f"{stage}: resumed at step {start} of {total_steps}")
            else:
                measure(0)
            unlogged: tuple[int, Mapping[str, Any]] | None = None
            for step in range(start, total_steps):
                state, stats = step_fn(state, step)
                done = step + 1
                is_last = done == total_steps
                is_measured = is_last or (eval_every > 0 and done % eval_every == 0)
                is_saved = is_last or done % run.save_every == 0
                # A step's metrics are read one step later, so that the host never waits for the step just started.
                if unlogged:
                    log(*unlogged)
                unlogged = (done, stats)
                if is_measured or is_saved:
                    log(*unlogged)
                    unlogged = None
                held_out = measure(done) if is_measured else {}
                if is_saved:
                    values = {name: float(value) for name, value in {**stats, **held_out}.items()}
                    checkpoints.save(done, state, {"data": rows.fingerprint}, values)
    return state
