"""Text of an answer while its tokens come: pieces that together are the text of all tokens, up to a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
LONGEST_WINDOW = 64  # tokens that are decoded again with each new one


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens; blanks stay as the tokens have them."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_bytes(tokenizer: PreTrainedTokenizerBase, id: int) -> tuple[str, list[int] | None]:
    """The text of one token, special ones too, and its bytes; None where it is a part of a character."""
    text = tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", str(tokenizer.convert_ids_to_tokens(id))):
        return text, [int(byte[1], 16)]
    return text, None if INCOMPLETE in text else list(text.encode())


class TextStream:
    """The text of one answer. `push` takes the next token and returns the text that no later token changes.

    Text is kept back while its last character is incomplete, while tokens are single bytes (a run of them is decoded
    together), and while it may be the beginning of a stop string.

    Attributes:
        size: characters of the text of all tokens so far, with what is kept back.
        stopped: whether a stop string came; what is at and after it is left out.
        end: where in the text that is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), *, strip: bool = False):
        """`strip`: without whitespace at its beginning."""
        self.tokenizer, self.stops, self.strip = tokenizer, tuple(stops), strip
        added = tokenizer.added_tokens_decoder.items()
        self.skipped = {id for id, token in added if token.special} | set(tokenizer.all_special_ids)
        self.ids: list[int] = []
        self.start = 0  # of the tokens that are decoded
        self.settled = 0  # number of tokens whose text is taken
        self.decoded = 0  # characters of the text from `start` on that were taken
        self.held = ""  # taken, and kept back for a stop string
        self.size = self.end = 0
        self.stopped = False

    def push(self, id: int) -> str:
        """The text that is settled by token `id`; nothing after a stop string."""
        if self.stopped:
            return ""
        self.ids.append(id)
        if id in self.skipped:  # it does not end a run of bytes
            return ""
        text = decode_ids(self.tokenizer, self.ids[self.start :])
        if text.endswith(INCOMPLETE) or self._is_byte(id):
            return ""
        return self._take(text)

    def finish(self) -> str:
        """The rest, of an answer that has ended."""
        return "" if self.stopped else self._take(decode_ids(self.tokenizer, self.ids[self.start :])) + self._release()

    def _is_byte(self, id: int) -> bool:
        return re.fullmatch(r"<0x[0-9A-F]{2}>", str(self.tokenizer.convert_ids_to_tokens(id))) is not None

    def _take(self, text: str) -> str:
        new, self.decoded = text[self.decoded :], len(text)
        # The window begins with tokens that have a text, as decoders change what is first: a blank is stripped.
        if len(self.ids) - self.start > LONGEST_WINDOW:
            window = decode_ids(self.tokenizer, self.ids[self.settled :])
            if window.strip():
                self.start, self.decoded = self.settled, len(window)
        self.settled = len(self.ids)
        if self.strip and not self.size:
            new = new.lstrip()
        self.size += len(new)
        return self._search(new)

    def _search(self, new: str) -> str:
        self.held += new
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.stopped, self.end = True, self.size - len(self.held) + min(places)
            said, self.held = self.held[: min(places)], ""
            return said
        longest = max(map(len, self.stops), default=1) - 1
        kept = next(
            n
            for n in range(min(longest, len(self.held)), -1, -1)
            if n == 0 or any(stop.startswith(self.held[-n:]) for stop in self.stops)
        )
        said, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return said

    def _release(self) -> str:
        said, self.held = self.held, ""
        return said
