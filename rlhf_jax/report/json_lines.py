"""Reads files of JSON objects, one a line, that a killed run may have left incomplete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOT_FINITE = ("nan", "inf", "-inf")  # how a metric that JSON has no number for is written


def read_objects(path: Path, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; a text about the lines that hold none, if any, is added to `faults`."""
    wrong, number, is_cut = [], 0, False
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                # Python writes and reads the words NaN and Infinity, which JSON does not have.
                found = json.loads(line, parse_constant=_name_of_constant) if line.strip() else None
            except (ValueError, RecursionError):
                found = ""
            if isinstance(found, dict):
                yield found
            elif found is not None:
                wrong.append(number)
                is_cut = not line.endswith("\n")
    if wrong == [number] and is_cut:
        faults.append(f"{_short(path)}: the last line is incomplete, as a killed run leaves it, and is left out")
    elif wrong:
        faults.append(f"{_short(path)}: {len(wrong)} line(s) are not JSON objects and are left out, first {wrong[0]}")


def _name_of_constant(constant: str) -> str:
    return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}[constant]


def _short(path: Path) -> str:
    """The path within its run folder, such as ppo/metrics.jsonl."""
    return "/".join(path.parts[-3:] if path.parent.name == "rollouts" else path.parts[-2:])
