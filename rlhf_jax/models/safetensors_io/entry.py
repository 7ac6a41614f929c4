"""A tensor in a mapped file."""

from __future__ import annotations

import mmap
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

NUMPY_DTYPES = {"F32": jnp.dtype("float32"), "F16": jnp.dtype("float16"), "BF16": jnp.dtype("bfloat16")}


class Entry(NamedTuple):
    """A tensor in a mapped file."""

    file: mmap.mmap
    dtype: str  # as the format spells it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int
    strides: tuple[int, ...] | None = None  # bytes; None: those of a C array

    def array(self) -> np.ndarray:
        return np.ndarray(self.shape, NUMPY_DTYPES[self.dtype], self.file, self.start, self.strides)

    def release(self) -> None:
        """Release the pages: those of a mapped file count towards this process until the system needs the memory."""
        start = self.start // mmap.PAGESIZE * mmap.PAGESIZE
        if self.stop > start:
            self.file.madvise(mmap.MADV_DONTNEED, start, self.stop - start)
