"""The training loop of every stage: resume, step, log, evaluate, save, stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax

from rlhf_jax import hosts
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.data.batches import Prefetch
from rlhf_jax.metrics import Metrics
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.skipped import SkipReport, remove_later
from rlhf_jax.stages.stopping import finish_steps, parse_duration, stop_request
from rlhf_jax.stages.watchdog import Watchdog

LOGGER = logging.getLogger(__name__)
State = TypeVar("State")


def train_loop(
    context: StageContext,
    total_steps: int,
    state: State,
    step_fn: Callable[[State, int], tuple[State, Mapping[str, Any]]],
    *,
    batches: Prefetch,
    headline: tuple[str, ...],
    evaluate: Callable[[State], Mapping[str, float]] = lambda state: {},
    eval_every: int = 0,
) -> State:
    """Run steps up to `total_steps` from the last checkpoint, or from `state` where there is none.

    Args:
        state: the checkpointed pytree of arrays. The loop owns them: it deletes them where a checkpoint replaces them.
        step_fn: (state, step counted from 0) -> (state, metrics of the step). It depends on nothing else, so a resumed
            run equals an uninterrupted one.
        batches: those that the steps train on; a run resumes only with the same rows.
        headline: metrics on the progress bar, where a step has them.
        evaluate: returns held-out metrics: called before the first step, every `eval_every` steps (0: never) and after
            the last.
    Raises:
        ValueError: the rows have changed since the checkpoint.
        FloatingPointError: `run.max_skipped` optimizer steps in a row were not finite, or a metric is not.
        StopRun: after a step that is saved, at a signal or when `run.stop_after` has passed.
    """
    run, stage, request = context.run, context.name, None
    limit, kept = parse_duration(run.stop_after), dict(keep=run.keep, keep_best=run.keep_best)
    watchdog = Watchdog(context.folder, factor=run.watchdog, floor=run.watchdog_floor)

    def measure(step: int) -> Mapping[str, float]:
        if held_out := evaluate(state):
            metrics.write(step, held_out)
            LOGGER.info(f"{stage} {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in held_out.items()))
        return held_out

    def log(step: int, stats: Mapping[str, Any]) -> None:
        stats = clock.lap(stats)
        # Values that are not finite are always written: they stop the run, except for those of a skipped step.
        is_skipped, is_wrong = skips.is_new(stats), not all(map(math.isfinite, stats.values()))
        if is_wrong or is_skipped or step == total_steps or step % run.log_every == 0:
            metrics.write(step, stats, must_be_finite=not is_skipped)
        metrics.advance(step, {name: stats[name] for name in headline if name in stats})
        if is_skipped:
            skips.report(step, stats, state)

    with Checkpoints(context.folder / "checkpoints", **kept) as checkpoints, finish_steps(), watchdog:
        start, state = resume(context, checkpoints, state, batches)
        skips = SkipReport(context, batches, state)
        with Metrics(Path(run.dir), stage, context.trackers, total_steps=total_steps, start_step=start) as metrics:
            if start:
                LOGGER.info(f"{stage}: resumed at step {start} of {total_steps}")
            else:
                measure(0)
            clock, unlogged = StepClock(), None
            for step in range(start, total_steps):
                watchdog.start_step(step)
                state, stats = step_fn(state, step)
                request = stop_request(limit, margin=watchdog.usual + checkpoints.save_seconds)
                done, is_last = step + 1, step + 1 == total_steps
                is_measured = is_last or (eval_every > 0 and done % eval_every == 0)
                is_saved = is_last or request is not None or done % run.save_every == 0
                # A step's metrics are read one step later, so that the host never waits for the step just started.
                if unlogged:
                    log(*unlogged)
                unlogged = (done, stats)
                if is_measured or is_saved:
                    log(*unlogged)
                    unlogged = None
                with watchdog.pause(), clock.pause():
                    held_out = measure(done) if is_measured else {}
                    if is_saved and (is_last or not skips.are_in_a_row(state)):
                        values = {name: float(value) for name, value in {**stats, **held_out}.items()}
                        checkpoints.save(done, state, {"data": batches.rows.fingerprint}, values)
                if request:
                    break
    if request := request or stop_request(math.inf, 0):
        hosts.barrier()  # the main process has completed the checkpoint
        raise request
    return state


class StepClock:
    """Seconds of each step: from when the metrics of the step before it were known to when its own are.

    Without the bodies of `pause`. The next step is already running then, so this is the time that a step adds.
    """

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of a step with `seconds_step`, and with `tokens_per_second` where they count `tokens`."""
        found = {name: jax.device_get(value) for name, value in stats.items()}  # waits for them
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        rate = {"tokens_per_second": found["tokens"] / seconds} if "tokens" in found else {}
        return found | {"seconds_step": seconds} | rate

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The time of the body belongs to no step."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started


def resume(context: StageContext, checkpoints: Checkpoints, state: State, batches: Prefetch) -> tuple[int, State]:
    """(steps taken, state) of the newest intact checkpoint; (0, `state`) where there is none.

    What an interrupted run wrote after that step is deleted, as it is written again. ValueError if the rows changed.
    """
    start = checkpoints.newest_intact() or 0
    hosts.on_main(remove_later, context.folder, start)
    if not start:
        return 0, state
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    # Freed before the saved arrays are read: the caller may hold these too, and memory may fit only one state.
    jax.tree.map(lambda x: x.delete(), state)
    state, meta = checkpoints.restore(start, abstract)
    if meta["data"] != batches.rows.fingerprint:
        other = "restore it, or the version of rlhf_jax that began, if it was another"
        fix = f"{other}; or choose another run.dir, or delete {context.folder} to restart the stage"
        raise ValueError(f"{context.name}: the training data is no longer what the first {start} steps saw: {fix}")
    return start, state
