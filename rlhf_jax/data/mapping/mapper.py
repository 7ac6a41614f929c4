"""The fields of a row to examples: what a source's `format` and its names of fields mean.

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
import re

from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.example import BadRow, Example, Row, RowKind
from rlhf_jax.data.mapping.formats import READERS, Read
from rlhf_jax.data.mapping.picking import Lacking, NoField

KEYS = {
    "fields": "prompt, answer, chosen, rejected; chosen = '' for a source without preference pairs",
    "transcript": "prompt, answer, chosen, rejected; chosen = '' for a source without preference pairs",
    "messages": "field",
    "sharegpt": "field",
    "alpaca": "format = 'fields' with prompt and answer, where they are not instruction and output",
    "ranking": "prompt, answers, scores",
    "text": "field",
}


def serves(source: SourceConfig, kind: RowKind) -> bool:
    """Whether the source has fields for what rows of this kind need."""
    assert source.format, source
    if source.stream and kind != "demonstration":  # rows of the other kinds are chosen among all of them
        return False
    if source.format == "text":
        return kind == "demonstration"
    if source.format in ("messages", "sharegpt", "alpaca"):
        return kind != "pair"
    pair = source.chosen and source.rejected
    needed = {"demonstration": source.answer or source.chosen, "pair": pair, "prompt": True}
    return source.format == "ranking" or bool(needed[kind])


def mapper(source: SourceConfig, kind: RowKind) -> Read:
    """The function from a row of this source to its examples of a kind.

    It gives one example, with what the kind needs and what else the row has. As pairs a ranking gives one for every two
    answers of different rank, the best first. There is none of a source that does not serve the kind, and none where a
    row of a sparse source lacks what it needs.

    It raises BadRow, naming file, row and field, for a malformed row, and `Row.fields` where that is one.
    """
    if not serves(source, kind):
        return lambda row: []
    read, cut = READERS[source.format](source, kind), re.compile(source.strip).sub

    def examples(row: Row) -> list[Example]:
        if isinstance(row.fields, BadRow):
            raise row.fields
        try:
            return read(row)
        except NoField as error:
            mend = f"Name the right ones in data.sources ({KEYS[source.format]})"
            raise BadRow(f"{row.where}: {error}. {mend}") from error
        except Lacking as error:
            if source.sparse:
                return []
            raise BadRow(f"{row.where}: {error}; data.sources.sparse = true leaves such rows out") from error
        except BadRow as error:
            raise BadRow(f"{row.where}: {error}") from error

    def stripped(row: Row) -> list[Example]:
        return [
            dataclasses.replace(
                example, **{name: cut("", getattr(example, name)).strip() for name in ("answer", "chosen", "rejected")}
            )
            for example in examples(row)
        ]

    return stripped if source.strip else examples
