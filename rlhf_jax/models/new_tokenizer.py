"""A small tokenizer for a model that starts from nothing: byte-level BPE in an ordinary Hugging Face shape."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2
NUM_BYTES = 256

# A word with the space before it, one digit, a run of other signs, or white space. Digits never join: a model of a few
# layers adds and sorts far better when every number is spelled in the same ten signs.
PIECES = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that every text has an encoding and comes back equal.

    The vocabulary is <pad>, <s>, </s>, the 256 bytes and merges learned from `texts`; it is smaller than `vocab_size`
    where the texts have no more merges to give. Nothing is added around a text. `save_pretrained` writes a folder that
    `AutoTokenizer` opens. Raises ValueError if `vocab_size` is below 259.
    """
    smallest = len(SPECIAL_TOKENS) + NUM_BYTES
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} cannot hold the bytes and the special tokens: use {smallest} or more"
        )
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
