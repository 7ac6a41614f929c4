"""Files of rows: JSON lines, JSON, CSV, TSV, text, Parquet and Arrow, plain or compressed, as `Row`s.

Reading is lazy with constant memory: one block, row or batch of rows at a time. Malformed data becomes a `Row` that
holds a `BadRow`, and reading continues after it where the format allows to find the next row.
"""

from __future__ import annotations

import csv
import mmap
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from rlhf_jax.data.json_rows import (
    BLOCK_BYTES,
    COMPRESSIONS,
    DAMAGE,
    MAX_ROW,
    TOO_LONG,
    byte_blocks,
    find_broken_text,
    is_damage,
    json_lines,
    json_rows,
    split_lines,
    text_blocks,
)
from rlhf_jax.data.records import BadRow, Row

BATCH = 256  # rows of a binary file that are converted to Python objects at a time


def file_format(path: str) -> tuple[str, str] | None:
    """ "a/b.JSONL.gz" -> (".jsonl", ".gz"): ending and compression, "" for none. None unless the ending is known."""
    name = PurePath(path.lower())
    compression = name.suffix if name.suffix in COMPRESSIONS else ""
    ending = PurePath(name.stem).suffix if compression else name.suffix
    return (ending, compression) if ending in ENDINGS else None


def read_file(path: str) -> Iterator[Row]:
    """The rows of a file of known ending. ValueError if it cannot be opened or the system fails to read it."""
    ending, compression = file_format(path)
    number = 0
    try:
        with open(path, "rb") as file:
            try:
                if ending in TEXT:
                    rows = TEXT[ending](path, text_blocks(file, compression))
                else:
                    rows = _read_binary(BINARY[ending], path, file, compression)
                for row in rows:
                    number = row.number
                    yield row
            except DAMAGE as error:
                if not is_damage(error):
                    raise
                what = " ".join(str(error).split())
                yield Row(path, number + 1, BadRow(f"{path}, after row {number}: cannot be read any further: {what}"))
    except OSError as error:
        raise ValueError(unreadable_message(path, error)) from error


def unreadable_message(path: str, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{path}: no permission to read it; grant it, as with chmod +r (and +x for folders)"
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file"
    return f"{path}: cannot be read: {error.strerror}"


def _read_binary(reader: Callable, path: str, file: BinaryIO, compression: str) -> Iterator[Row]:
    """Compressed files are unpacked into an anonymous temporary file, because these formats need random access."""
    if not compression:
        yield from reader(path, file)
        return
    with tempfile.TemporaryFile() as whole:
        whole.writelines(byte_blocks(file, compression))
        whole.seek(0)
        yield from reader(path, whole)


def _text_rows(path: str, text: Iterator[bytes]) -> Iterator[Row]:
    """One row {"text": line} per line; blank lines are skipped, but count in `Row.number`."""
    for number, line in enumerate(split_lines(text), start=1):
        where = f"{path}, line {number}"
        try:
            if line is None:
                yield Row(path, number, BadRow(f"{where}: {TOO_LONG}"))
            elif line.strip():
                yield Row(path, number, {"text": line.decode().rstrip("\r\n")}, "line")
        except UnicodeDecodeError as error:
            yield Row(path, number, BadRow(f"{where}: not UTF-8 ({error})"))


def _csv_rows(path: str, text: Iterator[bytes], *, delimiter: str) -> Iterator[Row]:
    """Rows under a first row of names, all values text; `Row.number` counts the rows, without the first.

    An unclosed quotation mark would extend its row to the next mark; as that makes no valid row, the row is bad and
    reading continues at its second line, so that only one row is lost.
    """
    csv.field_size_limit(MAX_ROW)
    source, waiting, taken = split_lines(text), deque[bytes | None](), list[bytes | None]()

    def feed() -> Iterator[str]:
        while waiting or (line := next(source, ...)) is not ...:
            taken.append(waiting.popleft() if waiting else line)
            yield (taken[-1] or b"").decode("utf-8", "surrogateescape")

    def rows() -> Iterator[list[str] | str]:
        """The values of each row, or a text that says what is wrong with it."""
        reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        while True:
            taken.clear()
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                waiting.extendleft(reversed(taken[1:]))
                reader = csv.reader(feed(), delimiter=delimiter, strict=True)
                yield TOO_LONG if None in taken else f"malformed CSV ({error})"
                continue
            if None in taken:
                yield TOO_LONG
            elif any(b"\0" in line for line in taken):
                yield "holds NUL bytes"
            elif values:
                yield values

    names: list[str] | None = None
    for number, values in enumerate(rows()):
        where = f"{path}, row {number}"
        if names is None:
            if isinstance(values, str) or len(set(values)) < len(values) or find_broken_text(values) is not None:
                what = values if isinstance(values, str) else f"columns must be named once, in UTF-8, not {values}"
                yield Row(path, 1, BadRow(f"{path}, names of the columns: {what}"))
                return
            names = values
        elif isinstance(values, str):
            yield Row(path, number, BadRow(f"{where}: {values}"))
        elif len(values) != len(names):
            yield Row(path, number, BadRow(f"{where}: has {len(values)} columns, and {len(names)} are named"))
        else:
            fields = dict(zip(names, values, strict=True))
            name = find_broken_text(fields)
            yield Row(path, number, fields if name is None else BadRow(f"{where}: field {name!r} is not UTF-8"))


def _parquet_rows(path: str, file: BinaryIO) -> Iterator[Row]:
    """A damaged group of rows is one bad row, and the next group is read."""
    # Without pre-buffering, and through a small buffer, no column of a group is in memory whole.
    table = pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)
    _check_names(table.schema_arrow)
    first = 0
    for group in range(table.num_row_groups):
        given, first = first, first + table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(BATCH, row_groups=[group]):
                yield from _batch_rows(path, given, batch)
                given += batch.num_rows
        except DAMAGE as error:
            if not is_damage(error):
                raise
            what = f"rows {given + 1} to {first}: cannot be read: {' '.join(str(error).split())}"
            yield Row(path, given + 1, BadRow(f"{path}, {what}"))


def _arrow_rows(path: str, file: BinaryIO) -> Iterator[Row]:
    """Arrow's file format (Feather) or its stream format, as `save_to_disk` writes it."""
    if not (magic := file.read(6)):
        return
    # Mapped: a batch may be as large as the file, and only the slice that is read comes into memory.
    source = pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(source)
        _check_names(reader.schema)
        batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = pa.ipc.open_stream(source)
        _check_names(batches.schema)
    given = 0
    for batch in batches:
        checked = _is_valid(batch)
        for start in range(0, batch.num_rows, BATCH):
            yield from _batch_rows(path, given + start, batch.slice(start, BATCH), checked=checked)
        given += batch.num_rows


def _check_names(schema: pa.Schema) -> None:
    """ArrowInvalid if two columns have one name: only the last of them would be read."""
    if len(set(schema.names)) < len(schema.names):
        raise pa.ArrowInvalid(f"columns must be named once, not {schema.names}")


# Raised for values that Python cannot represent, such as text that is not UTF-8.
CONVERSION_ERRORS = (ValueError, OverflowError, pa.ArrowException)


def _batch_rows(path: str, given: int, batch: pa.RecordBatch, *, checked: bool = True) -> Iterator[Row]:
    """The rows of a batch that comes after `given` others; `checked`: it `_is_valid`, or is from the Parquet reader."""
    try:
        if not (checked or _is_valid(batch)):
            raise pa.ArrowInvalid
        rows = batch.to_pylist()
    except CONVERSION_ERRORS:
        rows = [_row_fields(batch.slice(i, 1), f"{path}, row {given + i + 1}") for i in range(batch.num_rows)]
    for number, fields in enumerate(rows, start=given + 1):
        yield Row(path, number, fields)


def _is_valid(batch: pa.RecordBatch) -> bool:
    """Whether the batch is valid Arrow data; converting an invalid one to Python objects can crash the process."""
    try:
        batch.validate(full=True)
    except pa.ArrowException:
        return False
    return True


def _row_fields(row: pa.RecordBatch, where: str) -> dict[str, Any] | BadRow:
    fields = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.validate(full=True)
            fields[name] = column[0].as_py()
        except CONVERSION_ERRORS as error:
            return BadRow(f"{where}: field {name!r} cannot be read: {error}")
    return fields


TEXT: dict[str, Callable[[str, Iterator[bytes]], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_rows,
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".txt": _text_rows,
}
BINARY: dict[str, Callable[[str, BinaryIO], Iterator[Row]]] = {
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".feather": _arrow_rows,
}
ENDINGS = (*TEXT, *BINARY)
