"""Rows of a stage: disjoint by prompt, stable when rows are added, held out by file or hash, mixed as configured."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_specs import SPECS, STAGES, split_of
from tiny_tokenizer import gpt2_like

from rlhf_jax.data import sources
from rlhf_jax.data.chat_template import CHAT_TEMPLATE, prepare_tokenizer
from rlhf_jax.data.config import BUILTIN, DataConfig, SourceConfig
from rlhf_jax.data.records import Example
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import read_examples, rows_from_examples, select_rows, source_sizes
from rlhf_jax.recipe import Recipe

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")
TOKENIZER = prepare_tokenizer(gpt2_like())


def config_of(path, split="1,0,0", held_out=0.0, **source) -> DataConfig:
    return DataConfig(sources=(SourceConfig(str(path), **source),), split=split_of(split), held_out=held_out)


def pairs(num: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(start, start + num)]


def examples(config: DataConfig, stage: str, held_out: bool = False) -> list[Example]:
    return list(read_examples(config, SPECS[stage], held_out=held_out))


def prompts(found: list[Example]) -> set:
    return {example.turns for example in found}


def texts(rows: Rows) -> list[str]:
    """The first sequence of every row, as text."""
    documents = [part.documents(row)[0][0] for part in rows.parts for row in range(len(part))]
    return [TOKENIZER.decode(document.tokens) for document in documents]


def rows_for(config: DataConfig, stage: str, held_out: bool = False, **options) -> Rows:
    spec = dataclasses.replace(SPECS[stage], **options)
    return select_rows(config, TOKENIZER, spec, held_out=held_out)


def test_no_prompt_is_used_by_two_stages_or_by_both_training_and_evaluation(write_jsonl):
    # Each prompt three times, with different whitespace.
    rows = pairs(1000) + pairs(1000) + [{**row, "prompt": f"  {row['prompt']}\n"} for row in pairs(1000)]
    config = config_of(write_jsonl(rows), "2,4,4", held_out=0.1)
    trained = {stage: examples(config, stage) for stage in STAGES}
    evaluated = {stage: examples(config, stage, held_out=True) for stage in STAGES}
    assert prompts(evaluated["sft"]) == prompts(evaluated["reward"]) == prompts(evaluated["ppo"])
    sides = [prompts(trained[stage]) for stage in STAGES] + [prompts(evaluated["ppo"])]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 1000
    assert [len(side) for side in sides] == pytest.approx([180, 360, 360, 100], abs=45)
    assert sum(map(len, trained.values())) + len(evaluated["ppo"]) == 3000


WORDS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=60)


@settings(deadline=None, max_examples=25)
@given(words=WORDS, split=st.sampled_from(["2,4,4", "1,0,0", "1,1,8"]), held_out=st.sampled_from([0.0, 0.3]))
def test_splits_are_disjoint_and_complete_for_any_prompts(tmp_path_factory, words, split, held_out):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": word, "chosen": f"yes {i}", "rejected": "no"} for i, word in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(path, split, held_out)
    sides = [[e.row for e in examples(config, stage)] for stage in STAGES] + [
        [e.row for e in examples(config, "sft", held_out=True)]
    ]
    assert sorted(sum(sides, [])) == list(range(1, len(words) + 1))  # every row once
    assert sum(len({words[row - 1] for row in side}) for side in sides) == len(set(words))


def test_the_rows_of_a_stage_are_its_examples_in_order(write_jsonl):
    config = config_of(write_jsonl(pairs(3000)), "2,4,4", held_out=0.1)  # several blocks
    for stage in STAGES:
        for held_out in (False, True):
            rows, found = rows_for(config, stage, held_out), examples(config, stage, held_out)
            (part,) = rows.parts
            assert part.store.numbers()[part.selected].tolist() == [example.row for example in found]
            assert [re.search(r"q\d+", text)[0] for text in texts(rows)] == [example.turns[0][1] for example in found]


def test_added_rows_do_not_change_the_split_of_the_others(write_jsonl):
    few, many = write_jsonl(pairs(300), "few.jsonl"), write_jsonl(pairs(600)[::-1], "many.jsonl")
    for stage in STAGES:
        before = prompts(examples(config_of(few, "2,4,4", 0.1), stage))
        after = prompts(examples(config_of(many, "2,4,4", 0.1), stage))
        assert before == after & prompts(examples(config_of(few), "sft"))


def test_another_split_seed_assigns_the_prompts_differently(write_jsonl):
    config = config_of(write_jsonl(pairs(1000)), "1,1,1", held_out=0.2)
    sides = {}
    for seed in (0, 1, 2):
        seeded = dataclasses.replace(config, split_seed=seed)
        trained = [{e.row for e in examples(seeded, stage)} for stage in STAGES]
        held = {e.row for e in examples(seeded, "sft", held_out=True)}
        assert sum(map(len, [*trained, held])) == len(set.union(*trained, held)) == 1000
        assert {part.number(row) for part in rows_for(seeded, "sft").parts for row in range(len(part))} == trained[0]
        sides[seed] = trained[0], held
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len(sides[one][0] & sides[other][0]) == pytest.approx(1000 * (0.8 / 3) ** 2, abs=30)
        assert len(sides[one][1] & sides[other][1]) == pytest.approx(40, abs=24)


def test_rows_of_the_evaluation_file_are_held_out_and_their_prompts_are_never_trained_on(write_jsonl):
    train, held = write_jsonl(pairs(100), "train.jsonl"), write_jsonl(pairs(30, start=90), "held.jsonl")
    config = config_of(train, "1,1,1", held_out=0.5, eval_path=str(held))
    # The share data.held_out applies to sources without such a file.
    assert sum(len(examples(config, stage)) for stage in STAGES) == 90
    assert sum(len(rows_for(config, stage)) for stage in STAGES) == 90
    for stage in STAGES:
        evaluated = examples(config, stage, held_out=True)
        assert [example.turns[0][1] for example in evaluated] == [f"q{i}" for i in range(90, 120)]
        assert len(rows_for(config, stage, held_out=True)) == 30


def test_a_held_out_pair_without_an_sft_answer_still_keeps_its_prompt_out_of_training(write_jsonl):
    def row(i: int, answer: str | None) -> dict:
        before = f"\n\nHuman: q{i}\n\nAssistant:"
        texts = {"chosen": f"{before} yes", "rejected": f"{before} no"}
        return texts | {"answer": answer if answer is None else f"{before} {answer}"}

    train = write_jsonl([row(i, "sure") for i in range(40)], "train.jsonl")
    held = write_jsonl([row(i, None) for i in range(30, 40)], "held.jsonl")
    options = dict(format="transcript", answer="answer", sparse=True, eval_path=str(held))
    config = config_of(train, "1,1,1", **options)
    assert len(rows_for(config, "reward", held_out=True)) == 10
    trained = set().union(*(prompts(examples(config, stage)) for stage in STAGES))
    assert trained == {(("user", f"q{i}"),) for i in range(30)}
    assert sum(len(rows_for(config, stage)) for stage in STAGES) == 30


def test_prompts_held_out_by_one_source_are_not_trained_on_in_another(write_jsonl):
    one = SourceConfig(str(write_jsonl(pairs(200), "one.jsonl")))
    held = str(write_jsonl(pairs(50), "held.jsonl"))
    two = SourceConfig(str(write_jsonl(pairs(400), "two.jsonl")), eval_path=held)
    config = DataConfig(sources=(one, two), split=split_of("1,0,0"), held_out=0.2)
    trained, evaluated = examples(config, "sft"), examples(config, "sft", held_out=True)
    assert not prompts(trained) & prompts(evaluated)
    by_part = [len(part) for part in rows_for(config, "sft", held_out=True).parts]
    assert by_part[1] == 50 and 20 < by_part[0] < 60
    assert len(prompts(trained) | prompts(evaluated)) == 400
    assert len(rows_for(config, "sft")) == len(trained)


def test_no_source_is_read_again_because_another_has_its_own_held_out_rows(tmp_path, write_jsonl, monkeypatch):
    files = {name: write_jsonl(pairs(60, start), f"{name}.jsonl") for name, start in (("one", 0), ("two", 40))}
    files["held"] = write_jsonl(pairs(9, 50), "held.jsonl")
    files["sums"] = write_jsonl([{"q": "s", "a": "1"}], "sums.jsonl")
    one, two, sums = (SourceConfig(str(files[name]), format="fields") for name in ("one", "two", "sums"))
    sums = dataclasses.replace(sums, prompt="q", answer="a", chosen="", rejected="")
    counts, read_file = Counter(), sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path: counts.update([Path(path).stem]) or read_file(path))

    def count_reads(*sources: SourceConfig) -> tuple[Counter, dict]:
        """How often each file is read by all stages in order, and the rows that they train and evaluate on."""
        counts.clear()
        cache = str(tmp_path / f"cache-{sources[0].eval_path != ''}")
        config = DataConfig(sources, split_of("1,1,1"), 0.2, cache_dir=cache)
        found = {stage: [texts(rows_for(config, stage, side)) for side in (False, True)] for stage in STAGES}
        return counts.copy(), found

    alone, _ = count_reads(one, two, sums)
    assert alone == {"one": 3, "two": 3, "sums": 2}  # once per stage; there are no pairs in sums
    apart = dataclasses.replace(one, eval_path=str(files["held"]))
    first, found = count_reads(apart, two, sums)
    assert first == alone + Counter(held=4)  # prompts are read once, rows once per stage
    again, same = count_reads(apart, two, sums)
    assert not again and same == found
    for stage in STAGES:
        trained, evaluated = ({re.search(r"q\d+|s", text)[0] for text in side} for side in found[stage])
        assert evaluated >= {f"q{i}" for i in range(50, 59)} and not trained & evaluated


def test_only_the_reward_stage_skips_a_source_without_pairs(write_jsonl):
    sums = write_jsonl([{"q": f"s{i}", "a": "1"} for i in range(90)], "s.jsonl")
    sums = SourceConfig(str(sums), prompt="q", answer="a", chosen="", rejected="")
    config = DataConfig(
        sources=(sums, SourceConfig(str(write_jsonl(pairs(90))))), split=split_of("1,1,1"), held_out=0.0
    )
    letters = {stage: {e.turns[0][1][0] for e in examples(config, stage)} for stage in STAGES}
    assert letters == {"sft": {"s", "q"}, "reward": {"q"}, "ppo": {"s", "q"}}
    assert [len(rows_for(config, stage).parts) for stage in STAGES] == [2, 1, 2]


def test_a_prompt_in_two_sources_is_used_once(write_jsonl):
    one, two = write_jsonl(pairs(30), "one.jsonl"), write_jsonl(pairs(50), "two.jsonl")
    config = DataConfig(sources=(SourceConfig(str(one)), SourceConfig(str(two))), split=split_of("0,0,1"), held_out=0.0)
    rows = rows_for(config, "ppo")
    assert [len(part) for part in rows.parts] == [30, 20]
    assert rows.report == "50 rows, 30 dropped: repeated prompt"


def test_limit_takes_the_first_rows_and_blank_lines_count_in_row_numbers(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt":"a","chosen":"b"}\n\n{"prompt":"c","chosen":"d"}\nnot JSON\n')
    found = examples(config_of(tmp_path / "rows.jsonl", limit=2), "sft")
    assert [(example.turns[0][1], example.row) for example in found] == [("a", 1), ("c", 3)]


def test_a_limit_does_not_apply_to_a_separate_evaluation_file(write_jsonl):
    train, held = write_jsonl(pairs(100), "train.jsonl"), write_jsonl(pairs(30, start=5), "held.jsonl")
    config = config_of(train, eval_path=str(held), limit=20)
    assert len(rows_for(config, "sft", held_out=True)) == 30 == len(examples(config, "sft", held_out=True))
    assert [example.row for example in examples(config, "sft")] == [
        1,
        2,
        3,
        4,
        5,
    ]  # the evaluation file holds the others
    assert len(rows_for(config, "sft")) == 5


def test_two_sources_of_one_file_are_counted_separately(write_jsonl):
    path = str(write_jsonl(pairs(90)))
    config = DataConfig((SourceConfig(path), SourceConfig(path, limit=30)), split_of("1,0,0"), 0.0)
    assert source_sizes(config, SPECS["sft"]) == [90, 30]
    assert [len(part) for part in rows_for(config, "sft").parts] == [90, 30]


def test_the_built_in_set_is_seeded_and_serves_all_stages():
    config = dataclasses.replace(config_of(BUILTIN, "1,1,1", held_out=0.1, answer="answer"), builtin_rows=300)
    sizes = {stage: len(examples(config, stage)) for stage in STAGES}
    assert sum(sizes.values()) + len(examples(config, "sft", held_out=True)) == 300
    first = examples(config, "reward")
    assert first == examples(config, "reward")
    assert all(example.answer and example.chosen and example.rejected for example in first)
    other = dataclasses.replace(config, builtin_seed=1)
    assert first != examples(other, "reward")
    assert rows_for(config, "sft").fingerprint != rows_for(other, "sft").fingerprint


def test_sources_are_sampled_by_weight_cap_and_epochs_as_the_report_says(write_jsonl):
    few, many = str(write_jsonl(pairs(20), "few.jsonl")), str(write_jsonl(pairs(80, 100), "many.jsonl"))
    weighted = DataConfig((SourceConfig(few, weight=3), SourceConfig(many, weight=1)), split_of("1,0,0"), 0.0)
    rows = rows_for(weighted, "sft")
    assert rows.quota == (75, 25) and len(rows) == 100
    assert rows.report == f"100 rows, an epoch draws 100: 75 of {few}, 25 of {many}"
    capped = DataConfig((SourceConfig(few, epochs=2), SourceConfig(many, max_rows=30)), split_of("1,0,0"), 0.0)
    assert rows_for(capped, "sft").quota == (40, 30)
    tempered = dataclasses.replace(weighted, sources=(SourceConfig(few), SourceConfig(many)), temperature=2.0)
    assert rows_for(tempered, "sft").quota == (33, 67)
    assert len({rows_for(config, "sft").fingerprint for config in (weighted, capped, tempered)}) == 3
    # Evaluation uses each row once.
    held = dataclasses.replace(weighted, held_out=0.5)
    rows = rows_for(held, "sft", held_out=True)
    assert rows.quota == tuple(map(len, rows.parts))


def test_packed_rows_hold_every_document_once_and_the_report_gives_the_fill(write_jsonl):
    config = dataclasses.replace(config_of(write_jsonl(pairs(200))), max_prompt_length=100, max_length=128)
    for length in (127, -1):
        message = f"sft.pack_length = {length}: a row must hold a document of data.max_length = 128"
        with pytest.raises(ValueError, match=message):
            rows_for(config, "sft", pack_length=length)
    loose, packed = rows_for(config, "sft"), rows_for(config, "sft", pack_length=128)
    (part,) = packed.parts
    documents = [each.tokens.tolist() for row in range(len(part)) for (each,) in part.documents(row)]
    (alone,) = loose.parts
    assert sorted(documents) == sorted(alone.documents(row)[0][0].tokens.tolist() for row in range(len(alone)))
    assert max(part.lengths) <= 128 and len(part) < 60
    fill = sum(map(len, documents)) / (128 * len(part))
    assert packed.report == f"200 rows, packed into {len(part)} of 128 tokens, {fill:.1%} of them real"
    assert packed.fingerprint != loose.fingerprint


def test_packed_pairs_are_reported_with_both_sub_rows_and_their_fill(write_jsonl):
    config = dataclasses.replace(config_of(write_jsonl(pairs(200)), "0,1,0"), max_prompt_length=100, max_length=128)
    loose, packed = rows_for(config, "reward"), rows_for(config, "reward", pack_length=128)
    (part,), tokens = packed.parts, int(loose.parts[0].lengths.sum())
    assert part.lengths.max() <= 128 and part.lengths.sum() == tokens
    fill = tokens / (2 * 128 * len(part))
    assert fill > 0.85 and packed.report.endswith(f"packed into {len(part)} of 2 x 128 tokens, {fill:.1%} of them real")


def test_a_stage_without_rows_is_rejected_with_the_fix(write_jsonl):
    path = write_jsonl(pairs(5))
    with pytest.raises(
        ValueError,
        match=r"reward: there are no rows to train on \(0 rows\): .*data.split = { sft = 1, reward = 0, ppo = 0 }",
    ):
        rows_for(config_of(path), "reward")
    with pytest.raises(ValueError, match="sft: there are no held-out rows to evaluate on .*raise data.held_out"):
        rows_for(config_of(path), "sft", held_out=True)


def test_a_stage_without_a_share_is_rejected_and_the_recipe_has_shares_for_all(write_jsonl):
    config = config_of(write_jsonl(pairs(9)))
    for split, shown in (({"ppo": 1.0}, "{ ppo = 1 }"), ("2,4,4", "'2,4,4'")):
        message = re.escape(f"data.split = {shown} has no share for sft: add one, as in {{ sft = 1 }}")
        for read in (rows_for, examples):
            with pytest.raises(ValueError, match=message):
                read(dataclasses.replace(config, split=split), "sft")
    for split in ({}, "2,4,4", {"ppo": 4.0, "reward": 4.0, "sft": 2.0}):
        recipe = Recipe(dataclasses.replace(config, split=split))
        assert list(recipe.data.split.items()) == [("sft", 2.0), ("reward", 4.0), ("ppo", 4.0)]


def test_a_bad_row_stops_the_run_unless_it_is_tolerated_and_then_no_good_row_is_lost(write_jsonl):
    rows = pairs(50)
    rows[7] = {"prompt": "q7", "chosen": 3}
    rows[30] = {"prompt": "q30"}
    path = write_jsonl(rows)
    config = config_of(path)
    message = re.escape(f"{path}, line 8: field 'chosen' must be text or a list of messages, not int")
    message += ".*raise data.max_bad_rows"
    for read in (lambda: rows_for(config, "sft"), lambda: examples(config, "sft")):
        with pytest.raises(ValueError, match=message):
            read()
    with pytest.raises(ValueError, match=r"line 8.*line 31: no field 'chosen'.*data.max_bad_rows = 1, and there"):
        rows_for(dataclasses.replace(config, max_bad_rows=1), "sft")
    tolerant = dataclasses.replace(config, max_bad_rows=2)
    rows = rows_for(tolerant, "sft")
    assert len(rows) == 48 == len(examples(tolerant, "sft"))
    assert rows.report.startswith(f"48 rows, 2 bad rows left out: {path}, line 8: field 'chosen'")
    with pytest.raises(ValueError, match="line 8"):  # although the rows are cached now
        rows_for(config, "sft")


def test_generated_examples_become_rows_too():
    made = [Example((("user", f"q{i}"),), f"a{i}", "", "", "by hand", i) for i in range(5)]
    rows = rows_from_examples(made, DataConfig((SourceConfig("x.jsonl"),)), TOKENIZER, SPECS["sft"])
    assert [re.findall(r"[qa]\d", text) for text in texts(rows)] == [[f"q{i}", f"a{i}"] for i in range(5)]


def test_examples_rejected_by_the_template_count_as_bad_rows():
    refusing = "{% if 'q3' in messages[0]['content'] %}{{ raise_exception('no q3') }}{% endif %}" + CHAT_TEMPLATE
    tokenizer = prepare_tokenizer(gpt2_like(), refusing)
    made = [Example((("user", f"q{i}"),), f"a{i}", "", "", "by hand", i) for i in range(5)]
    config = DataConfig((SourceConfig("x.jsonl"),))
    with pytest.raises(ValueError, match="by hand, row 3: the tokenizer's chat template refuses a dialogue: no q3"):
        rows_from_examples(made, config, tokenizer, SPECS["ppo"])
    rows = rows_from_examples(made, dataclasses.replace(config, max_bad_rows=1), tokenizer, SPECS["ppo"])
    assert rows.parts[0].store.numbers()[rows.parts[0].selected].tolist() == [0, 1, 2, 4]
    assert "4 rows, 1 bad rows left out: by hand, row 3" in rows.report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "2,4"}, "data.split"),
        ({"sources": ()}, "data.sources is empty"),
        ({"held_out": 1.0}, "data.held_out"),
        ({"max_prompt_length": 512}, r"data.max_length \(512\) must be larger than data.max_prompt_length \(512\)"),
        ({"max_bad_rows": -1}, "data.max_bad_rows"),
        ({"split_seed": -1}, "data.split_seed"),
        ({"temperature": 0.0}, "data.temperature"),
    ],
)
def test_an_impossible_configuration_is_rejected_on_construction(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config_of("x.jsonl"), **change)


@pytest.mark.parametrize("change", [{"limit": -1}, {"weight": -1.0}, {"epochs": 0.0}, {"max_rows": -1}])
def test_an_impossible_source_is_rejected_on_construction(change):
    with pytest.raises(ValueError, match=f"data.sources.{next(iter(change))}"):
        SourceConfig("x.jsonl", **change)


@needs_real_data
def test_every_row_of_hh_rlhf_is_an_example_and_its_pairs_reproduce_the_file():
    folder = REAL / "hh-rlhf-harmless"
    config = config_of(folder / "train.jsonl", "0,1,0", format="transcript", eval_path=str(folder / "test.jsonl"))
    trained, evaluated = (examples(config, "reward", held_out) for held_out in (False, True))
    assert (len(trained), len(evaluated)) == (1747, 252)
    assert not prompts(trained) & prompts(evaluated)
    for example in trained + evaluated:
        roles = [role for role, _ in example.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert not any("\n\nAssistant:" in content for _, content in example.turns)
    rows = rows_for(dataclasses.replace(config, max_prompt_length=4000, max_length=8000), "reward", held_out=True)
    assert rows.report == "250 rows, 2 dropped: empty answer"
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").split("\n") if line]
    (part,) = rows.parts
    for row in (0, 100, 249):
        (document,) = part.documents(row)
        for sequence, field in zip(document, ("chosen", "rejected"), strict=True):
            text = TOKENIZER.decode(sequence.tokens).replace("</s>", "")
            assert text.split() == lines[part.store.numbers()[row] - 1][field].split()


@needs_real_data
def test_every_instruction_of_alpaca_eval_is_assigned_to_a_stage():
    folder = REAL / "alpaca-eval-preferences"
    config = config_of(folder / "train.jsonl", "2,4,4", eval_path=str(folder / "test.jsonl"))
    trained = [examples(config, stage) for stage in STAGES]
    assert sum(map(len, trained)) == 13_823
    assert len(examples(config, "ppo", held_out=True)) == 1_369
    assert sum(len(prompts(found)) for found in trained) == 636  # instructions, none in two stages
    by_stage = Counter(len(prompts(found)) for found in trained)
    assert sum(by_stage) == 636 and np.array(list(by_stage)).min() > 60
