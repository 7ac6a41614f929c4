"""The machine's ceilings: operations per second of matrix products, and bytes per second of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

TRIALS = 5  # of which the best counts
ROWS, NUMBERS = 2048, 2**26  # of the square matrices; of the float32 array


def best_seconds(run: Callable[[], Any]) -> float:
    """The least of TRIALS calls, after one that is not timed."""
    seconds = []
    for _ in range(TRIALS + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def ceilings(product: Callable[[str], Callable[[], Any]], add: Callable[[], Any]) -> dict[str, float]:
    """Operations per second in each dtype, and bytes per second of "memory", read and written.

    Args:
        product: (dtype) -> a function that multiplies two matrices of ROWS rows and waits.
        add: adds 1 to NUMBERS float32 numbers in place and waits.
    """
    found = {dtype: 2 * ROWS**3 / best_seconds(product(dtype)) for dtype in ("float32", "bfloat16")}
    return found | {"memory": 2 * 4 * NUMBERS / best_seconds(add)}


def by_jax() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from rlhf_jax.products import matmul

    def product(dtype: str) -> Callable[[], Any]:
        matrix, multiply = jnp.ones((ROWS, ROWS), dtype), jax.jit(matmul)  # as the models multiply
        return lambda: multiply(matrix, matrix).block_until_ready()

    array, increment = jnp.zeros(NUMBERS, jnp.float32), jax.jit(lambda x: x + 1, donate_argnums=0)

    def add() -> None:
        nonlocal array
        array = increment(array).block_until_ready()

    return ceilings(product, add)


def by_torch() -> dict[str, float]:
    import torch

    def product(dtype: str) -> Callable[[], Any]:
        matrix = torch.ones(ROWS, ROWS, dtype=getattr(torch, dtype))
        return lambda: matrix @ matrix

    array = torch.zeros(NUMBERS)
    return ceilings(product, lambda: array.add_(1))
