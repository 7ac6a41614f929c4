"""Tokenizers read as their tokenizer.json says, and written for transformers 4 and 5."""

import json
import logging

import pytest
from tiny_tokenizer import chatml_like, gpt2_like, llama_like
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.tokenizer_files import open_tokenizer, write_tokenizer

TEXT = "Human: What is  the capital of France?\n\n  12 + 345's é ok? x"


def config_of(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(tokenizer, folder, **changes):
    """The tokenizer's folder as transformers 4 writes it, with changes of tokenizer_config.json; None removes a key."""
    tokenizer.save_pretrained(folder)
    config = config_of(folder) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    extra = config.pop("extra_special_tokens", None)
    config |= ({"additional_special_tokens": extra} if extra else {}) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("make", [gpt2_like, llama_like])
@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_ids_are_those_of_tokenizer_json_for_every_family_and_class(make, named, tmp_path):
    for family in FAMILIES:
        folder = save(make(), tmp_path / family, tokenizer_class=named)
        AutoConfig.for_model(family, vocab_size=600).save_pretrained(folder)
        tokenizer = open_tokenizer(folder)
        assert tokenizer(TEXT).input_ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids, family
        assert tokenizer.eos_token == "</s>"


def test_a_tokenizer_of_qwen2s_own_kind_of_words_is_read_otherwise_than_by_transformers_and_that_is_logged(
    tmp_path, caplog
):
    folder = save(llama_like(), tmp_path)
    AutoConfig.for_model("qwen2", vocab_size=600).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids != llama_like()(TEXT).input_ids
    with caplog.at_level(logging.INFO):
        assert open_tokenizer(folder)(TEXT).input_ids == llama_like()(TEXT).input_ids
    assert "read by its tokenizer.json, from which transformers' Qwen2Tokenizer differs" in caplog.text


def test_an_unchanged_tokenizer_is_copied_bit_for_bit_with_named_templates_and_all_files(tmp_path):
    source = save(gpt2_like(), tmp_path / "source", clean_up_tokenization_spaces=False)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    others = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model")
    for name in others:
        (source / name).write_text("{}" if name.endswith("json") else "#version")
    (tmp_path / "copy").mkdir()
    write_tokenizer(open_tokenizer(source), tmp_path / "copy", source)
    assert contents(tmp_path / "copy") == contents(source)
    assert {*others, "additional_chat_templates/tool_use.jinja"} < contents(source).keys()


def test_a_padding_token_and_a_template_are_the_only_changes_of_an_export(tmp_path):
    source = save(gpt2_like(), tmp_path / "source")
    (source / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "copy").mkdir()
    tokenizer = prepare_tokenizer(open_tokenizer(source))
    write_tokenizer(tokenizer, tmp_path / "copy", source)
    old, new = contents(source), contents(tmp_path / "copy")
    changed = {"tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} == changed
    assert config_of(tmp_path / "copy") == config_of(source) | {"pad_token": "</s>"}
    assert json.loads(new["special_tokens_map.json"]) == {"eos_token": "</s>", "pad_token": "</s>"}
    again = open_tokenizer(tmp_path / "copy")
    assert (again.pad_token, again.chat_template) == ("</s>", tokenizer.chat_template)
    assert config_of(source)["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert again.extra_special_tokens == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("inside", ["list", "text", "files"])
def test_a_changed_default_template_is_written_where_it_was_and_named_ones_are_kept(inside, tmp_path):
    source = save(gpt2_like(), tmp_path / "source")
    named = [{"name": "default", "template": "{{ 'old' }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    if inside == "files":
        (source / "chat_template.jinja").write_text("{{ 'old' }}")
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    else:
        save(gpt2_like(), source, chat_template=named if inside == "list" else "{{ 'old' }}")
    tokenizer = open_tokenizer(source)
    tokenizer.chat_template = "{{ 'new' }}"
    (tmp_path / "copy").mkdir()
    write_tokenizer(tokenizer, tmp_path / "copy", source)
    again = AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template
    assert again == ("{{ 'new' }}" if inside == "text" else {"default": "{{ 'new' }}", "tool_use": "{{ tools }}"})


def test_a_new_tokenizer_and_another_vocabulary_are_written_without_what_transformers_4_refuses(tmp_path):
    source = save(llama_like(), tmp_path / "source")
    for number, place in enumerate((None, source)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_tokenizer(chatml_like(), folder, place)
        config = config_of(folder)
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
        assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
        opened = AutoTokenizer.from_pretrained(folder)
        assert opened(TEXT).input_ids == chatml_like()(TEXT).input_ids
        assert opened.chat_template == chatml_like().chat_template
