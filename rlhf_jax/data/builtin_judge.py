"""Judges answers to the built-in prompts: reads both texts, works the answer out again, and names what is wrong.

For evaluation only. Nothing that trains may import this module, and it does not import the module that generates the
data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

OPENINGS = {"Sure!", "Of course!", "Happy to help!"}
CLOSINGS = {"Anything else?", "Have a nice day!", "I hope this helps!"}

SENTENCE = re.compile(r"[^.!?]*[.!?]")


@dataclass(frozen=True)
class Verdict:
    good: bool
    faults: tuple[str, ...]  # of "opening", "no answer", "wrong", "rambling", "close", "unfinished", in this order


@dataclass(frozen=True)
class Task:
    """How one kind of prompt is recognised, how its answers read, and what the right one is, to the letter."""

    prompt: str  # a regular expression, like `claim`
    claim: str  # a whole sentence that answers, rightly or not
    right: Callable[[str], str]  # the prompt's right claim, worked out from its words


def judge(prompt: str, response: str, ended: bool) -> Verdict:
    """The verdict on `response` to the user's words `prompt`; `ended`: the end-of-text token followed it.

    Raises ValueError for a prompt that is not one of the built-in ones.
    """
    prompt = prompt.strip()
    task = _task(prompt)
    right = task.right(prompt)
    sentences = [sentence.strip() for sentence in SENTENCE.findall(response)]
    tail = SENTENCE.sub("", response).strip()
    claims = [at for at, sentence in enumerate(sentences) if re.fullmatch(task.claim, sentence)]
    before = claims[0] if claims else 1
    after = len(sentences) - claims[-1] - 1 if claims else 1

    found = {
        "opening": not sentences or sentences[0] not in OPENINGS,
        "no answer": not claims,
        "wrong": any(sentences[at] != right for at in claims),
        "rambling": len(sentences) > 3 or before > 1 or after > 1 or len(set(sentences)) < len(sentences),
        "close": not sentences or sentences[-1] not in CLOSINGS,
        "unfinished": not ended or tail != "",
    }
    faults = tuple(fault for fault, is_there in found.items() if is_there)
    return Verdict(good=not faults, faults=faults)


def _task(prompt: str) -> Task:
    for task in TASKS:
        if re.fullmatch(task.prompt, prompt):
            return task
    raise ValueError(f"cannot judge answers to {prompt!r}: it is not a prompt of the built-in data")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _sum(prompt: str) -> str:
    a, b = _numbers(prompt)
    return f"{a} + {b} = {a + b}."


def _order(prompt: str) -> str:
    return f"In order: {', '.join(map(str, sorted(_numbers(prompt))))}."


def _extreme(prompt: str) -> str:
    word, pick = ("largest", max) if "largest" in prompt else ("smallest", min)
    return f"The {word} is {pick(_numbers(prompt))}."


def _person(prompt: str) -> str:
    name, *_ = prompt.split()
    verb = "lives in" if "Where" in prompt else "likes"
    return f"{name} {verb} {_word(f'{verb} X', prompt)}."


def _thing(prompt: str) -> str:
    *_, thing = re.findall(r"\w+", prompt)
    if "Where" in prompt:
        return f"The {thing} is in the {_word('in the X', prompt)}."
    return f"The {thing} is {_word(f'X {thing}', prompt)}."


def _word(phrase: str, text: str) -> str:
    """The word in the place of X where the phrase first occurs."""
    found = re.search(phrase.replace("X", r"(\w+)"), text, re.IGNORECASE)
    assert found is not None
    return found[1]


TASKS = (
    Task(
        r"What is \d+ \+ \d+\?|Please add \d+ and \d+\.|\w+ has \d+ (\w+)s and gets \d+ more\. How many \1s is that\?",
        r"\d+ \+ \d+ = \d+\.",
        _sum,
    ),
    Task(r"(Sort|Please put|What is the order of) \d+, \d+, \d+( in order)?[.?]", r"In order: \d+(, \d+)*\.", _order),
    Task(
        r"(Which is|Find) the (largest|smallest)(:| of) \d+, \d+(, | or )\d+[?.]",
        r"The (largest|smallest) is \d+\.",
        _extreme,
    ),
    Task(
        r"(\w+) (lives in \w+ and likes|likes \w+ and lives in) \w+\. (Where does \1 live|What does \1 like)\?",
        r"\w+ (lives in|likes) \w+\.",
        _person,
    ),
    Task(
        r"(The \w+ \w+ is in the \w+|In the \w+ is a \w+ \w+)\. (What colour|Where) is the \w+\?",
        r"The \w+ is (in the )?\w+\.",
        _thing,
    ),
)
