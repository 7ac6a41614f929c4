"""One tokenizer, one chat template and one date for all stages of a run."""

import dataclasses
import json
import logging
import shutil
from datetime import datetime

import pytest
import tiny_recipe
import transformers.utils.chat_template_utils
from tiny_tokenizer import chatml_like, gpt2_like
from transformers import AutoTokenizer

import rlhf_jax
import rlhf_jax.stages.supervised
from rlhf_jax.chat import ChatModel
from rlhf_jax.config import load_config
from rlhf_jax.data.cache import tokenizer_key
from rlhf_jax.data.chat_template import encode_prompt, prepare_tokenizer
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.recipe import Recipe
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.tokenizers import adopt_tokenizer, check_same_ids

OTHER = "{% for m in messages %}{{ '<s>' + m['content'] + '</s>' }}{% endfor %}"
DATED = "{{ strftime_now('" + "%d %b %Y" + "') }}" + OTHER
QUESTION = (("user", "Hi."),)
RECIPE = tiny_recipe.RECIPE.replace('actor = "new"', "")


@pytest.fixture
def base(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory) / "base"


def other_reward(base, folder, swapped=()):
    """A copy of the base with another chat template, in whose vocabulary two tokens have each other's ids."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = OTHER
    tokenizer.save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab |= dict(zip(swapped, [vocab[token] for token in reversed(swapped)], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def test_the_reward_stage_renders_and_exports_by_the_actors_template(base, tmp_path, monkeypatch, caplog):
    rendered_by, select = [], rlhf_jax.stages.supervised.select_rows

    def record(config, tokenizer, *args, **options):
        rendered_by.append(tokenizer.chat_template)
        return select(config, tokenizer, *args, **options)

    monkeypatch.setattr(rlhf_jax.stages.supervised, "select_rows", record)
    reward, recipe = other_reward(base, tmp_path / "judge"), tiny_recipe.write_recipe(tmp_path, RECIPE)
    settings = [f"run.dir={tmp_path / 'run'}", f"model.actor={base}", f"model.reward={reward}"]
    with caplog.at_level(logging.INFO, "rlhf_jax"):
        assert tiny_recipe.run("reward", recipe, *settings, "reward.steps=1", "reward.eval_batches=0") == 0
    actor = AutoTokenizer.from_pretrained(base)
    exported = AutoTokenizer.from_pretrained(tmp_path / "run/reward/export")
    assert rendered_by == [actor.chat_template] and exported.chat_template == actor.chat_template
    assert f"the chat template of {reward} is not the actor's" in caplog.text


def test_a_reward_model_of_other_ids_is_refused_before_any_stage_begins(base, tmp_path, caplog):
    reward = other_reward(base, tmp_path / "judge", swapped=["x", "y"])
    recipe = tiny_recipe.write_recipe(tmp_path, RECIPE)
    settings = [f"run.dir={tmp_path / 'run'}", f"model.actor={base}", f"model.reward={reward}"]
    assert tiny_recipe.run("train", recipe, *settings) == 2
    assert "2 of the actor's 300 tokens differ: 'x'" in caplog.text and 'set model.reward = "sft"' in caplog.text
    assert not (tmp_path / "run").exists()


def test_a_reward_model_may_know_more_tokens_than_the_actor_and_lack_ids_that_it_has_rows_for():
    actor, reward = gpt2_like(), gpt2_like()
    reward.add_tokens(["<extra>"])
    check_same_ids(actor, reward, "judge")
    check_same_ids(reward, actor, "judge", rows=len(reward))
    with pytest.raises(ValueError, match="'<extra>' has id 339 there and no id here"):
        check_same_ids(reward, actor, "judge", rows=len(actor))
    actor.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="1 of the actor's 340 tokens differ"):
        check_same_ids(actor, reward, "judge")


def test_an_adopted_tokenizer_brings_its_end_of_turn(base):
    model = rlhf_jax.reward_from_pretrained(base)
    own = prepare_tokenizer(model.tokenizer)
    actor = prepare_tokenizer(AutoTokenizer.from_pretrained(base), OTHER)
    assert adopt_tokenizer("reward", model, actor).tokenizer is actor
    assert adopt_tokenizer("reward", model, own).folder == model.folder


DIRECTIVES = ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d at %H:%M:%S", "100%% on %j", "%y%m%d%%d"]


@pytest.mark.parametrize("directive", DIRECTIVES)
def test_a_frozen_date_is_written_as_transformers_writes_it_on_that_day(directive, monkeypatch):
    template = "\n{% set day = strftime_now(" + repr(directive) + ") %}{{ day }}: " + OTHER
    moment = datetime(2024, 2, 3, 4, 5, 6)
    tokenizer = prepare_tokenizer(gpt2_like(chat_template=template), date=moment.isoformat())
    found = tokenizer.decode(encode_prompt(tokenizer, QUESTION))

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)
    reference = tokenizer.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False)
    assert found == reference and moment.strftime(directive) in reference


def test_the_cache_depends_on_the_date_as_far_as_the_template_writes_it():
    def key(template, date):
        return tokenizer_key(prepare_tokenizer(gpt2_like(chat_template=template), date=date))

    assert key(DATED, "2024-02-03T01:00:00") == key(DATED, "2024-02-03T23:00:00") != key(DATED, "2024-02-04")
    assert key(OTHER, "2024-02-03") == key(OTHER, "2025-02-03")
    assert prepare_tokenizer(chatml_like()).chat_template == chatml_like().chat_template


def test_data_date_is_a_date():
    with pytest.raises(ValueError, match="data.date = 'today' is no date: write it as 2026-11-29"):
        DataConfig((SourceConfig("rows.jsonl"),), date="today")


def test_a_run_keeps_the_date_of_its_start_for_every_stage_and_the_chat(base, tmp_path, capsys):
    (tmp_path / "clock.jinja").write_text(DATED.replace("%Y", "%Y %H:%M:%S.%f"))
    recipe, run = tiny_recipe.write_recipe(tmp_path, RECIPE), tmp_path / "run"
    settings = [f"run.dir={run}", f"model.actor={base}", f"data.template={tmp_path / 'clock.jinja'}"]
    settings += ["sft.steps=2", "run.save_every=1", "sft.eval_batches=0", f"data.cache_dir={tmp_path / 'cache'}"]
    assert tiny_recipe.run("sft", recipe, *settings) == 0
    date = load_config(run / "config.toml", [], Recipe).data.date
    assert abs((datetime.now() - datetime.fromisoformat(date)).total_seconds()) < 600
    for gone in ("run/sft/export", "run/sft/checkpoints/2", "cache"):
        shutil.rmtree(tmp_path / gone)
    assert tiny_recipe.run("sft", recipe, *settings) == 0  # the rows are the same, though the clock has moved
    assert load_config(run / "config.toml", [], Recipe).data.date == date
    assert tiny_recipe.run("data", recipe, *settings) == 0
    written = datetime.fromisoformat(date).strftime("%d %b %Y %H:%M:%S.%f")
    assert written in capsys.readouterr().out
    speaker = ChatModel(rlhf_jax.from_pretrained(run / "sft/export"), SampleConfig(max_new_tokens=4))
    assert speaker.tokenizer.decode(encode_prompt(speaker.tokenizer, QUESTION)).startswith(written)


def test_a_template_without_a_date_leaves_the_configuration_without_one(base, tmp_path):
    recipe = load_config(tiny_recipe.write_recipe(tmp_path, RECIPE), [f"model.actor={base}"], Recipe)
    assert recipe.with_date(start=True) == recipe
    dated = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, template=DATED))
    assert dated.with_date() == dated and dated.with_date(start=True).data.date.startswith(f"{datetime.now():%Y-}")
