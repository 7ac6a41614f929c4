"""Where our elements lie in a checkpoint's tensors: the one place that reading and writing both ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_jax.models.families.tensors import HfTensor

Index = tuple[slice, ...]
Bounds = Sequence[tuple[int, int]]  # (start, stop) in each dimension


def shard_bounds(index: Index, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The bounds of a shard, which jax gives as slices."""
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def num_spread(tensor: HfTensor) -> int:
    """How many of our leading dimensions, layer and expert, are spread over tensors of the files."""
    return ("{i}" in tensor.name) + ("{j}" in tensor.name)


def member_tensors(tensor: HfTensor, bounds: Bounds) -> Iterator[tuple[tuple[int, ...], str]]:
    """For each tensor within the bounds of those leading dimensions, its index in them from 0, and its name."""
    for index in np.ndindex(*(stop - start for start, stop in bounds)):
        number = [start + step for (start, _), step in zip(bounds, index, strict=True)]
        yield index, tensor.name.format(**dict(zip("ij", number, strict=False)))


def in_our_order(file: np.ndarray, tensor: HfTensor) -> np.ndarray:
    """A view of the file's tensor with its dimensions in our order."""
    return file.swapaxes(-1, -2) if tensor.transpose else file


def block_indices(tensor: HfTensor, bounds: Bounds) -> Iterator[tuple[Index, Index]]:
    """Pairs of an index into ours, counted from the bounds, and the index of the same elements in the oriented tensor.

    What the bounds, of our dimensions behind the leading ones, enclose and no pair does is padding of the vocabulary.
    """
    *outer, last = zip(bounds, _extent(tensor), strict=True)
    ours, theirs = [], []
    for (start, stop), size in outer:
        stop = min(stop, size)
        if start >= stop:
            return
        ours.append(slice(0, stop - start))
        theirs.append(slice(start, stop))
    (start, stop), size = last
    at, stop = start, min(stop, size)
    while at < stop:
        there, length = _contiguous_run(tensor, at)
        length = min(length, stop - at)
        here = at - start
        yield (*ours, slice(here, here + length)), (*theirs, slice(there, there + length))
        at += length


def _extent(tensor: HfTensor) -> list[int]:
    """The shape of that of a tensor which is ours, in our order."""
    extent = list(tensor.shape)
    if tensor.transpose:
        extent[-1], extent[-2] = extent[-2], extent[-1]
    if tensor.strip:
        extent[-1] = extent[-1] // tensor.strip.period * tensor.strip.length
    return extent


def _contiguous_run(tensor: HfTensor, at: int) -> tuple[int, int]:
    """Where the file has our index `at` of the last dimension, and how many from there on are neighbours in it too."""
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
        source = source.astype(np.float32)  # whose cast says what is too large, that of bfloat16 does not
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
    for start in range(0, to.shape[-1], 16):  # so few that the cache keeps their lines until those are full
        columns = slice(start, start + 16)
        # The cast is by itself, as numpy's are fast along contiguous memory only.
        to[..., columns] = source[..., columns].astype(to.dtype, copy=False)


def _is_transposed(array: np.ndarray) -> bool:
    return array.strides[-1] > array.strides[-2]
