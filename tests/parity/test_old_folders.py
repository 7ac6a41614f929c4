"""Folders as old repositories of the hub have them: a pickle of float16 and a vocabulary, without newer files."""

import json

import numpy as np
import pytest
from checkpoints import assert_close, build, padded_rows, torch, torch_logits, transformers
from test_configs import script
from tiny_tokenizer import CORPUS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rlhf_jax.models.pretrained import apply, from_pretrained, save_pretrained

pytestmark = pytest.mark.parity
SIZES = dict(vocab_size=360, hidden_size=32, num_hidden_layers=2, max_position_embeddings=160, num_attention_heads=4)
OPT = dict(SIZES, model_type="opt", ffn_dim=64, word_embed_proj_dim=32)
OPT |= {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
GPT2 = dict(vocab_size=360, n_embd=32, n_layer=2, n_head=4, n_positions=160, model_type="gpt2")
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SPECIAL = {"opt": ["<s>", "<pad>", "</s>", "<unk>"], "gpt2": ["<|endoftext|>"]}
# What the hub's tokenizer_config.json of OPT says.
OPT_TOKENIZER = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
OPT_TOKENIZER |= {"add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}


def make_folder(folder, settings):
    """config.json, pytorch_model.bin, vocab.json and merges.txt, as DeepSpeed-Chat writes; the torch model."""
    folder.mkdir()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = SPECIAL[settings["model_type"]], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.model.save(str(folder))
    theirs = build(settings).half().float()
    (folder / "config.json").write_text(json.dumps(theirs.config.to_dict() | {"torch_dtype": "float16"}))
    tensors = {name: tensor.half() for name, tensor in theirs.base_model.state_dict().items()}
    buffers = {"decoder.version": torch.tensor([3.0])} if settings is OPT else {}
    for layer in range(2) if settings is GPT2 else ():
        buffers |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 160, 160).tril().byte()}
        buffers |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(tensors | buffers, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return theirs


@pytest.mark.parametrize("settings", [OPT, GPT2], ids=["opt", "gpt2"])
def test_an_old_folder_has_the_logits_of_torch_and_the_tokens_that_its_config_names(settings, tmp_path):
    theirs = make_folder(tmp_path / "old", settings)
    model = from_pretrained(tmp_path / "old")
    ids, mask = padded_rows("left", 350)
    assert_close(np.asarray(apply(model, ids, mask))[mask], torch_logits(theirs, ids, mask)[mask])
    save_pretrained(model, tmp_path / "copy")
    if settings is OPT:
        (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(OPT_TOKENIZER))
    hub, copy = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("old", "copy"))
    text = "What is the capital of France? </s> <|endoftext|>"
    for tokenizer in (model.tokenizer, copy):
        assert tokenizer(text).input_ids == hub(text).input_ids and len(tokenizer) == len(hub)
        assert tokenizer.eos_token_id == hub.eos_token_id == settings["eos_token_id"]
    assert hub(text).input_ids[:1] == [2] or settings is GPT2


def test_the_script_trains_all_stages_on_an_old_folder(tmp_path):
    make_folder(tmp_path / "opt-1.3b", OPT)
    sizes = [f"{stage}.{key}=8" for stage in ("sft", "reward", "ppo") for key in ("batch_size", "micro_batch_size")]
    sizes += ["data.builtin_rows=260", "data.max_prompt_length=120", "data.max_length=144", "data.held_out=0.15"]
    sizes += ["sft.steps=2", "reward.steps=2", "ppo.steps=2", "ppo.rollout_batch_size=8", "model.lora.rank=2"]
    sizes += ["ppo.sample.max_new_tokens=8", "ppo.actor.warmup_steps=0", "ppo.critic.warmup_steps=0"]
    source = 'data.sources=[{path="builtin:assistant", answer="answer"}]'
    models = ["--actor-model", str(tmp_path / "opt-1.3b"), "--reward-model", str(tmp_path / "opt-1.3b")]
    assert script("scripts/train.py").main([source, *sizes, *models, "--output-dir", str(tmp_path / "run")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "ppo" / "export").float().eval()
    ids, mask = padded_rows("left", 339)
    model = from_pretrained(tmp_path / "run" / "ppo" / "export")
    assert_close(np.asarray(apply(model, ids, mask))[mask], torch_logits(theirs, ids, mask)[mask])
