"""One reader per format: it makes the function from a row to its examples, for a source and a kind of rows.

The readers raise `BadRow` without the place, which `mapping.make_mapper` prepends.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.dialogues import (
    add_system,
    check_prompt,
    check_text,
    convert_each,
    full_transcript,
    parse_messages,
    parse_prompt,
    parse_reply,
    parse_tools,
    parse_transcript,
    part_dialogues,
    same_prompt,
    split_answer,
)
from rlhf_jax.data.records import BadRow, Example, Reply, Row, RowKind, Turn, Turns

T = TypeVar("T")
Fields = dict[str, Any]
NO_MARGIN = 1e-30  # the least margin, which still says which of two answers is better
MISSING = object()  # there is no such field; a null is None


class EmptyField(BadRow):
    """The row has the field, but the field is empty, which a sparse source allows."""


class MissingField(BadRow):
    """The row has no such field: likely the name is wrong."""


def path_getter(name: str) -> Callable[[Fields], Any]:
    """The function from fields to the value at a dotted name, as "a.0.b"; "a.*.b" lists "b" of every item of "a".

    MISSING where an object has no such key; None at a null on the way, and where a list is too short. A field whose
    own name contains the dots takes precedence over a path.
    """
    if "." not in name:
        return lambda fields: fields.get(name, MISSING)
    steps = name.split(".")
    return lambda fields: fields[name] if name in fields else _walk(fields, steps)


def _walk(value: Any, steps: list[str]) -> Any:
    for at, step in enumerate(steps):
        if isinstance(value, dict):
            value = value.get(step, MISSING)
        elif isinstance(value, list) and step == "*":
            return [_walk(item, steps[at + 1 :]) for item in value]
        elif isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            return None if value is None else MISSING
    return value


def _field_getter(
    source: SourceConfig, name: str, convert: Callable[[Any], T], needed: bool = True, absent: tuple = ()
) -> Callable[[Fields], T | str]:
    """The function from fields to the converted value at `name`; to "" where the value is one of `absent`.

    It raises BadRow, naming the field, for a value that `convert` rejects; EmptyField for a null, which `convert` must
    reject, and in a sparse source for an empty text or list; MissingField. For a field that is not needed, or has no
    name, it returns "" instead.
    """
    if not name:
        return lambda fields: ""
    pick = path_getter(name)

    def read(fields: Fields) -> T | str:
        value = pick(fields)
        try:
            if value is None or value is MISSING or (source.sparse and not value and value != 0):
                if not needed or value in absent:
                    return ""
                if value is MISSING:
                    raise MissingField(f"no field {name!r}; the fields are {', '.join(map(str, fields)) or 'none'}")
                if value is not None:
                    raise EmptyField("must not be empty")
            return convert(value)
        except MissingField:
            raise
        except BadRow as error:
            if not needed:
                return ""
            kind = EmptyField if value is None else type(error)
            raise kind(f"field {name!r} {error}") from error

    return read


RowReader = Callable[[Row], list[Example]]
OPTIONAL = ("", None, MISSING)


def _fields_reader(source: SourceConfig, kind: RowKind) -> RowReader:
    """Reads texts or messages: the prompt's, an answer's, or whole dialogues, which must share the prompt."""
    names, needed = _needed_replies(source, kind)
    prompt_in, system_in = _field_getter(source, source.prompt, parse_prompt), _system_getter(source)
    answer_in, chosen_in, rejected_in = (_field_getter(source, name, parse_reply, name in needed) for name in names)
    picked = path_getter(source.prompt)

    def read(row: Row) -> list[Example]:
        fields = row.fields
        chosen = chosen_in(fields)
        answer, rejected = answer_in(fields) if source.answer else chosen, rejected_in(fields)
        is_whole = type(answer) is tuple and answer[:1] and answer[0][0] != "assistant"
        turns = () if is_whole and picked(fields) is MISSING else prompt_in(fields)  # a dialogue has its own prompt
        if tuple in (type(answer), type(chosen), type(rejected)):
            turns, (answer, chosen, rejected) = _join_replies(turns, (answer, chosen, rejected), names, needed)
        turns, tools = add_system(system_in(fields), turns), parse_tools(fields, source.format)
        return [Example(turns, answer, chosen, rejected, source.path, row.number, tools=tools)]

    return read


def _join_replies(
    given: Turns, replies: tuple[Reply, ...], names: tuple[str, ...], needed: set[str]
) -> tuple[Turns, list[Reply]]:
    """The prompt and the replies where at least one of them is a whole dialogue; those not needed may be invalid.

    given: the prompt of its own field, with which dialogues begin; () where there is none.
    """
    found: dict[str, Turns] = {}
    for name, reply in zip(names, replies, strict=True):
        is_whole = type(reply) is tuple and reply and reply[0][0] != "assistant"
        if not reply or (not is_whole and not given):
            continue
        dialogue = reply if is_whole else (*given, *((("assistant", reply),) if type(reply) is str else reply))
        try:
            before = _with_field_name(split_answer, dialogue, name)[0]
            if given and not same_prompt(before[: len(given) + (before[0][0] == "system" != given[0][0])], given):
                raise BadRow(f"field {name!r} is a dialogue that does not begin with the prompt")
            _with_names([*found, name], part_dialogues, [*found.values(), dialogue])
        except BadRow:
            if name in needed:
                raise
            continue
        found[name] = dialogue
    if not found:
        return given, [""] * len(names)
    prompt, parted = part_dialogues(list(found.values()))
    known = dict(zip(found, parted, strict=True))
    return prompt, [known.get(name, "") for name in names]


def _transcripts_reader(source: SourceConfig, kind: RowKind) -> RowReader:
    """Reads whole transcripts, or their ends after a beginning in `prompt`; fields not needed may be invalid."""
    names, needed = _needed_replies(source, kind)
    needed = needed or {names[0]}  # its beginning is the prompt
    prompt_in = _field_getter(source, source.prompt, check_text, absent=(MISSING,) if source.sparse else OPTIONAL)
    replies_in = {name: _field_getter(source, name, check_text, name in needed) for name in names if name}
    system_in = _system_getter(source)

    def read(row: Row) -> list[Example]:
        prompt = prompt_in(row.fields)
        found: dict[str, Turns] = {}
        for name, reply_in in replies_in.items():
            text = reply_in(row.fields)
            if not text and name not in needed:
                continue
            try:
                whole = full_transcript(prompt, text, source.speakers)
                before, reply = parse_transcript(whole, f"field {name!r}", source.speakers)
                dialogue = (*before, ("assistant", reply))
                _with_names([*found, name], part_dialogues, [*found.values(), dialogue])
            except BadRow:
                if name in needed:
                    raise
                continue
            found[name] = dialogue
        turns, replies = part_dialogues(list(found.values()))
        texts, turns = dict(zip(found, replies, strict=True)), add_system(system_in(row.fields), turns)
        return [Example(turns, *(texts.get(name, "") for name in names), source.path, row.number)]

    return read


def _messages_reader(source: SourceConfig, kind: RowKind) -> RowReader:
    name = source.field or {"messages": "messages", "sharegpt": "conversations"}[source.format]
    turns_in, system_in, path = _field_getter(source, name, parse_messages), _system_getter(source), source.path

    def read(row: Row) -> list[Example]:
        turns = add_system(system_in(row.fields), turns_in(row.fields))
        tools = parse_tools(row.fields, source.format)
        if kind == "prompt" and turns and not any(turn[0] == "assistant" for turn in turns):
            return [Example(_with_field_name(check_prompt, turns, name), "", "", "", path, row.number, tools=tools)]
        before, answer = _with_field_name(split_answer, turns, name)
        said = Turn(*turns[len(before)])
        return [Example(before, answer, "", "", path, row.number, "", said.extra, said.is_learned, tools)]

    return read


def _alpaca_reader(source: SourceConfig, kind: RowKind) -> RowReader:
    instruction_in = _field_getter(source, "instruction", check_text)
    answer_in = _field_getter(source, "output", check_text, kind == "demonstration")
    input_in, system_in = _field_getter(source, "input", check_text, absent=OPTIONAL), _system_getter(source)

    def read(row: Row) -> list[Example]:
        prompt = f"{instruction_in(row.fields).strip()}\n\n{input_in(row.fields).strip()}".strip()
        turns = add_system(system_in(row.fields), (("user", prompt),))
        return [Example(turns, answer_in(row.fields).strip(), "", "", source.path, row.number)]

    return read


def _rankings_reader(source: SourceConfig, kind: RowKind) -> RowReader:
    """Answers of equal rank make no pair; the first of the best is the demonstration; a prompt needs no answers."""
    prompt_in, system_in = _field_getter(source, source.prompt, parse_prompt), _system_getter(source)
    answers_in = _list_getter(source, source.answers, _parse_answer)
    scores_in = _list_getter(source, source.scores, _parse_number)

    def rank(fields: Fields) -> list[tuple[float, str]]:
        answers = answers_in(fields)
        scores = scores_in(fields) if source.scores else [-float(i) for i in range(len(answers))]
        if len(answers) != len(scores):
            raise BadRow(f"{len(answers)} answers have {len(scores)} scores")
        if not answers:
            raise EmptyField(f"field {source.answers[0]!r} holds no answers")
        sign = -1 if source.lowest_first and source.scores else 1
        signed = [sign * score for score in scores]
        return sorted(zip(signed, answers, strict=True), key=operator.itemgetter(0), reverse=True)

    def read(row: Row) -> list[Example]:
        turns = add_system(system_in(row.fields), prompt_in(row.fields))
        try:
            best_first = rank(row.fields)
        except BadRow:
            if kind != "prompt":
                raise
            best_first = [(0.0, "")]
        if kind == "ranking":
            scores, ranked = zip(*best_first, strict=True)
            return [Example(turns, *[ranked[0]] * 2, "", source.path, row.number, ranked=ranked, scores=scores)]
        if kind != "pair":
            return [Example(turns, best_first[0][1], "", "", source.path, row.number)]
        return [
            Example(turns, better, better, worse, source.path, row.number, scores=(high, low))
            for (high, better), (low, worse) in itertools.combinations(best_first, 2)
            if high > low
        ]

    return read


def _texts_reader(source: SourceConfig, kind: RowKind) -> RowReader:
    text_in = _field_getter(source, source.field or "text", check_text)
    return lambda row: [Example((), "", "", "", source.path, row.number, text_in(row.fields).strip())]


READERS: dict[str, Callable[[SourceConfig, RowKind], RowReader]] = {
    "fields": _fields_reader,
    "transcript": _transcripts_reader,
    "messages": _messages_reader,
    "sharegpt": _messages_reader,
    "alpaca": _alpaca_reader,
    "ranking": _rankings_reader,
    "text": _texts_reader,
}


def _list_getter(source: SourceConfig, names: tuple[str, ...], convert: Callable[[Any], T]) -> Callable[[Fields], list]:
    """The function from fields to a list: the value of one field, or one value per field."""
    if len(names) == 1:
        return _field_getter(source, names[0], lambda value: _convert_list(value, convert))
    parts = [_field_getter(source, name, convert) for name in names]
    return lambda fields: [part(fields) for part in parts]


def _convert_list(value: Any, convert: Callable[[Any], Any]) -> list:
    if not isinstance(value, list):
        raise BadRow(f"must be a list, not {type(value).__name__}")
    return convert_each(value, convert, "item")


def _parse_answer(value: Any) -> str:
    reply = parse_reply(value)
    if type(reply) is tuple:
        raise BadRow("must be an answer alone, not a dialogue")
    return reply


def margin_getter(source: SourceConfig) -> Callable[[Fields], float | str]:
    """The function from fields to the margin of a pair, "" where the source names no field of it."""
    return _field_getter(source, source.margin, _parse_margin)


def _parse_margin(value: Any) -> float:
    if not 0 <= (number := _parse_number(value)) < math.inf:
        raise BadRow(f"must be a margin of at least 0, not {value!r}: chosen is the better answer")
    return max(number, NO_MARGIN)


def _parse_number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise BadRow(f"must be a number, not {value!r}")
    return number


def _system_getter(source: SourceConfig) -> Callable[[Fields], str]:
    """The function from fields to the system text, "" for none; a field that `system` names must exist."""
    name = source.system or ("system" if source.format in ("alpaca", "sharegpt") else "")
    return _field_getter(source, name, check_text, absent=("", None) if source.system else OPTIONAL)


def _needed_replies(source: SourceConfig, kind: RowKind) -> tuple[tuple[str, str, str], set[str]]:
    """The names of the answer, chosen and rejected, and those of them that a row of this kind needs."""
    target = source.answer or source.chosen
    needed = {"demonstration": {target}, "pair": {source.chosen, source.rejected}, "prompt": set()}[kind]
    return (target, source.chosen, source.rejected), needed


def _with_field_name(function: Callable[[Turns], Any], turns: Turns, name: str) -> Any:
    try:
        return function(turns)
    except BadRow as error:
        raise BadRow(f"field {name!r} {error}") from error


def _with_names(names: Sequence[str], function: Callable[[list[Turns]], Any], dialogues: list[Turns]) -> Any:
    try:
        return function(dialogues)
    except BadRow as error:
        raise BadRow(f"{' and '.join(names)} {error}") from error
