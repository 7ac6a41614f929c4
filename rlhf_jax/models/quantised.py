"""Frozen kernels in 8 or 4 bits per weight, under LoRA as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

Every kernel of a layer's linears has one dimension that no layout splits, "embed": blocks, and the pairs of codes in a
byte, run along it, so that the arrays of a quantised kernel have the kernel's own logical axes and are split as it is.

int8: blocks of 128, w = scale c, with scale = max |w| / 127 and c rounded to -127 .. 127: block-wise absolute-maximum
    quantisation (Dettmers et al. 2022, arXiv 2110.02861, section 2.1), on an even grid. 8 + 32 / 128 = 8.25 bits each.
nf4: blocks of 64, w = a NF4[c] with a = max |w| and the 16 quantiles NF4 of a normal distribution. The a, less their
    mean over the matrix, are themselves quantised in groups of 256, by max |.| and the 256 numbers DYNAMIC. So does
    bitsandbytes (quantize_4bit with compress_statistics). 4 + 8 / 64 + 32 / (64 x 256) = 4.127 bits each.

Where that does not divide the hidden size, a block is its largest divisor below. Each matrix of a stack
[L, (X,) in, out] is quantised by itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.mesh import Layout
from rlhf_jax.products import matmul
from rlhf_jax.trees import record

UNQUANTISED_DTYPE = "bfloat16"  # next to quantised kernels: of embeddings, head, norms and biases (as QLoRA)
BLOCK_SIZES = {"int8": 128, "nf4": 64}
GROUP_SIZE = 256  # maxima of blocks that share a second-level scale

# Dettmers et al. 2023, appendix E; as in bitsandbytes.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic_map() -> np.ndarray:
    """The dynamic data type of bitsandbytes: for e = 0 .. 6, +-10^(e - 6) times 2^e numbers even within 0.1 .. 1."""
    edges = [np.linspace(0.1, 1.0, 2**e + 1) for e in range(7)]
    positive = np.concatenate([10.0 ** (e - 6) * (x[:-1] + x[1:]) / 2 for e, x in enumerate(edges)])
    return np.sort(np.concatenate([positive, -positive, [0.0, 1.0]])).astype(np.float32)


DYNAMIC = _dynamic_map()
_LINEARS = re.compile(r"layers/(attention/[qkvo]|(mlp|experts)/(gate|up|down))/kernel")


@record
class Quantised:
    """A kernel [..., in, out]; for abstract trees the fields may be anything that has a shape.

    Attributes:
        codes: int8 [..., in, out]; or uint8 with the embed dimension halved, the first of two codes in the high bits.
        scales: the kernel's shape with blocks for the embed dimension; int8: float32; nf4: uint8 codes of DYNAMIC.
        groups: nf4: float32 [..., G], of the scales flattened with the embed dimension innermost; int8: None.
        offset: nf4: float32 [...], the mean of the matrix's maxima; int8: None.
    """

    codes: Any
    scales: Any
    groups: Any = None
    offset: Any = None

    @property
    def kind(self) -> str:
        return "int8" if self.groups is None else "nf4"

    @property
    def axis(self) -> int:
        """The dimension along which blocks run, -2 or -1."""
        return -2 if self.codes.shape[-1] == self.scales.shape[-1] else -1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        shape = list(self.codes.shape)
        shape[self.axis] *= 1 if self.kind == "int8" else 2
        return tuple(shape)

    def __getitem__(self, index: Any) -> Quantised:
        """One layer, or one expert of it, by its index; all of it by `...`, as flax reads a variable."""
        return self if index is Ellipsis else jax.tree.map(lambda leaf: leaf[index], self)


def is_quantisable(path: str) -> bool:
    """Kernels of the layers' linears and experts: no router, norm, bias, embedding or head."""
    return _LINEARS.fullmatch(path) is not None


def quantise(kernel: jax.Array, kind: str, axis: int) -> Quantised:
    """Quantise [..., in, out], of any float dtype, by blocks along `axis` (-2 or -1).

    Raises:
        ValueError: the size of that dimension has no divisor to make blocks of.
    """
    maxima = _maxima(kernel, kind, axis)
    return _quantise_blocks(kernel, maxima, kind, axis, _quantise_maxima(maxima, axis) if kind == "nf4" else None)


def dequantise(kernel: Quantised | jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[..., in, out], computed in float32 and rounded to `dtype` once; other kernels are cast."""
    if not isinstance(kernel, Quantised):
        return kernel.astype(dtype)
    axis, scales = kernel.axis, kernel.scales
    if kernel.kind == "int8":
        values = kernel.codes.astype(jnp.float32)
    else:
        shifts = jnp.array([4, 0], jnp.uint8).reshape((2, 1) if axis == -2 else (2,))
        codes = (jnp.expand_dims(kernel.codes, axis) >> shifts & 15).reshape(kernel.shape)
        values = jnp.take(jnp.asarray(NF4), codes, mode="clip")
        scales = jnp.take(jnp.asarray(DYNAMIC), scales, mode="clip")
        shape = scales.shape if axis == -1 else (*scales.shape[:-2], scales.shape[-1], scales.shape[-2])
        groups = jnp.repeat(kernel.groups, GROUP_SIZE, axis=-1)[..., : shape[-1] * shape[-2]].reshape(shape)
        scales = scales * (groups if axis == -1 else groups.swapaxes(-1, -2)) + kernel.offset[..., None, None]
    blocks = _split(values, axis, values.shape[axis] // scales.shape[axis]) * jnp.expand_dims(scales, axis)
    return blocks.reshape(values.shape).astype(dtype)


def multiply(x: jax.Array, kernel: Quantised | jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] in x's dtype; the backward pass dequantises again and keeps no dense kernel."""
    if not isinstance(kernel, Quantised):
        return matmul(x, kernel.astype(x.dtype))
    return jax.checkpoint(lambda x, kernel: matmul(x, dequantise(kernel, x.dtype)), prevent_cse=False)(x, kernel)


def quantised_shardings(axes: Sequence[str | None], kind: str, layout: Layout) -> Quantised:
    """Shardings of the arrays of a kernel with these logical axes; groups, one in 16384 weights, are replicated."""
    own, lead = layout.sharding(axes), layout.sharding(axes[:-2])
    return Quantised(own, own) if kind == "int8" else Quantised(own, own, lead, lead)


def abstract_codes(shape: Sequence[int], axes: Sequence[str | None], kind: str, layout: Layout) -> Quantised:
    """The arrays of a quantised kernel as `jax.ShapeDtypeStruct`s with their shardings; nothing is allocated."""
    dense = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    shapes = jax.eval_shape(functools.partial(quantise, kind=kind, axis=block_axis(axes)), dense)
    where = quantised_shardings(axes, kind, layout)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, where)


def quantise_layers(
    layers: Iterable[jax.Array], shape: Sequence[int], axes: Sequence[str | None], kind: str, layout: Layout
) -> Quantised:
    """Quantise a kernel [L, (X,) in, out] layer by layer into its shards; one dense layer exists at a time.

    The same bits on any mesh: what is added up, for the mean of the maxima, is so in a program of its own and on
    arrays that every device holds whole.

    Args:
        layers: each [(X,) in, out], sharded by `layout`.
        shape, axes: of the stack.
    """
    whole, where = abstract_codes(shape, axes, kind, layout), quantised_shardings(axes[1:], kind, layout)
    axis, everywhere = block_axis(axes), layout.sharding(())
    stack = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), whole)
    maxima_of = _program(_maxima, everywhere, kind=kind, axis=axis)
    compress = _program(_quantise_maxima, everywhere, axis=axis)
    encode = _program(_quantise_blocks, where, kind=kind, axis=axis)
    for number, layer in enumerate(layers):
        maxima = maxima_of(layer)
        one = encode(layer, maxima, second=compress(maxima) if kind == "nf4" else None)
        stack = _put(stack, one, number)
        jax.block_until_ready(stack)  # otherwise the host would enqueue all layers, which wait on the device in float32
    return stack


@functools.lru_cache
def _program(function, where: Any, **options):
    return jax.jit(functools.partial(function, **options), out_shardings=where)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Quantised, one: Quantised, index: jax.Array) -> Quantised:
    return jax.tree.map(lambda to, leaf: jax.lax.dynamic_update_index_in_dim(to, leaf, index, 0), stack, one)


def block_axis(axes: Sequence[str | None]) -> int:
    return -2 if axes[-2] == "embed" else -1


def block_size(size: int, kind: str) -> int:
    """The largest divisor of an embed dimension up to BLOCK, and even where two codes share a byte.

    Raises:
        ValueError: that is below 8, so that scales would outweigh what quantising saves.
    """
    step = 1 if kind == "int8" else 2
    best = max((n for n in range(step, BLOCK_SIZES[kind] + 1, step) if size % n == 0), default=0)
    if best < 8:
        raise ValueError(f'a hidden size of {size} has no divisor that {kind} blocks could have: use dtype "bfloat16"')
    return best


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., n size, ...] -> [..., n, size, ...]; as axis counts from the end, the new dimension is `axis` itself."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])


def _maxima(kernel: jax.Array, kind: str, axis: int) -> jax.Array:
    """max |w| of each block, float32."""
    blocks = _split(kernel.astype(jnp.float32), axis, block_size(kernel.shape[axis], kind))
    return jnp.abs(blocks).max(kernel.ndim + axis + 1)


def _quantise_maxima(maxima: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(uint8 codes of DYNAMIC in the shape of the maxima, groups [..., G], offset [...])."""
    outer = maxima if axis == -1 else maxima.swapaxes(-1, -2)
    flat = outer.reshape(*outer.shape[:-2], -1)
    offset = flat.mean(-1)
    pad = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % GROUP_SIZE)]
    grouped = _split(jnp.pad(flat - offset[..., None], pad), -1, GROUP_SIZE)
    groups = jnp.abs(grouped).max(-1)
    codes = _nearest(DYNAMIC, grouped * _inverse(groups)[..., None]).reshape(*flat.shape[:-1], -1)
    codes = codes[..., : flat.shape[-1]].reshape(outer.shape)
    return codes if axis == -1 else codes.swapaxes(-1, -2), groups, offset


def _quantise_blocks(
    kernel: jax.Array, maxima: jax.Array, kind: str, axis: int, second: tuple | None = None
) -> Quantised:
    """Codes by the exact maxima, as in bitsandbytes, though nf4 keeps these rounded."""
    blocks = _split(kernel.astype(jnp.float32), axis, kernel.shape[axis] // maxima.shape[axis])
    if kind == "int8":
        codes = jnp.rint(blocks * jnp.expand_dims(127 * _inverse(maxima), axis)).astype(jnp.int8)
        return Quantised(codes.reshape(kernel.shape), maxima / 127)
    codes = _nearest(NF4, blocks * jnp.expand_dims(_inverse(maxima), axis)).reshape(kernel.shape)
    pairs, first = _split(codes, axis, 2), kernel.ndim + axis + 1
    high, low = (jax.lax.index_in_dim(pairs, i, first, keepdims=False) for i in range(2))
    return Quantised(high << 4 | low, *second)


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x, and 0 for a block of zeros."""
    return jnp.where(x > 0, 1 / x, 0)


def _nearest(book: np.ndarray, x: jax.Array) -> jax.Array:
    """uint8 index of the nearest number of a sorted book; halfway is the lower one's."""
    between = (book[1:] + book[:-1]) / 2
    method = "compare_all" if len(book) <= 16 else "scan"
    return jnp.searchsorted(jnp.asarray(between), x, side="left", method=method).astype(jnp.uint8)
