"""Parameters -> safetensors, one tensor of the files at a time."""

from __future__ import annotations

import functools
import gc
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.families.tensors import HfTensor
from rlhf_jax.models.lora import NO_LORA, LoraConfig, merge_kernel
from rlhf_jax.models.quantised import Quantised, dequantise
from rlhf_jax.models.safetensors_io.blocks import (
    block_indices,
    copy,
    in_our_order,
    member_tensors,
    num_spread,
    shard_bounds,
)
from rlhf_jax.models.safetensors_io.files import INDEX, NUMPY_DTYPES, SINGLE
from rlhf_jax.models.unstacked import Unstacked

MAX_FILE_BYTES = 5 * 10**9  # what transformers and the hub call a shard


class _Source(NamedTuple):
    """One of ours that a tensor of the file is made of."""

    path: str
    lead: tuple[int, ...]  # its layer and expert


class _FileTensor(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    sources: list[_Source]  # several where it is fused


def write_params(
    folder: Path,
    params: Mapping[str, jax.Array | Quantised | Unstacked],
    tensors: Mapping[str, HfTensor],
    dtype: str,
    lora: LoraConfig = NO_LORA,
    *,
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write model.safetensors, or several files and their index, holding one tensor of them on the host at a time.

    Args:
        folder: an existing folder.
        params: {path: array}, sharded or not, every shard reachable from this process; quantised kernels are written
            dense, exactly what they stand for, one matrix at a time.
        tensors: {path: where it lies in the files}; what is not in `params` is left out.
        dtype: of the files, "float32", "float16" or "bfloat16".
        lora: of the adapters among the params, which are merged, a layer of a shard at a time, and rounded once.
        max_bytes: tensors of one file, at most; a larger tensor has a file to itself.
    """
    itemsize = jnp.dtype(dtype).itemsize
    groups: list[list[_FileTensor]] = [[]]
    room = max_bytes
    for slot in _file_tensors(params, tensors):
        nbytes = math.prod(slot.shape) * itemsize
        if groups[-1] and nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(slot)
        room -= nbytes
    if len(groups) == 1:
        _write_file(folder / SINGLE, groups[0], params, tensors, jnp.dtype(dtype), lora)
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / name, group, params, tensors, jnp.dtype(dtype), lora)
        weight_map |= {slot.name: name for slot in group}
    total = sum(math.prod(slot.shape) * itemsize for group in groups for slot in group)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _file_tensors(params: Mapping[str, jax.Array], tensors: Mapping[str, HfTensor]) -> list[_FileTensor]:
    """Unstacked tensors first, then layer by layer: the order in which a reader of the model wants them."""
    slots: dict[str, _FileTensor] = {}
    for path, tensor in tensors.items():
        if path in params:
            bounds = [(0, size) for size in params[path].shape[: num_spread(tensor)]]
            for lead, name in member_tensors(tensor, bounds):
                slot = slots.setdefault(name, _FileTensor(name, tensor.shape, []))
                assert slot.shape == tensor.shape, (path, slot)
                slot.sources.append(_Source(path, lead))
    return sorted(slots.values(), key=lambda slot: slot.sources[0].lead[:1])


def _write_file(path: Path, slots: Sequence[_FileTensor], params, tensors, dtype: np.dtype, lora: LoraConfig) -> None:
    code = {theirs: ours for ours, theirs in NUMPY_DTYPES.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    offset = 0
    for slot in slots:
        end = offset + math.prod(slot.shape) * dtype.itemsize
        header[slot.name] = {"dtype": code, "shape": slot.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for slot in slots:
            file.write(_assemble(slot, params, tensors, dtype, lora).reshape(-1).view(np.uint8).data)


def _assemble(slot: _FileTensor, params: Mapping[str, jax.Array], tensors, dtype, lora: LoraConfig) -> np.ndarray:
    """A tensor as it is in the file, from the shards of all that it is made of."""
    whole, filled = np.empty(slot.shape, dtype), 0
    for path, lead in slot.sources:
        tensor, param = tensors[path], params[path]
        theirs = in_our_order(whole, tensor)
        adapter = [params.get(path.removesuffix("kernel") + name) for name in ("lora_a", "lora_b")]
        arrays = [param] if adapter[0] is None else [param, *adapter]
        if isinstance(param, Unstacked):
            param, lead = _dense([array[lead[0]] for array in arrays], lead[1:], lora), ()
            arrays = [param]
        elif isinstance(param, Quantised):
            param, lead = _dense(arrays, lead, lora), ()
            arrays = [param]
        distinct = {shard_bounds(shard.index, param.shape): shard.device for shard in param.addressable_shards}
        for bounds, device in distinct.items():
            leading, inner = bounds[: len(lead)], bounds[len(lead) :]
            if all(start <= number < stop for number, (start, stop) in zip(lead, leading, strict=True)):
                index = [number - start for number, (start, _) in zip(lead, leading, strict=True)]
                ours = _fetch([_on_device(device, array) for array in arrays], index, lora)
                for here, there in block_indices(tensor, inner):
                    copy(theirs[there], ours[here])
                    filled += ours[here].size
                del ours
                gc.collect(0)  # jax lets go of what numpy has seen in a collection only
    assert filled == whole.size, f"the table fills {filled} of the {whole.size} elements of {slot.name}"
    return whole


def _on_device(device: jax.Device, array: jax.Array) -> jax.Array:
    return next(shard.data for shard in array.addressable_shards if shard.device == device)


def _fetch(arrays: list[jax.Array], index: list[int], lora: LoraConfig) -> np.ndarray:
    """One layer (and expert) of a kernel's shard, and of its adapter's where there is one, which lie on one device."""
    if len(arrays) == 1 and arrays[0].device.platform == "cpu":
        return np.asarray(arrays[0])[tuple(index)]  # a view of the device's own memory
    return np.asarray(_copy_item(arrays, index, lora))


@functools.partial(jax.jit, static_argnames="lora")
def _dense(arrays: list, lead: tuple[jax.Array, ...], lora: LoraConfig) -> jax.Array:
    """One matrix of a kernel in float32, with its adapter where there is one, split as the kernel is."""
    for number in lead:
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
        arrays = jax.tree.map(take, arrays)
    dense = dequantise(arrays[0], jnp.float32)
    return dense if len(arrays) == 1 else merge_kernel(dense, *arrays[1:], lora.scale)


@functools.partial(jax.jit, static_argnames="lora")
def _copy_item(arrays: list[jax.Array], index: list[jax.Array], lora: LoraConfig) -> jax.Array:
    """A copy, as what numpy is given of an array itself would stay on the host for as long as the array lives.

    The index is traced, so that each shape is compiled once. Each device has those parts of A and B whose product is
    its part of the kernel, so that nothing is sent.
    """
    for number in index:
        arrays = [jax.lax.dynamic_index_in_dim(array, number, keepdims=False) for array in arrays]
    return jnp.copy(arrays[0]) if len(arrays) == 1 else merge_kernel(*arrays, lora.scale)
