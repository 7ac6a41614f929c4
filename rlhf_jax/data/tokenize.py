"""Maps the rows of a place, splits them by prompt and encodes them, block by block, in several threads.

The threads share Python's lock, but the encoding itself, by far most of the work, runs outside it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from rlhf_jax.data import splits
from rlhf_jax.data.chat_template import (
    Encoding,
    check_ids,
    encode_dialogues,
    encode_documents,
    encode_prompts,
    find_unwritten,
)
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.mapping import make_mapper
from rlhf_jax.data.records import BadRow, Dialogue, Example, Reply, Row, RowKind, RowSpec, Turn, Turns
from rlhf_jax.data.sources import has_eval, limit_of, place_of
from rlhf_jax.data.store import record_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_BLOCK = 512  # measured: smaller blocks cost calls, larger ones cache misses
THREADS = 8  # at most: a third of a row's time is Python's, under its lock
MAX_SHOWN = 3  # number of messages of bad rows that are kept
T, R = TypeVar("T"), TypeVar("R")
# Of an example: why it is dropped, its error, or its rows, each with its sequences and whether one of them was cut.
Outcome = str | ValueError | list[tuple[list[Encoding], bool]]


@dataclass(frozen=True)
class Job:
    """A place to tokenize, and how."""

    source: SourceConfig  # with its format resolved
    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    spec: RowSpec
    held_out: bool  # whether the held-out rows are selected, and not the training rows

    @property
    def place(self) -> dict[str, Any]:
        """The arguments of `sources.read_rows`."""
        return place_of(self.source, self.config, self.held_out)

    @property
    def limit(self) -> int | None:
        """Maximum number of rows to read of the place; None: all, as of an evaluation set."""
        return limit_of(self.source, self.place)

    @property
    def is_streamed(self) -> bool:
        return self.source.stream and not self.held_out

    @property
    def takes_all(self) -> bool:
        """Whether the place has only held-out rows."""
        return self.held_out and has_eval(self.source)

    def sides(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] bool each of keys [n, 2]: the prompts that are trained on, and those that are held out."""
        if self.takes_all:
            return np.zeros(len(keys), bool), np.ones(len(keys), bool)
        held = splits.is_held_out(keys, 0.0 if has_eval(self.source) else self.config.held_out)
        return splits.is_trained_by(keys, self.spec.share, self.config.split) & ~held, held


@dataclass(frozen=True)
class RowStats:
    """Counts of the rows of a place that are trained on, or of those that are held out."""

    rows: int = 0  # read, whatever their use
    share: int = 0  # examples whose prompts belong here; they are kept unless dropped
    dropped: dict[str, int] = field(default_factory=dict)  # {why: examples}
    unwritten: dict[str, int] = field(default_factory=dict)  # {what the chat template leaves out: kept examples}
    bad: int = 0  # rows, whatever their prompts
    bad_shown: tuple[str, ...] = ()  # messages of the first of them

    def plus(self, other: RowStats) -> RowStats:
        return RowStats(
            self.rows + other.rows,
            self.share + other.share,
            dict(Counter(self.dropped) + Counter(other.dropped)),
            dict(Counter(self.unwritten) + Counter(other.unwritten)),
            self.bad + other.bad,
            (*self.bad_shown, *other.bad_shown)[:MAX_SHOWN],
        )


def parse_row_stats(report: dict[str, Any]) -> RowStats:
    """The counts from JSON."""
    return RowStats(**{**report, "bad_shown": tuple(report["bad_shown"])})


def encode_blocks(rows: Iterable[Row], job: Job) -> Iterator[tuple[pa.RecordBatch, RowStats, RowStats]]:
    """The rows of the job's place by blocks of ROWS_PER_BLOCK, in their order, as `encode_rows` returns them."""
    # Messages name the path of the place.
    source = dataclasses.replace(job.source, path=job.place["path"])
    to_examples, own = make_mapper(source, job.spec.kind), threading.local()

    def work(block: list[Row]) -> tuple[pa.RecordBatch, RowStats, RowStats]:
        if not hasattr(own, "job"):  # of this thread, because a tokenizer's settings change while it encodes
            own.job = dataclasses.replace(job, tokenizer=copy.deepcopy(job.tokenizer))
        examples, wheres, bad = map_rows(block, to_examples)
        keys = keys_of(examples, job.config.split_seed)
        trained, held = job.sides(keys)
        (taken,) = (trained if job.is_streamed else trained | held).nonzero()
        chosen, wheres = [examples[i] for i in taken], [wheres[i] for i in taken]
        batch, *tallies = encode_rows(chosen, wheres, keys[taken], held[taken], own.job)
        read = RowStats(len(block), bad=len(bad), bad_shown=tuple(bad[:MAX_SHOWN]))
        return batch, *(read.plus(tally) for tally in tallies)

    return map_in_order(work, split_blocks(rows, ROWS_PER_BLOCK))


def encode_rows(
    examples: Sequence[Example], wheres: Sequence[str], keys: np.ndarray, held: np.ndarray, job: Job
) -> tuple[pa.RecordBatch, RowStats, RowStats]:
    """The rows of examples, and the counts of those that are trained on and of those that are held out.

    Args:
        wheres: place of each example, for messages.
        keys: [n, 2] uint64.
        held: [n] bool, whether it is held out.
    """
    found = encode_examples(examples, job.tokenizer, job.spec, job.config)
    bad = [f"{wheres[i]}: {each}" for i, each in found.items() if isinstance(each, ValueError)]
    tallies = []
    for side in (False, True):
        here = [each for i, each in found.items() if held[i] == side and not isinstance(each, ValueError)]
        dropped = dict(Counter(each for each in here if isinstance(each, str)))
        kept = [examples[i] for i, each in found.items() if held[i] == side and isinstance(each, list)]
        unwritten = dict(Counter(name for example in kept for name in _unwritten(example, job.tokenizer, job.spec)))
        tallies.append(RowStats(0, len(here), dropped, unwritten, len(bad), tuple(bad[:MAX_SHOWN])))
    kept = [(i, *row) for i, each in found.items() if isinstance(each, list) for row in each]
    batch = record_batch(
        [sequence for _, sequences, _ in kept for sequence in sequences],
        keys[[i for i, *_ in kept]],
        [examples[i].row for i, *_ in kept],
        [cut for *_, cut in kept],
        job.spec.per_row,
        len(job.tokenizer),
    )
    return batch, *tallies


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, spec: RowSpec, config: DataConfig
) -> dict[int, Outcome]:
    """{index of an example: its outcome}, first of those that are dropped without encoding.

    A demonstration has prompt and answer, a pair the prompt with both answers, a ranking with all, filled up by copies
    of the last one without a score to `spec.answers`; a prompt the opened prompt alone. Rows are dropped for an empty
    prompt or answer, for a chosen answer that equals the rejected one, for a ranking with more answers than a row or
    with all of one score, and for a prompt over max_prompt_length; an answer is cut at max_length, its EOS with it, so
    that the model does not learn to stop there. long_rows "left" cuts the beginning of the prompt instead, keeping a
    BOS, and "drop" drops rows too long in either way. A document is cut into pieces of max_length; a last one of a
    single token, the EOS, has no loss and is left out.
    """
    obstacles = ((i, _reason_to_drop(example, spec)) for i, example in enumerate(examples))
    found: dict[int, Outcome] = {i: reason for i, reason in obstacles if reason}
    whole = [i for i, example in enumerate(examples) if example.turns and i not in found]
    for i, row in zip(whole, _encode_rows([examples[i] for i in whole], tokenizer, spec), strict=True):
        failure = next((each for each in row if isinstance(each, ValueError)), None)
        found[i] = failure or _fit_lengths(row, tokenizer, spec, config)
        if spec.per_row > 1 and isinstance(found[i], list):
            found[i] = [
                (_with_scores(each, examples[i].scores or (1.0, 0.0), spec.per_row), cut) for each, cut in found[i]
            ]
    documents = [i for i, example in enumerate(examples) if example.text]
    for i, tokens in zip(documents, encode_documents(tokenizer, [examples[i].text for i in documents]), strict=True):
        pieces = (tokens[start : start + config.max_length] for start in range(0, len(tokens), config.max_length))
        rows = [([_learned_whole(piece)], False) for piece in pieces if len(piece) > 1]
        found[i] = check_ids(tokenizer, tokens) or rows
    return found


def _reason_to_drop(example: Example, spec: RowSpec) -> str:
    kind = spec.kind
    if not example.turns:
        return "" if example.text else "empty document"
    if not example.turns[-1][1].strip():
        return "empty prompt"
    continuations = [example.continuation(reply) for reply in _replies(example, kind)]
    if not all(turns[-1].content.strip() or turns[-1].extra.get("tool_calls") for turns in continuations):
        return "empty answer"
    if kind == "pair" and example.chosen == example.rejected:
        return "chosen and rejected equal"
    if kind == "ranking" and len(example.ranked) > spec.answers:
        return f"over {spec.answers} answers"
    if kind == "ranking" and example.scores and example.scores[0] == example.scores[-1]:
        return "answers of one rank"
    if kind == "demonstration":
        said = [Turn(*turn) for turn in (*example.turns, *continuations[0])]
        said = said if spec.learn == "assistant" else said[-1:]
        if not any(turn.role == "assistant" and turn.is_learned for turn in said):
            return "answer of weight 0"
    return ""


def _replies(example: Example, kind: RowKind) -> Sequence[Reply]:
    """The answers in a row of this kind."""
    both, ranked = (example.chosen, example.rejected), example.ranked
    return {"demonstration": (example.answer,), "pair": both, "prompt": (), "ranking": ranked}[kind]


def _dialogues(example: Example, kind: RowKind) -> list[Dialogue]:
    """The dialogues of a row of this kind, one or more; of prompts up to the question."""
    whole = [(*example.turns, *example.continuation(reply)) for reply in _replies(example, kind)] or [example.turns]
    return [Dialogue(turns, example.tools) for turns in whole]


def _unwritten(example: Example, tokenizer: PreTrainedTokenizerBase, spec: RowSpec) -> set[str]:
    """What the chat template leaves out of the dialogues of an example, in words."""
    dialogues = _dialogues(example, spec.kind) if example.turns else []
    last = -1 if spec.kind == "demonstration" else len(example.turns)
    first = 0 if spec.learn == "assistant" else last
    return {name for dialogue in dialogues for name in find_unwritten(tokenizer, dialogue, first)}


def _encode_rows(examples: list[Example], tokenizer: PreTrainedTokenizerBase, spec: RowSpec) -> list[list]:
    """For each example its whole sequences, or errors in their place."""
    rows = [_dialogues(example, spec.kind) for example in examples]
    dialogues = [each for row in rows for each in row]
    if spec.kind == "prompt":
        nothing = np.zeros((0, 2), np.int32)
        prompts = encode_prompts(tokenizer, dialogues)
        return [[each if isinstance(each, ValueError) else Encoding(each, nothing)] for each in prompts]
    if spec.kind == "demonstration":
        encoded = encode_dialogues(tokenizer, dialogues, all_turns=spec.learn == "assistant")
    else:  # all turns of the assistant from where the answers part
        first = [len(example.turns) for example, row in zip(examples, rows, strict=True) for _ in row]
        encoded = encode_dialogues(tokenizer, dialogues, first=first)
    left = iter(encoded)
    return [list(itertools.islice(left, len(row))) for row in rows]


def _fit_lengths(row: list[Encoding], tokenizer: PreTrainedTokenizerBase, spec: RowSpec, config: DataConfig) -> Outcome:
    """The row cut to the maximum lengths, or why it is dropped."""
    span = -1 if spec.kind == "demonstration" else 0
    prompt = len(row[0].tokens) if spec.kind == "prompt" else int(row[0].spans[span, 0])
    longest = max(len(each.tokens) for each in row)
    if prompt > config.max_prompt_length and config.long_rows != "left":
        return f"prompt over {config.max_prompt_length} tokens"
    if longest > config.max_length and config.long_rows == "drop":
        return f"over {config.max_length} tokens"
    fitted = row
    if config.long_rows == "left":
        # At least one token of the prompt stays, for the answer to follow.
        excess = max(prompt - config.max_prompt_length, min(longest - config.max_length, prompt - 1), 0)
        fitted = [_drop_beginning(each, excess, tokenizer) for each in row]
    fitted = [_truncate(each, config.max_length) for each in fitted]
    if spec.kind == "pair" and np.array_equal(fitted[0].tokens, fitted[1].tokens):
        return "chosen and rejected equal"
    if spec.learn == "everything" and spec.kind == "demonstration":
        fitted = [_learned_whole(each.tokens) for each in fitted]
    return [(fitted, any(len(new.tokens) < len(old.tokens) for new, old in zip(fitted, row, strict=True)))]


def _with_scores(row: Sequence[Encoding], scores: Sequence[float], count: int) -> list[Encoding]:
    """`count` sequences with their scores; those that are missing are copies of the last, whose score is NaN."""
    scored = [each._replace(score=float(score)) for each, score in zip(row, scores, strict=True)]
    return scored + [row[-1]._replace(score=math.nan)] * (count - len(row))


def _learned_whole(tokens: np.ndarray) -> Encoding:
    return Encoding(tokens, np.array([[1, len(tokens)]], np.int32))


def _truncate(encoded: Encoding, length: int) -> Encoding:
    if len(encoded.tokens) <= length:
        return encoded
    spans = np.minimum(encoded.spans, length)
    return Encoding(encoded.tokens[:length], spans[spans[:, 0] < spans[:, 1]])


def _drop_beginning(encoded: Encoding, count: int, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """The encoding without its first `count` tokens; a leading BOS is kept."""
    if not count:
        return encoded
    keep = int(tokenizer.bos_token_id is not None and int(encoded.tokens[0]) == tokenizer.bos_token_id)
    tokens = np.concatenate([encoded.tokens[:keep], encoded.tokens[keep + count :]])
    spans = np.maximum(encoded.spans - count, keep)
    return Encoding(tokens, spans[spans[:, 0] < spans[:, 1]])


def map_rows(
    rows: Iterable[Row], to_examples: Callable[[Row], list[Example]]
) -> tuple[list[Example], list[str], list[str]]:
    """(examples, place of each, messages of the bad rows)."""
    examples: list[Example] = []
    wheres: list[str] = []
    bad: list[str] = []
    for row in rows:
        try:
            found = to_examples(row)
        except BadRow as error:
            bad.append(str(error))
            continue
        examples += found
        wheres += [row.where] * len(found)
    return examples, wheres, bad


def keys_of(examples: Iterable[Example], seed: int) -> np.ndarray:
    """[n, 2] uint64, the keys of the prompts; the key of a document is that of its text."""
    turns: Iterator[Turns] = (example.turns or (("", example.text),) for example in examples)
    return splits.as_keys([splits.prompt_key(each) for each in turns], seed)


def check_bad_rows(count: int, shown: Sequence[str], limit: int) -> None:
    """ValueError with the first bad rows if there are more than `limit`."""
    if count > limit:
        faults: dict[str, list[str]] = {}  # a fault that several rows share is named once, after their places
        for message in shown:
            place, _, fault = message.partition(": ")
            faults.setdefault(fault, []).append(place)
        reported = "; ".join(f"{', '.join(places)}: {fault}" for fault, places in faults.items())
        more = f" (data.max_bad_rows = {limit}, and there are more)" if limit else ""
        raise ValueError(f"{reported}{more}. Fix the data, or raise data.max_bad_rows to leave such rows out")


def split_blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


def map_in_order(work: Callable[[list[T]], R], blocks: Iterable[list[T]]) -> Iterator[R]:
    """work(block) of each block in order, with a few blocks in progress at a time."""
    threads = min(THREADS, (os.cpu_count() or 1) + 1)  # one more than cores, because one waits for the lock
    waiting: deque = deque()
    pool = ThreadPoolExecutor(threads)
    set_before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each thread encodes its block alone, which uses the cores better
    try:
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Without waiting: a garbage-collected stream may be finalised in a thread of this pool.
        pool.shutdown(wait=False, cancel_futures=True)
        if set_before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = set_before
