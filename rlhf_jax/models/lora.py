"""LoRA (Hu et al. 2021): y = x W + (alpha / rank) x A B, the adapters A and B are a tree separate from the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rlhf_jax.models.quantised import Quantised, dequantise

SUFFIXES = ("/lora_a", "/lora_b")
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on linear layers; the base is frozen while they train."""

    rank: int = 0  # rank of the adapters; 0: none, every weight trains
    alpha: float = 16.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = LINEARS  # linear layers that get an adapter

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank={self.rank}: at least 0, and 0 trains every weight")
        unknown = [name for name in self.targets if name not in LINEARS]
        if unknown or (self.rank and not self.targets):
            reported = f"no linear is called {', '.join(unknown)}" if unknown else "empty, so nothing would train"
            raise ValueError(f"targets: {reported}; choose among {', '.join(LINEARS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


NO_LORA = LoraConfig()


def is_adapter(path: str) -> bool:
    return path.endswith(SUFFIXES)


def is_trainable(path: str, lora: LoraConfig) -> bool:
    """What a stage trains: with adapters only those and the scalar head, else everything."""
    return lora.rank == 0 or is_adapter(path) or path.startswith("score/")


def merge_adapters(params: Mapping[str, jax.Array], lora: LoraConfig) -> dict[str, jax.Array]:
    """W + scale A B for every adapted kernel, in the kernel's dtype; the adapters disappear.

    Kernels are [L, in, out], A [L, in, rank], B [L, rank, out]; the product is accumulated in A's dtype.
    Quantised kernels become dense, whole stacks of them, in float32: `write_params` merges them a layer at a time, and
    generation keeps the adapters separate.
    """
    merged = {path: leaf for path, leaf in params.items() if not is_adapter(path)}
    for path, leaf in merged.items():
        if isinstance(leaf, Quantised):
            merged[path] = dequantise(leaf, jnp.float32)
    for path in [path for path in params if path.endswith("/lora_a")]:
        kernel = path.removesuffix("lora_a") + "kernel"
        stacks = merged[kernel], params[path], params[path.removesuffix("a") + "b"]
        # Layer by layer: in float32 the products of a whole stack may be larger than all that is left.
        merged[kernel] = jax.lax.map(lambda each: merge_kernel(*each, lora.scale).astype(each[0].dtype), stacks)
    return merged


def merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + scale A B in A's dtype."""
    update = scale * (a @ b)
    return kernel.astype(update.dtype) + update
