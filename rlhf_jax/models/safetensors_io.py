"""safetensors in and out: each device is given the bytes of its own shard, and no tensor is ever held whole.

https://huggingface.co/docs/safetensors/index#format has the format that `write_params` writes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax.mesh import Layout
from rlhf_jax.models.decoder import Leaf
from rlhf_jax.models.families import HfTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9  # what transformers and the hub call a shard
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BASE = "model."  # base models (AutoModel) are saved without it


def read_params(
    folder: Path,
    leaves: Mapping[str, Leaf],
    tensors: Mapping[str, HfTensor],
    layout: Layout,
    dtype: str,
    *,
    optional: Collection[str] = (),
    tolerated: re.Pattern[str] | None = None,
) -> dict[str, jax.Array]:
    """Parameters from a folder's safetensors, each device reading only the byte ranges of its shard.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its files.
        leaves: {path: shape and logical axes}; the result has these paths.
        tensors: {path: the name, transform and shape in the files}.
        layout: where each parameter lies.
        dtype: of the result; the files may be float32, float16 or bfloat16.
        optional: paths that the result lacks if the files do.
        tolerated: names that the files may have beyond `tensors`.
    Raises:
        ValueError: no safetensors in the folder, a damaged file, a dimension that the layout does not split evenly; or
            tensors that are missing, surplus, misshaped or of another dtype, all of them in one message.
    """
    with ExitStack() as stack:
        files = _open(folder, stack)
        lacking = {path for path in optional if _find(tensors[path].name, files) is None}
        leaves = {path: leaf for path, leaf in leaves.items() if path not in lacking}
        _check(folder, files, leaves, tensors, layout, tolerated)
        return {path: _read(files, leaf, tensors[path], layout, dtype) for path, leaf in leaves.items()}


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """{tensor name: the open file that has it}."""
    if (folder / INDEX).exists():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    elif (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
        if pickled:
            raise ValueError(pickle_refusal(str(folder), f"{folder} has {pickled[0]}", f"{folder}-safetensors"))
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: is it a Hugging Face model folder?")
    files = {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="np"))
        except FileNotFoundError as error:
            raise ValueError(f"{folder / INDEX} names {name}, which is not there: download it again") from error
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged ({error}): download it again") from error
        files |= dict.fromkeys(file.keys(), file)
    return files


def pickle_refusal(source: str, what: str, destination: str) -> str:
    """The message about a checkpoint that exists as a pickle only."""
    code = (
        f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; s, d = '{source}', '{destination}'; "
        "M.from_pretrained(s).save_pretrained(d); T.from_pretrained(s).save_pretrained(d)"
    )
    return (
        f"{what} but no safetensors: a pickle can run any code, so it is not read; "
        f'where you trust it, convert it with torch installed: python -c "{code}"'
    )


def _find(name: str, files: Mapping[str, Any]) -> str | None:
    """The name as the files have it: with or without the base model's prefix."""
    return next((n for n in (name, name.removeprefix(_BASE)) if n in files), None)


def _names(leaf: Leaf, tensor: HfTensor) -> list[str]:
    stacked = "{i}" in tensor.name
    return [tensor.name.format(i=i) for i in range(leaf.shape[0])] if stacked else [tensor.name]


def _check(folder, files, leaves, tensors, layout, tolerated) -> None:
    missing, misshaped, foreign, used = [], [], [], set()
    for path, leaf in leaves.items():
        for name in _names(leaf, tensors[path]):
            found = _find(name, files)
            if found is None:
                missing.append(name)
                continue
            used.add(found)
            source = files[found].get_slice(found)
            if tuple(source.get_shape()) != tensors[path].shape:
                misshaped.append(f"{found} ({list(source.get_shape())} in place of {list(tensors[path].shape)})")
            elif source.get_dtype() not in _DTYPES:
                foreign.append(f"{found} ({source.get_dtype()} in place of {', '.join(_DTYPES)})")
    surplus = [name for name in files.keys() - used if not (tolerated and tolerated.fullmatch(name))]
    faults = {"missing": missing, "surplus": surplus, "misshaped": misshaped, "of an unsupported dtype": foreign}
    if any(faults.values()):
        told = "; ".join(f"{fault}: {', '.join(sorted(names))}" for fault, names in faults.items() if names)
        raise ValueError(f"the tensors of {folder} are not those that its config.json describes; {told}")
    uneven = [
        f"{path} ({size} over {layout.shards(axis)})"
        for path, leaf in leaves.items()
        for size, axis in zip(leaf.shape, leaf.axes, strict=True)
        if axis and size % layout.shards(axis)
    ]
    if uneven:
        raise ValueError(f"the mesh does not split these evenly, choose a smaller one: {', '.join(uneven)}")


def _read(files, leaf: Leaf, tensor: HfTensor, layout: Layout, dtype: str) -> jax.Array:
    sources = []
    for name in _names(leaf, tensor):
        found = _find(name, files)
        sources.append(files[found].get_slice(found))
    replicas: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
        if bounds not in replicas:
            data = np.zeros([stop - start for start, stop in bounds], jnp.dtype(dtype))
            if "{i}" in tensor.name:
                for row, source in zip(data, sources[slice(*bounds[0])], strict=True):
                    _fill(row, source, tensor, bounds[1:])
            else:
                _fill(data, sources[0], tensor, bounds)
            replicas[bounds] = data
        return replicas[bounds]

    return jax.make_array_from_callback(leaf.shape, layout.sharding(leaf.axes), shard)


def _fill(out: np.ndarray, source, tensor: HfTensor, bounds) -> None:
    """Put the part of one file tensor that lies within our `bounds` into `out`, cast."""
    if tensor.transform == "transpose":
        bounds = bounds[::-1]
    start = bounds[0][0]
    stop = min(bounds[0][1], tensor.shape[0])  # below the bound only where our rows are padded
    if start < stop:
        part = source[(slice(start, stop), *(slice(*b) for b in bounds[1:]))]
        if tensor.transform == "transpose":
            out[...] = part.T
        else:
            out[: stop - start] = part


class _Slot(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    nbytes: int


def write_params(
    folder: Path,
    params: Mapping[str, jax.Array],
    tensors: Mapping[str, HfTensor],
    dtype: str,
    *,
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write model.safetensors, or several files and their index, holding one layer's tensor on the host at a time.

    Args:
        folder: an existing folder.
        params: {path: array}, sharded or not, every shard reachable from this process.
        tensors: {path: the name, transform and shape in the files}.
        dtype: of the files, "float32", "float16" or "bfloat16".
        max_bytes: tensors of one file, at most; a larger tensor has a file to itself.
    """
    groups: list[list[_Slot]] = [[]]
    for slot in _slots(params, tensors, jnp.dtype(dtype).itemsize):
        if groups[-1] and sum(s.nbytes for s in groups[-1]) + slot.nbytes > max_bytes:
            groups.append([])
        groups[-1].append(slot)
    if len(groups) == 1:
        _write_file(folder / SINGLE, groups[0], params, tensors, dtype)
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / name, group, params, tensors, dtype)
        weight_map |= {slot.name: name for slot in group}
    total = sum(slot.nbytes for group in groups for slot in group)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _slots(params, tensors: Mapping[str, HfTensor], itemsize: int) -> Iterator[_Slot]:
    """Unstacked tensors first, then layer by layer: the order in which a reader of the model wants them."""
    stacked = {path for path, tensor in tensors.items() if "{i}" in tensor.name}
    layers = {params[path].shape[0] for path in stacked}
    assert len(layers) == 1, layers
    for layer in (None, *range(layers.pop())):
        for path, tensor in tensors.items():
            if (path in stacked) == (layer is not None):
                nbytes = itemsize * int(np.prod(tensor.shape))
                yield _Slot(tensor.name.format(i=layer), path, layer, tensor.shape, nbytes)


def _write_file(path: Path, slots: list[_Slot], params, tensors, dtype: str) -> None:
    code = {theirs: ours for ours, theirs in _DTYPES.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    offset = 0
    for slot in slots:
        ends = [offset, offset + slot.nbytes]
        header[slot.name] = {"dtype": code, "shape": slot.shape, "data_offsets": ends}
        offset += slot.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for slot in slots:
            ours = params[slot.path]
            host = np.asarray(ours if slot.layer is None else ours[slot.layer])
            transform = tensors[slot.path].transform
            if transform == "transpose":
                host = host.T
            elif transform == "rows":
                host = host[: slot.shape[0]]
            assert host.shape == slot.shape, (slot, host.shape)
            file.write(np.ascontiguousarray(host, jnp.dtype(dtype)).reshape(-1).view(np.uint8).data)
