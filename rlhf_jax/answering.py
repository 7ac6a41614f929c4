"""Answers to requests that come at any time: each row of one decode state takes a request and gives its tokens.

Three programs over the state: an empty one, the prefill of one request that is put into a row, and one decode step of
the rows. They are compiled for a few shapes, all of them by `Answering.warm_up`: prompts are padded to a power of two,
and a step decodes the first rows and the first positions of the cache, as many as are in use.

B rows, P prompt positions, S cache positions, V padded vocabulary, C alternatives of a token.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.decode import (
    DecodeState,
    Decoding,
    begin_answers,
    bucket_length,
    decode_and_sample,
    put_answers,
    start_state,
)
from rlhf_jax.hardware import RUN_OPTIONS
from rlhf_jax.mesh import GENERATE, Layout
from rlhf_jax.models.inference import Cache, Inference, Weights, empty_cache
from rlhf_jax.models.layers import roll_rows
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.rollout import eos_ids, make_publish
from rlhf_jax.sampling import RowSample, SampleConfig, logprob_of
from rlhf_jax.stages.run_folder import date_of_export
from rlhf_jax.trees import record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
ALTERNATIVES = 20  # most likely tokens whose log-probabilities a request can ask for
LONGEST_CONTEXT = 4096  # positions of a row, unless more are asked for
SHORTEST_STEP = 128  # cache positions of the smallest step


@dataclass(frozen=True)
class Request:
    """A prompt in tokens, and how one answer to it is sampled.

    Attributes:
        ids: the prompt.
        choice: the number of this answer among those to the prompt; each is another sample of the same seed.
        alternatives: number of most likely tokens that are reported with each token.
    """

    ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0
    alternatives: int = 0


@dataclass(frozen=True)
class Token:
    """One more token of an answer.

    Attributes:
        owner: what `Answering.add` was given.
        logprob: of the model's own distribution, neither tempered nor cut.
        alternatives: (id, log-probability) of the most likely tokens, as many as asked for.
        is_last: whether the answer has ended, with EOS or at its largest number of tokens.
    """

    owner: Hashable
    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    is_last: bool


@record
class StepTokens:
    """The newest token of each row: ids [B], its logprobs [B], whether it is the last [B], and the most likely tokens
    with their log-probabilities [B, C], 0 where no row asks for them."""

    ids: jax.Array
    logprobs: jax.Array
    done: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def policy_tokenizer(model: Pretrained) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a template, and with the date of its run. ValueError if it has none."""
    if model.tokenizer is None:
        raise ValueError(f"{model.source} has no tokenizer: save one into the folder (tokenizer.save_pretrained)")
    return prepare_tokenizer(model.tokenizer, date=date_of_export(model.folder))


RowsState = tuple[DecodeState, Cache]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_rows(decoding: Decoding, rows: int, positions: int) -> RowsState:
    """RowsState without requests, with a cache of `positions`."""
    zeros, ones = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.float32)
    asked = RowSample(zeros.astype(jnp.uint32), ones, ones, zeros)
    blank = jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1), bool)
    state = start_state(decoding, zeros, *blank, jnp.ones(rows, bool), asked)
    model = decoding.model
    return state, empty_cache(model.config, rows, positions, model.dtype, model.layout)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="rows", compiler_options=RUN_OPTIONS)
def put_request(
    decoding: Decoding,
    weights: Weights,
    rows: RowsState,
    prompt: tuple[jax.Array, jax.Array],
    asked: RowSample,
    choice: jax.Array,
    row: jax.Array,
    wants_top: jax.Array,
) -> tuple[RowsState, StepTokens]:
    """Let `row` [1, 1] answer one left-padded prompt and mask [1, P]; with the first token.

    In the cache the prompt begins at 0, so that the answer is independent of the padding.
    """
    empty = start_state(decoding, choice, *prompt, jnp.zeros(1, bool), asked)
    logits, state, cache = begin_answers(decoding, weights, *prompt, empty, None, 0)
    padding = jnp.argmax(prompt[1], axis=1)

    def left(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(roll_rows(jnp.swapaxes(x, 1, 2), padding), 1, 2)

    keys, values = (tuple(map(left, each)) for each in (cache.keys, cache.values))
    prompt_cache = Cache(keys, values, roll_rows(cache.visible, padding))
    rows = put_answers(decoding.model.layout, rows, (state, prompt_cache), row)
    return rows, newest_tokens(decoding, state, logits, wants_top)


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnames="rows", compiler_options=RUN_OPTIONS)
def step_rows(
    decoding: Decoding,
    weights: Weights,
    rows: RowsState,
    idle: jax.Array,
    wants_top: jax.Array,
    count: int,
    length: int,
) -> tuple[RowsState, StepTokens]:
    """One more token in each of the first `count` rows that is not idle [B], whose positions are below `length`."""
    whole, cache = rows
    state = jax.tree.map(lambda x: x[:count], whole)
    state = dataclasses.replace(state, done=state.done | idle[:count])
    index = jnp.clip(state.newest.positions, 0, length - 1)  # of idle rows it may be anything
    logits, state, cache = decode_and_sample(decoding, weights, state, cache, index, None, 0, length)
    whole = jax.tree.map(lambda old, new: old.at[:count].set(new), whole, state)
    return (whole, cache), newest_tokens(decoding, state, logits, wants_top)


def newest_tokens(decoding: Decoding, state: DecodeState, logits: jax.Array, wants_top: jax.Array) -> StepTokens:
    """What the host reads of the tokens just drawn from logits [B, V]."""
    number = min(ALTERNATIVES, decoding.model.config.vocab_size)

    def top(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(logits, number)
        return ids, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def nothing(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (len(logits), number)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    alternatives = jax.lax.cond(wants_top, top, nothing, logits)
    return StepTokens(state.last, logprob_of(logits, state.last), state.done, *alternatives)


class Answering:
    """A model that answers requests in `rows` rows. Used by one thread.

    `add` puts a request into a free row, `step` returns the next tokens of all requests, `stop` frees a row early. A
    step is computed while the tokens of the one before are read.
    """

    def __init__(self, model: Pretrained, rows: int, context: int = 0):
        """Publish the model.

        Args:
            context: positions of a prompt and its answer; 0: those of the model, at most LONGEST_CONTEXT.
        Raises:
            ValueError: no rows, a model without EOS, or with fewer positions than `context`.
        """
        if rows < 1:
            raise ValueError(f"rows={rows}: at least 1")
        if context == 1 or not 0 <= context <= model.config.max_positions:
            raise ValueError(
                f"a context of {context} positions: from 2 to the {model.config.max_positions} of {model.source}, and "
                f"0 is at most {LONGEST_CONTEXT} of them"
            )
        self.context = context or min(model.config.max_positions, LONGEST_CONTEXT)
        dtype, mesh = model.params["embed/tokens"].dtype, model.layout.mesh
        inference = Inference(model.config, Layout(mesh, GENERATE), dtype)
        assert inference.layout.shards("batch") == 1, "one request is prefilled at a time"
        self.decoding = Decoding(inference, SampleConfig(1), eos_ids(model))
        self.weights = make_publish(model.config, mesh, dtype)(model.params)
        # A single request, few of them, half of the rows, all.
        self.row_counts = sorted({1, max(1, rows // 4), max(1, rows // 2), rows})
        self.lengths = sorted({min(SHORTEST_STEP * 4**i, self.context) for i in range(10)})
        self.buckets = sorted({self._bucket(size) for size in range(1, self.context)})
        self.reset(rows)

    def reset(self, rows: int = 0) -> None:
        """Start again without requests, in as many rows as before unless `rows`; also after a failure of the device."""
        rows = rows or len(self.owners)
        self.rows = empty_rows(self.decoding, rows, self.context)
        self.requests: list[Request | None] = [None] * rows
        self.owners: list[Hashable | None] = [None] * rows
        self.used = np.zeros(rows, int)  # positions in the cache
        self.left = np.zeros(rows, int)  # tokens that are still to be computed
        self.pending: deque[tuple[StepTokens, list[tuple[int, int]]]] = deque()

    @property
    def free(self) -> int:
        """Number of rows without a request."""
        return self.owners.count(None)

    def _bucket(self, size: int) -> int:
        return min(bucket_length(size), self.context)

    def warm_up(self) -> None:
        """Compile every program for every shape, so that no request waits for the compiler."""
        start, shapes = time.monotonic(), list(itertools.product(self.row_counts, self.lengths))
        for bucket in self.buckets:
            self._put(Request(np.zeros(min(bucket, self.context - 1), np.int32), 1), 0)
        for count, length in shapes:
            self._step(np.ones(len(self.owners), bool), False, count, length)
        jax.block_until_ready(self.rows)
        LOGGER.info(
            f"compiled for {len(self.buckets)} lengths of prompts and {len(shapes)} sizes of a step in "
            f"{time.monotonic() - start:.1f} s"
        )

    def _put(self, request: Request, row: int) -> StepTokens:
        size, width = len(request.ids), self._bucket(len(request.ids))
        tokens, mask = np.zeros((1, width), np.int32), np.arange(width)[None] >= width - size
        tokens[0, width - size :] = request.ids
        asked = RowSample(
            np.array([request.seed % 2**32], np.uint32),
            np.array([request.temperature], np.float32),
            np.array([request.top_p], np.float32),
            np.array([request.max_new_tokens], np.int32),
        )
        choice, at = np.array([request.choice], np.int32), np.array([[row]], np.int32)
        top = np.bool_(request.alternatives > 0)
        self.rows, new = put_request(self.decoding, self.weights, self.rows, (tokens, mask), asked, choice, at, top)
        return new

    def _step(self, idle: np.ndarray, wants_top: bool, count: int, length: int) -> StepTokens:
        self.rows, new = step_rows(self.decoding, self.weights, self.rows, idle, np.bool_(wants_top), count, length)
        return new

    def add(self, owner: Hashable, request: Request) -> None:
        """Start to answer a request in a free row; its tokens name the `owner`, which no other running one may be.

        Raises:
            ValueError: the prompt is empty, or prompt and answer exceed the context.
        """
        size = len(request.ids)
        if not size or request.max_new_tokens < 1 or size + request.max_new_tokens > self.context:
            raise ValueError(
                f"a prompt of {size} tokens and an answer of {request.max_new_tokens}: each has at least one, and "
                f"both together at most {self.context}"
            )
        row = self.owners.index(None)
        self.owners[row], self.requests[row] = owner, request
        self.used[row], self.left[row] = size, request.max_new_tokens - 1
        self.pending.append((self._put(request, row), [(0, row)]))

    def stop(self, owner: Hashable) -> None:
        """Free the row of a request, if it still has one; it gives no more tokens."""
        if owner in self.owners:
            row = self.owners.index(owner)
            self.owners[row] = self.requests[row] = None
            self.pending = deque((new, [pair for pair in pairs if pair[1] != row]) for new, pairs in self.pending)

    def step(self) -> list[Token]:
        """Tokens of the running requests, in their order. A request added since the last step has its first.

        Raises:
            FloatingPointError: the model's logits are not finite; `reset` before anything else.
        """
        going = np.array([owner is not None for owner in self.owners]) & (self.left > 0)
        started = len(self.pending)
        if going.any():
            rows = going.nonzero()[0]
            count = next(n for n in self.row_counts if n > rows[-1])
            length = next(n for n in self.lengths if n > self.used[rows].max())
            top = any(self.requests[row].alternatives for row in rows)
            self.pending.append((self._step(~going, top, count, length), [(int(row), int(row)) for row in rows]))
            self.used[rows] += 1
            self.left[rows] -= 1
        found: list[Token] = []
        for _ in range(started):
            found += self._read(*self.pending.popleft())
        return found

    def _read(self, new: StepTokens, pairs: list[tuple[int, int]]) -> list[Token]:
        """Tokens of a step: (place in its arrays, row); rows whose answer ended are free again."""
        pairs = [(place, row) for place, row in pairs if self.owners[row] is not None]
        if not pairs:
            return []
        ids, logprobs, done = (x.tolist() for x in jax.device_get((new.ids, new.logprobs, new.done)))
        if not all(math.isfinite(logprobs[place]) for place, _ in pairs):  # and so may be what the row has in the cache
            raise FloatingPointError(
                "the model's logits are not finite: its weights are damaged, or too large for dtype"
            )
        asked = [self.requests[row].alternatives for _, row in pairs]
        top = jax.device_get((new.top_ids, new.top_logprobs)) if any(asked) else None
        found = []
        for (place, row), number in zip(pairs, asked, strict=True):
            others = () if top is None else tuple(zip(*(x[place, :number].tolist() for x in top), strict=True))
            found.append(Token(self.owners[row], ids[place], logprobs[place], others, done[place]))
            if done[place]:
                self.stop(self.owners[row])
        return found
