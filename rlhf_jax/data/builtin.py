"""The built-in data: seeded dialogues of a small assistant whose answers a program can judge.

A prompt asks for a small sum, for three numbers in order, for the largest or smallest of three, or for a fact that the
prompt itself states. A good answer is three sentences, a polite opening, the answer and a polite close, and no more:

    What is 3 + 4?
        Sure! 3 + 4 = 7. Anything else?
    Ann lives in Rome and likes tea. What does Ann like?
        Of course! Ann likes tea. Have a nice day!

An answer can have these faults, each with a penalty; the hidden quality of an answer is minus the sum of them:

    opening    2   none, or a rude one          close      2   none, or a rude one
    rambling   2   repeats itself or chatters   no answer  2   evades the question
    wrong      3   answers, and is mistaken

`GOOD_SHARE` of the demonstrations have no fault; of the rest three quarters have one and one quarter has two, drawn by
`FAULT_WEIGHTS`. A preference compares two answers to one prompt that are drawn as the demonstrations are, except that
their quality differs, so that a reward model sees the answers that a model trained on the demonstrations gives; in
`CONTENT_PAIRS` of the pairs the two differ only in that one is right and the other wrong, and for sums, which a reward
model learns last, in `SUM_CONTENT_PAIRS`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GOOD_SHARE = 0.5
CONTENT_PAIRS = 0.6
SUM_CONTENT_PAIRS = 0.85
FAULT_WEIGHTS = {"opening": 3, "close": 3, "rambling": 2, "no answer": 2, "wrong": 1}
PENALTIES = {"opening": 2, "close": 2, "rambling": 2, "no answer": 2, "wrong": 3}

PEOPLE = ("Ann", "Ben", "Eva", "Kim", "Leo", "Max", "Sam", "Tom")
THINGS = ("bag", "book", "coin", "cup", "hat", "key", "lamp", "pen")
FOODS = ("cake", "corn", "fish", "milk", "rice", "soup", "tea", "wine")
CITIES = ("Bern", "Bonn", "Lima", "Oslo", "Riga", "Rome")
COLOURS = ("black", "blue", "green", "grey", "red", "white")
PLACES = ("box", "car", "hall", "room", "shed", "tent")

OPENINGS = ("Sure!", "Of course!", "Happy to help!")
RUDE_OPENINGS = ("Ugh.", "Not you again.")
CLOSINGS = ("Anything else?", "Have a nice day!", "I hope this helps!")
RUDE_CLOSINGS = ("Now go away.", "Do not ask again.")
EVASIONS = ("I do not know.", "Hard to say.", "Ask Tom.")
CHATTER = ("I like to talk. I talk a lot.", "Well, you know. Life is long.")


@dataclass(frozen=True)
class Question:
    prompt: str
    right: str  # the sentence that answers it
    wrong: tuple[str, ...]  # sentences that answer it falsely, or answer another question
    content: float = CONTENT_PAIRS  # share of the pairs that differ only in right and wrong


@dataclass(frozen=True)
class Answer:
    text: str
    faults: tuple[str, ...]  # sorted; () for a good answer

    @property
    def penalty(self) -> int:
        return sum(PENALTIES[fault] for fault in self.faults)


@dataclass(frozen=True)
class BuiltinDialogue:
    prompt: str
    demonstration: Answer
    chosen: Answer  # always of strictly smaller penalty than `rejected`
    rejected: Answer


def make_rows(seed: int, rows: int) -> Iterator[dict[str, str]]:
    """`rows` dictionaries with prompt, answer, chosen and rejected; equal arguments give equal rows.

    More rows only append to fewer. Raises ValueError if `rows` is not positive.
    """
    for each in make_dialogues(seed, rows):
        texts = (each.prompt, each.demonstration.text, each.chosen.text, each.rejected.text)
        yield dict(zip(("prompt", "answer", "chosen", "rejected"), texts, strict=True))


def make_dialogues(seed: int, rows: int) -> Iterator[BuiltinDialogue]:
    """The dialogues of `make_rows`, with the faults of each answer."""
    if rows < 1:
        raise ValueError(f"the built-in data needs at least one row, not {rows}")
    rng = random.Random(seed)
    for _ in range(rows):
        question = rng.choice(QUESTIONS)(rng)
        demonstration = _write(rng, question, _draw_faults(rng))
        yield BuiltinDialogue(question.prompt, demonstration, *_pair(rng, question))


def _pair(rng: random.Random, question: Question) -> tuple[Answer, Answer]:
    """(better, worse), of strictly different penalty."""
    faults = _draw_faults(rng)
    if rng.random() < question.content:
        form = tuple(fault for fault in faults if fault not in ("no answer", "wrong"))[:1]
        style = rng.getrandbits(32)
        right = _write(random.Random(style), question, form)
        return right, _write(random.Random(style), question, tuple(sorted((*form, "wrong"))))
    first = second = _write(rng, question, faults)
    while first.penalty == second.penalty:
        second = _write(rng, question, _draw_faults(rng))
    better, worse = sorted((first, second), key=lambda answer: answer.penalty)
    return better, worse


def _draw_faults(rng: random.Random) -> tuple[str, ...]:
    if rng.random() < GOOD_SHARE:
        return ()
    weights = dict(FAULT_WEIGHTS)
    faults = rng.choices(list(weights), list(weights.values()))
    if rng.random() < 0.25:
        excluded = {"no answer", "wrong"} if faults[0] in ("no answer", "wrong") else set(faults)
        others = {fault: weight for fault, weight in weights.items() if fault not in excluded}
        faults += rng.choices(list(others), list(others.values()))
    return tuple(sorted(faults))


def _write(rng: random.Random, question: Question, faults: tuple[str, ...]) -> Answer:
    """An answer with exactly these faults; its choices of words do not depend on whether "wrong" is among them."""
    opening = rng.choice(("", *RUDE_OPENINGS)) if "opening" in faults else rng.choice(OPENINGS)
    close = rng.choice(("", *RUDE_CLOSINGS)) if "close" in faults else rng.choice(CLOSINGS)
    body = rng.choice(EVASIONS) if "no answer" in faults else question.right
    ramble = rng.choice(("again", *CHATTER)) if "rambling" in faults else ""
    if "wrong" in faults:
        body = rng.choice(question.wrong)
    text = " ".join(part for part in (opening, body, body if ramble == "again" else ramble, close) if part)
    return Answer(text, faults)


def _sum(rng: random.Random) -> Question:
    a, b = rng.randrange(6), rng.randrange(6)
    name, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    story = f"{name} has {a} {thing}s and gets {b} more. How many {thing}s is that?"
    # Stories are so many that every part of a split, which is by prompts, asks for every sum.
    prompt = rng.choice((f"What is {a} + {b}?", f"Please add {a} and {b}.", story, story, story, story))
    totals = [a + b + d for d in (-2, -1, 1, 2) if a + b + d >= 0]
    wrong = tuple(f"{a} + {b} = {total}." for total in totals)
    return Question(prompt, f"{a} + {b} = {a + b}.", wrong, SUM_CONTENT_PAIRS)


def _order(rng: random.Random) -> Question:
    numbers = rng.sample(range(10), 3)
    listed = ", ".join(map(str, numbers))
    prompt = rng.choice((f"Sort {listed}.", f"Please put {listed} in order.", f"What is the order of {listed}?"))
    right = sorted(numbers)
    spare = rng.choice([n for n in range(10) if n not in numbers])
    swapped = rng.choice(([right[1], right[0], right[2]], [right[0], right[2], right[1]]))
    replaced = sorted([spare, *rng.sample(numbers, 2)])
    return Question(prompt, _in_order(right), tuple(map(_in_order, (right[::-1], swapped, replaced))))


def _in_order(numbers: Sequence[int]) -> str:
    return f"In order: {', '.join(map(str, numbers))}."


def _extreme(rng: random.Random) -> Question:
    numbers = rng.sample(range(10), 3)
    low, middle, high = sorted(numbers)
    words = ("largest", high), ("smallest", low)
    asked = rng.randrange(2)
    word, right = words[asked]
    a, b, c = numbers
    prompt = rng.choice((f"Which is the {word}: {a}, {b} or {c}?", f"Find the {word} of {a}, {b}, {c}."))
    other_word, other = words[1 - asked]
    wrong = f"The {other_word} is {other}.", f"The {word} is {rng.choice((middle, other))}."
    return Question(prompt, f"The {word} is {right}.", wrong)


def _person(rng: random.Random) -> Question:
    name, cities, foods = rng.choice(PEOPLE), rng.sample(CITIES, 2), rng.sample(FOODS, 2)
    lives, likes = f"lives in {cities[0]}", f"likes {foods[0]}"
    prompt = rng.choice((f"{name} {lives} and {likes}.", f"{name} {likes} and {lives}."))
    home, wrong_home = (f"{name} lives in {city}." for city in cities)
    taste, wrong_taste = (f"{name} likes {food}." for food in foods)
    if rng.random() < 0.5:
        return Question(f"{prompt} Where does {name} live?", home, (taste, wrong_home))
    return Question(f"{prompt} What does {name} like?", taste, (home, wrong_taste))


def _thing(rng: random.Random) -> Question:
    thing, colours, places = rng.choice(THINGS), rng.sample(COLOURS, 2), rng.sample(PLACES, 2)
    described = f"{colours[0]} {thing}"
    prompt = rng.choice((f"The {described} is in the {places[0]}.", f"In the {places[0]} is a {described}."))
    look, wrong_look = (f"The {thing} is {colour}." for colour in colours)
    where, wrong_where = (f"The {thing} is in the {place}." for place in places)
    if rng.random() < 0.5:
        return Question(f"{prompt} What colour is the {thing}?", look, (where, wrong_look))
    return Question(f"{prompt} Where is the {thing}?", where, (look, wrong_where))


QUESTIONS = (_sum, _order, _extreme, _person, _thing)
