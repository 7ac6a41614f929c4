"""The tensors of a file of `torch.save`, found without running any code of it and without torch.

A pickle is a program that may call anything it names. Here the names that tensors need stand for descriptions, and
every other name is an error before anything is called. The numbers are not part of the pickle: they are mapped from the
file as those of safetensors are.

https://docs.pytorch.org/docs/stable/notes/serialization.html has the zip format (torch 1.6 and later);
torch.serialization._legacy_load is the only description of the earlier one.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import zipfile
from collections.abc import Callable, Mapping
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
    """An OrderedDict, without the attributes that torch gives that of a module."""

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
    return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _tensor_of_bytes(storage: _Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> _Tensor:
    return _Tensor(storage, rest[2], offset, tuple(shape), tuple(strides))  # after requires_grad and hooks


def _subclass(function: _Name, kind: str, args: tuple, _: Any) -> _Tensor:
    """A tensor or parameter with attributes of its own, which are left out."""
    if not isinstance(function, _Name) or kind not in _KINDS:
        raise ForeignPickle(f"has a tensor of the type {kind}")
    return function(*args)


_KINDS = ("torch.Tensor", "torch.nn.parameter.Parameter")
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Name(_Table),
    ("torch", "Size"): _Name(tuple),
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


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file, encoding="utf-8")
        self.dtypes: dict[str, str] = {}  # of the storages, by their keys

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise ForeignPickle(f"names {module}.{name}, which is no part of a tensor")
        return _NAMES[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _, _, *view = reference
        if kind != "storage" or not isinstance(dtype, str):
            raise ValueError(f"it refers to a {kind!r}")
        self.dtypes[str(key)] = dtype
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
            content, places = read(file)
        except ForeignPickle:
            raise
        except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, *_WRONG_ARGUMENTS) as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if not isinstance(content, dict) or not all(isinstance(each, _Tensor) for each in content.values()):
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ForeignPickle(f"holds {keys or 'nothing'} and not the tensors of a model by their names")
    return {str(name): _entry(mapped, str(name), tensor, places) for name, tensor in content.items()}


# What the functions above raise where a pickle calls them with something else.
_WRONG_ARGUMENTS = (TypeError, AttributeError, KeyError, IndexError, UnicodeDecodeError, OverflowError, MemoryError)


def _read_zip(file: io.BufferedReader) -> tuple[Any, dict[str, tuple[int, int]]]:
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
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER)
            lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))  # of the name and the rest
            start = member.header_offset + _LOCAL_HEADER + sum(lengths)
            places[name.removeprefix(f"{folder}data/")] = (start, start + member.file_size)
    return content, places


def _read_legacy(file: io.BufferedReader) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_read_zip`, of the format before torch 1.6: five pickles, then the storages one after the other."""
    magic, protocol, system = (_Reader(file).load() for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise ValueError("it is no file of torch.save")
    if not system["little_endian"]:
        raise ForeignPickle("has big-endian numbers")
    reader = _Reader(file)
    content, keys = reader.load(), _Reader(file).load()
    places, start = {}, file.seek(0, io.SEEK_CUR)
    for key in keys:
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        stop = start + 8 + count * _BYTES[reader.dtypes[key]]
        places[key], start = (start + 8, stop), stop
    return content, places


def _entry(file: mmap.mmap, name: str, tensor: _Tensor, places: Mapping[str, tuple[int, int]]) -> Entry:
    """The tensor's place in the file. ValueError unless all of it is within its storage."""
    shape, strides, size = tensor.shape, tensor.strides, _BYTES.get(tensor.dtype)
    offset = tensor.offset + tensor.storage.offset
    numbers = (*shape, *strides, offset)
    if not (size and len(shape) == len(strides) and all(isinstance(n, int) and n >= 0 for n in numbers)):
        raise ValueError(f"{name} is described by {tensor}")
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
