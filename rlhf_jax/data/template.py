"""Dialogues to token ids, through the tokenizer's own chat template where it has one.

A conversation is rendered by the template and then encoded without further special tokens: the template writes BOS and
EOS itself, so there is never a second BOS. Text of a user or an assistant that happens to spell a special token, as
"</s>", is encoded as the plain characters that it is; only what the template writes becomes a control token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.splits import Turns

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

# The encodings of a call hold some hundred bytes a token until they are turned into arrays.
TEXTS_PER_CALL = 1024


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, changed in place: with a chat template and a padding token where it had none.

    The default template is `CHAT_TEMPLATE`, with BOS in front if this tokenizer puts BOS before a text. The padding
    token becomes EOS: masks are carried with the tokens, nothing compares ids with it. ValueError if there is no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no answer can end: set its eos_token and save it again")
    if tokenizer.chat_template is None:
        starts_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + CHAT_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> list[int]:
    """Ids of one prompt, up to where the answer begins. ValueError as `encode_prompts`."""
    return encode_prompts(tokenizer, [turns])[0].tolist()


def encode_response(tokenizer: PreTrainedTokenizerBase, turns: Turns, text: str) -> list[int]:
    """Ids of one answer after that prompt, ending on the EOS or end-of-turn id. ValueError as `encode_responses`."""
    return encode_responses(tokenizer, [turns], [text], encode_prompts(tokenizer, [turns]))[0].tolist()


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: EOS, and the end-of-turn id of the chat template if that is another."""
    return tuple(sorted({tokenizer.eos_token_id, encode_response(tokenizer, (("user", "a"),), "a")[-1]}))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, histories: Sequence[Turns]) -> list[np.ndarray]:
    """One int32 array a history: the rendered turns and the opening of the answer that is to come.

    ValueError if the tokenizer's template refuses a history (some insist that the roles alternate).
    """
    return _encode(tokenizer, [_messages(turns) for turns in histories], opened=True)


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, histories: Sequence[Turns], texts: Sequence[str], prompts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """One int32 array an answer: what the whole dialogue has after its prompt, up to the EOS or end-of-turn id.

    `prompts` are those that `encode_prompts` gives for the same histories. What a template writes after the end of the
    turn (ChatML's line break) is cut off; EOS is added where a template ends an answer with no control token.
    ValueError if a prompt is not the beginning of its dialogue, or if the template refuses it.
    """
    chats = [[*_messages(turns), _message("assistant", text)] for turns, text in zip(histories, texts, strict=True)]
    dialogues = _encode(tokenizer, chats, opened=False)
    ends = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != tokenizer.unk_token_id]
    ends = np.array([*ends, tokenizer.eos_token_id], np.int32)
    return [_response(tokenizer, prompt, ids, ends) for prompt, ids in zip(prompts, dialogues, strict=True)]


def _response(
    tokenizer: PreTrainedTokenizerBase, prompt: np.ndarray, dialogue: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    if not np.array_equal(dialogue[: len(prompt)], prompt):
        raise ValueError(
            "this tokenizer encodes a prompt differently once an answer follows it: "
            f"{tokenizer.decode(prompt)[-60:]!r} is no beginning of {tokenizer.decode(dialogue)[-120:]!r}. "
            "Give it a chat_template that writes the same text before an answer as for add_generation_prompt, "
            "or remove its chat_template to use the default one"
        )
    response = dialogue[len(prompt) :]
    (places,) = np.isin(response, ends).nonzero()
    return response[: places[-1] + 1] if places.size else np.append(response, np.int32(tokenizer.eos_token_id))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _messages(turns: Turns) -> list[dict[str, str]]:
    return [_message(role, content) for role, content in turns]


def _encode(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]], *, opened: bool) -> list[np.ndarray]:
    names = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    spells_control = re.compile("|".join(names) or "(?!)").search
    encoded: list[np.ndarray] = []
    for start in range(0, len(chats), TEXTS_PER_CALL):
        block = chats[start : start + TEXTS_PER_CALL]
        texts = _render(tokenizer, block, opened=opened, tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        for i, chat in enumerate(block):
            if any(spells_control(message["content"]) for message in chat):
                # One by one and slow, so only where a text has it; see `sanitize_control_tokens` in transformers.
                (ids[i],) = _render(tokenizer, [chat], opened=opened, tokenize=True, sanitize_control_tokens=True)
        encoded += [np.array(row, np.int32) for row in ids]
    return encoded


def _render(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]], *, opened: bool, **options) -> list:
    try:
        return tokenizer.apply_chat_template(chats, add_generation_prompt=opened, return_dict=False, **options)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a dialogue: {error}. "
            "Mend the data, or remove the tokenizer's chat_template to use the default one"
        ) from error
