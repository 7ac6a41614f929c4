"""The rows of one place as they are, without split or cache: of a file that a command names."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_jax.config import parse_config
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.mapping import make_mapper, provides, resolve_format
from rlhf_jax.data.records import Example, RowKind
from rlhf_jax.data.sources import limit_of, place_of, read_rows

FIELDS = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca", "text": "text"}
PROMPTS = ("prompt", "question", "query", "input", "text")
ANSWERS = ("answer", "response", "completion", "output")


def parse_place(text: str, option: str, *, as_prompts: bool = False) -> SourceConfig:
    """A path or hub id, or as an inline table of TOML a whole item of `data.sources`, with its format resolved.

    Where nothing but the path is given, the names of the first row's fields say what they are; with `as_prompts` a text
    is a prompt, and not a document.

    Raises:
        ValueError: no such place, no rows, or a key that is none of `data.sources`.
    """
    if text.lstrip().startswith("{"):
        try:
            table = tomllib.loads(f"place = {text}")["place"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{option} {text!r} is no inline table of TOML: {error}") from error
        source = parse_config(SourceConfig, table, option)
    else:
        source = SourceConfig(text)
    resolved = resolve_format(source)
    if resolved != dataclasses.replace(source, format="fields"):
        return resolved
    fields = next(iter(rows_of(resolved))).fields
    names = fields if isinstance(fields, dict) else {}
    changed: dict[str, Any] = {}
    if source == SourceConfig(source.path) and source.prompt not in names:
        kind = next((kind for name, kind in FIELDS.items() if name in names), "")
        if kind and not (as_prompts and kind == "text"):
            return dataclasses.replace(source, format=kind)
        changed["prompt"] = next((name for name in PROMPTS if name in names), source.prompt)
    if not source.answer and source.chosen not in names:
        changed["answer"] = next((name for name in ANSWERS if name in names), "")
    return dataclasses.replace(resolved, **changed)


def rows_of(source: SourceConfig) -> Iterator:
    """The raw rows of a place, as many as its `limit` allows."""
    place = place_of(source, DataConfig((source,)), held_out=False)
    return itertools.islice(read_rows(**place), limit_of(source, place))


def kind_of(source: SourceConfig) -> RowKind:
    """What the rows of a place hold to be scored: pairs if the first row has both answers, else demonstrations."""
    fields = next(iter(rows_of(source))).fields
    names = fields if isinstance(fields, Mapping) else {}
    has_both = source.format == "ranking" or {source.chosen, source.rejected} <= set(names)
    return "pair" if provides(source, "pair") and has_both else "demonstration"


def read_place(source: SourceConfig, kind: RowKind) -> Iterator[tuple[Mapping[str, Any], Example]]:
    """The fields of each row, with each of its examples. ValueError at a bad row."""
    to_examples = make_mapper(source, kind)
    for row in rows_of(source):
        for example in to_examples(row):
            yield row.fields, example
