"""Folders whose tokenizer is only a model of SentencePiece, as Llama 2's first ones."""

import json
import sys

import pytest
import sentencepiece
from tiny_tokenizer import CORPUS

from rlhf_jax.models.tokenizer_files import open_tokenizer

pytestmark = pytest.mark.parity


@pytest.fixture
def pieces(tmp_path):
    """A folder as Llama 2's first ones, with a tokenizer.model of sentencepiece and no tokenizer.json."""
    options = dict(vocab_size=300, model_type="bpe", byte_fallback=True, hard_vocab_limit=False)
    options |= dict(
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, minloglevel=2, **options
        )
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_with_only_a_sentencepiece_model_has_the_ids_of_sentencepiece(pieces):
    tokenizer = open_tokenizer(pieces)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    for text in ("The capital of France", "Please add 3 and 4.", "a  b", "1234 \u00fcn\u00ef \U0001f600", "a\n\nb"):
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text), text


def test_without_sentencepiece_the_message_names_it(pieces, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ValueError, match="only tokenizer.model, of SentencePiece, and no tokenizer.json: pip install sentencepiece"
    ):
        open_tokenizer(pieces)
