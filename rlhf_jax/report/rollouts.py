"""The rollouts of a run: reading, filtering and sorting them, and their text for a terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.report.json_lines import NOT_FINITE, read_objects

TEXTS = ("prompt", "response")
SORTS = tuple("score kl length reward step".split())
# Fields that are no numbers of a rollout, or have one value per token (`save_tokens`).
NO_NUMBERS = {*TEXTS, "stage", "step", "finish_reason", "prompt_ids", "response_ids"}


@dataclass(frozen=True)
class Filters:
    """Which rollouts, and in which order.

    Attributes:
        stage: the stage that sampled them; "": any.
        steps: (first, last), both included.
        search: in the prompt or the response, in any case of letters.
        finish: "eos", "length"; "": either.
        sort: one of SORTS, the least first, or after "-" the greatest; "": as written.
        limit: at most this many; 0: all.
    """

    stage: str = ""
    steps: tuple[float, float] = (0, math.inf)
    search: str = ""
    finish: str = ""
    sort: str = ""
    limit: int = 0

    def __post_init__(self) -> None:
        if self.sort.removeprefix("-") not in ("", *SORTS):
            raise ValueError(f'sort "{self.sort}": one of {", ".join(SORTS)}, or after a minus the greatest first')
        if self.limit < 0:
            raise ValueError(f"limit {self.limit}: at least 0, which is all")


def rollout_files(folder: Path) -> list[tuple[str, int, Path]]:
    """(stage, step, file) of every file of rollouts of a run, in order of the steps of each stage."""
    paths = folder.glob("*/rollouts/*.jsonl")
    return sorted((path.parent.parent.name, int(path.stem), path) for path in paths if path.stem.isdecimal())


def read_rollouts(folder: Path, faults: list[str], stage: str = "", steps=(0, math.inf)) -> Iterator[dict[str, Any]]:
    """The rollouts of a run, with "stage", "step" and "length"; what cannot be read is reported in `faults`.

    "length" is in tokens; of files without it (those of older versions), in characters.
    """
    wrong = 0
    for name, step, path in rollout_files(folder):
        if stage in ("", name) and steps[0] <= step <= steps[1]:
            for record in read_objects(path, faults):
                if not all(isinstance(record.get(field), str) for field in TEXTS):
                    wrong += 1
                    continue
                yield {"stage": name, "length": len(record["response"]), **record, "step": step}
    if wrong:
        faults.append(f"rollouts: {wrong} without the texts of prompt and response are left out")


def select_rollouts(folder: Path, filters: Filters, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The rollouts that pass the filters, sorted. Unsorted ones are read one at a time.

    Raises:
        ValueError: the run has no rollouts, or none of that stage.
    """
    stages = list(dict.fromkeys(stage for stage, _, _ in rollout_files(folder)))
    if not stages or filters.stage not in ("", *stages):
        fix = f"those of {', '.join(stages)}" if stages else "PPO and GRPO write them while they train"
        raise ValueError(f"{folder} has no rollouts{' of ' * bool(filters.stage)}{filters.stage}: {fix}")
    word = filters.search.casefold()
    found = (
        each
        for each in read_rollouts(folder, faults, filters.stage, filters.steps)
        if filters.finish in ("", each.get("finish_reason"))
        and (not word or any(word in each[field].casefold() for field in TEXTS))
    )
    if filters.sort:
        field, sign = filters.sort.removeprefix("-"), -1 if filters.sort.startswith("-") else 1
        found = sorted(found, key=lambda each: _order(each.get(field), sign))
    for number, each in enumerate(found):
        if filters.limit and number >= filters.limit:
            return
        yield each


def _order(value: Any, sign: int) -> tuple[bool, float]:
    """The key that sorts numbers, and after all of them what is not finite or absent."""
    is_number = isinstance(value, int | float)
    return not is_number, sign * value if is_number else 0.0


def numbers_of(rollout: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a rollout: score, reward, kl, length and those of reward functions."""
    return {
        name: value
        for name, value in rollout.items()
        if name not in NO_NUMBERS and (isinstance(value, int | float) or value in NOT_FINITE)
    }


def visible(text: str) -> str:
    """The text with characters that control a terminal or the direction of writing as escapes, such as \\x1b."""
    return "".join(each if each == "\n" or _is_shown(each) else _escape(each) for each in text)


def _is_shown(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in "\u200c\u200d"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def format_rollout(rollout: Mapping[str, Any], colour: bool = False) -> str:
    """One rollout as lines of text: its numbers, its prompt, its response."""
    bold, faint, plain = ("\x1b[1m", "\x1b[2m", "\x1b[0m") if colour else ("", "", "")
    shown = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in _head(rollout)]
    head = f"{rollout['stage']} step {rollout['step']}: {', '.join(shown)}"
    prompt, response = (visible(rollout[field]).strip("\n") for field in TEXTS)
    return f"{bold}--- {visible(head)}{plain}\n{faint}{prompt}{plain}\n>>> {response}\n"


def _head(rollout: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = numbers_of(rollout)
    first = {name: found[name] for name in SORTS if name in found}
    end = {"ended by": rollout["finish_reason"]} if "finish_reason" in rollout else {}
    return list((first | found | end).items())


def parse_steps(text: str) -> tuple[float, float]:
    """(first, last) of "7", "3-9", "3-" or "-9"; "": all. ValueError for another form."""
    first, dash, last = text.partition("-")
    if text in ("", "-"):
        return 0, math.inf
    if not all(part.isdecimal() or not part for part in (first, last)):
        raise ValueError(f'--step "{text}": a step, or a range such as 3-9, 3- or -9')
    start = int(first or 0)
    return start, int(last) if last else (math.inf if dash else start)
