"""Encodes dialogues to token ids and spans with loss, by the tokenizer's own chat template where it has one.

A conversation is rendered by the template and then encoded without further special tokens: the template writes BOS and
EOS itself, so there is never a second BOS. Text of a user or an assistant that happens to spell a special token, such
as "</s>", is encoded as plain characters; only the template writes control tokens.

A dialogue is encoded once, and the first and last token of an answer are found by the bytes that each token stands for;
`_encode_by_parts` finds the same by encoding every prefix of the dialogue, which is slower and exact.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.records import Turns

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # a single byte, in vocabularies that fall back to bytes
_byte_counts: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, np.ndarray] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[ids] int64, bytes of each token; a guess unless the vocabulary is byte-level or SentencePiece's.

    A wrong guess does no harm: `token_ends` checks that the bytes of a text's tokens add up to those of the text.
    """
    if tokenizer not in _byte_counts:
        _byte_counts[tokenizer] = _count_bytes(tokenizer)
    return _byte_counts[tokenizer]


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, text: str) -> np.ndarray | None:
    """[T] int64, bytes of `text` up to the end of each token; None if the tokens do not spell the text byte by byte."""
    ends = np.cumsum(token_bytes(tokenizer)[ids])
    return ends if ends.size and ends[-1] == byte_length(text) else None


def byte_length(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _count_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
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


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

# One dialogue in CHATS_PER_CHECK is also encoded by parts; both results must agree.
CHATS_PER_CHECK = 512


class Encoding(NamedTuple):
    """A dialogue in tokens."""

    tokens: np.ndarray  # [T] int32
    spans: np.ndarray  # [k, 2] int32: tokens[a:b] is the text of an assistant turn with its EOS or end of turn


Failure = ValueError  # returned in place of a dialogue that cannot be encoded, so that the others still are


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer itself, changed in place: it gets a chat template and a padding token where it has none.

    `template` replaces its own: Jinja text, or, if it contains no {, the path of a file of it. The
    default is `CHAT_TEMPLATE`, with BOS in front if this tokenizer puts BOS before a text. The padding token becomes
    EOS: masks accompany the tokens, so no code compares ids with it. ValueError if there is no EOS, or if
    `template` is neither Jinja nor a readable file.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no answer can end: set its eos_token and save it again")
    if template:
        template = template if "{" in template else _read_template(template)
        try:
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"data.template, line {error.lineno}: no Jinja template: {error.message}") from error
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        starts_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + CHAT_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise ValueError(
            f"data.template: the file {path!r} cannot be read ({what}); give the path of a file of Jinja, or Jinja text"
        ) from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> list[int]:
    """Ids of one prompt, up to where the answer begins. ValueError if the tokenizer's template rejects it."""
    return _single(encode_prompts(tokenizer, [turns])).tolist()


def encode_response(tokenizer: PreTrainedTokenizerBase, turns: Turns, text: str) -> list[int]:
    """Ids of one answer after that prompt, ending on the EOS or end-of-turn id. ValueError as `encode_dialogues`."""
    encoded = _single(encode_dialogues(tokenizer, [(*turns, ("assistant", text))]))
    return encoded.tokens[encoded.spans[-1, 0] :].tolist()


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: EOS, and the end-of-turn id of the chat template if that is another."""
    return tuple(sorted({tokenizer.eos_token_id, encode_response(tokenizer, (("user", "a"),), "a")[-1]}))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, histories: Sequence[Turns]) -> list[np.ndarray | Failure]:
    """One int32 array per history: the rendered turns and the opening of the answer to come.

    A Failure where the tokenizer's template rejects a history (some insist that the roles alternate).
    """
    chats = [_messages(turns) for turns in histories]
    texts = _render(tokenizer, chats, opened=True)
    found: list[np.ndarray | Failure] = list(texts)
    good = [i for i, text in enumerate(texts) if isinstance(text, str)]
    spells_control = _spells_control(tokenizer)
    for i, ids in zip(good, _encode(tokenizer, [texts[i] for i in good]), strict=True):
        found[i] = _ids(tokenizer, chats[i], opened=True) if spells_control(chats[i]) else ids
    return found


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Turns], *, all_turns: bool = False
) -> list[Encoding | Failure]:
    """Dialogues that end on an assistant turn, with the span of that turn, or with `all_turns` of every assistant turn.

    An assistant turn is the part of the dialogue after the prompt that `encode_prompts` returns for the turns before
    it, up to the EOS or end-of-turn id. Anything that a template writes after the end of the last turn (ChatML's line
    break) is cut off; EOS is added where a template ends the turn without a control token.

    A Failure where a prompt is not a prefix of its dialogue, or where the template rejects it.
    """
    assert all(turns[-1][0] == "assistant" for turns in dialogues)
    chats = [_messages(turns) for turns in dialogues]
    answers = [[k for k, (role, _) in enumerate(turns) if role == "assistant"] for turns in dialogues]
    answers = answers if all_turns else [each[-1:] for each in answers]
    parts = [(chat, k) for chat, each in zip(chats, answers, strict=True) for k in each]
    opened = iter(_render(tokenizer, [chat[:k] for chat, k in parts], opened=True))
    upto = iter(_render(tokenizer, [chat[: k + 1] for chat, k in parts], opened=False))
    rendered = [[(next(opened), next(upto)) for _ in each] for each in answers]
    failures = [next((text for text in sum(each, ()) if isinstance(text, ValueError)), None) for each in rendered]
    good = [i for i, failure in enumerate(failures) if failure is None]
    tokens = dict(zip(good, _encode(tokenizer, [rendered[i][-1][1] for i in good]), strict=True))
    spells_control, ends = _spells_control(tokenizer), _ends(tokenizer)

    def exact(i: int) -> Encoding | Failure:
        return _encode_by_parts(tokenizer, chats[i], answers[i], ends)

    def encode(i: int) -> Encoding | Failure:
        if failures[i] is not None:
            return failures[i]
        fast = None if spells_control(chats[i]) else _encode_by_bytes(tokens[i], rendered[i], ends, tokenizer)
        return exact(i) if fast is None else fast

    found = [encode(i) for i in range(len(chats))]
    # Where these differ, tokens before an answer depend on it in a way that their bytes do not show.
    if any(not _equal(found[i], exact(i)) for i in good[::CHATS_PER_CHECK]):
        found = [exact(i) for i in range(len(chats))]
    return [_require_answer(each, turns[-1][1]) for each, turns in zip(found, dialogues, strict=True)]


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


def _require_answer(found: Encoding | Failure, answer: str) -> Encoding | Failure:
    """A Failure where the encoding of an answer is only its end: the model would learn to say nothing."""
    if answer and isinstance(found, Encoding) and found.spans[-1, 1] - found.spans[-1, 0] < 2:
        return ValueError(
            f"the tokenizer's chat template, or the tokenizer, writes nothing of the answer {answer[:60]!r}: fix "
            "data.template, or remove the tokenizer's chat_template to use the default one"
        )
    return found


def _equal(one: Encoding | Failure, other: Encoding | Failure) -> bool:
    if isinstance(one, ValueError) or isinstance(other, ValueError):
        return isinstance(one, ValueError) and isinstance(other, ValueError)
    return all(map(np.array_equal, one, other))


def _encode_by_bytes(
    ids: np.ndarray, rendered: list[tuple[str, str]], ends: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> Encoding | None:
    """The dialogue with its spans; None where the texts are no prefixes of it, or a token spans the start of an answer.

    rendered: for each answer the dialogue up to it, opened, and with it; `ids` encode the last one, the whole dialogue.
    """
    whole = rendered[-1][1]
    places = token_ends(tokenizer, ids, whole)
    if places is None or not all(whole.startswith(text) for pair in rendered for text in pair):
        return None
    spans = []
    for opened, upto in rendered:
        begin = byte_length(opened)
        first, stop = np.searchsorted(places, (begin, byte_length(upto)), side="right").tolist()
        if begin != (places[first - 1] if first else 0):
            return None
        spans.append((first, _answer_end(ids, first, stop, ends)))
    return _finish(ids, spans, ends, tokenizer.eos_token_id)


def _encode_by_parts(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], answers: Sequence[int], ends: frozenset[int]
) -> Encoding | Failure:
    """The result of `_encode_by_bytes`, by encoding the dialogue up to each answer, and with it."""
    try:
        whole, spans = _ids(tokenizer, chat, opened=False), []
        for k in answers:
            for part, opened in ((chat[:k], True), (chat[: k + 1], False)):
                ids = _ids(tokenizer, part, opened=opened)
                if not np.array_equal(whole[: len(ids)], ids):
                    return ValueError(
                        "this tokenizer encodes a prompt differently once an answer follows it: "
                        f"{tokenizer.decode(ids)[-60:]!r} is no beginning of {tokenizer.decode(whole)[-120:]!r}. "
                        "Give it a chat_template that writes the same text before an answer as for "
                        "add_generation_prompt (data.template), or remove its chat_template to use the default one"
                    )
                spans.append(len(ids))
    except ValueError as error:  # the template rejects it
        return error
    pairs = zip(spans[::2], spans[1::2], strict=True)
    spans = [(first, _answer_end(whole, first, stop, ends)) for first, stop in pairs]
    return _finish(whole, spans, ends, tokenizer.eos_token_id)


def _answer_end(ids: np.ndarray, first: int, stop: int, ends: frozenset[int]) -> int:
    """Index after the last control token of ids[first:stop]; `stop` where there is none."""
    return next((t + 1 for t in range(stop - 1, first - 1, -1) if int(ids[t]) in ends), stop)


def _finish(tokens: np.ndarray, spans: list[tuple[int, int]], ends: frozenset[int], eos: int) -> Encoding:
    """The encoding without tokens after its last span, and with EOS where that span has no end."""
    first, stop = spans[-1]
    tokens = tokens[:stop]
    if stop == first or int(tokens[-1]) not in ends:
        tokens = np.append(tokens, np.int32(eos))
        spans[-1] = (first, stop + 1)
    return Encoding(tokens, np.array(spans, np.int32))


def _ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    controls = (i for i, token in added if token.special and i != tokenizer.unk_token_id)
    return frozenset((*controls, tokenizer.eos_token_id))


def _messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _spells_control(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, str]]], bool]:
    """Whether any message of a chat spells an added token."""
    names = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    search = re.compile("|".join(names) or "(?!)").search
    return lambda chat: any(search(message["content"]) for message in chat)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """int32 ids of rendered texts, in which spelled control tokens are control tokens."""
    backend = tokenizer.backend_tokenizer
    # Reset what a call of transformers may have left there.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return [np.array(each.ids, np.int32) for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _ids(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], *, opened: bool) -> np.ndarray:
    """One chat, whose texts may spell control tokens; see `sanitize_control_tokens` in transformers."""
    (ids,) = _apply(tokenizer, [chat], opened=opened, tokenize=True, sanitize_control_tokens=True)
    return np.array(ids, np.int32)


def _render(
    tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]], *, opened: bool
) -> list[str | Failure]:
    if not chats:
        return []
    try:
        return _apply(tokenizer, chats, opened=opened, tokenize=False)
    except ValueError as error:
        if len(chats) == 1:
            return [error]
        return [text for chat in chats for text in _render(tokenizer, [chat], opened=opened)]


def _apply(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]], *, opened: bool, **options) -> list:
    try:
        return tokenizer.apply_chat_template(chats, add_generation_prompt=opened, return_dict=False, **options)
    except Exception as error:  # a template is a program: besides rejecting, it may fail in any way
        what = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the tokenizer's chat template refuses a dialogue: {what.rstrip('.')}; data.template replaces it"
        ) from error


def _single(found: list[np.ndarray | Encoding | Failure]) -> np.ndarray | Encoding:
    (each,) = found
    if isinstance(each, ValueError):
        raise each
    return each
