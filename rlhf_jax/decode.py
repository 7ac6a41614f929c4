"""Prefill and decoding with a KV cache, sampling inside one compiled loop; by GENERATE.

`generate` answers all prompts at once; `generate_slots` answers them in fewer rows, each of which takes the next prompt
when its answer ends.

B rows, M prompts, P prompt positions, N new tokens, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.mesh import Layout
from rlhf_jax.models.inference import Cache, Inference, Weights, empty_cache, forward, inference_logits
from rlhf_jax.models.layers import token_positions
from rlhf_jax.sampling import SampleConfig, draw, is_eos, is_model_distribution, logprob_of, penalise_logits, seen_ids
from rlhf_jax.trees import record

MIN_BUCKET = 32
ROWS_PER_REFILL = 16  # rows per prompt of a refill: few rows wait, and weights are not read for one prompt alone


@record
class Rollout:
    """Prompts and the answers sampled to them; the samples of one prompt stand in a row, one after the other.

    Attributes:
        prompts: [B, P] int32, left-padded.
        prompt_mask: [B, P] bool.
        tokens: [B, N] int32, 0 after the end of an answer.
        mask: [B, N] bool, true up to and including EOS.
        logprobs: [B, N] float32, of the distribution that was sampled from (penalised, tempered, cut); when greedy, of
            the distribution whose likeliest token was taken.
        ended: [B] bool, true where the answer ended by EOS, false where it was cut at N.
        model_logprobs: [B, N] float32, of the model's own distribution: not penalised, tempered or cut.
        steps: [B] int32, decode steps that the program had made when this answer ended; the largest is all it made.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    ended: jax.Array
    model_logprobs: jax.Array
    steps: jax.Array


@dataclass(frozen=True)
class Decoding:
    """How prompts are answered: by which model, how tokens are drawn, and which of them end an answer."""

    model: Inference
    sample: SampleConfig
    eos_ids: tuple[int, ...]


def prefill(
    model: Inference, weights: Weights, prompts: jax.Array, prompt_mask: jax.Array, new_tokens: int
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after each left-padded prompt [B, P], and a cache with room for `new_tokens` more."""
    batch, length = prompts.shape
    cache = empty_cache(model.config, batch, length + new_tokens, model.dtype, model.layout)
    hidden, cache = forward(model, weights, prompts, prompt_mask, token_positions(prompt_mask), cache, 0)
    return inference_logits(model.config, weights, hidden[:, -1]), cache


@record
class DecodeState:
    """The answers that B rows are drawing.

    Attributes:
        index: [B] int32, which prompt each row answers; M: none.
        sizes: [B] int32, tokens of that prompt.
        drawn: [B] int32, tokens of the answer so far.
        last: [B] int32, the newest of them.
        done: [B] bool, the answer has ended, or the row has none.
        steps: [B] int32, as in Rollout.
        tokens, logprobs, model_logprobs: [B, N]; the last is None where the two are the same.
        seen: [B, V] bool, ids of prompt and answer; None where repetition is not penalised.
    """

    index: jax.Array
    sizes: jax.Array
    drawn: jax.Array
    last: jax.Array
    done: jax.Array
    steps: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    model_logprobs: jax.Array | None
    seen: jax.Array | None


def start_state(
    decoding: Decoding, index: jax.Array, prompts: jax.Array, prompt_mask: jax.Array, done: jax.Array
) -> DecodeState:
    """Answers of no token yet to the prompts [B, P] with those numbers [B]."""
    sample, zeros = decoding.sample, jnp.zeros_like(index)
    shape, vocab = (len(index), sample.max_new_tokens), decoding.model.config.padded_vocab
    return DecodeState(
        index=index,
        sizes=prompt_mask.sum(axis=1, dtype=jnp.int32),
        drawn=zeros,
        last=zeros,
        done=done,
        steps=zeros,
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        model_logprobs=None if is_model_distribution(sample) else jnp.zeros(shape, jnp.float32),
        seen=None if sample.repetition_penalty == 1 else seen_ids(prompts, prompt_mask, vocab),
    )


def empty_state(decoding: Decoding, rows: int, total: int) -> DecodeState:
    """Rows that answer none of the `total` prompts."""
    blank = jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1), bool)
    return start_state(decoding, jnp.full(rows, total, jnp.int32), *blank, jnp.ones(rows, bool))


def sample_step(
    decoding: Decoding, state: DecodeState, logits: jax.Array, key: jax.Array, steps: jax.Array | int
) -> DecodeState:
    """One more token, drawn from logits [B, V], in every row that is not done.

    Token t of the answer to prompt i is drawn with fold_in(fold_in(key, i), t): whatever row it is in, and when.
    """
    s, going, sample, eos_ids = state, ~state.done, decoding.sample, decoding.eos_ids
    keys = jax.vmap(lambda i, t: jax.random.fold_in(jax.random.fold_in(key, i), t))(s.index, s.drawn)
    token, logprob = draw(penalise_logits(logits, sample, s.seen, s.drawn, eos_ids), keys, sample)
    here = going[:, None] & (jnp.arange(s.tokens.shape[1]) == s.drawn[:, None])
    drawn = s.drawn + going
    own, seen, vocab = s.model_logprobs, s.seen, jnp.arange(logits.shape[-1])
    return dataclasses.replace(
        s,
        drawn=drawn,
        last=jnp.where(going, token, s.last),
        done=s.done | is_eos(token, eos_ids) | (drawn == sample.max_new_tokens),
        steps=jnp.where(going, steps, s.steps),
        tokens=jnp.where(here, token[:, None], s.tokens),
        logprobs=jnp.where(here, logprob[:, None], s.logprobs),
        model_logprobs=None if own is None else jnp.where(here, logprob_of(logits, token)[:, None], own),
        seen=None if seen is None else seen | (going[:, None] & (vocab == token[:, None])),
    )


def to_rollout(state: DecodeState, prompts: jax.Array, prompt_mask: jax.Array, eos_ids: tuple[int, ...]) -> Rollout:
    """Answers that are done, in the order of their prompts, as a Rollout."""
    own = state.logprobs if state.model_logprobs is None else state.model_logprobs
    mask = jnp.arange(state.tokens.shape[1]) < state.drawn[:, None]
    ended = is_eos(state.last, eos_ids)
    return Rollout(prompts, prompt_mask, state.tokens, mask, state.logprobs, ended, own, state.steps)


def decode_step(
    model: Inference, weights: Weights, state: DecodeState, cache: Cache, index: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after the newest token of every row, which goes to `index` (of all rows, or [B]) of the cache."""
    token, real, positions = state.last, ~state.done, state.sizes + state.drawn - 1
    hidden, cache = forward(model, weights, token[:, None], real[:, None], positions[:, None], cache, index)
    return inference_logits(model.config, weights, hidden[:, -1]), cache


def generate(
    decoding: Decoding, weights: Weights, prompts: jax.Array, prompt_mask: jax.Array, key: jax.Array
) -> Rollout:
    """Sample an answer to every prompt at once; to be jitted with `decoding` static.

    Args:
        prompts, prompt_mask: [B, P], left-padded, at least one real token per row.
        key: one key for the whole batch; a row's answer does not depend on how many rows there are.
    """
    batch, prompt_length = prompts.shape
    none_done, index = jnp.zeros(batch, bool), jnp.arange(batch, dtype=jnp.int32)
    logits, cache = prefill(decoding.model, weights, prompts, prompt_mask, decoding.sample.max_new_tokens)
    state = start_state(decoding, index, prompts, prompt_mask, none_done)
    state = sample_step(decoding, state, logits, key, 0)

    def step(carry):
        steps, state, cache = carry
        # All rows are as far, so all write at one place.
        logits, cache = decode_step(decoding.model, weights, state, cache, prompt_length + steps)
        return steps + 1, sample_step(decoding, state, logits, key, steps + 1), cache

    def unfinished(carry):
        return ~carry[1].done.all()

    _, state, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, cache))
    return to_rollout(state, prompts, prompt_mask, decoding.eos_ids)


class Slots(NamedTuple):
    """Rows that take prompts: `rows` in all, of which every one of `shards` has `rows // shards` and `refill` prompts
    of each refill."""

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
    """The loop of `generate_slots`.

    Attributes:
        next: [] int32, the first prompt that no row has taken.
        steps: [] int32, decode steps so far.
        state, cache: of the rows.
        answers: of all prompts, as far as they are done; without `seen`.
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

    One program without a word to the host: a loop of rounds, each of which prefills a prompt for every ROWS_PER_REFILL
    rows into free ones, then decodes until as many are free again. Every device serves its own rows, so no key or value
    moves between devices.

    Args:
        prompts, prompt_mask: [M, P], on every device.
        rows: what the devices of the batch divide.
    """
    model, (total, length) = decoding.model, prompts.shape
    layout, shards = model.layout, model.layout.shards("batch")
    slots = Slots(rows, shards, max(1, rows // shards // ROWS_PER_REFILL))
    requests = Requests(prompts, prompt_mask, key)

    def turn(loop: SlotsState) -> SlotsState:
        loop = refill(decoding, slots, weights, requests, loop)
        return collect(decode_until_free(decoding, slots, weights, requests, loop), layout)

    def unfinished(loop: SlotsState) -> jax.Array:
        return (loop.next < total) | ~loop.state.done.all()

    loop = SlotsState(
        next=jnp.int32(0),
        steps=jnp.int32(0),
        state=empty_state(decoding, rows, total),
        cache=empty_cache(model.config, rows, length + decoding.sample.max_new_tokens, model.dtype, layout),
        answers=dataclasses.replace(empty_state(decoding, total, total), seen=None),
    )
    answers = jax.lax.while_loop(unfinished, turn, loop).answers
    rollout = to_rollout(answers, prompts, prompt_mask, decoding.eos_ids)
    return jax.tree.map(lambda x: layout.constrain(x, "batch", *[None] * (x.ndim - 1)), rollout)


def refill(decoding: Decoding, slots: Slots, weights: Weights, requests: Requests, loop: SlotsState) -> SlotsState:
    """The next prompts in free rows, with the first token of their answers."""
    model, total, each = decoding.model, len(requests.prompts), slots.rows // slots.shards
    free = loop.state.done.reshape(slots.shards, each)
    rows = jnp.argsort(~free, axis=1, stable=True)[:, : slots.refill]
    usable = jnp.take_along_axis(free, rows, axis=1)
    # The first free row of every shard, then the second: the last prompts are shared out evenly.
    rank = jnp.cumsum(usable.T.reshape(-1), dtype=jnp.int32).reshape(slots.refill, slots.shards).T - 1
    index = loop.next + rank
    usable &= index < total
    flat = jnp.where(usable, index, 0).reshape(-1)
    prompts, mask = (model.layout.constrain(x[flat], "batch", None) for x in (requests.prompts, requests.mask))
    logits, cache = prefill(model, weights, prompts, mask, 0)
    index, idle = jnp.where(usable, index, total).reshape(-1), ~usable.reshape(-1)
    fresh = start_state(decoding, index, prompts, mask, idle)
    fresh = sample_step(decoding, fresh, logits, requests.key, loop.steps)
    rows = jnp.where(usable, rows, each)
    visible = jnp.pad(cache.visible, ((0, 0), (0, decoding.sample.max_new_tokens)))

    def into(old: jax.Array, new: jax.Array, *axes: str | None) -> jax.Array:
        return put_rows(old, new, rows, model.layout, axes)

    def entries(old: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(into(*pair, "kv_heads", None, None) for pair in zip(old, new, strict=True))

    old = loop.cache
    return dataclasses.replace(
        loop,
        next=loop.next + usable.sum(dtype=jnp.int32),
        state=jax.tree.map(into, loop.state, fresh),
        cache=Cache(entries(old.keys, cache.keys), entries(old.values, cache.values), into(old.visible, visible)),
    )


def put_rows(
    old: jax.Array, new: jax.Array, rows: jax.Array, layout: Layout, axes: tuple[str | None, ...]
) -> jax.Array:
    """`new` [R, ...] at `rows` [shards, R / shards] of each shard of `old` [B, ...]; a row past its end is nowhere.

    Where new rows are shorter than old, as prompts in the cache, they begin them. `axes` are those after the batch. By
    hand, as the partitioner gathers the heads of the cache for such a scatter.
    """
    split = layout.spec(("batch", *(axes or [None] * (old.ndim - 1))))

    def local(old, new, rows):
        window = tuple(slice(0, size) for size in new.shape[1:])
        return old.at[(rows[0], *window)].set(new, mode="drop")

    specs = dict(in_specs=(split, split, layout.spec(("batch", None))), out_specs=split)
    return jax.shard_map(local, mesh=layout.mesh, **specs)(old, new, rows)


def decode_until_free(
    decoding: Decoding, slots: Slots, weights: Weights, requests: Requests, loop: SlotsState
) -> SlotsState:
    """Decode until as many rows are free as a refill takes; to the end where no prompt waits."""
    total, length = requests.prompts.shape
    waiting = total - loop.next
    enough = jnp.where(waiting > 0, jnp.minimum(waiting, slots.shards * slots.refill), slots.rows)

    def step(carry):
        steps, state, cache = carry
        logits, cache = decode_step(decoding.model, weights, state, cache, length + state.drawn - 1)
        return steps + 1, sample_step(decoding, state, logits, requests.key, steps + 1), cache

    def too_few_free(carry):
        return carry[1].done.sum() < enough

    steps, state, cache = jax.lax.while_loop(too_few_free, step, (loop.steps, loop.state, loop.cache))
    return dataclasses.replace(loop, steps=steps, state=state, cache=cache)


def collect(loop: SlotsState, layout: Layout) -> SlotsState:
    """The answers of the rows among those of all prompts; what is not done yet is written once more when it is."""
    state = dataclasses.replace(loop.state, seen=None)
    answers = jax.tree.map(lambda to, part: to.at[state.index].set(part, mode="drop"), loop.answers, state)
    return dataclasses.replace(loop, answers=jax.tree.map(lambda x: layout.constrain(x, *[None] * x.ndim), answers))


def bucket_length(length: int) -> int:
    """The padded prompt length that is compiled for prompts of `length` tokens: a power of two, so that few are."""
    return max(MIN_BUCKET, 1 << (length - 1).bit_length())
