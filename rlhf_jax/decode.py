"""Prefill and decoding with a KV cache, sampling inside one compiled loop; arrays are sharded by GENERATE.

`generate` answers all prompts at once. In `slots` rows take the next prompt when their answer ends, and in `answering`
the next request, whenever it comes. All of them have the same step, `decode_and_sample`; the latter two begin answers
by `begin_answers`, and put them into rows by `put_answers`.

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
from rlhf_jax.sampling import (
    RowSample,
    SampleConfig,
    draw,
    is_eos,
    is_model_distribution,
    logprob_of,
    penalise_logits,
    seen_ids,
)
from rlhf_jax.trees import record

MIN_BUCKET = 32


@record
class Rollout:
    """Prompts and the answers sampled to them; the samples of one prompt are adjacent rows.

    Attributes:
        prompts: [B, P] int32, left-padded.
        prompt_mask: [B, P] bool.
        tokens: [B, N] int32, 0 after the end of an answer.
        mask: [B, N] bool, true up to and including EOS.
        logprobs: [B, N] float32, of the distribution that was sampled from (penalised, tempered, cut); when greedy, of
            the distribution whose most likely token was chosen.
        ended: [B] bool, true where the answer ended with EOS, false where it was cut at N.
        model_logprobs: [B, N] float32, of the model's own distribution: not penalised, tempered or cut.
        steps: [B] int32, decode steps that the program had made when this answer ended; the maximum is their total.
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
    """How prompts are answered: the model, how tokens are sampled, and the ids that end an answer."""

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


def prefill_once(decoding: Decoding, weights: Weights, prompts: jax.Array, prompt_mask: jax.Array):
    """`prefill` of rows of which num_samples in a row have one prompt: each prompt passes through the model once.

    Where the devices do not divide the number of prompts, every row passes.
    """
    model, same = decoding.model, decoding.sample.num_samples
    count, left = divmod(len(prompts), same)
    if same == 1 or left or count % model.layout.shards("batch"):
        return prefill(model, weights, prompts, prompt_mask, decoding.sample.max_new_tokens)
    found = prefill(model, weights, prompts[::same], prompt_mask[::same], decoding.sample.max_new_tokens)

    def repeat(x: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(x[:, None], (count, same, *x.shape[1:])).reshape(len(prompts), *x.shape[1:])
        # Keys and values, the cache's mask, logits.
        axes = ("kv_heads", None, None) if x.ndim == 4 else (None,) if x.dtype == bool else ("vocab",)
        return model.layout.constrain(rows, "batch", *axes)

    return jax.tree.map(repeat, found)


@record
class DecodeState:
    """The answers that B rows are sampling.

    Attributes:
        index: [B] int32, the prompt that each row answers; M: none.
        sizes: [B] int32, number of tokens of that prompt.
        drawn: [B] int32, number of tokens of the answer so far.
        last: [B] int32, the newest of them.
        done: [B] bool, true where the answer has ended or the row has none.
        steps: [B] int32, as in Rollout.
        tokens, logprobs, model_logprobs: [B, N]; the last is None where it equals `logprobs`.
        seen: [B, V] bool, ids of prompt and answer; None where repetition is not penalised.
        asked: what each row's request asks for; None where all ask for the same, which is that of `Decoding`.
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
    asked: RowSample | None = None

    @property
    def newest(self) -> NewTokens:
        return NewTokens(self.last, ~self.done, self.sizes + self.drawn - 1)


def start_state(
    decoding: Decoding,
    index: jax.Array,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    done: jax.Array,
    asked: RowSample | None = None,
) -> DecodeState:
    """Empty answers to the prompts [B, P], whose numbers are `index` [B].

    With `asked` the state keeps no answers (N = 0), of which the caller takes each token as it comes.
    """
    sample, zeros = decoding.sample, jnp.zeros_like(index)
    shape, vocab = (len(index), 0 if asked else sample.max_new_tokens), decoding.model.config.padded_vocab
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
        asked=asked,
    )


def empty_state(decoding: Decoding, rows: int, total: int) -> DecodeState:
    """The state of rows that answer none of the `total` prompts."""
    blank = jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1), bool)
    return start_state(decoding, jnp.full(rows, total, jnp.int32), *blank, jnp.ones(rows, bool))


def sample_step(
    decoding: Decoding, state: DecodeState, logits: jax.Array, key: jax.Array | None, steps: jax.Array | int
) -> DecodeState:
    """Sample one more token from logits [B, V] in every row that is not done.

    Token t of the answer to prompt i is drawn with fold_in(fold_in(key, i), t), whatever its row and step. Where rows
    ask for their own, it is drawn as if there were no others: the key is that of the row's seed, and i the number of
    the answer among those to its prompt.
    """
    s, going, sample, eos_ids = state, ~state.done, decoding.sample, decoding.eos_ids
    root = key if s.asked is None else jax.vmap(jax.random.key)(s.asked.seeds)
    fold = jax.vmap(jax.random.fold_in, (None if s.asked is None else 0, 0))
    keys = jax.vmap(jax.random.fold_in)(fold(root, s.index), s.drawn)
    penalised = penalise_logits(logits, sample, s.seen, s.drawn, eos_ids)
    token, logprob = draw(penalised, keys, s.asked or sample)
    limit = s.asked.limits if s.asked else sample.max_new_tokens
    here = going[:, None] & (jnp.arange(s.tokens.shape[1]) == s.drawn[:, None])
    drawn = s.drawn + going
    own, seen, vocab = s.model_logprobs, s.seen, jnp.arange(logits.shape[-1])
    return dataclasses.replace(
        s,
        drawn=drawn,
        last=jnp.where(going, token, s.last),
        done=s.done | is_eos(token, eos_ids) | (drawn == limit),
        steps=jnp.where(going, steps, s.steps),
        tokens=jnp.where(here, token[:, None], s.tokens),
        logprobs=jnp.where(here, logprob[:, None], s.logprobs),
        model_logprobs=None if own is None else jnp.where(here, logprob_of(logits, token)[:, None], own),
        seen=None if seen is None else seen | (going[:, None] & (vocab == token[:, None])),
    )


def to_rollout(state: DecodeState, prompts: jax.Array, prompt_mask: jax.Array, eos_ids: tuple[int, ...]) -> Rollout:
    """The Rollout of answers that are done, in the order of their prompts."""
    own = state.logprobs if state.model_logprobs is None else state.model_logprobs
    mask = jnp.arange(state.tokens.shape[1]) < state.drawn[:, None]
    ended = is_eos(state.last, eos_ids)
    return Rollout(prompts, prompt_mask, state.tokens, mask, state.logprobs, ended, own, state.steps)


class NewTokens(NamedTuple):
    """One more token [B] int32 per row, whether it is real and not padding [B] bool, and its position [B] int32."""

    ids: jax.Array
    real: jax.Array
    positions: jax.Array


def decode_step(
    model: Inference, weights: Weights, new: NewTokens, cache: Cache, index: jax.Array, reach: int | None = None
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after one more token per row, which is written to `index` (of all rows, or [B]) of the cache.

    `reach` is as in `forward`.
    """
    hidden, cache = forward(model, weights, *(x[:, None] for x in new), cache, index, reach)
    return inference_logits(model.config, weights, hidden[:, -1]), cache


def decode_and_sample(
    decoding: Decoding,
    weights: Weights,
    state: DecodeState,
    cache: Cache,
    index: jax.Array,
    key: jax.Array | None,
    steps: jax.Array | int,
    reach: int | None = None,
) -> tuple[jax.Array, DecodeState, Cache]:
    """One decode step of all rows: put the newest token of each into the cache, at `index`, and draw the next.

    The logits [B, V] that it was drawn from come first. `reach` is as in `forward`.
    """
    logits, cache = decode_step(decoding.model, weights, state.newest, cache, index, reach)
    return logits, sample_step(decoding, state, logits, key, steps), cache


def begin_answers(
    decoding: Decoding,
    weights: Weights,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    empty: DecodeState,
    key: jax.Array | None,
    steps: jax.Array | int,
) -> tuple[jax.Array, DecodeState, Cache]:
    """The first token of the `empty` answers to prompts [B, P], with the logits that it was drawn from and the cache of
    the prompts, which has no room for more."""
    logits, cache = prefill(decoding.model, weights, prompts, prompt_mask, 0)
    return logits, sample_step(decoding, empty, logits, key, steps), cache


def put_answers(
    layout: Layout, old: tuple[DecodeState, Cache], new: tuple[DecodeState, Cache], rows: jax.Array
) -> tuple[DecodeState, Cache]:
    """Let `rows` of the old answers be the new ones, as `put_rows` does; the cache of those may be shorter."""

    def into(old: jax.Array, new: jax.Array, *axes: str | None) -> jax.Array:
        return put_rows(old, new, rows, layout, axes)

    def entries(old: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(into(*pair, "kv_heads", None, None) for pair in zip(old, new, strict=True))

    (state, cache), (fresh, prompt) = old, new
    visible = jnp.pad(prompt.visible, ((0, 0), (0, cache.visible.shape[1] - prompt.visible.shape[1])))
    keys, values = entries(cache.keys, prompt.keys), entries(cache.values, prompt.values)
    return jax.tree.map(into, state, fresh), Cache(keys, values, into(cache.visible, visible))


def generate(
    decoding: Decoding, weights: Weights, prompts: jax.Array, prompt_mask: jax.Array, key: jax.Array
) -> Rollout:
    """Sample an answer to every prompt at once; to be jitted with `decoding` static.

    Args:
        prompts, prompt_mask: [B, P], left-padded, at least one real token per row.
        key: one key for the whole batch; a row's answer does not depend on the number of rows.
    """
    batch, prompt_length = prompts.shape
    none_done, index = jnp.zeros(batch, bool), jnp.arange(batch, dtype=jnp.int32)
    logits, cache = prefill_once(decoding, weights, prompts, prompt_mask)
    state = start_state(decoding, index, prompts, prompt_mask, none_done)
    state = sample_step(decoding, state, logits, key, 0)

    def step(carry):
        steps, state, cache = carry
        # All rows have the same number of tokens, so all write at the same index.
        _, state, cache = decode_and_sample(decoding, weights, state, cache, prompt_length + steps, key, steps + 1)
        return steps + 1, state, cache

    _, state, _ = jax.lax.while_loop(lambda carry: ~carry[1].done.all(), step, (jnp.int32(0), state, cache))
    return to_rollout(state, prompts, prompt_mask, decoding.eos_ids)


def put_rows(
    old: jax.Array, new: jax.Array, rows: jax.Array, layout: Layout, axes: tuple[str | None, ...]
) -> jax.Array:
    """Write `new` [R, ...] to `rows` [shards, R / shards] of each shard of `old` [B, ...]; indices past its end are
    dropped.

    New rows that are shorter than the old ones, as prompts in the cache are, are written to their beginning. `axes` are
    those after the batch. A `shard_map`, as the partitioner would gather the heads of the cache for such a scatter.
    """
    split = layout.spec(("batch", *(axes or [None] * (old.ndim - 1))))

    def local(old, new, rows):
        window = tuple(slice(0, size) for size in new.shape[1:])
        return old.at[(rows[0], *window)].set(new, mode="drop")

    specs = dict(in_specs=(split, split, layout.spec(("batch", None))), out_specs=split)
    return jax.shard_map(local, mesh=layout.mesh, **specs)(old, new, rows)


def bucket_length(length: int) -> int:
    """The padded prompt length that is compiled for prompts of `length` tokens: a power of two, so that few lengths are
    compiled."""
    return max(MIN_BUCKET, 1 << (length - 1).bit_length())
