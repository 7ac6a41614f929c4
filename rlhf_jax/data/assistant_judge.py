"""Judges answers to the built-in prompts: reads both texts, works the answer out again, and names what is wrong.

For evaluation only. Nothing that trains may import this module, and it imports nothing of what wrote the data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

OPENINGS = {"Sure!", "Of course!", "Happy to help!"}
CLOSES = {"Anything else?", "Have a nice day!", "I hope this helps!"}

SENTENCE = re.compile(r"[^.!?]*[.!?]")


@dataclass(frozen=True)
class Verdict:
    good: bool
    faults: tuple[str, ...]  # of "opening", "no answer", "wrong", "rambling", "close", "unfinished", in this order


@dataclass(frozen=True)
class Task:
    """How one kind of prompt is recognised, how its answers read, and what the right one is."""

    prompt: re.Pattern[str]
    claim: re.Pattern[str]  # a whole sentence that answers, rightly or not
    is_right: Callable[[str, str], bool]  # (prompt, claim sentence)


def judge(prompt: str, response: str, ended: bool) -> Verdict:
    """The verdict on `response` to the user's words `prompt`; `ended`: the end-of-text token followed it.

    Raises ValueError for a prompt that is not one of the built-in ones.
    """
    task = _task(prompt.strip())
    sentences = [sentence.strip() for sentence in SENTENCE.findall(response)]
    tail = SENTENCE.sub("", response).strip()
    claims = [at for at, sentence in enumerate(sentences) if task.claim.fullmatch(sentence)]
    before = claims[0] if claims else 1
    after = len(sentences) - claims[-1] - 1 if claims else 1

    found = {
        "opening": not sentences or sentences[0] not in OPENINGS,
        "no answer": not claims,
        "wrong": any(not task.is_right(prompt, sentences[at]) for at in claims),
        "rambling": len(sentences) > 3 or before > 1 or after > 1 or len(set(sentences)) < len(sentences),
        "close": not sentences or sentences[-1] not in CLOSES,
        "unfinished": not ended or tail != "",
    }
    faults = tuple(fault for fault, is_there in found.items() if is_there)
    return Verdict(good=not faults, faults=faults)


def _task(prompt: str) -> Task:
    for task in TASKS:
        if task.prompt.fullmatch(prompt):
            return task
    raise ValueError(f"cannot judge answers to {prompt!r}: it is not a prompt of the built-in data")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _sum_is_right(prompt: str, claim: str) -> bool:
    a, b = _numbers(prompt)
    return _numbers(claim) == [a, b, a + b]


def _order_is_right(prompt: str, claim: str) -> bool:
    return _numbers(claim) == sorted(_numbers(prompt))


def _extreme_is_right(prompt: str, claim: str) -> bool:
    word, pick = ("largest", max) if "largest" in prompt else ("smallest", min)
    return word in claim and _numbers(claim) == [pick(_numbers(prompt))]


def _fact_is_right(prompt: str, claim: str) -> bool:
    """A right claim is a fact that the prompt states, about whom and what the question asks for."""
    *facts, question = (sentence.strip() for sentence in SENTENCE.findall(prompt))
    name, verb = re.findall(r"\w+", question)[2:4]
    values = {(m[1], m[2]): m[3] for fact in facts for m in _FACT.finditer(_with_subjects(fact))}
    m = _FACT.fullmatch(claim)
    assert m is not None
    return m[1] == name and m[2].startswith(verb) and values.get((name, m[2])) == m[3]


def _with_subjects(fact: str) -> str:
    """ "Ann likes tea and lives in Rome." -> "Ann likes tea. Ann lives in Rome."""
    return fact.replace(" and ", f". {fact.split()[0]} ")


_FACT = re.compile(r"(\w+) (likes|lives in) (\w+)\.")

TASKS = (
    Task(
        re.compile(
            r"What is \d+ \+ \d+\?"
            r"|Please add \d+ and \d+\."
            r"|\w+ has \d+ (\w+)s and gets \d+ more\. How many \1s is that\?"
        ),
        re.compile(r"\d+ \+ \d+ = \d+\."),
        _sum_is_right,
    ),
    Task(
        re.compile(r"(Sort|Please put|What is the order of) \d+, \d+, \d+( in order)?[.?]"),
        re.compile(r"In order: \d+(, \d+)*\."),
        _order_is_right,
    ),
    Task(
        re.compile(r"(Which is|Find) the (largest|smallest)(:| of) \d+, \d+(, | or )\d+[?.]"),
        re.compile(r"The (largest|smallest) is \d+\."),
        _extreme_is_right,
    ),
    Task(
        re.compile(r"(\w+ (likes|lives in) \w+( and (likes|lives in) \w+)?\. )+(What|Where) does \w+ (like|live)\?"),
        _FACT,
        _fact_is_right,
    ),
)
