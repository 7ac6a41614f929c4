"""Which kernel attends: cuDNN's fused attention where GPU, dtype and model allow it, XLA's matrix products elsewhere.

The fused kernel never writes the [T, S] scores to memory. It is asked for causal attention and nothing else: no mask
and no bias, which it would have to read as [B, H, T, S]. So rows are right-padded before it, where causality alone
keeps every real query from the padding; and rows of several documents are XLA's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.models.config import Choice, DecoderConfig

MAX_HEAD_DIM = 128  # cuDNN's backward pass on Ampere; Hopper takes 256


class AttentionKernel(NamedTuple):
    name: Literal["cudnn", "xla"]
    reason: str


def device_obstacle(mesh: Mesh, dtype: jnp.dtype) -> str:
    """Why the devices of a mesh, real or only compiled for, cannot run fused attention in `dtype`; "" if they can."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return f"fused attention runs on GPUs, and the devices are {device.platform}"
    capability = str(getattr(device, "compute_capability", ""))  # of CUDA, for example "8.0"
    major = capability.partition(".")[0]
    if not major.isdigit():
        return "fused attention is cuDNN's, and these GPUs are not NVIDIA's"
    if int(major) < 8:
        return f"fused attention needs compute capability 8.0, and these GPUs have {capability}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"fused attention computes in bfloat16 or float16, and the dtype is {jnp.dtype(dtype).name}"
    return ""


def model_obstacle(config: DecoderConfig, length: int, *, packed: bool = False) -> str:
    """Why fused attention cannot compute this model on rows of `length` tokens; "" if it can.

    Args:
        packed: whether a row may hold several documents.
    """
    if packed:
        return "rows are packed, and it is given no mask that keeps documents apart"
    if config.attention_softcap:
        return f"scores are soft-capped at {config.attention_softcap:g}"
    if config.alibi:
        return "scores are biased (ALiBi)"
    if config.head_dim % 8 or config.head_dim > MAX_HEAD_DIM:
        return f"heads have size {config.head_dim}, and fused ones are multiples of 8 up to {MAX_HEAD_DIM}"
    if uniform_window(config, length) is None:
        return f"windows differ between the layers and rows of {length} tokens are longer than the shortest"
    return ""


def uniform_window(config: DecoderConfig, length: int) -> int | None:
    """The window that all layers share on rows of `length` tokens, 0 where all see everything; None if they differ."""
    windows = {window if window < length else 0 for window in config.windows or (0,)}
    return windows.pop() if len(windows) == 1 else None


def _select_kernel(obstacle: str, choice: Choice, dtype: jnp.dtype) -> AttentionKernel:
    if choice == "cudnn" and obstacle:
        raise ValueError(f'model.attention="cudnn" is impossible: {obstacle}; set it to "auto" or "xla"')
    if choice == "xla":
        return AttentionKernel("xla", 'model.attention="xla"')
    if obstacle:
        return AttentionKernel("xla", obstacle)
    return AttentionKernel("cudnn", f"{jnp.dtype(dtype).name}, causal")


def kernel_for_devices(mesh: Mesh, dtype: jnp.dtype, choice: Choice) -> AttentionKernel:
    """What any model could have on the devices of a mesh; raises as `kernel_for_mesh`."""
    return _select_kernel(device_obstacle(mesh, dtype), choice, dtype)


def kernel_for_mesh(
    mesh: Mesh | AbstractMesh,
    config: DecoderConfig,
    dtype: jnp.dtype,
    length: int,
    choice: Choice,
    *,
    packed: bool = False,
) -> AttentionKernel:
    """The kernel for rows of `length` tokens (`packed`: of several documents) that are looked at all at once, and why.

    It is XLA's on a mesh without devices, where only shapes are asked for.

    Raises:
        ValueError: "cudnn" is asked for where it is impossible.
    """
    if isinstance(mesh, AbstractMesh):
        return AttentionKernel("xla", "no devices")
    return _select_kernel(device_obstacle(mesh, dtype) or model_obstacle(config, length, packed=packed), choice, dtype)


def describe_kernel(kernel: AttentionKernel, phases: str, *, decodes: bool) -> str:
    """What a run says: "cuDNN for scoring and prefill (bfloat16, causal), XLA for decoding (one query)"."""
    if kernel.name == "xla":
        return f"XLA ({kernel.reason})"
    return f"cuDNN for {phases} ({kernel.reason})" + (", XLA for decoding (one query)" if decodes else "")
