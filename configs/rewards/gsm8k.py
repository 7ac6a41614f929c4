"""Rewards for grade-school mathematics (gsm8k), whose answers end with "#### " and a number.

[grpo]
rewards = ["configs/rewards/gsm8k.py:is_formatted", "configs/rewards/gsm8k.py:is_correct"]
"""

import re

# The last line of an answer, with the number that it names.
ENDING = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)\s*$")


def number(text: str) -> str:
    """The number at the end of an answer without separators of thousands; "" where there is none."""
    found = ENDING.search(text)
    return found[1].replace(",", "") if found else ""


def is_formatted(completions: list[str]) -> list[float]:
    """0.5 for an answer that has "####" once, and 0.5 more for one that ends with "#### " and a number."""
    return [0.5 * (text.count("####") == 1) + 0.5 * bool(number(text)) for text in completions]


def is_correct(completions: list[str], answer: list[str]) -> list[float]:
    """1 for an answer whose number is that of the row's field `answer`."""
    return [
        float(number(text) != "" and float(number(text)) == float(number(right)))
        for text, right in zip(completions, answer, strict=True)
    ]
