"""The models of a server by name: policies, which answer, and reward models, which score."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.answering import Answering, Request, policy_tokenizer
from rlhf_jax.data.chat_template import encode_prompt
from rlhf_jax.data.dialogues import parse_messages
from rlhf_jax.data.records import BadRow, Dialogue
from rlhf_jax.decode import bucket_length
from rlhf_jax.detokenise import TextStream
from rlhf_jax.models.families.containers import text_config
from rlhf_jax.models.hub import local_folder, read_json
from rlhf_jax.models.pretrained import Pretrained, from_pretrained, has_scalar_head, reward_from_pretrained, score
from rlhf_jax.scoring import chunks, encode_each, scorer_tokenizer
from rlhf_jax.serve.errors import ApiError, invalid
from rlhf_jax.serve.fields import Asked
from rlhf_jax.serve.limits import Limits
from rlhf_jax.serve.metrics import Counters
from rlhf_jax.serve.worker import PendingAnswer, Worker

ROWS_PER_SCORE = (1, 8)  # numbers of sequences that are scored at once: few are compiled


async def on_thread(thread: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
    """The result of `work`, which is not begun where the caller is cancelled before its turn."""
    return await asyncio.get_running_loop().run_in_executor(thread, work)


@dataclass(frozen=True)
class Policy:
    """A model that answers.

    Attributes:
        tokenizer: of `thread`, which encodes prompts, those of one request at a time.
    """

    name: str
    worker: Worker
    tokenizer: object
    created: int = field(default_factory=lambda: int(time.time()))
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    @property
    def context(self) -> int:
        return self.worker.answering.context

    async def answers(self, asked: Asked, most: int) -> list[PendingAnswer]:
        """The answers that a request asks for: n to each prompt, in their order.

        Raises:
            ApiError: 400 for prompts that the template rejects or that do not fit, and for more than `most` answers.
        """
        count = asked.n * len(asked.prompts)
        if count > most:
            raise invalid(f"n and prompt ask for {count} answers: at most {most}", "n")
        encoded = await on_thread(self.thread, lambda: [self._encode(prompt) for prompt in asked.prompts])
        answers = []
        for index, (ids, choice) in enumerate(itertools.product(encoded, range(asked.n))):
            sampled = asked.temperature, asked.top_p, asked.seed, choice
            request = Request(ids, self._longest(len(ids), asked), *sampled, asked.alternatives or 0)
            stream = TextStream(self.worker.tokenizer, asked.stops, strip=asked.is_chat)
            answers.append(PendingAnswer(index, request, stream, wants_tokens=asked.alternatives is not None))
        return answers

    def _encode(self, prompt: Dialogue | str | list[int]) -> Sequence[int]:
        rows = self.worker.answering.decoding.model.config.vocab_size
        if isinstance(prompt, list):
            if not all(0 <= id < rows for id in prompt):
                raise invalid(f"prompt has a token id outside 0 to {rows - 1}", "prompt")
            return prompt
        try:
            if isinstance(prompt, Dialogue):
                return encode_prompt(self.tokenizer, prompt)
            return encode_each(self.tokenizer, [prompt])[0]
        except ValueError as error:
            raise invalid(str(error), "messages" if isinstance(prompt, Dialogue) else "prompt") from error

    def _longest(self, size: int, asked: Asked) -> int:
        """Largest number of tokens of an answer to a prompt of `size` tokens."""
        wanted = asked.max_new_tokens
        if size + (wanted or 1) > self.context:
            answer = f" and an answer of up to {wanted}" if wanted else ""
            raise invalid(
                f"this model's context is {self.context} tokens, and the prompt has {size}{answer}: shorten it, or "
                "lower max_tokens",
                "messages" if asked.is_chat else "prompt",
                "context_length_exceeded",
            )
        return wanted or self.context - size


@dataclass(frozen=True)
class Scorer:
    """A reward model. Its requests are scored one after the other."""

    name: str
    model: Pretrained
    tokenizer: object
    most_waiting: int
    created: int = field(default_factory=lambda: int(time.time()))
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    waiting: list = field(default_factory=list)

    async def scores(self, rows: Sequence[str | list]) -> tuple[list[float], int]:
        """The score of each text or dialogue, and the number of tokens of all. ApiError 400 or 429."""
        if len(self.waiting) > self.most_waiting:
            raise ApiError(429, f"{self.name} has too many requests waiting: ask again later", "queue_full")
        self.waiting.append(None)
        gone = threading.Event()
        try:
            return await on_thread(self.thread, lambda: self._scores(rows, gone))
        finally:
            gone.set()
            self.waiting.pop()

    def _scores(self, rows: Sequence[str | list], gone: threading.Event) -> tuple[list[float], int]:
        try:
            read = [row if isinstance(row, str) else Dialogue(parse_messages(row)) for row in rows]
            encoded = encode_each(self.tokenizer, read)
        except (BadRow, ValueError) as error:
            raise invalid(f"input: {error}", "input") from error
        longest, most = max(map(len, encoded)), self.model.config.max_positions
        if longest > most:
            message = f"input has {longest} tokens, and the model's context is {most}: shorten it"
            raise invalid(message, "input", "context_length_exceeded")
        return self.score(encoded, gone).tolist(), sum(map(len, encoded))

    def score(self, rows: Sequence[np.ndarray], gone: threading.Event) -> np.ndarray:
        """[B] scores; sequences of similar length at once, in one of two numbers of rows and padded, so that few
        shapes are compiled. What is left when no one waits any more is not computed."""
        scores, most = np.zeros(len(rows), np.float32), self.model.config.max_positions
        widths = np.array([min(bucket_length(len(ids)), most) for ids in rows])
        for width in np.unique(widths):
            (chosen,) = (widths == width).nonzero()
            count = ROWS_PER_SCORE[len(chosen) > 1]
            tokens, mask = np.zeros((len(chosen), width), np.int32), np.zeros((len(chosen), width), bool)
            for row, index in enumerate(chosen):
                tokens[row, : len(rows[index])], mask[row, : len(rows[index])] = rows[index], True
            for i, part in enumerate(chunks(count, tokens, mask)):
                if gone.is_set():
                    return scores
                places = chosen[i * count : (i + 1) * count]
                scores[places] = np.asarray(score(self.model, *part))[: len(places)]
        return scores

    def warm_up(self) -> None:
        """Compile all shapes."""
        most = self.model.config.max_positions
        for width in sorted({min(bucket_length(size), most) for size in range(1, most + 1)}):
            for count in ROWS_PER_SCORE:
                self.score([np.zeros(width, np.int32)] * count, threading.Event())


def model_names(folders: Sequence[str]) -> dict[str, str]:
    """{name: folder}: of each path its last part other than "export", with those before it that make names differ.

    `NAME=FOLDER` gives the name. ValueError for two of one name.
    """
    given = [each.partition("=")[::2] if "=" in each else ("", each) for each in folders]
    paths = [folder if name else folder.rstrip("/") for name, folder in given]
    parts = [[part for part in Path(path).expanduser().absolute().parts if part != "export"] for path in paths]
    for size in range(1, max(map(len, parts)) + 1):
        names = [name or "/".join(each[-size:]) for (name, _), each in zip(given, parts, strict=True)]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    raise ValueError(f"{', '.join(names)}: two models have one name; give each as NAME=FOLDER")


def open_models(
    folders: Sequence[str], dtype: str, limits: Limits, metrics: Counters
) -> tuple[dict[str, Policy], dict[str, Scorer]]:
    """Read all models, and compile what their requests need.

    Raises:
        ValueError: a folder that is none, or two of one name.
    """
    policies, scorers = {}, {}
    for name, folder in model_names(folders).items():
        if is_reward_model(folder):
            model = reward_from_pretrained(folder, dtype=dtype)
            scorers[name] = Scorer(name, model, scorer_tokenizer(model), limits.queue)
            scorers[name].warm_up()
        else:
            policies[name] = open_policy(name, folder, dtype, limits, metrics)
    return policies, scorers


def is_reward_model(folder: str) -> bool:
    path = local_folder(folder)
    if not (path / "config.json").exists():
        raise ValueError(f"{folder} is no Hugging Face folder (no config.json): name one such as RUN/ppo/export")
    return has_scalar_head(text_config(read_json(path / "config.json")))


def open_policy(name: str, folder: str, dtype: str, limits: Limits, metrics: Counters) -> Policy:
    model = from_pretrained(folder, dtype=dtype, one_copy=True)
    tokenizer = policy_tokenizer(model)
    answering = Answering(model, limits.rows, limits.context)
    answering.warm_up()
    worker = Worker(name, answering, copy.deepcopy(tokenizer), limits.queue, metrics)
    return Policy(name, worker, tokenizer)


def find_model(models: Mapping[str, Policy | Scorer], name: str | None, others: Mapping[str, object]):
    """The model of this name, or the first. ApiError 404 if there is none, 400 if it belongs to the other kind."""
    if name is None and models:
        return next(iter(models.values()))
    if name in models:
        return models[name]
    if name in others:
        kind = "answers and gives no scores" if isinstance(others[name], Policy) else "scores and gives no answers"
        raise invalid(f"The model {name!r} {kind}", "model")
    known = ", ".join(models) or "no model of this kind"
    raise ApiError(404, f"The model {name!r:.60} does not exist; this server has {known}", "model_not_found", "model")
