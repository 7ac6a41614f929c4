"""Matrix products of activations, with the choice that is made for each platform.

XLA's CPU backend (jax 0.10.2) computes a product of bfloat16 whose result is bfloat16 by converting its operands to
float32; one whose result is float32 takes the bfloat16 instructions of the processor. GPUs sum in float32 and write the
result rounded, so that there the result stays in the dtype of the operands. The gradient of a weight is written as the
activations by the incoming gradient, where JAX would have the backend transpose the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

_FEW_ROWS = 16  # of activations, at most, for which weights [out, in] are the left operand, in two halves


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, summed in float32; in their dtype, or in `dtype`, float32.

    Every letter of `spec` is in two of its three parts at least, "btd,df->btf", and none is written as "...".
    The gradients are in the dtype of x and y.
    """
    return _choose(functools.partial(_product, spec, dtype), functools.partial(_product_on_cpus, spec, dtype), x, y)


def _product(spec: str, dtype: jnp.dtype | None, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


def _product_on_cpus(spec: str, dtype: jnp.dtype | None, x: jax.Array, y: jax.Array) -> jax.Array:
    """As [b, m, k] by [b, k, n] or [b, n, k], the orders of dimensions for which the backend has such a product."""
    of_x, of_y, of_result = spec.replace("->", ",").split(",")
    sizes = dict(zip(of_x + of_y, x.shape + y.shape, strict=True))
    k = [letter for letter in of_x if letter not in of_result]
    b = [letter for letter in of_result if letter in of_x and letter in of_y]
    m, n = ([letter for letter in of_result if letter in of and letter not in b] for of in (of_x, of_y))

    def pattern(*groups: list[str]) -> str:
        return " ".join(f"({' '.join(group)})" for group in ((b, *groups) if b else groups))

    def is_first(group: list[str], other: list[str], of: str) -> bool:
        return max(map(of.index, group), default=-1) < min(map(of.index, other), default=len(of))

    x_turned, y_turned = is_first(k, m, of_x), not is_first(k, n, of_y)
    if x_turned and len(k) > 1 and not b:  # of several dimensions the backend makes the copy itself
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(dtype or x.dtype)
    x = rearrange(x, f"{' '.join(of_x)} -> {pattern(k, m) if x_turned else pattern(m, k)}")
    y = rearrange(y, f"{' '.join(of_y)} -> {pattern(n, k) if y_turned else pattern(k, n)}")
    if x_turned:  # in two parts: the compiler undoes a plain transpose, for an order that the product does not have
        x = jnp.concatenate([part.swapaxes(-1, -2) for part in jnp.array_split(x, 2, axis=-1)], axis=-2)
    rows = x.shape[-2]
    if rows == 1:  # a product with a vector is none of the backend's either
        x = jnp.repeat(x, 2, axis=-2)
    multiply = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    if y_turned and not b and rows <= _FEW_ROWS and len(y) % 2 == 0:
        # A right operand is rearranged by the backend before every product; the left one is read as it is.
        halves, x_twice = rearrange(y, "(two n) k -> two n k", two=2), jnp.broadcast_to(x, (2, *x.shape))
        product = rearrange(multiply(halves, x_twice, (((2,), (2,)), ((0,), (0,)))), "two n m -> m (two n)")
    else:
        summed = (x.ndim - 1,), (y.ndim - 1 if y_turned else y.ndim - 2,)
        product = multiply(x, y, (summed, ((0,), (0,)) if b else ((), ())))
    product = product.astype(dtype or x.dtype)[..., :rows, :]
    return rearrange(product, f"{pattern(m, n)} -> {' '.join(of_result)}", **{each: sizes[each] for each in of_result})


def _choose(others: Callable, cpu: Callable, x: jax.Array, *rest: jax.Array):
    """The result of `cpu` for bfloat16 where the program is compiled for CPUs, else of `others`."""
    if x.dtype != jnp.bfloat16:
        return others(x, *rest)
    return jax.lax.platform_dependent(x, *rest, cpu=cpu, default=others)


def _forward(spec, x, y, dtype):
    return einsum(spec, x, y, dtype), (x, y)


def _backward(spec, dtype, operands, gradient):
    def others(x, y, gradient):
        return jax.vjp(functools.partial(_product, spec, dtype), x, y)[1](gradient)

    def cpu(x, y, gradient):
        # Rounded first: a product of float32 and bfloat16 would be one of float32.
        of_x, of_y, of_result = spec.replace("->", ",").split(",")
        gradient, product = gradient.astype(x.dtype), _product_on_cpus if x.dtype == jnp.bfloat16 else _product
        to_x, to_y = f"{of_result},{of_y}->{of_x}", f"{of_x},{of_result}->{of_y}"
        return product(to_x, None, gradient, y), product(to_y, None, x, gradient)

    return jax.lax.platform_dependent(*operands, gradient, cpu=cpu, default=others)


einsum.defvjp(_forward, _backward)


def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., in] @ kernel [in, out], as `einsum` multiplies."""
    leading = "abcdefgh"[: x.ndim - 1]
    return einsum(f"{leading}y,yz->{leading}z", x, kernel, dtype)
