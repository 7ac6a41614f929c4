"""The thread that drives a model: takes requests from a queue, decodes, and gives pieces of text to an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.answering import Answering, Request, Token
from rlhf_jax.detokenise import TextStream, token_bytes
from rlhf_jax.serve.errors import FAILED, ApiError
from rlhf_jax.serve.metrics import Counters

LOGGER = logging.getLogger(__name__)


class TokenText(NamedTuple):
    """A token with its place in the text of the answer, and the most likely tokens at its place."""

    text: str
    bytes: list[int] | None
    logprob: float
    offset: int
    alternatives: tuple[tuple[str, list[int] | None, float], ...]


class Piece(NamedTuple):
    """More of an answer.

    Attributes:
        tokens: those of the text, if asked for.
        count: number of tokens of the whole answer so far.
        finish: "stop" or "length" with the last piece.
        error: in place of all else.
    """

    text: str
    tokens: tuple[TokenText, ...]
    count: int
    finish: str | None = None
    error: ApiError | None = None


class PendingAnswer:
    """One answer that is asked for. The worker owns it, once submitted."""

    def __init__(self, index: int, request: Request, stream: TextStream, *, wants_tokens: bool):
        self.index, self.request, self.stream, self.wants_tokens = index, request, stream, wants_tokens
        self.tokens: list[TokenText] = []  # of the text that is not given yet
        self.count = 0
        self.start = time.monotonic()
        self.pieces: asyncio.Queue[tuple[int, Piece]]  # that of the HTTP request


class Worker:
    """A model with its thread."""

    def __init__(self, name: str, answering: Answering, tokenizer: Any, most_waiting: int, metrics: Counters):
        """`tokenizer`: for this thread alone."""
        self.name, self.answering, self.tokenizer = name, answering, tokenizer
        self.capacity, self.metrics = len(answering.owners) + most_waiting, metrics
        self.changed = threading.Condition()
        self.waiting: deque[PendingAnswer] = deque()
        self.running: set[PendingAnswer] = set()
        self.gone: set[PendingAnswer] = set()
        self.closing = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name=f"model {name}", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread.start()

    def close(self) -> None:
        """End the thread; running answers are left."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def submit(self, answers: Sequence[PendingAnswer]) -> asyncio.Queue[tuple[int, Piece]]:
        """Queue the answers of one HTTP request; returns where their pieces come. ApiError 429 if that is too many."""
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        for answer in answers:
            answer.pieces = pieces
        with self.changed:
            if len(self.waiting) + len(self.running) + len(answers) > self.capacity:
                raise ApiError(429, f"{self.name} has too many requests waiting: ask again later", "queue_full")
            self.waiting.extend(answers)
            self.changed.notify()
        return pieces

    def cancel(self, answers: Sequence[PendingAnswer]) -> None:
        """Free what the answers hold, as no one waits for them; those that have ended are left."""
        with self.changed:
            self.gone.update(answers)
            self.changed.notify()

    def _run(self) -> None:
        is_lost = False
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.gone or self.closing):
                    self.changed.wait()
                if self.closing:
                    return
                started = self._exchange()
            try:
                if is_lost:  # here, as this too may fail on a device that is out of memory
                    self.answering.reset()
                    is_lost = False
                for answer in started:
                    self.answering.add(answer, answer.request)
                self._deliver([self._piece(token) for token in self.answering.step()])
            except Exception:  # of the device: its state is lost, and with it all running answers
                LOGGER.exception(f"{self.name} failed; its running requests get status 500")
                failed = Piece("", (), 0, error=ApiError(*FAILED))
                self._deliver([(answer, failed) for answer in self.running])
                is_lost = True

    def _exchange(self) -> list[PendingAnswer]:
        """Free the rows of those who are gone, and give free rows to those who wait."""
        for answer in self.gone:
            self.answering.stop(answer)
            if answer in self.waiting:
                self.waiting.remove(answer)
        self.running -= self.gone
        self.gone.clear()
        started = [self.waiting.popleft() for _ in range(min(self.answering.free, len(self.waiting)))]
        self.running.update(started)
        return started

    def _piece(self, token: Token) -> tuple[PendingAnswer, Piece | None]:
        answer: PendingAnswer = token.owner
        if not answer.count:
            self.metrics.observe_first_token(self.name, time.monotonic() - answer.start)
        answer.count += 1
        is_end = token.is_last and token.id in self.answering.decoding.eos_ids
        text = self._text(answer, token, is_end)
        finish = "stop" if is_end or answer.stream.stopped else "length" if token.is_last else None
        if not text and finish is None:
            return answer, None
        tokens = answer.tokens
        if answer.stream.stopped:
            tokens = [each for each in tokens if each.offset < answer.stream.end]
        answer.tokens = []
        return answer, Piece(text, tuple(tokens), answer.count, finish)

    def _text(self, answer: PendingAnswer, token: Token, is_end: bool) -> str:
        """The text that comes with a token; its log-probabilities are noted."""
        if is_end:
            return answer.stream.finish()
        offset = answer.stream.size
        text = answer.stream.push(token.id)
        if token.is_last and not answer.stream.stopped:
            text += answer.stream.finish()
        if answer.wants_tokens:
            others = ((*token_bytes(self.tokenizer, id), logprob) for id, logprob in token.alternatives)
            own = token_bytes(self.tokenizer, token.id)
            answer.tokens.append(TokenText(*own, token.logprob, offset, tuple(others)))
        return text

    def _deliver(self, pieces: list[tuple[PendingAnswer, Piece | None]]) -> None:
        """Give pieces to the event loop, all at once; ended answers are no longer running."""
        given = [(answer, piece) for answer, piece in pieces if piece is not None]
        ended = {answer for answer, piece in given if piece.finish or piece.error}
        for answer in ended:
            self.answering.stop(answer)
        with self.changed:
            self.running -= ended
            self.metrics.set_load(self.name, len(self.running), len(self.waiting))
        for answer in ended:
            self.metrics.count_answer(self.name, len(answer.request.ids), answer.count)

        def put() -> None:
            for answer, piece in given:
                answer.pieces.put_nowait((answer.index, piece))

        if given:
            self.loop.call_soon_threadsafe(put)
