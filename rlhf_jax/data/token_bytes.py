"""How many bytes of text each token stands for, so that a place in a text is found in its tokens without a search."""

from __future__ import annotations

import re
import weakref

import numpy as np
from transformers import PreTrainedTokenizerBase

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # a single byte, in vocabularies that fall back to bytes
_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, np.ndarray] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[ids] int64. Of a vocabulary of another kind than byte-level or SentencePiece's it is a guess.

    A guess does no harm: the bytes of a text's tokens add up to those of the text, or it is seen that they do not.
    """
    if tokenizer not in _known:
        _known[tokenizer] = _lengths(tokenizer)
    return _known[tokenizer]


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, text: str) -> np.ndarray | None:
    """[T] int64, bytes of `text` up to the end of each token; None if the tokens do not spell the text byte by byte."""
    ends = np.cumsum(token_bytes(tokenizer)[ids])
    return ends if ends.size and ends[-1] == byte_length(text) else None


def byte_length(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    is_byte_level = type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"
    for piece, token in vocabulary.items():
        if token in added:
            lengths[token] = len(piece.encode())
        elif is_byte_level:
            lengths[token] = len(piece)  # one letter stands for each byte
        else:
            lengths[token] = 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", " ").encode())
    return lengths
