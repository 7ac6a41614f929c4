"""A judge as a reward: a language model that an OpenAI-compatible server serves scores each answer by a rubric.

    [grpo]
    rewards = ["configs/rewards/judge.py:judge"]
    reward_seconds = 300.0

The environment says where it is: JUDGE_URL (such as http://localhost:8000/v1), JUDGE_MODEL, and JUDGE_KEY where the
server wants one. Copy this file and change RUBRIC for what your answers should be.
"""

import asyncio
import json
import os
import re
import time
import urllib.error
import urllib.request

# {criterion: (its weight, the question that the judge answers from 0, not at all, to 10, entirely)}
RUBRIC = {
    "helpful": (0.5, "Does the response do what the prompt asks for?"),
    "correct": (0.4, "Is everything that the response says true?"),
    "concise": (0.1, "Is the response free of what the prompt does not ask for?"),
}
AT_ONCE, ATTEMPTS, SECONDS = 16, 3, 60.0  # requests at a time, attempts for each, time limit of one


async def judge(prompts: list[str], responses: list[str]) -> list[float]:
    """The weighted mean of the judge's marks for each response, from 0 to 1."""
    places = asyncio.Semaphore(AT_ONCE)

    async def mark(prompt: str, response: str) -> float:
        async with places:
            return weigh(await asyncio.to_thread(ask, request_text(prompt, response)))

    return await asyncio.gather(*map(mark, prompts, responses))


def request_text(prompt: str, response: str) -> str:
    """What the judge reads."""
    questions = "\n".join(f"{name}: {question}" for name, (_, question) in RUBRIC.items())
    form = json.dumps(dict.fromkeys(RUBRIC, 0))
    return (
        "Mark the response to a prompt from 0 (not at all) to 10 (entirely) by each of these questions:\n"
        f"{questions}\n\n<prompt>\n{prompt}\n</prompt>\n<response>\n{response}\n</response>\n\n"
        f"Answer with JSON of this form alone: {form}"
    )


def ask(text: str) -> str:
    """The judge's answer. Raises OSError where the server does not answer."""
    body = {"model": os.environ["JUDGE_MODEL"], "messages": [{"role": "user", "content": text}], "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('JUDGE_KEY', 'none')}"}
    url = os.environ["JUDGE_URL"].rstrip("/") + "/chat/completions"
    for attempt in range(1, ATTEMPTS + 1):
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            # Too many requests, or an error of the server: another attempt may succeed.
            if attempt == ATTEMPTS or (error.code != 429 and error.code < 500):
                raise
        except urllib.error.URLError:
            if attempt == ATTEMPTS:
                raise
        time.sleep(attempt)
    raise AssertionError("the last attempt returns or raises")


def weigh(text: str) -> float:
    """The weighted mean of the marks in the judge's answer, from 0 to 1. ValueError where a mark is missing."""
    found = re.search(r"\{[^{}]*\}", text)
    marks = json.loads(found[0]) if found else {}
    if missing := [name for name in RUBRIC if not isinstance(marks.get(name), int | float)]:
        raise ValueError(f"the judge gave no mark for {', '.join(missing)}: {text[:200]!r}")
    total = sum(weight for weight, _ in RUBRIC.values())
    return sum(weight * min(max(marks[name], 0), 10) / 10 for name, (weight, _) in RUBRIC.items()) / total
