"""The mapping between elements of parameters and elements of a checkpoint's tensors, for reading and writing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_jax.models.families.tensors import HfTensor

Index = tuple[slice, ...]
Bounds = Sequence[tuple[int, int]]  # (start, stop) in each dimension


def shard_bounds(index: Index, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The bounds of a shard, which JAX gives as slices."""
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def num_spread(tensor: HfTensor) -> int:
    """The number of leading dimensions of a parameter, layer and expert, that are spread over tensors of the files."""
    return ("{i}" in tensor.name) + ("{j}" in tensor.name)


def member_tensors(tensor: HfTensor, bounds: Bounds) -> Iterator[tuple[tuple[int, ...], str]]:
    """For each tensor within the bounds of those leading dimensions, its index in them (from 0) and its name."""
    for index in np.ndindex(*(stop - start for start, stop in bounds)):
        number = [start + step for (start, _), step in zip(bounds, index, strict=True)]
        yield index, tensor.name.format(**dict(zip("ij", number, strict=False)))


def orient(file: np.ndarray, tensor: HfTensor) -> np.ndarray:
    """A view of the file's tensor with its dimensions in the order of the parameter."""
    return file.swapaxes(-1, -2) if tensor.transpose else file


def block_indices(tensor: HfTensor, bounds: Bounds) -> Iterator[tuple[Index, Index]]:
    """Pairs of an index into the parameter, counted from the bounds, and the index of the same elements in the oriented
    tensor.

    The bounds are those of the dimensions after the leading ones. Elements within them that are in no pair are padding
    of the vocabulary.
    """
    *outer, last = zip(bounds, _extent(tensor), strict=True)
    outer = [(start, min(stop, size)) for (start, stop), size in outer]
    if any(start >= stop for start, stop in outer):
        return
    outer_to, outer_from = [slice(0, stop - start) for start, stop in outer], [slice(*bound) for bound in outer]
    (start, stop), size = last
    at, stop = start, min(stop, size)
    while at < stop:
        there, length = _contiguous_run(tensor, at)
        length = min(length, stop - at)
        here = at - start
        yield (*outer_to, slice(here, here + length)), (*outer_from, slice(there, there + length))
        at += length


def _extent(tensor: HfTensor) -> list[int]:
    """The shape of the part of an oriented tensor that belongs to the parameter."""
    extent = list(tensor.shape)
    if tensor.transpose:
        extent[-1], extent[-2] = extent[-2], extent[-1]
    if tensor.strip:
        extent[-1] = extent[-1] // tensor.strip.period * tensor.strip.length
    return extent


def _contiguous_run(tensor: HfTensor, at: int) -> tuple[int, int]:
    """Index in the file of index `at` of the parameter's last dimension, and how many elements are contiguous there."""
    strip = tensor.strip
    if strip is None:
        return at, _extent(tensor)[-1] - at
    group, inner = divmod(at, strip.length)
    return group * strip.period + strip.offset + inner, strip.length - inner


def copy(to: np.ndarray, source: np.ndarray) -> None:
    """`to[...] = source`, cast; several times faster where one of the two is a transposed view.

    Raises:
        ValueError: `to` is float16, and a number of `source` is beyond it.
    """
    if to.dtype == np.float16 and source.dtype not in (np.float16, np.float32):
        source = source.astype(np.float32)  # its cast to float16 reports overflow, that of bfloat16 does not
    try:
        with np.errstate(over="raise"):
            _copy(to, source)
    except FloatingPointError as error:
        raise ValueError("a weight is beyond the largest float16, 65504: use bfloat16 or float32") from error


def _copy(to: np.ndarray, source: np.ndarray) -> None:
    if to.ndim < 2 or _is_transposed(to) == _is_transposed(source):
        to[...] = source
        return
    if _is_transposed(to):
        to, source = to.swapaxes(-1, -2), source.swapaxes(-1, -2)
    for start in range(0, to.shape[-1], 16):  # few enough that their lines stay in the cache until they are full
        columns = slice(start, start + 16)
        # The cast is separate, as numpy casts fast only along contiguous memory.
        to[..., columns] = source[..., columns].astype(to.dtype, copy=False)


def _is_transposed(array: np.ndarray) -> bool:
    return array.strides[-1] > array.strides[-2]
