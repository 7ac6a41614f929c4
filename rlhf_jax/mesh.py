"""One named mesh, and tables that map logical axes to mesh axes in each phase.

A parameter names the *logical* axis of each of its dimensions ("vocab", "heads", ...); a `Table` maps those to
mesh axes. `TRAIN` is ZeRO-3: the dimension that tensor parallelism would split is split over every device,
tensor-major, and the batch over the same axes in the same order, so gradients are reduce-scattered. `GENERATE` keeps
the tensor part of that split and replicates over fsdp. Going from TRAIN to GENERATE is therefore one all-gather over
fsdp, and back is a local slice. `WHOLE` is for the lower stages of ZeRO: weights as in generation, the batch as in
training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax import hosts

AXES = ("data", "fsdp", "tensor")
HOST_MEMORY = "pinned_host"  # memory kind of arrays that are kept on the host and fetched for computation


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; at most one size is -1: all remaining devices."""

    data: int = 1  # replicas of the whole training state
    fsdp: int = -1  # parameters, gradients and optimizer state are split over these; generation batches too
    tensor: int = 1  # tensor-parallel shards of the generation weights (training splits over them like fsdp)
    tensor_across_nodes: bool = False  # let tensor span machines, whose network is far slower than the links within one
    # What fsdp splits: 0 the batch alone, 1 optimizer state too, 2 gradients too, 3 parameters too ("auto": the plan).
    zero: Literal[3, 2, 1, 0, "auto"] = 3


@dataclass(frozen=True)
class Table:
    """Mesh axes for each logical axis, major to minor; () is replicated."""

    batch: tuple[str, ...]
    vocab: tuple[str, ...]
    heads: tuple[str, ...]  # query heads times head size, or query heads
    kv_heads: tuple[str, ...]
    mlp: tuple[str, ...]
    positions: tuple[str, ...]  # the hidden dimension of small tables that generation replicates
    embed: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()  # each expert is split by its width
    rank: tuple[str, ...] = ()


_ALL, _TENSOR = ("tensor", "fsdp"), ("tensor",)
TRAIN = Table(batch=("data", *_ALL), vocab=_ALL, heads=_ALL, kv_heads=_ALL, mlp=_ALL, positions=_ALL)
GENERATE = Table(("data", "fsdp"), vocab=_TENSOR, heads=_TENSOR, kv_heads=_TENSOR, mlp=_TENSOR, positions=())
WHOLE = dataclasses.replace(GENERATE, batch=TRAIN.batch)


@dataclass(frozen=True)
class Layout:
    """A mesh with the table of one phase, and the tables of the rest of a training state where they differ.

    Attributes:
        table: table of parameters and activations.
        gradients_by: table of the summed gradients; None: `table`.
        moments_by: table of the optimizer's moments, and of everything computed from them; None: `table`.
        moments_in: memory kind in which moments are kept between updates; None: device memory.
    """

    mesh: Mesh
    table: Table
    gradients_by: Table | None = None
    moments_by: Table | None = None
    moments_in: str | None = None

    @property
    def on_cpus(self) -> bool:
        """Whether the devices are CPUs; an AbstractMesh has no devices."""
        return isinstance(self.mesh, Mesh) and self.mesh.devices.flat[0].platform == "cpu"

    @property
    def on_one_cpu(self) -> bool:
        return self.on_cpus and self.mesh.size == 1

    @property
    def gradients(self) -> Layout:
        return Layout(self.mesh, self.gradients_by or self.table)

    @property
    def moments(self) -> Layout:
        """The layout of moments while they are on the devices, whatever memory they are kept in."""
        return Layout(self.mesh, self.moments_by or self.table)

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes, one per dimension; None is replicated."""
        return PartitionSpec(*(getattr(self.table, axis) or None if axis else None for axis in axes))

    def sharding(self, axes: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrain the sharding of an activation inside jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def shards(self, axis: str) -> int:
        """Number of parts that this logical axis is split into."""
        return math.prod(self.mesh.shape[name] for name in getattr(self.table, axis))

    def put(self, host: np.ndarray, *axes: str | None) -> jax.Array:
        """Device array of a host array that every process holds whole; each device receives only its shard."""
        return jax.make_array_from_callback(host.shape, self.sharding(axes), lambda index: host[index])

    def own_rows(self, batch_size: int) -> np.ndarray:
        """[n] int64, ascending: the rows of a batch that are on devices of this process."""
        parts = self.sharding(["batch"]).addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in parts]))

    def put_own_rows(self, tree, batch_size: int):
        """Device arrays of a batch, of which each process holds only its `own_rows`."""
        own = self.own_rows(batch_size)

        def put(leaf: np.ndarray) -> jax.Array:
            def part(index):
                rows = np.searchsorted(own, np.arange(batch_size)[index[0]])
                return leaf[(rows, *index[1:])]

            sharding = self.sharding(["batch", *[None] * (leaf.ndim - 1)])
            return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)

        return jax.tree.map(put, tree)

    def put_batch(self, tree):
        """`put` for a pytree of host arrays whose first dimension is the batch."""
        return jax.tree.map(lambda leaf: self.put(leaf, "batch", *[None] * (leaf.ndim - 1)), tree)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The ("data", "fsdp", "tensor") mesh over these devices; None: over all, those of a machine next to each other.

    Raises:
        ValueError: more than one -1, a size below 1, sizes whose product is not the number of devices, or a tensor axis
            across machines without `tensor_across_nodes`.
    """
    nodes = hosts.nodes() if devices is None else None
    devices = by_node(jax.devices(), nodes) if nodes else devices
    grid = np.asarray(devices).reshape(tuple(mesh_sizes(config, len(devices)).values()))
    if nodes and not config.tensor_across_nodes:
        check_within_nodes(np.vectorize(lambda device: nodes[device.process_index])(grid))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def by_node(devices: Sequence[jax.Device], nodes: Sequence[int]) -> list[jax.Device]:
    """The devices by machine, process and id; nodes: [processes] the machine of each process."""
    return sorted(devices, key=lambda device: (nodes[device.process_index], device.process_index, device.id))


def check_within_nodes(nodes: np.ndarray) -> None:
    """Raise ValueError where devices of a tensor axis are on several machines; nodes: [data, fsdp, tensor] ints."""
    if (nodes != nodes[..., :1]).any():
        each = nodes.size // len(np.unique(nodes))
        raise ValueError(
            f"mesh.tensor={nodes.shape[-1]} splits every layer over machines of {each} devices, whose network is far "
            f"slower than the links within one: set mesh.tensor to one of {_divisors(each)}, or "
            "mesh.tensor_across_nodes=true"
        )


def mesh_sizes(config: MeshConfig, count: int) -> dict[str, int]:
    """Devices along each axis of the mesh over `count` devices; raises as `make_mesh`."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    wrong = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(free) > 1:
        reported = ", ".join(wrong) or " and ".join(f"mesh.{axis}=-1" for axis in free)
        raise ValueError(f"{reported}: every size is at least 1, and at most one is -1 (all devices that are left)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if count % fixed or (not free and fixed != count):
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        nearest = f"one of {nearest_sizes(fixed, _divisors(count))}"
        fix = nearest if free else f"{count}, or set one of them to -1 to take what is left"
        reason = f"does not cover {count} device(s): the sizes that are not -1 multiply to {fixed}"
        raise ValueError(f"mesh {asked} {reason}; make them multiply to {fix}")
    for axis in free:
        sizes[axis] = count // fixed
    return sizes


def train_layout(mesh: Mesh, zero: int, *, offload_moments: bool = False) -> Layout:
    """The layout of a training state at a ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054), its batch by TRAIN.

    Stage 0 splits nothing over fsdp, stage 1 the optimizer's moments, stage 2 the summed gradients too, stage 3 the
    parameters too. Over tensor the whole state is split at every stage.

    Args:
        offload_moments: whether moments are kept in pinned host memory.
    """
    assert zero in (0, 1, 2, 3) and offload_moments in (True, False), (zero, offload_moments)
    moments_in = HOST_MEMORY if offload_moments else None
    if zero == 3:
        return Layout(mesh, TRAIN, moments_in=moments_in)
    return Layout(mesh, WHOLE, TRAIN if zero == 2 else None, TRAIN if zero else None, moments_in)


def single_device_mesh() -> Mesh:
    """A mesh of this process's first device alone: the library's default when no mesh is given."""
    return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def in_host_memory(leaf: Any) -> bool:
    """Whether an array, or an abstract one with a sharding, is in host memory."""
    return leaf.sharding.memory_kind == HOST_MEMORY


def to_host(tree: Any) -> Any:
    """The same arrays in host memory, sharded as on the devices."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST_MEMORY)), tree)


def to_devices(tree: Any) -> Any:
    """The same arrays on the devices; arrays already there are returned as they are: `jax.device_put` would copy."""

    def fetch(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(None)) if in_host_memory(leaf) else leaf

    return jax.tree.map(fetch, tree)


def nearest_sizes(size: int, legal: Sequence[int], count: int = 3) -> str:
    """The `count` legal sizes nearest to `size`, as text."""
    return ", ".join(map(str, sorted(sorted(legal, key=lambda n: abs(n - size))[:count])))


def check_divides(name: str, size: int, parts: int, why: str) -> None:
    """Raise ValueError unless `size` is a positive multiple of `parts`, naming the nearest sizes that are."""
    if size < 1 or size % parts:
        low = max(size, 0) // parts * parts
        near = [n for n in (low, low + parts) if n > 0]
        raise ValueError(f"{name}={size} does not divide over {parts} {why}; nearest that do: {near}")


def check_model_divides(sizes: dict[str, int], mesh: Mesh) -> None:
    """Raise ValueError unless each named model size is split evenly by the tensor axis, naming the axis sizes that do.

    `sizes`: for example {"key-value heads": 8, "MLP width": 11008}.
    """
    tensor = mesh.shape["tensor"]
    if wrong := {name: size for name, size in sizes.items() if size % tensor}:
        reported = ", ".join(f"{size} {name}" for name, size in wrong.items())
        near = nearest_sizes(tensor, _divisors(math.gcd(*sizes.values())))
        raise ValueError(f"mesh.tensor={tensor} does not divide {reported} of this model; sizes that divide: {near}")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
