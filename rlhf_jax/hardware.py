"""GPU specifications, and compile-only devices for GPUs that are not attached; those need the CUDA plugin alone."""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

GIB = 2**30
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# XLA would merge products of one input, such as a kernel's and its adapter's, by concatenating their weights: again for
# every token, or for all layers at once.
RUN_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
# Timing candidate kernels needs the GPU; without timing the compiler takes its first choice.
COMPILE_OPTIONS = {"xla_gpu_autotune_level": 0}


@dataclass(frozen=True)
class Gpu:
    """One GPU model, as `hardware.toml` describes it. Rates are per second and without sparsity.

    Attributes:
        memory: bytes that CUDA reports, a little less than the product name says.
        bandwidth: memory bandwidth, bytes per second.
        flops: bfloat16 products summed in float32; float16 where there is no bfloat16 (V100, T4).
        link: bytes per second to the other GPUs of a node, each way: NVLink, or PCIe where `nvlink` is false.
        network: bytes per second to other nodes per GPU, each way, as such nodes are usually sold.
        capability: CUDA compute capability.
        cores, units, cache, shared, shared_block, threads, clock: what the compiler needs of the chip: multiprocessors,
            float32 units per multiprocessor, bytes of L2 cache, bytes of shared memory per multiprocessor and at most
            per block, threads per multiprocessor, GHz.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    network: float
    capability: str
    cores: int
    units: int
    cache: int
    shared: int
    shared_block: int
    threads: int
    clock: float
    nvlink: bool = True

    @property
    def target_config(self) -> str:
        """The text of a GpuTargetConfigProto, which XLA compiles for in place of an attached GPU."""
        major, minor = self.capability.split(".")
        return f"""
gpu_device_info {{
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {self.threads}
  core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock}
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.cache}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{self.title}"
"""


_TABLES = tomllib.loads(resources.files(__package__).joinpath("hardware.toml").read_text())
GPUS = {name: Gpu(name=name, **table) for name, table in _TABLES.items()}


@dataclass(frozen=True)
class Machine:
    """`nodes` computers with `per_node` GPUs each."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def count(self) -> int:
        return self.nodes * self.per_node


def parse_machine(text: str) -> Machine:
    """Parse "A100-80GB", "8xA100-80GB" or, for several nodes, "8x8xA100-80GB".

    Raises:
        ValueError: text of another form, or an unknown GPU.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(?:([1-9]\d*)x)?([A-Za-z].*)", text.strip())
    gpu = GPUS.get(match[3]) if match else None
    if gpu is None:
        fix = "write for example 8xA100-80GB, or 8x8xA100-80GB for eight such nodes"
        raise ValueError(f'"{text}" names no GPUs: {fix}; known GPUs are {", ".join(GPUS)}')
    counts = [int(count) for count in match.groups()[:2] if count]
    return Machine(gpu, counts[0] if len(counts) == 2 else 1, counts[-1] if counts else 1)


def cuda_plugin() -> str | None:
    """The name of the installed CUDA plugin; None if there is none."""
    return next((name for name in PLUGINS if importlib.util.find_spec(name)), None)


def compile_obstacle(gpu: Gpu) -> str:
    """Why nothing can be compiled for this GPU, with the fix; "" if it can."""
    if cuda_plugin() is None:
        return f'compiling for {gpu.name} needs JAX\'s CUDA plugin, not a GPU: pip install "rlhf_jax[cuda13]"'
    if gpu.capability < "7.5" and cuda_plugin() == "jax_cuda13_plugin":
        return f'CUDA 13 no longer compiles for {gpu.name}: pip install "rlhf_jax[cuda12]" instead'
    return ""


def compile_only_devices(text: str) -> list[Any]:
    """Compile-only JAX devices for `parse_machine(text)`: programs on a mesh of them are compiled but cannot run.

    No GPU is needed. With `COMPILE_OPTIONS` programs get the attention kernels and layouts of attached GPUs.

    Raises:
        ValueError: no such GPUs, or no CUDA plugin that supports them.
    """
    wanted = parse_machine(text)
    if obstacle := compile_obstacle(wanted.gpu):
        raise ValueError(obstacle)
    # Otherwise the plugin does not load where the driver's libraries, which compiling does not need, are missing.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    shape, target = f"1x{wanted.nodes}x{wanted.per_node}", wanted.gpu.target_config
    topology = topologies.get_topology_desc(wanted.gpu.name, platform="cuda", target_config=target, topology=shape)
    return list(topology.devices)
