"""The files of a folder, mapped instead of read: a part of a tensor goes from the page cache to its destination.

https://huggingface.co/docs/safetensors/index#format has the format.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"  # LLaMA-Factory writes the head of values next to the language model
NUMPY_DTYPES = {"F32": jnp.dtype("float32"), "F16": jnp.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
_MAX_LISTED = 100  # largest number of names of one kind in a message


class Entry(NamedTuple):
    """A tensor in a mapped file."""

    file: mmap.mmap
    dtype: str  # as the format spells it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int

    def array(self) -> np.ndarray:
        return np.ndarray(self.shape, NUMPY_DTYPES[self.dtype], self.file, self.start)

    def release(self) -> None:
        """Release the pages: those of a mapped file count towards this process until the system needs the memory."""
        start = self.start // mmap.PAGESIZE * mmap.PAGESIZE
        if self.stop > start:
            self.file.madvise(mmap.MADV_DONTNEED, start, self.stop - start)


def pickle_refusal(source: str, what: str, destination: str) -> str:
    """The message for a checkpoint that exists only as a pickle."""
    code = (
        f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; s, d = '{source}', '{destination}'; "
        "M.from_pretrained(s).save_pretrained(d); T.from_pretrained(s).save_pretrained(d)"
    )
    return (
        f"{what} but no safetensors: a pickle can run any code, so it is not read; "
        f'where you trust it, convert it with torch installed: python -c "{code}"'
    )


def open_folder(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder by its name; where there are both a single file and an index, those of the former.

    Raises:
        ValueError: no safetensors, a damaged file or index, a missing file, or a tensor that two files have.
    """
    if (folder / SINGLE).exists():  # first, as in transformers
        paths = [folder / SINGLE]
    elif (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
            paths = [folder / name for name in names]
            if strange := [name for name in names if name != Path(name).name]:
                raise ValueError(f"{strange[0]} is no name of a file in this folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({_error_text(error)}): download it again") from error
    else:
        pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
        if pickled:
            raise ValueError(pickle_refusal(str(folder), f"{folder} has {pickled[0]}", f"{folder}-safetensors"))
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: is it a Hugging Face model folder?")
    paths += [folder / VALUE_HEAD] if (folder / VALUE_HEAD).exists() else []
    entries: dict[str, Entry] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                found = _entries(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise ValueError(f"{folder / INDEX} names {path.name}, which is not there: download it again") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({_error_text(error)}): download it again") from error
        if twice := entries.keys() & found.keys():
            raise ValueError(f"two files of {folder} have {join_names(twice)}: remove what is of another checkpoint")
        entries |= found
    return entries


def stored_dtype(folder: Path, rename: Callable[[str], str | None] = lambda name: name) -> str:
    """The dtype of all tensors of the folder's files where they agree, else float32; ValueError as `open_folder`.

    Args:
        rename: gives None for the name of a tensor that is not counted.
    """
    dtypes = {entry.dtype for name, entry in open_folder(folder).items() if rename(name)}
    return str(NUMPY_DTYPES.get(dtypes.pop(), "float32")) if len(dtypes) == 1 else "float32"


def join_names(names: Collection[str]) -> str:
    """The names sorted and joined for a message, at most a hundred of them."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(sorted(names)[:_MAX_LISTED]) + more


def _error_text(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _entries(file: mmap.mmap) -> dict[str, Entry]:
    """The entries of the header, after checking that all of them are within the file, so that reading cannot fail.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: the file is damaged.
    """
    length = int.from_bytes(file[:8], "little")
    if not 8 <= 8 + length <= len(file):
        raise ValueError(f"a header of {length} bytes in a file of {len(file)}")
    header = json.loads(file[8 : 8 + length])
    header.pop("__metadata__", None)
    entries, end = {}, 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (start, stop) = tuple(entry["shape"]), (8 + length + offset for offset in entry["data_offsets"])
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"{name} is described by {entry}")
        dtype = NUMPY_DTYPES.get(entry["dtype"])
        if dtype and stop - start != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name} is {stop - start} bytes, {list(shape)} {entry['dtype']} are another number")
        if start != end or stop < start:
            raise ValueError(f"{name} starts at byte {start} in place of {end}")
        entries[name], end = Entry(file, entry["dtype"], shape, start, stop), stop
    if end != len(file):
        raise ValueError(f"{len(file)} bytes in place of {end}")
    return entries
