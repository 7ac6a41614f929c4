"""Arrays that rest in pinned host memory, split as on the devices, and are fetched to be computed with."""

from __future__ import annotations

from typing import Any

import jax

HOST = "pinned_host"


def rests(leaf: Any) -> bool:
    """Whether an array, or an abstract one with a sharding, is in host memory."""
    return leaf.sharding.memory_kind == HOST


def to_host(tree: Any) -> Any:
    """The same arrays in host memory."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST)), tree)


def to_devices(tree: Any) -> Any:
    """The same arrays on the devices; those that are there already are handed on, where `jax.device_put` would copy."""

    def fetched(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(None)) if rests(leaf) else leaf

    return jax.tree.map(fetched, tree)
