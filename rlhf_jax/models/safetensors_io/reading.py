"""Files -> parameters, one device's shard at a time."""

from __future__ import annotations

import gc
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.mesh import Layout
from rlhf_jax.models.decoder import Leaf
from rlhf_jax.models.families.tensors import Checkpoint, HfTensor
from rlhf_jax.models.quantised import is_quantisable, quantise_layers
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
from rlhf_jax.models.safetensors_io.files import join_names, open_folder
from rlhf_jax.models.unstacked import Param, Unstacked, is_shareable

LOGGER = logging.getLogger(__name__)
_ALIGNMENT = 64
_FOREIGN = "of an unsupported dtype"


def read_params(
    folder: Path,
    leaves: Mapping[str, Leaf],
    checkpoint: Checkpoint,
    layout: Layout,
    dtype: str,
    *,
    kind: str | None = None,
    serving: Layout | None = None,
) -> dict[str, Param]:
    """Parameters from a folder's files; besides them, the host holds one shard of one parameter at a time.

    Args:
        folder: holds what `open_folder` reads.
        leaves: {path: shape and logical axes}; the result has these paths, except optional ones that the files lack.
        checkpoint: the tensors that the files hold, and others that they may hold.
        layout: sharding of the parameters.
        dtype: of the result; the files may be float32, float16 or bfloat16.
        serving: sharding of the parameters that both phases share, with one array per layer for kernels; None: nothing
            is shared.
        kind: "int8" or "nf4": quantise the kernels of the layers' linears, each layer as soon as it is on the devices.
    Raises:
        ValueError: no weights in the folder, a damaged file, a dimension that the layout does not split evenly or
            that cannot be quantised; or tensors that are missing, surplus, misshaped or of another dtype, all of them
            in one message.
    """
    files, layouts = _open_model(folder, checkpoint), checkpoint.layouts

    def find(name: str) -> str | None:
        return _find(files, checkpoint, name)

    def missing(tensors: Mapping[str, HfTensor], leaves: Mapping[str, Leaf]) -> set[str]:
        return {name for path, leaf in leaves.items() for name in _names(leaf, tensors[path]) if not find(name)}

    tensors = min(({**layouts[0], **other} for other in layouts), key=lambda tensors: len(missing(tensors, leaves)))
    lacking = {path for path in checkpoint.optional if not any(map(find, _names(leaves[path], tensors[path])))}
    leaves = {path: leaf for path, leaf in leaves.items() if path not in lacking}
    used, faults = set(), {"missing": missing(tensors, leaves), "surplus": set(), "misshaped": set(), _FOREIGN: set()}
    for path, leaf in leaves.items():
        for name in filter(None, map(find, _names(leaf, tensors[path]))):
            used.add(name)
            entry, shape = files[name], tensors[path].shape
            if entry.shape != shape:
                faults["misshaped"].add(f"{name} ({list(entry.shape)} in place of {list(shape)})")
            elif entry.dtype not in NUMPY_DTYPES:
                faults[_FOREIGN].add(f"{name} ({entry.dtype} in place of {', '.join(NUMPY_DTYPES)})")
    surplus = files.keys() - used
    surplus -= {name for name in surplus if checkpoint.tolerated and checkpoint.tolerated.fullmatch(name)}
    unused = {name for name in surplus if checkpoint.heads and checkpoint.heads.fullmatch(name)}
    faults["surplus"] = surplus - unused
    if any(faults.values()):
        reported = "; ".join(f"{fault}: {join_names(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"the tensors of {folder} are not those that its config.json describes; {reported}")
    log_unused_heads(folder, unused, files, {tensors[path].name for path in leaves})
    layouts_of = {path: serving if serving and is_shareable(path) else layout for path in leaves}
    _check_even(leaves, layouts_of)
    found = {name: files[find(name)] for path, leaf in leaves.items() for name in _names(leaf, tensors[path])}

    def read(path: str, leaf: Leaf) -> Param:
        source = found, leaf, tensors[path], layouts_of[path]
        if kind and is_quantisable(path):
            layers = _layers(*source, np.dtype(np.float32))
            return quantise_layers(layers, leaf.shape, leaf.axes, kind, layouts_of[path])
        if serving and is_quantisable(path):
            return Unstacked(tuple(_layers(*source, jnp.dtype(dtype))))
        return _read_parameter(*source, jnp.dtype(dtype))

    return {path: read(path, leaf) for path, leaf in leaves.items()}


def _open_model(folder: Path, checkpoint: Checkpoint) -> dict[str, Entry]:
    """The tensors of the folder that are of this model, by the names that they have in its layouts."""
    found: dict[str, Entry] = {}
    for name, entry in open_folder(folder).items():
        own = checkpoint.rename(name)
        if own in found:
            raise ValueError(f"{folder} has {own} under two names: remove what is of another checkpoint")
        if own is not None:
            found[own] = entry
    return found


def _find(files: Mapping[str, Entry], checkpoint: Checkpoint, name: str) -> str | None:
    """The name with or without the prefix, whichever the files have."""
    return next((n for n in (name, name.removeprefix(checkpoint.prefix)) if n in files), None)


def different_twin(folder: Path, checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Names of a head and an embedding of the folder that a tied model shares, and that differ; ValueError as
    `read_params`.
    """
    files = _open_model(folder, checkpoint)
    for name, other in checkpoint.twins.items():
        head, embedding = (_find(files, checkpoint, n) for n in (name, other))
        if head and embedding and not _equal_tensors(files[head], files[embedding]):
            return head, embedding
    return None


def log_unused_heads(folder: Path, names: Set[str], files: Mapping[str, Entry], used: Set[str]) -> None:
    """Log the tensors `names` of heads, of which the biases of those `used` shift every score."""
    biases = {name for name in names if name.removesuffix("bias") + "weight" in used}
    for name in biases:
        shift = ", ".join(f"{x:g}" for x in files[name].array().astype(np.float32).reshape(-1))
        LOGGER.warning(f"{folder}: {name} ({shift}) is left out, as a scalar head has none: every score is less by it")
    if names - biases:
        LOGGER.warning(f"{folder}: {join_names(names - biases)} left out, as this model does not use them")


def _names(leaf: Leaf, tensor: HfTensor) -> list[str]:
    return [name for _, name in member_tensors(tensor, [(0, size) for size in leaf.shape[: num_spread(tensor)]])]


def _equal_tensors(one: Entry, other: Entry) -> bool:
    """Whether two tensors hold the same numbers, compared `size` rows at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    size = 1 << 14
    rows = (slice(start, start + size) for start in range(0, one.shape[0], size))
    same = all(np.array_equal(one.array()[part], other.array()[part]) for part in rows)
    one.release()
    other.release()
    return same


def _check_even(leaves: Mapping[str, Leaf], layouts: Mapping[str, Layout]) -> None:
    uneven = [
        f"{path} ({size} over {layouts[path].shards(axis)})"
        for path, leaf in leaves.items()
        for size, axis in zip(leaf.shape, leaf.axes, strict=True)
        if axis and size % layouts[path].shards(axis)
    ]
    if uneven:
        raise ValueError(f"the mesh does not split these evenly, choose a smaller one: {', '.join(uneven)}")


def _layers(files, leaf: Leaf, tensor: HfTensor, layout: Layout, dtype: np.dtype) -> Iterator[jax.Array]:
    layer = Leaf(leaf.shape[1:], leaf.axes[1:])
    return (_read_parameter(files, layer, tensor, layout, dtype, (i,)) for i in range(leaf.shape[0]))


def _read_parameter(
    files: Mapping[str, Entry], leaf: Leaf, tensor: HfTensor, layout: Layout, dtype: np.dtype, at: tuple[int, ...] = ()
) -> jax.Array:
    """A parameter, or the part of it `at` an index of its leading dimensions, which `leaf` lacks."""
    sharding = layout.sharding(leaf.axes)
    replicas = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        replicas[shard_bounds(index, leaf.shape)].append(device)
    arrays: list[jax.Array] = []
    for bounds, devices in replicas.items():
        shard = _shard(files, tensor, (*((i, i + 1) for i in at), *bounds), dtype)[(0,) * len(at)]
        arrays += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
        del shard
        gc.collect(0)  # JAX frees its inputs only in a collection, and the next shard is as large
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _shard(files: Mapping[str, Entry], tensor: HfTensor, bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    """The part of a parameter within the bounds."""
    shard = _zeros([stop - start for start, stop in bounds], dtype)
    leading = num_spread(tensor)
    for index, name in member_tensors(tensor, bounds[:leading]):
        part, file = shard[(*index, ...)], orient(files[name].array(), tensor)
        for here, there in block_indices(tensor, bounds[leading:]):
            copy(part[here], file[there])
        files[name].release()
    return shard


def _zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An aligned array of zeros: where the device is the host, JAX uses such an array as it is, and copies others."""
    memory = np.zeros(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : memory.size - _ALIGNMENT + start].view(dtype).reshape(shape)
