"""A new tokenizer and a random model as an ordinary Hugging Face folder, for model.actor = "new"."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rlhf_jax import hosts
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import read_examples
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.pretrained import Pretrained, save_pretrained
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.models import ModelConfig, NewModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LOGGER = logging.getLogger(__name__)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2
NUM_BYTES = 256

# Qwen2's (Apache 2.0), which llama.cpp, onnxruntime-genai and others know. Digits never merge: a model of a few layers
# adds and sorts far better when every number is written with the same ten tokens.
PIECES = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HEAD_MULTIPLE = 16  # fused attention and vectorised code of others need heads of a multiple of this


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has an encoding, and decoding returns the same text.

    The vocabulary is <pad>, <s>, </s>, the 256 bytes and merges learned from `texts`; it is smaller than `vocab_size`
    if the texts have too few merges. No tokens are added around a text. `save_pretrained` writes a folder that
    `AutoTokenizer` opens. Raises ValueError if `vocab_size` is below 259.
    """
    from transformers import PreTrainedTokenizerFast  # imported where used: it takes seconds

    smallest = len(SPECIAL_TOKENS) + NUM_BYTES
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} cannot hold the bytes and special tokens: use {smallest} or more")
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(PIECES, behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    start = dict(special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **start)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def make_hf_config(new: NewModelConfig, vocab_size: int) -> dict[str, Any]:
    """The config.json that transformers writes for a new model, without the token ids of its tokenizer."""
    from transformers import LlamaConfig  # imported where used: it takes seconds, and torch where that is installed

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=new.hidden_size,
        intermediate_size=new.mlp_size,
        num_hidden_layers=new.num_layers,
        num_attention_heads=new.num_heads,
        num_key_value_heads=new.num_kv_heads,
        head_dim=-(-new.hidden_size // (new.num_heads * HEAD_MULTIPLE)) * HEAD_MULTIPLE,
        max_position_embeddings=new.max_positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: value for key, value in config.to_diff_dict().items() if key not in ids}


def make_tokenizer(model: ModelConfig, data: DataConfig, rows: RowSpec) -> PreTrainedTokenizerBase:
    """A tokenizer of model.new.vocab_size tokens, trained on these training rows."""
    examples = read_examples(data, rows, held_out=False)
    texts = (
        text
        for e in examples
        for text in (*(turn[1] for turn in (*e.turns, *e.continuation(e.answer))), e.text)
        if text
    )
    opened = itertools.chain([" Human:", " Assistant:"], texts)
    return prepare_tokenizer(train_tokenizer(opened, model.new.vocab_size), *data.rendering)


def make_base_model(context: StageContext) -> str:
    """The folder that training starts from: model.actor, or for "new" RUN/base, which is created if missing."""
    run, model = context.run, context.model
    if model.actor != "new":
        return model.actor
    folder = run.folder("base")
    if not hosts.broadcast(folder.exists()):
        tokenizer = make_tokenizer(model, context.data, context.rows)
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        hf = make_hf_config(model.new, len(tokenizer)) | ids
        config, layout = decoder_config(hf, scalar_head=False), Layout(context.layout.mesh, TRAIN)
        params = init_params(config, jax.random.key(run.seed), layout)
        save_pretrained(Pretrained(config, params, tokenizer, hf, {}, layout), folder)
        LOGGER.info(f"base: a new model in {folder}")
    return str(folder)
