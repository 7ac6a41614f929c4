"""The fields of requests, checked: what each may be, which are read, which are accepted without effect.

A field that changes the answer and is not supported may only have its neutral value, and a field that no OpenAI
endpoint has is refused: a misspelt name would otherwise change nothing, unnoticed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_jax.answering import ALTERNATIVES
from rlhf_jax.data.dialogues import parse_messages, parse_tools
from rlhf_jax.data.records import BadRow, Dialogue
from rlhf_jax.serve.errors import invalid

# About the caller, storage or billing: they change no answer.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
WITHOUT_EFFECT |= {"prompt_cache_retention", "parallel_tool_calls"}
# {field: the values with which it changes nothing}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
COMMON_FIELDS = {
    "model",
    "stream",
    "stream_options",
    "stop",
    "temperature",
    "top_p",
    "n",
    "seed",
    "max_tokens",
    "logprobs",
}
CHAT_FIELDS = COMMON_FIELDS | {"messages", "tools", "max_completion_tokens", "top_logprobs"}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt"}
SCORE_FIELDS = {"model", "input"}
MOST_STOPS, LONGEST_STOP = 16, 256


@dataclass(frozen=True)
class Asked:
    """A request for answers.

    Attributes:
        prompts: a dialogue, or texts or lists of ids.
        max_new_tokens: None: as many as fit.
        alternatives: most likely tokens that are reported; None: no log-probabilities.
    """

    model: str | None
    prompts: tuple[Dialogue | str | list[int], ...]
    n: int
    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stops: tuple[str, ...]
    alternatives: int | None
    stream: bool
    include_usage: bool

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompts[0], Dialogue)


def parse_chat(body: Mapping[str, Any]) -> Asked:
    """The body of /v1/chat/completions. ApiError with status 400 for what is wrong."""
    check_names(body, CHAT_FIELDS)
    if "messages" not in body:
        raise invalid("messages is missing: a list of {role, content}", "messages", "missing_required_parameter")
    try:
        turns = parse_messages(body["messages"])
        dialogue = Dialogue(turns, parse_tools(body, "fields"))
    except BadRow as error:
        raise invalid(f"messages or tools: {error}", "messages") from error
    if not turns or turns[-1][0] == "assistant":
        raise invalid("messages must end with a turn of the user or a tool, which is answered", "messages")
    wanted = take(body, "logprobs", bool, False)
    number = take(body, "top_logprobs", int, 0, 0, ALTERNATIVES)
    if number and not wanted:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    longest = [take(body, name, int, None, 1) for name in ("max_completion_tokens", "max_tokens")]
    return common(body, (dialogue,), next((n for n in longest if n is not None), None), number if wanted else None)


def parse_completion(body: Mapping[str, Any]) -> Asked:
    """The body of /v1/completions. ApiError with status 400 for what is wrong."""
    check_names(body, COMPLETION_FIELDS)
    if "prompt" not in body:
        raise invalid("prompt is missing: a text or a list of token ids", "prompt", "missing_required_parameter")
    given = body["prompt"]
    prompts = [given] if isinstance(given, str) or is_ids(given) else given
    if not isinstance(prompts, list) or not prompts or not all(isinstance(x, str) or is_ids(x) for x in prompts):
        raise invalid("prompt must be a text or a list of token ids, or a list of either, not empty", "prompt")
    number = take(body, "logprobs", int, None, 0, ALTERNATIVES)
    return common(body, tuple(prompts), take(body, "max_tokens", int, 16, 1), number)


def common(body: Mapping[str, Any], prompts: tuple, max_new_tokens: int | None, alternatives: int | None) -> Asked:
    """The fields that both kinds of requests have."""
    stream = take(body, "stream", bool, False)
    options = take(body, "stream_options", dict, {})
    if options and not stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    check_names(options, {"include_usage", "include_obfuscation"})
    return Asked(
        model=take(body, "model", str, None),
        prompts=prompts,
        n=take(body, "n", int, 1, 1),
        max_new_tokens=max_new_tokens,
        temperature=take(body, "temperature", float, 1.0, 0, 2),
        top_p=take(body, "top_p", float, 1.0, 1e-6, 1),
        seed=take(body, "seed", int, secrets.randbits(32), -(2**63), 2**63 - 1),
        stops=take_stops(body.get("stop")),
        alternatives=alternatives,
        stream=stream,
        include_usage=take(options, "include_usage", bool, False),
    )


def check_names(body: Mapping[str, Any], known: set[str]) -> None:
    """Raise ApiError for a field that is unknown, or not supported with this value."""
    for name, value in body.items():
        if name in known or name in WITHOUT_EFFECT or value is None:
            continue
        if name not in NEUTRAL:
            raise invalid(f"Unrecognized request argument supplied: {name:.60}", name[:60], "unknown_parameter")
        if value not in NEUTRAL[name]:
            raise invalid(f"{name} is not supported; it may be {NEUTRAL[name][0]!r}", name, "unsupported_value")


def take(
    body: Mapping[str, Any], name: str, kind: type, default: Any, low: float | None = None, high: float | None = None
) -> Any:
    """The field, or the default where it is missing or null. ApiError unless of this kind and within low and high."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not kind and (kind, type(value)) != (float, int):
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", dict: "an object"}
        raise invalid(f"{name} must be {names[kind]}, not {value!r:.60}", name, "invalid_type")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise invalid(f"{name} must be {limit}, not {value!r:.60}", name)
    return kind(value)


def take_stops(value: Any) -> tuple[str, ...]:
    """The stop strings of a text or a list of texts."""
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(x, str) and 0 < len(x) <= LONGEST_STOP for x in stops):
        raise invalid(f"stop must be a text of 1 to {LONGEST_STOP} characters, or a list of such", "stop")
    if len(stops) > MOST_STOPS:
        raise invalid(f"stop has {len(stops)} texts: at most {MOST_STOPS}", "stop")
    return tuple(stops)


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def parse_score(body: Mapping[str, Any], most: int) -> tuple[str | None, list[str | list]]:
    """The body of /v1/score: the model, and at most `most` texts or dialogues. ApiError with status 400."""
    check_names(body, SCORE_FIELDS)
    given = body.get("input")
    is_dialogue = isinstance(given, list) and bool(given) and all(isinstance(each, dict) for each in given)
    rows = [given] if isinstance(given, str) or is_dialogue else given
    if not isinstance(rows, list) or not rows or not all(isinstance(each, str | list) for each in rows):
        message = "input must be a text or the messages of a dialogue, or a list of either"
        raise invalid(message, "input", "missing_required_parameter" if given is None else "invalid_type")
    if len(rows) > most:
        raise invalid(f"input has {len(rows)} texts: at most {most} in one request", "input")
    return take(body, "model", str, None), rows
