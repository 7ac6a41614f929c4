"""A parameter of all layers as an array for each, where training and generation share one copy of it.

Decoding is bound by reading weights, and cutting a layer out of a stack writes it once more for every token. So what
both phases read is kept as decoding wants it, and training goes through the layers one by one in place of a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.quantised import Quantised, is_quantisable
from rlhf_jax.trees import record


@record
class Unstacked:
    """A parameter [L, ...] in L parts.

    Attributes:
        layers: L arrays of one shape.
    """

    layers: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        return (len(self.layers), *self.layers[0].shape)

    def __getitem__(self, index: Any) -> Any:
        """One layer by its index; all of it by `...`, as flax reads a variable."""
        return self if index is Ellipsis else self.layers[index]


Param = jax.Array | Quantised | Unstacked  # dense, quantised, or in one array per layer


def is_shareable(path: str) -> bool:
    """What both phases share where there is one copy: kernels of the layers' linears, embedding and head."""
    return is_quantisable(path) or path in ("embed/tokens", "head/kernel")


def is_unstacked(leaf: Any) -> bool:
    return isinstance(leaf, Unstacked)


def has_unstacked(tree: Any) -> bool:
    return any(map(is_unstacked, jax.tree.leaves(tree, is_leaf=is_unstacked)))


def remat_layer(layer: Callable, extra: Any) -> Callable:
    """(x [B, T, D], weights) -> layer(x, weights, extra), which is (x, anything); the backward pass computes it again.

    For one device. What `jax.checkpoint` repeats there, XLA on GPUs finds to be equal outside a loop, and keeps after
    all; on several it does not, and would keep weights of this repetition whole that it has gathered. Here repetition
    starts from x plus a zero that the compiler cannot see to be one, as it is made of the gradient at hand. `layer`
    must not close over arrays.

    Args:
        extra: a tree of all other arrays that the layers read.
    """

    def forward(*args: Any) -> tuple[Any, Any]:
        return layer(*args), args

    def backward(kept: Any, gradients: Any) -> Any:
        x, *others = kept
        zero = jnp.minimum(jnp.isinf(gradients[0]).astype(x.dtype), 0)
        return jax.vjp(layer, x + zero, *others)[1](gradients)

    run = jax.custom_vjp(layer)
    run.defvjp(forward, backward)
    return lambda x, weights: run(x, weights, extra)


def order_gradients(x: Any, layer: Sequence[Any], fixed: Sequence[bool]) -> tuple[Any, list[Any]]:
    """The same values, whose gradients are made together: those of a layer before the backward pass leaves it.

    Left alone, XLA puts off the gradients of the adapters of all layers until the last, as they are stacked, and keeps
    for every layer the activations that they are made of.

    Args:
        fixed: which parts of the layer have no gradient.
    """
    moving = [part for part, is_fixed in zip(layer, fixed, strict=True) if not is_fixed]
    x, moving = jax.lax.optimization_barrier((x, moving))
    rest = iter(moving)
    return x, [part if is_fixed else next(rest) for part, is_fixed in zip(layer, fixed, strict=True)]


def scan_layers(step: Callable, carry: Any, stacks: Any, *, unroll: bool = False) -> tuple[Any, Any]:
    """`jax.lax.scan` over the layers of a tree of stacks, unrolled if asked or where some of them are `Unstacked`."""
    if not has_unstacked(stacks):
        return jax.lax.scan(step, carry, stacks, unroll=unroll)
    leaves, structure = jax.tree.flatten(stacks, is_leaf=is_unstacked)
    # The gradient of a split is one concatenation; that of an index would be a sum of L stacks.
    parts = [
        leaf.layers if is_unstacked(leaf) else [part[0] for part in jax.lax.split(leaf, (1,) * leaf.shape[0])]
        for leaf in leaves
    ]
    results = []
    for layer in zip(*parts, strict=True):
        carry, layer = order_gradients(carry, layer, [is_unstacked(leaf) for leaf in leaves])
        carry, result = step(carry, jax.tree.unflatten(structure, layer))
        results.append(result)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *results)
