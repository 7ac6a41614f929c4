"""Known data sets: a row in the schema of each set gives exactly these examples, and user settings take precedence.

Rows have all fields of the set, as named in its public description or its readers; the texts are made up. Only hh-rlhf
and gsm8k were available for inspection. Where the description does not specify the text (yitingxie, pvduy), the
row has the form that DeepSpeed-Chat's reader expects, and known_sets.toml says so.
"""

import dataclasses
import tomllib
from importlib import resources
from typing import NamedTuple

import pytest

from rlhf_jax.data import mapping as module
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.mapping import known_sets, make_mapper, provides, resolve_format
from rlhf_jax.data.records import KINDS, BadRow, Example, Row


def fill(answer: str) -> tuple[str, str, str]:
    return (answer, "", "")


def pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    return (chosen, chosen, rejected)


class Case(NamedTuple):
    row: dict
    question: str | tuple  # the text of the only turn, or all turns
    sft: list  # (answer, chosen, rejected) of each example
    reward: list
    ppo: list


def same(row: dict, question: str | tuple, texts: tuple, reward: bool) -> Case:
    """A case whose stages all get the same example; `reward`: whether the reward stage gets it too."""
    return Case(row, question, [texts], [texts] * reward, [texts])


def passages(*texts: str) -> list[dict]:
    return [{"docid": f"{i}#0", "text": text, "title": "t"} for i, text in enumerate(texts)]


def mkqa_answer(text: str | None) -> list[dict]:
    return [{"type": 0, "entity": "Q545186", "text": text, "aliases": []}]


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
HH_TURNS = (("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"))
DAHOAS = same(
    {"prompt": HH, "response": " So.", "chosen": " So.", "rejected": " No."}, HH_TURNS, pair("So.", "No."), True
)
MIRACL = {
    "query_id": "3#0",
    "query": "谁?",
    "positive_passages": passages("好", "也好"),
    "negative_passages": passages("不好"),
}
MKQA = {
    "example_id": "563260143484355911",
    "query": "who?",
    "queries": {"en": "who?", "zh_cn": "是谁?", "ja": "誰?"},
    "answers": {"en": mkqa_answer("Dave"), "zh_cn": mkqa_answer("戴夫"), "ja": mkqa_answer("デイヴ")},
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "x", "full_text": "Why is the sky (on Earth) blue?"},
    "quotes_0": {"title": ["t"], "extract": ["e"]},
    "answer_0": "Light [1].",
    "tokens_0": {"prefix": [1], "completion": [2]},
    "score_0": -0.5,
    "quotes_1": {"title": ["t"], "extract": ["e"]},
    "answer_1": "Air scatters blue light (Rayleigh scattering) [1, 2][3]. Red goes through [1].",
    "tokens_1": {"prefix": [1], "completion": [2]},
    "score_1": 0.5,
}
SCATTERS = "Air scatters blue light (Rayleigh scattering). Red goes through."
SHP = {
    "post_id": "p",
    "domain": "askphysics_train",
    "upvote_ratio": 0.9,
    "history": "Why is it so?",
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "created_at_utc_A": 1,
    "created_at_utc_B": 2,
    "score_A": 5,
    "score_B": 12,
    "human_ref_A": "Dunno.",
    "human_ref_B": "Because.",
    "labels": 0,
    "seconds_difference": 1.0,
    "score_ratio": 2.4,
}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
WHY = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
CASES = {
    "Dahoas/rm-static": DAHOAS,
    "Dahoas/full-hh-rlhf": DAHOAS,
    "Dahoas/synthetic-instruct-gptj-pairwise": same(
        {"prompt": "Why?", "chosen": "So.\n", "rejected": "No."}, "Why?", pair("So.", "No."), True
    ),
    "yitingxie/rlhf-reward-datasets": same(
        {"prompt": "\n\nHuman: Why?\n\n", "chosen": "Assistant: So.", "rejected": "Assistant: No."},
        "Why?",
        pair("So.", "No."),
        True,
    ),
    "openai/webgpt_comparisons": Case(
        WEBGPT, "Why is the sky (on Earth) blue?", [fill(SCATTERS)], [pair(SCATTERS, "Light.")], [fill(SCATTERS)]
    ),
    "stanfordnlp/SHP": Case(SHP, "Why is it so?", [fill("Because.")], [pair("Because.", "Dunno.")], [fill("Because.")]),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": same(
        {"prompt": "USER: Hi ASSISTANT: Hello USER: Why? ASSISTANT:", "label": "So."}, HH_TURNS, fill("So."), False
    ),
    "wangrui6/Zhihu-KOL": same(
        {"INSTRUCTION": "为什么?", "RESPONSE": "因为。\n", "SOURCE": "Zhihu", "METADATA": "{}"},
        "为什么?",
        fill("因为。"),
        False,
    ),
    "Cohere/miracl-zh-queries-22-12": same(MIRACL, "谁?", pair("好", "不好"), True),
    "Cohere/miracl-ja-queries-22-12": same(MIRACL, "谁?", pair("好", "不好"), True),
    "Hello-SimpleAI/HC3-Chinese": same(
        {"id": "0", "question": "为什么?", "human_answers": ["因为。", "不知道。"], "chatgpt_answers": ["我是……"]},
        "为什么?",
        fill("因为。"),
        False,
    ),
    "apple/mkqa": same(MKQA, "who?", fill("Dave"), False),
    "mkqa": same(MKQA, "who?", fill("Dave"), False),
    "mkqa-Chinese": same(MKQA, "是谁?", fill("戴夫"), False),
    "mkqa-Japanese": same(MKQA, "誰?", fill("デイヴ"), False),
    "lmqg/qg_jaquad": same(
        {
            "answer": "七",
            "paragraph_question": "question: いくつ?, context: 羊は七匹。",
            "question": "いくつ?",
            "sentence": "羊は七匹。",
            "paragraph": "羊は七匹。犬は一匹。",
            "sentence_answer": "羊は<hl> 七 <hl>匹。",
            "paragraph_answer": "羊は<hl> 七 <hl>匹。犬は一匹。",
            "paragraph_sentence": "<hl> 羊は七匹。 <hl>犬は一匹。",
        },
        "いくつ?",
        fill("羊は七匹。"),
        False,
    ),
    "lmqg/qag_jaquad": same(
        {
            "answers": ["七", "一"],
            "questions": ["羊は?", "犬は?"],
            "paragraph": "羊は七匹。犬は一匹。",
            "paragraph_id": "x",
            "questions_answers": "question: 羊は?, answer: 七 | question: 犬は?, answer: 一",
        },
        "羊は?",
        fill("羊は七匹。犬は一匹。"),
        False,
    ),
    "Anthropic/hh-rlhf": same({"chosen": HH + " So.", "rejected": HH + " No."}, HH_TURNS, pair("So.", "No."), True),
    "timdettmers/openassistant-guanaco": same(
        {"text": "### Human: Hi### Assistant: Hello### Human: Why?### Assistant: So."}, HH_TURNS, fill("So."), False
    ),
    "tatsu-lab/alpaca": same(
        {"instruction": "Add.", "input": "3, 4", "output": "7", "text": "Below is an instruction ..."},
        "Add.\n\n3, 4",
        fill("7"),
        False,
    ),
    "HuggingFaceH4/ultrafeedback_binarized": same(
        {
            "prompt": "Hi",
            "prompt_id": "0",
            "chosen": CHAT,
            "rejected": [CHAT[0], {"role": "assistant", "content": "Go away"}],
            "messages": CHAT,
            "score_chosen": 8.0,
            "score_rejected": 1.0,
        },
        "Hi",
        pair("Hello", "Go away"),
        True,
    ),
    "HuggingFaceH4/ultrachat_200k": same(
        {"prompt": "Hi", "prompt_id": "0", "messages": CHAT + WHY}, HH_TURNS, fill("So."), False
    ),
    "openai/gsm8k": same(
        {"question": "How much is 3 + 4?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
        "How much is 3 + 4?",
        fill("3+4=<<3+4=7>>7\n#### 7"),
        False,
    ),
    "allenai/tulu-3-sft-mixture": same(
        {"id": "oasst1_1", "messages": CHAT + WHY, "source": "ai2-adapt-dev/oasst1_converted"},
        HH_TURNS,
        fill("So."),
        False,
    ),
}


def examples(row: dict, kind: str, path: str) -> list[Example]:
    return make_mapper(resolve_format(SourceConfig(path)), kind)(Row(path, 1, row))


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_a_known_set_gives_each_stage_its_examples(name):
    row, question, *by_stage = CASES[name]
    turns = (("user", question),) if isinstance(question, str) else question
    source = resolve_format(SourceConfig(name))
    for kind, wanted in zip(KINDS, by_stage, strict=True):
        found = [dataclasses.replace(each, scores=()) for each in examples(row, kind, name)]
        assert found == [Example(turns, *texts, source.path, 1) for texts in wanted]
        assert provides(source, kind) == bool(wanted)


def test_every_known_set_has_a_case_here_and_no_redundant_key():
    tables = tomllib.loads(resources.files(module.__package__).joinpath("known_sets.toml").read_text(encoding="utf-8"))
    assert list(CASES) == sorted(tables, key=list(CASES).index) and set(known_sets()) == {n.casefold() for n in CASES}
    for name, table in tables.items():
        default = SourceConfig(name)
        assert not [key for key, value in table.items() if getattr(default, key) == value], name


# Rows that DeepSpeed-Chat skips, and ties, which it does not skip.


def test_a_query_without_a_negative_passage_makes_no_pair_but_trains_the_other_stages():
    row, name = MIRACL | {"negative_passages": []}, "Cohere/miracl-ja-queries-22-12"
    assert [len(examples(row, kind, name)) for kind in KINDS] == [1, 0, 1]
    assert examples(row, "demonstration", name)[0].answer == "好"


@pytest.mark.parametrize(
    ("name", "lack"),
    [
        ("mkqa-Chinese", {"answers": {"zh_cn": mkqa_answer(None)}}),
        ("mkqa-Chinese", {"answers": {"zh_cn": []}}),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": []}),
        ("wangrui6/Zhihu-KOL", {"RESPONSE": None}),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"label": None}),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"label": ""}),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": ""}),
    ],
)
def test_sft_skips_rows_without_an_answer_in_sets_that_have_such_rows(name, lack):
    assert examples(CASES[name].row | lack, "demonstration", name) == []


def test_a_missing_field_of_a_known_set_is_an_error():
    with pytest.raises(BadRow, match="row 1: no field 'RESPONSE'; the fields are INSTRUCTION"):
        examples({"INSTRUCTION": "为什么?"}, "demonstration", "wangrui6/Zhihu-KOL")


def test_equal_scores_make_no_pair_and_sft_uses_the_first_answer():
    # DeepSpeed-Chat takes answer_0 as the better one; for the authors of the scores a tie means that neither is better.
    row = WEBGPT | {"score_0": 0.0, "score_1": 0.0}
    assert [len(examples(row, kind, "openai/webgpt_comparisons")) for kind in KINDS] == [1, 0, 1]
    assert examples(row, "demonstration", "openai/webgpt_comparisons")[0].answer == "Light."


def test_the_second_answer_of_shp_is_chosen_if_its_score_is_higher():
    (given_back,) = examples(SHP | {"score_A": 30, "labels": 1}, "pair", "stanfordnlp/SHP")
    assert (given_back.chosen, given_back.rejected) == ("Dunno.", "Because.")
    assert given_back.scores == (30, 12)


def test_the_local_file_format_of_deepspeed_chat_is_read_with_the_defaults():
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    wanted = [Example((("user", "Why?"),), "So.", "So.", "No.", "data/train.json", 1)]
    assert [examples(row, kind, "data/train.json") for kind in KINDS] == [wanted] * 3


# Recognition of known sets, and keys set by the user.

SPLITS = {
    "Dahoas/rm-static": ("", "train", "test"),
    "stanfordnlp/SHP": ("", "train", "validation"),
    "Cohere/miracl-zh-queries-22-12": ("", "train", "dev"),
    "wangrui6/Zhihu-KOL": ("", "train", ""),
    "openai/gsm8k": ("main", "train", "test"),
    "HuggingFaceH4/ultrafeedback_binarized": ("", "train_prefs", "test_prefs"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_known_set_has_its_own_splits(name):
    source = resolve_format(SourceConfig(name))
    assert (source.name, source.split, source.eval_split) == SPLITS[name]


def test_the_name_of_a_known_set_matches_in_either_case_and_below_a_folder(tmp_path):
    assert resolve_format(SourceConfig("STANFORDNLP/shp")) == resolve_format(SourceConfig("stanfordnlp/SHP"))
    copy = resolve_format(SourceConfig("/data/stanfordnlp/SHP/"))
    assert (copy.path, copy.format, copy.eval_split) == ("/data/stanfordnlp/SHP/", "ranking", "validation")
    assert resolve_format(SourceConfig("notstanfordnlp/SHP")).format == "fields"
    assert resolve_format(SourceConfig("stanfordnlp/SHP2")).format == "fields"


def test_a_local_copy_has_the_splits_of_the_set_only_if_saved_with_them(tmp_path):
    copy = tmp_path / "HuggingFaceH4" / "ultrachat_200k"
    copy.mkdir(parents=True)
    files = resolve_format(SourceConfig(str(copy)))
    assert (files.path, files.format, files.split, files.eval_split) == (str(copy), "messages", "train", "")
    (copy / "dataset_dict.json").write_text('{"splits": ["train_sft", "test_sft"]}')
    saved = resolve_format(SourceConfig(str(copy)))
    assert (saved.path, saved.format, saved.split, saved.eval_split) == (
        str(copy),
        "messages",
        "train_sft",
        "test_sft",
    )


def test_a_deepspeed_chat_name_is_replaced_by_the_hub_name_unless_a_local_folder_has_it(tmp_path, monkeypatch):
    assert (
        resolve_format(SourceConfig("mkqa-japanese")).path == resolve_format(SourceConfig("mkqa")).path == "apple/mkqa"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mkqa-Japanese").mkdir()
    here = resolve_format(SourceConfig("mkqa-Japanese"))
    assert (here.path, here.prompt) == ("mkqa-Japanese", "queries.ja")


def test_user_settings_override_the_known_mapping():
    source = SourceConfig(
        "apple/mkqa", prompt="queries.ko", answer="answers.ko.0.text", split="train[:10%]", weight=2.0
    )
    full = resolve_format(source)
    assert (full.prompt, full.answer, full.split, full.weight) == (
        "queries.ko",
        "answers.ko.0.text",
        "train[:10%]",
        2.0,
    )
    assert (full.chosen, full.rejected, full.sparse, full.format) == ("", "", True, "fields")
    assert (
        resolve_format(SourceConfig("stanfordnlp/SHP", chosen="", scores=("labels", "labels"))).scores
        == ("labels",) * 2
    )


def test_a_configured_format_disables_the_known_mapping():
    source = SourceConfig("Dahoas/rm-static", format="fields")
    assert resolve_format(source) == source
    assert resolve_format(SourceConfig("Dahoas/rm-static", eval_path="held.jsonl")).eval_split == ""


def test_resolving_twice_equals_resolving_once():
    for name in [*CASES, "mine.jsonl"]:
        assert resolve_format(resolve_format(SourceConfig(name))) == resolve_format(SourceConfig(name))
