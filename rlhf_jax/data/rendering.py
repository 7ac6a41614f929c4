"""Writes dialogues by a tokenizer's chat template, and encodes what it wrote.

A control token is a special token, or another added token that the chat template itself writes (`<think>`). Where a
user's, a system's or a tool's text spells one, it stays text; in an answer it is its token, as in the reference,
`tokenizer.apply_chat_template`. The template is given the texts as they are: a second rendering with marks around what
is spelled shows where it wrote them, and that second rendering without its marks must equal the first.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jinja2
import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Failure = ValueError  # returned in place of a dialogue that cannot be encoded, so that the others still are

FOLD_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' and messages[1:] and messages[1]['role'] == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content': "
    "messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] -%}"
    "{%- endif -%}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the tag around what a template lets the assistant say
DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")  # of strftime
PERCENT = "\U000f8002"  # a percent sign that begins no directive
ALIAS = "\U000f8000{}\U000f8001"  # of control tokens, in characters for private use


class Chat(NamedTuple):
    """A dialogue as a chat template reads it."""

    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...] = ()


class Range(NamedTuple):
    """Characters start to end of a text."""

    start: int
    end: int


class Controls(NamedTuple):
    """The control tokens of a tokenizer with its chat template."""

    ids: dict[str, int]
    pattern: re.Pattern[str]  # any of them


def per_template(function: Callable[[PreTrainedTokenizerBase], T]) -> Callable[[PreTrainedTokenizerBase], T]:
    """The function, computed once for a tokenizer and its chat template."""
    found: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, T]] = weakref.WeakKeyDictionary()

    def recall(tokenizer: PreTrainedTokenizerBase) -> T:
        if tokenizer not in found or found[tokenizer][0] != tokenizer.chat_template:
            found[tokenizer] = tokenizer.chat_template, function(tokenizer)
        return found[tokenizer][1]

    return recall


@per_template
def find_controls(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """The control tokens, without those of whitespace alone, which templates write as ordinary text."""
    written = str(tokenizer.chat_template)
    added = ((token, i) for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip())
    ids = {token.content: i for token, i in added if token.special or token.content in written}
    longest_first = sorted(ids, key=len, reverse=True)
    return Controls(ids, re.compile("|".join(map(re.escape, longest_first)) or "(?!)"))


def render(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], *, opened: bool) -> list[str | Failure]:
    """The text of each chat, with `opened` with the opening of the next answer; a Failure where the template fails."""
    if not chats:
        return []
    try:
        tools = chats[0].tools
        if any(chat.tools != tools for chat in chats):
            return [text for chat in chats for text in render(tokenizer, [chat], opened=opened)]
        tools = list(tools) or None
        return tokenizer.apply_chat_template(
            [_as_read(tokenizer, chat.messages) for chat in chats],
            tools=tools,
            chat_template=dated_template(tokenizer, tokenizer.get_chat_template(tools=tools)),
            add_generation_prompt=opened,
            tokenize=False,
        )
    except Exception as error:  # a template is a program: besides rejecting, it may fail in any way
        if len(chats) > 1:
            return [text for chat in chats for text in render(tokenizer, [chat], opened=opened)]
        return [_template_failure(error, chats[0])]


def dated_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """A chat template of this tokenizer; where it asks for the date, with that of `set_date` in place of the clock's.

    transformers passes no functions to templates, so `strftime_now` is a macro in front of the template's text that
    replaces the directives which the template contains.
    """
    if "strftime_now" not in template:
        return template
    now, filters = datetime.fromisoformat(tokenizer.date_of_template), ""
    for directive in dict.fromkeys(DIRECTIVE.findall(template)):
        filters += f" | replace({directive!r}, {now.strftime(directive)!r})"
    text = f"{{{{ format | replace('%%', '{PERCENT}'){filters} | replace('{PERCENT}', '%') }}}}"
    return f"{{%- macro strftime_now(format) -%}}{text}{{%- endmacro %}}{{{{ '' }}}}{template}"


def set_date(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """Fix the date that the tokenizer's template writes, ISO 8601; "": now. It is not saved with the tokenizer."""
    tokenizer.date_of_template = date or datetime.now().isoformat(timespec="seconds")


@per_template
def _reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a text only as a list of parts, as those of multimodal models may."""
    for content in ("qzx", [{"type": "text", "text": "qzx"}]):
        try:
            chat = [{"role": "user", "content": content}]
            if "qzx" in tokenizer.apply_chat_template(chat, tokenize=False):
                return isinstance(content, list)
        except Exception:  # noqa: S112 - a template is a program: where it fails on this, it does not read it
            continue
    return False


def _as_read(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their texts in the form that the chat template reads."""
    if not _reads_parts(tokenizer):
        return messages
    texts = {i: message.get("content") for i, message in enumerate(messages)}
    parts = {i: [{"type": "text", "text": text}] for i, text in texts.items() if isinstance(text, str)}
    return [{**message, "content": parts[i]} if i in parts else message for i, message in enumerate(messages)]


def render_generation(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, list[Range]]:
    """The text of a chat, and what its template marks as the assistant's by `{% generation %}`."""
    from transformers.utils.chat_template_utils import render_jinja_template  # where used: it takes seconds

    tools = list(chat.tools) or None
    (text,), (ranges,) = render_jinja_template(
        [
            [
                {key: value for key, value in message.items() if value is not None}
                for message in _as_read(tokenizer, chat.messages)
            ]
        ],
        tools=tools,
        chat_template=dated_template(tokenizer, tokenizer.get_chat_template(tools=tools)),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, [Range(*each) for each in ranges]


def _template_failure(error: Exception, chat: Chat) -> Failure:
    what = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    failure = f"the tokenizer's chat template refuses a dialogue: {what.rstrip('.')}; data.template replaces it"
    if any(message["role"] == "system" for message in chat.messages):
        failure += ', and data.system = "fold" puts a system text in front of the first question'
    return ValueError(failure)


def strings_of(value: Any) -> Iterator[str]:
    """Every text of a message or of tools, names of fields included, and roles left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            if key != "role":
                yield from strings_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings_of(each)


def spells_control(tokenizer: PreTrainedTokenizerBase) -> Callable[[Chat], bool]:
    """Whether any text of a chat that no assistant wrote spells a control token."""
    controls, backend = find_controls(tokenizer), tokenizer.backend_tokenizer
    added = tokenizer.added_tokens_decoder
    # Such tokens are looked for in the normalised text, which may spell them where the text itself does not.
    is_normalised = backend.normalizer is not None and any(added[i].normalized for i in controls.ids.values())

    def spells(text: str) -> bool:
        search = controls.pattern.search
        return bool(search(text) or (is_normalised and search(backend.normalizer.normalize_str(text))))

    def chat_spells(chat: Chat) -> bool:
        given = [message for message in chat.messages if message["role"] != "assistant"]
        return any(map(spells, strings_of([given, chat.tools])))

    return chat_spells


def spelled_ranges(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    text: str,
    *,
    opened: bool = False,
    pattern: re.Pattern[str] | None = None,
    message: int | None = None,
) -> list[Range]:
    """Where the rendered `text` of a chat has control tokens that its users, systems, tools and tool results spell.

    Args:
        pattern: what is looked for instead of control tokens.
        message: index of the one message that is looked at instead.

    ValueError if the template takes such texts apart, so that they cannot be found in the text.
    """
    pattern = pattern or find_controls(tokenizer).pattern
    unused = (chr(code) for code in range(0xF0000, 0xFFFFD) if chr(code) not in text)
    before, after = next(unused), next(unused)

    def mark(value: Any, substitute: Callable[[re.Match[str]], str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(substitute, value)
        if isinstance(value, dict):
            items = value.items()
            return {mark(k, substitute): v if k == "role" else mark(v, substitute) for k, v in items}
        return [mark(each, substitute) for each in value] if isinstance(value, list | tuple) else value

    def is_marked(i: int) -> bool:
        return chat.messages[i]["role"] != "assistant" if message is None else i == message

    def both(match: re.Match[str]) -> str:
        return before + match[0] + after

    def inner(match: re.Match[str]) -> str:  # for templates that ask what a text begins or ends with
        return match[0] + after if not match.string[: match.start()].strip() else before + match[0]

    for substitute in (both, inner):
        messages = [mark(each, substitute) if is_marked(i) else each for i, each in enumerate(chat.messages)]
        tools = tuple(mark(chat.tools, substitute)) if message is None else chat.tools
        (marked,) = render(tokenizer, [Chat(messages, tools)], opened=opened)
        if isinstance(marked, ValueError) or marked.replace(before, "").replace(after, "") != text:
            continue
        ranges, whole, removed = [], [], 0
        for found in re.finditer(f"{before}|{after}|{pattern.pattern}", marked):
            if found[0] in (before, after):
                removed += 1
                continue
            sides = (marked[found.start() - 1 : found.start()] == before, marked[found.end() :][:1] == after)
            whole.append(Range(found.start() - removed, found.end() - removed))
            ranges += whole[-1:] if (all if substitute is both else any)(sides) else []
        # Otherwise the marks have changed which control tokens the text has.
        if whole == [Range(*each.span()) for each in pattern.finditer(text)]:
            return ranges
    spelled = next((m[0] for each in strings_of(chat.messages) for m in pattern.finditer(each)), "a control token")
    raise ValueError(
        f"a text spells {spelled!r}, and the chat template takes that text apart, so that it cannot be kept from "
        "becoming a control token: change the text, or the template (data.template)"
    )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 ids of rendered texts, in which spelled control tokens are control tokens."""
    backend = tokenizer.backend_tokenizer
    # Reset what a call of transformers may have left there.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return [np.array(each.ids, np.int32) for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_around(tokenizer: PreTrainedTokenizerBase, text: str, ranges: Sequence[Range]) -> np.ndarray:
    """int32 ids of a rendered text, in which the control tokens at `ranges` stay text.

    The text is encoded at once by a tokenizer whose control tokens have other names, so that pieces next to a range
    are encoded as without it. ValueError if a control token results from text nevertheless.
    """
    controls, (backend, ids_of) = find_controls(tokenizer), _alias_tokenizer(tokenizer)
    if "\U000f8000" in text:
        raise ValueError("a text has the character U+F8000, which encoding uses, next to the name of a control token")
    spelled, real = set(ranges), []

    def rename(match: re.Match[str]) -> str:
        if match.span() in spelled:
            return match[0]
        real.append(controls.ids[match[0]])
        return ALIAS.format(real[-1])

    renamed = controls.pattern.sub(rename, text)
    ids = ids_of[np.array(backend.encode(renamed, add_special_tokens=False).ids, np.int64)]
    checked = [i for i in controls.ids.values() if i != tokenizer.unk_token_id]
    if ids[np.isin(ids, checked)].tolist() != [i for i in real if i != tokenizer.unk_token_id]:
        raise ValueError("the tokenizer makes a control token of a text that spells its name: change the text")
    return ids.astype(np.int32)


@per_template
def _alias_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer with its control tokens called by their `ALIAS`, and [its ids] the id of each here."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, names = state["model"], {name: ALIAS.format(i) for name, i in find_controls(tokenizer).ids.items()}
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", ()))
    merged = {"".join(pair) for pair in pairs}
    kept = {name: alias for name, alias in names.items() if name not in merged}  # in the vocabulary itself
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {kept.get(piece, piece): i for piece, i in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[kept.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in kept:
        model["unk_token"] = kept[model["unk_token"]]
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    backend = Tokenizer.from_str(json.dumps({**state, "post_processor": None, "truncation": None, "padding": None}))
    ids_of = np.arange(max(backend.get_vocab(with_added_tokens=True).values()) + 1)
    for i, token in tokenizer.added_tokens_decoder.items():
        found = backend.token_to_id(names.get(token.content, token.content))
        ids_of[i if found is None else found] = i
    return backend, ids_of
