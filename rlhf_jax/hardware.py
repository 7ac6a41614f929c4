"""GPUs that need not be there: what they have, and devices that XLA compiles for wherever the CUDA plugin is."""

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
# XLA would merge products of one input, as a kernel's and its adapter's, by writing their weights side by side: anew
# for every token, or of all layers at once.
RUN_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
# Timing candidate kernels needs the GPU; without it the compiler takes its first choice.
COMPILE_OPTIONS = {"xla_gpu_autotune_level": 0}


@dataclass(frozen=True)
class Gpu:
    """One model of card, as `hardware.toml` describes it. Rates are per second and without sparsity.

    Attributes:
        memory: bytes that CUDA reports, a little under the card's name.
        bandwidth: bytes of memory.
        flops: of bfloat16 products summed in float32; of float16 where there is no bfloat16 (V100).
        link: bytes to the other cards of a node, each way: NVLink, or PCIe where `nvlink` is false.
        network: bytes to other nodes for each card, each way, as such nodes are usually sold.
        capability: CUDA compute capability.
        cores .. clock: what the compiler asks of the chip: multiprocessors, float32 units of each, bytes of L2 cache
            and of shared memory (a multiprocessor's, and the most that a block may have), threads, GHz.
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
        """The text of a GpuTargetConfigProto, which stands for the card when XLA compiles."""
        major, minor = self.capability.split(".")
        return f"""
gpu_device_info {{
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {self.threads}
  core_count: {self.cores}
  fpus_per_core: {self.units}
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{self.title}"
"""


def _read_gpus() -> dict[str, Gpu]:
    tables = tomllib.loads(resources.files(__package__).joinpath("hardware.toml").read_text())
    return {name: Gpu(name=name, **table) for name, table in tables.items()}


GPUS = _read_gpus()


@dataclass(frozen=True)
class Machine:
    """`nodes` computers with `per_node` cards each."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def count(self) -> int:
        return self.nodes * self.per_node


def parse_machine(text: str) -> Machine:
    """ "A100-80GB", "8xA100-80GB" or, in several nodes, "8x8xA100-80GB".

    Raises:
        ValueError: text of another form, or an unknown card.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(?:([1-9]\d*)x)?([A-Za-z].*)", text.strip())
    gpu = GPUS.get(match[3]) if match else None
    if gpu is None:
        raise ValueError(
            f'"{text}" names no GPUs: write for example 8xA100-80GB, or 8x8xA100-80GB for eight such nodes; known '
            f"cards are {', '.join(GPUS)}"
        )
    counts = [int(count) for count in match.groups()[:2] if count]
    return Machine(gpu, counts[0] if len(counts) == 2 else 1, counts[-1] if counts else 1)


def cuda_plugin() -> str | None:
    """The CUDA plugin that is installed; None if there is none."""
    return next((name for name in PLUGINS if importlib.util.find_spec(name)), None)


def compile_only_devices(text: str) -> list[Any]:
    """Compile-only JAX devices for `parse_machine(text)`, for a mesh of programs that are lowered and compiled, never
    run.

    Nothing here needs a GPU. Compile with `COMPILE_OPTIONS`, and `attention` and layouts come out as on the real ones.

    Raises:
        ValueError: no such GPUs, or no CUDA plugin that knows them.
    """
    wanted = parse_machine(text)
    if cuda_plugin() is None:
        raise ValueError(f'compiling for {text} needs JAX\'s CUDA plugin, not a GPU: pip install "rlhf_jax[cuda13]"')
    if wanted.gpu.capability < "7.5" and cuda_plugin() == "jax_cuda13_plugin":
        raise ValueError(f'CUDA 13 no longer compiles for {wanted.gpu.name}: pip install "rlhf_jax[cuda12]" instead')
    # Else the plugin refuses to load where the driver's libraries, which compiling does not need, are missing.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    return list(
        topologies.get_topology_desc(
            wanted.gpu.name,
            platform="cuda",
            target_config=wanted.gpu.target_config,
            topology=f"1x{wanted.nodes}x{wanted.per_node}",
        ).devices
    )
