"""Sources of dialogues: JSON-lines files, data sets of the Hugging Face hub, and the built-in set, as `Example`s."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.data import assistant
from rlhf_jax.data.splits import STAGES, Stage, Turns, is_held_out, parse_shares, prompt_key, stage_of

BUILTIN = "builtin:assistant"
ROLES = {"Human": "user", "Assistant": "assistant"}
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class SourceConfig:
    path: str  # a JSON-lines file, "builtin:assistant", or the name of a data set on the hub
    split: str = "train"  # of a hub data set
    eval_path: str = ""  # JSON-lines file whose rows are this source's held-out rows; "": by hash, see data.held_out
    # Names of the fields. answer "": SFT learns from `chosen`. chosen or rejected "": the source has no preference
    # pairs and is left out of the reward stage; with neither answer nor chosen it serves PPO only.
    prompt: str = "prompt"
    answer: str = ""
    chosen: str = "chosen"
    rejected: str = "rejected"
    # chosen, rejected and answer hold whole "\n\nHuman: ...\n\nAssistant: ..." transcripts, or the end of one whose
    # beginning is in `prompt`; the prompt is all before the last Assistant turn.
    transcript: bool = False
    limit: int = 0  # at most so many rows of `path`, the first ones; 0: all

    def __post_init__(self):
        if self.limit < 0:
            raise ValueError(f"data.sources.limit must not be negative: {self.limit}; 0 takes all rows")
        if not self.transcript and not self.prompt:
            raise ValueError("data.sources.prompt must name a field, unless transcript = true")
        if self.transcript and not (self.answer or self.chosen):
            raise ValueError("data.sources with transcript = true must name the field answer or chosen")


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...]
    split: str = "2,4,4"  # shares of sft, reward and ppo in the prompts, by hash: no prompt trains two stages
    held_out: float = 0.05  # share of the prompts that is kept for evaluation, by hash, in sources without eval_path
    max_prompt_length: int = 256  # tokens; longer prompts are dropped
    max_length: int = 512  # tokens of prompt and answer; longer answers are cut
    builtin_seed: int = 0  # of builtin:assistant
    builtin_rows: int = 8192  # of builtin:assistant

    def __post_init__(self):
        parse_shares(self.split)
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one source")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out is a share, at least 0 and below 1, not {self.held_out}")
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"data.max_length ({self.max_length}) must be larger than data.max_prompt_length "
                f"({self.max_prompt_length}), and both positive: an answer follows every prompt"
            )


@dataclass(frozen=True)
class Example:
    """One row. All texts are stripped of white space at both ends: the chat template sets its own."""

    turns: Turns  # the prompt: (("user", text), ("assistant", text), ..., ("user", text))
    answer: str  # what SFT learns; "" where absent
    chosen: str  # the preference pair; "" where absent
    rejected: str
    source: str  # path of the source
    row: int  # its line in the file, or row in the data set, counted from 1


def load_examples(config: DataConfig, stage: Stage, *, held_out: bool) -> list[Example]:
    """The rows that `stage` trains on, or with `held_out` those that it is evaluated on, in the order of the sources.

    Training rows are shared out by prompt (`splits.stage_of`): a prompt trains one stage. Held-out rows are not shared
    out: no stage trains on them, so they serve the evaluation of every stage. They are the rows of `eval_path` where a
    source has one, else those whose prompt `splits.is_held_out`. A row of any source whose prompt is held out by any
    source is trained by none. Sources that name no field for what a stage needs are left out of it.

    Raises ValueError with the file and line for a missing or empty file, malformed JSON, a missing field, a field that
    is not text, or a transcript without a Human and an Assistant turn; and if no row is left to train on. The held-out
    rows may be none.
    """
    trainable: list[tuple[bytes, Example]] = []
    evaluated: list[Example] = []
    withheld: set[bytes] = set()
    for source in config.sources:
        serves = _serves(source, stage)
        read = functools.partial(_keyed_examples, source=source, stage=stage if serves else "ppo")
        keyed = read(source.path, itertools.islice(_read(source, config), source.limit or None))
        if source.eval_path:
            kept = read(source.eval_path, _read_file(source.eval_path))
        else:
            kept = [(key, example) for key, example in keyed if is_held_out(key, config.held_out)]
        withheld.update(key for key, _ in kept)
        if serves:
            trainable += keyed
            evaluated += [example for _, example in kept]
    if held_out:
        return evaluated
    shares = parse_shares(config.split)
    trained = [example for key, example in trainable if key not in withheld and stage_of(key, shares) == stage]
    if not trained:
        raise ValueError(
            f"no rows for the stage {stage}: {len(trainable)} rows serve it before data.split = {config.split!r} "
            f"(shares of {', '.join(STAGES)}) and data.held_out = {config.held_out}; add rows, raise its share, "
            "or name the fields that it needs in data.sources"
        )
    return trained


def _serves(source: SourceConfig, stage: Stage) -> bool:
    return bool(
        {"sft": source.answer or source.chosen, "reward": source.chosen and source.rejected, "ppo": True}[stage]
    )


Row = tuple[str, int, dict[str, Any]]  # where it stands, for messages; its number; its fields


def _read(source: SourceConfig, config: DataConfig) -> Iterator[Row]:
    if source.path.startswith("builtin:"):
        if source.path != BUILTIN:
            raise ValueError(f"there is no built-in set {source.path!r}, only {BUILTIN!r}")
        for number, row in enumerate(assistant.generate(config.builtin_seed, config.builtin_rows), start=1):
            yield f"{source.path}, row {number}", number, row
    elif source.path.endswith((".jsonl", ".json")) or Path(source.path).exists():
        yield from _read_file(source.path)
    else:
        yield from _read_hub(source.path, source.split)


def _read_file(path: str) -> Iterator[Row]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: {'is a folder, name a file in it' if Path(path).is_dir() else 'no such file'}")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{where}: malformed JSON ({error}); there must be one object on every line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: holds a {type(row).__name__}; there must be one object on every line")
            yield where, number, row


def _read_hub(name: str, split: str) -> Iterator[Row]:
    import datasets  # here, because it takes seconds that runs on files need not pay

    try:
        rows = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name!r} is no file here, and cannot be had from the hub: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name} ({split}), row {number}", number, row


def _keyed_examples(path: str, rows: Iterable[Row], source: SourceConfig, stage: Stage) -> list[tuple[bytes, Example]]:
    examples = [_example(row, source, stage, path, number, where) for where, number, row in rows]
    if not examples:
        raise ValueError(f"{path}: holds no rows")
    return [(prompt_key(example.turns), example) for example in examples]


def _example(row: dict[str, Any], source: SourceConfig, stage: Stage, path: str, number: int, where: str) -> Example:
    target = source.answer or source.chosen
    needed = {"sft": [target], "reward": [source.chosen, source.rejected], "ppo": [target] * source.transcript}[stage]
    if not source.transcript:
        needed = [source.prompt, *needed]
    prompt = _text(row, source.prompt, where, needed)
    replies = {name: _text(row, name, where, needed) for name in (target, source.chosen, source.rejected)}
    turns: Turns = (("user", prompt.strip()),)
    if source.transcript:
        parts = {
            name: parse_transcript(text if text.startswith(prompt) else prompt + text, f"{where}, field {name!r}")
            for name, text in replies.items()
            if text or name in needed
        }
        if len({prompt_key(turns) for turns, _ in parts.values()}) > 1:
            raise ValueError(f"{where}: {' and '.join(parts)} answer different prompts; only the last turn may differ")
        turns = next(iter(parts.values()))[0]
        replies = {name: answer for name, (_, answer) in parts.items()}
    answer, chosen, rejected = (replies.get(name, "").strip() for name in (target, source.chosen, source.rejected))
    return Example(turns, answer, chosen, rejected, path, number)


def parse_transcript(text: str, where: str) -> tuple[Turns, str]:
    """A "\\n\\nHuman: ...\\n\\nAssistant: ..." text -> (turns before the last Assistant turn, text of that turn).

    Turns of one speaker in succession are one turn, joined by a blank line, because chat templates insist on
    alternation; a Human turn after the last answer is left out. ValueError, naming `where`, for what is no transcript.
    """
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    turns: list[tuple[str, str]] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = ROLES[speaker], content.strip()
        if turns and turns[-1][0] == role:
            content = f"{turns.pop()[1]}\n\n{content}".strip()
        turns.append((role, content))
    if turns and turns[-1][0] == "user":
        turns.pop()
    if before.strip() or len(turns) < 2:
        raise ValueError(
            f"{where}: no transcript: a turn 'Human: ...' must come first, and '\\n\\nAssistant: ...' after it"
        )
    return tuple(turns[:-1]), turns[-1][1]


def _text(row: dict[str, Any], name: str, where: str, needed: Sequence[str]) -> str:
    """The field, checked; "" if it is not there, or is no text, and is not needed."""
    value = row.get(name)
    if isinstance(value, str):
        if not value.isascii() and SURROGATE.search(value):
            raise ValueError(f"{where}: field {name!r} holds half a character (a surrogate), as where text was cut")
        return value
    if name in needed and name in row:
        raise ValueError(f"{where}: field {name!r} must be text, not {type(value).__name__}")
    if name in needed:
        raise ValueError(
            f"{where}: no field {name!r}; the fields are {', '.join(row) or 'none'}. Name the right ones in "
            "data.sources (prompt, answer, chosen, rejected; chosen = '' for a source without preference pairs)"
        )
    return ""
