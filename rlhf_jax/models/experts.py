"""The sparse MLP: a router sends each token to a few of many gated MLPs (Shazeer et al. 2017).

Tokens are sorted by expert and every expert multiplies its own, however many those are: none is dropped. Each expert
is split over the mesh by its width, as a dense MLP is, so that devices do the same work whatever the router says.

Routing is of each token alone, and the balance loss of the counts of all real tokens of a batch: neither looks at where
a document begins, so rows that hold several give what they give apart.

N tokens, D hidden, X experts, C experts per token, F width of one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Experts
from rlhf_jax.models.layers import ACTIVATIONS
from rlhf_jax.products import matmul

BLOCK_ROWS = 64  # of `_experts_by_blocks`, at most


class Routing(NamedTuple):
    """Attributes:
    chosen: [B, T, C] int32, experts of each token.
    weights: [B, T, C] float32, of their outputs.
    probabilities: [B, T, X] float32, the router's.
    """

    chosen: jax.Array
    weights: jax.Array
    probabilities: jax.Array


def route(experts: Experts, x: jax.Array, router: jax.Array) -> Routing:
    """x [B, T, D], router [D, X]."""
    logits = matmul(x, router.astype(x.dtype), jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, experts.per_token)
    if experts.renormalised:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routing(chosen, weights, probabilities)


def router_load(experts: Experts, routing: Routing, mask: jax.Array) -> jax.Array:
    """[2, X] float32: over the real tokens of [B, T], the mean number of choices and probability of each expert."""
    real = mask / jnp.maximum(mask.sum(), 1)
    choices = jax.nn.one_hot(routing.chosen, experts.count).sum(2)
    return jnp.stack([jnp.einsum("bt,btx->x", real, y) for y in (choices, routing.probabilities)])


def balance_loss(experts: Experts, loads: jax.Array) -> jax.Array:
    """coefficient x X x sum over experts of choices x probability (Fedus et al. 2021, eq. 4), of loads [L, 2, X].

    As transformers does, choices and probabilities are first averaged over the layers.
    """
    choices, probabilities = loads.mean(0)
    return experts.aux_coef * experts.count * jnp.sum(choices * probabilities)


def apply_experts(
    x: jax.Array, routing: Routing, kernels: Sequence[jax.Array], *, activation: str, layout: Layout | None
) -> jax.Array:
    """x [B, T, D] -> [B, T, D] by `routing`; kernels are gate and up [X, D, F], and down [X, F, D]."""
    arguments = x, routing.chosen, routing.weights, tuple(kernels)
    local = functools.partial(_local_experts, activation=activation)
    if layout is None:
        return local(*arguments)
    # Sorting is of the tokens that a device has. Axes that split the batch cannot split the width: over those the
    # experts are gathered, over the others each device has a part of every expert, and what they give is summed.
    shared, width = layout.table.batch, layout.table.mlp
    tokens, up = layout.spec(("batch", None, None)), PartitionSpec(None, None, width)
    program = functools.partial(
        local,
        gathered_over=tuple(axis for axis in width if axis in shared),
        summed_over=tuple(axis for axis in width if axis not in shared),
        copied_over=tuple(axis for axis in shared if axis not in width),
    )
    specs = tokens, tokens, tokens, (up, up, PartitionSpec(None, width, None))
    return jax.shard_map(program, mesh=layout.mesh, in_specs=specs, out_specs=tokens)(*arguments)


def _ragged_experts(
    rows: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array, *, activation: str
) -> jax.Array:
    """rows [R, D], of which each expert in turn has `sizes` [X] -> [R, D]."""
    hidden_rows = ACTIVATIONS[activation](jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    return jax.lax.ragged_dot(hidden_rows, down, sizes)


def _experts_by_blocks(
    rows: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array, *, activation: str
) -> jax.Array:
    """`_ragged_experts` for CPUs, where XLA (jax 0.10.2) makes `ragged_dot` a product of all rows by every expert.

    The rows of each expert are padded to whole blocks, and one block after the other is multiplied by its expert.
    """
    count, experts = rows.shape[0], sizes.shape[0]
    block = min(BLOCK_ROWS, max(8, count // experts))
    blocks = -(-sizes // block)  # of each expert
    total = -(-count // block) + experts  # as many as there may be
    expert = jnp.repeat(jnp.arange(experts), blocks, total_repeat_length=total)
    of_row = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=count)
    first = (jnp.cumsum(blocks) - blocks) * block - (jnp.cumsum(sizes) - sizes)
    place = jnp.arange(count) + first[of_row]
    padded = jnp.zeros((total * block, rows.shape[1]), rows.dtype).at[place].set(rows, unique_indices=True)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # which keeps no copy of an expert for every block
    def multiply(_, block_and_expert):
        x, e = block_and_expert
        return None, matmul(ACTIVATIONS[activation](matmul(x, gate[e])) * matmul(x, up[e]), down[e])

    _, outputs = jax.lax.scan(multiply, None, (padded.reshape(total, block, -1), expert))
    return outputs.reshape(total * block, -1)[place]


def _local_experts(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: Sequence[jax.Array],
    *,
    activation: str,
    gathered_over: tuple[str, ...] = (),
    summed_over: tuple[str, ...] = (),
    copied_over: tuple[str, ...] = (),
) -> jax.Array:
    batch, length, hidden = x.shape
    per_token = chosen.shape[-1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # of the N x C pairs of token and expert, by expert
    sizes = jnp.bincount(chosen.reshape(-1), length=kernels[0].shape[0])
    rows = x.reshape(-1, hidden)[order // per_token]
    gate, up, down = (jnp.asarray(kernel, x.dtype) for kernel in kernels)
    if gathered_over:  # here, after the cast, and so that the gradients are reduce-scattered
        gate, up = (jax.lax.all_gather(kernel, gathered_over, axis=2, tiled=True) for kernel in (gate, up))
        down = jax.lax.all_gather(down, gathered_over, axis=1, tiled=True)
    # `matmul` has gradients of its own, which differ between devices as both of its operands do.
    rows = jax.lax.pcast(rows, summed_over, to="varying")
    gate, up, down = (jax.lax.pcast(kernel, copied_over, to="varying") for kernel in (gate, up, down))
    outputs = jax.lax.platform_dependent(
        *(rows, gate, up, down, sizes),
        cpu=functools.partial(_experts_by_blocks, activation=activation),
        default=functools.partial(_ragged_experts, activation=activation),
    )[jnp.argsort(order)]
    outputs = outputs.reshape(batch, length, per_token, hidden)
    y = jnp.einsum("btcd,btc->btd", outputs, weights.astype(x.dtype))
    return jax.lax.psum(y, summed_over) if summed_over else y
