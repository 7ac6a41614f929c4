"""Multimodal folders: their text model computes the same here, and is exported alone or in its folder."""

import dataclasses
import json

import numpy as np
import pytest
from checkpoints import assert_close, load, padded_rows, randomise, torch, torch_logits, transformers
from safetensors.numpy import load_file, save_file
from tiny_tokenizer import chatml_like

from rlhf_jax.cli import main
from rlhf_jax.data.rendering import Chat, render
from rlhf_jax.models.families.containers import CONTAINERS, text_config, text_name
from rlhf_jax.models.hub import read_tokenizer
from rlhf_jax.models.pretrained import apply, from_pretrained, save_pretrained

pytestmark = pytest.mark.parity

TEXT = dict(
    vocab_size=150,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=40,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    head_dim=16,
)
QWEN_VISION = dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=1, out_hidden_size=64, patch_size=14)
QWEN_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
IMAGE = dict(image_token_index=140)
SETTINGS = {
    "gemma3": dict(
        text_config=TEXT | dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        **IMAGE,
    ),
    "mistral3": dict(
        text_config=TEXT | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
        vision_config=VISION | {"model_type": "pixtral"},
        tie_word_embeddings=False,
        **IMAGE,
    ),
    "llava": dict(
        text_config=TEXT | {"model_type": "llama"}, vision_config=VISION | {"model_type": "clip_vision_model"}, **IMAGE
    ),
    "llava_next": dict(
        text_config=TEXT | {"model_type": "mistral", "sliding_window": 5},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        **IMAGE,
    ),
    "qwen2_vl": dict(text_config=TEXT | {"rope_parameters": QWEN_ROPE}, vision_config=QWEN_VISION, image_token_id=140),
    "qwen2_5_vl": dict(
        text_config=TEXT | {"rope_parameters": QWEN_ROPE}, vision_config=QWEN_VISION, image_token_id=140
    ),
}
AUTO = transformers.AutoModelForImageTextToText
IDS, MASK = padded_rows("left", 130)


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    """container(kind) -> the folder of a tiny multimodal model, and the model."""
    made = {}

    def make(kind):
        if kind not in made:
            config = transformers.AutoConfig.for_model(kind, pad_token_id=1, eos_token_id=0, **SETTINGS[kind])
            model = AUTO.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
            randomise(model, 0)
            folder = tmp_path_factory.mktemp("container") / kind
            model.save_pretrained(folder)
            made[kind] = folder, model
        return made[kind]

    return make


def same_logits(folder, theirs):
    model = from_pretrained(folder)
    assert_close(np.asarray(apply(model, IDS, MASK))[MASK], torch_logits(theirs, IDS, MASK)[MASK])
    return model


def test_the_kinds_tried_here_are_all_that_are_read():
    assert SETTINGS.keys() == CONTAINERS.keys()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_text_model_of_a_multimodal_folder_gives_its_logits_and_is_exported_alone(kind, container, tmp_path):
    folder, theirs = container(kind)
    model = same_logits(folder, theirs)
    save_pretrained(model, tmp_path / "text")
    alone = load(transformers.AutoModelForCausalLM, tmp_path / "text")
    assert_close(torch_logits(alone, IDS, MASK)[MASK], torch_logits(theirs, IDS, MASK)[MASK], 1e-5)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_a_trained_text_model_is_written_into_its_folder_whose_other_tensors_stay_as_they_are(
    kind, container, tmp_path
):
    folder, _ = container(kind)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    model = from_pretrained(folder)
    params = {path: array * 1.25 for path, array in model.params.items()}
    save_pretrained(dataclasses.replace(model, params=params), tmp_path / "text")
    argv = ["import", str(tmp_path / "text"), str(tmp_path / "whole"), "--container", str(folder)]
    assert main(argv) == 0
    assert {path.name for path in folder.iterdir()} <= {path.name for path in (tmp_path / "whole").iterdir()}
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes()
    old, new = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "whole"))
    assert old.keys() == new.keys()
    for name in old:
        factor = 1.0 if text_name(name, in_container=True) is None else 1.25
        np.testing.assert_array_equal(new[name], old[name] * np.float32(factor), err_msg=name)
    assert sum(text_name(name, in_container=True) is None for name in old) > 5
    whole, alone = load(AUTO, tmp_path / "whole"), load(transformers.AutoModelForCausalLM, tmp_path / "text")
    assert_close(torch_logits(whole, IDS, MASK)[MASK], torch_logits(alone, IDS, MASK)[MASK], 1e-5)


def test_a_folder_of_another_text_model_or_none_is_refused_as_container(container, tmp_path):
    model = from_pretrained(container("mistral3")[0])
    with pytest.raises(ValueError, match="is another than this one: they differ in family"):
        save_pretrained(model, tmp_path / "whole", container=container("gemma3")[0])
    save_pretrained(model, tmp_path / "text")
    with pytest.raises(ValueError, match="is not a multimodal folder"):
        save_pretrained(model, tmp_path / "whole", container=tmp_path / "text")
    with pytest.raises(ValueError, match="leave dtype out"):
        save_pretrained(model, tmp_path / "whole", container=container("mistral3")[0], dtype="bfloat16")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    "prefixes", [("model.language_model.", "lm_head."), ("language_model.model.", "language_model.lm_head.")]
)
def test_the_names_of_old_and_new_versions_are_read(prefixes, container, tmp_path):
    folder, theirs = container("mistral3")
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("model.language_model.", prefixes[0]).replace("lm_head.", prefixes[1])
        tensors[name] = tensor.numpy()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    same_logits(tmp_path, theirs)


def test_sizes_that_a_folder_leaves_out_are_those_of_transformers():
    for kind, text_kind in (("gemma3", "gemma3_text"), ("mistral3", "mistral"), ("llava", "llama")):
        ours = text_config({"model_type": kind, "text_config": {"model_type": text_kind, "hidden_size": None}})
        theirs = transformers.AutoConfig.for_model(text_kind)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key in (*sizes, "max_position_embeddings"):
            assert ours[key] == getattr(theirs, key), key


def test_qwen_folders_without_text_config_are_read_as_transformers_reads_them():
    flat = TEXT | {"rope_theta": 5e5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "eos_token_id": 7}
    for kind in ("qwen2_vl", "qwen2_5_vl"):
        hf = flat | {"model_type": kind, "vision_config": {}, "tie_word_embeddings": True}
        ours, theirs = text_config(hf), transformers.AutoConfig.for_model(**hf)
        assert ours["model_type"] == "qwen2" and "vision_config" not in ours
        rope = theirs.text_config.rope_parameters
        assert (ours["rope_theta"], ours["rope_scaling"]["rope_type"]) == (rope["rope_theta"], rope["rope_type"])
        assert (ours["tie_word_embeddings"], ours["eos_token_id"]) == (theirs.tie_word_embeddings, 7)


def test_a_template_that_reads_lists_of_parts_writes_texts_and_one_of_a_processor_is_used(tmp_path):
    template = (
        "{% for message in messages %}{{ message['role'] }}: {% for content in message['content'] | "
        "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %};{% endfor %}"
    )
    tokenizer = chatml_like()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = read_tokenizer(tmp_path, 400)
    assert tokenizer.chat_template == template
    messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
    assert render(tokenizer, [Chat(messages)], opened=False) == ["user: How are you?;assistant: Well.;"]
    assert messages[0]["content"] == "How are you?"
