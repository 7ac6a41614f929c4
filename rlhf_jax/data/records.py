"""What the readers, the mappings and the templates hand to each other: raw rows, and dialogues made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

RowKind = Literal["demonstration", "pair", "prompt"]
KINDS: tuple[RowKind, ...] = get_args(RowKind)
Learn = Literal["answer", "assistant", "everything"]

# (("user", text), ("assistant", text), ..., ("user", text)); ("system", text) may come first.
Turns = tuple[tuple[str, str], ...]


class BadRow(ValueError):
    """One row that cannot be used. The text names file, row and field; `data.max_bad_rows` says how many may be."""


class Row(NamedTuple):
    """A row as it stands in its file, or what is wrong with it."""

    file: str  # path of the file, or "name (split)" of a hub data set
    number: int  # its line in the file (JSON lines, text), or its row; counted from 1
    fields: dict[str, Any] | BadRow
    unit: str = "row"  # "line", where rows are lines

    @property
    def where(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True)
class RowSpec:
    """The rows that a stage asks of the data."""

    kind: RowKind
    share: str  # the key of `data.split` whose prompts are trained on, the name of the stage
    learn: Learn = "answer"  # of a demonstration: the last answer, every assistant turn, or every token
    pack_length: int = 0  # tokens of a row of several documents; 0: a row is one document

    @property
    def per_row(self) -> int:
        """Sequences of a row: one, or two for a pair, chosen then rejected."""
        return 2 if self.kind == "pair" else 1


@dataclass(frozen=True, slots=True)
class Example:
    """A dialogue, or with `text` a document. All texts are stripped at both ends: the chat template sets its own."""

    turns: Turns  # the prompt; () for a document
    answer: str  # what SFT learns; "" where absent
    chosen: str  # the preference pair; "" where absent
    rejected: str
    source: str  # path of the source
    row: int  # `Row.number`
    text: str = ""  # a document for SFT or mixture training, which no template touches
