"""Parses texts and lists of messages to turns, for the mappings of all formats.

Everything here raises `BadRow` without the place: `mapping.mapper` puts file, row and field before it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rlhf_jax.data.records import BadRow, Reply, Turn, Turns

T = TypeVar("T")
SPEAKERS = ("\n\nHuman:", "\n\nAssistant:")  # those of hh-rlhf, and of SourceConfig.speakers
ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
ROLES |= dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool")
ROLES |= dict.fromkeys(("function_call", "tool_call"), "call")  # of the assistant, whose text is JSON of its calls


def check_text(value: Any) -> str:
    """The value unchanged if it is text. BadRow for anything else, and for a lone surrogate."""
    if type(value) is not str:
        raise BadRow(f"must be text, not {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()  # UTF-8 refuses lone surrogates and nothing else, ten times faster than a search for them
        except UnicodeEncodeError as error:
            raise BadRow("holds a lone surrogate, as in truncated text") from error
    return value


def parse_messages(messages: Any) -> Turns:
    """[{"role", "content"}, ...] or [{"from", "value"}, ...] as turns.

    Other fields of a message, such as tool_calls, are kept for the chat template. With "weight": 0 or "train": false
    a turn is not learned. What came before tool_calls becomes them: OpenAI's `function_call` with its role "function",
    and the roles "function_call" and "observation" of LLaMA-Factory. BadRow for an unknown role, content that is not
    text (a list of parts of type "text" is: they are joined unchanged), and what `merge_turns` rejects.
    """
    return merge_turns(_pairs(messages))


def parse_tools(fields: Mapping[str, Any], form: str) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools in the field tools, or functions in place of it: objects, or JSON text of them; or none.

    Functions by themselves, which are in `functions`, and in the `tools` of the format sharegpt as LLaMA-Factory has
    it, become tools of the type "function". BadRow for anything else.
    """
    name = "tools" if fields.get("tools") or form == "fields" else "functions"
    tools = fields.get(name)
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except (ValueError, RecursionError) as error:
        raise BadRow(f"field {name!r} must be a list of objects, or JSON text of one: {error}") from error
    if not isinstance(tools or [], list) or not all(isinstance(each, dict) for each in tools or []):
        raise BadRow(f"field {name!r} must be a list of objects, or JSON text of one")
    is_bare = name == "functions" or form == "sharegpt"
    return tuple(
        {"type": "function", "function": tool} if is_bare and "name" in tool and "function" not in tool else tool
        for tool in tools or ()
    )


def _parse_calls(calls: Any) -> list[dict[str, Any]]:
    """tool_calls of one {"name", "arguments"}, or of a list of them; they and their arguments may be JSON text."""
    found = []
    try:
        calls = json.loads(calls) if isinstance(calls, str) else calls
        for call in calls if isinstance(calls, list) else [calls]:
            name, arguments = check_text(call["name"]), call.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            found.append({"type": "function", "function": {"name": name, "arguments": {**arguments}}})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadRow(
            'it must call functions as {"name": …, "arguments": {…}}, or a list of them, or JSON text'
        ) from error
    return found


def parse_prompt(value: Any) -> Turns:
    """A text, or the messages before an answer, as turns that end with the user's."""
    if type(value) is str:
        return (("user", check_text(value).strip()),)
    return check_prompt(merge_turns(_pairs(value, "text or a list of messages")))


def parse_reply(value: Any) -> Reply:
    """A text, or the messages of an answer, as text; a whole dialogue, or several turns that continue one, as turns.

    A text loses blank lines around it and a single blank in front; deeper indentation is kept.
    """
    if type(value) is str:
        return trim_answer(check_text(value))
    pairs = _pairs(value, "text or a list of messages")
    if pairs and all(turn[0] == "assistant" and len(turn) == 2 for turn in pairs):
        return _join(turn[1] for turn in pairs)
    if pairs and pairs[0][0] == "assistant":
        turns = _merge_speakers(pairs)
        if any(turn[0] == "system" for turn in turns) or turns[-1][0] != "assistant":
            raise BadRow("continues the prompt, and must have no system turn and end with the assistant's")
        return turns
    return merge_turns(pairs)


def trim_answer(text: str) -> str:
    """The text without blank lines around it and a single blank in front, which separates it; with its indentation."""
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())
    return text[1:] if re.match(r" \S", text) else text


def _join(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text.strip())


def check_prompt(turns: Turns) -> Turns:
    """The turns, which end with the user's, or BadRow."""
    if not turns or turns[-1][0] != "user":
        raise BadRow("must end with a turn of the user, whom the answer is for")
    return turns


def add_system(system: str, turns: Turns) -> Turns:
    """The turns after a system turn, if there is a text for it."""
    return merge_turns([("system", system.strip()), *turns]) if system.strip() else turns


def same_prompt(one: Turns, other: Turns) -> bool:
    """Whether two prompts differ only in whitespace and system texts."""
    first, second = ([(turn[0], turn[1].split()) for turn in turns if turn[0] != "system"] for turns in (one, other))
    return first == second


def merge_turns(pairs: Iterable[Turn | tuple[str, str]]) -> Turns:
    """Turns of one speaker in succession as one, joined by a blank line, because chat templates insist on alternation.

    Turns with more than a text, and those of tools, are left as they are. BadRow unless a user turn comes first, or
    after one system turn that comes first.
    """
    turns = _merge_speakers(pairs)
    if any(turn[0] == "system" for turn in turns[1:]):
        raise BadRow("a system turn comes after other turns; it must come first")
    opening = turns[1:2] if turns and turns[0][0] == "system" else turns[:1]
    if opening and opening[0][0] != "user":
        raise BadRow(f"the {opening[0][0]} speaks first; a user turn must come before")
    return turns


def _merge_speakers(pairs: Iterable[Turn | tuple[str, str]]) -> Turns:
    turns: list[Turn | tuple[str, str]] = []
    for turn in pairs:
        role, last = turn[0], turns[-1] if turns else ("", "")
        if role == last[0] and role != "tool" and len(turn) == len(last) == 2:
            turns[-1] = (role, _join((last[1], turn[1])))
        else:
            turns.append(turn)
    return tuple(turns)


def part_dialogues(dialogues: Sequence[Turns]) -> tuple[Turns, list[Reply]]:
    """The prompt that dialogues share, up to the last turn of a user before they part, and how each goes on.

    The prompt has the system text of the first of the longest prompts. A user turn after the last answer of a dialogue
    is left out. BadRow if one has no answer, or if they share no prompt.
    """
    whole = [(*before, answer) for before, answer in map(_split_turn, dialogues)]
    spoken = [turns[1:] if turns[0][0] == "system" else turns for turns in whole]
    plain = [[(turn[0], turn[1].split(), *turn[2:3]) for turn in turns] for turns in spoken]
    shared = min(map(len, plain)) - 1  # at least the last turn is an answer
    shared = next((i for i in range(shared) if any(turns[i] != plain[0][i] for turns in plain)), shared)
    while shared and not (plain[0][shared - 1][0] != "assistant" and all(x[shared][0] == "assistant" for x in plain)):
        shared -= 1
    if not shared:
        raise BadRow("answer different prompts: they must share at least the first question")
    prompt = max((turns[: len(turns) - len(rest) + shared] for turns, rest in zip(whole, spoken, strict=True)), key=len)
    replies = [turns[shared:] for turns in spoken]
    return prompt, [turns[0][1] if len(turns) == 1 and len(turns[0]) == 2 else turns for turns in replies]


def _split_turn(turns: Turns) -> tuple[Turns, Turn | tuple[str, str]]:
    before, _ = split_answer(turns)
    return before, turns[len(before)]


def split_answer(turns: Turns) -> tuple[Turns, str]:
    """(turns before the last assistant turn, its text); a user turn after it is left out. BadRow if there is none."""
    if turns and turns[-1][0] == "user":
        turns = turns[:-1]
    if len(turns) < 2 or turns[-1][0] != "assistant":
        raise BadRow("has no assistant turn that answers a user turn")
    return turns[:-1], turns[-1][1]


def parse_transcript(text: str, where: str, speakers: tuple[str, ...] = SPEAKERS) -> tuple[Turns, str]:
    """A "\\n\\nHuman: ...\\n\\nAssistant: ..." text -> (turns before the last Assistant turn, text of that turn).

    `speakers`: what opens a turn of the user, of the assistant, and where there is a third one, of the system; a third
    "" makes a system turn of what comes before the first speaker. Whitespace at the start of a speaker is
    optional at the beginning of the text; a speaker without it is found wherever no word runs into it. Turns of
    one speaker in succession are one turn; a user turn after the last answer is left out. BadRow, naming `where`, for
    what is no transcript: it has at least two turns, begins with the user's, and has no text before it.
    """
    text = check_text(text).strip()
    found = list(_pattern(speakers).finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    pairs = [
        (("user", "assistant", "system")[match.lastindex - 1], text[match.end() : end].strip())
        for match, end in zip(found, ends, strict=False)  # of no speakers, no end
    ]
    before = text[: found[0].start()].strip() if found else text
    if before and speakers[2:] == ("",):
        pairs.insert(0, ("system", before))
        before = ""
    try:
        if before:
            raise BadRow("it does not begin with a speaker")
        return split_answer(merge_turns(pairs))
    except BadRow as error:
        user = speakers[0].lstrip()
        raise BadRow(
            f"{where}: no transcript: a turn '{user} ...' must come first, and {speakers[1] + ' ...'!r} after it "
            f"({error}); data.sources.speakers says what opens the turns"
        ) from error


def full_transcript(prompt: str, text: str, speakers: tuple[str, ...]) -> str:
    """The whole transcript: `text`, if it is one that begins with `prompt`, else `text` put after `prompt`."""
    if text.lstrip().startswith(prompt.strip()):
        return text
    speaker = speakers[1].lstrip()
    if text.lstrip().startswith(speaker):  # with any or no whitespace between the two
        return f"{prompt.rstrip()}{speakers[1]}{text.lstrip().removeprefix(speaker)}"
    return prompt + text


@functools.cache
def _pattern(speakers: tuple[str, ...]) -> re.Pattern[str]:
    """One group per speaker, so that `lastindex` identifies the speaker."""
    parts = []
    for speaker in filter(None, speakers):
        name = speaker.lstrip()
        space = re.escape(speaker[: len(speaker) - len(name)])
        before = rf"(?:\A|{space})" if space else r"(?<!\w)" * name[0].isalnum()
        parts.append(f"{before}({re.escape(name)})")
    return re.compile("|".join(parts))


def convert_each(items: Iterable[Any], convert: Callable[[Any], T], noun: str) -> list[T]:
    """The converted items. BadRow of `convert` with the number of the item, a `noun`, before it."""
    converted = []
    for number, item in enumerate(items, start=1):
        try:
            converted.append(convert(item))
        except BadRow as error:
            raise BadRow(f"has an invalid {noun} {number}: {error}") from error
    return converted


def _pairs(messages: Any, expected: str = "a list of messages") -> list[Turn | tuple[str, str]]:
    if not isinstance(messages, list | tuple):
        raise BadRow(f"must be {expected}, not {type(messages).__name__}")
    return convert_each(messages, _pair, "message")


def _pair(message: Any) -> Turn | tuple[str, str]:
    """(role, content), or a `Turn` if the message has more."""
    try:
        role, content = ROLES[message["role"]], message["content"]
    except (KeyError, TypeError):
        role, content = _other_spelling(message)
    extra: dict[str, Any] = {}
    if len(message) > 2 or content is None:
        extra = {key: value for key, value in message.items() if key not in _NO_EXTRA and value is not None}
        if message.get("function_call"):
            if extra.get("tool_calls"):
                raise BadRow("it has both function_call and tool_calls: keep one of them")
            extra["tool_calls"] = _parse_calls(message["function_call"])
    if role == "call":
        thought, calls = _THOUGHT.fullmatch(content).groups("") if isinstance(content, str) else ("", content)
        role, content, extra["tool_calls"] = "assistant", thought, _parse_calls(calls)
    if isinstance(content, list):
        content = "".join(map(_part_text, content))
    if content is None and extra.get("tool_calls"):
        content = ""
    try:
        content = check_text(content)
    except BadRow as error:
        raise BadRow(f"its content {error}") from error
    if len(message) == 2 and not extra:
        return role, content
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1) or train not in (None, False, True):
        raise BadRow(f"its weight must be 0 or 1, and its train false or true, not {weight!r} and {train!r}")
    is_learned = not (weight == 0 and weight is not None) and train is not False
    return Turn(role, content, extra, is_learned) if extra or not is_learned else (role, content)


_NO_EXTRA = ("role", "content", "from", "value", "weight", "train", "function_call")
_THOUGHT = re.compile(r"\s*(<think>.*?</think>)?(.*)", re.DOTALL)  # before calls that are text


def _other_spelling(message: Any) -> tuple[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"it must be an object, not {type(message).__name__}")
    for speaker, content in (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content")):
        is_call = content == "content" and any(map(message.get, ("tool_calls", "function_call")))
        if speaker in message and (content in message or is_call):
            role = str(message[speaker]).strip().lower()
            if role not in ROLES:
                raise BadRow(f"its role {message[speaker]!r} is none of {', '.join(ROLES)}")
            return ROLES[role], message.get(content)
    raise BadRow(f"it needs role and content, or from and value, but has {', '.join(map(str, message)) or 'nothing'}")


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise BadRow(f"a part of its content is of type {kind!r}; only parts of type 'text' can be read")
