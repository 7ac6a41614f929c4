"""Votes on two answers: preference pairs in a file of JSON lines that `reward` and `dpo` read, and ties in another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.mapping import make_mapper
from rlhf_jax.data.records import BadRow, Row
from rlhf_jax.serve.errors import ApiError, invalid
from rlhf_jax.serve.fields import take

VOTE_KINDS = ("pairs", "ties")
SIDES = ("left", "right")
FINISHES = ("stop", "length")
VOTE_FIELDS = {"messages", "vote", *SIDES}
ANSWER_FIELDS = {"text", "model", "temperature", "top_p", "max_tokens", "seed", "finish_reason"}


class VoteFile:
    """A file of JSON lines that several tabs, and several servers, append to. Each line is written whole or not at all.

    A line is identified by the digest of its bytes, so that rows need no field for it.
    """

    def __init__(self, path: Path):
        """Creates the file. OSError where that is not possible."""
        self.path = path.resolve()
        self.path.open("ab").close()
        self.threads = threading.Lock()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Of the threads of this process, then of other processes."""
        with self.threads, FileLock(f"{self.path}.lock"):
            yield

    def append(self, row: Mapping[str, Any]) -> str:
        """Write a row to the disk; returns its id. OSError, with the file as it was, where that fails."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self.lock():
            size = self.path.stat().st_size
            try:
                with self.path.open("r+b") as file:
                    file.seek(max(size - 1, 0))
                    is_cut = file.read(1) not in (b"", b"\n")  # by a program that was killed, or an editor
                    file.write(b"\n" * is_cut + line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, size)  # after the file is closed, which tries again to write the rest
                raise
        return line_id(line)

    def lines(self) -> list[bytes]:
        with self.lock():
            return self.path.read_bytes().splitlines(keepends=True)

    def remove(self, id: str) -> bool:
        """Remove the line of this id; returns whether there was one. The file is replaced at once."""
        with self.lock():
            lines = self.path.read_bytes().splitlines(keepends=True)
            found = next((number for number, line in enumerate(lines) if line_id(line) == id), None)
            if found is None:
                return False
            new = self.path.with_name(f"{self.path.name}.new")
            with new.open("wb") as file:
                file.writelines(lines[:found] + lines[found + 1 :])
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self.path, new)
            new.replace(self.path)
        return True


class Votes(NamedTuple):
    """The files of a server."""

    pairs: VoteFile
    ties: VoteFile


def open_votes(path: str | Path) -> Votes:
    """The files, created where missing: `path`, and next to it NAME.ties.jsonl.

    Raises:
        ValueError: another ending, or no folder to create them in.
    """
    path = Path(path).expanduser()
    if path.suffix != ".jsonl":
        raise ValueError(f"--votes {path}: the file must end with .jsonl, as `reward` and `dpo` read it")
    if not path.parent.is_dir():
        raise ValueError(f"--votes {path}: there is no folder {path.parent}; make it first")
    return Votes(VoteFile(path), VoteFile(path.with_suffix(".ties.jsonl")))


def line_id(line: bytes) -> str:
    return hashlib.blake2b(line.strip(), digest_size=12).hexdigest()


def parse_vote(body: Mapping[str, Any], models: Set[str]) -> tuple[str, dict[str, Any]]:
    """("pairs" or "ties", the row) of a vote on two answers to one prompt. ApiError 400 or 404 for what is wrong.

    A pair has the fields that the data format "fields" reads by default: prompt, chosen and rejected. The others, which
    it ignores, say how the row came about.
    """
    check_fields(body, VOTE_FIELDS, "")
    answers = {side: parse_answer(body[side], side, models) for side in SIDES}
    vote, other = body["vote"], "left" if body["vote"] == "right" else "right"
    if vote not in (*SIDES, "tie"):
        raise invalid(f"vote must be left, right or tie, not {vote!r:.60}", "vote")
    names = {side: side for side in SIDES} if vote == "tie" else {vote: "chosen", other: "rejected"}
    row = {"prompt": body["messages"]} | {name: answers[side].pop("text") for side, name in names.items()}
    check_row(row, *names.values(), is_pair=vote != "tie")
    row |= {f"{name}_by": answers[side] for side, name in names.items()}
    row |= {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    return ("ties", row) if vote == "tie" else ("pairs", row | {"chosen_side": vote})


def check_fields(found: Any, known: Set[str], before: str) -> None:
    """ApiError 400 unless an object has these fields and no others."""
    if not isinstance(found, dict):
        raise invalid(f"{before.rstrip('.')} must be an object, not {found!r:.60}", before.rstrip("."), "invalid_type")
    if unknown := sorted(found.keys() - known):
        raise invalid(f"Unrecognized request argument supplied: {before}{unknown[0]}", unknown[0], "unknown_parameter")
    if missing := sorted(known - found.keys()):
        raise invalid(f"{before}{missing[0]} is missing", f"{before}{missing[0]}", "missing_required_parameter")


def parse_answer(answer: Any, side: str, models: Set[str]) -> dict[str, Any]:
    """One answer with its model and settings."""
    check_fields(answer, ANSWER_FIELDS, f"{side}.")
    model, finish = take(answer, "model", str, ""), take(answer, "finish_reason", str, "")
    if model not in models:
        raise ApiError(404, f"The model {model!r:.60} does not exist", "model_not_found", f"{side}.model")
    if finish not in FINISHES:
        raise invalid(f"finish_reason must be stop or length, not {finish!r:.60}", f"{side}.finish_reason")
    return {
        "text": take(answer, "text", str, ""),
        "model": model,
        "temperature": take(answer, "temperature", float, 1.0, 0, 2),
        "top_p": take(answer, "top_p", float, 1.0, 1e-6, 1),
        "max_tokens": take(answer, "max_tokens", int, None, 1),
        "seed": take(answer, "seed", int, None, -(2**63), 2**63 - 1),
        "finish_reason": finish,
    }


def check_row(row: Mapping[str, Any], better: str, worse: str, *, is_pair: bool) -> None:
    """ApiError 400 unless the trainers' reader reads the row, and where it is a pair, as two different answers."""
    if not isinstance(row["prompt"], list):
        raise invalid("messages must be a list of {role, content}", "messages", "invalid_type")
    for message in row["prompt"]:
        check_fields(message, {"role", "content"}, "messages.")
    source = SourceConfig("votes", format="fields", chosen=better, rejected=worse)
    try:
        (example,) = make_mapper(source, "pair")(Row("the vote", 1, dict(row)))
    except BadRow as error:
        raise invalid(str(error), "messages") from error
    if not example.turns[-1][1].strip():
        raise invalid("the last message is empty", "messages")
    if is_pair and not (example.chosen.strip() and example.rejected.strip()):
        raise invalid("an answer is empty, and no trainer learns from such a pair: vote tie, or not at all", "vote")
    if is_pair and example.chosen.strip() == example.rejected.strip():
        raise invalid("the answers are equal, and no trainer learns from such a pair: vote tie, or not at all", "vote")
