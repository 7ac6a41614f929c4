"""GPUs by name: memory, speeds, links; and devices to compile for where there is none.

Sizes and speeds are NVIDIA's data sheets (dense, without sparsity); what the compiler is told of each is what XLA's own
target specifications say (openxla/xla, xla/backends/gpu/target_config/specs), for L40S by NVIDIA's Ada white paper.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Speeds are of one GPU, in one direction, a second."""

    name: str
    memory: int  # bytes, as the driver reports them
    bandwidth: float  # bytes of device memory
    flops: float  # of matrix products in bfloat16
    flops_float32: float  # of those that JAX computes for float32: TF32 where there is such a unit
    link: float  # bytes to another GPU of the node
    network: float  # bytes to another node, in the machines that NVIDIA sells with it
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    l2_bytes: int
    label: str  # as the driver names it


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100-32GB", 34_089_730_048, 898e9, 15.7e12, 15.7e12, 150e9, 6.25e9, (7, 0), 80, 1.53, 6 << 20,
            "Tesla V100-SXM2-32GB"),  # no bfloat16 unit: it is computed in float32
        Gpu("A100-40GB", 42_331_013_120, 1555e9, 312e12, 156e12, 300e9, 25e9, (8, 0), 108, 1.41, 40 << 20,
            "NVIDIA A100-SXM4-40GB"),
        Gpu("A100-80GB", 85_094_236_160, 2039e9, 312e12, 156e12, 300e9, 25e9, (8, 0), 108, 1.41, 40 << 20,
            "NVIDIA A100-SXM4-80GB"),
        Gpu("A6000-48GB", 51_041_271_808, 768e9, 155e12, 77e12, 32e9, 3.1e9, (8, 6), 84, 1.80, 6 << 20,
            "NVIDIA RTX A6000"),
        Gpu("L40S", 48_305_799_168, 864e9, 362e12, 183e12, 32e9, 6.25e9, (8, 9), 142, 2.52, 96 << 20,
            "NVIDIA L40S"),
        Gpu("H100-80GB", 84_942_979_072, 3352e9, 989e12, 494e12, 450e9, 50e9, (9, 0), 132, 1.98, 50 << 20,
            "NVIDIA H100 80GB HBM3"),
        Gpu("H200", 151_397_597_184, 4800e9, 989e12, 494e12, 450e9, 50e9, (9, 0), 132, 1.98, 50 << 20,
            "NVIDIA H200 141GB HBM3e"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Fleet:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return "x".join([str(self.nodes)] * (self.nodes > 1) + [str(self.per_node), self.gpu.name])

    @property
    def slowest_link(self) -> float:
        """Bytes a second of one GPU over what a collective of all GPUs has to cross."""
        return self.gpu.network if self.nodes > 1 else self.gpu.link


def parse_fleet(text: str) -> Fleet:
    """ "A100-80GB", "8xA100-80GB", or nodes x GPUs as "8x8xA100-80GB".

    Raises:
        ValueError: another form, or a GPU that is not known; the known are named.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z].*)", text.strip())
    name = match[3].upper() if match else ""
    counts = [int(part) for part in match.groups()[:2] if part] if match else []
    if name not in GPUS or 0 in counts:
        raise ValueError(
            f"--gpus {text}: write 8xNAME, or for nodes of 8 GPUs 4x8xNAME, where NAME is one of {', '.join(GPUS)}"
        )
    nodes, per_node = ([1, 1] + counts)[-2:]
    return Fleet(GPUS[name], nodes, per_node)


def local_fleet() -> Fleet:
    """The GPUs of this machine. ValueError where it has none, or one that is not known."""
    import jax

    devices = jax.devices()
    known = [gpu for gpu in GPUS.values() if gpu.label == devices[0].device_kind]
    if not known:
        raise ValueError(
            f"this machine has {len(devices)} x {devices[0].device_kind}, which is not a GPU that plans are made for: "
            f"name the machine to plan, --gpus 8xNAME with one of {', '.join(GPUS)}"
        )
    return Fleet(known[0], jax.process_count(), jax.local_device_count())


def cuda_plugin() -> int:
    """The CUDA version that JAX's plugin here is built for, with or without a GPU; 0: it is not installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return 0
    return next((v for v in (13, 12) if importlib.util.find_spec(f"jax_plugins.xla_cuda{v}")), 0)


def absent_devices(fleet: Fleet) -> list[Any]:
    """Devices that programs can be compiled for and not run on; needs the CUDA plugin and no GPU.

    The plugin wants JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment before JAX is imported.
    """
    from jax.experimental import topologies

    topology = f"1x{fleet.nodes}x{fleet.per_node}"
    text = target_config(fleet.gpu)
    return topologies.get_topology_desc(fleet.gpu.name, platform="cuda", target_config=text, topology=topology).devices


def target_config(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto as text."""
    major, minor = gpu.capability
    # Bytes of shared memory of a core, and what one block may ask for; threads of a core; float32 units of a core.
    shared, optin, threads, units = {
        (7, 0): (98304, 98304, 2048, 64),
        (8, 0): (167936, 166912, 2048, 64),
        (8, 6): (102400, 101376, 1536, 128),
        (8, 9): (102400, 101376, 1536, 128),
        (9, 0): (233472, 232448, 2048, 128),
    }[gpu.capability]
    extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {threads}
  core_count: {gpu.cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(gpu.bandwidth)}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.label}"
"""
