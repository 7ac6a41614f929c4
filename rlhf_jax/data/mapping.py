"""Maps the fields of a row to examples, by a source's `format` and its names of fields.

    format      a row has                                                       gives
    fields      texts, or lists of messages, in fields of any name              the kinds whose fields have names
    transcript  "\\n\\nHuman: ...\\n\\nAssistant: ..." texts in fields of any name    the same
    messages    a list of {"role", "content"}; the last assistant turn learns   demonstration, prompt
    sharegpt    the like with {"from", "value"}, and a field "system"           demonstration, prompt
    alpaca      "instruction", "input", "output", and a field "system"          demonstration, prompt
    ranking     a prompt and several answers, with scores or best first         all
    text        a document                                                      demonstration

The turns of an example are the same for every kind, because they decide which stage may train on it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from rlhf_jax.config import parse_config
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.formats import READERS, EmptyField, MissingField, RowReader, margin_getter
from rlhf_jax.data.records import BadRow, Example, Row, RowKind

KEYS = {
    "fields": "prompt, answer, chosen, rejected, margin; chosen = '' for a source without preference pairs",
    "transcript": "prompt, answer, chosen, rejected, margin; chosen = '' for a source without preference pairs",
    "messages": "field",
    "sharegpt": "field",
    "alpaca": "format = 'fields' with prompt and answer, where they are not instruction and output",
    "ranking": "prompt, answers, scores",
    "text": "field",
}


def provides(source: SourceConfig, kind: RowKind) -> bool:
    """Whether the source has fields for what rows of this kind need."""
    assert source.format, source
    if source.stream and kind != "demonstration":  # rows of the other kinds are chosen among all of them
        return False
    if source.format == "text":
        return kind == "demonstration"
    if source.format in ("messages", "sharegpt", "alpaca"):
        return kind not in ("pair", "ranking")
    pair = source.chosen and source.rejected
    needed = {"demonstration": source.answer or source.chosen, "pair": pair, "prompt": True, "ranking": pair}
    return source.format == "ranking" or bool(needed[kind])


def make_mapper(source: SourceConfig, kind: RowKind) -> RowReader:
    """The function from a row of this source to its examples of a kind.

    It returns one example, with the texts that the kind needs and the others that the row has. A ranking gives one pair
    for every two answers of different rank, the best first; a pair is also a ranking of two. It returns none for a
    source that does not provide the kind, and none for a row of a sparse source with an empty field that the kind
    needs.

    It raises BadRow, naming file, row and field, for a malformed row, and `Row.fields` where that is one.
    """
    if not provides(source, kind):
        return lambda row: []
    is_pair = source.format != "ranking" and kind in ("pair", "ranking")
    read, cut = READERS[source.format](source, "pair" if is_pair else kind), re.compile(source.strip).sub
    margin_in = margin_getter(source)

    def read_pair(row: Row) -> list[Example]:
        (example,), margin = read(row), margin_in(row.fields)
        ranked = (example.chosen, example.rejected) if kind == "ranking" else ()
        return [dataclasses.replace(example, ranked=ranked, scores=() if margin == "" else (margin, 0.0))]

    def examples(row: Row) -> list[Example]:
        if isinstance(row.fields, BadRow):
            raise row.fields
        try:
            return read_pair(row) if is_pair else read(row)
        except MissingField as error:
            fix = f"Name the right ones in data.sources ({KEYS[source.format]})"
            raise BadRow(f"{row.where}: {error}. {fix}") from error
        except EmptyField as error:
            if source.sparse:
                return []
            raise BadRow(f"{row.where}: {error}; data.sources.sparse = true leaves such rows out") from error
        except BadRow as error:
            raise BadRow(f"{row.where}: {error}") from error

    def strip_examples(row: Row) -> list[Example]:
        names, found = ("answer", "chosen", "rejected"), []
        for example in examples(row):
            texts = {name: cut("", getattr(example, name)).strip() for name in names}
            ranked = tuple(cut("", each).strip() for each in example.ranked)
            found.append(dataclasses.replace(example, **texts, ranked=ranked))
        return found

    return strip_examples if source.strip else examples


SPLITS = ("name", "split", "eval_split")  # keys for places that have configurations and splits


@functools.cache
def known_sets() -> Mapping[str, SourceConfig]:
    """{name on the hub, in small letters: mapping of the set}."""
    tables = tomllib.loads(resources.files(__package__).joinpath("known_sets.toml").read_text(encoding="utf-8"))
    return {
        name.casefold(): parse_config(SourceConfig, {"path": name} | table, f"known_sets.toml, {name}")
        for name, table in tables.items()
    }


def resolve_format(source: SourceConfig) -> SourceConfig:
    """The source with its format resolved: where it is "", the known mapping of the set that `path` names, or "fields".

    `path` names a set if it is its name on the hub, in letters of either case, or ends with "/" and that name, as a
    local copy does. A name in the table that is not the set's on the hub ("mkqa-Japanese") is replaced by the set's.

    Keys that the source sets to something other than their default take precedence. A key set to its default is
    indistinguishable from one left out: to ignore the known mapping, set `format`. `name`, `split` and `eval_split` are
    not filled in for local files, which have none, nor `eval_split` where there is an `eval_path`.
    """
    if source.format:
        return source
    path = source.path.casefold().rstrip("/")
    known = next((known for name, known in known_sets().items() if path == name or path.endswith(f"/{name}")), None)
    if known is None:
        return dataclasses.replace(source, format="fields")
    local = Path(source.path).exists()
    left = {"eval_split"} if source.eval_path else set()
    if local and not Path(source.path, "dataset_dict.json").is_file():
        left |= set(SPLITS)
    filled = {
        field.name: getattr(known, field.name)
        for field in dataclasses.fields(source)
        if field.name not in left and getattr(source, field.name) == field.default
    }
    if path in known_sets() and not local:
        filled["path"] = known.path
    return dataclasses.replace(source, **filled)
