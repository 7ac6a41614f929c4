"""Rows of JSON: one object per line, or an array of objects, alone or as the one list of an object."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

from rlhf_jax.data.records import BadRow, Row

BLOCK_BYTES = 2**18  # bytes read at a time
MAX_ROW = 16 * 2**20  # bytes of a line, or characters of a row; a longer one is bad, and is never in memory whole
TOO_LONG = f"longer than {MAX_ROW >> 20} MiB"
COMPRESSIONS = (".gz", ".zst")
# Errors of a truncated or corrupt file. An `OSError` with a number comes from the system instead: see `is_damage`.
DAMAGE = (EOFError, OSError, zlib.error, pa.ArrowException, UnicodeDecodeError)


def is_damage(error: Exception) -> bool:
    """Whether the contents of the file are at fault, and not the system, whose `OSError`s have a number."""
    return getattr(error, "errno", None) is None


def byte_blocks(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """The decompressed bytes. Of a damaged file: the bytes before the damage, then one of `DAMAGE` is raised."""
    if compression == ".zst":
        return _zstd_blocks(file)
    # read1 returns the bytes decompressed before the damage; read would lose them.
    read = gzip.GzipFile(fileobj=file).read1 if compression == ".gz" else file.read
    return iter(partial(read, BLOCK_BYTES), b"")


def text_blocks(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """`byte_blocks` of UTF-8 text, without a byte order mark; a UTF-16 mark is damage."""
    rest = byte_blocks(file, compression)
    first = next(rest, b"")
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise EOFError("the text is UTF-16; save it as UTF-8")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from rest


def split_lines(text: Iterator[bytes]) -> Iterator[bytes | None]:
    """The lines with their newline, blank ones too; None for one of more than `MAX_ROW` bytes."""
    parts, size = list[bytes](), 0  # of a line that continues in the next block
    for part in itertools.chain.from_iterable(map(io.BytesIO, text)):  # faster than `split`, which reads every byte
        if not parts and part.endswith(b"\n"):
            yield part
            continue
        parts.append(part)
        size += len(part)
        if size > MAX_ROW:
            parts[1:] = []
        if part.endswith(b"\n"):
            yield b"".join(parts) if size <= MAX_ROW else None
            parts, size = [], 0
    if parts:
        yield b"".join(parts) if size <= MAX_ROW else None


def find_broken_text(fields: Any) -> str | None:
    """The dotted name of a text in `fields` that is not Unicode, as it has a lone surrogate; None if there is none."""
    if isinstance(fields, dict):
        try:
            "".join((*fields, *fields.values())).encode()  # most rows are flat: this takes half the time
            return None
        except (TypeError, UnicodeEncodeError):
            pass
    waiting = [("", fields)]  # no recursion: the row may be nested as deeply as the JSON reader allows
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, str):
            try:
                value.isascii() or value.encode()
            except UnicodeEncodeError:
                return name.removeprefix(".")
        elif isinstance(value, dict):
            waiting += [(f"{name}.{key}", part) for key, value in value.items() for part in (value, key)]
        elif isinstance(value, list):
            waiting += [(f"{name}.{index}", part) for index, part in enumerate(value)]
    return None


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(file, "zstd")
    while True:
        block = bytearray(BLOCK_BYTES)
        try:
            size = stream.readinto(block)
        except OSError:
            # The block has the bytes before the damage, but Arrow does not report how many; text has no NULs.
            yield bytes(block).rstrip(b"\0")
            raise
        if not size:
            return
        yield bytes(memoryview(block)[:size])


JSON = json.JSONDecoder()
BLANK = re.compile(r"[ \t\n\r]*")
# Lists that make a dialogue: an object with one of them is a row itself, and does not contain the rows.
DIALOGUES = ("messages", "conversations", "conversation")
HEAD = 2**20  # bytes of the first line that decide between JSON lines and one large object
ONE_A_LINE = "there must be one object on every line"
BACKSLASH = ord("\\")
SURROGATE_ESCAPE = re.compile(rb"\\u[dD]")


def json_lines(path: str, text: Iterator[bytes]) -> Iterator[Row]:
    """Rows of one object per line; `Row.number` is the line, blank ones counted."""
    scan = JSON.scan_once  # `decode` takes twice the time, because it skips whitespace around the object
    for number, line in enumerate(split_lines(text), start=1):
        try:
            decoded = line.decode()
            fields, end = scan(decoded, 0)
            if decoded[end:] not in ("\n", "\r\n"):
                fields = JSON.decode(decoded)
        except (AttributeError, StopIteration, ValueError, RecursionError):
            if line is None or line.strip():
                yield _parse_unusual_line(path, number, line)
            continue
        # The line is UTF-8, so only an escape can make a lone surrogate: few rows need a search of every text.
        if type(fields) is dict and not (BACKSLASH in line and SURROGATE_ESCAPE.search(line)):
            yield Row(path, number, fields, "line")
        else:
            yield _check_row(path, number, fields, "line", ONE_A_LINE)


def _parse_unusual_line(path: str, number: int, line: bytes | None) -> Row:
    """The row of a line that begins with whitespace or is not JSON."""
    if line is None:
        return Row(path, number, BadRow(f"{path}, line {number}: {TOO_LONG}"))
    try:
        return _check_row(path, number, JSON.decode(line.decode()), "line", ONE_A_LINE)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg}, column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        return Row(path, number, BadRow(f"{path}, line {number}: malformed JSON ({what}); {ONE_A_LINE}"))


def json_rows(path: str, text: Iterator[bytes]) -> Iterator[Row]:
    """Rows of an array of objects, of an object one field of which is such an array, or of JSON lines.

    `Row.number` counts the objects (of JSON lines, the lines). JSON that breaks off ends the file, with one bad row.
    """
    text, are_lines = _sniff(text)
    if are_lines:
        yield from json_lines(path, text)
        return
    number = 0
    try:
        for number, value in enumerate(_values(Scanner(text)), start=1):
            yield _check_row(path, number, value, "row", "the rows must be objects")
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else error
        number += 1
        yield Row(path, number, BadRow(f"{path}, row {number}: malformed JSON ({what}); what follows is not read"))


def _check_row(path: str, number: int, fields: Any, unit: str, fix: str) -> Row:
    where = f"{path}, {unit} {number}"
    if not isinstance(fields, dict):
        return Row(path, number, BadRow(f"{where}: holds a {type(fields).__name__}; {fix}"))
    if (name := find_broken_text(fields)) is not None:
        what = "a lone surrogate, as in truncated text, or bytes that are not UTF-8"
        return Row(path, number, BadRow(f"{where}: field {name!r} holds {what}"))
    return Row(path, number, fields, unit)


def _sniff(text: Iterator[bytes]) -> tuple[Iterator[bytes], bool]:
    """The text again, and whether it is JSON lines: its first line is an object of its own, and another one follows.

    A first line with an error before its end is one that the next line cannot complete.
    """
    head: list[bytes] = []
    line = rest = b""
    for block in text:
        head.append(block)
        line, _, rest = b"".join(head).lstrip().partition(b"\n")
        if rest.strip() or len(line) > HEAD or not b"{".startswith(line[:1]):
            break
    text = itertools.chain(head, text)
    if not line.startswith(b"{") or not rest.strip():
        return text, False
    first = line.decode("utf-8", "replace")
    try:
        JSON.decode(first)
    except json.JSONDecodeError as error:
        return text, not _ends_early(error, len(first.rstrip()))
    except (ValueError, RecursionError):  # a number too long, objects too deep
        pass
    return text, True


def _ends_early(error: json.JSONDecodeError, size: int) -> bool:
    """Whether text that ends too early, after `size` characters, may cause `error`. No literal is longer than 16."""
    return error.pos > size - 16 or error.msg.startswith("Unterminated string")


class Scanner:
    """Reads blocks of JSON text value by value, with little more than one value and one block in memory."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks = blocks
        # Bytes that are not UTF-8 become surrogates, which `_check_row` finds, so that only their row is bad.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read()

    def take(self, expected: str) -> str:
        """The next character, which must be one of `expected`; ValueError if it is not."""
        if (found := self.peek()) not in tuple(expected):
            raise ValueError(f"{' or '.join(expected)} expected, not {repr(found) if found else 'the end of the file'}")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value; ValueError if there is none, or none of at most `MAX_ROW` characters."""
        self.peek()
        while True:
            try:
                value, end = JSON.raw_decode(self.text, self.at)
                if (end < len(self.text) or self.ended) and end - self.at <= MAX_ROW:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if self.ended or not _ends_early(error, len(self.text)):  # otherwise another block may complete it
                    raise
            if len(self.text) - self.at > MAX_ROW:
                raise ValueError(TOO_LONG)
            self._read()

    def _read(self) -> None:
        """Read as many bytes as there are unread characters, at least a block: long values take few attempts."""
        parts = [self.text[self.at :]]
        wanted = max(BLOCK_BYTES, len(parts[0]))
        while wanted > 0 and not self.ended:
            block = next(self.blocks, None)
            self.ended = block is None
            parts.append(self.decoder.decode(block or b"", self.ended))
            wanted -= len(block or b"")
        self.text, self.at = "".join(parts), 0


def _values(scanner: Scanner) -> Iterator[Any]:
    """The rows of the arrays and objects that follow each other in the text."""
    while opening := scanner.peek():
        scanner.take("[{")
        yield from _elements(scanner) if opening == "[" else _object_rows(scanner)


def _elements(scanner: Scanner) -> Iterator[Any]:
    """The values of an array whose [ is taken."""
    if scanner.peek() == "]":
        scanner.take("]")
        return
    yield scanner.value()
    while scanner.take(",]") == ",":
        yield scanner.value()


def _object_rows(scanner: Scanner) -> Iterator[Any]:
    """The rows in an object whose { is taken: those of its one list of objects, or else itself."""
    fields: dict[str, Any] = {}
    frame = ""
    while scanner.peek() != "}":
        name = scanner.value()
        scanner.take(":")
        if scanner.peek() != "[" or name in DIALOGUES:
            fields[name] = scanner.value()
        elif scanner.take("[") and scanner.peek() != "{":
            fields[name] = list(_elements(scanner))
        elif frame:
            raise ValueError(f"two lists of objects, {frame!r} and {name!r}: put each in a file of its own")
        else:
            frame = name
            yield from _elements(scanner)
        if scanner.take(",}") == "}":
            break
    else:
        scanner.take("}")
    if not frame:
        yield fields
