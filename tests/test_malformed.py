"""Malformed data, end to end: each fault is reported with file, row and field, or counted, and no good row is lost.

One table lists what is wrong with a file, the message, and the number of rows kept where bad rows are allowed.
"""

import dataclasses
import gzip
import io
import json
import logging
import os
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_recipe
from row_specs import SPECS, split_of
from tiny_tokenizer import chatml_like, gpt2_like

from rlhf_jax.cli import main
from rlhf_jax.data import cache
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.config import BUILTIN, DataConfig, SourceConfig
from rlhf_jax.data.json_rows import MAX_ROW
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import NoRows, select_rows

TOKENIZER = prepare_tokenizer(gpt2_like())
MANY_BAD = 10  # the limit of tests that allow bad rows

# Good rows.


def pair(i: int) -> dict:
    return {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}


def transcripts(i: int) -> dict:
    return {name: f"\n\nHuman: q{i}\n\nAssistant: {name} {i}" for name in ("chosen", "rejected")}


def message(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def messages(i: int) -> dict:
    return {"messages": [message("user", f"q{i}"), message("assistant", f"a{i}")]}


def conversations(i: int) -> dict:
    return {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]}


def instruction(i: int) -> dict:
    return {"instruction": f"q{i}", "input": "", "output": f"a{i}"}


def ranking(i: int) -> dict:
    return {"prompt": f"q{i}", "answers": [f"good {i}", f"bad {i}"], "scores": [2, 1]}


SCORED = {"format": "ranking", "scores": ("scores",)}
MAPPINGS = {
    pair: {},
    transcripts: {"format": "transcript"},
    messages: {"format": "messages"},
    conversations: {"format": "sharegpt"},
    instruction: {"format": "alpaca"},
    ranking: SCORED,
}

# The table.


@dataclass(frozen=True)
class Case:
    content: bytes
    reported: str  # message of the strict run, {path} is the file; where no row is bad, the reason for dropping
    kept: int | None  # rows of the run that allows bad rows; None: there is no such run
    bad: int = 1  # bad rows; 0: rows that are left out are dropped with a reason
    stage: str = "sft"
    name: str = "rows.jsonl"
    source: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)


def lines(*rows: dict | str | bytes) -> bytes:
    parts = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    return b"".join(part + b"\n" for part in parts)


def middle_case(row: dict | str | bytes, reported: str, stage: str = "sft", good=pair, **options) -> Case:
    """Puts the row third among five lines, of which the other four are good."""
    content = lines(good(1), good(2), row, good(4), good(5))
    options["source"] = MAPPINGS[good] | options.get("source", {})
    return Case(content, f"{{path}}, line 3: {reported}", 4, stage=stage, **options)


def drop_case(row: dict, why: str, stage: str = "sft", good=pair, **options) -> Case:
    return dataclasses.replace(middle_case(row, "", stage, good, **options), reported=why, bad=0)


def with_fields(row: dict, **fields: object) -> dict:
    return row | fields


def damaged_case(name: str, content: bytes, reported: str, kept: int | None, bad: int = 1) -> Case:
    return Case(content, f"{{path}}{reported}", kept, bad, name=name)


def parquet_bytes(names: list[str], columns: list[list]) -> bytes:
    """Row groups of two rows."""
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_arrays([pa.array(each) for each in columns], names), sink, row_group_size=2)
    return sink.getvalue()


def parquet(**columns: list) -> bytes:
    """Four pairs with some of their columns replaced."""
    fields = {name: [pair(i)[name] for i in range(4)] for name in pair(0)} | columns
    return parquet_bytes(list(fields), list(fields.values()))


PARQUET = parquet()
ARRAY = json.dumps([pair(i) for i in range(3)]).encode()
CSV = b"prompt,chosen,rejected\nq1,good 1,bad 1\n%s\nq2,good 2,bad 2\n"
MANY = lines(*(pair(i) for i in range(3000)))
CUT_GZ, CUT_ZST = gzip.compress(MANY)[:-200], pa.compress(MANY, "zstd", asbytes=True)[:-200]
# The data before the cut: everything that inflates (gzip), and the first block of 128 KiB (zstd).
IN_CUT_GZ = zlib.decompressobj(31).decompress(CUT_GZ).count(b"\n")
IN_CUT_ZST = MANY[: 128 << 10].count(b"\n")
FOUR = lines(*map(pair, range(4)))
HALF = "a lone surrogate"
TEXT = "must be text or a list of messages, not"
CHOSEN = f": field 'chosen' {TEXT}"
ENDS, CANNOT = ", after row", "cannot be read any further"
ROLES = {
    "an unknown role": (
        [message("user", "q"), message("narrator", "a")],
        "has an invalid message 2: its role 'narrator'",
    ),
    "a function call": (
        [message("user", "q"), message("assistant", "") | {"function_call": {"name": 3}}],
        "has an invalid message 2: it must call functions",
    ),
    "no content": ([message("user", "q"), message("assistant", None)], "its content must be text, not NoneType"),
    "an image": (
        [message("user", [{"type": "image_url", "image_url": {}}]), message("assistant", "a")],
        "of type 'image_url'",
    ),
    "no messages": ([], "has no assistant turn that answers a user turn"),
    "no answer": ([message("user", "q")], "has no assistant turn that answers a user turn"),
    "an answer before the question": ([message("assistant", "a"), message("user", "q")], "the assistant speaks first"),
    "a system turn in the middle": (
        [message("user", "q"), message("system", "s"), message("assistant", "a")],
        "a system turn comes after other turns; it must come first",
    ),
    "a message that is text": (["q", "a"], "has an invalid message 1: it must be an object, not str"),
    "a message without a role": ([{"content": "q"}], "it needs role and content, or from and value, but has content"),
    "messages that are text": ("q", "must be a list of messages, not str"),
    "messages that are null": (None, "must be a list of messages, not NoneType"),
}
WRONG = {"number": (3, "int"), "null": (None, "NoneType"), "bool": (True, "bool"), "dict": ({"a": "b"}, "dict")}

CASES: dict[str, Case] = {
    # JSON
    "truncated JSON": middle_case('{"prompt": "q", "chosen": "a"', "malformed JSON (Expecting ',' delimiter"),
    "a surplus comma": middle_case('{"prompt": "q", "chosen": "a",}', "malformed JSON ("),
    "single quotes": middle_case("{'prompt': 'q', 'chosen': 'a'}", "malformed JSON (Expecting property name"),
    "two objects in one line": middle_case(json.dumps(pair(3)) * 2, "malformed JSON (Extra data"),
    "a word": middle_case("prompt", "malformed JSON (Expecting value"),
    "a number": middle_case("3", "holds a int; there must be one object on every line"),
    "a text": middle_case('"q"', "holds a str; there must be one object on every line"),
    "a null": middle_case("null", "holds a NoneType; there must be one object on every line"),
    "an array in a line": middle_case('["q", "a"]', "holds a list; there must be one object on every line"),
    "deeply nested JSON": middle_case("[" * 100_000, "malformed JSON ("),
    "a NUL byte": middle_case(b'{"prompt": "q\0", "chosen": "a"}', "malformed JSON (Invalid control character"),
    "a surrogate in an escape": middle_case(r'{"prompt": "q", "chosen": "a \ud83d"}', f"field 'chosen' holds {HALF}"),
    "bytes that are not UTF-8": middle_case(
        b'{"prompt": "q", "chosen": "a \xed\xa0\xbd"}', "malformed JSON ('utf-8' codec"
    ),
    "a line of 16 MiB": middle_case(json.dumps(pair(3) | {"note": "x" * MAX_ROW}), "longer than 16 MiB"),
    "an array without an end": Case(
        ARRAY[: ARRAY.index(b'"q2"')], "{path}, row 3: malformed JSON (", 2, name="rows.json"
    ),
    "an array with a number in it": Case(
        b"[" + ARRAY[1:-1] + b", 7, " + json.dumps(pair(4)).encode() + b"]",
        "{path}, row 4: holds a int; the rows must be objects",
        4,
        name="rows.json",
    ),
    "an array of texts": Case(
        b'["a", "b"]', "{path}, row 1|: holds a str; the rows must be objects", 0, bad=2, name="rows.json"
    ),
    # Fields
    "no field chosen": middle_case(
        {"prompt": "q", "picked": "a"}, "no field 'chosen'; the fields are prompt, picked. Name"
    ),
    "no field prompt": middle_case(
        {"question": "q", "chosen": "a"}, "no field 'prompt'; the fields are question, chosen."
    ),
    "no field rejected": middle_case({"prompt": "q", "chosen": "a"}, "no field 'rejected'; the fields are", "reward"),
    "no fields": middle_case({}, "no field 'chosen'; the fields are none"),
    **{
        f"a {kind} in {name}": middle_case(
            with_fields(pair(3), **{name: value}), f"field '{name}' {TEXT} {type_name}", stage
        )
        for kind, (value, type_name) in WRONG.items()
        for name, stage in (("prompt", "ppo"), ("chosen", "sft"), ("rejected", "reward"))
    },
    **{
        f"a {kind} in answer": Case(
            lines(*(pair(i) | {"answer": "a"} for i in (1, 2)), pair(3) | {"answer": value}, pair(4) | {"answer": "a"}),
            f"{{path}}, line 3: field 'answer' {TEXT} {type_name}",
            3,
            source={"answer": "answer"},
        )
        for kind, (value, type_name) in WRONG.items()
    },
    "texts in prompt": middle_case(
        with_fields(pair(3), prompt=["q"]), "field 'prompt' has an invalid message 1", "ppo"
    ),
    "texts in chosen": middle_case(with_fields(pair(3), chosen=["a"]), "field 'chosen' has an invalid message 1"),
    "texts in rejected": middle_case(
        with_fields(pair(3), rejected=["b"]), "field 'rejected' has an invalid message 1", "reward"
    ),
    "empty prompt": drop_case(with_fields(pair(3), prompt=""), "empty prompt"),
    "blank prompt": drop_case(with_fields(pair(3), prompt=" \n\t"), "empty prompt", "ppo"),
    "empty answer": drop_case(with_fields(pair(3), chosen=""), "empty answer"),
    "blank answer": drop_case(with_fields(pair(3), chosen=" \n"), "empty answer", "reward"),
    "blank rejected": drop_case(with_fields(pair(3), rejected="  "), "empty answer", "reward"),
    "an equal pair": drop_case(with_fields(pair(3), rejected="good 3 "), "chosen and rejected equal", "reward"),
    "a pair that is equal after truncation": drop_case(
        with_fields(pair(3), chosen="x" * 99 + "y", rejected="x" * 99 + "z"),
        "chosen and rejected equal",
        "reward",
        config={"max_prompt_length": 40, "max_length": 60},
    ),
    "a long prompt": drop_case(with_fields(pair(3), prompt="x" * 300), "prompt over 256 tokens"),
    # Transcripts
    "another prompt": middle_case(
        with_fields(transcripts(3), rejected="\n\nHuman: p\n\nAssistant: b"),
        "chosen and rejected answer different prompts: they must share at least the first question",
        "reward",
        transcripts,
    ),
    "no assistant turn": middle_case(
        with_fields(transcripts(3), chosen="\n\nHuman: q"), "field 'chosen': no transcript", good=transcripts
    ),
    "no user turn": middle_case(
        with_fields(transcripts(3), chosen="\n\nAssistant: a"), "field 'chosen': no transcript", "reward", transcripts
    ),
    "text before the first speaker": middle_case(
        with_fields(transcripts(3), chosen="Well.\n\nHuman: q\n\nAssistant: a"),
        "field 'chosen': no transcript: a turn 'Human: ...' must come first",
        "sft",
        transcripts,
    ),
    "a transcript that is null": middle_case(
        with_fields(transcripts(3), chosen=None), "field 'chosen' must be text, not NoneType", "sft", transcripts
    ),
    "a transcript whose answer is empty": drop_case(
        with_fields(transcripts(3), chosen="\n\nHuman: q\n\nAssistant:"), "empty answer", "sft", transcripts
    ),
    # Messages, ShareGPT, Alpaca, rankings
    **{
        f"messages with {fault}": middle_case({"messages": value}, f"field 'messages' |{reported}", good=messages)
        for fault, (value, reported) in ROLES.items()
    },
    "messages without the field": middle_case(
        {"turns": []}, "no field 'messages'; the fields are turns", good=messages
    ),
    "an unknown speaker": middle_case(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "moon", "value": "a"}]},
        "field 'conversations' has an invalid message 2: its role 'moon' is none of",
        good=conversations,
    ),
    "a speaker without text": middle_case(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]},
        "field 'conversations' has an invalid message 2: it needs role and content",
        good=conversations,
    ),
    "Alpaca without output": middle_case({"instruction": "q", "input": ""}, "no field 'output'", good=instruction),
    "Alpaca with a null for the output": middle_case(
        with_fields(instruction(3), output=None), "field 'output' must be text, not NoneType", good=instruction
    ),
    "Alpaca with an empty output": drop_case(with_fields(instruction(3), output=" "), "empty answer", good=instruction),
    "a missing score": middle_case(with_fields(ranking(3), scores=[1]), "2 answers have 1 scores", "reward", ranking),
    "a score that is not a number": middle_case(
        lines(with_fields(ranking(3), scores=[1, float("nan")])).strip(),
        "field 'scores' has an invalid item 2: must be a number, not nan",
        "reward",
        ranking,
    ),
    "a score that is a text": middle_case(
        with_fields(ranking(3), scores=["high", 1]), "field 'scores' has an invalid item 1", good=ranking
    ),
    "answers that are text": middle_case(
        with_fields(ranking(3), answers="a"), "field 'answers' must be a list, not", good=ranking
    ),
    "no answers": middle_case(
        with_fields(ranking(3), answers=[], scores=[]), "field 'answers' holds no answers", "sft", ranking
    ),
    # Files
    "an empty file": damaged_case("rows.jsonl", b"", ": holds no rows, it is empty", None),
    "blank lines": damaged_case("rows.jsonl", b"\n \n\t\n", ": holds no rows", None),
    "an unknown suffix": damaged_case("rows.xml", b"a", ": unknown ending; the known ones are .jsonl", None),
    "UTF-16": damaged_case(
        "rows.jsonl", lines(pair(1)).decode().encode("utf-16"), f"{ENDS} 0: {CANNOT}: the text is UTF-16", 0
    ),
    "truncated gzip": damaged_case(
        "rows.jsonl.gz", CUT_GZ, f"{ENDS} {IN_CUT_GZ}: {CANNOT}: Compressed file ended", IN_CUT_GZ
    ),
    "gzip with trailing bytes": damaged_case(
        "rows.jsonl.gz", gzip.compress(FOUR) + b"no gzip", f"{ENDS} 4: {CANNOT}: Not a gzipped file", 4
    ),
    "not gzip": damaged_case("rows.jsonl.gz", FOUR, f"{ENDS} 0: {CANNOT}: Not a gzipped file", 0),
    "truncated Zstandard": damaged_case(
        "rows.jsonl.zst", CUT_ZST, f"{ENDS} {IN_CUT_ZST}: {CANNOT}: Truncated", IN_CUT_ZST
    ),
    "not Zstandard": damaged_case("rows.jsonl.zst", FOUR, f"{ENDS} 0: {CANNOT}", 0),
    "not Parquet": damaged_case("rows.parquet", FOUR, f"{ENDS} 0: {CANNOT}: Parquet magic", 0),
    "truncated Parquet": damaged_case("rows.parquet", PARQUET[:-9], f"{ENDS} 0: {CANNOT}: Parquet", 0),
    "Parquet with numbers": damaged_case("rows.parquet", parquet(chosen=[1, 2, 3, 4]), f", row 1|{CHOSEN} int", 0, 4),
    "Parquet with nulls": damaged_case(
        "rows.parquet", parquet(chosen=["a", None, "b", "c"]), f", row 2{CHOSEN} NoneType", 3
    ),
    "Parquet with bytes": damaged_case("rows.parquet", parquet(chosen=[b"a"] * 4), f", row 1|{CHOSEN} bytes", 0, 4),
    "Parquet with a column named twice": damaged_case(
        "rows.parquet",
        parquet_bytes(["prompt", "prompt"], [["q"], ["a"]]),
        f"{ENDS} 0: {CANNOT}: columns must be named once",
        0,
    ),
    "not Arrow": damaged_case("rows.arrow", FOUR, f"{ENDS} 0: {CANNOT}", 0),
    "CSV with a short row": damaged_case("rows.csv", CSV % b"q,a", ", row 2: has 2 columns, and 3 are named", 2),
    "CSV with a long row": damaged_case("rows.csv", CSV % b"q,a,b,c", ", row 2: has 4 columns, and 3 are named", 2),
    "CSV with an unclosed quote": damaged_case(
        "rows.csv", CSV % b'q,"a,b', ", row 2: malformed CSV (unexpected end", 2
    ),
    "CSV with bytes that are not UTF-8": damaged_case(
        "rows.csv", CSV % b"q,a\xff,b", ", row 2: field 'chosen' is not UTF-8", 2
    ),
    "CSV with NUL bytes": damaged_case("rows.csv", CSV % b"q,a\0,b", ", row 2: |NUL", 2),
    "CSV with other columns": damaged_case(
        "rows.csv",
        b"headline,body\nq,a\np,b\n",
        ", row 1|: no field 'chosen'; the fields are headline, body. Name the right ones in data.sources",
        0,
        2,
    ),
    "CSV with a column named twice": damaged_case(
        "rows.csv", b"prompt,prompt\nq,a\n", ", names of the columns: columns must be named once", 0
    ),
    "text that is not UTF-8": dataclasses.replace(
        damaged_case("rows.txt", b"one\n\xff\xfe\xfd\nthree\n", ", line 2: not UTF-8", 2), source={"format": "text"}
    ),
}


def config_of(case: Case, path: Path, **changes) -> DataConfig:
    split = {"sft": "1,0,0", "reward": "0,1,0", "ppo": "0,0,1"}[case.stage]
    source = SourceConfig(str(path), **case.source)
    return DataConfig((source,), **{"split": split_of(split), "held_out": 0.0} | case.config | changes)


def write_case(folder: Path, case: Case) -> Path:
    path = folder / case.name
    path.write_bytes(case.content)
    return path


def rows_of(case: Case, config: DataConfig) -> Rows:
    return select_rows(config, TOKENIZER, SPECS[case.stage], held_out=False)


def assert_reported(case: Case, path: Path, text: str) -> None:
    for part in case.reported.replace("{path}", str(path)).split("|"):
        assert part in text


BAD = {name: case for name, case in CASES.items() if case.bad}
DROPPED = {name: case for name, case in CASES.items() if not case.bad}


def test_the_table_has_over_80_faults_and_over_8_dropped_rows():
    assert len(BAD) > 80 and len(DROPPED) > 8


@pytest.mark.parametrize("name", BAD)
def test_a_fault_stops_the_run_and_is_reported_with_file_row_and_field(tmp_path, name):
    case = CASES[name]
    path = write_case(tmp_path, case)
    with pytest.raises(ValueError) as refused:
        rows_of(case, config_of(case, path))
    assert_reported(case, path, str(refused.value))
    assert case.kept is None or "raise data.max_bad_rows" in str(refused.value)


@pytest.mark.parametrize("name", BAD)
def test_an_allowed_fault_is_counted_and_loses_no_good_row(tmp_path, name):
    case = CASES[name]
    path = write_case(tmp_path, case)
    config = config_of(case, path, max_bad_rows=MANY_BAD)
    if not case.kept:
        with pytest.raises(ValueError) as refused:
            rows_of(case, config)
        assert_reported(case, path, str(refused.value))
        # Unusable files stop a run that allows bad rows too; a file of bad rows alone leaves no rows.
        assert isinstance(refused.value, NoRows) == (case.kept == 0)
        assert case.kept is None or f"(0 rows, {case.bad} bad rows left out: " in str(refused.value)
        return
    rows = rows_of(case, config)
    (part,) = rows.parts
    assert len(rows) == case.kept and part.stats.bad == case.bad
    assert rows.report.startswith(f"{case.kept:,} rows, {case.bad} bad rows left out: ")
    assert_reported(case, path, rows.report)
    # With a limit one lower the run stops, although the tokens are cached by now.
    with pytest.raises(ValueError, match="raise data.max_bad_rows"):
        rows_of(case, config_of(case, path, max_bad_rows=case.bad - 1))


@pytest.mark.parametrize("name", DROPPED)
def test_a_row_with_nothing_to_learn_is_dropped_with_a_reason_and_is_not_a_fault(tmp_path, name):
    case = CASES[name]
    rows = rows_of(case, config_of(case, write_case(tmp_path, case)))
    assert rows.report.startswith(f"4 rows, 1 dropped: {case.reported}")
    assert [part.stats.bad for part in rows.parts] == [0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a tokenizer, the only part of a model that `rlhf-jax data` reads."""
    folder = tmp_path_factory.mktemp("model")
    gpt2_like().save_pretrained(folder)
    return folder


def one_line(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The last line that the command writes to stderr."""
    capsys.readouterr()
    assert main([str(each) for each in argv]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("rlhf-jax: ") and not any("Traceback" in line for line in error)
    assert sum(line.startswith("rlhf-jax: ") for line in error) == 1
    return error[-1].removeprefix("rlhf-jax: ")


def recipe_of(folder: Path, config: DataConfig, model: Path | str) -> Path:
    (source,) = config.sources
    changed = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name != "path"}
    default = SourceConfig("x")
    keys = {"path": source.path} | {name: value for name, value in changed.items() if value != getattr(default, name)}
    table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in keys.items())
    split = ", ".join(f"{stage} = {share}" for stage, share in config.split.items())
    path = folder / "recipe.toml"
    path.write_text(
        f'[model]\nactor = "{model}"\n[data]\nsources = [{{ {table} }}]\nsplit = {{ {split} }}\nheld_out = 0.0\n'
        f"max_prompt_length = {config.max_prompt_length}\nmax_length = {config.max_length}\n"
    )
    return path


SAMPLE = [
    "truncated JSON",
    "no field chosen",
    "a number in chosen",
    "UTF-16",
    "an empty file",
    "Parquet with numbers",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_the_data_command_reports_a_fault_in_one_line(tmp_path, capsys, model, name):
    case = CASES[name]
    path = write_case(tmp_path, case)
    error = one_line(capsys, "data", recipe_of(tmp_path, config_of(case, path), model))
    assert_reported(case, path, error)


@pytest.mark.parametrize(
    "name", [*SAMPLE, "messages with an unknown role", "CSV with other columns", "no assistant turn"]
)
def test_training_reports_a_fault_in_one_line(tmp_path, capsys, name):
    case = CASES[name]
    path = write_case(tmp_path, case)
    recipe = recipe_of(tmp_path, config_of(case, path), "new")
    error = one_line(capsys, "sft", recipe, f"run.dir={tmp_path / 'run'}", "model.new.vocab_size=300")
    assert_reported(case, path, error)


def test_the_data_command_continues_over_allowed_faults(tmp_path, capsys, model):
    case = CASES["a number in chosen"]
    path = write_case(tmp_path, case)
    recipe = recipe_of(tmp_path, config_of(case, path), model)
    assert main(["data", str(recipe), "data.max_bad_rows=1"]) == 0
    assert f"{path}, line 3: field 'chosen' {TEXT} int" in capsys.readouterr().out


# Valid data that look odd.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(pair(1), pair(2))),
        ("crlf.jsonl", lines(pair(1), pair(2)).replace(b"\n", b"\r\n")),
        ("no-end.jsonl", lines(pair(1), pair(2)).rstrip()),
        ("blanks.jsonl", b"\n" + lines(pair(1), "", " ", pair(2)) + b"\n\n"),
        ("array.json", json.dumps([pair(1), pair(2)], indent=1).encode()),
        ("framed.json", json.dumps({"data": [pair(1), pair(2)]}).encode()),
        ("more.jsonl", lines(pair(1) | {"extra": None}, pair(2) | {"extra": [1]})),
        ("bom.csv", b"\xef\xbb\xbf" + CSV.replace(b"%s\n", b"")),
        ("nul.jsonl", lines(pair(1) | {"chosen": "a\0b"}, pair(2))),  # written as an escape
        ("emoji.jsonl", lines(pair(1) | {"chosen": "\U0001f600"}, pair(2))),  # written as two surrogates
    ],
)
def test_odd_looking_valid_data_is_read_without_complaint(tmp_path, name, content):
    case = Case(content, "", 2, name=name)
    rows = rows_of(case, config_of(case, write_case(tmp_path, case)))
    assert rows.report == "2 rows"


# Paths of sources.


GOOD = Case(lines(*map(pair, range(6))), "", 6)


def good(folder: Path, **source) -> DataConfig:
    case = dataclasses.replace(GOOD, source=source)
    return config_of(case, write_case(folder, case))


@pytest.mark.parametrize(
    ("place", "reported"),
    [
        ("gone.jsonl", "gone.jsonl: no such file; the folder here is"),
        ("./gone", "./gone: no such file"),
        ("no*.jsonl", "no*.jsonl: matches no file; the folder here is"),
        ("notes", "notes: holds no file of a known ending; the known ones are .jsonl"),
        ("someone/pairs", "'someone/pairs' is no file here, and cannot be had from the hub"),
        ("builtin:helper", "there is no built-in set 'builtin:helper', only 'builtin:assistant'"),
    ],
)
def test_an_unusable_path_is_reported(tmp_path, monkeypatch, capsys, model, place, reported):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.md").write_text("x")
    error = one_line(
        capsys, "data", recipe_of(tmp_path, config_of(GOOD, Path("x")), model), f'data.sources=[{{path="{place}"}}]'
    )
    assert reported in error


def test_a_source_without_a_path_is_rejected_on_construction():
    with pytest.raises(ValueError, match="data.sources.path is empty: name a file"):
        SourceConfig(" ")


def test_an_unreadable_file_is_reported_by_name(tmp_path, monkeypatch):
    config = good(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="rows.jsonl: no permission to read it; grant it, as with chmod"):
        rows_of(GOOD, config)


@pytest.mark.parametrize("what", ["file", "folder", "glob", "built-in"])
def test_a_split_is_rejected_for_files_without_splits(tmp_path, what):
    write_case(tmp_path, GOOD)
    path = {"file": tmp_path / "rows.jsonl", "folder": tmp_path, "glob": tmp_path / "*.jsonl", "built-in": BUILTIN}[
        what
    ]
    for key, fix in (("split", "data.sources.path"), ("eval_split", "data.sources.eval_path")):
        config = config_of(dataclasses.replace(GOOD, source={key: "test"}), path)
        for held_out in (False, True):
            with pytest.raises(ValueError) as refused:
                select_rows(config, TOKENIZER, SPECS["sft"], held_out=held_out)
            assert f"{path}: has no splits, so data.sources.{key} = 'test' cannot be read of it" in str(refused.value)
            assert fix in str(refused.value)


# Held-out rows.


def test_a_missing_evaluation_file_is_reported_before_training(tmp_path):
    config = good(tmp_path, eval_path="gone.jsonl")
    for held_out in (False, True):
        with pytest.raises(ValueError, match="gone.jsonl: no such file"):
            select_rows(config, TOKENIZER, SPECS["sft"], held_out=held_out)


def test_a_bad_row_of_the_evaluation_file_is_reported_or_counted(tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_bytes(lines(pair(11), {"prompt": 3, "chosen": "a"}, pair(12)))
    config = good(tmp_path, eval_path=str(held))
    reported = rf"{held}, line 2: field 'prompt' {TEXT} int"
    for held_out, kept in ((False, 6), (True, 2)):
        with pytest.raises(ValueError, match=reported):
            select_rows(config, TOKENIZER, SPECS["sft"], held_out=held_out)
        tolerant = dataclasses.replace(config, max_bad_rows=1)
        assert len(select_rows(tolerant, TOKENIZER, SPECS["sft"], held_out=held_out)) == kept


def test_a_prompt_of_the_evaluation_file_is_removed_from_training_and_counted(tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_bytes(lines(pair(3), pair(4) | {"prompt": " q4\n"}, pair(11)))
    config = good(tmp_path, eval_path=str(held))
    reported = "2 dropped: prompt held out by eval_path or eval_split"
    assert rows_of(GOOD, config).report == f"4 rows, {reported}"
    assert select_rows(config, TOKENIZER, SPECS["sft"], held_out=True).report == "3 rows"
    held.write_bytes(GOOD.content)
    with pytest.raises(NoRows, match=r"no rows to train on \(0 rows, 6 dropped: prompt held out by eval_path"):
        rows_of(GOOD, config)


@pytest.mark.parametrize(
    ("stage", "fix"),
    [
        ("sft", "give a source an eval_path, or set sft.eval_batches=0"),
        ("ppo", "raise data.held_out, or give a source"),
    ],
)
def test_without_held_out_rows_the_suggested_keys_are_keys_of_the_stage(tmp_path, stage, fix):
    with pytest.raises(NoRows, match=f"{stage}: there are no held-out rows to evaluate on .*{fix}"):
        select_rows(good(tmp_path), TOKENIZER, SPECS[stage], held_out=True)


# Requirements of a stage.


def test_a_data_set_of_prompts_alone_has_no_rows_for_the_reward_stage(tmp_path):
    case = Case(lines(*({"prompt": f"q{i}"} for i in range(4))), "", 4, stage="reward")
    path = write_case(tmp_path, case)
    with pytest.raises(ValueError) as refused:
        rows_of(case, config_of(case, path))
    places = ", ".join(f"{path}, line {i}" for i in (1, 2, 3))
    assert f"{places}: no field 'chosen'; the fields are prompt. Name the right ones in data.sources" in str(
        refused.value
    )
    assert str(refused.value).count("Name the right ones") == 1
    case = dataclasses.replace(case, source={"chosen": "", "rejected": ""})
    with pytest.raises(
        NoRows,
        match="reward: there are no rows .* name the fields that it needs in .*, or leave it out of run.stages",
    ):
        rows_of(case, config_of(case, path))
    case = dataclasses.replace(case, stage="ppo")
    assert len(rows_of(case, config_of(case, path))) == 4


def test_a_long_answer_is_truncated_and_counted(tmp_path):
    case = middle_case(with_fields(pair(3), chosen="x" * 300), "", config={"max_prompt_length": 40, "max_length": 60})
    assert rows_of(case, config_of(case, write_case(tmp_path, case))).report == "5 rows, 1 cut at 60 tokens"


# Templates.


REFUSING = (
    "{% if 'q3' in messages[0]['content'] %}{{ raise_exception('no q3') }}{% endif %}"
    "{% for message in messages %}{{ message['content'] + '|' }}{% endfor %}"
)
EACH = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"


def test_a_row_rejected_by_the_template_is_reported_or_counted(tmp_path):
    config, tokenizer = good(tmp_path), prepare_tokenizer(gpt2_like(), REFUSING)
    reported = "rows.jsonl, line 4: the tokenizer's chat template refuses a dialogue: no q3; data.template replaces it"
    with pytest.raises(ValueError, match=reported):
        select_rows(config, tokenizer, SPECS["sft"], held_out=False)
    rows = select_rows(dataclasses.replace(config, max_bad_rows=1), tokenizer, SPECS["sft"], held_out=False)
    assert len(rows) == 5 and "1 bad rows left out" in rows.report


@pytest.mark.parametrize(
    ("template", "reported"),
    [
        ("{% for m in messages %}{{ m.content }", "refuses a dialogue: unexpected '}'; data.template"),
        ("{{ messages[9].content }}", "refuses a dialogue: list object has no element 9; data.template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses a dialogue: RecursionError: maximum recursion"),
        ("{{ '{x}'.format() }}", "refuses a dialogue: KeyError: 'x'; data.template"),
        ("{{ messages[0].content.index('?') }}", "refuses a dialogue: ValueError: substring not found; data.template"),
        ("{{ 'a' * 10**18 }}", "refuses a dialogue: MemoryError"),
        (
            EACH + "{% if add_generation_prompt %}ROBOT:{% endif %}",
            "encodes a prompt differently once an answer follows",
        ),
        ("{{ messages[0].content }}", "writes nothing of the answer 'good 0': fix data.template"),
    ],
)
def test_an_unusable_template_is_reported_with_the_first_row(tmp_path, template, reported):
    with pytest.raises(ValueError) as refused:
        select_rows(good(tmp_path), gpt2_like(chat_template=template), SPECS["sft"], held_out=False)
    assert "rows.jsonl, line 1" in str(refused.value) and reported in str(refused.value)


@pytest.mark.parametrize(
    ("template", "reported"),
    [
        ("{% for m in messages %}{{ m.content }", "data.template, line 1: no Jinja template: unexpected '}'"),
        (
            "gone.jinja",
            "data.template: the file 'gone.jinja' cannot be read (No such file or directory); give the path",
        ),
        ("bytes.jinja", "data.template: the file 'bytes.jinja' cannot be read ('utf-8' codec can't decode byte"),
    ],
)
def test_an_invalid_template_in_the_configuration_is_reported_in_one_line(
    tmp_path, monkeypatch, capsys, model, template, reported
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff{{")
    recipe = recipe_of(tmp_path, good(tmp_path), model)
    assert reported in one_line(capsys, "data", recipe, f"data.template={template}")


def test_the_template_can_be_a_file(tmp_path, capsys, model):
    (tmp_path / "chat.jinja").write_text(chatml_like().chat_template)
    recipe = recipe_of(tmp_path, good(tmp_path), model)
    assert main(["data", str(recipe), f"data.template={tmp_path / 'chat.jinja'}"]) == 0
    assert "<|im_start|>user\n" in capsys.readouterr().out


# The cache.


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_path_that_cannot_be_a_folder_is_reported(tmp_path, place):
    (tmp_path / "file").write_text("x")
    config = dataclasses.replace(good(tmp_path), cache_dir=str(tmp_path / place))
    with pytest.raises(ValueError, match=rf"{place}: tokenized rows cannot be stored there .*data.cache_dir"):
        rows_of(GOOD, config)


@pytest.mark.parametrize("where", ["FileLock", "write_store"])
def test_an_unwritable_cache_is_reported(tmp_path, monkeypatch, where):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, where, refuse)
    config = dataclasses.replace(good(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"cache: tokenized rows cannot be stored there \(No space left on device\)"):
        rows_of(GOOD, config)


def test_a_cache_that_cannot_keep_held_out_prompts_is_reported(tmp_path, monkeypatch):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_bytes(lines(pair(11)))
    config = good(tmp_path, eval_path=str(held_out))
    monkeypatch.setattr(cache, "keys_path", lambda *_: tmp_path / "gone" / "file.keys")
    with pytest.raises(ValueError, match=r"gone: tokenized rows cannot be stored there \(No such file or directory\)"):
        rows_of(GOOD, config)


def write_empty(folder: Path) -> None:
    """Writes a valid file of the same columns without rows."""
    schema = pa.ipc.open_file(pa.py_buffer((folder / "rows.arrow").read_bytes())).schema
    with pa.ipc.new_file(str(folder / "rows.arrow"), schema):
        pass


SPOILT = {
    "fewer rows than the report says": write_empty,
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no report": lambda folder: (folder / "report.json").unlink(),
    "no rows": lambda folder: (folder / "rows.arrow").unlink(),
    "a truncated report": lambda folder: (folder / "report.json").write_text("{"),
    "an empty report": lambda folder: (folder / "report.json").write_text("{}"),
    "a report of another kind": lambda folder: (folder / "report.json").write_text("[]"),
    "empty rows": lambda folder: (folder / "rows.arrow").write_bytes(b""),
    "truncated rows": lambda folder: os.truncate(folder / "rows.arrow", (folder / "rows.arrow").stat().st_size - 50),
    "zeros": lambda folder: (folder / "rows.arrow").write_bytes(bytes((folder / "rows.arrow").stat().st_size)),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_damaged_tokenised_rows_are_rebuilt_with_a_warning(tmp_path, caplog, spoilt):
    config = dataclasses.replace(good(tmp_path), cache_dir=str(tmp_path / "cache"))
    before = rows_of(GOOD, config).fingerprint
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    SPOILT[spoilt](folder)
    with caplog.at_level(logging.WARNING):
        assert rows_of(GOOD, config).fingerprint == before
    assert caplog.messages == [f"{folder}: these tokenized rows are damaged and are rebuilt"]
    assert rows_of(GOOD, config).fingerprint == before and len(caplog.messages) == 1


def test_a_bad_row_of_a_copy_is_reported_with_the_path_of_the_copy(tmp_path):
    case = CASES["a number in chosen"]
    places = [write_case(tmp_path, case)]
    for name in ("copy.jsonl", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        target = tmp_path / "folder" / "rows.jsonl" if name == "folder" else tmp_path / name
        places.append(places[0].rename(target) if name == "folder" else Path(shutil.copy(places[0], target)))
    for place, file in ((places[1], places[1]), (tmp_path / "folder", places[2]), (places[1], places[1])):
        config = config_of(case, place, max_bad_rows=1, cache_dir=str(tmp_path / "cache"))
        assert f"left out: {file}, line 3: field 'chosen'" in rows_of(case, config).report
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1  # tokenised once


def test_leftovers_of_a_killed_run_are_not_used_as_rows(tmp_path, monkeypatch):
    config = dataclasses.replace(good(tmp_path), cache_dir=str(tmp_path / "cache"))

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", kill)
        with pytest.raises(KeyboardInterrupt):
            rows_of(GOOD, config)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(rows_of(GOOD, config)) == 6


# Data that change between runs.


def test_a_run_whose_data_have_changed_does_not_resume(tmp_path, capsys):
    case = Case(lines(*map(pair, range(40))), "", 40)
    path = write_case(tmp_path, case)
    recipe = tiny_recipe.write_recipe(tmp_path)
    options = ["data.split=1,0,0", f'data.sources=[{{path="{path}"}}]', "sft.steps=2", f"run.dir={tmp_path / 'run'}"]
    assert tiny_recipe.run("sft", recipe, *options) == 0
    (tmp_path / "run/sft/export").rename(tmp_path / "export")  # as if the stage had been stopped before its end
    path.write_bytes(path.read_bytes() + lines(pair(99)))
    capsys.readouterr()
    assert tiny_recipe.run("sft", recipe, *options) == 2
    assert "the training data is no longer what the first 2 steps saw: restore it" in capsys.readouterr().err
