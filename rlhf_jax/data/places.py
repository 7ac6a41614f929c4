"""The rows of one place as they are, without split or cache: of a file that a command names."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_jax.config import parse_config
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.mapping import make_mapper, provides
from rlhf_jax.data.records import Example, RowKind
from rlhf_jax.data.resolve import resolve_fields, rows_of


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
    return resolve_fields(source, text_is_prompt=as_prompts)


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
