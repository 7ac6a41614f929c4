"""Records that readers, mappings and templates exchange: raw rows, and the dialogues made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

RowKind = Literal["demonstration", "pair", "prompt", "ranking"]
KINDS: tuple[RowKind, ...] = ("demonstration", "pair", "prompt")  # a ranking has the prompts of its pairs
Learn = Literal["answer", "assistant", "everything"]


class Turn(NamedTuple):
    """A turn of a dialogue. (role, content) alone serves wherever turns are taken."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    extra: Mapping[str, Any] = {}  # other fields of a message that a chat template may read, such as tool_calls
    is_learned: bool = True  # whether SFT may learn it; of the assistant's


# (("user", text), ("assistant", text), ..., ("user", text)); ("system", text) may come first.
Turns = tuple[Turn | tuple[str, str], ...]


# The text of an answer; or the turns that continue a prompt, from the first of the assistant to the last.
Reply = str | Turns


class Dialogue(NamedTuple):
    """Turns, with the tools that the chat template is to describe."""

    turns: Turns
    tools: tuple[dict[str, Any], ...] = ()


class BadRow(ValueError):
    """One row that cannot be used. The text names file, row and field; `data.max_bad_rows` bounds their number."""


class Row(NamedTuple):
    """A row as read from its file, or the reason why it cannot be read."""

    file: str  # path of the file, or "name (split)" of a hub data set
    number: int  # its line in the file (JSON lines, text), or its row; counted from 1
    fields: dict[str, Any] | BadRow
    unit: str = "row"  # "line", where rows are lines

    @property
    def where(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True)
class RowSpec:
    """The rows that a stage needs."""

    kind: RowKind
    share: str  # key of `data.split` whose prompts are trained on; the name of the stage
    learn: Learn = (
        "answer"  # tokens of a demonstration with loss: the last answer, every assistant turn, or every token
    )
    pack_length: int = 0  # tokens of a row of several documents; 0: a row is one document
    answers: int = 2  # of a ranking, at most

    @property
    def per_row(self) -> int:
        """Sequences of a row: one; two for a pair, chosen then rejected; `answers` for a ranking, the best first."""
        return {"pair": 2, "ranking": self.answers}.get(self.kind, 1)

    @property
    def packed_tokens(self) -> str:
        """The tokens of a packed row: "512", or of pairs "2 x 512"."""
        return f"{self.per_row} x {self.pack_length}" if self.per_row > 1 else str(self.pack_length)


@dataclass(frozen=True, slots=True)
class Example:
    """A dialogue, or with `text` a document. Contents of messages are as written; other texts are trimmed."""

    turns: Turns  # the prompt; () for a document
    answer: Reply  # what SFT learns; "" where absent
    chosen: Reply  # the preference pair; "" where absent
    rejected: Reply
    source: str  # path of the source
    row: int  # `Row.number`
    text: str = ""  # a document for SFT or mixture training, encoded without a template
    extra: Mapping[str, Any] = field(default_factory=dict)  # `Turn.extra` of an answer that is a text
    is_learned: bool = True  # `Turn.is_learned` of it
    tools: tuple[dict[str, Any], ...] = ()  # `Dialogue.tools`
    ranked: tuple[Reply, ...] = ()  # of a ranking, the best answer first
    scores: tuple[float, ...] = ()  # of those, or of the pair, as its source gives them; () where it gives none

    def continuation(self, reply: Reply) -> tuple[Turn, ...]:
        """The turns of a reply after the prompt."""
        if isinstance(reply, str):
            return (Turn("assistant", reply, self.extra, self.is_learned),)
        return tuple(Turn(*turn) for turn in reply)
