"""Examples to token rows, and token rows to batches of one fixed shape, found by the step number alone."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.sources import DataConfig, Example
from rlhf_jax.data.template import encode_prompts, encode_responses
from rlhf_jax.trees import record


@record
class Batch:
    """B rows of T tokens; [B, T], or [B, 2, T] for preference pairs, chosen then rejected. Host arrays."""

    tokens: np.ndarray  # int32; 0 where there is no token
    mask: np.ndarray  # bool: real tokens
    loss_mask: np.ndarray  # bool: tokens whose prediction is trained: the answer with its EOS; never the first token


@dataclass(frozen=True)
class Rows:
    """Token sequences end to end. A row has `per_row` of them: one, or two for a pair, chosen then rejected."""

    tokens: np.ndarray  # [all tokens] int32
    offsets: np.ndarray  # [len * per_row + 1] int64: sequence s is tokens[offsets[s] : offsets[s + 1]]
    trained_from: np.ndarray  # [len * per_row] int32: place in its sequence of the first token that is trained
    per_row: int
    examples: np.ndarray  # [len] int32: which of the given examples each row is
    report: str  # "1,735 rows, 12 dropped: prompt over 256 tokens, 3 cut at 512 tokens"

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def fingerprint(self) -> str:
        """Changes with any token of any row."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.tokens, self.offsets, self.trained_from):
            digest.update(part.tobytes())
        return digest.hexdigest()


def sft_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, train_on_prompt: bool
) -> Rows:
    """Prompt and answer, one sequence a row; trained are the answer and its EOS, or all with `train_on_prompt`.

    Answers are cut on the right at `max_length`, and their EOS with it, so that the model does not learn to stop there.
    Rows with an empty prompt or answer, or a prompt over `max_prompt_length`, are dropped; `report` counts both.
    ValueError if no row is left.
    """
    return _rows(examples, tokenizer, config, [[e.answer for e in examples]], train_on_prompt=train_on_prompt)


def pair_rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Rows:
    """Prompt and chosen, prompt and rejected: two sequences a row; as `sft_rows`, but pairs that are equal go too."""
    answers = [[e.chosen for e in examples], [e.rejected for e in examples]]
    return _rows(examples, tokenizer, config, answers, train_on_prompt=False)


def prompt_rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Rows:
    """Prompts up to where the answer begins, each prompt once; nothing is trained. Dropped as in `sft_rows`."""
    return _rows(examples, tokenizer, config, [], train_on_prompt=False)


def _rows(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    answers: list[list[str]],  # [0, 1 or 2][examples]
    *,
    train_on_prompt: bool,
) -> Rows:
    histories = [example.turns for example in examples]
    prompts = encode_prompts(tokenizer, histories)
    responses = [encode_responses(tokenizer, histories, texts, prompts) for texts in answers]
    sequences: list[list[np.ndarray]] = []
    kept: list[int] = []
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    num_cut = 0
    for i, (turns, prompt) in enumerate(zip(histories, prompts, strict=True)):
        whole = [np.concatenate([prompt, column[i]]) for column in responses] or [prompt]
        row = [sequence[: config.max_length] for sequence in whole]
        if not turns[-1][1]:
            dropped["empty prompt"] += 1
        elif not all(texts[i] for texts in answers):
            dropped["empty answer"] += 1
        elif len(prompt) > config.max_prompt_length:
            dropped[f"prompt over {config.max_prompt_length} tokens"] += 1
        elif len(row) == 2 and np.array_equal(*row):
            dropped["chosen and rejected equal"] += 1
        elif not answers and prompt.tobytes() in seen:
            dropped["repeated prompt"] += 1
        else:
            seen.add(prompt.tobytes())
            num_cut += any(len(sequence) > config.max_length for sequence in whole)
            sequences.append(row)
            kept.append(i)
    report = ", ".join(
        [f"{len(kept):,} rows"]
        + [f"{count:,} dropped: {reason}" for reason, count in dropped.items()]
        + [f"{num_cut:,} cut at {config.max_length} tokens"] * (num_cut > 0)
    )
    if not kept:
        mend = (
            "raise data.max_prompt_length or mend the rows" if examples else "raise data.held_out or name an eval_path"
        )
        raise ValueError(f"no row of the data is left ({report}): {mend}")
    flat = list(itertools.chain.from_iterable(sequences))
    per_row = max(1, len(answers))
    starts = np.array([1 if train_on_prompt else max(1, len(prompts[i])) for i in kept], np.int32)
    return Rows(
        tokens=np.concatenate(flat),
        offsets=np.cumsum([0, *map(len, flat)], dtype=np.int64),
        trained_from=np.repeat(starts, per_row),
        per_row=per_row,
        examples=np.array(kept, np.int32),
        report=report,
    )


class Batches:
    """Endless batches of `rows`: batches[step] depends on the step alone, so a run resumes from its step number.

    Step s is position s % steps_per_epoch of epoch s // steps_per_epoch, whose order is a permutation from (seed,
    epoch), or the order of the rows without `shuffle`. Every epoch has each row once, but for the last, incomplete
    batch, which is left out. All batches have the same shape, T being the longest row rounded up to a multiple of 8.
    """

    __iter__ = None  # it would never end

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        seed: int,
        side: Literal["right", "left"] = "right",  # where the padding goes
        shuffle: bool = True,
    ):
        """ValueError if `batch_size` is not from 1 to the number of rows."""
        if not 1 <= batch_size <= len(rows):
            raise ValueError(
                f"batch size {batch_size} does not fit {len(rows)} rows: from 1 to {len(rows)} is possible"
            )
        self.rows, self.batch_size, self.seed, self.side, self.shuffle = rows, batch_size, seed, side, shuffle
        self.steps_per_epoch = len(rows) // batch_size
        self.length = -(-int(np.diff(rows.offsets).max()) // 8) * 8  # T

    def indices(self, step: int) -> np.ndarray:
        """Rows of this step's batch, [B]; `rows.examples[indices]` are their examples."""
        assert step >= 0, step
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, len(self.rows)) if self.shuffle else np.arange(len(self.rows))
        return order[position * self.batch_size :][: self.batch_size]

    def __getitem__(self, step: int) -> Batch:
        rows, per_row = self.rows, self.rows.per_row
        sequences = (self.indices(step)[:, None] * per_row + np.arange(per_row)).reshape(-1)
        lengths = rows.offsets[sequences + 1] - rows.offsets[sequences]
        # place[s, t]: which token of its sequence stands at column t; outside 0 .. length - 1 there is none.
        shift = self.length - lengths if self.side == "left" else np.zeros_like(lengths)
        place = np.arange(self.length) - shift[:, None]
        mask = (place >= 0) & (place < lengths[:, None])
        tokens = np.where(mask, rows.tokens[np.where(mask, rows.offsets[sequences][:, None] + place, 0)], 0)
        loss_mask = mask & (place >= rows.trained_from[sequences][:, None])
        shape = (self.batch_size, self.length) if per_row == 1 else (self.batch_size, per_row, self.length)
        return Batch(tokens.astype(np.int32).reshape(shape), mask.reshape(shape), loss_mask.reshape(shape))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    # RandomState, because NumPy keeps its stream the same in all versions: a run resumes under a newer NumPy.
    return np.random.RandomState([seed, epoch]).permutation(num_rows)
