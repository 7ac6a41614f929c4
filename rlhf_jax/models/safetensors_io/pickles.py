"""The tensors of a file of `torch.save`, found without running any code of it and without torch.

A pickle is a program that may call anything it names. Here the names that tensors need stand for descriptions, and
every other name is an error before anything is called, as is every opcode that tensors do not need. Damaged files and
those made to harm cost no more than their size: Python's own unpickler is used, since the one in C takes memory for any
index that a file gives, and only text and numbers are hashed or written into messages, since tuples that hold one
another many times over take forever. The numbers are not part of the pickle: they are mapped from the file as those of
safetensors are.

https://docs.pytorch.org/docs/stable/notes/serialization.html has the zip format (torch 1.6 and later);
torch.serialization._legacy_load is the only description of the earlier one.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.models.safetensors_io.entry import Entry

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "": 1}  # stored as bytes
_STORAGES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32"}
_STORAGES |= {"Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "Untyped": ""}
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
_DTYPES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
_DTYPES |= {"uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = 30  # bytes of a member's header in a zip file, before its name
_MAX_DIMENSIONS = 64  # of torch
_NEEDED = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE MEMOIZE
SHORT_BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS SETITEM
SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT"""
_OPCODES = [getattr(pickle, name)[0] for name in _NEEDED.split()]


class ForeignPickle(ValueError):
    """A pickle names or holds something else than tensors; the text follows the name of its file."""


class _Storage(NamedTuple):
    key: str
    dtype: str  # "": bytes, of which the tensor has the dtype
    offset: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: str
    offset: int  # elements, as the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Table(dict):
    """A dictionary, without the attributes that torch gives the OrderedDict of a module."""

    def __init__(self, items: Iterable[tuple] = ()):  # which Python 2 gives
        for key, value in items:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int):
            raise ValueError("a key in it is neither text nor a number")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        pass


class _Name:
    """What a pickle gets for a name: it can be called, and not be changed."""

    __slots__ = ("call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "call", call)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError("it changes a name")

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a name")


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> _Tensor:
    if any(rest[2:]):  # after requires_grad and hooks
        raise ForeignPickle("has a conjugated or negated view, whose numbers are others than those of the file")
    return _Tensor(storage, storage.dtype, offset, shape, strides)


def _tensor_of_bytes(storage: _Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> _Tensor:
    return _Tensor(storage, rest[2], offset, shape, strides)  # after requires_grad and hooks


def _subclass(function: _Name, kind: str, args: tuple, _: Any) -> _Tensor:
    """A tensor or parameter with attributes of its own, which are left out."""
    if not isinstance(function, _Name) or kind not in _KINDS:
        raise ForeignPickle(f"has a tensor of the type {kind if isinstance(kind, str) else type(kind).__name__}")
    return function(*args)


_KINDS = ("torch.Tensor", "torch.nn.parameter.Parameter")
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Name(_Table),
    ("torch", "Size"): _Name(lambda sizes: sizes),
    ("torch._utils", "_rebuild_tensor"): _Name(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Name(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Name(_tensor_of_bytes),
    ("torch._utils", "_rebuild_parameter"): _Name(lambda tensor, *_: tensor),
    ("torch._utils", "_rebuild_parameter_with_state"): _Name(lambda tensor, *_: tensor),
    ("torch._tensor", "_rebuild_from_type_v2"): _Name(_subclass),
    **{tuple(kind.rsplit(".", 1)): kind for kind in _KINDS},
    **{("torch", f"{name}Storage"): dtype for name, dtype in _STORAGES.items()},
    **{("torch.storage", f"{name}Storage"): dtype for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Opcodes(dict):
    """{opcode: its function}; pickles may have others."""

    def __missing__(self, opcode: int) -> Any:
        raise ValueError(f"its pickle has the opcode {opcode:#x}, which no tensor needs")


class _Reader(pickle._Unpickler):
    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file, encoding="utf-8")
        self.sizes: dict[str, tuple[str, int]] = {}  # of the storages, by their keys: dtype and number of elements

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise ForeignPickle(f"names {module}.{name}, which is no part of a tensor")
        return _NAMES[module, name]

    dispatch = _Opcodes((code, pickle._Unpickler.dispatch[code]) for code in _OPCODES)
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Table())

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _, count, *view = reference
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str | int):
            raise ValueError("it refers to something else than a storage")
        self.sizes[str(key)] = dtype, count
        return _Storage(str(key), dtype, view[0][1] if view and view[0] else 0)  # a view: its key, offset and size


def pickle_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file of `torch.save` by name, where the file holds a dictionary of them.

    Raises:
        ForeignPickle: the pickle names or holds something else than tensors; nothing that it names was called.
        ValueError: the file is damaged or compressed.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        is_zip = file.read(2) == b"PK"
        file.seek(0)
        read = _read_zip if is_zip else _read_legacy
        try:
            content, places = read(file, mapped)
        except ForeignPickle:
            raise
        except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, *_WRONG_ARGUMENTS) as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if not isinstance(content, dict) or not all(isinstance(each, _Tensor) for each in content.values()):
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ForeignPickle(f"holds {keys or 'nothing'} and not the tensors of a model by their names")
    return {str(name): _entry(mapped, str(name), tensor, places) for name, tensor in content.items()}


# What the functions above raise where a pickle calls them with something else, and zipfile of versions and encryption.
_WRONG_ARGUMENTS = (TypeError, AttributeError, KeyError, IndexError, UnicodeDecodeError, OverflowError, MemoryError)
_WRONG_ARGUMENTS += (struct.error, NotImplementedError, RuntimeError)


def _read_zip(file: io.BufferedReader, mapped: mmap.mmap) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The object of the file, and for each storage its bytes (start, stop)."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        (pickled,) = (name for name in members if name.endswith("/data.pkl") or name == "data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if packed := [name for name, member in members.items() if member.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{packed[0]} in it is compressed, which torch does not write")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ForeignPickle("has big-endian numbers")
        content = _Reader(io.BytesIO(archive.read(pickled))).load()
    places = {}
    for name, member in members.items():
        if name.startswith(f"{folder}data/"):
            # All lengths are checked, as a wrong one would give other numbers.
            at, named = (
                member.header_offset,
                member.orig_filename.encode("utf-8" if member.flag_bits & 2048 else "cp437"),
            )
            header, begin = mapped[at : at + _LOCAL_HEADER], at + _LOCAL_HEADER + len(named)
            start = begin + int.from_bytes(header[28:30], "little")  # after another field
            stop = start + member.file_size
            record = b"PK\7\x08" if member.flag_bits & 8 else b"PK"  # how the record after the numbers begins
            is_header = (header[:4], header[26:28]) == (b"PK\3\4", len(named).to_bytes(2, "little"))
            if not is_header or mapped[stop : stop + len(record)] != record:
                raise ValueError(f"{name} in it is not where its directory says")
            places[name.removeprefix(f"{folder}data/")] = start, stop
    return content, places


def _read_legacy(file: io.BufferedReader, _: mmap.mmap) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_read_zip`, of the format before torch 1.6: five pickles, then the storages one after the other."""
    magic, protocol, system = (_Reader(file).load() for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise ValueError("it is no file of torch.save")
    if not system["little_endian"]:
        raise ForeignPickle("has big-endian numbers")
    reader = _Reader(file)
    content, keys = reader.load(), _Reader(file).load()
    places, start = {}, file.seek(0, io.SEEK_CUR)
    for key in (key for key in keys if isinstance(key, str)):
        file.seek(start)
        dtype, count = reader.sizes[key]
        if int.from_bytes(file.read(8), "little") != count:
            raise ValueError(f"the storage {key} in it is not of {count} numbers")
        stop = start + 8 + count * _BYTES[dtype]
        places[key], start = (start + 8, stop), stop
    return content, places


def _entry(file: mmap.mmap, name: str, tensor: _Tensor, places: Mapping[str, tuple[int, int]]) -> Entry:
    """The tensor's place in the file. ValueError unless all of it is within its storage."""
    shape, strides, size = tensor.shape, tensor.strides, isinstance(tensor.dtype, str) and _BYTES.get(tensor.dtype)
    offset = tensor.offset + tensor.storage.offset
    is_view = size and type(shape) is type(strides) is tuple and len(shape) == len(strides) <= _MAX_DIMENSIONS
    if not is_view or not all(isinstance(n, int) and n >= 0 for n in (*shape, *strides, offset)):
        raise ValueError(f"{name} has a shape or strides that no tensor has")
    if tensor.storage.key not in places:
        raise ValueError(f"the numbers of {name} are missing")
    start, stop = places[tensor.storage.key]
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if math.prod(shape) else 0
    first = start + offset * size
    last = first + extent * size
    if last > min(stop, len(file)):
        raise ValueError(f"{name} ends at byte {last} of {min(stop, len(file))}")
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Entry(
        file, tensor.dtype, shape, first, last, None if strides == contiguous else tuple(n * size for n in strides)
    )
