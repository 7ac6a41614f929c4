"""Mapping of rows of every format to examples, with the same turns for every stage; errors name row and field."""

import dataclasses
import itertools
import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.config import dump_config, parse_config
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.dialogues import parse_transcript
from rlhf_jax.data.mapping import make_mapper, provides, resolve_format
from rlhf_jax.data.records import KINDS, BadRow, Example, Row, Turn

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")
ASKED = (("user", "q"),)


def examples(fields, kind="demonstration", **source) -> list[Example]:
    """The examples of the row, as row 7 of rows.jsonl; `form` is the key `format`."""
    source["format"] = source.pop("form", "")
    return make_mapper(resolve_format(SourceConfig("rows.jsonl", **source)), kind)(Row("rows.jsonl", 7, fields))


def example(turns, answer="", chosen="", rejected="", text="") -> Example:
    return Example(turns, answer, chosen, rejected, "rows.jsonl", 7, text)


def user_and_assistant(*texts: str) -> list[dict]:
    """Messages that alternate between user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def turns(*texts: str) -> tuple:
    return tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


# Fields.


def test_fields_are_found_by_their_configured_names():
    row = {"question": " How many? ", "answer": "\n7 ", "other": 1}
    assert examples(row, prompt="question", answer="answer") == [example((("user", "How many?"),), "7")]


def test_dotted_names_reach_nested_fields_and_a_field_whose_name_has_a_dot_takes_precedence():
    row = {"q": {"text": "q", "by": ["x", "y"]}, "a": [{"zh": "0"}, {"zh": "1"}], "a.b": "dotted"}
    names = {"prompt": "q.text", "answer": "a.1.zh", "chosen": "a.b", "rejected": "q.by.0"}
    assert examples(row, "pair", **names) == [example(ASKED, "1", "dotted", "x")]


def test_sft_uses_the_chosen_answer_when_no_answer_field_is_named():
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert [examples(row, kind) for kind in KINDS] == [[example(ASKED, "good", "good", "bad")]] * 3


def test_ppo_needs_prompts_only():
    assert examples({"prompt": "q"}, "prompt") == [example(ASKED)]
    assert examples({"prompt": "q", "chosen": 3, "rejected": "\ud83d"}, "prompt") == [example(ASKED)]


def test_only_the_reward_stage_rejects_a_pair_without_a_rejected_answer():
    assert examples({"prompt": "q", "chosen": "a"}, "demonstration") == [example(ASKED, "a", "a")]
    with pytest.raises(BadRow, match="row 7: no field 'rejected'; the fields are prompt, chosen"):
        examples({"prompt": "q", "chosen": "a"}, "pair")


@pytest.mark.parametrize(
    "reply", [lambda text: user_and_assistant("q", text)[1:], lambda text: user_and_assistant("q", text)]
)
def test_prompts_and_answers_can_be_lists_of_messages_or_whole_dialogues(reply):
    row = {"prompt": user_and_assistant("q"), "chosen": reply(" good "), "rejected": reply("bad")}
    assert [examples(row, kind) for kind in KINDS] == [[example(ASKED, " good ", " good ", "bad")]] * 3
    assert examples(row | {"prompt": "q"}, "pair") == [example(ASKED, " good ", " good ", "bad")]


def test_dialogues_that_share_a_prompt_need_no_prompt_field():
    row = {"chosen": user_and_assistant("a", "b", "c", "good"), "rejected": user_and_assistant("a", "b", "c ", "bad")}
    assert [examples(row, kind) for kind in KINDS] == [[example(turns("a", "b", "c"), "good", "good", "bad")]] * 3


def test_a_prompt_in_a_nested_field_is_compared_with_the_dialogues_too():
    row = {
        "q": {"text": "other"},
        "chosen": user_and_assistant("q", "good"),
        "rejected": user_and_assistant("q", "bad"),
    }
    with pytest.raises(BadRow, match="field 'chosen' is a dialogue that does not begin with the prompt"):
        examples(row, "demonstration", prompt="q.text")


def test_the_system_text_of_a_dialogue_is_kept_in_every_stage():
    system = {"role": "system", "content": "Be kind."}
    row = {
        "prompt": "q",
        "chosen": [system, *user_and_assistant("q", "good")],
        "rejected": user_and_assistant("q", "bad"),
    }
    wanted = [example((("system", "Be kind."), *ASKED), "good", "good", "bad")]
    assert [examples(row, kind) for kind in KINDS] == [wanted] * 3


def test_a_pair_of_dialogues_with_different_prompts_is_rejected_by_stages_that_need_pairs():
    row = {"prompt": "q", "chosen": user_and_assistant("q", "good"), "rejected": user_and_assistant("other", "bad")}
    assert examples(row, "demonstration") == [example(ASKED, "good", "good")]
    with pytest.raises(BadRow, match="row 7: field 'rejected' is a dialogue that does not begin with the prompt"):
        examples(row, "pair")


def test_ppo_accepts_a_list_of_messages_without_an_answer():
    source = {"prompt": "messages", "chosen": "", "rejected": ""}
    assert [provides(resolve_format(SourceConfig("x", **source)), kind) for kind in KINDS] == [False, False, True]
    assert examples({"messages": user_and_assistant("a", "b", "c")}, "prompt", **source) == [
        example(turns("a", "b", "c"))
    ]
    with pytest.raises(BadRow, match="row 7: field 'messages' must end with a turn of the user"):
        examples({"messages": user_and_assistant("a", "b")}, "prompt", **source)


def test_a_system_field_becomes_the_first_turn_unless_it_is_empty():
    row = {"system_prompt": " Be kind. ", "prompt": "q", "chosen": "a"}
    assert examples(row, system="system_prompt")[0].turns == (("system", "Be kind."), *ASKED)
    assert examples(row | {"system_prompt": ""}, system="system_prompt")[0].turns == ASKED
    assert examples(row | {"system_prompt": None}, system="system_prompt")[0].turns == ASKED
    with pytest.raises(BadRow, match="no field 'system'; the fields are system_prompt, prompt, chosen"):
        examples(row, system="system")


def test_a_regular_expression_is_removed_from_answers_only():
    row = {"prompt": "Is [1] so?", "chosen": "Yes [1], it is [2, 3].", "rejected": "No [x]"}
    (given_back,) = examples(row, "pair", strip=r" ?\[\d+(?:, ?\d+)*\]")
    assert given_back == example((("user", "Is [1] so?"),), "Yes, it is.", "Yes, it is.", "No [x]")


@pytest.mark.parametrize("lack", [{"a": None}, {"a": []}, {"a": [{"text": None}]}, {"a": [{"text": ""}]}])
def test_a_sparse_source_skips_rows_without_the_fields_of_the_stage(lack):
    source = {"answer": "a.0.text", "chosen": "", "rejected": ""}
    row = {"prompt": "q"} | lack
    assert examples(row, "demonstration", sparse=True, **source) == []
    assert examples(row, "prompt", sparse=True, **source) == [example(ASKED)]
    if lack != {
        "a": [{"text": ""}]
    }:  # an empty answer is not a bad row: it is dropped, and counted, when rows are tokenized
        with pytest.raises(
            BadRow,
            match=r"field 'a\.0\.text' must be text or a list of messages, not NoneType; data.sources.sparse = true",
        ):
            examples(row, "demonstration", **source)


def test_a_sparse_source_also_rejects_a_field_that_no_row_has():
    with pytest.raises(BadRow, match="no field 'chosen'"):
        examples({"prompt": "q", "good": "a"}, sparse=True)


MISTAKES = {
    "no field": (
        {"prompt": "q", "good": "a"},
        "no field 'chosen'; the fields are prompt, good. Name the right ones in ",
    ),
    "no fields": ({}, "no field 'chosen'; the fields are none. Name the right ones in data.sources (prompt, answer, "),
    "null": ({"prompt": None, "chosen": "a"}, "field 'prompt' must be text or a list of messages, not NoneType"),
    "a number": ({"prompt": "q", "chosen": 1}, "field 'chosen' must be text or a list of messages, not int"),
    "a list of texts": (
        {"prompt": "q", "chosen": ["a"]},
        "field 'chosen' has an invalid message 1: it must be an",
    ),
    "a lone surrogate": ({"prompt": "\ud83d", "chosen": "a"}, "field 'prompt' holds a lone surrogate"),
    "a lone surrogate within": (
        {"prompt": user_and_assistant("\ud83d"), "chosen": "a"},
        "message 1: its content holds",
    ),
}


@pytest.mark.parametrize(("row", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_row_is_reported_with_its_position(row, message):
    with pytest.raises(BadRow, match="^rows.jsonl, row 7: .*" + re.escape(message)):
        examples(row)


def test_a_row_already_marked_bad_keeps_its_message():
    bad = BadRow("rows.jsonl, row 7: malformed JSON")
    for form in ("fields", "transcript", "messages", "sharegpt", "alpaca", "ranking", "text"):
        with pytest.raises(BadRow) as raised:
            examples(bad, form=form)
        assert raised.value is bad


# Transcripts.


def test_a_transcript_is_split_before_its_last_assistant_turn():
    before = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": before + " yes: Human: d", "rejected": before + " no"}
    wanted = [example(turns("a", "b", "c"), "yes: Human: d", "yes: Human: d", "no")]
    assert [examples(row, kind, form="transcript") for kind in KINDS] == [wanted] * 3


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("\n\nHuman: q\n\nAssistant:", " "),
        ("Human: q", "\n\nAssistant: "),
        ("Human: q\n", "Assistant:"),
        (" ", "Human: q\n\nAssistant:"),
    ],
)
def test_a_transcript_can_start_in_the_prompt_field(prompt, opening):
    row = {"prompt": prompt, "chosen": f"{opening}yes", "rejected": f"{opening}no"}
    assert examples(row, "pair", form="transcript") == [example(ASKED, "yes", "yes", "no")]


def test_a_sparse_source_of_transcripts_needs_no_prompt_field_but_skips_an_empty_one():
    row = {"chosen": "Human: q\n\nAssistant: a"}
    assert examples(row, form="transcript", sparse=True) == [example(ASKED, "a", "a")]
    assert examples(row | {"prompt": ""}, form="transcript") == [example(ASKED, "a", "a")]
    assert examples(row | {"prompt": ""}, form="transcript", sparse=True) == []


def test_consecutive_turns_of_one_speaker_are_joined():
    text = "Human: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:\n\nAssistant: d\n\nHuman: never answered"
    assert parse_transcript(text, "") == ((("user", "a\n\nb"),), "c\n\nd")


@pytest.mark.parametrize(
    ("speakers", "text"),
    [
        (("USER:", "ASSISTANT:"), "USER: q ASSISTANT: SUPERUSER: a"),
        (("\n\nQuestion:", "\n\nAnswer:"), "\nQuestion: q\n\nAnswer: SUPERUSER: a"),
        (("### Human:", "### Assistant:"), "### Human: q### Assistant: SUPERUSER: a"),
        (("\nA:", "\nB:"), "A: q\nB: SUPERUSER: a"),
    ],
)
def test_speaker_names_are_configurable(speakers, text):
    assert parse_transcript(text, "", speakers) == (ASKED, "SUPERUSER: a")


def test_text_before_the_first_speaker_is_rejected_unless_a_system_speaker_is_configured():
    text = "Be kind. USER: q ASSISTANT: a"
    with pytest.raises(BadRow, match="here: no transcript.*it does not begin with a speaker"):
        parse_transcript(text, "here", ("USER:", "ASSISTANT:"))
    kept = (("system", "Be kind."), *ASKED)
    assert parse_transcript(text, "", ("USER:", "ASSISTANT:", "")) == (kept, "a")
    assert parse_transcript(f"SYSTEM: {text}", "", ("USER:", "ASSISTANT:", "SYSTEM:")) == (kept, "a")


WORDS = st.lists(st.text("ab .:\n", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=8)
EVEN = WORDS.filter(lambda words: len(words) % 2 == 0)


@given(EVEN)
def test_transcripts_of_any_length_round_trip(words):
    text = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {word}" for i, word in enumerate(words))
    assert parse_transcript(text, "") == (turns(*words[:-1]), words[-1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "\n\nHuman: a",
        "\n\nAssistant: a",
        "Rules.\n\nHuman: a\n\nAssistant: b",
        "Assistant: a\n\nHuman: b\n\nAssistant: c",
    ],
)
def test_text_that_is_not_a_transcript_is_rejected_with_its_row(text):
    with pytest.raises(BadRow, match=r"row 7: field 'chosen': no transcript: a turn 'Human: \.\.\.' must come first"):
        examples({"chosen": text}, form="transcript")


def test_a_pair_of_transcripts_with_different_prompts_is_rejected_by_stages_that_need_pairs():
    row = {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: b"}
    assert examples(row, "demonstration", form="transcript") == [example(turns("a"), "b", "b")]
    with pytest.raises(BadRow, match="row 7: chosen and rejected answer different prompts"):
        examples(row, "pair", form="transcript")


# Messages and ShareGPT.

GPT = {"user": "human", "assistant": "gpt", "system": "system"}


@given(WORDS, st.booleans())
def test_messages_and_sharegpt_of_any_length_round_trip(words, system):
    messages = [{"role": "system", "content": "Be kind."}] * system + user_and_assistant(*words)
    answered = len(words) // 2 * 2  # a user turn after the last answer is dropped
    wanted = [example(((("system", "Be kind."),) * system) + turns(*words[: answered - 1]), words[answered - 1])]
    conversations = [{"from": GPT[message["role"]], "value": message["content"]} for message in messages]
    for kind in ("demonstration", "prompt"):
        assert examples({"messages": messages, "id": 3}, kind, form="messages") == wanted
        assert examples({"conversations": conversations}, kind, form="sharegpt") == wanted
        assert examples({"conversations": messages}, kind, form="sharegpt") == wanted
        assert examples({"c": {"list": messages}}, kind, form="messages", field="c.list") == wanted


def test_common_role_names_are_recognised():
    row = {"messages": [{"role": "developer", "content": "s"}, {"role": "User", "content": "q"}]}
    for name in ("assistant", "gpt", "chatgpt", "bing", "bard"):
        row["conversations"] = [*row["messages"], {"from": name, "value": "a"}]
        assert examples(row, form="sharegpt") == [example((("system", "s"), *ASKED), "a")]


def test_consecutive_messages_of_one_speaker_are_joined():
    (a, c), (b, d), (_, empty) = user_and_assistant("a", "c"), user_and_assistant("b", "d"), user_and_assistant("", "")
    messages = [a, b, c, empty, d]
    assert examples({"messages": messages}, form="messages") == [example((("user", "a\n\nb"),), "c\n\nd")]


def test_text_parts_are_joined_without_a_separator():
    parts = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "so?"}]
    row = {"messages": [{"role": "user", "content": parts}, *user_and_assistant("", "a")[1:]]}
    assert examples(row, form="messages") == [example((("user", "Is it so?"),), "a")]


def test_a_sharegpt_row_can_have_its_system_text_in_a_separate_field():
    row = {"system": "Be kind.", "conversations": user_and_assistant("q", "a")}
    assert examples(row, form="sharegpt") == [example((("system", "Be kind."), *ASKED), "a")]
    assert examples(row | {"system": None}, form="sharegpt") == [example(ASKED, "a")]


def test_ppo_accepts_messages_without_an_answer():
    assert examples({"messages": user_and_assistant("q")}, "prompt", form="messages") == [example(ASKED)]
    with pytest.raises(BadRow, match="row 7: field 'messages' has no assistant turn that answers a user turn"):
        examples({"messages": user_and_assistant("q")}, "demonstration", form="messages")


ASK, TOOL = {"role": "user", "content": "q"}, {"role": "tool", "content": "21 C"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
UNFIT = {
    "a tool last": ([ASK, CALL, TOOL], "has no assistant turn that answers a user turn"),
    "a weight between": ([ASK, CALL | {"weight": 0.5}], "message 2: its weight must be 0 or 1"),
    "a narrator": ([ASK, {"role": "narrator", "content": "x"}], "its role 'narrator' is none of"),
    "a call that is text": (
        [ASK, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "x"}}],
        "it must call functions as {",
    ),
    "a call without a name": ([ASK, {"from": "function_call", "value": '{"arguments": {}}'}], "it must call functions"),
    "a call of a list": (
        [ASK, {"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}],
        "it must call functions",
    ),
    "both calls": (
        [ASK, {"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [{"function": {"name": "g"}}]}],
        "it has both function_call and tool_calls",
    ),
    "null": ([ASK, {"role": "assistant", "content": None}], "its content must be text, not NoneType"),
    "an image": (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "a part of its content is of type 'image_url'",
    ),
    "no content": ([{"role": "user", "text": "q"}], "it needs role and content, or from and value, but has role, text"),
    "no message": (["q"], "message 1: it must be an object, not str"),
    "no list": ("q", "must be a list of messages, not str"),
    "nothing": ([], "has no assistant turn that answers"),
    "assistant first": (
        user_and_assistant("q", "a")[1:] + user_and_assistant("q", "a"),
        "the assistant speaks first; a user turn must come before",
    ),
    "system after user": (
        [*user_and_assistant("q", "a"), {"role": "system", "content": "s"}],
        "a system turn comes after other turns",
    ),
}


@pytest.mark.parametrize(("messages", "message"), UNFIT.values(), ids=UNFIT)
def test_messages_that_no_template_can_render_are_rejected(messages, message):
    with pytest.raises(BadRow, match="^rows.jsonl, row 7: field 'messages' (?:.* )?" + re.escape(message)):
        examples({"messages": messages}, form="messages")


def test_messages_keep_their_whitespace_and_what_a_template_reads_besides_content():
    thought = {"role": "assistant", "content": "    return 7\n", "reasoning_content": "I add.", "weight": 1}
    messages = [{"role": "user", "content": "Complete:\n"}, CALL | {"train": False}, TOOL, TOOL, thought]
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        (found,) = examples({"messages": messages, "tools": tools}, form="messages")
        call = Turn("assistant", "", {"tool_calls": CALL["tool_calls"]}, is_learned=False)
        assert found.turns == (("user", "Complete:\n"), call, ("tool", "21 C"), ("tool", "21 C"))
        assert (found.answer, found.extra, found.is_learned) == (
            "    return 7\n",
            {"reasoning_content": "I add."},
            True,
        )
        assert found.tools == ({"name": "f"},)
    with pytest.raises(BadRow, match="field 'tools' must be a list of objects, or JSON text of one"):
        examples({"messages": messages, "tools": "f"}, form="messages")
    (pair,) = examples({"prompt": "Complete:\n", "chosen": [thought], "rejected": "b"}, "pair")
    assert pair.chosen == (Turn("assistant", "    return 7\n", {"reasoning_content": "I add."}),)
    assert (pair.rejected, pair.turns) == ("b", (("user", "Complete:"),))


def test_calls_of_functions_in_the_formats_before_tool_calls_are_the_same_dialogue():
    called, found = Turn("assistant", "", {"tool_calls": [call("f", {"city": "Oslo"})]}), ("tool", "21 C")
    arguments, function = '{"city": "Oslo"}', {"name": "f", "parameters": {"type": "object"}}
    tools = ({"type": "function", "function": function},)
    openai = [ASK, {"role": "assistant", "function_call": {"name": "f", "arguments": arguments}}]
    openai += [{"role": "function", "name": "f", "content": "21 C"}, {"role": "assistant", "content": "Warm."}]
    (old,) = examples({"messages": openai, "functions": [function]}, form="messages")
    assert old.turns == (("user", "q"), called, Turn("tool", "21 C", {"name": "f"})) and old.tools == tools
    for value in (f'{{"name": "f", "arguments": {arguments}}}', json.dumps({"name": "f", "arguments": arguments})):
        said = [("human", "q"), ("function_call", value), ("observation", "21 C"), ("gpt", "Warm.")]
        rows = {"conversations": [{"from": role, "value": text} for role, text in said]}
        for listed in ([function], json.dumps([function]), list(tools), json.dumps(tools)):
            (row,) = examples(rows | {"tools": listed}, form="sharegpt")
            assert (row.turns, row.answer, row.tools) == ((("user", "q"), called, found), "Warm.", tools)
    thought = '<think>Two.</think>\n[{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g"}]'
    rows = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": thought}]}
    (row,) = examples(rows | {"tools": ""}, form="sharegpt")
    calls = [call("f", {"city": "Oslo"}), call("g", {})]
    assert (row.answer, row.extra, row.tools) == ("<think>Two.</think>", {"tool_calls": calls}, ())


def call(name: str, arguments: dict) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


PARTED = [
    # The dialogues, the prompt, and how they go on.
    (("q", "a", "r", "b"), ("q", "c", "r", "d"), ("q",), ("a", "r", "b"), ("c", "r", "d")),
    (("q", "a", "r", "b"), ("q", "a", "s", "d"), ("q",), ("a", "r", "b"), ("a", "s", "d")),
    (("q", "a", "r", "b", "s", "c"), ("q", "a", "r", "d"), ("q", "a", "r"), ("b", "s", "c"), "d"),
    (("q", "a", "r", "b"), ("q", "a", "r", "d"), ("q", "a", "r"), "b", "d"),
]


def go_on(reply):
    """A reply as the reader has it."""
    roles = ("assistant", "user")
    return reply if isinstance(reply, str) else tuple((roles[i % 2], text) for i, text in enumerate(reply))


@pytest.mark.parametrize("chosen, rejected, prompt, better, worse", PARTED)
def test_a_pair_that_parts_before_its_last_turn_goes_on_from_there_whatever_the_stage(
    chosen, rejected, prompt, better, worse
):
    expected = [example(turns(*prompt), go_on(better), go_on(better), go_on(worse))]
    row = {"chosen": user_and_assistant(*chosen), "rejected": user_and_assistant(*rejected)}
    speakers = ("\n\nHuman: ", "\n\nAssistant: ")
    text = {
        name: "".join(speakers[i % 2] + said for i, said in enumerate(texts))
        for name, texts in (("chosen", chosen), ("rejected", rejected))
    }
    for kind in KINDS:
        assert examples(row, kind) == expected
        assert examples({"prompt": "q", **row}, kind) == expected
        assert examples(text, kind, form="transcript") == expected


def test_replies_of_several_turns_after_a_prompt_are_a_pair():
    row = {"prompt": "q"} | {name: user_and_assistant("q", name, "r", "b")[1:] for name in ("chosen", "rejected")}
    replies = [go_on((name, "r", "b")) for name in ("chosen", "rejected")]
    assert examples(row, "pair") == [example(ASKED, replies[0], *replies)]
    row["rejected"] = row["rejected"][:2]
    with pytest.raises(BadRow, match="field 'rejected' continues the prompt, and must .* end with the assistant's"):
        examples(row, "pair")


def test_pairs_that_share_no_question_are_rejected():
    row = {"chosen": user_and_assistant("q", "a", "r", "b"), "rejected": user_and_assistant("s", "a", "r", "b")}
    with pytest.raises(BadRow, match="row 7: chosen and rejected answer different prompts: they must share at least"):
        examples(row, "pair")


def test_the_text_of_an_answer_keeps_its_indentation():
    for text, answer in {
        " yes ": "yes",
        "\n\n    return 7\n": "    return 7",
        "\tx": "\tx",
        "  \n a": "a",
        "": "",
    }.items():
        (found,) = examples({"prompt": "q", "chosen": "b", "answer": text}, answer="answer", rejected="")
        assert found.answer == answer


# Alpaca, rankings, documents.


def test_alpaca_appends_the_input_to_the_instruction():
    row = {"instruction": " Add. ", "input": "3 and 4\n", "output": "7", "text": "..."}
    wanted = [example((("user", "Add.\n\n3 and 4"),), "7")]
    assert [examples(row, kind, form="alpaca") for kind in KINDS] == [wanted, [], wanted]
    assert examples(row | {"input": ""}, form="alpaca")[0].turns == (("user", "Add."),)
    del row["input"]
    assert examples(row | {"system": "s"}, form="alpaca")[0].turns == (("system", "s"), ("user", "Add."))
    with pytest.raises(BadRow, match="field 'input' must be text, not int"):
        examples(row | {"input": 3}, form="alpaca")
    with pytest.raises(BadRow, match="no field 'output'; the fields are instruction. Name .*format = 'fields'"):
        examples({"instruction": "q"}, form="alpaca")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=7), st.booleans())
def test_a_ranking_yields_a_pair_for_every_two_answers_of_different_rank_best_first(scores, lowest_first):
    answers = [f"{i}: {score}" for i, score in enumerate(scores)]
    row = {"prompt": "q", "answers": answers, "scores": scores}
    pairs = examples(row, "pair", form="ranking", scores=("scores",), lowest_first=lowest_first)
    rank = {answer: -score if lowest_first else score for answer, score in zip(answers, scores, strict=True)}
    assert all(rank[pair.chosen] > rank[pair.rejected] and pair.answer == pair.chosen for pair in pairs)
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == len(pairs)
    assert len(pairs) == sum(one != other for one, other in itertools.combinations(scores, 2))
    best_first = [rank[pair.chosen] for pair in pairs]
    assert best_first == sorted(best_first, reverse=True)
    if len(set(scores)) == len(scores):
        assert len(pairs) == len(scores) * (len(scores) - 1) // 2
    best = next(answer for answer in answers if rank[answer] == max(rank.values()))
    for kind in ("demonstration", "prompt"):
        assert examples(row, kind, form="ranking", scores=("scores",), lowest_first=lowest_first) == [
            example(ASKED, best)
        ]


def test_answers_without_scores_are_ordered_best_first():
    pairs = examples({"prompt": "q", "answers": ["a", " b", "c"]}, "pair", form="ranking")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_answers_and_scores_can_be_separate_fields_or_keys_of_list_items():
    fields = {"a": "low", "b": "high", "of_a": "0.25", "of_b": 1}
    own = examples({"prompt": "q"} | fields, "pair", form="ranking", answers=("a", "b"), scores=("of_a", "of_b"))
    items = {"completions": [{"response": "low", "score": 0.25}, {"response": "high", "score": 1.0}]}
    names = {"answers": ("completions.*.response",), "scores": ("completions.*.score",)}
    assert own == examples({"prompt": user_and_assistant("q")} | items, "pair", form="ranking", **names)
    assert own == [dataclasses.replace(example(ASKED, "high", "high", "low"), scores=(1.0, 0.25))]


def test_ppo_uses_the_prompt_of_a_ranking_without_answers():
    assert examples({"prompt": "q"}, "prompt", form="ranking") == [example(ASKED)]


UNRANKED = {
    "no answers": ({"answers": [], "s": []}, "field 'answers' holds no answers"),
    "a text": ({"answers": "a", "s": [1]}, "field 'answers' must be a list, not str"),
    "a number": ({"answers": ["a", 2], "s": [1, 2]}, "field 'answers' has an invalid item 2: must be"),
    "no number": (
        {"answers": ["a", "b"], "s": [1, "N/A"]},
        "field 's' has an invalid item 2: must be a number, not 'N/A'",
    ),
    "too large": ({"answers": ["a", "b"], "s": [1, 10**400]}, "has an invalid item 2: must be a number, not 1000"),
    "a dialogue": (
        {"answers": [user_and_assistant("q", "a")], "s": [1]},
        "item 1: must be an answer alone, not a dialogue",
    ),
    "too few": ({"answers": ["a", "b"], "s": [1]}, "2 answers have 1 scores"),
    "no scores": ({"answers": ["a", "b"]}, "no field 's'; the fields are prompt, answers. Name the right ones"),
}


@pytest.mark.parametrize(("row", "message"), UNRANKED.values(), ids=UNRANKED)
def test_a_mistake_in_a_ranking_is_reported(row, message):
    with pytest.raises(BadRow, match="^rows.jsonl, row 7: .*" + re.escape(message)):
        examples({"prompt": "q"} | row, "pair", form="ranking", scores=("s",))


def test_a_document_is_used_by_sft_only():
    wanted = example((), text="Once upon a time.")
    assert [examples({"text": " Once upon a time.\n"}, kind, form="text") for kind in KINDS] == [[wanted], [], []]
    assert examples({"body": "Once upon a time."}, form="text", field="body") == [wanted]


# Sources.


def test_a_source_serves_the_stages_whose_fields_it_provides():
    of = {form: [provides(resolve_format(SourceConfig("x", format=form)), kind) for kind in KINDS]
          for form in ("fields", "transcript", "messages", "sharegpt", "alpaca", "ranking", "text")}  # fmt: skip
    every, pairless, documents = [True, True, True], [True, False, True], [True, False, False]
    assert of == dict.fromkeys(("fields", "transcript", "ranking"), every) | {"text": documents} | dict.fromkeys(
        ("messages", "sharegpt", "alpaca"), pairless
    )
    assert [provides(resolve_format(SourceConfig("x", answer="a", rejected="")), kind) for kind in KINDS] == pairless


IMPOSSIBLE = {
    "limit": {"limit": -1},
    "no prompt": {"prompt": ""},
    "no transcript": {"format": "transcript", "chosen": ""},
    "one speaker": {"speakers": ("USER:",)},
    "a blank speaker": {"speakers": ("USER:", " ")},
    "scores for some": {"format": "ranking", "answers": ("a", "b", "c"), "scores": ("a", "b")},
    "no answers": {"format": "ranking", "answers": ()},
    "no expression": {"strip": "["},
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_source_is_rejected_on_construction(change):
    with pytest.raises(ValueError, match=r"data\.sources"):
        SourceConfig("x.jsonl", **change)


def test_a_mapping_is_unchanged_after_a_round_trip_through_its_file():
    source = SourceConfig("x", format="ranking", answers=("a", "b"), scores=("c", "d"), speakers=("\nU:", "\nA:", ""))
    assert parse_config(SourceConfig, tomllib.loads(dump_config(source)), "x") == source


@needs_real_data
def test_every_row_of_hh_rlhf_maps_to_a_pair():
    source = SourceConfig(str(REAL / "hh-rlhf-harmless" / "train.jsonl"), format="transcript")
    read = {kind: make_mapper(source, kind) for kind in KINDS}
    lines = (REAL / "hh-rlhf-harmless" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [Row(source.path, number, json.loads(line)) for number, line in enumerate(lines, 1) if line]
    pairs = [example for row in rows for example in read["pair"](row)]
    assert len(pairs) == 1747
    for pair, row in zip(pairs, rows, strict=True):
        roles = [role for role, _ in pair.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert not any("\n\nAssistant:" in text for _, text in pair.turns)
        assert [pair] == read["demonstration"](row) == read["prompt"](row)


@needs_real_data
def test_every_row_of_alpaca_eval_maps_to_a_pair():
    path = REAL / "alpaca-eval-preferences" / "train.jsonl"
    read = make_mapper(resolve_format(SourceConfig(str(path))), "pair")
    lines = path.read_text(encoding="utf-8").split("\n")
    pairs = [pair for line in lines if line for pair in read(Row("", 1, json.loads(line)))]
    assert len(pairs) == 13_823 and len({pair.turns for pair in pairs}) == 636
