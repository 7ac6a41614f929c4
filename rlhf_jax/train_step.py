"""Micro-batched gradients and one optimizer step, on a training state that stays sharded by `train_layout`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from rlhf_jax.hardware import RUN_OPTIONS
from rlhf_jax.loss_scale import LossScale, LossScaleConfig, first_scale, next_scale
from rlhf_jax.mesh import Layout, in_host_memory, to_devices, to_host
from rlhf_jax.models.decoder import Leaf
from rlhf_jax.optim import Optimizer, join_states, select_path, with_counters
from rlhf_jax.skipping import Skips, next_skips, no_skips, select, wrong_gradients
from rlhf_jax.trees import record

Params = dict[str, jax.Array]
Leaves = Mapping[str, Leaf]
# (parameters and adapters, micro-batch) -> (mean loss, (number of things the mean is over, {name: mean over same})).
# A third member of the inner tuple is the number of things that the metrics are means over.
LossFn = Callable[[Params, Any], tuple[jax.Array, tuple]]


@record
class TrainState:
    """The state that a step changes, and that a checkpoint therefore keeps.

    The parameters that do not train are passed separately from a state, as `frozen`, {path: array} in any dtype. They
    are never donated, so that several models may share them.

    Attributes:
        step: [] int32, optimizer steps taken.
        trainable: {path: float32 array} that the optimizer changes: all parameters, or adapters and scalar head.
        opt_state: optax state over `trainable`, sharded like it.
        skips: the optimizer steps that were skipped.
        scale: of the loss, for a model that computes in float16; None: the loss is not scaled.
    """

    step: jax.Array
    trainable: Params
    opt_state: optax.OptState
    skips: Skips
    scale: LossScale | None = None

    def params(self, frozen: Params) -> Params:
        """All parameters and adapters of the model."""
        return {**frozen, **self.trainable}


def taken_before(state: TrainState) -> jax.Array:
    """[] int32: the steps taken before the last one, for the learning rate that it had; 0 where all were skipped."""
    return jnp.maximum(state.step - 1, 0)


class Update(Protocol):
    """A compiled (state, frozen, batch) -> (state, metrics); the state is donated."""

    def __call__(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]: ...

    def lower(self, state: TrainState, frozen: Params, batch: Any) -> jax.stages.Lowered:
        """The lowered program, from arrays or their abstract shapes."""
        ...


def shardings_by_path(tree: Any, leaves: Leaves, layout: Layout, memory: str | None = None) -> Any:
    """A sharding for every leaf: that of the parameter whose path it has, in this memory kind; else replicated.

    Arrays under the path of a parameter but with other dimensions, as factored moments have, are replicated.
    """

    def sharding(key_path, leaf):
        path = next((key.key for key in reversed(key_path) if isinstance(key, jax.tree_util.DictKey)), None)
        if path not in leaves or not leaf.ndim or leaf.ndim != len(leaves[path].axes):
            return layout.sharding(())
        by_axes = layout.sharding(leaves[path].axes)
        return by_axes.with_memory_kind(memory) if memory else by_axes

    return jax.tree_util.tree_map_with_path(sharding, tree)


def state_shardings(state: TrainState, leaves: Leaves, layout: Layout) -> TrainState:
    """A sharding for every leaf of a (possibly abstract) state, by `shardings_by_path`.

    Moments are sharded by `layout.moments`, in the memory kind in which they are kept; counters are on the devices.
    """
    moments = shardings_by_path(state.opt_state, leaves, layout.moments, layout.moments_in)
    return dataclasses.replace(shardings_by_path(state, leaves, layout), opt_state=moments)


def init_state(
    trainable: Params,
    tx: optax.GradientTransformation,
    leaves: Leaves,
    layout: Layout,
    scaling: LossScaleConfig | None = None,
) -> TrainState:
    """The state of step 0: the optimizer's moments are created in their shards; parameters are used as they are.

    Moments kept in host memory are computed on the devices and moved there, one parameter at a time.
    """

    def init(trainable):
        scale = first_scale(scaling) if scaling else None
        return TrainState(jnp.int32(0), {}, tx.init(trainable), no_skips(len(trainable)), scale)

    def fresh(some: Params, at: Layout) -> TrainState:
        return jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init, some), leaves, at))(some)

    if not layout.moments_in:
        return dataclasses.replace(fresh(trainable, layout), trainable=trainable)
    on_device, opt_states = dataclasses.replace(layout, moments_in=None), []
    for path, leaf in trainable.items():
        state = fresh({path: leaf}, on_device)
        kept = jax.device_put(state, state_shardings(state, leaves, layout))
        opt_states.append(jax.block_until_ready(kept).opt_state)
    skips = jax.jit(lambda: no_skips(len(trainable)), out_shardings=layout.sharding(()))()
    return TrainState(state.step, trainable, functools.reduce(join_states, opt_states), skips, state.scale)


@dataclasses.dataclass(frozen=True)
class OffloadedUpdate:
    """An update by two kinds of programs, with the moments of at most one parameter on the devices.

    First all gradients, clipped. Then parameter by parameter: its moments are fetched, `step` runs, and they return
    before the next parameter starts: memory is allocated when a program is enqueued, so programs not yet enqueued hold
    none. A gradient is freed with its step, and the smallest parameters are first, so few gradients are left when the
    largest moments are on the devices.
    """

    gradients: Any  # jitted: (state without moments, frozen, batch) -> (the next, gradients, metrics); donates nothing
    step: Any  # jitted: (parameter, gradient, moments, counters) of a path -> all but the gradient; donates 1st and 3rd
    leaves: Leaves
    layout: Layout

    def __call__(self, state: TrainState, frozen: Params, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        after, grads, stats = self.gradients(dataclasses.replace(state, opt_state=None), frozen, batch)
        if after.step == state.step:  # skipped
            return dataclasses.replace(state, skips=after.skips, scale=after.scale), stats
        trainable, opt_states = dict(state.trainable), []
        for path in self.order(trainable):
            kept, counters = select_path(state.opt_state, path)
            moments = jax.device_put(kept, self.layout.moments.sharding(self.leaves[path].axes))
            param, moments, counters = self.step({path: trainable[path]}, {path: grads.pop(path)}, moments, counters)
            moments = jax.block_until_ready(jax.device_put(moments, jax.tree.map(lambda x: x.sharding, kept)))
            jax.tree.map(lambda x: x.delete(), kept)
            trainable |= param
            opt_states.append(with_counters(moments, counters))
        opt_state = functools.reduce(join_states, opt_states)
        return TrainState(after.step, trainable, opt_state, after.skips, after.scale), stats

    @staticmethod
    def order(trainable: Params) -> list[str]:
        """Paths, the smallest parameter first."""
        return sorted(trainable, key=lambda path: (trainable[path].size, path))

    def lower(self, state: TrainState, frozen: Params, batch) -> jax.stages.Lowered:
        """The lowered `gradients`, from arrays or their abstract shapes."""
        return self.gradients.lower(dataclasses.replace(state, opt_state=None), frozen, batch)

    def arguments(self, state: TrainState, path: str) -> tuple:
        """Abstract arguments of the `step` of one parameter, on the devices."""

        def on_device(layout: Layout, tree):
            sharding = layout.sharding(self.leaves[path].axes)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

        moments, counters = select_path(state.opt_state, path)
        param = {path: state.trainable[path]}
        return on_device(self.layout, param), *(on_device(self.layout.moments, x) for x in (param, moments)), counters


def split_micro_batches(tree, parts: int, layout: Layout):
    """Split every leaf [B, ...] -> [parts, B / parts, ...]; strided, so that every device keeps its rows."""

    def split(leaf: jax.Array) -> jax.Array:
        rows = rearrange(leaf, "(b n) ... -> n b ...", n=parts)
        return layout.constrain(rows, None, "batch", *[None] * (leaf.ndim - 1))

    return jax.tree.map(split, tree)


def join_micro_batches(tree, layout: Layout):
    """The inverse of `split_micro_batches`."""

    def join(leaf: jax.Array) -> jax.Array:
        return layout.constrain(rearrange(leaf, "n b ... -> (b n) ..."), "batch", *[None] * (leaf.ndim - 2))

    return jax.tree.map(join, tree)


@record
class Sums:
    """Sums over micro-batches, each times the number of things that its mean is over.

    Attributes:
        grads: {path: float32 array} of the scaled loss, sharded by `layout.gradients`.
        weight: [], the weights of gradients and loss.
        stats: {name: []}, loss and metrics.
        count: [], the weights of the metrics.
    """

    grads: Params
    weight: jax.Array
    stats: dict[str, jax.Array]
    count: jax.Array


def micro_batch_sums(loss_fn: LossFn, trainable: Params, scale: LossScale | None, frozen: Params, micro: Any) -> Sums:
    """The sums of a single micro-batch."""

    def scaled_loss(trainable: Params):
        loss, (weight, stats, *count) = loss_fn({**frozen, **trainable}, micro)
        return loss * scale.value if scale else loss, (loss, weight, stats, count[0] if count else weight)

    grads, (loss, weight, stats, count) = jax.grad(scaled_loss, has_aux=True)(trainable)
    grads, stats = jax.tree.map(lambda x: x * weight, grads), jax.tree.map(lambda x: x * count, stats)
    return Sums(grads, weight, {"loss": loss * weight, **stats}, count)


def sum_gradients(
    loss_fn: LossFn, state: TrainState, frozen: Params, batch: Any, leaves: Leaves, layout: Layout, num_micro: int
) -> Sums:
    """The sums over a batch, a pytree of arrays [B, ...], of which `num_micro` parts are computed one by one."""
    given = loss_fn, state.trainable, state.scale, frozen
    micros = split_micro_batches(batch, num_micro, layout)

    def by_layout(sums: Sums) -> Sums:
        return dataclasses.replace(sums, grads=constrain_params(sums.grads, leaves, layout.gradients))

    def add(total: Sums, micro: Any):
        return jax.tree.map(jnp.add, total, by_layout(micro_batch_sums(*given, micro))), None

    first = jax.tree.map(lambda leaf: leaf[0], micros)
    if num_micro == 1:
        return by_layout(micro_batch_sums(*given, first))
    shapes = jax.eval_shape(functools.partial(micro_batch_sums, *given), first)
    zeros = by_layout(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    return jax.lax.scan(add, zeros, micros)[0]


def mean_gradients(sums: Sums, scale: LossScale | None, leaves: Leaves, layout: Layout) -> tuple[Params, dict]:
    """The gradients of the mean loss, sharded by `layout.moments`, and the means of the metrics with "grad_norm"."""
    weight, count = (jnp.maximum(number, 1) for number in (sums.weight, sums.count))
    grads = jax.tree.map(lambda leaf: leaf / weight, sums.grads)
    stats = {name: total / (weight if name == "loss" else count) for name, total in sums.stats.items()}
    if scale:
        grads = jax.tree.map(lambda leaf: leaf / scale.value, grads)
    grads = constrain_params(grads, leaves, layout.moments)
    return grads, stats | {"grad_norm": optax.tree.norm(grads)}


def constrain_params(params: Params, leaves: Leaves, layout: Layout) -> Params:
    """The parameters, or arrays of the same shapes, with the sharding that the layout gives their axes."""
    return {path: layout.constrain(leaf, *leaves[path].axes) for path, leaf in params.items()}


def apply_gradients(
    tx_update, trainable: Params, grads: Params, opt_state, leaves: Leaves, layout: Layout, is_finite=None
) -> tuple[Params, optax.OptState]:
    """The parameters and the optimizer's state after a step, or as they are where `is_finite`, if given, is false.

    The step is computed in the sharding of the moments (ZeRO-1 and -2): each device computes its part of the new
    parameters, and the parts are gathered to the sharding of the parameters.
    """
    parts, before = constrain_params(trainable, leaves, layout.moments), opt_state
    updates, opt_state = tx_update(grads, opt_state, parts)
    updated = optax.apply_updates(parts, updates)
    if is_finite is not None:
        updated, opt_state = select(is_finite, (updated, opt_state), (parts, before))
    parts = constrain_params(updated, leaves, layout.moments)
    shardings = shardings_by_path(opt_state, leaves, layout.moments)
    return constrain_params(parts, leaves, layout), jax.lax.with_sharding_constraint(opt_state, shardings)


def advance(
    scaling: LossScaleConfig | None, state: TrainState, grads: Params, stats: dict
) -> tuple[TrainState, jax.Array, dict]:
    """The state with the next counters and loss scale, whether the step is finite and so taken, and the metrics."""
    is_finite, scale, is_helped = jnp.isfinite(stats["grad_norm"]) & jnp.isfinite(stats["loss"]), state.scale, False
    if scale is not None:
        is_helped = scale.value > scaling.smallest
        stats = stats | {"loss_scale": scale.value}
        scale = next_scale(scaling, scale, is_finite)
    skips = next_skips(state.skips, is_finite, wrong_gradients(grads), is_helped)
    state = dataclasses.replace(state, step=state.step + is_finite, skips=skips, scale=scale)
    return state, is_finite, stats | {"skipped_steps": skips.total}


def take_step(
    tx: optax.GradientTransformation, scaling: LossScaleConfig | None, state: TrainState, sums: Sums, *place
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after an optimizer step by the mean gradients of these sums, and the metrics.

    place: the leaves of the parameters, and the layout.
    """
    grads, stats = mean_gradients(sums, state.scale, *place)
    after, is_finite, stats = advance(scaling, state, grads, stats)
    trainable, opt_state = apply_gradients(tx.update, state.trainable, grads, state.opt_state, *place, is_finite)
    return dataclasses.replace(after, trainable=trainable, opt_state=opt_state), stats


def make_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    leaves: Leaves,
    layout: Layout,
    num_micro: int,
    scaling: LossScaleConfig | None = None,
) -> Update:
    """One optimizer step: the jitted update(state, frozen, batch) -> (state, metrics); the whole state is donated.

    Gradients of `num_micro` micro-batches are summed, each weighted by the number of things that its mean is over, and
    divided by the total: equal to one large batch, however tokens are distributed. Metrics are averaged the same way,
    or by a number of their own (`LossFn`), and "grad_norm" is added. A batch is a pytree of arrays with the batch as
    their first dimension.

    Offloaded moments need an `Optimizer`.

    With `scaling`, for a state with a scale, gradients are those of the scaled loss, divided by the scale before they
    are clipped. A step whose loss or gradient is not finite changes nothing except the scale and the record of skips.
    """
    place = leaves, layout

    def update(state: TrainState, frozen: Params, batch) -> tuple[TrainState, dict]:
        return take_step(tx, scaling, state, sum_gradients(loss_fn, state, frozen, batch, *place, num_micro), *place)

    def gradients(state: TrainState, frozen: Params, batch) -> tuple[TrainState, Params, dict]:
        sums = sum_gradients(loss_fn, state, frozen, batch, *place, num_micro)
        grads, stats = mean_gradients(sums, state.scale, *place)
        after, _, stats = advance(scaling, state, grads, stats)
        return dataclasses.replace(after, trainable={}), constrain_params(tx.clip(grads), leaves, layout.moments), stats

    def step(param: Params, grad: Params, moments, counters) -> tuple[Params, Any, Any]:
        param, opt_state = apply_gradients(tx.update_each, param, grad, with_counters(moments, counters), *place)
        (path,) = param
        return param, *select_path(opt_state, path)

    if not layout.moments_in:
        return jax.jit(update, donate_argnums=0, compiler_options=RUN_OPTIONS)
    assert isinstance(tx, Optimizer), "offloaded moments need an optimizer that updates parameters one by one"
    all_gradients = jax.jit(gradients, compiler_options=RUN_OPTIONS)
    return OffloadedUpdate(all_gradients, jax.jit(step, donate_argnums=(0, 2)), leaves, layout)


def start_ema(trainable: Params, *, offload: bool) -> Params:
    """The moving average of step 0: copies of `trainable`, sharded like it; `offload`: in pinned host memory."""
    return to_host(trainable) if offload else jax.tree.map(jnp.copy, trainable)


def make_ema_step(decay: float):
    """The jitted (average, weights, is_taken) -> average + (1 - decay) (weights - average) of one array, where the step
    that led to the weights was taken, [] bool, else the average; donates the average.
    """

    def step(average: jax.Array, weights: jax.Array, is_taken: jax.Array) -> jax.Array:
        return jnp.where(is_taken, average + (1 - decay) * (weights - average), average)

    return jax.jit(step, donate_argnums=0)


def ema_update(step, average: Params, trainable: Params, is_taken: jax.Array) -> Params:
    """The average after a step of `trainable`, path by path with `step` of `make_ema_step`; the old one is deleted.

    An average in host memory is fetched to the devices one path at a time, the next after that one has returned, so at
    most its largest array is ever on the devices.
    """

    def update(leaf: jax.Array, weights: jax.Array) -> jax.Array:
        if not in_host_memory(leaf):
            return step(leaf, weights, is_taken)
        back = jax.block_until_ready(jax.device_put(step(to_devices(leaf), weights, is_taken), leaf.sharding))
        leaf.delete()
        return back

    return {path: update(leaf, trainable[path]) for path, leaf in average.items()}
