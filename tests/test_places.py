"""Places: equal rows from every format, bad rows that cost no good one, errors with the mend, and keys of contents."""

import csv
import gzip
import io
import itertools
import json
import os
import sys
import time
import tracemalloc
import types

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_jax.data import assistant, digests, files, json_rows, lines, places
from rlhf_jax.data.example import BadRow, Row

ROWS = [{"prompt": f"q{i} 你好 🙂", "answer": 'two "lines",\r\nand\ta tab' * (i % 3)} for i in range(700)]
ENDINGS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"]


def packed(content: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(content)
    if compression == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content


def encoded(rows: list[dict], ending: str) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    if ending in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    if ending == ".parquet":
        pa.parquet.write_table(table, sink, row_group_size=300)
    elif ending in (".arrow", ".feather"):
        with (pa.ipc.new_stream if ending == ".arrow" else pa.ipc.new_file)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    elif ending == ".json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    else:
        return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    return sink.getvalue().to_pybytes()


def read(path, **options) -> list[Row]:
    return list(places.read(str(path), **options))


def parts(rows: list[Row]) -> tuple[list, list[str]]:
    """The fields of the good rows, and the texts of the bad ones."""
    good = [row.fields for row in rows if not isinstance(row.fields, BadRow)]
    return good, [str(row.fields) for row in rows if isinstance(row.fields, BadRow)]


def one_file(tmp_path, name: str, content: bytes) -> tuple[list, list[str], list[int]]:
    (tmp_path / name).write_bytes(content)
    rows = read(tmp_path / name)
    return *parts(rows), [row.number for row in rows]


# Formats


@pytest.mark.parametrize(("ending", "compression"), list(itertools.product(ENDINGS, ["", ".gz", ".zst"])))
def test_every_format_and_compression_gives_the_same_700_rows(tmp_path, ending, compression):
    path = tmp_path / f"rows{ending}{compression}"
    path.write_bytes(packed(encoded(ROWS, ending), compression))
    assert read(path) == [Row(str(path), number, fields) for number, fields in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, ending, compression):
    content = packed(b"\xef\xbb\xbf" + encoded(ROWS[:3], ending), compression)
    assert one_file(tmp_path, f"rows{ending.upper()}{compression}", content) == (ROWS[:3], [], [1, 2, 3])


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1}\n{"a":2}\n',  # JSON lines
        ' \n{"a":1}\n\n{"a":2}',
        '{"a":1}\r\n{"a":2}\r\n',
        '[{"a":1},{"a":2}]',
        '\n [\n{"a":1}\n,\n{"a":2}\n]\n',
        '{"data":[{"a":1},{"a":2}]}',
        '{"version": {"n": [1]}, "tags": ["x"],\n "rows": [{"a":1}, {"a":2}], "n": 2}\n',
        '{\n "a": 1\n}\n{\n "a": 2\n}\n',  # objects over several lines
    ],
)
def test_a_json_file_is_an_array_or_lines_or_an_object_around_an_array(tmp_path, text):
    good, bad, numbers = one_file(tmp_path, "rows.json", text.encode())
    assert (good, bad) == ([{"a": 1}, {"a": 2}], [])
    assert numbers == ([2, 4] if text.startswith(" \n") else [1, 2])


def test_one_dialogue_in_a_json_file_is_a_row_and_not_the_frame_of_its_turns(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert one_file(tmp_path, "rows.json", json.dumps(row).encode()) == ([row], [], [1])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=5), st.data())
def test_json_is_read_alike_however_it_is_written_and_cut_into_blocks(monkeypatch, rows, data):
    indent, ascii_only = data.draw(st.sampled_from([None, 0, 1])), data.draw(st.booleans())
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    each = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
    size = data.draw(st.integers(1, 40))
    monkeypatch.setattr(json_rows, "BLOCK", size)
    for reader, content in ((json_rows.json_rows, array), (json_rows.json_lines, each)):
        pieces = (content[start : start + size] for start in range(0, len(content), size))
        assert [row.fields for row in reader("f", pieces)] == rows


def test_a_line_of_text_is_a_row_and_blank_lines_count(tmp_path):
    content = b"one\r\n\n two \n \nbad \xff\nlast"
    good, bad, numbers = one_file(tmp_path, "rows.txt", content)
    assert good == [{"text": "one"}, {"text": " two "}, {"text": "last"}] and numbers == [1, 3, 5, 6]
    assert len(bad) == 1 and "rows.txt, line 5: not UTF-8" in bad[0]


def test_values_of_csv_stay_text_and_a_field_may_be_5_mib_long(tmp_path):
    content = b"a,b\n007,\n" + b"x" * 5_000_000 + b",2\n\n"
    assert one_file(tmp_path, "rows.csv", content)[:2] == (
        [{"a": "007", "b": ""}, {"a": "x" * 5_000_000, "b": "2"}],
        [],
    )


# Malformed rows

GOOD = b'{"a": 1}\n'
BAD_LINES = {
    "broken": (b'{"a": 1,\n', "malformed JSON (Expecting property name"),
    "two objects": (b'{"a": 1} {"a": 2}\n', "malformed JSON (Extra data"),
    "a list": (b"[1]\n", "holds a list; there must be one object on every line"),
    "a number": (b" 7\n", "holds a int; there must be one object on every line"),
    "not UTF-8": (b'{"a": "\xff"}\n', "malformed JSON ('utf-8' codec can't decode byte 0xff"),
    "an encoded surrogate": (b'{"a": "\xed\xa0\x80"}\n', "malformed JSON ('utf-8' codec can't decode byte 0xed"),
    "half a character": (b'{"b": "x", "a": {"c": ["", "\\ud83d"]}}\n', "field 'a.c.1' holds half a character"),
    "its other half": (b'{"a": "\\uDE42 \\ud83d\\ude42"}\n', "field 'a' holds half a character"),
    "half a name": (b'{"\\ud83d": 1}\n', "field '\\ud83d' holds half a character"),
    "too deep": (b'{"a": ' + b"[" * 100_000 + b"\n", "malformed JSON (maximum recursion depth"),
    "too many digits": (b'{"a": ' + b"1" * 5000 + b"}\n", "malformed JSON (Exceeds the limit"),
    "NULs": (b"\0\0\0\0\n", "malformed JSON"),
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_and_costs_no_other(tmp_path, line, message, compression):
    content = packed(GOOD + b"\n" + line + GOOD, compression)
    good, bad, numbers = one_file(tmp_path, "rows.jsonl" + compression, content)
    assert good == [{"a": 1}] * 2 and numbers == [1, 3, 4]
    assert len(bad) == 1 and f"rows.jsonl{compression}, line 3: {message}" in bad[0]
    assert one_file(tmp_path, "rows.json" + compression, content)[0] == good


def test_numbers_that_are_none_repeated_names_and_whole_surrogate_pairs_are_no_faults(tmp_path):
    content = b'{"a": NaN, "b": -Infinity, "c": 1, "c": 2, "d": "\\ud83d\\ude42 \\\\ud83d"}'
    good, bad, _ = one_file(tmp_path, "rows.jsonl", content)
    assert bad == [] and good[0].pop("a") != 0 and good == [{"b": -float("inf"), "c": 2, "d": "🙂 \\ud83d"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows.csv"])
def test_a_line_of_40_mib_is_one_bad_row_and_takes_less_than_18_mib_of_memory(tmp_path, name):
    content = {"rows.jsonl": GOOD, "rows.txt": b"t\n", "rows.csv": b"c\n"}[name]
    (tmp_path / name).write_bytes(content * 2 + b"x" * (40 << 20) + b"\n" + content)
    tracemalloc.start()
    good, bad = parts(read(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(good) == (2 if name == "rows.csv" else 3) and len(bad) == 1 and "longer than 16 MiB" in bad[0]
    assert peak < 18 << 20


BROKEN_ARRAYS = {
    "cut": (b'[{"a": 1}, {"a": 1}, {"a"', "Expecting"),
    "cut after a comma": (b'[{"a": 1}, {"a": 1},', "Expecting value"),
    "cut after a row": (b'[{"a": 1}, {"a": 1}', ", or ] expected, not the end of the file"),
    "cut in a text": (b'[{"a": 1}, {"a": 1}, {"b": "x', "Unterminated string"),
    "broken in its midst": (b'[{"a": 1}, {"a": 1}, {"b": oops}, {"a": 2}' + b" " * 99 + b"]", "Expecting value"),
    "without a comma": (b'[{"a": 1}, {"a": 1} {"a": 2}]', ", or ] expected, not {"),
    "followed by text": (b'[{"a": 1}, {"a": 1}] oops', "[ or { expected, not o"),
    "two arrays in one object": (b'{"x": [{"a": 1}, {"a": 1}], "y": [{"a": 1}]}', "two lists of objects, 'x' and 'y'"),
    "no end of its frame": (b'{"x": [{"a": 1}, {"a": 1}]', ", or } expected, not the end of the file"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_ARRAYS.values(), ids=BROKEN_ARRAYS)
def test_the_two_rows_before_the_break_of_an_array_are_given_and_then_one_bad_row(tmp_path, content, message):
    good, bad, numbers = one_file(tmp_path, "rows.json", content)
    assert good == [{"a": 1}] * 2 and numbers == [1, 2, 3] and len(bad) == 1
    assert "rows.json, row 3: malformed JSON (" in bad[0] and message in bad[0] and "not read" in bad[0]


def test_a_bad_value_in_an_array_costs_no_other(tmp_path):
    content = b'[{"a": 1}, 7, null, {"a": "\xff"}, {"a": {"b": "\\ud83d"}}, {"a": 1}]'
    good, bad, numbers = one_file(tmp_path, "rows.json", content)
    assert good == [{"a": 1}] * 2 and numbers == [1, 2, 3, 4, 5, 6]
    messages = ["row 2: holds a int", "row 3: holds a NoneType", "row 4: field 'a' holds", "row 5: field 'a.b' holds"]
    assert all(message in text for message, text in zip(messages, bad, strict=True))


def test_a_row_of_an_array_that_is_longer_than_16_mib_ends_the_file(tmp_path):
    good, bad, _ = one_file(tmp_path, "rows.json", b'[{"a": 1}, {"a": "' + b"x" * (17 << 20) + b'"}]')
    assert good == [{"a": 1}] and len(bad) == 1 and "row 2: malformed JSON (longer than 16 MiB)" in bad[0]


BAD_CSV = {
    "too few": (b"1\n", "row 2: has 1 columns, and 2 are named"),
    "too many": (b"1,2,3\n", "row 2: has 3 columns, and 2 are named"),
    "NULs": (b"1,\0\n", "row 2: holds NUL bytes"),
    "not UTF-8": (b"1,\xff\n", "row 2: field 'b' is not UTF-8"),
    "an open quote": (b'1,"oops\n', "row 2: malformed CSV (unexpected end of data)"),
    "a stray quote": (b'"1"x,2\n', "row 2: malformed CSV (',' expected after '\"')"),
}


@pytest.mark.parametrize(("line", "message"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_bad_row_of_csv_costs_no_other(tmp_path, line, message):
    good, bad, numbers = one_file(tmp_path, "rows.csv", b'a,b\n1,"x\ny"\n' + line + b"5,6\n7,8")
    assert good == [{"a": "1", "b": "x\ny"}, {"a": "5", "b": "6"}, {"a": "7", "b": "8"}] and numbers == [1, 2, 3, 4]
    assert len(bad) == 1 and f"rows.csv, {message}" in bad[0]


def test_a_quote_left_open_before_quoted_rows_costs_its_own_row_alone(tmp_path):
    good, bad, _ = one_file(tmp_path, "rows.csv", b'a,b\n1,"oops\n"3","4"\n"5","6, ""and\n7"\n')
    assert good == [{"a": "3", "b": "4"}, {"a": "5", "b": '6, "and\n7'}] and len(bad) == 1


@pytest.mark.parametrize("header", [b"a,a\n", b"a,\xff\n", b"a,\0\n"])
def test_columns_without_proper_names_make_one_bad_row(tmp_path, header):
    good, bad, _ = one_file(tmp_path, "rows.csv", header + b"1,2\n")
    assert good == [] and len(bad) == 1 and "rows.csv, names of the columns: " in bad[0]


def scrambled(rows: int) -> bytes:
    """JSON lines that do not compress well, so that a cut file still has many blocks."""
    return b"".join(b'{"a": "%s"}\n' % os.urandom(30).hex().encode() for _ in range(rows))


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "followed by garbage": lambda content: content + b"garbage!",
    "wrong at its end": lambda content: content[:-8] + b"\1\2\3\4" + content[-4:],
}


@pytest.mark.parametrize(
    ("compression", "damage"),
    [(".gz", "cut"), (".gz", "followed by garbage"), (".gz", "wrong at its end")]
    + [(".zst", "cut"), (".zst", "followed by garbage")],
)
def test_a_damaged_compressed_file_gives_its_rows_then_one_bad_row_and_the_next_file_follows(
    tmp_path, compression, damage
):
    content = scrambled(20_000)
    whole = packed(content, compression)
    (tmp_path / f"a.jsonl{compression}").write_bytes(DAMAGES[damage](whole))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    rows = read(tmp_path)
    good, bad = parts(rows)
    assert len(bad) == 1 and f"a.jsonl{compression}, after row {len(good) - 1}: cannot be read any further" in bad[0]
    assert good[:-1] == [json.loads(line) for line in content.splitlines()[: len(good) - 1]] and good[-1] == {"a": 1}
    # Of a cut file about half: zstd gives whole blocks of 128 KiB.
    assert len(good) - 1 == 20_000 if damage != "cut" else 7_000 < len(good) < 11_000


def test_a_line_cut_by_the_damage_is_no_row(tmp_path, monkeypatch):
    def cut(*_):
        yield GOOD + b'{"a": 2'
        raise EOFError("cut")

    monkeypatch.setattr(lines, "blocks", cut)
    good, bad, numbers = one_file(tmp_path, "rows.jsonl", b"")
    assert good == [{"a": 1}] and numbers == [1, 2] and len(bad) == 1


def test_two_compressed_parts_in_one_file_are_both_read(tmp_path):
    for compression in (".gz", ".zst"):
        content = packed(GOOD * 3, compression) + packed(GOOD * 2, compression)
        assert one_file(tmp_path, "rows.jsonl" + compression, content)[0] == [{"a": 1}] * 5


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.parquet.gz", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_what_its_name_says_is_one_bad_row(tmp_path, name):
    (tmp_path / name).write_bytes(b"hello world\n" * 99)
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    good, bad = parts(read(tmp_path))
    assert good == [{"a": 1}] and len(bad) == 1 and f"{name}, after row 0: cannot be read any further: " in bad[0]


def test_utf_16_is_named(tmp_path):
    _, bad, _ = one_file(tmp_path, "rows.csv", "a,b\n1,2\n".encode("utf-16"))
    assert len(bad) == 1 and "the text is UTF-16; save it as UTF-8" in bad[0]


@pytest.mark.parametrize("ending", [".parquet", ".feather", ".arrow"])
def test_a_binary_file_that_is_cut_off_is_one_bad_row(tmp_path, ending):
    content = encoded(ROWS, ending)
    good, bad, _ = one_file(tmp_path, "rows" + ending, content[: len(content) * 2 // 3])
    assert len(bad) == 1 and "cannot be read any further" in bad[0]
    assert good == (ROWS[: len(good)] if ending == ".arrow" else []) and len(good) in (0, 300)


def test_a_damaged_row_group_costs_no_other(tmp_path):
    sink = pa.BufferOutputStream()
    table = pa.table({"a": [os.urandom(20).hex() for _ in range(900)]})
    pa.parquet.write_table(table, sink, row_group_size=300, use_dictionary=False, write_page_checksum=True)
    content = bytearray(sink.getvalue().to_pybytes())
    start = pa.parquet.ParquetFile(sink.getvalue()).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 20] = b"\xff" * 20
    good, bad, numbers = one_file(tmp_path, "rows.parquet", bytes(content))
    assert [row["a"] for row in good] == table["a"].to_pylist()[:300] + table["a"].to_pylist()[600:]
    assert len(bad) == 1 and "rows.parquet, rows 301 to 600: cannot be read" in bad[0]
    assert numbers == [*range(1, 302), *range(601, 901)]


def test_text_in_parquet_that_is_not_utf_8_spoils_its_own_row_alone(tmp_path):
    binary = pa.array([b"x", b"\xff", b"z"])
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pa.parquet.write_table(pa.table({"n": [1, 2, 3], "a": text}), tmp_path / "rows.parquet")
    good, bad = parts(read(tmp_path / "rows.parquet"))
    assert good == [{"n": 1, "a": "x"}, {"n": 3, "a": "z"}]
    assert len(bad) == 1 and "rows.parquet, row 2: field 'a' cannot be read: 'utf-8' codec" in bad[0]


# Places


def lay_out(tmp_path, *names: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"file": name}) + "\n")


def test_folders_and_globs_are_read_in_the_order_of_their_names_through_all_levels(tmp_path):
    lay_out(tmp_path, "c.jsonl", "a/2.json", "a/10.jsonl", "b.json", "README.md", ".hidden.jsonl", ".git/x.json")
    lay_out(tmp_path, "dataset_infos.json")
    os.symlink(tmp_path, tmp_path / "a" / "up")  # and so on without end
    in_order = ["a/10.jsonl", "a/2.json", "b.json", "c.jsonl"]
    assert [row.fields["file"] for row in read(tmp_path)] == in_order
    assert [row.file for row in read(tmp_path)] == [str(tmp_path / name) for name in in_order]
    os.unlink(tmp_path / "a" / "up")
    assert [row.fields["file"] for row in read(tmp_path / "**" / "*.json*")] == [*in_order[:3], "c.jsonl"] + [
        "dataset_infos.json"
    ]
    assert [row.fields["file"] for row in read(tmp_path / "*")] == ["b.json", "c.jsonl", "dataset_infos.json"]
    assert [row.fields["file"] for row in read(tmp_path / "[bc].json*")] == ["b.json", "c.jsonl"]


def test_a_file_whose_name_holds_a_bracket_is_found(tmp_path):
    lay_out(tmp_path, "rows[1].jsonl")
    assert len(read(tmp_path / "rows[1].jsonl")) == 1


def test_the_built_in_set_is_read_by_its_seed_and_rows():
    rows = read("builtin:assistant", builtin_seed=3, builtin_rows=20)
    assert [row.fields for row in rows] == list(assistant.generate(3, 20)) and rows[19].number == 20
    with pytest.raises(ValueError, match="no built-in set 'builtin:assistent', only 'builtin:assistant'"):
        read("builtin:assistent")


def saved(tmp_path, datasets):
    sets = {
        split: datasets.Dataset.from_list([{"a": f"{split}{i}"} for i in range(5)], split=split)
        for split in ("train", "test")
    }
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "both", num_shards={"train": 2, "test": 1})
    sets["test"].save_to_disk(tmp_path / "one")


def test_a_data_set_that_was_saved_to_disk_is_read_by_its_split(tmp_path):
    saved(tmp_path, pytest.importorskip("datasets"))
    assert [row.fields["a"] for row in read(tmp_path / "both")] == [f"train{i}" for i in range(5)]
    assert [row.fields["a"] for row in read(tmp_path / "both", split="test")] == [f"test{i}" for i in range(5)]
    assert [row.fields["a"] for row in read(tmp_path / "one")] == [f"test{i}" for i in range(5)]
    with pytest.raises(ValueError, match="both: has no split 'dev', only train, test: set data.sources.split"):
        read(tmp_path / "both", split="dev")
    with pytest.raises(ValueError, match="one: has no split 'dev', only test: set data.sources.split"):
        read(tmp_path / "one", split="dev")
    keys = {split: key_of(tmp_path / "both", tmp_path, split=split) for split in ("train", "test")}
    assert keys["train"] != keys["test"] == key_of(tmp_path / "one", tmp_path)


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_another_name_is_read_from_the_hub_at_once_or_streaming(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return [{"a": 1}, {"a": 2}]

    hub(monkeypatch, load)
    rows = [Row("someone/pairs (test)", 1, {"a": 1}), Row("someone/pairs (test)", 2, {"a": 2})]
    assert read("someone/pairs", split="test") == rows
    assert list(places.read_hub_stream("someone/pairs", "en", "test")) == rows
    args, options = ("someone/pairs", "en"), {"split": "test", "streaming": True}
    assert asked == [(("someone/pairs", None), {"split": "test"}), (args, options)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no net"), "'someone/pairs' is no file here, and cannot be had from the hub: no net"),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']"),
            r"hub data set 'someone/pairs': Config .*\['en', 'de'\]; set data.sources.name to one of them",
        ),
        (
            ValueError("BuilderConfig 'fr' not found. Available: ['en', 'de']"),
            r"hub data set 'someone/pairs': .* Available: \['en', 'de'\]; set data.sources.name to one of them",
        ),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "'train'].; set data.sources.split"[7:]),
    ],
)
def test_a_hub_set_that_cannot_be_had_is_named_with_the_mend(monkeypatch, error, message):
    def load(*_, **__):
        raise error

    hub(monkeypatch, load)
    for reader in (read, lambda path: places.read_hub_stream(path, "", "train")):
        with pytest.raises(ValueError, match=message):
            reader("someone/pairs")


def test_a_stream_that_breaks_off_says_after_which_row(monkeypatch):
    def rows():
        yield {"a": 1}
        raise ConnectionError("no net")

    hub(monkeypatch, lambda *_, **__: rows())
    stream = places.read_hub_stream("someone/pairs", "", "train")
    assert next(stream).fields == {"a": 1}
    with pytest.raises(ValueError, match="'someone/pairs' broke off after row 1 of train: no net"):
        next(stream)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such.jsonl", "no/such.jsonl: no such file"),
        ("./none", "./none: no such file"),
        ("a/b/c", "a/b/c: no such file"),
        ("no*.jsonl", r"no\*.jsonl: matches no file"),
        ("rows.xml", "rows.xml: unknown ending; the known ones are .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet"),
        ("rows.gz", "rows.gz: unknown ending"),
        ("folder", "folder: holds no file of a known ending; the known ones are"),
        ("*.xml", r"\*.xml: holds no file of a known ending"),
        ("empty.jsonl", "empty.jsonl: holds no rows"),
        ("empty.json", "empty.json: holds no rows"),
        ("empty.csv", "empty.csv: holds no rows"),
        ("blank.jsonl", "blank.jsonl: holds no rows"),
        ("head.csv", "head.csv: holds no rows"),
        ("array.json", "array.json: holds no rows"),
        ("none.parquet", "none.parquet: holds no rows"),
    ],
)
def test_a_place_that_cannot_be_used_is_named_with_the_mend_and_never_asked_of_the_hub(
    tmp_path, monkeypatch, path, message
):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "folder").mkdir()
    contents = {"rows.xml": "x", "rows.gz": "x", "folder/notes.md": "x", "blank.jsonl": "\n \n", "head.csv": "a,b\n"}
    for name, text in (
        contents.items() | {(f"empty.{e}", "") for e in ("jsonl", "json", "csv")} | {("array.json", "[]")}
    ):
        (tmp_path / name).write_text(text)
    pa.parquet.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=message):
        places.read(path)


def test_an_empty_file_among_others_is_no_fault(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    assert parts(read(tmp_path)) == ([{"a": 1}], [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path):
    lay_out(tmp_path, "a/b.jsonl")
    for place, mode in ((tmp_path / "a" / "b.jsonl", 0o600), (tmp_path / "a", 0o700)):
        place.chmod(0)
        try:
            for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b.jsonl"):
                with pytest.raises(ValueError, match="no permission to read it; grant it"):
                    places.read(str(path))
        finally:
            place.chmod(mode)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "no permission to read it; grant it, as with chmod"),
        (FileNotFoundError(2, "No such file or directory"), "b.jsonl: no such file"),
        (OSError(5, "Input/output error"), "b.jsonl: cannot be read: Input/output error"),
    ],
)
def test_a_file_that_cannot_be_opened_when_its_turn_comes_stops_the_reading(tmp_path, monkeypatch, error, message):
    lay_out(tmp_path, "a.jsonl", "b.jsonl")

    def refuse(path, *args):
        if path.endswith("b.jsonl"):
            raise error
        return open(path, *args)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    rows = places.read(str(tmp_path))
    assert next(rows).fields == {"file": "a.jsonl"}
    with pytest.raises(ValueError, match=message):
        next(rows)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="no permission to read it; grant it, as with chmod"):
        places.read(str(tmp_path))


# Memory


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "framed.json"])
def test_a_file_of_50_mib_is_read_in_4_mib_of_memory(tmp_path, name):
    row = {"prompt": "p" * 9_000, "answer": "a" * 1_000}
    count = 5300
    with open(tmp_path / name, "w") as file:
        if name.endswith(".csv"):
            file.write("prompt,answer\n" + f"{row['prompt']},{row['answer']}\n" * count)
        elif name == "rows.jsonl":
            file.write((json.dumps(row) + "\n") * count)
        else:
            before, after = ("[", "]") if name == "rows.json" else ('{"n": 1, "data": [', "]}")
            file.write(before + ", ".join([json.dumps(row)] * count) + after)
    assert os.path.getsize(tmp_path / name) > 50 << 20
    tracemalloc.start()
    assert sum(1 for given in places.read(str(tmp_path / name)) if given.fields == row) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# Keys of contents


def key_of(path, tmp_path, **options) -> str:
    arguments = {"name": "", "split": "train", "builtin_seed": 0, "builtin_rows": 50, "memo": tmp_path / "memo" / "m"}
    return places.content_key(str(path), **{**arguments, **options})


def test_a_copy_has_the_same_key_and_one_changed_byte_another(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "copy.jsonl").write_bytes(GOOD)
    key = key_of(tmp_path / "a.jsonl", tmp_path)
    assert key == key_of(tmp_path / "copy.jsonl", tmp_path) and len(key) == 32
    (tmp_path / "a.jsonl").write_bytes(GOOD.replace(b"1", b"2"))  # at once, and of the same size
    changed = key_of(tmp_path / "a.jsonl", tmp_path)
    assert changed != key and key_of(tmp_path / "[ac]*.jsonl", tmp_path) not in (key, changed)


def test_the_order_of_the_files_and_their_format_count(tmp_path):
    for folder, names in {"x": ("a.jsonl", "b.jsonl"), "y": ("b.jsonl", "a.jsonl"), "z": ("a.txt", "b.txt")}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / names[0]).write_bytes(GOOD)
        (tmp_path / folder / names[1]).write_bytes(GOOD * 2)
    assert len({key_of(tmp_path / folder, tmp_path) for folder in "xyz"}) == 3


def test_the_key_of_the_built_in_set_is_that_of_its_seed_and_rows(tmp_path):
    keys = [key_of("builtin:assistant", tmp_path, builtin_seed=s, builtin_rows=r) for s, r in [(0, 9), (1, 9), (0, 8)]]
    assert len(set(keys)) == 3 and keys[0] == key_of("builtin:assistant", tmp_path, builtin_seed=0, builtin_rows=9)


def test_the_key_of_a_hub_set_is_that_of_its_name_and_fingerprint(tmp_path, monkeypatch):
    hub(monkeypatch, lambda path, name, split: types.SimpleNamespace(_fingerprint="f" + path[-1]))
    asked = [("x/a", "", "train"), ("x/b", "", "train"), ("x/a", "en", "train"), ("x/a", "", "test")]
    assert len({key_of(path, tmp_path, name=name, split=split) for path, name, split in asked}) == 4


def test_the_key_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        key_of(tmp_path / "none.jsonl", tmp_path)


def old(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_a_file_in_the_memo_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -1)
    memo, path = tmp_path / "memo.json", old(tmp_path / "a.jsonl", GOOD)
    (first,) = digests.file_digests([path], memo)
    known = json.loads(memo.read_bytes())
    assert known[path][-1] == first
    known[path][-1] = "from the memo"
    memo.write_text(json.dumps(known))
    assert digests.file_digests([path], memo) == ["from the memo"]
    time.sleep(0.02)  # longer than the clock of the file system stands still
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert digests.file_digests([path], memo) == [first]


def test_a_file_that_has_just_changed_is_not_kept_in_the_memo(tmp_path):
    digests.file_digests([old(tmp_path / "a.jsonl", GOOD)], tmp_path / "memo.json")
    assert not (tmp_path / "memo.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\0", b'{"FILE": 7}', b'{"FILE": []}', b'{"FILE": [1, 2]}']
)
def test_a_broken_memo_is_made_anew(tmp_path, monkeypatch, content):
    monkeypatch.setattr(digests, "SETTLED", -1)
    memo, path = tmp_path / "memo.json", old(tmp_path / "a.jsonl", GOOD)
    memo.write_bytes(content.replace(b"FILE", path.encode()))
    (digest,) = digests.file_digests([path], memo)
    assert json.loads(memo.read_bytes())[path][-1] == digest and len(digest) == 32
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "memo.json"]


def test_the_entries_that_another_process_wrote_meanwhile_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -1)
    memo = tmp_path / "memo.json"
    inner = digests._state

    def meanwhile(file):
        memo.write_text('{"/other": [1, 2, 3, 4, "digest"]}')
        return inner(file)

    monkeypatch.setattr(digests, "_state", meanwhile)
    path = old(tmp_path / "a.jsonl", GOOD)
    digests.file_digests([path], memo)
    assert set(json.loads(memo.read_bytes())) == {"/other", path}


def test_a_memo_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -1)
    path = old(tmp_path / "a.jsonl", GOOD)  # also in the place of a folder
    assert len(digests.file_digests([path], tmp_path / "a.jsonl" / "memo.json")) == 1


def test_lines_are_those_of_split_however_they_are_cut_into_blocks(rng):
    for _ in range(200):
        content = bytes(rng.choice([97, 98, 10], size=rng.integers(0, 30), p=[0.4, 0.3, 0.3]).tolist())
        cuts = sorted(rng.integers(0, len(content) + 1, size=5).tolist())
        pieces = [content[start:end] for start, end in itertools.pairwise([0, *cuts, len(content)])]
        assert list(lines.lines(iter(pieces))) == content.splitlines(keepends=True)
