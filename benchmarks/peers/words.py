"""Prompts of random words, their tokenizer, and a reward: what every trainer by groups is given."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.timing import Sizes


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for each id, such as <7>; 1 pads, 2 ends."""
    tokenizer = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(vocab)}, unk_token="<3>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<1>", eos_token="<2>")


def make_prompts(sizes: Sizes) -> list[str]:
    """Texts of `sizes.prompt` words each."""
    drawn = np.random.default_rng(0).integers(4, sizes.vocab, (sizes.prompts, sizes.prompt))
    return [" ".join(f"<{number}>" for number in row) for row in drawn]


def share_of_distinct(completions: list[str], **_) -> list[float]:
    """Of each text, the number of distinct words over that of all words."""
    return [len(set(words)) / len(words) for words in (text.split() for text in completions)]
