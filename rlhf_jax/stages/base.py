"""Stage 0, only where model.actor is "new": a tokenizer and a random model, as an ordinary Hugging Face folder."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.example import RowSpec
from rlhf_jax.data.selection import read_examples
from rlhf_jax.data.template import prepare_tokenizer
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.new_tokenizer import train_tokenizer
from rlhf_jax.models.pretrained import Pretrained, save_pretrained
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.models import ModelConfig, NewModelConfig

LOGGER = logging.getLogger(__name__)


def new_hf_config(new: NewModelConfig, vocab_size: int) -> dict[str, Any]:
    """The config.json of a new model, without the ids of its tokenizer."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": new.hidden_size,
        "intermediate_size": new.mlp_size,
        "num_hidden_layers": new.num_layers,
        "num_attention_heads": new.num_heads,
        "num_key_value_heads": new.num_kv_heads,
        "max_position_embeddings": new.max_positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


def new_tokenizer(model: ModelConfig, data: DataConfig, rows: RowSpec) -> PreTrainedTokenizerBase:
    """A tokenizer of model.new.vocab_size tokens, trained on these training rows."""
    examples = read_examples(data, rows, held_out=False)
    texts = (text for e in examples for text in (*(said for _, said in e.turns), e.answer, e.text) if text)
    opened = itertools.chain([" Human:", " Assistant:"], texts)
    return prepare_tokenizer(train_tokenizer(opened, model.new.vocab_size), data.template)


def make_base(context: StageContext) -> str:
    """The folder that training starts from: RUN/base, made where it is not there yet, or what model.actor names."""
    run, model = context.run, context.model
    if model.actor != "new":
        return model.actor
    folder = run.folder("base")
    if not folder.exists():
        tokenizer = new_tokenizer(model, context.data, context.rows)
        hf = new_hf_config(model.new, len(tokenizer)) | {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config, layout = decoder_config(hf, scalar_head=False), Layout(context.layout.mesh, TRAIN)
        params = init_params(config, jax.random.key(run.seed), layout)
        save_pretrained(Pretrained(config, params, tokenizer, hf, {}, layout), folder)
        LOGGER.info(f"base: a new model in {folder}")
    return str(folder)
