"""The bytes of a file, plain or compressed, and its lines; what the text formats share."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

BLOCK = 2**18  # bytes that are read at a time
MAX_ROW = 16 * 2**20  # bytes of a line, or characters of a row; a longer one is bad, and never held whole
TOO_LONG = f"longer than {MAX_ROW >> 20} MiB"
COMPRESSIONS = (".gz", ".zst")
# What a cut or broken file raises. An `OSError` with a number comes from the system instead: see `is_damage`.
DAMAGE = (EOFError, OSError, zlib.error, pa.ArrowException, UnicodeDecodeError)


def is_damage(error: Exception) -> bool:
    """Whether the contents of the file are at fault, and not, as with an `OSError` that has a number, the reading."""
    return getattr(error, "errno", None) is None


def blocks(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """The decompressed bytes. Where the file is damaged: what comes before, and then one of `DAMAGE`."""
    if compression == ".zst":
        return _zstd_blocks(file)
    # read1: what was decompressed before the damage is given, where read loses it.
    read = partial(gzip.GzipFile(fileobj=file).read1, BLOCK) if compression == ".gz" else partial(file.read, BLOCK)
    return iter(read, b"")


def text_blocks(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """`blocks` of UTF-8 text, without a byte order mark; that of UTF-16 is damage."""
    rest = blocks(file, compression)
    first = next(rest, b"")
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise EOFError("the text is UTF-16; save it as UTF-8")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from rest


def lines(text: Iterator[bytes]) -> Iterator[bytes | None]:
    """The lines with their newline, blank ones too; None for one of more than `MAX_ROW` bytes."""
    parts: list[bytes] = []
    size = 0
    for block in text:
        whole = io.BytesIO(block).readlines()  # faster than `split`, which looks at every byte
        if parts and whole:
            parts.append(whole[0])
            size += len(whole[0])
            if size > MAX_ROW:
                parts[1:] = []
            if not whole.pop(0).endswith(b"\n"):
                continue
            yield b"".join(parts) if size <= MAX_ROW else None
            parts = []
        if whole and not whole[-1].endswith(b"\n"):
            parts = [whole.pop()]
            size = len(parts[0])
        yield from whole
    if parts:
        yield b"".join(parts) if size <= MAX_ROW else None


def broken_text(fields: Any) -> str | None:
    """The dotted name of a text in `fields` that is no Unicode, as it holds half a character; None if there is none."""
    if isinstance(fields, dict):
        try:
            "".join((*fields, *fields.values())).encode()  # most rows are flat: this takes half the time
            return None
        except (TypeError, UnicodeEncodeError):
            pass
    waiting = [("", fields)]  # no recursion: the row may be nested as deep as the JSON reader goes
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
        block = bytearray(BLOCK)
        try:
            size = stream.readinto(block)
        except OSError:
            # What came before the damage stands in the block, but Arrow does not say how much; text has no NULs.
            yield bytes(block).rstrip(b"\0")
            raise
        if not size:
            return
        yield bytes(memoryview(block)[:size])
