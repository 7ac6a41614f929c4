"""The `[data]` section: sources of rows, mappings of their fields, their split between stages and their mixture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from rlhf_jax.data.dialogues import SPEAKERS

Format = Literal["", "fields", "transcript", "messages", "sharegpt", "alpaca", "ranking", "text"]
BUILTIN = "builtin:assistant"


@dataclass(frozen=True)
class SourceConfig:
    """A place, a mapping of its fields, and its part in the mixture.

    Names of fields may be dotted: "question.full_text", "answers.zh_cn.0.text", and for every item of a list
    "answers.*.text".
    """

    # The place: a file (JSON, JSON lines, CSV, TSV, Parquet, Arrow, text; also .gz and .zst), a glob, a folder of such
    # files, a folder of `save_to_disk`, "builtin:assistant", or the name of a data set on the hub.
    path: str
    name: str = ""  # the configuration of a hub data set that has several
    split: str = "train"  # the split of a hub data set or of a `save_to_disk` folder
    eval_path: str = ""  # the place of this source's held-out rows; "" with eval_split "": held out by hash
    eval_split: str = ""  # the split of `path` with the held-out rows, instead of eval_path
    stream: bool = False  # read during training, for data too large to read in advance; SFT only
    limit: int = 0  # read only the first `limit` rows of `path`; 0: all
    # The mapping of its fields. "": that of the known data set that `path` names, or else "fields".
    format: Format = ""
    prompt: str = "prompt"  # the field of the prompt
    answer: str = ""  # the field of the answer that SFT learns; "": that is `chosen`
    chosen: str = "chosen"  # the field of the better answer; chosen or rejected "": the source has no preference pairs
    rejected: str = "rejected"  # the field of the worse answer
    margin: str = ""  # the field of how much better the chosen answer is, a number, for reward.margin_coef; "": none
    system: str = ""  # the field of a system text, which may be empty or null; alpaca and sharegpt: "" is "system"
    field: str = ""  # the one field of messages, sharegpt and text; "": "messages", "conversations" and "text"
    answers: tuple[str, ...] = ("answers",)  # of a ranking: one field that holds a list, or a field for each answer
    scores: tuple[str, ...] = ()  # of a ranking: the fields of the scores, as `answers`; none: best answer first
    lowest_first: bool = False  # the answer with the lowest of `scores` is the best, as for ranks
    # What opens the turns of a transcript: the user's, the assistant's, and, if there is a third, the system's; a third
    # "" makes a system turn of what comes before the first speaker.
    speakers: tuple[str, ...] = SPEAKERS
    strip: str = ""  # a regular expression; its matches are removed from answer, chosen and rejected
    sparse: bool = False  # rows with an empty field or too short a list are left out, and do not count as bad
    # The mixture (see mixture.py).
    weight: float = 0.0  # share of the drawn rows relative to other sources' weights; 0: by its number of rows
    epochs: float = 1.0  # draws of each of its rows in one epoch of the mixture, where there are no weights
    max_rows: int = 0  # cap on draws per epoch of the mixture; 0: no cap

    def __post_init__(self):
        if not self.path.strip():
            raise ValueError("data.sources.path is empty: name a file, a folder, or a data set of the hub")
        if self.limit < 0:
            raise ValueError(f"data.sources.limit must not be negative: {self.limit}; 0 takes all rows")
        if self.weight < 0 or self.max_rows < 0 or self.epochs <= 0:
            wrong = {"weight": self.weight, "max_rows": self.max_rows, "epochs": self.epochs}
            reported = ", ".join(f"data.sources.{name} = {value}" for name, value in wrong.items())
            raise ValueError(f"{reported}: epochs must be above 0, weight and max_rows must not be negative")
        if self.format in ("", "fields", "ranking") and not self.prompt:
            raise ValueError("data.sources.prompt must name a field where the format is fields or ranking")
        if self.format == "transcript" and not (self.answer or self.chosen):
            raise ValueError("data.sources with format = 'transcript' must name the field answer or chosen")
        if len(self.speakers) not in (2, 3) or not all(speaker.strip() for speaker in self.speakers[:2]):
            raise ValueError(
                "data.sources.speakers must be what opens a turn of the user, of the assistant and, if need be, of the "
                f"system, as {list(SPEAKERS)}; not {list(self.speakers)}"
            )
        if self.format == "ranking" and (not self.answers or len(self.scores) not in (0, len(self.answers))):
            raise ValueError(
                f"data.sources.scores names {len(self.scores)} fields for the {len(self.answers)} of answers; name one "
                "for each, or none where the answers come best first"
            )
        try:
            re.compile(self.strip)
        except re.error as error:
            raise ValueError(f"data.sources.strip is no regular expression: {self.strip!r} ({error})") from error


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...]  # at least one; see `SourceConfig`
    # Shares of the stages in the prompts, by hash, so that no prompt trains two: { sft = 2, reward = 4, ppo = 4 }, or
    # as text "2,4,4" those of the first three stages; {}: the default shares.
    split: dict[str, float] | str = field(default_factory=dict, hash=False)
    held_out: float = 0.05  # share of the prompts that is kept for evaluation, by hash, in sources without eval_path
    split_seed: int = 0  # seed of the split of the prompts and of what is held out; run.seed changes neither
    max_prompt_length: int = 256  # tokens; longer prompts are dropped
    max_length: int = 512  # tokens of prompt and answer; longer answers are cut
    # How a row that is too long is shortened. "right": a prompt over max_prompt_length is dropped, an answer is cut at
    # its end; "left": the prompt loses its beginning; "drop": the row is dropped.
    long_rows: Literal["right", "left", "drop"] = "right"
    template: str = ""  # Jinja text, or the path of a file of it; "": the tokenizer's own, or "Human:/Assistant:"
    # A system text: as the template writes it, which some refuse to do, or with "fold" in front of the first question.
    system: Literal["template", "fold"] = "template"
    # What templates that write the date take for now: "2026-11-29", or with a time "2026-11-29T12:00:00"; "": the start
    # of the run, which RUN/config.toml keeps.
    date: str = ""
    temperature: float = 1.0  # above 1, small sources are drawn from more often than in proportion to their rows
    max_bad_rows: int = 0  # number of malformed rows of a source that are skipped and reported; one more stops the run
    cache_dir: str = ""  # folder of the tokenized rows; "": the user's cache folder
    builtin_seed: int = 0  # seed of the dialogues of builtin:assistant
    builtin_rows: int = 8192  # number of dialogues of builtin:assistant

    @property
    def rendering(self) -> tuple[str, str, str]:
        """The arguments of `prepare_tokenizer`."""
        return self.template, self.system, self.date

    def __post_init__(self):
        _check_split(self.split)
        _check_date(self.date)
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one source")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"data.split_seed={self.split_seed}: from 0 to {2**32 - 1}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out is a share, at least 0 and below 1, not {self.held_out}")
        if self.max_bad_rows < 0:
            raise ValueError(f"data.max_bad_rows must not be negative: {self.max_bad_rows}; 0 allows none")
        if self.temperature <= 0:
            raise ValueError(f"data.temperature must be above 0: {self.temperature:g}; 1 leaves sources as they are")
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"data.max_length ({self.max_length}) must be larger than data.max_prompt_length "
                f"({self.max_prompt_length}), and both positive: an answer follows every prompt"
            )


def _check_date(date: str) -> None:
    try:
        datetime.fromisoformat(date or "2026-11-29")
    except ValueError as error:
        raise ValueError(f"data.date = {date!r} is no date: write it as 2026-11-29 or 2026-11-29T12:00:00") from error


def _check_split(split: Mapping[str, float] | str) -> None:
    """ValueError unless `data.split` has shares >= 0 with a positive sum; as text, three. {} means the defaults."""
    try:
        shares = list(map(float, split.split(","))) if isinstance(split, str) else list(split.values())
    except ValueError:
        shares = []
    is_wrong = isinstance(split, str) and len(shares) != 3
    if is_wrong or (split and (min(shares) < 0 or not 0 < sum(shares) < math.inf)):
        raise ValueError(
            "data.split must be a table of shares by stage, as { sft = 2, ... }, none negative and one above 0, or "
            f"three shares as in '2,4,4'; not {split!r}"
        )
