"""The JSON of answers, as OpenAI's endpoints write it: whole, and in events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.serve.fields import Asked
from rlhf_jax.serve.worker import PendingAnswer, Piece, TokenText

DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


@dataclass
class HttpReply:
    """The answers to one request, as they grow.

    Attributes:
        counts: number of tokens of each answer.
    """

    model: str
    asked: Asked
    answers: Sequence[PendingAnswer]
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.asked.is_chat else "cmpl-") + secrets.token_hex(12)
        self.counts = [0] * len(self.answers)

    def add(self, index: int, piece: Piece) -> None:
        self.counts[index] = piece.count

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of the answers."""
        prompt = sum(len(answer.request.ids) for answer in self.answers[:: self.asked.n])
        answer = sum(self.counts)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def head(self, suffix: str = "") -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.asked.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        choices = [self._whole_choice(index, each) for index, each in enumerate(pieces)]
        return self.head() | {"choices": choices, "usage": self.usage()}

    def _whole_choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text, tokens = "".join(each.text for each in pieces), [token for each in pieces for token in each.tokens]
        choice = {"index": index, "logprobs": self._logprobs(tokens), "finish_reason": pieces[-1].finish}
        if self.asked.is_chat:
            return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return choice | {"text": text}

    def first_events(self) -> list[bytes]:
        """Before any text: the role."""
        if not self.asked.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._event(i, {"delta": delta}, None, None) for i in range(len(self.answers))]

    def events(self, index: int, piece: Piece) -> list[bytes]:
        """Of one more piece, the last with the reason for the end."""
        logprobs = self._logprobs(piece.tokens)
        if not self.asked.is_chat:
            return [self._event(index, {"text": piece.text}, logprobs, piece.finish)]
        found = []
        if piece.text or piece.tokens:
            found.append(self._event(index, {"delta": {"content": piece.text}}, logprobs, None))
        if piece.finish:
            found.append(self._event(index, {"delta": {}}, None, piece.finish))
        return found

    def last_events(self) -> list[bytes]:
        """After all answers: what was used, if asked for, and the end."""
        used = event(self.head(".chunk") | {"choices": [], "usage": self.usage()})
        return [*([used] if self.asked.include_usage else []), DONE]

    def _event(self, index: int, content: dict, logprobs: dict | None, finish: str | None) -> bytes:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.asked.include_usage else {}
        return event(self.head(".chunk") | {"choices": [choice]} | usage)

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if self.asked.alternatives is None:
            return None
        if self.asked.is_chat:
            return {"content": [chat_logprob(token) for token in tokens], "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            # Of several tokens with one text, as parts of characters have, the most likely is the last written.
            "top_logprobs": [{text: logprob for text, _, logprob in token.alternatives[::-1]} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def chat_logprob(token: TokenText) -> dict[str, Any]:
    """A token with its log-probability and alternatives, as chat completions have it."""
    top = [{"token": text, "logprob": logprob, "bytes": bytes} for text, bytes, logprob in token.alternatives]
    return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes, "top_logprobs": top}
