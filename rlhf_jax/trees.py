"""Path-named pytrees: parameters are flat dictionaries {"layers/attention/q/kernel": array}."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax

T = TypeVar("T")


def record(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and a pytree: every field is a child, in the order of declaration."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(cls, [f.name for f in dataclasses.fields(cls)], [])


def partition(flat: Mapping[str, T], keep: Callable[[str], bool]) -> tuple[dict[str, T], dict[str, T]]:
    """Split by path into (kept, others); `{**kept, **others}` is the inverse."""
    kept = {path: leaf for path, leaf in flat.items() if keep(path)}
    return kept, {path: leaf for path, leaf in flat.items() if path not in kept}
