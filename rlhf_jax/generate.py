"""Program one: prefill and decode with a KV cache, sampling inside one compiled loop; laid out by GENERATE.

`generate` answers all prompts at once; `generate_in_rows` answers them in fewer rows, each taking the next prompt when
its answer ends.

B rows, M prompts, P prompt positions, N new tokens, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.mesh import Layout
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.attention import Choice
from rlhf_jax.models.cached import Cache, Weights, empty_cache, forward, logits_of
from rlhf_jax.models.layers import positions_of
from rlhf_jax.sampling import SampleConfig, draw, is_eos, is_models_own, logprob_of, restrained_logits, seen_in
from rlhf_jax.trees import record

SHORTEST_BUCKET = 32
ROWS_A_NEWCOMER = (
    16  # a refill takes one prompt for so many rows: few rows wait, and weights are not read for one alone
)


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


def prefill(
    config: DecoderConfig,
    weights: Weights,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    new_tokens: int,
    layout: Layout,
    dtype: jnp.dtype,
    attention: Choice = "auto",
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after each left-padded prompt [B, P], and a cache with room for `new_tokens` more."""
    batch, length = prompts.shape
    cache = empty_cache(config, batch, length + new_tokens, dtype, layout)
    positions = positions_of(prompt_mask)
    hidden, cache = forward(config, weights, prompts, prompt_mask, positions, cache, 0, layout, attention)
    return logits_of(config, weights, hidden[:, -1]), cache


@record
class Answers:
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


def new_answers(
    index: jax.Array, prompts: jax.Array, prompt_mask: jax.Array, done: jax.Array, sample: SampleConfig, vocab: int
) -> Answers:
    """Answers of no token yet to the prompts [B, P] with those numbers [B]."""
    shape, zeros = (len(index), sample.max_new_tokens), jnp.zeros_like(index)
    return Answers(
        index=index,
        sizes=prompt_mask.sum(axis=1, dtype=jnp.int32),
        drawn=zeros,
        last=zeros,
        done=done,
        steps=zeros,
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        model_logprobs=None if is_models_own(sample) else jnp.zeros(shape, jnp.float32),
        seen=None if sample.repetition_penalty == 1 else seen_in(prompts, prompt_mask, vocab),
    )


def extended(
    answers: Answers,
    logits: jax.Array,
    key: jax.Array,
    steps: jax.Array,
    sample: SampleConfig,
    eos_ids: tuple[int, ...],
) -> Answers:
    """The answers with one token more, drawn from logits [B, V], in every row that is not done.

    Token t of the answer to prompt i is drawn with fold_in(fold_in(key, i), t): whatever row it is in, and when.
    """
    a, going, vocab = answers, ~answers.done, logits.shape[-1]
    keys = jax.vmap(lambda i, t: jax.random.fold_in(jax.random.fold_in(key, i), t))(a.index, a.drawn)
    token, logprob = draw(restrained_logits(logits, sample, a.seen, a.drawn, eos_ids), keys, sample)
    here = going[:, None] & (jnp.arange(a.tokens.shape[1]) == a.drawn[:, None])
    drawn = a.drawn + going
    own, seen = a.model_logprobs, a.seen
    return dataclasses.replace(
        a,
        drawn=drawn,
        last=jnp.where(going, token, a.last),
        done=a.done | is_eos(token, eos_ids) | (drawn == sample.max_new_tokens),
        steps=jnp.where(going, steps, a.steps),
        tokens=jnp.where(here, token[:, None], a.tokens),
        logprobs=jnp.where(here, logprob[:, None], a.logprobs),
        model_logprobs=None if own is None else jnp.where(here, logprob_of(logits, token)[:, None], own),
        seen=None if seen is None else seen | (going[:, None] & (jnp.arange(vocab) == token[:, None])),
    )


def rollout_of(answers: Answers, prompts: jax.Array, prompt_mask: jax.Array, eos_ids: tuple[int, ...]) -> Rollout:
    """Answers that are done, in the order of their prompts, as a Rollout."""
    own = answers.logprobs if answers.model_logprobs is None else answers.model_logprobs
    mask = jnp.arange(answers.tokens.shape[1]) < answers.drawn[:, None]
    ended = is_eos(answers.last, eos_ids)
    return Rollout(prompts, prompt_mask, answers.tokens, mask, answers.logprobs, ended, own, answers.steps)


def decoded(
    config: DecoderConfig,
    weights: Weights,
    answers: Answers,
    cache: Cache,
    index: jax.Array,
    layout: Layout,
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after the newest token of every row, which goes to `index` (of all rows, or [B]) of the cache."""
    token, real, positions = answers.last, ~answers.done, answers.sizes + answers.drawn - 1
    inputs = token[:, None], real[:, None], positions[:, None]
    hidden, cache = forward(config, weights, *inputs, cache, index, layout)
    return logits_of(config, weights, hidden[:, -1]), cache


def generate(
    config: DecoderConfig,
    weights: Weights,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    sample: SampleConfig,
    eos_ids: tuple[int, ...],
    layout: Layout,
    dtype: jnp.dtype,
    attention: Choice = "auto",
) -> Rollout:
    """Sample an answer to every prompt at once; to be jitted with all but the arrays static.

    Args:
        prompts, prompt_mask: [B, P], left-padded, at least one real token a row.
        key: one key for the whole batch; a row's answer does not depend on how many rows there are.
        attention: the kernel of the prefill, see `attention_kernel`.
    """
    batch, prompt_length = prompts.shape
    none_done, index = jnp.zeros(batch, bool), jnp.arange(batch, dtype=jnp.int32)
    logits, cache = prefill(config, weights, prompts, prompt_mask, sample.max_new_tokens, layout, dtype, attention)
    answers = new_answers(index, prompts, prompt_mask, none_done, sample, config.padded_vocab)
    answers = extended(answers, logits, key, 0, sample, eos_ids)

    def step(state):
        steps, answers, cache = state
        # All rows are as far, so all write at one place.
        logits, cache = decoded(config, weights, answers, cache, prompt_length + steps, layout)
        return steps + 1, extended(answers, logits, key, steps + 1, sample, eos_ids), cache

    def unfinished(state):
        return ~state[1].done.all()

    _, answers, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(0), answers, cache))
    return rollout_of(answers, prompts, prompt_mask, eos_ids)


def generate_in_rows(
    config: DecoderConfig,
    weights: Weights,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    sample: SampleConfig,
    eos_ids: tuple[int, ...],
    layout: Layout,
    dtype: jnp.dtype,
    rows: int,
    attention: Choice = "auto",
) -> Rollout:
    """`generate` for M prompts in `rows` rows: a row whose answer has ended takes the next prompt.

    One program without a word to the host: a loop of rounds, each of which prefills a newcomer for every
    ROWS_A_NEWCOMER rows into free ones, then decodes until as many are free again. Every device serves its own rows, so
    no key or value moves between devices.

    Args:
        prompts, prompt_mask: [M, P], on every device.
        rows: what the devices of the batch divide.
    """
    total, prompt_length = prompts.shape
    shards = layout.shards("batch")
    each = rows // shards
    newcomers = max(1, each // ROWS_A_NEWCOMER)  # of each shard, in one refill

    def place(old: jax.Array, new: jax.Array, slots: jax.Array, *axes: str | None) -> jax.Array:
        """Rows of `new` [R, ...] at `slots` [shards, R / shards] of each shard of `old` [B, ...]; `each`: nowhere.

        Where new rows are shorter than old, as prompts in the cache, they begin them. `axes` are those behind the
        batch. By hand, as the partitioner gathers the heads of the cache for such a scatter.
        """
        split = layout.spec(("batch", *(axes or [None] * (old.ndim - 1))))

        def local(old, new, slots):
            window = tuple(slice(0, size) for size in new.shape[1:])
            return old.at[(slots[0], *window)].set(new, mode="drop")

        specs = dict(in_specs=(split, split, layout.spec(("batch", None))), out_specs=split)
        return jax.shard_map(local, mesh=layout.mesh, **specs)(old, new, slots)

    def refilled(following, steps, answers, cache):
        free = answers.done.reshape(shards, each)
        slots = jnp.argsort(~free, axis=1, stable=True)[:, :newcomers]
        usable = jnp.take_along_axis(free, slots, axis=1)
        # The first free row of every shard, then the second: the last prompts are shared out evenly.
        rank = jnp.cumsum(usable.T.reshape(-1), dtype=jnp.int32).reshape(newcomers, shards).T - 1
        index = following + rank
        usable &= index < total
        flat = jnp.where(usable, index, 0).reshape(-1)
        their_prompts, their_mask = (layout.constrain(x[flat], "batch", None) for x in (prompts, prompt_mask))
        logits, their_cache = prefill(config, weights, their_prompts, their_mask, 0, layout, dtype, attention)
        index, idle = jnp.where(usable, index, total).reshape(-1), ~usable.reshape(-1)
        fresh = new_answers(index, their_prompts, their_mask, idle, sample, config.padded_vocab)
        fresh = extended(fresh, logits, key, steps, sample, eos_ids)
        slots = jnp.where(usable, slots, each)
        answers = jax.tree.map(lambda old, new: place(old, new, slots), answers, fresh)
        visible = jnp.pad(their_cache.visible, ((0, 0), (0, sample.max_new_tokens)))
        cache = Cache(
            *(
                tuple(place(*pair, slots, "kv_heads", None, None) for pair in zip(all_rows, theirs, strict=True))
                for all_rows, theirs in ((cache.keys, their_cache.keys), (cache.values, their_cache.values))
            ),
            place(cache.visible, visible, slots),
        )
        return following + usable.sum(dtype=jnp.int32), answers, cache

    def turn(state):
        following, steps, answers, cache, out = state
        following, answers, cache = refilled(following, steps, answers, cache)
        waiting = total - following
        enough = jnp.where(waiting > 0, jnp.minimum(waiting, shards * newcomers), rows)

        def step(state):
            steps, answers, cache = state
            logits, cache = decoded(config, weights, answers, cache, prompt_length + answers.drawn - 1, layout)
            return steps + 1, extended(answers, logits, key, steps + 1, sample, eos_ids), cache

        def too_few_free(state):
            return state[1].done.sum() < enough

        steps, answers, cache = jax.lax.while_loop(too_few_free, step, (steps, answers, cache))
        # What is not done yet is written once more when it is.
        out = jax.tree.map(lambda to, part: to.at[answers.index].set(part, mode="drop"), out, taken(answers))
        out = jax.tree.map(lambda x: layout.constrain(x, *[None] * x.ndim), out)
        return following, steps, answers, cache, out

    def taken(answers: Answers) -> Answers:
        return dataclasses.replace(answers, seen=None)

    def nobody(count: int) -> Answers:
        blank = jnp.zeros((count, prompt_length), jnp.int32), jnp.zeros((count, prompt_length), bool)
        at, done = jnp.full(count, total, jnp.int32), jnp.ones(count, bool)
        return new_answers(at, *blank, done, sample, config.padded_vocab)

    def unfinished(state):
        following, _, answers, _, _ = state
        return (following < total) | ~answers.done.all()

    cache = empty_cache(config, rows, prompt_length + sample.max_new_tokens, dtype, layout)
    state = jnp.int32(0), jnp.int32(0), nobody(rows), cache, taken(nobody(total))
    out = jax.lax.while_loop(unfinished, turn, state)[-1]
    rollout = rollout_of(out, prompts, prompt_mask, eos_ids)
    return jax.tree.map(lambda x: layout.constrain(x, "batch", *[None] * (x.ndim - 1)), rollout)


def bucket(length: int) -> int:
    """The padded prompt length that is compiled for prompts of `length` tokens: a power of two, so that few are."""
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())
