"""The rollouts that a report holds: all of a small run, else a part that shows every step and its extremes."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.report.rollouts import TEXTS, numbers_of, read_rollouts

ROLLOUT_BYTES = 1_200_000  # of a report, over all runs
TEXT_CHARACTERS = 6000  # of a prompt or a response, of which longer ones keep the two ends
REPEATED_PROMPTS = 40  # sampled early and late, whose first and last rollouts are kept


class Known(NamedTuple):
    """What the choice needs of a rollout."""

    number: int  # in the order of reading
    stage: str
    step: int
    prompt: int  # hash
    size: int  # bytes in the report
    numbers: tuple[float, float, float]  # score, KL, length


def read_sample(folder: Path, share: float, faults: list[str]) -> dict[str, Any]:
    """{"fields", "prompts", "rows": [[...]], "of": rollouts of the run}: rollouts up to `share` of ROLLOUT_BYTES.

    A row has its prompt's index in "prompts" and, as "fields" says, a value for each field.
    """
    known = [_know(number, each) for number, each in enumerate(read_rollouts(folder, faults))]
    chosen = choose(known, int(ROLLOUT_BYTES * share))
    kept = [each for number, each in enumerate(read_rollouts(folder, [])) if number in chosen]
    names = list(dict.fromkeys(name for each in kept for name in numbers_of(each)))
    fields = ["stage", "step", "prompt", "response", "finish_reason", *names]
    prompts: dict[str, int] = {}
    rows = []
    for each in kept:
        place = prompts.setdefault(shorten(each["prompt"]), len(prompts))
        numbers = [_round(each.get(name)) for name in names]
        rows.append(
            [each["stage"], each["step"], place, shorten(each["response"]), each.get("finish_reason"), *numbers]
        )
    return {"fields": fields, "prompts": list(prompts), "rows": rows, "of": len(known)}


def choose(known: Sequence[Known], limit: int) -> set[int]:
    """The numbers of rollouts of at most `limit` bytes together; all of them, where they fit."""
    if sum(each.size for each in known) <= limit:
        return {each.number for each in known}
    chosen: set[int] = set()
    for each in itertools.chain(_first_and_last(known), _by_steps(known)):
        if each.number not in chosen:
            limit -= each.size
            if limit < 0:
                break
            chosen.add(each.number)
    return chosen


def _first_and_last(known: Sequence[Known]) -> Iterator[Known]:
    """First and last rollout of the prompts whose steps are furthest apart."""
    groups: dict[tuple[str, int], list[Known]] = {}
    for each in known:
        groups.setdefault((each.stage, each.prompt), []).append(each)
    apart = [group for group in groups.values() if group[-1].step > group[0].step]
    apart.sort(key=lambda group: group[0].step - group[-1].step)
    for group in apart[:REPEATED_PROMPTS]:
        yield from (group[0], group[-1])


def _by_steps(known: Sequence[Known]) -> Iterator[Known]:
    """Of each step the best, the worst, the greatest KL, the longest and the shortest, then others at random.

    One of each step in turn, in an order of steps of which any beginning is spread over the run.
    """
    chance = random.Random(0)
    steps: dict[tuple[str, int], list[Known]] = {}
    for each in known:
        steps.setdefault((each.stage, each.step), []).append(each)
    queues = []
    for group in steps.values():
        score, kl, length = ([each.numbers[i] for each in group] for i in range(3))
        ends = [score.index(max(score)), score.index(min(score)), kl.index(max(kl))]
        ends += [length.index(max(length)), length.index(min(length))]
        order = chance.sample(range(len(group)), len(group))
        queues.append([group[index] for index in dict.fromkeys([*ends, *order])])
    # The binary digits of the index in reverse: a half, a quarter, three quarters, ...
    spread = sorted(range(len(queues)), key=lambda index: f"{index:032b}"[::-1])
    for rank in itertools.count():
        found = [queues[index][rank] for index in spread if rank < len(queues[index])]
        if not found:
            return
        yield from found


def _know(number: int, rollout: dict[str, Any]) -> Known:
    texts = [shorten(rollout[name]) for name in TEXTS]
    size = sum(len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) for text in texts)
    found = numbers_of(rollout)
    numbers = [
        value if isinstance(value := found.get(name, 0), int | float) else 0 for name in ("score", "kl", "length")
    ]
    return Known(
        number, rollout["stage"], rollout["step"], hash(rollout["prompt"]), size + 10 * len(found) + 30, (*numbers,)
    )


def shorten(text: str) -> str:
    """The text, of which a long one has a note in the place of its middle."""
    if len(text) <= TEXT_CHARACTERS:
        return text
    half = TEXT_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _round(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
