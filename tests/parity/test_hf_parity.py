"""Checkpoint folders as transformers writes them: what they may contain, what is rejected, what an export writes."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from checkpoints import assert_close, build, padded_rows, torch, torch_logits, transformers
from safetensors.numpy import load_file, save_file

from rlhf_jax import SampleConfig, generate
from rlhf_jax.data.chat_template import encode_prompt, encode_prompts, prepare_tokenizer
from rlhf_jax.data.records import Turn
from rlhf_jax.mesh import MeshConfig, make_mesh
from rlhf_jax.models.pretrained import apply, from_pretrained, reward_from_pretrained, save_pretrained, score

pytestmark = pytest.mark.parity

SIZES = dict(vocab_size=150, hidden_size=64, num_hidden_layers=3, max_position_embeddings=40, num_attention_heads=8)
SETTINGS = {
    "opt": dict(SIZES, model_type="opt", ffn_dim=96, word_embed_proj_dim=64),
    "llama": dict(SIZES, model_type="llama", intermediate_size=96, num_key_value_heads=4),
}


def random_checkpoint(name, folder, **changes):
    """The random torch model of this family, saved to `folder`."""
    model = build(SETTINGS[name] | changes)
    model.save_pretrained(folder)
    return model


def eight_devices():
    return make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])


def test_rows_that_do_not_divide_among_the_devices_give_the_same_logits(tmp_path):
    theirs, model = random_checkpoint("llama", tmp_path), from_pretrained(tmp_path, mesh=eight_devices())
    ids, mask = padded_rows("left", 150)
    for rows in (8, 3):
        reference = torch_logits(theirs, ids[:rows], mask[:rows])[mask[:rows]]
        assert_close(np.asarray(apply(model, ids[:rows], mask[:rows]))[mask[:rows]], reference)


def test_a_sharded_model_is_exported_unchanged(tmp_path):
    random_checkpoint("llama", tmp_path / "source")
    save_pretrained(from_pretrained(tmp_path / "source", mesh=eight_devices()), tmp_path / "copy")
    source, copy = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "copy"))
    assert source.keys() == copy.keys()
    for name, tensor in source.items():
        np.testing.assert_array_equal(copy[name], tensor, err_msg=name)


def test_a_hub_id_is_read_from_the_cache_without_network(tmp_path, monkeypatch):
    repository, revision = tmp_path / "hub" / "models--someone--model", "0123456789" * 4
    theirs = random_checkpoint("llama", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, (ids, mask) = from_pretrained("someone/model"), padded_rows("none", 150)
    assert model.source == "someone/model"
    assert_close(apply(model, ids, mask), torch_logits(theirs, ids, mask))


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_base_model_saved_without_its_prefix_gives_the_same_logits(name, tmp_path):
    theirs = random_checkpoint(name, tmp_path / "whole", tie_word_embeddings=True)
    theirs.model.save_pretrained(tmp_path / "base")
    assert not any(key.startswith("model.") for key in load_file(tmp_path / "base" / "model.safetensors"))
    ids, mask = padded_rows("right", 150)
    whole, base = (apply(from_pretrained(tmp_path / which), ids, mask) for which in ("whole", "base"))
    np.testing.assert_array_equal(whole, base)


def test_a_language_model_becomes_a_reward_model_with_a_new_head_and_logs_it(tmp_path, caplog):
    random_checkpoint("llama", tmp_path)
    with caplog.at_level(logging.WARNING):
        first, second = reward_from_pretrained(tmp_path), reward_from_pretrained(tmp_path, seed=1)
    assert "no score.weight: the scalar head starts at random" in caplog.text
    head = np.asarray(first.params["score/kernel"])
    assert head.shape == (64, 1) and 0.5 < head.std() * 65**0.5 < 1.5
    assert not np.array_equal(head, second.params["score/kernel"])
    ids, mask = padded_rows("left", 150)
    assert score(first, ids, mask).shape == (8,)
    with pytest.raises(ValueError, match="use score"):
        apply(first, ids, mask)
    with pytest.raises(ValueError, match="reward_from_pretrained"):
        score(from_pretrained(tmp_path), ids, mask)
    with pytest.raises(ValueError, match="41 positions are more than the model's 40"):
        score(first, np.ones((1, 41), int), np.ones((1, 41), int))


def test_a_checkpoint_that_does_not_fit_is_rejected_with_every_tensor_listed(tmp_path):
    random_checkpoint("opt", tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.decoder.layers.0.fc1.bias"], tensors["model.decoder.layers.2.fc2.weight"]
    tensors["model.decoder.layers.3.fc1.bias"] = np.zeros(96, np.float32)
    tensors["model.decoder.embed_positions.weight"] = np.zeros((40, 64), np.float32)
    save_file(tensors, weights)
    with pytest.raises(ValueError) as raised:
        from_pretrained(tmp_path)
    assert "missing: model.decoder.layers.0.fc1.bias, model.decoder.layers.2.fc2.weight;" in str(raised.value)
    assert "surplus: model.decoder.layers.3.fc1.bias;" in str(raised.value)
    assert "misshaped: model.decoder.embed_positions.weight ([40, 64] in place of [42, 64])" in str(raised.value)


class Note:
    """Something that is no tensor, as trainers of their own write next to the tensors."""


def test_the_conversion_command_in_the_error_for_a_pickle_works(tmp_path):
    theirs = random_checkpoint("opt", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**theirs.state_dict(), "note": Note()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin names test_hf_parity.Note, which is no part") as raised:
        from_pretrained(tmp_path)
    exec(str(raised.value).partition('python -c "')[2].removesuffix('"'), {})
    ids, mask = padded_rows("left", 150)
    assert_close(np.asarray(apply(from_pretrained(tmp_path), ids, mask))[mask], torch_logits(theirs, ids, mask)[mask])


@pytest.fixture
def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<pad>", "</s>", "good", "day"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def test_an_untrained_model_is_exported_unchanged_with_all_files_of_its_tokenizer(tmp_path, word_tokenizer):
    random_checkpoint("llama", tmp_path / "source", eos_token_id=9)
    word_tokenizer.chat_template = "{{ messages }}"
    word_tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7], "top_p": 0.9}))
    # Written by older versions of transformers.
    (tmp_path / "source" / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    save_pretrained(from_pretrained(tmp_path / "source", dtype="bfloat16"), tmp_path / "copy")
    generation = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7], "top_p": 0.9}
    source, copy = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("source", "copy"))
    assert source.keys() | {"SHA256SUMS"} == copy.keys() and {"tokenizer.json", "special_tokens_map.json"} < copy.keys()
    assert {name for name in source if source[name] != copy[name]} == {
        "config.json",
        "generation_config.json",  # differs in whitespace
        "model.safetensors",
        "tokenizer_config.json",  # transformers 5 wrote a class into it that version 4 does not have
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer("good day").input_ids == [3, 4] and tokenizer.chat_template == "{{ messages }}"
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert exported.dtype == torch.bfloat16 and exported.generation_config.eos_token_id == [7]


def test_a_changed_tokenizer_is_exported_with_its_changes(tmp_path, word_tokenizer):
    random_checkpoint("llama", tmp_path / "source")
    word_tokenizer.save_pretrained(tmp_path / "source")
    model = from_pretrained(tmp_path / "source")
    model.tokenizer.chat_template = "{{ messages[0] }}"
    save_pretrained(model, tmp_path / "copy")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == "{{ messages[0] }}"


def test_a_reward_model_without_its_score_head_is_rejected_and_gets_no_new_head(tmp_path):
    build(SETTINGS["llama"], scalar_head=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: score.weight"):
        reward_from_pretrained(tmp_path)


def test_an_export_replaces_a_folder_only_with_overwrite_and_leaves_no_temporary_files(tmp_path):
    random_checkpoint("llama", tmp_path / "source")
    model = from_pretrained(tmp_path / "source")
    (tmp_path / "copy").mkdir()
    save_pretrained(model, tmp_path / "copy")
    (tmp_path / "copy" / "stale.txt").write_text("")
    with pytest.raises(ValueError, match="copy exists and is not empty"):
        save_pretrained(model, tmp_path / "copy")
    assert (tmp_path / "copy" / "stale.txt").exists()
    save_pretrained(model, tmp_path / "copy", overwrite=True)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"source", "copy"}
    # Other files of a user next to it are kept, and a failed export leaves no files.
    for name in ("copy.old", "copy.unfinished"):
        (tmp_path / name).mkdir()
    broken = dataclasses.replace(model, params=dict.fromkeys(model.params))
    with pytest.raises(AttributeError):
        save_pretrained(broken, tmp_path / "x", dtype="float32")
    save_pretrained(model, tmp_path / "copy", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "copy", "copy.old", "copy.unfinished"}


def test_wrong_folders_are_reported_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a folder here nor to be had from the Hugging Face hub"):
        from_pretrained("no such name")
    with pytest.raises(ValueError, match="there is no .*config.json"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='dtype "int4" is not supported; supported: float32, bfloat16, float16'):
        from_pretrained(tmp_path, dtype="int4")


def test_a_tokenizer_of_more_ids_than_the_model_has_rows_is_read_and_ids_beyond_are_rejected(
    tmp_path, word_tokenizer, caplog
):
    theirs = random_checkpoint("llama", tmp_path, vocab_size=4, eos_token_id=2, pad_token_id=1, bos_token_id=None)
    word_tokenizer.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert "has 5 ids, its model only 4: texts with an id beyond these are refused" in caplog.text
    ids, mask = np.array([[3, 0, 3], [4, 3, 3]]), np.array([[1, 1, 1], [0, 1, 1]])
    assert_close(apply(model, ids[:1], mask[:1]), torch_logits(theirs, ids[:1], mask[:1]))
    apply(model, ids, mask)  # the id beyond is padding
    with pytest.raises(ValueError, match=r"input_ids\[1, 0\] is 4, and the model has the ids 0 to 3"):
        apply(model, ids, np.ones_like(mask))
    with pytest.raises(ValueError, match=r"input_ids\[0, 1\] is -1, and the model has the ids 0 to 3"):
        generate(model, np.array([[3, -1]]), np.ones((1, 2)), SampleConfig(max_new_tokens=1), jax.random.key(0))
    jax.jit(lambda ids: apply(model, ids, np.ones_like(mask)))(ids)  # under jit there is no value to look at
    tokenizer = prepare_tokenizer(model.tokenizer)
    assert encode_prompt(tokenizer, (Turn("user", "good"),))
    with pytest.raises(ValueError, match="'day' in it has the id 4, and the model's embedding only 4 rows: remove it"):
        encode_prompt(tokenizer, (Turn("user", "good day"),))
    good, bad = encode_prompts(tokenizer, [(Turn("user", "good"),), (Turn("user", "day"),)])
    assert len(good) and isinstance(bad, ValueError)
