"""Program two: micro-batched gradients and one optimizer step, on state that stays in its shards; laid out by TRAIN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from rlhf_jax.mesh import Layout
from rlhf_jax.models.decoder import Leaf
from rlhf_jax.trees import record

Params = dict[str, jax.Array]
# (parameters and adapters, micro-batch) -> (mean loss, (what the mean is over, {name: mean over the same}))
LossFn = Callable[[Params, Any], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]]


@record
class TrainState:
    """Everything that the next step depends on, apart from the data.

    Attributes:
        step: [] int32, optimizer steps taken.
        trainable: {path: float32 array} that the optimizer changes: all parameters, or adapters and scalar head.
        frozen: {path: array} of the rest, in any dtype. Never donated, so that several models may share it.
        opt_state: optax state over `trainable`, split like it.
    """

    step: jax.Array
    trainable: Params
    frozen: Params
    opt_state: optax.OptState

    @property
    def params(self) -> Params:
        """Parameters and adapters together."""
        return {**self.frozen, **self.trainable}


def state_shardings(state: TrainState, leaves: Mapping[str, Leaf], layout: Layout) -> TrainState:
    """A sharding for every leaf of a (possibly abstract) state: by its path where it has one, else replicated."""

    def sharding(key_path, leaf):
        path = next((key.key for key in reversed(key_path) if isinstance(key, jax.tree_util.DictKey)), None)
        return layout.sharding(leaves[path].axes if path in leaves and leaf.ndim else ())

    return jax.tree_util.tree_map_with_path(sharding, state)


def init_state(
    trainable: Params, frozen: Params, tx: optax.GradientTransformation, leaves, layout: Layout
) -> TrainState:
    """The state of step 0: the optimizer's moments are born in their shards, the parameters taken as they are."""

    def init(trainable):
        return TrainState(jnp.int32(0), {}, {}, tx.init(trainable))

    shardings = state_shardings(jax.eval_shape(init, trainable), leaves, layout)
    fresh = jax.jit(init, out_shardings=shardings)(trainable)
    return TrainState(fresh.step, trainable, frozen, fresh.opt_state)


@dataclasses.dataclass(frozen=True)
class Update:
    """(state, batch) -> (state, metrics), compiled; all of the state but what is frozen is donated."""

    program: Any  # jitted: (state without what is frozen, frozen, batch) -> the same without it, metrics

    def __call__(self, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        moved, stats = self.program(dataclasses.replace(state, frozen={}), state.frozen, batch)
        return dataclasses.replace(moved, frozen=state.frozen), stats

    def lower(self, state: TrainState, batch) -> jax.stages.Lowered:
        """Of arrays or of their abstract shapes, to be compiled and looked at."""
        return self.program.lower(dataclasses.replace(state, frozen={}), state.frozen, batch)


def split_rows(tree, parts: int, layout: Layout):
    """[B, ...] -> [parts, B / parts, ...] of every leaf; strided, so that every device keeps the rows it holds."""

    def split(leaf: jax.Array) -> jax.Array:
        rows = rearrange(leaf, "(b n) ... -> n b ...", n=parts)
        return layout.constrain(rows, None, "batch", *[None] * (leaf.ndim - 1))

    return jax.tree.map(split, tree)


def join_rows(tree, layout: Layout):
    """The inverse of `split_rows`."""

    def join(leaf: jax.Array) -> jax.Array:
        return layout.constrain(rearrange(leaf, "n b ... -> (b n) ..."), "batch", *[None] * (leaf.ndim - 2))

    return jax.tree.map(join, tree)


def make_update(
    loss_fn: LossFn, tx: optax.GradientTransformation, leaves: Mapping[str, Leaf], layout: Layout, num_micro: int
) -> Update:
    """One optimizer step.

    Gradients of `num_micro` micro-batches are summed, each weighted by what its mean is over, and divided by the
    total: the same as one large batch, however tokens fall. Metrics are averaged alike, and "grad_norm" is added.
    A batch is a pytree of arrays with the batch as their first dimension.
    """

    def laid_out(grads: Params) -> Params:
        return {path: layout.constrain(grad, *leaves[path].axes) for path, grad in grads.items()}

    def micro_step(state: TrainState, frozen: Params, micro) -> tuple[Params, jax.Array, dict]:
        def mean_loss(trainable):
            return loss_fn({**frozen, **trainable}, micro)

        (loss, (weight, stats)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.trainable)
        summed = jax.tree.map(lambda leaf: leaf * weight, ({"loss": loss, **stats}, grads))
        return summed[1], weight, summed[0]

    def update(state: TrainState, frozen: Params, batch) -> tuple[TrainState, dict]:
        micros = split_rows(batch, num_micro, layout)
        first = jax.tree.map(lambda leaf: leaf[0], micros)

        def add(total, micro):
            grads, weight, stats = micro_step(state, frozen, micro)
            return jax.tree.map(jnp.add, total, (laid_out(grads), weight, stats)), None

        shapes = jax.eval_shape(micro_step, state, frozen, first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, weight, stats), _ = jax.lax.scan(add, (laid_out(zeros[0]), *zeros[1:]), micros)
        grads, stats = jax.tree.map(lambda leaf: leaf / jnp.maximum(weight, 1), (grads, stats))
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = laid_out(optax.apply_updates(state.trainable, updates))
        stats |= {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, trainable, {}, opt_state), stats

    return Update(jax.jit(update, donate_argnums=0))
