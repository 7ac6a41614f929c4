"""Python functions that score answers: found by their names, called as TRL calls them, stopped after a time limit."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.records import Example, Turn, Turns

SECONDS_TO_FIND = 60.0  # at most, to find the answer that a function fails on


class OutOfTime(Exception):
    """A function that has not returned within its time limit."""


class Answered(NamedTuple):
    """A prompt with an answer to it."""

    turns: Turns  # the prompt
    answer: str
    ended: bool = True  # whether the answer has its end, which the reward model then reads
    fields: Mapping[str, Any] = {}  # of the row that the prompt comes from
    tools: tuple[dict[str, Any], ...] = ()
    where: str = "an example"  # the place of that row, for messages


def answered_example(example: Example, answer: str, ended: bool, fields: Mapping[str, Any]) -> Answered:
    """An answer to the prompt of an example, whose row has these fields."""
    where = f"{example.source}, row {example.row}"
    return Answered(example.turns, answer, ended, fields, example.tools, where)


def is_function(reward: str) -> bool:
    """Whether this names a function, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, and not a folder."""
    return ":" in reward and not Path(reward).exists()


def load_function(reward: str) -> Callable:
    """The function that FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION names. ValueError where there is none."""
    place, _, name = reward.rpartition(":")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(f"reward_function_{Path(place).stem}", place)
            module = sys.modules[found.name] = importlib.util.module_from_spec(found)
            folder = str(Path(place).resolve().parent)  # for the modules next to it
            sys.path += [folder] * (folder not in sys.path)
            found.loader.exec_module(module)
        else:
            sys.path += [os.getcwd()] * (os.getcwd() not in sys.path)
            module = importlib.import_module(place)
        function = getattr(module, name)
    except Exception as error:  # of the user's code too
        raise ValueError(f"the reward function {reward}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"the reward function {reward}: {name} is no function")
    return function


def call_function(
    function: Callable, answers: Sequence[Answered], *, as_messages: bool, seconds: float = 0.0
) -> np.ndarray:
    """[B] float scores by a reward function as TRL has them: function(prompts=, completions=, **columns) -> list.

    Args:
        function: may be `async`, or return an awaitable.
        as_messages: prompts and completions are lists of messages; else texts, of prompts with one turn.
        columns: the other fields of the rows; only those that the function has parameters for. Completions are also
            named responses; `examples` is the fields of each row. A function without a parameter of these two names is
            given prompts, completions and, where it takes a third argument, examples by position.
        seconds: time limit of the call; 0: none. A function that exceeds it goes on in its thread.
    Raises:
        ValueError: the function fails, takes too long, or does not return one finite number for each answer; the
            message names it and an example.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        found = run_within(seconds, lambda: function_result(function, answers, as_messages))
        scores = np.array([float(each) for each in found])
    except Exception as error:  # of the user's code
        is_late = isinstance(error, OutOfTime)
        where = answers[0].where if is_late else failing_answer(function, answers, as_messages, type(error))
        raise ValueError(f"the reward function {name}: {describe_error(error)}, for the answer to {where}") from error
    if scores.shape != (len(answers),):
        raise ValueError(
            f"the reward function {name} must return one finite number for each of {len(answers)} answers, and "
            f"returned {len(scores)}; the first answer is to {answers[0].where}"
        )
    if not np.isfinite(scores).all():
        at = int(np.argmin(np.isfinite(scores)))
        raise ValueError(
            f"the reward function {name} must return one finite number for each of {len(answers)} answers, and "
            f"returned {scores[at]} for the answer to {answers[at].where}: {answers[at].answer[:200]!r}"
        )
    return scores


def function_result(function: Callable, answers: Sequence[Answered], as_messages: bool) -> Any:
    """What the function returns, awaited where it is awaitable."""
    prompts = [messages_of(each.turns) if as_messages else each.turns[-1][1] for each in answers]
    completions = [messages_of((("assistant", each.answer),)) if as_messages else each.answer for each in answers]
    columns = {key: [each.fields.get(key) for each in answers] for key in answers[0].fields}
    examples = [dict(each.fields) for each in answers]
    given = {**columns, "prompts": prompts, "completions": completions}
    parameters = inspect.signature(function).parameters
    takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    if takes_all or {"completions", "responses"} & parameters.keys():
        others = {"responses": completions, "examples": examples}
        named = {key: value for key, value in given.items() if takes_all or key in parameters}
        found = function(**named | {key: value for key, value in others.items() if key in parameters})
    else:
        found = function(*(prompts, completions, examples)[: 2 + (len(parameters) > 2)])
    return asyncio.run(_await(found)) if inspect.isawaitable(found) else found


async def _await(found: Any) -> Any:
    return await found


def run_within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, from a thread of its own. OutOfTime after `seconds`; 0: it waits."""
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:  # raised again in the caller's thread
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True, name="reward function").start()
    try:
        found, error = outcome.get(timeout=seconds or None)
    except queue.Empty:
        raise OutOfTime(f"no scores after {seconds:g} seconds") from None
    if error is not None:
        raise error
    return found


def failing_answer(function: Callable, answers: Sequence[Answered], as_messages: bool, kind: type[Exception]) -> str:
    """The place of the first answer on which the function alone raises this kind of error, else of the first."""
    end = time.monotonic() + SECONDS_TO_FIND
    for each in answers:
        if (left := end - time.monotonic()) <= 0:
            break
        try:
            for score in run_within(left, lambda each=each: function_result(function, [each], as_messages)):
                float(score)
        except kind:
            return f"{each.where}: {each.answer[:200]!r}"
        except Exception:  # another error of the user's code: not the one that is reported
            continue
    return answers[0].where


def describe_error(error: Exception) -> str:
    """The kind, the text and the line of the user's code."""
    line, text = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())
    place = "" if line.filename == __file__ else f" ({Path(line.filename).name}, line {line.lineno})"
    return f"{type(error).__name__}: {text}{place}"


def plain_turns(turns: Turns) -> list[tuple[str, str]]:
    """(role, content) of each turn."""
    return [(turn[0], turn[1]) for turn in turns]


def messages_of(turns: Turns) -> list[dict[str, Any]]:
    """The turns as messages, with all their fields."""
    return [{"role": turn.role, "content": turn.content, **turn.extra} for turn in (Turn(*turn) for turn in turns)]
