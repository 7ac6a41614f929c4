"""The files of a folder, mapped instead of read: a part of a tensor goes from the page cache to its destination.

https://huggingface.co/docs/safetensors/index#format has the format; `pickles` reads that of torch.save.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Collection
from pathlib import Path

from rlhf_jax.models.safetensors_io.entry import NUMPY_DTYPES, Entry
from rlhf_jax.models.safetensors_io.pickles import ForeignPickle, pickle_entries

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")  # of LLaMA-Factory, next to the language model
_MAX_LISTED = 100  # largest number of names of one kind in a message


def open_folder(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder by its name.

    Where it has several, the first of model.safetensors, its index, pytorch_model.bin and its index is read, as by
    transformers.

    Raises:
        ValueError: none of these files, a damaged file or index, a missing file, a tensor that two files have, or a
            pickle that names more than tensors need.
    """
    names = (SINGLE, INDEX, PICKLE, PICKLE_INDEX)
    name = next((name for name in names if (folder / name).exists()), None)
    if name is None:
        pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
        found = f"; of {', '.join(pickled)} the names say nothing" if pickled else ""
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {PICKLE}, nor the index of one: is it a Hugging Face model folder?"
            + found
        )
    paths = [folder / name]
    if name.endswith(".json"):
        try:
            names = sorted(set(json.loads((folder / name).read_bytes())["weight_map"].values()))
            paths = [folder / each for each in names]
            if strange := [each for each in names if each != Path(each).name]:
                raise ValueError(f"{strange[0]} is no name of a file in this folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / name} is damaged ({_error_text(error)}): download it again") from error
        if absent := [path.name for path in paths if not path.exists()]:
            raise ValueError(f"{folder / name} names {absent[0]}, which is not there: download it again")
    paths += [folder / each for each in VALUE_HEADS if (folder / each).exists()][:1]
    entries: dict[str, Entry] = {}
    for path in paths:
        found = open_file(path)
        if twice := entries.keys() & found.keys():
            raise ValueError(f"two files of {folder} have {join_names(twice)}: remove what is of another checkpoint")
        entries |= found
    return entries


def open_file(path: Path) -> dict[str, Entry]:
    """Every tensor of a file of safetensors, or of torch.save where its name ends with .bin, by its name.

    Raises:
        ValueError: the file is damaged, or a pickle that names more than tensors need.
    """
    try:
        if path.suffix == ".bin":
            return pickle_entries(path)
        with path.open("rb") as file:
            return _entries(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ForeignPickle as error:
        code = (
            f"import torch, safetensors.torch as s; p = '{path}'; d = torch.load(p, weights_only=False); "
            f"s.save_file({{k: v.clone() for k, v in d.items() if torch.is_tensor(v)}}, '{path.with_name(SINGLE)}')"
        )
        raise ValueError(
            f"{path} {error}: a pickle can run any code, so nothing but tensors is read; where you trust it, convert "
            f'what it has of tensors, with torch installed: python -c "{code}"'
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_error_text(error)}): download it again") from error


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
