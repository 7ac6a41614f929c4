"""Micro-batches of a stage, checks of its sizes, and the batches that it is measured on."""

from __future__ import annotations

from rlhf_jax.data.batches import Batch, Batches
from rlhf_jax.data.rows import Rows
from rlhf_jax.mesh import Layout, check_divides


def micro_batches(stage: str, batch_size: int, micro_batch_size: int, layout: Layout) -> int:
    """Number of micro-batches of one optimizer step.

    Raises:
        ValueError: sizes do not divide, with the nearest that do.
    """
    shards = layout.shards("batch")
    check_divides(f"{stage}.batch_size", batch_size, shards, "devices of the mesh")
    micro = micro_batch_size or batch_size
    check_divides(f"{stage}.micro_batch_size", micro, shards, "devices of the mesh")
    if batch_size % micro:
        legal = [n for n in range(shards, batch_size + 1, shards) if batch_size % n == 0]
        raise ValueError(f"{stage}.micro_batch_size={micro} does not divide batch_size={batch_size}; these do: {legal}")
    return batch_size // micro


def total_steps(steps: int, epochs: int, steps_per_epoch: int) -> int:
    """`steps`, or if that is 0 the steps of all `epochs`."""
    return steps or epochs * steps_per_epoch


def check_row_lengths(stage: str, rows: Rows, max_positions: int) -> None:
    """Raise ValueError for a row that is longer than the model's positions."""
    if rows.longest > max_positions:
        fix = f"set data.max_length to at most {max_positions}"
        longest = f"the longest row has {rows.longest} tokens, and the model has {max_positions} positions"
        raise ValueError(f"{stage}: {longest}: {fix}")


def rows_per_source(batches: Batches, step: int) -> dict[str, int]:
    """Number of rows of a step from each source, as metrics "rows/NAME"; {} if there is one source."""
    return {f"rows/{name}": count for name, count in batches.counts(step).items()}


def held_out_batches(rows: Rows | None, batch_size: int, limit: int, layout: Layout) -> list[Batch]:
    """At most `limit` batches of held-out rows, the same at every call, of `batch_size` or as many rows as there are.

    Raises:
        ValueError: fewer rows than devices.
    """
    if rows is None:
        return []
    shards = layout.shards("batch")
    size = min(batch_size, len(rows) // shards * shards)
    if size == 0:
        fix = "raise data.held_out or give the source an eval_path with more rows"
        raise ValueError(f"{len(rows)} held-out rows are fewer than the {shards} devices they are measured on: {fix}")
    batches = Batches(rows, batch_size=size, seed=0)
    return [batches[step] for step in range(min(limit, batches.steps_per_epoch))]
