"""A block of examples to the token sequences of their rows, with a count of what was dropped and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.example import Example, Learn, RowKind, RowSpec
from rlhf_jax.data.template import Encoded, encode_dialogues, encode_documents, encode_prompts


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a row; everything here is part of the key under which its tokens are kept."""

    kind: RowKind
    max_prompt_length: int
    max_length: int
    long_rows: str
    learn: Learn
    per_row: int  # sequences of a row


def wanted(config: DataConfig, spec: RowSpec) -> Wanted:
    lengths = config.max_prompt_length, config.max_length, config.long_rows
    return Wanted(spec.kind, *lengths, spec.learn, spec.per_row)


@dataclass
class Block:
    """Rows of one block: `per_row` sequences of each, one row after the other."""

    sequences: list[Encoded] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)  # which of the examples each row is
    cut: list[bool] = field(default_factory=list)  # whether a sequence of the row was cut
    dropped: dict[int, str] = field(default_factory=dict)  # examples that make no row, and why
    failures: dict[int, ValueError] = field(default_factory=dict)  # examples that cannot be encoded


def encode_block(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, wanted: Wanted) -> Block:
    """Prompt and answer of a demonstration, prompt and both answers of a pair, the opened prompt of a prompt.

    Rows are dropped for an empty prompt or answer, for a chosen answer that equals the rejected one, and for a prompt
    over max_prompt_length; an answer is cut at max_length, its EOS with it, so that the model does not learn to stop
    there. long_rows "left" cuts the beginning of the prompt instead, keeping a BOS, and "drop" drops what is too long
    in either way. A document is cut into pieces of max_length; a last one of a single token, the EOS, teaches nothing
    and is left out.
    """
    block = Block()
    documents = [i for i, example in enumerate(examples) if not example.turns]
    dialogues = [i for i, example in enumerate(examples) if example.turns]
    whole: list[int] = []
    for i in dialogues:
        if reason := _obstacle(examples[i], wanted.kind):
            block.dropped[i] = reason
        else:
            whole.append(i)
    for i, row in zip(whole, _rows([examples[i] for i in whole], tokenizer, wanted), strict=True):
        failure = next((each for each in row if isinstance(each, ValueError)), None)
        if failure is not None:
            block.failures[i] = failure
            continue
        fitted = _fit(row, tokenizer, wanted)
        if isinstance(fitted, str):
            block.dropped[i] = fitted
            continue
        block.cut.append(any(len(new.tokens) < len(old.tokens) for new, old in zip(fitted, row, strict=True)))
        block.kept.append(i)
        block.sequences += fitted
    for i, tokens in zip(documents, encode_documents(tokenizer, [examples[i].text for i in documents]), strict=True):
        if not examples[i].text:
            block.dropped[i] = "empty document"
            continue
        for start in range(0, len(tokens), wanted.max_length):
            piece = tokens[start : start + wanted.max_length]
            if len(piece) > 1:  # of a single token nothing is learned
                block.kept.append(i)
                block.cut.append(False)
                block.sequences.append(Encoded(piece, np.array([[1, len(piece)]], np.int32)))
    return block


def _obstacle(example: Example, kind: RowKind) -> str:
    if not example.turns[-1][1]:
        return "empty prompt"
    answers = {"demonstration": example.answer, "pair": example.chosen and example.rejected, "prompt": True}
    if not answers[kind]:
        return "empty answer"
    if kind == "pair" and example.chosen == example.rejected:
        return "chosen and rejected equal"
    return ""


def _rows(examples: list[Example], tokenizer: PreTrainedTokenizerBase, wanted: Wanted) -> list[list]:
    """For each example its sequences, whole, or what failed in their place."""
    if wanted.kind == "prompt":
        nothing = np.zeros((0, 2), np.int32)
        prompts = encode_prompts(tokenizer, [example.turns for example in examples])
        return [[each if isinstance(each, ValueError) else Encoded(each, nothing)] for each in prompts]
    answers = [[e.answer] if wanted.kind == "demonstration" else [e.chosen, e.rejected] for e in examples]
    dialogues = [
        (*example.turns, ("assistant", text))
        for example, texts in zip(examples, answers, strict=True)
        for text in texts
    ]
    encoded = encode_dialogues(tokenizer, dialogues, all_turns=wanted.learn == "assistant")
    n = wanted.per_row
    return [encoded[i * n : (i + 1) * n] for i in range(len(examples))]


def _fit(row: list[Encoded], tokenizer: PreTrainedTokenizerBase, wanted: Wanted) -> list[Encoded] | str:
    """The row within the lengths, or why it is dropped."""
    prompt = len(row[0].tokens) if wanted.kind == "prompt" else int(row[0].spans[-1, 0])
    longest = max(len(each.tokens) for each in row)
    if prompt > wanted.max_prompt_length and wanted.long_rows != "left":
        return f"prompt over {wanted.max_prompt_length} tokens"
    if longest > wanted.max_length and wanted.long_rows == "drop":
        return f"over {wanted.max_length} tokens"
    if wanted.long_rows == "left":
        # At least one token of the prompt stays, for the answer to follow.
        excess = max(prompt - wanted.max_prompt_length, min(longest - wanted.max_length, prompt - 1), 0)
        row = [_without_beginning(each, excess, tokenizer) for each in row]
    fitted = [_cut(each, wanted.max_length) for each in row]
    if len(row) == 2 and np.array_equal(fitted[0].tokens, fitted[1].tokens):
        return "chosen and rejected equal"
    if wanted.learn == "everything" and wanted.kind == "demonstration":
        fitted = [Encoded(each.tokens, np.array([[1, len(each.tokens)]], np.int32)) for each in fitted]
    return fitted


def _cut(encoded: Encoded, length: int) -> Encoded:
    if len(encoded.tokens) <= length:
        return encoded
    spans = np.minimum(encoded.spans, length)
    return Encoded(encoded.tokens[:length], spans[spans[:, 0] < spans[:, 1]])


def _without_beginning(encoded: Encoded, count: int, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Less `count` tokens, taken off the front, behind a BOS where one stands there."""
    if not count:
        return encoded
    keep = int(tokenizer.bos_token_id is not None and int(encoded.tokens[0]) == tokenizer.bos_token_id)
    tokens = np.concatenate([encoded.tokens[:keep], encoded.tokens[keep + count :]])
    spans = np.maximum(encoded.spans - count, keep)
    return Encoded(tokens, spans[spans[:, 0] < spans[:, 1]])
