"""Reports skipped optimizer steps, keeps their batches for study, and stops a run that skips too many in a row."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.batches import Prefetch
from rlhf_jax.skipping import describe_skips
from rlhf_jax.stages.context import StageContext
from rlhf_jax.train_step import TrainState

LOGGER = logging.getLogger(__name__)
MAX_KEPT = 8  # batches of a stage
COUNT = "skipped_steps"  # metric of a step; "actor_skipped_steps" and so on where several states are trained


class SkipReport:
    """The skipped steps of a run of a stage, from the metrics of its steps and its state."""

    def __init__(self, context: StageContext, batches: Prefetch, state: Any):
        self._context, self._batches = context, batches
        self._known = sum(int(part.skips.total) for part in trained_parts(state).values())

    def is_new(self, stats: Mapping[str, Any]) -> bool:
        """Whether a step skipped an optimizer step: whether their number has grown since the last call."""
        before, self._known = self._known, sum(int(value) for name, value in stats.items() if name.endswith(COUNT))
        return self._known > before

    def are_in_a_row(self, state: Any) -> bool:
        """Whether the last optimizer step was skipped and no lower loss scale may help, so weights may be at fault."""
        return any(int(part.skips.in_a_row) for part in trained_parts(state).values())

    def report(self, step: int, stats: Mapping[str, Any], state: Any) -> None:
        """Log what was not finite in a step that skipped, and keep its batch.

        A step that the loss scale explains is only logged. Raises FloatingPointError after `run.max_skipped` in a row.
        """
        context, smallest = self._context, self._context.model.loss_scale.smallest
        parts = trained_parts(state)
        wrong = {
            name: describe_skips(part.skips, list(part.trainable)) for name, part in parts.items() if part.skips.total
        }
        what = "; ".join(f"{name}: {text}" if name else text for name, text in wrong.items())
        if any(name.endswith("loss_scale") and value > smallest for name, value in stats.items()):
            LOGGER.info(f"{context.name} {step}: skipped, {what} overflows at this loss scale, which is halved")
            return
        where = self._keep(step)
        LOGGER.warning(f"{context.name} {step}: skipped, not finite: {what}{where}")
        in_a_row = max(int(part.skips.in_a_row) for part in parts.values())
        if in_a_row >= context.run.max_skipped:
            fix = "lower the learning rate, or look at these batches"
            if any(name.endswith("loss_scale") for name in stats):
                fix += ', or set model.dtype="float32", or "bfloat16" where the GPU has it: float16 overflows even '
                fix += "with the smallest loss scale (model.loss_scale.smallest)"
            many = f"{in_a_row} optimizer steps in a row were skipped (run.max_skipped), not finite: {what}"
            raise FloatingPointError(f"{context.name} step {step}: {many}; {fix}; the checkpoint before them is kept")

    def _keep(self, step: int) -> str:
        """Write the batch of a step, {name: array}, to bad_batches/STEP.npz, unless enough are kept."""
        suffix = "" if hosts.count() == 1 else f".{hosts.index()}"  # each process has its own rows
        path = self._context.folder / "bad_batches" / f"{step:06d}{suffix}.npz"
        path.parent.mkdir(exist_ok=True)
        if len(list(path.parent.glob(f"*{suffix}.npz"))) >= MAX_KEPT:
            return ""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self._batches[step - 1])
        arrays = {jax.tree_util.keystr(name, simple=True, separator="."): np.asarray(leaf) for name, leaf in leaves}
        np.savez(path, **arrays)
        return f"; its batch is kept in {path}"


def trained_parts(state: Any) -> dict[str, TrainState]:
    """{name: every `TrainState` in a state}; "" for a state that is one."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, TrainState))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, TrainState)}


def remove_later(folder: Path, last_step: int) -> None:
    """Delete the rollouts and kept batches of a stage that belong to steps after `last_step`."""
    for name in ("rollouts", "bad_batches"):
        for path in (folder / name).glob("*"):
            step = path.name.partition(".")[0]
            if step.isdecimal() and int(step) > last_step:
                path.unlink()
