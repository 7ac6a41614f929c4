"""One reader a format: what makes the functions from a row to its examples, for a source and a kind of rows.

They raise `BadRow` without the place, which `mapping.mapper` puts before it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.example import BadRow, Example, Row, RowKind, Turns
from rlhf_jax.data.mapping.dialogues import (
    answered,
    asked,
    completed,
    led,
    parse_transcript,
    prompt_of,
    reply_of,
    same,
    text_of,
    turns_of,
)
from rlhf_jax.data.mapping.picking import MISSING, Fields, Lacking, part, picker

Read = Callable[[Row], list[Example]]
OPTIONAL = ("", None, MISSING)


def _of_fields(source: SourceConfig, kind: RowKind) -> Read:
    """Texts, or messages: those of the prompt, those of an answer, or whole dialogues, which must share the prompt."""
    names, needed = _replies(source, kind)
    prompt_in, system_in = _part(source, source.prompt, prompt_of), _system(source)
    answer_in, chosen_in, rejected_in = (_part(source, name, reply_of, name in needed) for name in names)
    picked = picker(source.prompt)
    path, one = source.path, not source.answer  # of `answer` and `chosen`

    def read(row: Row) -> list[Example]:
        fields = row.fields
        chosen = chosen_in(fields)
        answer, rejected = chosen if one else answer_in(fields), rejected_in(fields)
        if type(answer) is tuple and picked(fields) is MISSING:
            turns = _named(answered, answer, names[0])[0]  # a dialogue alone says what it answers
        else:
            turns = prompt_in(fields)
        if tuple in (type(answer), type(chosen), type(rejected)):
            turns, (answer, chosen, rejected) = _of_dialogues(turns, (answer, chosen, rejected), names, needed)
        if system_in:
            turns = led(system_in(fields), turns)
        return [Example(turns, answer, chosen, rejected, path, row.number)]

    return read


def _of_dialogues(
    turns: Turns, replies: tuple[str | Turns, ...], names: tuple[str, ...], needed: set[str]
) -> tuple[Turns, list[str]]:
    """The prompt, with the system text of the first dialogue, and the answers. One that is not needed may be unfit."""
    texts = []
    for name, reply in zip(names, replies, strict=True):
        if type(reply) is str:
            texts.append(reply)
            continue
        try:
            before, text = answered(reply)
            if not same(before, turns):
                raise BadRow("is a dialogue that does not have the prompt before its last turn")
        except BadRow as error:
            if name in needed:
                raise BadRow(f"field {name!r} {error}") from error
            texts.append("")
        else:
            texts.append(text)
            turns = max(turns, before, key=len) if name == names[0] else turns
    return turns, texts


def _of_transcripts(source: SourceConfig, kind: RowKind) -> Read:
    """Whole transcripts, or the ends of transcripts whose beginning is in `prompt`. What is not needed may be unfit."""
    names, needed = _replies(source, kind)
    needed = needed or {names[0]}  # whose beginning is the prompt
    prompt_in = _part(source, source.prompt, text_of, absent=(MISSING,) if source.sparse else OPTIONAL)
    replies_in = {name: _part(source, name, text_of, name in needed) for name in names if name}
    system_in = _system(source)

    def read(row: Row) -> list[Example]:
        prompt = prompt_in(row.fields)
        turns, first, texts = (), "", {}
        for name, reply_in in replies_in.items():
            text = reply_in(row.fields)
            if not text and name not in needed:
                continue
            try:
                whole = completed(prompt, text, source.speakers)
                before, reply = parse_transcript(whole, f"field {name!r}", source.speakers)
                if first and not same(before, turns):
                    raise BadRow(f"{first} and {name} answer different prompts; only the last turn may differ")
            except BadRow:
                if name in needed:
                    raise
                continue
            texts[name] = reply
            if not first:
                turns, first = before, name
        if system_in:
            turns = led(system_in(row.fields), turns)
        return [Example(turns, *(texts.get(name, "") for name in names), source.path, row.number)]

    return read


def _of_messages(source: SourceConfig, kind: RowKind) -> Read:
    name = source.field or {"messages": "messages", "sharegpt": "conversations"}[source.format]
    turns_in, system_in, path = _part(source, name, turns_of), _system(source), source.path

    def read(row: Row) -> list[Example]:
        turns = turns_in(row.fields)
        if system_in:
            turns = led(system_in(row.fields), turns)
        if kind == "prompt" and turns and not any(role == "assistant" for role, _ in turns):
            return [Example(_named(asked, turns, name), "", "", "", path, row.number)]
        before, answer = _named(answered, turns, name)
        return [Example(before, answer, "", "", path, row.number)]

    return read


def _of_alpaca(source: SourceConfig, kind: RowKind) -> Read:
    instruction_in, answer_in = (
        _part(source, "instruction", text_of),
        _part(source, "output", text_of, kind == "demonstration"),
    )
    input_in, system_in = _part(source, "input", text_of, absent=OPTIONAL), _system(source)

    def read(row: Row) -> list[Example]:
        prompt = f"{instruction_in(row.fields).strip()}\n\n{input_in(row.fields).strip()}".strip()
        turns = led(system_in(row.fields), (("user", prompt),))
        return [Example(turns, answer_in(row.fields).strip(), "", "", source.path, row.number)]

    return read


def _of_rankings(source: SourceConfig, kind: RowKind) -> Read:
    """Answers of equal rank make no pair; the first of the best is a demonstration; a prompt does without answers."""
    prompt_in, system_in = _part(source, source.prompt, prompt_of), _system(source)
    answers_in, scores_in = _many(source, source.answers, _answer_of), _many(source, source.scores, _number_of)

    def ranked(fields: Fields) -> list[tuple[float, str]]:
        answers = answers_in(fields)
        scores = scores_in(fields) if source.scores else [-float(i) for i in range(len(answers))]
        if len(answers) != len(scores):
            raise BadRow(f"{len(answers)} answers have {len(scores)} scores")
        if not answers:
            raise Lacking(f"field {source.answers[0]!r} holds no answers")
        sign = -1 if source.lowest_first and source.scores else 1
        return sorted(
            ((sign * score, text) for score, text in zip(scores, answers, strict=True)),
            key=operator.itemgetter(0),
            reverse=True,
        )

    def read(row: Row) -> list[Example]:
        turns = prompt_in(row.fields)
        if system_in:
            turns = led(system_in(row.fields), turns)
        try:
            best_first = ranked(row.fields)
        except BadRow:
            if kind != "prompt":
                raise
            best_first = [(0.0, "")]
        if kind != "pair":
            return [Example(turns, best_first[0][1], "", "", source.path, row.number)]
        return [
            Example(turns, better, better, worse, source.path, row.number)
            for (high, better), (low, worse) in itertools.combinations(best_first, 2)
            if high > low
        ]

    return read


def _of_texts(source: SourceConfig, kind: RowKind) -> Read:
    text_in = _part(source, source.field or "text", text_of)
    return lambda row: [Example((), "", "", "", source.path, row.number, text_in(row.fields).strip())]


READERS: dict[str, Callable[[SourceConfig, RowKind], Read]] = {
    "fields": _of_fields,
    "transcript": _of_transcripts,
    "messages": _of_messages,
    "sharegpt": _of_messages,
    "alpaca": _of_alpaca,
    "ranking": _of_rankings,
    "text": _of_texts,
}


def _part(source: SourceConfig, name: str, convert: Callable[[Any], Any], needed: bool = True, absent: tuple = ()):
    return part(name, convert, needed=needed, absent=absent, sparse=source.sparse)


def _many(source: SourceConfig, names: tuple[str, ...], convert: Callable[[Any], Any]) -> Callable[[Fields], list]:
    """One field that holds a list, or a field for each item."""
    if len(names) == 1:
        return _part(source, names[0], lambda value: _each(value, convert))
    parts = [_part(source, name, convert) for name in names]
    return lambda fields: [part(fields) for part in parts]


def _each(value: Any, convert: Callable[[Any], Any]) -> list:
    if not isinstance(value, list):
        raise BadRow(f"must be a list, not {type(value).__name__}")
    items = []
    for number, item in enumerate(value, start=1):
        try:
            items.append(convert(item))
        except BadRow as error:
            raise BadRow(f"holds as number {number} what {error}") from error
    return items


def _answer_of(value: Any) -> str:
    reply = reply_of(value)
    if type(reply) is tuple:
        raise BadRow("must be an answer alone, not a dialogue")
    return reply


def _number_of(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise BadRow(f"must be a number, not {value!r}")
    return number


def _system(source: SourceConfig) -> Callable[[Fields], str] | None:
    """The system text, "" where the row has none; None where the source has none. A field that is named must be."""
    if source.system:
        return _part(source, source.system, text_of, absent=("", None))
    if source.format in ("alpaca", "sharegpt"):
        return _part(source, "system", text_of, absent=OPTIONAL)
    return None


def _replies(source: SourceConfig, kind: RowKind) -> tuple[tuple[str, str, str], set[str]]:
    """The names of the answer, chosen and rejected, and those of them that a row of this kind needs."""
    target = source.answer or source.chosen
    needed = {"demonstration": {target}, "pair": {source.chosen, source.rejected}, "prompt": set()}[kind]
    return (target, source.chosen, source.rejected), needed


def _named(function: Callable[[Turns], Any], turns: Turns, name: str) -> Any:
    try:
        return function(turns)
    except BadRow as error:
        raise BadRow(f"field {name!r} {error}") from error
