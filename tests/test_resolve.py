"""Sources that name neither format nor fields: the names of the first rows' fields say what they are."""

import json
import logging

import pytest

from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.resolve import resolve, resolve_fields
from rlhf_jax.data.selection import read_examples

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
NO_PAIRS = {"chosen": "", "rejected": ""}
FORMS = {
    "prompt, answer": ({"prompt": "q", "answer": "a"}, {"answer": "answer", **NO_PAIRS}),
    "prompt, completion": ({"prompt": "q", "completion": "a"}, {"answer": "completion", **NO_PAIRS}),
    "messages in both": ({"prompt": TALK[:1], "completion": TALK[1:]}, {"answer": "completion", **NO_PAIRS}),
    "question, response": (
        {"id": 1, "question": "q", "response": "a"},
        {"prompt": "question", "answer": "response", **NO_PAIRS},
    ),
    "instruction, response": (
        {"instruction": "q", "response": "a"},
        {"prompt": "instruction", "answer": "response", **NO_PAIRS},
    ),
    "instruction, input, output": ({"instruction": "q", "input": "", "output": "a"}, {"format": "alpaca"}),
    "messages": ({"messages": TALK}, {"format": "messages"}),
    "conversations": ({"conversations": TALK}, {"format": "sharegpt"}),
    "question, chosen, rejected": ({"question": "q", "chosen": "a", "rejected": "b"}, {"prompt": "question"}),
    "prompt, chosen, rejected": ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}),
    "dialogues": ({"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "b"}]}, {}),
    "transcripts": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"format": "transcript"},
    ),
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(str(path))


@pytest.mark.parametrize("row, keys", FORMS.values(), ids=FORMS)
def test_a_file_alone_trains_sft(tmp_path, caplog, row, keys):
    caplog.set_level(logging.INFO)
    source = write(tmp_path / "rows.jsonl", row)
    resolved = resolve_fields(source)
    assert {key: getattr(resolved, key) for key in keys} == keys
    assert ("rows.jsonl: by the names of its fields, " in caplog.text) == bool(keys)
    config = DataConfig((source,), {"sft": 1}, held_out=0)
    (example,) = read_examples(config, RowSpec("demonstration", "sft"), held_out=False)
    assert (example.turns, example.answer) == ((("user", "q"),), "a")


def test_a_text_alone_is_a_document(tmp_path):
    source = write(tmp_path / "rows.jsonl", {"text": "words"})
    (example,) = read_examples(
        DataConfig((source,), {"sft": 1}, held_out=0), RowSpec("demonstration", "sft"), held_out=False
    )
    assert (example.turns, example.text) == ((), "words")


def test_what_a_source_says_is_never_replaced(tmp_path):
    row = {"prompt": "q", "answer": "a", "messages": TALK}
    path = write(tmp_path / "rows.jsonl", row).path
    for keys in ({"format": "fields"}, {"format": "messages"}, {"chosen": "messages"}, {"prompt": "answer"}):
        source = SourceConfig(path, **keys)
        (resolved,) = resolve(DataConfig((source,))).sources
        assert (resolved.format, resolved.prompt, resolved.answer, resolved.chosen) == (
            source.format or "fields",
            source.prompt,
            source.answer,
            source.chosen,
        )


def test_fields_are_found_though_the_first_row_lacks_one_or_is_broken(tmp_path):
    source = write(tmp_path / "rows.jsonl", {"question": "q"}, {"question": "q", "answer": "a"})
    assert (resolve_fields(source).prompt, resolve_fields(source).answer) == ("question", "answer")
    (tmp_path / "rows.jsonl").write_text("no JSON\n" + json.dumps({"question": "q", "answer": "a"}) + "\n")
    assert (resolve_fields(source).prompt, resolve_fields(source).answer) == ("question", "answer")
