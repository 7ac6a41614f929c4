"""Parameters -> safetensors, one tensor of the files at a time."""

from __future__ import annotations

import functools
import gc
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.models.families.tensors import HfTensor
from rlhf_jax.models.lora import NO_LORA, LoraConfig, merge_kernel
from rlhf_jax.models.quantised import Quantised, dequantise
from rlhf_jax.models.safetensors_io.blocks import (
    Bounds,
    block_indices,
    copy,
    member_tensors,
    num_spread,
    orient,
    shard_bounds,
)
from rlhf_jax.models.safetensors_io.entry import NUMPY_DTYPES, Entry
from rlhf_jax.models.safetensors_io.files import INDEX, SINGLE
from rlhf_jax.models.unstacked import Param, Unstacked

MAX_FILE_BYTES = 5 * 10**9  # as in transformers and the hub; a larger tensor has its own file


class _FileTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    sources: list[tuple[str, tuple[int, ...]]]  # (path, its layer and expert); several where the tensor is fused
    entry: Entry | None = None  # a tensor of another file, copied as it is

    def num_bytes(self, dtype: np.dtype) -> int:
        return len(_bytes(self.entry)) if self.entry else math.prod(self.shape) * dtype.itemsize


def write_params(
    folder: Path,
    params: Mapping[str, Param],
    tensors: Mapping[str, HfTensor],
    dtype: str,
    lora: LoraConfig = NO_LORA,
    *,
    others: Mapping[str, Entry] = MappingProxyType({}),
) -> None:
    """Write model.safetensors, or several files of up to MAX_FILE_BYTES and their index, holding one tensor of them on
    the host at a time.

    Args:
        folder: an existing folder.
        params: {path: array}, sharded or not; quantised kernels are written dense, with exactly the values that they
            represent, one matrix at a time. Of N processes, all of which call it, each writes every N-th file.
        tensors: {path: its tensor in the files}; entries that are not in `params` are left out.
        dtype: of the files, "float32", "float16" or "bfloat16".
        lora: of the adapters among the params, which are merged, one layer of a shard at a time, and rounded once.
        others: {name: a tensor of another file}, copied byte for byte.
    """
    groups: list[list[_FileTensor]] = [[]]
    room, total = MAX_FILE_BYTES, 0
    copies = [_FileTensor(name, entry.shape, [], entry) for name, entry in others.items()]
    for slot in _file_tensors(params, tensors) + copies:
        nbytes = slot.num_bytes(jnp.dtype(dtype))
        if groups[-1] and nbytes > room:
            groups.append([])
            room = MAX_FILE_BYTES
        groups[-1].append(slot)
        room, total = room - nbytes, total + nbytes
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE
        writer = (number - 1) % hosts.count()
        options = dict(params=params, tensors=tensors, dtype=jnp.dtype(dtype), lora=lora, writer=writer)
        if writer == hosts.index():
            _write_file(folder / name, group, jnp.dtype(dtype), functools.partial(_content, **options))
        else:
            for slot in group:
                _content(slot, **options)
        weight_map |= {slot.name: name for slot in group}
    if len(groups) > 1 and hosts.is_main():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _file_tensors(params: Mapping[str, jax.Array], tensors: Mapping[str, HfTensor]) -> list[_FileTensor]:
    """Tensors outside the layers first, then layer by layer: the order in which the model is read."""
    slots: dict[str, _FileTensor] = {}
    for path, tensor in tensors.items():
        if path in params:
            bounds = [(0, size) for size in params[path].shape[: num_spread(tensor)]]
            for lead, name in member_tensors(tensor, bounds):
                slot = slots.setdefault(name, _FileTensor(name, tensor.shape, []))
                assert slot.shape == tensor.shape, (path, slot)
                slot.sources.append((path, lead))
    return sorted(slots.values(), key=lambda slot: slot.sources[0][1][:1])


def _write_file(path: Path, slots: Sequence[_FileTensor], dtype: np.dtype, content: Callable) -> None:
    code = next(code for code, numpy_dtype in NUMPY_DTYPES.items() if numpy_dtype == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers rejects files without it
    offset = 0
    for slot in slots:
        end = offset + slot.num_bytes(dtype)
        header[slot.name] = {
            "dtype": slot.entry.dtype if slot.entry else code,
            "shape": slot.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for slot in slots:
            file.write(content(slot))
            if slot.entry:
                slot.entry.release()


def _content(slot: _FileTensor, params, tensors, dtype: np.dtype, lora: LoraConfig, writer: int) -> Any:
    """The bytes of a tensor; None where `writer` is another process."""
    if not slot.entry:
        whole = _assemble(slot, params, tensors, dtype, lora, writer)
        return None if whole is None else whole.reshape(-1).view(np.uint8).data
    return _bytes(slot.entry) if writer == hosts.index() else None


def _bytes(entry: Entry) -> memoryview:
    """The elements of a tensor in C order."""
    if entry.strides is None:
        return memoryview(entry.file)[entry.start : entry.stop]
    return np.ascontiguousarray(entry.array()).reshape(-1).view(np.uint8).data


def _assemble(
    slot: _FileTensor, params: Mapping[str, jax.Array], tensors, dtype, lora: LoraConfig, writer: int
) -> np.ndarray | None:
    """A tensor of the file, from the shards of all its parameters; None where `writer` is another process."""
    whole, filled = np.empty(slot.shape, dtype), 0
    for path, lead in slot.sources:
        tensor, param = tensors[path], params[path]
        file = orient(whole, tensor)
        adapter = [params.get(path.removesuffix("kernel") + name) for name in ("lora_a", "lora_b")]
        arrays = [param] if adapter[0] is None else [param, *adapter]
        if isinstance(param, Unstacked):
            arrays, lead = [array[lead[0]] for array in arrays], lead[1:]
        if isinstance(param, Unstacked | Quantised):
            arrays, lead = [_matrix(arrays, lead, lora)], ()
        for inner, part in _parts(arrays, lead, lora, writer):
            for here, there in block_indices(tensor, inner):
                copy(file[there], part[here])
                filled += part[here].size
            del part
            gc.collect(0)  # JAX frees arrays that numpy has viewed only in a collection
    if writer != hosts.index():
        return None
    assert filled == whole.size, f"the table fills {filled} of the {whole.size} elements of {slot.name}"
    return whole


def _parts(
    arrays: list[Param], lead: Sequence[int], lora: LoraConfig, writer: int
) -> Iterator[tuple[Bounds, np.ndarray]]:
    """(its bounds, its elements) of each shard of one layer (and expert) of a kernel, merged with its adapter, if any.

    With several processes the shards are gathered on the devices, and only `writer` has that one part.
    """
    if hosts.count() > 1:
        matrix = _matrix(arrays, lead, lora) if lead or len(arrays) > 1 else arrays[0]
        whole = hosts.fetch(matrix, only=writer)
        if whole is not None:
            yield [(0, size) for size in whole.shape], whole
        return
    distinct = {shard_bounds(shard.index, arrays[0].shape): shard.device for shard in arrays[0].addressable_shards}
    for bounds, device in distinct.items():
        leading, inner = bounds[: len(lead)], bounds[len(lead) :]
        if all(start <= number < stop for number, (start, stop) in zip(lead, leading, strict=True)):
            index = [number - start for number, (start, _) in zip(lead, leading, strict=True)]
            yield inner, _fetch([_on_device(device, array) for array in arrays], index, lora)


def _on_device(device: jax.Device, array: jax.Array) -> jax.Array:
    return next(shard.data for shard in array.addressable_shards if shard.device == device)


def _fetch(arrays: list[jax.Array], index: list[int], lora: LoraConfig) -> np.ndarray:
    """One layer (and expert) of a kernel's shard, merged with its adapter's shards, if any, on the same device."""
    if len(arrays) == 1 and arrays[0].device.platform == "cpu":
        return np.asarray(arrays[0])[tuple(index)]  # a view of the device's own memory
    return np.asarray(_matrix(arrays, index, lora))


@functools.partial(jax.jit, static_argnames="lora")
def _matrix(arrays: list, index: Sequence[jax.Array], lora: LoraConfig) -> jax.Array:
    """One layer (and expert) of a kernel, dense, merged with its adapter, if any, and split as the kernel is.

    It is a copy, as numpy's view of an array itself would stay on the host for the lifetime of the array. The index is
    traced, so that each shape is compiled once. Each device has those parts of A and B whose product is its part of the
    kernel, so nothing is sent.
    """
    for number in index:
        arrays = jax.tree.map(lambda array, at=number: jax.lax.dynamic_index_in_dim(array, at, keepdims=False), arrays)
    kernel, *adapter = arrays
    if isinstance(kernel, Quantised):
        kernel = dequantise(kernel, jnp.float32)
    return merge_kernel(kernel, *adapter, lora.scale) if adapter else jnp.copy(kernel)
