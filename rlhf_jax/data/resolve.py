"""What a source says of its rows, completed by what is known of its place and by the fields of its first rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.dialogues import SPEAKERS
from rlhf_jax.data.mapping import resolve_format
from rlhf_jax.data.records import Row
from rlhf_jax.data.sources import limit_of, place_of, read_rows

LOGGER = logging.getLogger(__name__)
LISTS = {"messages": "messages", "conversations": "sharegpt"}
PROMPTS = ("prompt", "question", "instruction", "query", "input")
ANSWERS = ("answer", "response", "completion", "output")
ROWS_READ = 16  # one of the first may lack a field, by fault or since a source is sparse
KEYS_OF_FIELDS = ("format", "prompt", "answer", "chosen", "rejected", "field", "answers", "scores", "speakers")


def resolve(config: DataConfig) -> DataConfig:
    """The configuration with formats and fields of its sources resolved. ValueError for a place that is unreadable."""
    return dataclasses.replace(config, sources=tuple(map(resolve_fields, config.sources)))


def resolve_fields(source: SourceConfig, *, text_is_prompt: bool = False) -> SourceConfig:
    """The source with its format resolved (`resolve_format`), and its fields where it says nothing of them.

    The names of the first rows' fields then say what they are, which is logged. Where they are unknown, the source
    stays as it is, and its rows are reported as bad.

    Args:
        text_is_prompt: a field "text" is a prompt, and not a document.
    """
    resolved, default = resolve_format(source), SourceConfig(source.path)
    is_silent = all(getattr(source, key) == getattr(default, key) for key in KEYS_OF_FIELDS)
    if not is_silent or resolved != dataclasses.replace(source, format="fields"):
        return resolved
    fields: dict[str, Any] = {}
    for row in itertools.islice(rows_of(resolved), ROWS_READ):
        fields |= row.fields if isinstance(row.fields, Mapping) else {}
    changed = guess_fields(fields, text_is_prompt=text_is_prompt)
    if changed:
        _log_guess(source.path, ", ".join(f"{key} = {value!r}" for key, value in changed.items()))
    return dataclasses.replace(resolved, **changed)


def guess_fields(fields: Mapping[str, Any], *, text_is_prompt: bool = False) -> dict[str, Any]:
    """The keys of `data.sources` that a row with these fields needs; {} where its fields are unknown."""
    prompt = next((name for name in PROMPTS if name in fields), "")
    if not prompt and {"chosen", "rejected"} <= fields.keys():
        transcript = isinstance(fields["chosen"], str) and fields["chosen"].lstrip().startswith(SPEAKERS[0].lstrip())
        return {"format": "transcript"} if transcript else {}
    if kind := next((kind for name, kind in LISTS.items() if name in fields and "prompt" not in fields), ""):
        return {"format": kind}
    if {"instruction", "output"} <= fields.keys():
        return {"format": "alpaca"}
    prompt = prompt or ("text" if text_is_prompt and "text" in fields else "")
    if not prompt:
        return {"format": "text"} if "text" in fields else {}
    changed: dict[str, Any] = {} if prompt == "prompt" else {"prompt": prompt}
    answer = next((name for name in ANSWERS if name in fields and name != prompt), "")
    if answer and "chosen" not in fields:
        changed |= {"answer": answer, "chosen": "", "rejected": ""}
    return changed


def rows_of(source: SourceConfig) -> Iterator[Row]:
    """The raw rows of a place, as many as its `limit` allows."""
    place = place_of(source, DataConfig((source,)), held_out=False)
    return itertools.islice(read_rows(**place), limit_of(source, place))


@functools.cache
def _log_guess(path: str, keys: str) -> None:
    """Once for each source, which every stage resolves again."""
    LOGGER.info(f"{path}: by the names of its fields, {keys}; data.sources can say otherwise")
