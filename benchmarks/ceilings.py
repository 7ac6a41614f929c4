"""The machine's ceilings: operations per second of matrix products, and bytes per second of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.provenance import vector_instructions

TRIALS = 5  # of which the best counts
ROWS, NUMBERS = 2048, 2**26  # of the square matrices; of the float32 array
ON_GPU = 4, 8  # times as many: there those take about as long as a launch

Trial = Callable[[], Any]


def best_seconds(run: Trial) -> float:
    """The least of TRIALS calls, after one that is not timed."""
    seconds = []
    for _ in range(TRIALS + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def bandwidth(add: Callable[[int], Trial], numbers: int) -> float:
    """Bytes per second, read and written; `add` as in `ceilings`."""
    return 2 * 4 * numbers / best_seconds(add(numbers))


def ceilings(
    product: Callable[[str, int], Trial], add: Callable[[int], Trial], gpu_peak: int | None = None
) -> dict[str, float]:
    """Operations per second in each dtype, and bytes per second of "memory"; "peak_bytes" of a GPU.

    A processor that does not multiply in bfloat16 has no ceiling there: one product takes torch minutes.

    Args:
        product: (dtype, rows) -> a function that multiplies two square matrices and waits.
        add: (numbers) -> a function that adds 1 to so many float32 numbers in place and waits.
        gpu_peak: bytes of a GPU that were allocated at most so far; None on a CPU.
    """
    more_rows, more_numbers = (1, 1) if gpu_peak is None else ON_GPU
    rows = more_rows * ROWS
    has_bfloat16 = gpu_peak is not None or vector_instructions() in ("AMX", "AVX512-BF16")
    dtypes = ("float32", "bfloat16") if has_bfloat16 else ("float32",)
    found = {dtype: 2 * rows**3 / best_seconds(product(dtype, rows)) for dtype in dtypes}
    found |= {"memory": bandwidth(add, more_numbers * NUMBERS)}
    return found if gpu_peak is None else found | {"peak_bytes": gpu_peak}


def add_by_jax(numbers: int) -> Trial:
    import jax
    import jax.numpy as jnp

    array, increment = jnp.zeros(numbers, jnp.float32), jax.jit(lambda x: x + 1, donate_argnums=0)

    def add() -> None:
        nonlocal array
        array = increment(array).block_until_ready()

    return add


def by_jax() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from rlhf_jax.products import matmul

    def product(dtype: str, rows: int) -> Trial:
        matrix, multiply = jnp.ones((rows, rows), dtype), jax.jit(matmul)  # as the models multiply
        return lambda: multiply(matrix, matrix).block_until_ready()

    stats = jax.devices()[0].memory_stats()  # None on CPUs
    return ceilings(product, add_by_jax, stats["peak_bytes_in_use"] if stats else None)


def by_torch() -> dict[str, float]:
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"

    def waiting(run: Trial) -> Trial:
        return (lambda: (run(), torch.cuda.synchronize())) if on_gpu else run

    def product(dtype: str, rows: int) -> Trial:
        matrix = torch.ones(rows, rows, dtype=getattr(torch, dtype), device=device)
        return waiting(lambda: matrix @ matrix)

    def add(numbers: int) -> Trial:
        array = torch.zeros(numbers, device=device)
        return waiting(lambda: array.add_(1))

    return ceilings(product, add, torch.cuda.max_memory_allocated() if on_gpu else None)
