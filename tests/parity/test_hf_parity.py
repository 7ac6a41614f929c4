"""Our logits and scores against transformers' on torch: tiny random checkpoints in, and our exports out."""

import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.mesh import MeshConfig, make_mesh
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.pretrained import apply, from_pretrained, reward_from_pretrained, save_pretrained, score

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

# Standard deviations ten times the usual: a wrong weight, norm or position has to show in the logits.
SIZES = dict(vocab_size=150, hidden_size=64, num_hidden_layers=3, max_position_embeddings=40, pad_token_id=1)
OPT = dict(SIZES, ffn_dim=96, num_attention_heads=8, init_std=0.2, word_embed_proj_dim=64)
LLAMA = dict(SIZES, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, initializer_range=0.2)
FAMILIES = {
    "opt": (transformers.OPTConfig, OPT),
    "opt-350m": (transformers.OPTConfig, OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=32)),
    "opt-unbiased-gelu": (transformers.OPTConfig, OPT | dict(enable_bias=False, activation_function="gelu")),
    "llama": (transformers.LlamaConfig, LLAMA | dict(tie_word_embeddings=False)),
    "llama-tied": (transformers.LlamaConfig, LLAMA | dict(tie_word_embeddings=True)),
    "llama-biased": (
        transformers.LlamaConfig,
        LLAMA
        | dict(
            attention_bias=True,
            mlp_bias=True,
            head_dim=16,
            rms_norm_eps=0.05,
            rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
        ),
    ),
}


def random_checkpoint(name, folder, *, scalar_head=False, **changes):
    """The torch model of this name, saved to `folder`; biases and norms are random too."""
    kind, sizes = FAMILIES[name]
    config = kind(**sizes | changes, num_labels=1) if scalar_head else kind(**sizes | changes)
    auto = transformers.AutoModelForSequenceClassification if scalar_head else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
        model.get_input_embeddings().weight[1] = 0.3  # torch starts the pad token at zero
    model.save_pretrained(folder)
    return model


def padded_rows(side, rows=8, length=12):
    """Ids and mask; rows of 12, 11, ... real tokens where padded. Real tokens are never the pad id, 1."""
    rng = np.random.default_rng(1)
    ids = rng.integers(2, 150, size=(rows, length))
    lengths = length - np.arange(rows) if side != "none" else np.full(rows, length)
    place = np.arange(length) if side != "left" else np.arange(length)[::-1]
    mask = place[None] < lengths[:, None]
    return np.where(mask, ids, 1), mask.astype(np.int64)


def torch_logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.float().numpy()


def assert_close(ours, theirs, relative=2e-4):
    """Equal to `relative`, of the largest element of each vector."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert np.max(np.abs(ours - theirs) / np.abs(theirs).max(-1, keepdims=True)) <= relative


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_whichever_side_is_padded_and_survive_the_way_out(name, tmp_path):
    theirs = random_checkpoint(name, tmp_path / "source")
    model = from_pretrained(tmp_path / "source")
    assert model.tokenizer is None
    save_pretrained(model, tmp_path / "copy")
    exported, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(report.values()), report
    assert type(exported) is type(theirs) and exported.dtype == torch.float32
    for side in ("none", "left", "right"):
        ids, mask = padded_rows(side)
        reference, real = torch_logits(theirs, ids, mask), mask.astype(bool)
        ours = np.asarray(apply(model, ids, mask))
        assert ours.shape == (8, 12, 150) and np.isfinite(ours).all()
        assert_close(ours[real], reference[real])
        np.testing.assert_array_equal(torch_logits(exported.eval(), ids, mask), reference)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_transformers_sequence_classification_and_survive_the_way_out(name, tmp_path):
    theirs = random_checkpoint(name, tmp_path / "source", scalar_head=True)
    scorer = reward_from_pretrained(tmp_path / "source")
    save_pretrained(scorer, tmp_path / "copy")
    auto = transformers.AutoModelForSequenceClassification
    exported, report = auto.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(report.values()), report
    assert type(exported) is type(theirs) and exported.config.num_labels == 1
    for side in ("none", "left", "right"):
        ids, mask = padded_rows(side)
        reference = torch_logits(theirs, ids, mask)[:, 0]
        assert_close(score(scorer, ids, mask), reference)
        np.testing.assert_array_equal(torch_logits(exported.eval(), ids, mask)[:, 0], reference)


@pytest.mark.parametrize("name", ["opt", "opt-350m", "llama-biased"])
def test_eight_devices_hold_slices_and_give_the_same_logits(name, tmp_path):
    theirs = random_checkpoint(name, tmp_path)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    model = from_pretrained(tmp_path, mesh=mesh)
    for path, leaf in abstract_params(model.config).items():
        shards = model.params[path].addressable_shards
        split = 8 if any(axis not in (None, "embed", "layers") for axis in leaf.axes) else 1
        assert len(shards) == 8 and all(shard.data.size == model.params[path].size // split for shard in shards), path
        assert split == 8 or leaf.axes[-1:] == ("embed",), f"{path} is whole on every device, and not a small vector"
    for rows in (8, 3):  # 3 rows do not divide over the devices
        ids, mask = padded_rows("left", rows=rows)
        real = mask.astype(bool)
        assert_close(np.asarray(apply(model, ids, mask))[real], torch_logits(theirs, ids, mask)[real])


def test_a_sharded_model_is_exported_as_it_came(tmp_path):
    random_checkpoint("llama", tmp_path / "source")
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    save_pretrained(from_pretrained(tmp_path / "source", mesh=mesh), tmp_path / "copy")
    source, copy = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "copy"))
    assert source.keys() == copy.keys()
    for name, tensor in source.items():
        np.testing.assert_array_equal(copy[name], tensor, err_msg=name)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_base_model_without_its_prefix_gives_the_same_hidden_scores_as_the_whole(name, tmp_path):
    theirs = random_checkpoint(name, tmp_path / "whole", tie_word_embeddings=True)
    theirs.model.save_pretrained(tmp_path / "base")
    assert not any(key.startswith("model.") for key in load_file(tmp_path / "base" / "model.safetensors"))
    ids, mask = padded_rows("right")
    whole, base = (apply(from_pretrained(tmp_path / which), ids, mask) for which in ("whole", "base"))
    np.testing.assert_array_equal(whole, base)


def test_a_language_model_becomes_a_reward_model_with_a_new_head_and_says_so(tmp_path, caplog):
    random_checkpoint("llama", tmp_path)
    with caplog.at_level(logging.WARNING):
        first, second = reward_from_pretrained(tmp_path), reward_from_pretrained(tmp_path, seed=1)
    assert "no score.weight: the scalar head starts at random" in caplog.text
    head = np.asarray(first.params["score/kernel"])
    assert head.shape == (64, 1) and 0.5 < head.std() * 65**0.5 < 1.5
    assert not np.array_equal(head, second.params["score/kernel"])
    ids, mask = padded_rows("left")
    assert score(first, ids, mask).shape == (8,)
    with pytest.raises(ValueError, match="use score"):
        apply(first, ids, mask)
    with pytest.raises(ValueError, match="reward_from_pretrained"):
        score(from_pretrained(tmp_path), ids, mask)
    with pytest.raises(ValueError, match="41 positions are more than the model's 40"):
        score(first, np.ones((1, 41), int), np.ones((1, 41), int))


def test_a_checkpoint_that_does_not_fit_lists_every_tensor_and_a_pickle_is_refused(tmp_path):
    theirs = random_checkpoint("opt", tmp_path)
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
    weights.unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin but no safetensors"):
        from_pretrained(tmp_path)


def test_the_conversion_that_the_refusal_of_a_pickle_names_works(tmp_path, word_tokenizer):
    theirs = random_checkpoint("opt", tmp_path / "opt")
    word_tokenizer.save_pretrained(tmp_path / "opt")
    (tmp_path / "opt" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "opt" / "pytorch_model.bin")
    with pytest.raises(ValueError) as raised:
        from_pretrained(tmp_path / "opt")
    exec(str(raised.value).partition('python -c "')[2].removesuffix('"'), {})
    ids, mask = padded_rows("left")
    ours = apply(from_pretrained(tmp_path / "opt-safetensors"), ids, mask)
    real = mask.astype(bool)
    assert_close(np.asarray(ours)[real], torch_logits(theirs, ids, mask)[real])


@pytest.fixture
def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<pad>", "</s>", "good", "day"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def test_an_export_carries_tokenizer_template_and_every_id_that_ends_an_answer(tmp_path, word_tokenizer):
    random_checkpoint("llama", tmp_path / "source", eos_token_id=9)
    word_tokenizer.chat_template = "{{ messages }}"
    word_tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7], "top_p": 0.9}))
    save_pretrained(from_pretrained(tmp_path / "source", dtype="bfloat16"), tmp_path / "copy")
    generation = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 7, 9], "pad_token_id": 1, "bos_token_id": 1, "top_p": 0.9}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer("good day").input_ids == [3, 4] and tokenizer.chat_template == "{{ messages }}"
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert exported.dtype == torch.bfloat16 and exported.generation_config.eos_token_id == [2, 7, 9]


def test_an_export_replaces_a_folder_only_where_told_to_and_leaves_nothing_beside_it(tmp_path):
    random_checkpoint("llama", tmp_path / "source")
    model = from_pretrained(tmp_path / "source")
    (tmp_path / "copy").mkdir()
    save_pretrained(model, tmp_path / "copy")
    (tmp_path / "copy" / "stale.txt").write_text("")
    with pytest.raises(ValueError, match="copy is there already and not empty"):
        save_pretrained(model, tmp_path / "copy")
    assert (tmp_path / "copy" / "stale.txt").exists()
    save_pretrained(model, tmp_path / "copy", overwrite=True)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"source", "copy"}


def test_wrong_folders_and_wrong_tokenizers_are_told_in_one_line(tmp_path, word_tokenizer):
    with pytest.raises(ValueError, match="there is no folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a folder here nor to be had from the Hugging Face hub"):
        from_pretrained("no such name")
    with pytest.raises(ValueError, match="there is no .*config.json"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='dtype "int8" is not supported; supported: float32, bfloat16, float16'):
        from_pretrained(tmp_path, dtype="int8")
    random_checkpoint("llama", tmp_path, vocab_size=4)
    word_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 5 ids, its model only 4"):
        from_pretrained(tmp_path)
