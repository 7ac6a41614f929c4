"""File readers: equal rows from every format and compression, and no good row lost to a bad one."""

import csv
import gzip
import io
import itertools
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_jax.data import json_rows, sources
from rlhf_jax.data.records import BadRow, Row

ROWS = [{"prompt": f"q{i} 你好 🙂", "answer": 'two "lines",\r\nand\ta tab' * (i % 3)} for i in range(700)]
ENDINGS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"]


def compress(content: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(content)
    if compression == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content


def encode_rows(rows: list[dict], ending: str) -> bytes:
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
    return list(sources.read_rows(str(path), **options))


def parts(rows: list[Row]) -> tuple[list, list[str]]:
    """(fields of the good rows, messages of the bad rows)."""
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
    path.write_bytes(compress(encode_rows(ROWS, ending), compression))
    unit = "line" if ending in (".jsonl", ".ndjson") else "row"
    assert read(path) == [Row(str(path), number, fields, unit) for number, fields in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path, ending, compression):
    content = compress(b"\xef\xbb\xbf" + encode_rows(ROWS[:3], ending), compression)
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
def test_a_json_file_can_be_an_array_lines_or_an_object_that_holds_an_array(tmp_path, text):
    good, bad, numbers = one_file(tmp_path, "rows.json", text.encode())
    assert (good, bad) == ([{"a": 1}, {"a": 2}], [])
    assert numbers == ([2, 4] if text.startswith(" \n") else [1, 2])


def test_a_json_file_of_one_dialogue_is_one_row_not_one_row_per_turn(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert one_file(tmp_path, "rows.json", json.dumps(row).encode()) == ([row], [], [1])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=5), st.data())
def test_json_rows_do_not_depend_on_whitespace_or_block_boundaries(monkeypatch, rows, data):
    indent, ascii_only = data.draw(st.sampled_from([None, 0, 1])), data.draw(st.booleans())
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    each = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
    size = data.draw(st.integers(1, 40))
    monkeypatch.setattr(json_rows, "BLOCK_BYTES", size)
    for reader, content in ((json_rows.json_rows, array), (json_rows.json_lines, each)):
        pieces = (content[start : start + size] for start in range(0, len(content), size))
        assert [row.fields for row in reader("f", pieces)] == rows


def test_each_line_of_text_is_a_row_and_blank_lines_count_in_row_numbers(tmp_path):
    content = b"one\r\n\n two \n \nbad \xff\nlast"
    good, bad, numbers = one_file(tmp_path, "rows.txt", content)
    assert good == [{"text": "one"}, {"text": " two "}, {"text": "last"}] and numbers == [1, 3, 5, 6]
    assert len(bad) == 1 and "rows.txt, line 5: not UTF-8" in bad[0]


def test_csv_values_stay_text_and_a_field_can_be_5_mib_long(tmp_path):
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
    "a lone surrogate": (b'{"b": "x", "a": {"c": ["", "\\ud83d"]}}\n', "field 'a.c.1' holds a lone surrogate"),
    "a lone low surrogate": (b'{"a": "\\uDE42 \\ud83d\\ude42"}\n', "field 'a' holds a lone surrogate"),
    "a lone surrogate in a name": (b'{"\\ud83d": 1}\n', "field '\\ud83d' holds a lone surrogate"),
    "too deep": (b'{"a": ' + b"[" * 100_000 + b"\n", "malformed JSON (maximum recursion depth"),
    "too many digits": (b'{"a": ' + b"1" * 5000 + b"}\n", "malformed JSON (Exceeds the limit"),
    "NULs": (b"\0\0\0\0\n", "malformed JSON"),
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_reported_and_no_other_line_is_lost(tmp_path, line, message, compression):
    content = compress(GOOD + b"\n" + line + GOOD, compression)
    good, bad, numbers = one_file(tmp_path, "rows.jsonl" + compression, content)
    assert good == [{"a": 1}] * 2 and numbers == [1, 3, 4]
    assert len(bad) == 1 and f"rows.jsonl{compression}, line 3: {message}" in bad[0]
    assert one_file(tmp_path, "rows.json" + compression, content)[0] == good


def test_nan_and_infinity_repeated_names_and_surrogate_pairs_are_valid(tmp_path):
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
    "truncated after a comma": (b'[{"a": 1}, {"a": 1},', "Expecting value"),
    "truncated after a row": (b'[{"a": 1}, {"a": 1}', ", or ] expected, not the end of the file"),
    "truncated in a text": (b'[{"a": 1}, {"a": 1}, {"b": "x', "Unterminated string"),
    "broken in the middle": (b'[{"a": 1}, {"a": 1}, {"b": oops}, {"a": 2}' + b" " * 99 + b"]", "Expecting value"),
    "without a comma": (b'[{"a": 1}, {"a": 1} {"a": 2}]', ", or ] expected, not '{'"),
    "followed by bytes": (b'[{"a": 1}, {"a": 1}] \xff', "[ or { expected, not '\\udcff'"),
    "followed by text": (b'[{"a": 1}, {"a": 1}] oops', "[ or { expected, not 'o'"),
    "two arrays in one object": (b'{"x": [{"a": 1}, {"a": 1}], "y": [{"a": 1}]}', "two lists of objects, 'x' and 'y'"),
    "no end of the enclosing object": (b'{"x": [{"a": 1}, {"a": 1}]', ", or } expected, not the end of the file"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_ARRAYS.values(), ids=BROKEN_ARRAYS)
def test_a_broken_array_yields_the_two_rows_before_the_break_then_one_bad_row(tmp_path, content, message):
    good, bad, numbers = one_file(tmp_path, "rows.json", content)
    assert good == [{"a": 1}] * 2 and numbers == [1, 2, 3] and len(bad) == 1
    assert "rows.json, row 3: malformed JSON (" in bad[0] and message in bad[0] and "not read" in bad[0]


def test_no_other_row_is_lost_to_a_bad_value_in_an_array(tmp_path):
    content = b'[{"a": 1}, 7, null, {"a": "\xff"}, {"a": {"b": "\\ud83d"}}, {"a": 1}]'
    good, bad, numbers = one_file(tmp_path, "rows.json", content)
    assert good == [{"a": 1}] * 2 and numbers == [1, 2, 3, 4, 5, 6]
    messages = ["row 2: holds a int", "row 3: holds a NoneType", "row 4: field 'a' holds", "row 5: field 'a.b' holds"]
    assert all(message in text for message, text in zip(messages, bad, strict=True))


def test_an_array_row_longer_than_16_mib_ends_the_file(tmp_path):
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
def test_no_other_row_is_lost_to_a_bad_csv_row(tmp_path, line, message):
    good, bad, numbers = one_file(tmp_path, "rows.csv", b'a,b\n1,"x\ny"\n' + line + b"5,6\n7,8")
    assert good == [{"a": "1", "b": "x\ny"}, {"a": "5", "b": "6"}, {"a": "7", "b": "8"}] and numbers == [1, 2, 3, 4]
    assert len(bad) == 1 and f"rows.csv, {message}" in bad[0]


def test_an_unclosed_quote_before_quoted_rows_loses_only_its_own_row(tmp_path):
    good, bad, _ = one_file(tmp_path, "rows.csv", b'a,b\n1,"oops\n"3","4"\n"5","6, ""and\n7"\n')
    assert good == [{"a": "3", "b": "4"}, {"a": "5", "b": '6, "and\n7'}] and len(bad) == 1


@pytest.mark.parametrize("header", [b"a,a\n", b"a,\xff\n", b"a,\0\n"])
def test_columns_without_valid_names_give_one_bad_row(tmp_path, header):
    good, bad, _ = one_file(tmp_path, "rows.csv", header + b"1,2\n")
    assert good == [] and len(bad) == 1 and "rows.csv, names of the columns: " in bad[0]


def random_lines(rows: int) -> bytes:
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
def test_a_damaged_compressed_file_yields_its_rows_then_one_bad_row_then_the_next_file(tmp_path, compression, damage):
    content = random_lines(20_000)
    whole = compress(content, compression)
    (tmp_path / f"a.jsonl{compression}").write_bytes(DAMAGES[damage](whole))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    rows = read(tmp_path)
    good, bad = parts(rows)
    assert len(bad) == 1 and f"a.jsonl{compression}, after row {len(good) - 1}: cannot be read any further" in bad[0]
    assert good[:-1] == [json.loads(line) for line in content.splitlines()[: len(good) - 1]] and good[-1] == {"a": 1}
    # About half of a truncated file: zstd yields whole blocks of 128 KiB.
    assert len(good) - 1 == 20_000 if damage != "cut" else 7_000 < len(good) < 11_000


def test_a_line_truncated_by_the_damage_is_not_a_row(tmp_path, monkeypatch):
    def cut(*_):
        yield GOOD + b'{"a": 2'
        raise EOFError("cut")

    monkeypatch.setattr(json_rows, "byte_blocks", cut)
    good, bad, numbers = one_file(tmp_path, "rows.jsonl", b"any")
    assert good == [{"a": 1}] and numbers == [1, 2] and len(bad) == 1


def test_two_compressed_parts_in_one_file_are_both_read(tmp_path):
    for compression in (".gz", ".zst"):
        content = compress(GOOD * 3, compression) + compress(GOOD * 2, compression)
        assert one_file(tmp_path, "rows.jsonl" + compression, content)[0] == [{"a": 1}] * 5


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.parquet.gz", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_whose_content_does_not_match_its_extension_is_one_bad_row(tmp_path, name):
    (tmp_path / name).write_bytes(b"hello world\n" * 99)
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    good, bad = parts(read(tmp_path))
    assert good == [{"a": 1}] and len(bad) == 1 and f"{name}, after row 0: cannot be read any further: " in bad[0]


def test_utf_16_is_reported_by_name(tmp_path):
    _, bad, _ = one_file(tmp_path, "rows.csv", "a,b\n1,2\n".encode("utf-16"))
    assert len(bad) == 1 and "the text is UTF-16; save it as UTF-8" in bad[0]


@pytest.mark.parametrize("ending", [".parquet", ".feather", ".arrow"])
def test_a_truncated_binary_file_is_one_bad_row(tmp_path, ending):
    content = encode_rows(ROWS, ending)
    good, bad, _ = one_file(tmp_path, "rows" + ending, content[: len(content) * 2 // 3])
    assert len(bad) == 1 and "cannot be read any further" in bad[0]
    assert good == (ROWS[: len(good)] if ending == ".arrow" else []) and len(good) in (0, 300)


def test_arrow_text_with_wrong_offsets_gives_bad_rows_and_does_not_crash_the_process(tmp_path):
    bounds = pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in (0, 1, 2_000_000_000, 3)))
    column = pa.Array.from_buffers(pa.string(), 3, [None, bounds, pa.py_buffer(b"xyz")])
    batch = pa.RecordBatch.from_arrays([column], ["a"])
    with pa.ipc.new_stream(tmp_path / "rows.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    good, bad = parts(read(tmp_path / "rows.arrow"))
    assert good == [{"a": "x"}] and len(bad) == 2 and "rows.arrow, row 2: field 'a' cannot be read: " in bad[0]


def test_no_other_row_group_is_lost_to_a_damaged_one(tmp_path):
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


def test_parquet_text_that_is_not_utf_8_invalidates_only_its_own_row(tmp_path):
    binary = pa.array([b"x", b"\xff", b"z"])
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pa.parquet.write_table(pa.table({"n": [1, 2, 3], "a": text}), tmp_path / "rows.parquet")
    good, bad = parts(read(tmp_path / "rows.parquet"))
    assert good == [{"n": 1, "a": "x"}, {"n": 3, "a": "z"}]
    assert len(bad) == 1 and "rows.parquet, row 2: field 'a' cannot be read: Invalid UTF8" in bad[0]


def test_lines_equal_those_of_bytes_split_at_any_block_boundaries(rng):
    for _ in range(200):
        content = bytes(rng.choice([97, 98, 10], size=rng.integers(0, 30), p=[0.4, 0.3, 0.3]).tolist())
        cuts = sorted(rng.integers(0, len(content) + 1, size=5).tolist())
        pieces = [content[start:end] for start, end in itertools.pairwise([0, *cuts, len(content)])]
        assert list(json_rows.split_lines(iter(pieces))) == content.splitlines(keepends=True)
