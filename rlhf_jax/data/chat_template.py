"""Encodes dialogues to token ids and spans with loss, by the tokenizer's own chat template where it has one.

The ids equal those of `tokenizer.apply_chat_template`, and end with the last answer: a conversation is rendered by the
template and then encoded without further special tokens (the template writes BOS and EOS itself, so there is never a
second BOS). One thing differs: text of a user, a system or a tool that spells a control token, such as "</s>", is
encoded as plain characters. In an answer it is that token, since models emit some of them (`<think>`, `<tool_call>`).

`rendering` writes and encodes texts, `answer_spans` finds the answers in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jinja2
import numpy as np

from rlhf_jax.data.answer_spans import answer_ranges, tagged_ranges, token_spans
from rlhf_jax.data.records import Dialogue, Turn, Turns
from rlhf_jax.data.rendering import (
    FOLD_SYSTEM,
    GENERATION,
    Chat,
    Failure,
    Range,
    encode_around,
    encode_texts,
    find_controls,
    render,
    set_date,
    spelled_ranges,
    spells_control,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one field; transformers fills in the others
# In one dialogue in CHATS_PER_CHECK the tokens of the answers are also found exactly; both results must agree.
CHATS_PER_CHECK = 512


class Encoding(NamedTuple):
    """A dialogue in tokens."""

    tokens: np.ndarray  # [T] int32
    spans: np.ndarray  # [k, 2] int32: tokens[a:b] is the text of an assistant turn with its EOS or end of turn
    score: float = 0.0  # of an answer of a pair or a ranking; NaN where it only fills a row


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: str = "", system: str = "template", date: str = ""
) -> PreTrainedTokenizerBase:
    """The tokenizer itself, changed in place: it gets a chat template and a padding token where it has none.

    `template` replaces its own: Jinja text, or, if it contains no {, the path of a file of it. The
    default is `CHAT_TEMPLATE`, with BOS in front if this tokenizer puts BOS before a text. The padding token becomes
    EOS: masks accompany the tokens, so no code compares ids with it. With `system` "fold" the template puts a system
    text in front of the first question. A template that asks for the date gets `date`, by `set_date`. ValueError if
    there is no EOS, or if `template` is neither Jinja nor a readable file.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no answer can end: set its eos_token and save it again")
    if template:
        template = read_template(template)
        _check_template(template)
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        starts_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + CHAT_TEMPLATE
    if system == "fold" and not str(tokenizer.chat_template).startswith(FOLD_SYSTEM):
        tokenizer.chat_template = FOLD_SYSTEM + tokenizer.get_chat_template()
    set_date(tokenizer, date)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_template(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template  # where used: it takes seconds

    try:
        render_jinja_template([[]], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"data.template, line {error.lineno}: no Jinja template: {error.message}") from error
    except Exception:  # it parses, and need not write an empty dialogue
        return


def read_template(path: str) -> str:
    """The Jinja text that `data.template` is or names; "" is "". ValueError where that file cannot be read."""
    if not path or "{" in path:
        return path
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise ValueError(
            f"data.template: the file {path!r} cannot be read ({what}); give the path of a file of Jinja, or Jinja text"
        ) from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, dialogue: Turns | Dialogue) -> list[int]:
    """Ids of one prompt, up to where the answer begins. ValueError if the tokenizer's template rejects it."""
    return _single(encode_prompts(tokenizer, [dialogue])).tolist()


def encode_response(tokenizer: PreTrainedTokenizerBase, dialogue: Turns | Dialogue, text: str) -> list[int]:
    """Ids of one answer after that prompt, ending on the EOS or end-of-turn id. ValueError as `encode_dialogues`."""
    turns, tools = _dialogue(dialogue)
    encoded = _single(encode_dialogues(tokenizer, [Dialogue((*turns, Turn("assistant", text)), tools)]))
    return encoded.tokens[encoded.spans[-1, 0] :].tolist()


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: EOS, and the end-of-turn id of the chat template if that is another."""
    return tuple(sorted({tokenizer.eos_token_id, encode_response(tokenizer, (("user", "a"),), "a")[-1]}))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, histories: Sequence[Turns | Dialogue]
) -> list[np.ndarray | Failure]:
    """One int32 array per history: the rendered turns and the opening of the answer to come.

    A Failure where the tokenizer's template rejects a history (some insist that the roles alternate).
    """
    chats = [_chat(_dialogue(each)) for each in histories]
    return [each if isinstance(each, ValueError) else each[1] for each in _encode(tokenizer, chats, opened=True)]


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Turns | Dialogue],
    *,
    all_turns: bool = False,
    first: Sequence[int] = (),
) -> list[Encoding | Failure]:
    """Dialogues that end on an assistant turn, with the span of that turn, or with `all_turns` of every assistant turn.

    first: for each dialogue the turn from which on all of the assistant's have spans, instead.

    An assistant turn is what follows the prompt that `encode_prompts` returns for the turns before it, as far as the
    whole dialogue has that prompt, up to the EOS or end-of-turn id, which is the first control token after its text.
    With `all_turns` a template with `{% generation %}` says itself what the turns are. Anything that a template writes
    after the end of the last turn (ChatML's line break) is cut off; EOS is added where a template ends the turn
    without a control token.

    A Failure where an answer cannot be found, or where the template rejects the dialogue.
    """
    dialogues = [_dialogue(each) for each in dialogues]
    assert all(turns[-1].role == "assistant" for turns, _ in dialogues)
    chats = [_chat(each) for each in dialogues]
    found: list = _encode(tokenizer, chats, opened=False)
    good = [i for i, each in enumerate(found) if not isinstance(each, ValueError)]
    answers = {i: [len(chats[i].messages) - 1] for i in good}
    if all_turns:
        turns = {i: dialogues[i].turns for i in good}
        answers = {i: [k for k, t in enumerate(turns[i]) if t.role == "assistant" and t.is_learned] for i in good}
    if first:
        turns = {i: dialogues[i].turns for i in good}
        answers = {i: [k for k in range(first[i], len(turns[i])) if turns[i][k].role == "assistant"] for i in good}
    openings = [(i, k) for i in good for k in answers[i]]
    parts = [Chat(chats[i].messages[:k], chats[i].tools) for i, k in openings]
    prompts: dict[int, list] = {i: [] for i in good}
    is_tagged = all_turns and GENERATION.search(str(tokenizer.chat_template))
    for (i, _), prompt in zip(openings, render(tokenizer, parts, opened=True), strict=True):
        prompts[i].append(prompt)

    def encode(i: int, exact: bool) -> Encoding | Failure:
        if not answers[i]:
            return ValueError("no turn of the assistant is to be learned")
        try:
            ranges = tagged_ranges(tokenizer, chats[i], found[i][0], answers[i]) if is_tagged else None
            ranges = ranges or answer_ranges(tokenizer, chats[i], found[i][0], answers[i], prompts[i])
            said = dialogues[i].turns[answers[i][-1]].content
            return _require_answer(_find_spans(tokenizer, found[i], ranges, exact), said)
        except ValueError as error:
            return error

    encoded = [encode(i, exact=False) if i in prompts else found[i] for i in range(len(chats))]
    # Where these differ, tokens before an answer depend on it in a way that their bytes do not show.
    if any(not _equal(encoded[i], encode(i, exact=True)) for i in good[::CHATS_PER_CHECK]):
        encoded = [encode(i, exact=True) if i in prompts else found[i] for i in range(len(chats))]
    return encoded


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """One int32 array per text, without a template: BOS where the tokenizer puts one before a text, and EOS at the end.

    Text that spells a special token is text, as in a dialogue.
    """
    if not texts:
        return []
    starts_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    front, end = [tokenizer.bos_token_id] * starts_with_bos, [tokenizer.eos_token_id]
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return [np.array([*front, *each, *end], np.int32) for each in ids]


def _require_answer(found: Encoding, answer: str) -> Encoding | Failure:
    """A Failure where the encoding of an answer is only its end: the model would learn to say nothing."""
    if answer and found.spans[-1, 1] - found.spans[-1, 0] < 2:
        return ValueError(
            f"the tokenizer's chat template, or the tokenizer, writes nothing of the answer {answer[:60]!r}: fix "
            "data.template, or remove the tokenizer's chat_template to use the default one"
        )
    return found


def _equal(one: Encoding | Failure, other: Encoding | Failure) -> bool:
    if isinstance(one, ValueError) or isinstance(other, ValueError):
        return isinstance(one, ValueError) and isinstance(other, ValueError)
    return all(map(np.array_equal, one, other))


def _encode(
    tokenizer: PreTrainedTokenizerBase, chats: list[Chat], *, opened: bool
) -> list[tuple[str, np.ndarray, list[Range]] | Failure]:
    """The text of each chat, its ids, and where a control token in it is spelled by others than the assistant."""
    texts, spells = render(tokenizer, chats, opened=opened), spells_control(tokenizer)
    found: list = [_check_fields(tokenizer, *each) for each in zip(chats, texts, strict=True)]
    texts = found.copy()
    good = [i for i, text in enumerate(texts) if isinstance(text, str)]
    for i, ids in zip(good, encode_texts(tokenizer, [texts[i] for i in good]), strict=True):
        found[i] = texts[i], ids, []
        if spells(chats[i]):
            try:
                ranges = spelled_ranges(tokenizer, chats[i], texts[i], opened=opened)
                found[i] = texts[i], encode_around(tokenizer, texts[i], ranges), ranges
            except ValueError as error:
                found[i] = error
        if not isinstance(found[i], ValueError):
            found[i] = check_ids(tokenizer, found[i][1]) or found[i]
    return found


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> Failure | None:
    """Why a model with fewer rows in its embedding than its tokenizer has ids cannot read these, or None."""
    rows = getattr(tokenizer, "num_rows", len(tokenizer))
    beyond = sorted({int(each) for each in ids if each >= rows})
    if not beyond:
        return None
    text = tokenizer.convert_ids_to_tokens(beyond[0])
    return ValueError(f"{text!r} in it has the id {beyond[0]}, and the model's embedding only {rows} rows: remove it")


def _check_fields(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str | Failure) -> str | Failure:
    """The text, or a Failure if the chat has reasoning, tools or calls of them that the template does not read."""
    if not chat.tools and all(len(message) == 2 for message in chat.messages):
        return text
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return ValueError("a field of its messages or tools holds a lone surrogate, as in truncated text")
    template = str(tokenizer.chat_template)
    given = {key for message in chat.messages for key, value in message.items() if value}
    for names in (REASONING, ("tool_calls",), ("tools",)):
        here = given.intersection(names) or (chat.tools and "tools" in names)
        if here and not any(name in template for name in names):
            return ValueError(
                f"the chat template does not write the {names[0]} that the row has, which would be lost: give a "
                "template that does (data.template), or remove them"
            )
    return text


def find_unwritten(tokenizer: PreTrainedTokenizerBase, dialogue: Turns | Dialogue, first: int) -> list[str]:
    """The parts of a dialogue that its text lacks, keys of messages and "reasoning of answers"; [] if there is no text.

    A key is lacking if the text is the same without it, and a reasoning, from turn `first` on, if the text has it
    nowhere. `_check_fields` refuses those that a template never writes.
    """
    turns, tools = _dialogue(dialogue)
    said = [turn for turn in turns[first:] if turn.role == "assistant" and turn.is_learned]
    thoughts = [str(turn.extra.get(name) or "").strip() for turn in said for name in REASONING]
    thoughts += [turn.content.rpartition("</think>")[0].replace("<think>", "").strip() for turn in said]
    keys = {key for turn in turns for key, value in turn.extra.items() if value} - {*REASONING, "tool_calls"}
    if not keys and not any(thoughts):
        return []
    messages, opened = _chat(Dialogue(turns)).messages, turns[-1].role != "assistant"

    def render_without(left_out: set[str]) -> str | Failure:
        kept = [{key: value for key, value in message.items() if key not in left_out} for message in messages]
        return render(tokenizer, [Chat(kept, tools)], opened=opened)[0]

    whole = render_without(set())
    if isinstance(whole, ValueError):
        return []
    if keys and render_without(keys) != whole:
        keys = {key for key in keys if render_without({key}) == whole}
    return sorted(keys) + ["reasoning of answers"] * any(thought not in whole for thought in thoughts)


def _find_spans(
    tokenizer: PreTrainedTokenizerBase,
    encoded: tuple[str, np.ndarray, list[Range]],
    ranges: Sequence[Range],
    exact: bool,
) -> Encoding:
    """An encoded dialogue with the spans of its answers. ValueError where tokens run across the start of an answer."""
    text, ids, spelled = encoded

    def encode(part: str) -> np.ndarray:
        return encode_around(tokenizer, part, spelled) if spelled else encode_texts(tokenizer, [part])[0]

    spans = token_spans(tokenizer, ids, text, ranges, encode, exact=exact)
    first, stop = spans[-1]
    ids = ids[:stop]
    ends = {*find_controls(tokenizer).ids.values(), tokenizer.eos_token_id} - {tokenizer.unk_token_id}
    if stop == first or int(ids[-1]) not in ends:
        ids = np.append(ids, np.int32(tokenizer.eos_token_id))
        spans[-1] = (first, stop + 1)
    return Encoding(ids, np.array(spans, np.int32))


def _dialogue(dialogue: Turns | Dialogue) -> Dialogue:
    turns, tools = dialogue if isinstance(dialogue, Dialogue) else (dialogue, ())
    return Dialogue(tuple(Turn(*turn) for turn in turns), tools)


def _chat(dialogue: Dialogue) -> Chat:
    return Chat([{"role": t.role, "content": t.content, **t.extra} for t in dialogue.turns], dialogue.tools)


def _single(found: list[np.ndarray | Encoding | Failure]) -> np.ndarray | Encoding:
    (each,) = found
    if isinstance(each, ValueError):
        raise each
    return each
