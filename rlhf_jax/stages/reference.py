"""Log-probabilities of rows by the model that training starts from: computed once, then kept in host memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.batches import Batch, Batches
from rlhf_jax.mesh import Layout
from rlhf_jax.stages.context import StageContext
from rlhf_jax.train_step import Params

LOGGER = logging.getLogger(__name__)


class Reference(NamedTuple):
    """The reference of a supervised stage.

    Attributes:
        program: jitted (params, batch) -> [B, 2] float32, or [B, D, 2] of packed rows.
        params: of the model that training starts from, without adapters.
        layout: layout of the parameters and of batches.
    """

    program: Callable
    params: Params
    layout: Layout

    def __call__(self, batch: Batch) -> np.ndarray:
        """`Batch.reference` of a batch, on the host."""
        return hosts.fetch(self.program(self.params, self.layout.put_batch(batch)))

    def read_or_compute(self, context: StageContext, batches: Batches, steps: int, size: int) -> list[np.ndarray]:
        """`Batch.reference` of all rows of each part, float32; NaN for rows that `steps` steps do not draw.

        Computed `size` rows at a time, those of similar length together, and kept in RUN/NAME/reference.npz, which a
        resumed run reads.

        Raises:
            ValueError: a streamed source, whose rows are not known in advance.
        """
        rows, path = batches.rows, context.folder / "reference.npz"
        if rows.endless:
            fix = "set stream = false, or a loss that has no reference"
            raise ValueError(f"the reference's log-probabilities of all rows are computed before training: {fix}")
        key = f"{rows.fingerprint} {steps}"
        if hosts.on_main(lambda: path.exists() and bool(np.load(path)["key"] == key)):
            saved = np.load(path)
            return [saved[str(number)] for number in range(len(rows.parts))]
        values = [np.full((len(part), *batches.answers), np.nan, np.float32) for part in rows.parts]
        drawn = drawn_rows(batches, steps)
        lengths = [part.row_lengths(each) for part, each in zip(rows.parts, drawn, strict=True)]
        order = np.argsort(np.concatenate(lengths), kind="stable")
        part, row = np.repeat(np.arange(len(drawn)), [len(each) for each in drawn])[order], np.concatenate(drawn)[order]
        for start in range(0, len(order), size):
            # The last rows repeat one, so that each length is compiled once.
            chunk = np.minimum(np.arange(start, start + size), len(order) - 1)
            found = self(batches.make(part[chunk], row[chunk]))
            for number, values_of_part in enumerate(values):
                values_of_part[row[chunk][part[chunk] == number]] = found[part[chunk] == number]
        LOGGER.info(f"{context.name}: the reference's log-probabilities of {len(order):,} rows are in host memory")
        if not hosts.is_main():
            return values
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name("reference.unfinished.npz")
        np.savez(unfinished, key=key, **{str(number): each for number, each in enumerate(values)})
        unfinished.replace(path)
        return values


def drawn_rows(batches: Batches, steps: int) -> list[np.ndarray]:
    """[n] int64 for each part: its rows that are drawn in `steps` steps."""
    drawn = [np.zeros(len(part), bool) for part in batches.rows.parts]
    for step in range(steps):
        part, row = batches.draws(step)
        for number, each in enumerate(drawn):
            each[row[part == number]] = True
        if all(each.all() for each in drawn):
            break
    return [each.nonzero()[0] for each in drawn]
