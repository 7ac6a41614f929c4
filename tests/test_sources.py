"""Sources: fields and transcripts to examples, disjoint stages, and errors that name file, line and mend."""

import dataclasses
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.sources import BUILTIN, DataConfig, Example, SourceConfig, load_examples, parse_transcript
from rlhf_jax.data.splits import STAGES

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")


def config_of(path, split="1,0,0", held_out=0.0, **source) -> DataConfig:
    return DataConfig(sources=(SourceConfig(str(path), **source),), split=split, held_out=held_out)


def pairs(num: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(start, start + num)]


def prompts(examples: list[Example]) -> set:
    return {example.turns for example in examples}


def test_fields_are_found_by_the_names_given(write_jsonl):
    path = write_jsonl([{"question": " How many? ", "answer": "\n7 ", "other": 1}])
    (example,) = load_examples(config_of(path, prompt="question", answer="answer"), "sft", held_out=False)
    assert example == Example((("user", "How many?"),), "7", "", "", str(path), 1)


def test_sft_learns_from_chosen_where_no_answer_is_named(write_jsonl):
    (example,) = load_examples(config_of(write_jsonl(pairs(1))), "sft", held_out=False)
    assert (example.answer, example.chosen, example.rejected) == ("good 0", "good 0", "bad 0")


def test_a_transcript_is_cut_before_its_last_assistant_turn(write_jsonl):
    before = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    path = write_jsonl([{"chosen": before + " yes: Human: d", "rejected": before + " no"}])
    (example,) = load_examples(config_of(path, "0,1,0", transcript=True), "reward", held_out=False)
    assert example.turns == (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert (example.chosen, example.rejected) == ("yes: Human: d", "no")


def test_a_transcript_may_begin_in_the_prompt_field(write_jsonl):
    path = write_jsonl([{"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " yes", "rejected": " no"}])
    (example,) = load_examples(config_of(path, "0,1,0", transcript=True), "reward", held_out=False)
    assert (example.turns, example.chosen, example.rejected) == ((("user", "a"),), "yes", "no")


def test_turns_of_one_speaker_in_succession_are_one_turn():
    text = "Human: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:\n\nAssistant: d\n\nHuman: never answered"
    assert parse_transcript(text, "") == ((("user", "a\n\nb"),), "c\n\nd")


WORDS = st.lists(st.text("ab .:\n", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=8)


@given(WORDS.filter(lambda words: len(words) % 2 == 0))
def test_transcripts_of_any_length_give_their_turns_back(words):
    text = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {word}" for i, word in enumerate(words))
    turns, answer = parse_transcript(text, "")
    assert [content for _, content in turns] + [answer] == words
    assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]


def test_no_prompt_serves_two_stages_or_both_training_and_evaluation(write_jsonl):
    # Each prompt three times, with white space that differs.
    rows = pairs(1000) + pairs(1000) + [{**row, "prompt": f"  {row['prompt']}\n"} for row in pairs(1000)]
    config = config_of(write_jsonl(rows), "2,4,4", held_out=0.1)
    trained = {stage: load_examples(config, stage, held_out=False) for stage in STAGES}
    evaluated = {stage: load_examples(config, stage, held_out=True) for stage in STAGES}
    assert evaluated["sft"] == evaluated["reward"] == evaluated["ppo"]
    sides = [prompts(trained[stage]) for stage in STAGES] + [prompts(evaluated["ppo"])]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 1000
    assert [len(side) for side in sides] == pytest.approx([180, 360, 360, 100], abs=45)
    assert sum(map(len, trained.values())) + len(evaluated["ppo"]) == 3000


def test_added_rows_leave_the_others_where_they_are(write_jsonl):
    few, many = write_jsonl(pairs(300), "few.jsonl"), write_jsonl(pairs(600)[::-1], "many.jsonl")
    for stage in STAGES:
        before = prompts(load_examples(config_of(few, "2,4,4", 0.1), stage, held_out=False))
        after = prompts(load_examples(config_of(many, "2,4,4", 0.1), stage, held_out=False))
        assert before == after & prompts(load_examples(config_of(few, "1,0,0"), "sft", held_out=False))


def test_rows_of_the_evaluation_file_are_held_out_and_their_prompts_train_nothing(write_jsonl):
    train, held = write_jsonl(pairs(100), "train.jsonl"), write_jsonl(pairs(30, start=90), "held.jsonl")
    config = config_of(train, "1,1,1", held_out=0.5, eval_path=str(held))
    trained = [load_examples(config, stage, held_out=False) for stage in STAGES]
    assert sum(map(len, trained)) == 90  # the share data.held_out is for sources without such a file
    for stage in STAGES:
        evaluated = load_examples(config, stage, held_out=True)
        assert [example.turns[0][1] for example in evaluated] == [f"q{i}" for i in range(90, 120)]
        assert evaluated[3].row == 4 and evaluated[3].source == str(held)


def test_what_one_source_holds_out_no_other_source_trains(write_jsonl):
    one = SourceConfig(str(write_jsonl(pairs(200), "one.jsonl")))
    held = str(write_jsonl(pairs(50), "held.jsonl"))
    two = SourceConfig(str(write_jsonl(pairs(400), "two.jsonl")), eval_path=held)
    config = DataConfig(sources=(one, two), split="1,0,0", held_out=0.2)
    trained, evaluated = (load_examples(config, "sft", held_out=held_out) for held_out in (False, True))
    assert not prompts(trained) & prompts(evaluated)
    by_source = Counter(example.source for example in evaluated)
    assert by_source[held] == 50 and 20 < by_source[one.path] < 60
    assert len(prompts(trained) | prompts(evaluated)) == 400


def test_a_source_without_pairs_is_left_out_of_the_reward_stage_only(write_jsonl):
    sums = SourceConfig(
        str(write_jsonl([{"q": f"s{i}", "a": "1"} for i in range(90)], "s.jsonl")), "train", "", "q", "a"
    )
    sums = dataclasses.replace(sums, chosen="", rejected="")
    config = DataConfig(sources=(sums, SourceConfig(str(write_jsonl(pairs(90))))), split="1,1,1", held_out=0.0)
    letters = {stage: {e.turns[0][1][0] for e in load_examples(config, stage, held_out=False)} for stage in STAGES}
    assert letters == {"sft": {"s", "q"}, "reward": {"q"}, "ppo": {"s", "q"}}


def test_ppo_needs_prompts_only(write_jsonl):
    (example,) = load_examples(config_of(write_jsonl([{"prompt": "q"}]), "0,0,1"), "ppo", held_out=False)
    assert (example.turns, example.answer, example.chosen) == ((("user", "q"),), "", "")


def test_limit_takes_the_first_rows_and_blank_lines_keep_the_count(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt":"a","chosen":"b"}\n\n{"prompt":"c","chosen":"d"}\nnot JSON\n')
    examples = load_examples(config_of(tmp_path / "rows.jsonl", limit=2), "sft", held_out=False)
    assert [(example.turns[0][1], example.row) for example in examples] == [("a", 1), ("c", 3)]


def test_the_built_in_set_is_seeded_and_serves_all_stages():
    config = dataclasses.replace(config_of(BUILTIN, "1,1,1", held_out=0.1), builtin_rows=300)
    sizes = {stage: len(load_examples(config, stage, held_out=False)) for stage in STAGES}
    assert sum(sizes.values()) + len(load_examples(config, "sft", held_out=True)) == 300
    first = load_examples(config, "reward", held_out=False)
    assert first == load_examples(config, "reward", held_out=False)
    assert all(example.answer and example.chosen and example.rejected for example in first)
    assert first != load_examples(dataclasses.replace(config, builtin_seed=1), "reward", held_out=False)


def test_another_name_is_loaded_from_the_hub(monkeypatch):
    asked = []
    hub = types.SimpleNamespace(
        load_dataset=lambda name, split: asked.append((name, split)) or pairs(3),
        exceptions=types.SimpleNamespace(DatasetNotFoundError=LookupError),
    )
    monkeypatch.setitem(sys.modules, "datasets", hub)
    examples = load_examples(config_of("someone/pairs", **{"limit": 2}), "sft", held_out=False)
    assert asked == [("someone/pairs", "train")] and [example.row for example in examples] == [1, 2]

    def missing(name, split):
        raise LookupError("404")

    hub.load_dataset = missing
    with pytest.raises(ValueError, match="'someone/pairs' is no file here, and cannot be had from the hub: 404"):
        load_examples(config_of("someone/pairs"), "sft", held_out=False)


GOOD = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
MISTAKES = {
    "malformed": (GOOD * 2 + b'{"prompt": "q",\n', "line 3: malformed JSON (Expecting property name"),
    "not UTF-8": (GOOD + b'{"prompt": "\xff"}\n', "line 2: malformed JSON ('utf-8' codec can't decode"),
    "an array": (b"[" + GOOD.strip() + b"]\n", "line 1: holds a list; there must be one object on every line"),
    "no field": (GOOD + b'{"prompt": "q", "good": "a"}\n', "line 2: no field 'chosen'; the fields are prompt, good."),
    "no fields": (b"{}\n", "line 1: no field 'prompt'; the fields are none."),
    "null": (GOOD + b'{"prompt": null, "chosen": "a"}\n', "line 2: field 'prompt' must be text, not NoneType"),
    "a list": (b'{"prompt": "q", "chosen": ["a"]}\n', "line 1: field 'chosen' must be text, not list"),
    "half a character": (b'{"prompt": "\\ud83d", "chosen": "a"}\n', "line 1: field 'prompt' holds half a character"),
    "empty": (b"", "holds no rows"),
    "blank": (b"\n \n", "holds no rows"),
}


@pytest.mark.parametrize(("content", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="rows.jsonl.*" + re.escape(message)):
        load_examples(config_of(tmp_path / "rows.jsonl"), "sft", held_out=False)


def test_a_mistake_in_the_evaluation_file_is_named_too(tmp_path, write_jsonl):
    (tmp_path / "held.jsonl").write_bytes(GOOD + b"oops\n")
    config = config_of(write_jsonl(pairs(3)), eval_path=str(tmp_path / "held.jsonl"))
    with pytest.raises(ValueError, match=r"held\.jsonl, line 2: malformed JSON"):
        load_examples(config, "sft", held_out=False)


def test_a_pair_without_rejected_is_refused_by_the_reward_stage_only(write_jsonl):
    path = write_jsonl([{"prompt": "q", "chosen": "a"}])
    assert len(load_examples(config_of(path), "sft", held_out=False)) == 1
    with pytest.raises(ValueError, match="line 1: no field 'rejected'; the fields are prompt, chosen"):
        load_examples(config_of(path, "0,1,0"), "reward", held_out=False)


@pytest.mark.parametrize("path", ["no/such.jsonl", "no/such.json"])
def test_a_missing_file_is_named(path):
    with pytest.raises(ValueError, match=f"{path}: no such file"):
        load_examples(config_of(path), "sft", held_out=False)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder, name a file in it"):
        load_examples(config_of(tmp_path), "sft", held_out=False)


def test_an_unknown_built_in_set_is_refused():
    with pytest.raises(ValueError, match="no built-in set 'builtin:assistent', only 'builtin:assistant'"):
        load_examples(config_of("builtin:assistent"), "sft", held_out=False)


@pytest.mark.parametrize(
    "text", ["", "hello", "\n\nHuman: a", "\n\nAssistant: a", "Rules.\n\nHuman: a\n\nAssistant: b"]
)
def test_what_is_no_transcript_is_refused_with_its_line(write_jsonl, text):
    path = write_jsonl([{"chosen": "\n\nHuman: a\n\nAssistant: b"}, {"chosen": text}])
    with pytest.raises(
        ValueError, match=r"line 2, field 'chosen': no transcript: a turn 'Human: \.\.\.' must come first"
    ):
        load_examples(config_of(path, transcript=True), "sft", held_out=False)


def test_a_pair_of_transcripts_with_different_prompts_is_refused(write_jsonl):
    path = write_jsonl([{"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: b"}])
    with pytest.raises(ValueError, match="line 1: chosen and rejected answer different prompts"):
        load_examples(config_of(path, "0,1,0", transcript=True), "reward", held_out=False)


def test_a_stage_without_rows_is_refused_and_says_how_to_mend_it(write_jsonl):
    with pytest.raises(ValueError, match="no rows for the stage reward: 5 rows serve it before data.split = '1,0,0'"):
        load_examples(config_of(write_jsonl(pairs(5))), "reward", held_out=False)


def test_there_may_be_no_held_out_rows(write_jsonl):
    assert load_examples(config_of(write_jsonl(pairs(5))), "sft", held_out=True) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "2,4"}, "data.split"),
        ({"sources": ()}, "data.sources is empty"),
        ({"held_out": 1.0}, "data.held_out"),
        ({"max_prompt_length": 512}, r"data.max_length \(512\) must be larger than data.max_prompt_length \(512\)"),
    ],
)
def test_an_impossible_configuration_is_refused_when_it_is_made(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config_of("x.jsonl"), **change)


@pytest.mark.parametrize("change", [{"limit": -1}, {"prompt": ""}, {"transcript": True, "chosen": ""}])
def test_an_impossible_source_is_refused_when_it_is_made(change):
    with pytest.raises(ValueError, match=r"data\.sources"):
        SourceConfig("x.jsonl", **change)


@needs_real_data
def test_every_row_of_hh_rlhf_is_an_example():
    folder = REAL / "hh-rlhf-harmless"
    config = config_of(folder / "train.jsonl", "0,1,0", transcript=True, eval_path=str(folder / "test.jsonl"))
    trained, evaluated = (load_examples(config, "reward", held_out=held_out) for held_out in (False, True))
    assert len(evaluated) == 252
    assert len(trained) == 1747
    assert not prompts(trained) & prompts(evaluated)
    for example in trained + evaluated:
        roles = [role for role, _ in example.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert not any("\n\nAssistant:" in content for _, content in example.turns)


@needs_real_data
def test_the_instructions_of_alpaca_eval_are_shared_out_whole():
    folder = REAL / "alpaca-eval-preferences"
    config = config_of(folder / "train.jsonl", "2,4,4", eval_path=str(folder / "test.jsonl"))
    trained = [load_examples(config, stage, held_out=False) for stage in STAGES]
    assert sum(map(len, trained)) == 13_823
    assert len(load_examples(config, "ppo", held_out=True)) == 1_369
    assert sum(len(prompts(examples)) for examples in trained) == 636  # instructions, none in two stages
