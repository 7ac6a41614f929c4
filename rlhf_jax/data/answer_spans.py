"""Finds what the assistant says in a rendered dialogue: its characters, and the tokens of those.

An answer begins after the opening of the prompt (what `add_generation_prompt` writes), or after the part of it that
the template also writes before an answer: some write `<think>` for the model to go on from, and leave it out of earlier
answers. It ends with the first control token after its text, where the template writes one. Templates may write an
earlier answer otherwise than the last one, for instance without its reasoning, so the places are looked for in the one
text of the whole dialogue.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlhf_jax.data.rendering import (
    Chat,
    Failure,
    Range,
    find_controls,
    per_template,
    render,
    render_generation,
    spelled_ranges,
    strings_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # a single byte, in vocabularies that fall back to bytes


class Shape(NamedTuple):
    """What a chat template writes around answers, found from a small dialogue."""

    opening: str = ""  # what add_generation_prompt writes
    before: str = ""  # what ends a question, in front of the opening
    given: tuple[str, str] = ("", "")  # the part of the opening that precedes an earlier answer, and the last one
    closing: str = ""  # what follows the last answer
    end: str = ""  # the control token that ends it; "" if none
    next_control: str = ""  # the first control token after an earlier answer; "" if none


@per_template
def find_shape(tokenizer: PreTrainedTokenizerBase) -> Shape:
    """The shape of the tokenizer's chat template; `Shape()` if it rejects the small dialogue."""
    said = ["xqza", "xqzb", "xqzc", "xqzd"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    (whole,) = render(tokenizer, [Chat(messages)], opened=False)
    (asked,) = render(tokenizer, [Chat(messages[:3])], opened=False)
    (opened,) = render(tokenizer, [Chat(messages[:3])], opened=True)
    if any(isinstance(text, ValueError) for text in (whole, asked, opened)):
        return Shape()
    parts = re.split("|".join(said), whole)
    if re.findall("|".join(said), whole) != said or not opened.rpartition("xqzc")[1]:
        return Shape()
    _, earlier, between, last, closing = parts
    lead, pattern = opened.rpartition("xqzc")[2], find_controls(tokenizer).pattern
    opening = opened[common_length(opened, asked, pattern) :]
    if len(opening) > len(lead):
        opening = ""
    before = lead.removesuffix(opening)
    given = tuple(lead[len(before) : common_length(lead, each, pattern)] for each in (earlier, last))
    end, next_control = (found[0] if (found := pattern.search(text)) else "" for text in (closing, between))
    return Shape(opening, before, given, closing, end, next_control)


def common_length(text: str, other: str, pattern: re.Pattern[str]) -> int:
    """Number of leading characters that two texts share, without a part of a control token of `text`."""
    length = len(os.path.commonprefix([text, other]))
    if length < len(text):
        length = next((m.start() for m in pattern.finditer(text) if m.start() < length < m.end()), length)
    return length


def answer_ranges(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, answers: Sequence[int], prompts: Sequence[str]
) -> list[Range]:
    """Where the rendered `text` of a chat has its answers, with the control token that ends each.

    Args:
        answers: indices of the messages to find.
        prompts: for each of them the rendered chat up to it, with the opening; a Failure if the template rejects that.

    ValueError if one cannot be found.
    """
    shape, found = find_shape(tokenizer), []
    for k, prompt in zip(answers, prompts, strict=True):
        begin = _find_begin(tokenizer, chat, text, k, prompt, shape, found[-1].end if found else 0)
        if k == len(chat.messages) - 1:
            end = _last_end(tokenizer, text, begin, shape)
        else:
            end = _earlier_end(tokenizer, chat, text, k, begin, shape)
        if found and begin < found[-1].end:
            raise _unlike(str(prompt), text)
        found.append(Range(begin, end))
    return found


def tagged_ranges(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, answers: Sequence[int]
) -> list[Range] | None:
    """What the template marks by `{% generation %}` in the text of a chat, each with the end of turn that follows it.

    answers: indices of the messages that are learned. None if the marks cannot be assigned to them.
    """
    written, marked = render_generation(tokenizer, chat)
    marked = [each for each in marked if each.start < each.end]
    said = [k for k, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(marked) == len(said):
        marked = [each for k, each in zip(said, marked, strict=True) if k in answers]
    elif list(answers) != said:
        return None
    if not marked or written != text or sorted(marked) != marked:
        return None
    end = find_shape(tokenizer).end
    return [Range(a, b + len(end) * (text.startswith(end, b) and not text[a:b].endswith(end))) for a, b in marked]


def _find_begin(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, k: int, prompt: str | Failure, shape: Shape, lowest: int
) -> int:
    given = min(shape.given, key=len)
    if isinstance(prompt, str):
        if text.startswith(prompt):
            return len(prompt)
        if given.strip() and text.startswith(prompt.removesuffix(shape.opening) + given):
            return common_length(prompt, text, find_controls(tokenizer).pattern)
    elif k == len(chat.messages) - 1:
        raise prompt
    # The template writes the history otherwise than in the prompt.
    asked = chat.messages[k - 1] if k else {}
    question = str(asked.get("content") or "").strip()
    at = text.find(question, lowest)
    place = at + len(question) if at >= 0 else lowest
    if at >= 0 and asked.get("role") == "user" and shape.before.strip():
        given = shape.before + given
    at = text.find(given, place)
    if not given.strip() or at < 0:
        raise prompt if isinstance(prompt, ValueError) else _unlike(prompt, text)
    return at + len(given)


def _unlike(prompt: str, text: str) -> ValueError:
    return ValueError(
        "this tokenizer encodes a prompt differently once an answer follows it: "
        f"{prompt[-60:]!r} is no beginning of {text[-120:]!r}. "
        "Give it a chat_template that writes the same text before an answer as for "
        "add_generation_prompt (data.template), or remove its chat_template to use the default one"
    )


def _last_end(tokenizer: PreTrainedTokenizerBase, text: str, begin: int, shape: Shape) -> int:
    """End of the answer that ends a text, with the first control token after it."""
    at = len(text) - len(shape.closing)
    if shape.closing and at >= begin and text.endswith(shape.closing):
        return at + (shape.closing.index(shape.end) + len(shape.end) if shape.end else len(shape.closing))
    # Some templates end calls of tools with a control token of their own.
    pattern = find_controls(tokenizer).pattern
    last = next((m for m in reversed(list(pattern.finditer(text, begin))) if not text[m.end() :].strip()), None)
    return last.end() if last else len(text)


def _earlier_end(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, k: int, begin: int, shape: Shape) -> int:
    """End of answer k, which other turns follow."""
    message, end = chat.messages[k], shape.end if shape.end == shape.next_control else ""
    is_plain = message.keys() == {"role", "content"} and chat.messages[k + 1]["role"] == "user"
    if not (end and is_plain):
        (alone,) = render(tokenizer, [Chat(chat.messages[: k + 1], chat.tools)], opened=False)
        if isinstance(alone, ValueError):
            raise alone
        stop = _last_end(tokenizer, alone, 0, shape)
        uncontrolled = len(alone) - len(shape.closing) if alone.endswith(shape.closing) else len(alone)
        for place in (stop, uncontrolled):
            if text.startswith(alone[:place]):
                return place
        last = re.search(rf"(?:{find_controls(tokenizer).pattern.pattern})\Z", alone[:stop])
        end = last[0] if last and (last[0] == end or not is_plain) else ""
    places = _other_places(tokenizer, chat, text, k, begin, end) if end else iter(())
    if (at := next(places, -1)) >= 0:
        return at + len(end)
    if is_plain and shape.next_control and (at := text.find(shape.next_control, begin)) >= 0:
        return at
    said = str(message.get("content") or "").rpartition("</think>")[2].strip()
    if said and (at := text.find(said, begin)) >= 0:
        return at + len(said)
    raise ValueError(
        f"the end of the answer {said[:60]!r} cannot be found where turns follow it: the chat template writes it in "
        'another way there; set sft.learn = "answer", or give another template (data.template)'
    )


def _other_places(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, k: int, begin: int, token: str
) -> Iterator[int]:
    """Where the text has this token from `begin` on, except where message k spells it."""
    pattern, own = re.compile(re.escape(token)), []
    if any(token in each for each in strings_of(chat.messages[k])):
        own = spelled_ranges(tokenizer, chat, text, pattern=pattern, message=k)
    return (each.start() for each in pattern.finditer(text, begin) if each.span() not in own)


def token_spans(
    tokenizer: PreTrainedTokenizerBase,
    ids: np.ndarray,
    text: str,
    ranges: Sequence[Range],
    encode: Callable[[str], np.ndarray],
    *,
    exact: bool = False,
) -> list[tuple[int, int]]:
    """First token and end of each range of the text, found by the bytes of each token.

    With `exact`, or where the tokens do not spell the text byte by byte, by encoding what precedes, with `encode`.
    A token that ends in an answer and begins before it belongs to the answer if it has only whitespace of it.
    ValueError if it has more: the model could not emit it after the prompt.
    """
    ends = None if exact else token_ends(tokenizer, ids, text)
    spans = []
    for begin, end in ranges:
        if ends is None:
            spans.append((_count_before(ids, text, begin, encode, True), _count_before(ids, text, end, encode, False)))
            continue
        place = byte_length(text[:begin])
        first, stop = np.searchsorted(ends, (place, byte_length(text[:end])), side="right").tolist()
        if (ends[first - 1] if first else 0) != place and text.encode()[place : ends[first]].strip():
            raise _unlike(text[:begin], text)
        spans.append((first, stop))
    return spans


def _count_before(ids: np.ndarray, text: str, at: int, encode: Callable[[str], np.ndarray], is_begin: bool) -> int:
    """Number of tokens of the text that end at or before `at`."""
    count = 0
    for place in range(at, len(text) + 1):
        prefix = encode(text[:place])
        same = np.cumprod(prefix == ids[: len(prefix)]) if len(prefix) <= len(ids) else np.zeros(1)
        count = int(same.sum()) if place == at else count
        if not is_begin or same.all():
            return count
        if not text[place : place + 1].isspace():
            break
    raise _unlike(text[:at], text)


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, text: str) -> np.ndarray | None:
    """[T] int64, bytes of `text` up to the end of each token; None if the tokens do not spell the text byte by byte.

    The bytes of tokens are a guess unless the vocabulary is byte-level or SentencePiece's; the sum shows a wrong one.
    """
    ends = np.cumsum(_token_bytes(tokenizer)[ids])
    return ends if ends.size and ends[-1] == byte_length(text) else None


def byte_length(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


@per_template
def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[ids] int64, bytes of each token."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    is_byte_level = type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"
    for piece, token in vocabulary.items():
        if token in added:
            lengths[token] = len(piece.encode())
        elif is_byte_level:
            lengths[token] = len(piece)  # one letter stands for each byte
        else:
            lengths[token] = 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", " ").encode())
    return lengths
