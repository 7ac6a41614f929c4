"""`generate` in fewer rows than prompts: a row takes the next prompt when its answer ends.

B rows, M prompts, P prompt positions, N new tokens.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.decode import (
    DecodeState,
    Decoding,
    Rollout,
    begin_answers,
    decode_and_sample,
    empty_state,
    put_answers,
    start_state,
    to_rollout,
)
from rlhf_jax.mesh import Layout
from rlhf_jax.models.inference import Cache, Weights, empty_cache
from rlhf_jax.trees import record

ROWS_PER_REFILL = 16  # rows per prompt of a refill: few rows are idle, and weights are not read for a single prompt


class Slots(NamedTuple):
    """Rows that take prompts: `rows` in total; each of the `shards` has `rows // shards` of them and takes up to
    `refill` prompts in each refill."""

    rows: int
    shards: int
    refill: int


class Requests(NamedTuple):
    """Prompts and mask [M, P], on every device, and the key of their answers."""

    prompts: jax.Array
    mask: jax.Array
    key: jax.Array


@record
class SlotsState:
    """The state of the loop of `generate_slots`.

    Attributes:
        next: [] int32, the first prompt that no row has taken.
        steps: [] int32, number of decode steps so far.
        state, cache: of the rows.
        answers: to all prompts, those that are done; without `seen`.
    """

    next: jax.Array
    steps: jax.Array
    state: DecodeState
    cache: Cache
    answers: DecodeState


def generate_slots(
    decoding: Decoding, weights: Weights, prompts: jax.Array, prompt_mask: jax.Array, key: jax.Array, rows: int
) -> Rollout:
    """`generate` for M prompts in `rows` rows: a row whose answer has ended takes the next prompt.

    One program that never returns to the host: a loop of rounds. Each round prefills one new prompt per ROWS_PER_REFILL
    rows into free rows, then decodes until as many rows are free again. Each device refills its own rows, so no key or
    value moves between devices.

    Args:
        prompts, prompt_mask: [M, P], on every device.
        rows: a multiple of the number of devices that split the batch.
    """
    model, (total, length) = decoding.model, prompts.shape
    layout, shards = model.layout, model.layout.shards("batch")
    slots = Slots(rows, shards, max(1, rows // shards // ROWS_PER_REFILL))
    requests = Requests(prompts, prompt_mask, key)

    def turn(loop: SlotsState) -> SlotsState:
        loop = refill(decoding, slots, weights, requests, loop)
        return collect(decode_until_free(decoding, slots, weights, requests, loop), layout)

    loop = SlotsState(
        next=jnp.int32(0),
        steps=jnp.int32(0),
        state=empty_state(decoding, rows, total),
        cache=empty_cache(model.config, rows, length + decoding.sample.max_new_tokens, model.dtype, layout),
        answers=dataclasses.replace(empty_state(decoding, total, total), seen=None),
    )
    answers = jax.lax.while_loop(lambda loop: (loop.next < total) | ~loop.state.done.all(), turn, loop).answers
    rollout = to_rollout(answers, prompts, prompt_mask, decoding.eos_ids)
    return jax.tree.map(lambda x: layout.constrain(x, "batch", *[None] * (x.ndim - 1)), rollout)


def refill(decoding: Decoding, slots: Slots, weights: Weights, requests: Requests, loop: SlotsState) -> SlotsState:
    """Put the next prompts into free rows, with the first token of their answers."""
    model, total, each = decoding.model, len(requests.prompts), slots.rows // slots.shards
    free = loop.state.done.reshape(slots.shards, each)
    rows = jnp.argsort(~free, axis=1, stable=True)[:, : slots.refill]
    usable = jnp.take_along_axis(free, rows, axis=1)
    # The first free row of every shard, then the second: the last prompts are split evenly between the shards.
    rank = jnp.cumsum(usable.T.reshape(-1), dtype=jnp.int32).reshape(slots.refill, slots.shards).T - 1
    index = loop.next + rank
    usable &= index < total
    flat = jnp.where(usable, index, 0).reshape(-1)
    prompts, mask = (model.layout.constrain(x[flat], "batch", None) for x in (requests.prompts, requests.mask))
    index, idle = jnp.where(usable, index, total).reshape(-1), ~usable.reshape(-1)
    empty = start_state(decoding, index, prompts, mask, idle)
    _, *fresh = begin_answers(decoding, weights, prompts, mask, empty, requests.key, loop.steps)
    rows = jnp.where(usable, rows, each)
    state, cache = put_answers(model.layout, (loop.state, loop.cache), tuple(fresh), rows)
    return dataclasses.replace(loop, next=loop.next + usable.sum(dtype=jnp.int32), state=state, cache=cache)


def decode_until_free(
    decoding: Decoding, slots: Slots, weights: Weights, requests: Requests, loop: SlotsState
) -> SlotsState:
    """Decode until as many rows are free as a refill takes; until all answers have ended where no prompt waits."""
    total, length = requests.prompts.shape
    waiting = total - loop.next
    enough = jnp.where(waiting > 0, jnp.minimum(waiting, slots.shards * slots.refill), slots.rows)

    def step(carry):
        steps, state, cache = carry
        index = length + state.drawn - 1
        _, state, cache = decode_and_sample(decoding, weights, state, cache, index, requests.key, steps + 1)
        return steps + 1, state, cache

    start = loop.steps, loop.state, loop.cache
    steps, state, cache = jax.lax.while_loop(lambda carry: carry[1].done.sum() < enough, step, start)
    return dataclasses.replace(loop, steps=steps, state=state, cache=cache)


def collect(loop: SlotsState, layout: Layout) -> SlotsState:
    """Write the answers of the rows to those of all prompts; unfinished ones are written again when they are done."""
    state = dataclasses.replace(loop.state, seen=None)
    answers = jax.tree.map(lambda to, part: to.at[state.index].set(part, mode="drop"), loop.answers, state)
    return dataclasses.replace(loop, answers=jax.tree.map(lambda x: layout.constrain(x, *[None] * x.ndim), answers))
