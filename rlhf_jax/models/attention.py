"""Which kernel attends: cuDNN's fused attention where GPU, dtype and model allow it, XLA's matrix products elsewhere.

The fused kernel never writes the [T, S] scores to memory. It is asked for causal attention and nothing else: no mask
and no bias, which it would have to read as [B, H, T, S]. So rows are right-padded before it, where causality alone
keeps every real query from the padding; and rows of several documents are XLA's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.models.config import Choice, DecoderConfig

MAX_HEAD_DIM = 128  # cuDNN's backward pass on Ampere; Hopper takes 256


class AttentionKernel(NamedTuple):
    name: Literal["cudnn", "xla"]
    reason: str


def device_obstacle(dtype: jnp.dtype, platform: str, capability: str) -> str:
    """Why these devices cannot run fused attention in `dtype`; "" if they can.

    Args:
        platform: of the devices, as JAX names it.
        capability: CUDA compute capability, for example "8.0"; "" where there is none.
    """
    if platform != "gpu":
        return f"fused attention runs on GPUs, and the devices are {platform}"
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


def attention_kernel(
    config: DecoderConfig,
    dtype: jnp.dtype,
    platform: str,
    length: int,
    choice: Choice = "auto",
    *,
    capability: str = "",
    packed: bool = False,
) -> AttentionKernel:
    """The kernel for rows of `length` tokens (`packed`: of several documents) that are looked at all at once, and why.

    Raises:
        ValueError: "cudnn" is asked for where it is impossible.
    """
    obstacle = device_obstacle(dtype, platform, capability) or model_obstacle(config, length, packed=packed)
    return _select_kernel(obstacle, choice, dtype)


def _select_kernel(obstacle: str, choice: Choice, dtype: jnp.dtype) -> AttentionKernel:
    if choice == "cudnn" and obstacle:
        raise ValueError(f'model.attention="cudnn" is impossible: {obstacle}; set it to "auto" or "xla"')
    if choice == "xla":
        return AttentionKernel("xla", 'model.attention="xla"')
    return (
        AttentionKernel("xla", obstacle) if obstacle else AttentionKernel("cudnn", f"{jnp.dtype(dtype).name}, causal")
    )


def kernel_for_devices(mesh: Mesh, dtype: jnp.dtype, choice: Choice) -> AttentionKernel:
    """What any model could have on the devices of a mesh, real or only compiled for; raises as `attention_kernel`."""
    device = mesh.devices.flat[0]
    return _select_kernel(device_obstacle(dtype, device.platform, capability_of(device)), choice, dtype)


def kernel_for_mesh(
    mesh: Mesh | AbstractMesh,
    config: DecoderConfig,
    dtype: jnp.dtype,
    length: int,
    choice: Choice,
    *,
    packed: bool = False,
) -> AttentionKernel:
    """`attention_kernel` for the devices of a mesh; XLA's on one without devices, where only shapes are asked for."""
    if isinstance(mesh, AbstractMesh):
        return AttentionKernel("xla", "no devices")
    device = mesh.devices.flat[0]
    capability = capability_of(device)
    return attention_kernel(config, dtype, device.platform, length, choice, capability=capability, packed=packed)


def capability_of(device: jax.Device) -> str:
    return str(getattr(device, "compute_capability", ""))


def describe_kernel(kernel: AttentionKernel, phases: str, *, decodes: bool) -> str:
    """What a run says: "cuDNN for scoring and prefill (bfloat16, causal), XLA for decoding (one query)"."""
    if kernel.name == "xla":
        return f"XLA ({kernel.reason})"
    return f"cuDNN for {phases} ({kernel.reason})" + (", XLA for decoding (one query)" if decodes else "")
