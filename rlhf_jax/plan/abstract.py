"""Models, states and batches of a run as abstract arrays: shapes, dtypes and shardings.

Made by the functions that make the real ones, under `jax.eval_shape`. The mesh may be an `AbstractMesh`, for
arithmetic, or one of compile-only devices, for compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from rlhf_jax.engine import EngineState, FrozenParams, Optimizers
from rlhf_jax.mesh import (
    AXES,
    GENERATE,
    HOST_MEMORY,
    Layout,
    MeshConfig,
    check_model_divides,
    in_host_memory,
    mesh_sizes,
)
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import Leaf, abstract_params
from rlhf_jax.models.dtypes import QUANTISED_KINDS
from rlhf_jax.models.hub import config_json, is_folder
from rlhf_jax.models.inference import shared_inference_weights, shared_leaves
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.models.quantised import abstract_codes, is_quantisable
from rlhf_jax.models.unstacked import Unstacked, is_shareable
from rlhf_jax.stages.models import ModelConfig, make_state
from rlhf_jax.train_step import Params, TrainState, state_shardings


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """The mesh of `config` over `count` devices, which need not exist; raises as `make_mesh`."""
    return AbstractMesh(tuple(mesh_sizes(config, count).values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_bytes(tree: Any) -> int:
    """Bytes on one device of (abstract) arrays with shardings; arrays in host memory do not count."""
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if not in_host_memory(leaf))


def host_bytes(tree: Any) -> int:
    """Bytes of one device's shards that are kept in host memory."""
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if in_host_memory(leaf))


def _shard_bytes(leaf: Any) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize


def with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def relayout_bytes(actor: DecoderConfig, params: Mapping[str, Any], layout: Layout) -> int:
    """Bytes on one device of the parameters that generation shares with training but has to shard differently."""
    moved = []

    def put(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        if leaf.sharding.shard_shape(leaf.shape) != sharding.shard_shape(leaf.shape):
            moved.append(with_sharding(leaf, sharding))
        return leaf

    shared_inference_weights(actor, params, layout, put)
    return device_bytes(moved)


def abstract_pretrained(
    decoder: DecoderConfig, model: ModelConfig, layout: Layout, *, one_copy: bool = False
) -> Pretrained:
    """The result of `stages.models.load_model` with abstract arrays and without a tokenizer."""
    check_model_divides({"attention heads": decoder.num_heads}, layout.mesh)
    stored = model.stored_dtype(scalar_head=decoder.scalar_head)
    dtype = jnp.dtype("bfloat16" if stored in QUANTISED_KINDS else stored)
    serving = Layout(layout.mesh, GENERATE)

    def param(path: str, leaf: Leaf) -> Any:
        where = serving if one_copy and is_shareable(path) else layout
        if stored in QUANTISED_KINDS and is_quantisable(path):
            return abstract_codes(leaf.shape, leaf.axes, stored, where)
        if one_copy and is_quantisable(path):
            layer = jax.ShapeDtypeStruct(leaf.shape[1:], dtype, sharding=where.sharding(leaf.axes[1:]))
            return Unstacked((layer,) * leaf.shape[0])
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where.sharding(leaf.axes))

    leaves = shared_leaves(decoder, serving) if one_copy else abstract_params(decoder)
    return Pretrained(decoder, {path: param(path, leaf) for path, leaf in leaves.items()}, None, {}, {}, layout)


def abstract_state(
    loaded: Pretrained, model: ModelConfig, tx: optax.GradientTransformation
) -> tuple[TrainState, Params]:
    """The abstract (state, frozen) that `make_state` makes of a loaded model."""

    def build(params):
        return make_state(dataclasses.replace(loaded, params=params), model, tx, 0)

    state, frozen = jax.eval_shape(build, loaded.params)
    return _with_shardings(state, loaded, model), {path: loaded.params[path] for path in frozen}


def abstract_models(
    make_models: Callable,
    actor: DecoderConfig,
    scorer: DecoderConfig | None,
    model: ModelConfig,
    layout: Layout,
    optimizers: Optimizers,
) -> tuple[EngineState, FrozenParams]:
    """The abstract (state, frozen) that `make_models` of a stage makes of a loaded actor and reward model, if any.

    make_models: (actor, scorer, model, optimizers, seed) -> (state, frozen).
    """
    first = abstract_pretrained(actor, model, layout, one_copy=model.one_copy)
    second = abstract_pretrained(scorer, model, layout) if scorer else None
    on_devices = dataclasses.replace(model, offload_reference=False, offload_ema=False)

    def build(a, c):
        loaded = dataclasses.replace(first, params=a), second and dataclasses.replace(second, params=c)
        return make_models(*loaded, on_devices, optimizers, 0)

    state, frozen = jax.eval_shape(build, first.params, second.params if second else {})
    trained = _with_shardings(state.actor, first, model)
    average = with_memory(trained.trainable, HOST_MEMORY if model.offload_ema else None) if state.average else {}
    base = {path: first.params[path] for path in frozen.actor}
    shared = {path: second.params[path] for path in frozen.critic}
    memory = HOST_MEMORY if model.offload_reference else None
    reference = with_memory(by_layout(frozen.reference, actor, layout), memory)
    own = {path: leaf for path, leaf in frozen.reward.items() if path not in shared}
    reward = shared | (by_layout(own, scorer, layout) if own else {})
    state = EngineState(trained, state.critic and _with_shardings(state.critic, second, model), average)
    return state, FrozenParams(base, shared, reference, reward)


def by_layout(params: Params, decoder: DecoderConfig, layout: Layout) -> Params:
    """Abstract parameters of a model, or some of them, sharded by a layout."""
    leaves = abstract_params(decoder)
    return {path: with_sharding(leaf, layout.sharding(leaves[path].axes)) for path, leaf in params.items()}


def with_memory(params: Mapping[str, Any], memory: str | None) -> dict[str, Any]:
    """Abstract arrays in another memory; None: the devices' own."""
    return {path: with_sharding(x, x.sharding.with_memory_kind(memory)) for path, x in params.items()}


def output_shardings(program: Callable, *args: Any) -> Any:
    """Abstract outputs of a jitted program, with the shardings that it constrains them to; else replicated."""
    # A program with its own compiler options cannot be traced inside another.
    closed, shapes = jax.make_jaxpr(getattr(program, "__wrapped__", program), return_shape=True)(*args)
    jaxpr, pins = closed.jaxpr, _sharding_constraints(closed.jaxpr)
    mesh = next(iter(pins.values())).mesh
    free = NamedSharding(mesh, PartitionSpec())
    leaves, structure = jax.tree.flatten(shapes)
    found = [with_sharding(leaf, pins.get(var, free)) for leaf, var in zip(leaves, jaxpr.outvars, strict=True)]
    return jax.tree.unflatten(structure, found)


def _sharding_constraints(jaxpr: Any) -> dict[Any, NamedSharding]:
    """{variable: the sharding that it is constrained or moved to}, including the jitted functions inside."""
    pins = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            pins[eqn.outvars[0]] = eqn.params["sharding"]
        elif eqn.primitive.name == "device_put":
            pins |= zip(eqn.outvars, eqn.params["devices"], strict=True)
        elif eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"].jaxpr
            inside = _sharding_constraints(inner)
            # A literal has no hash and no sharding.
            named = [(out, var) for out, var in zip(eqn.outvars, inner.outvars, strict=True) if not hasattr(var, "val")]
            pins |= {out: inside[var] for out, var in named if var in inside}
    return pins


def _with_shardings(state: TrainState, loaded: Pretrained, model: ModelConfig) -> TrainState:
    leaves = abstract_params(model.with_lora(loaded.config))
    return jax.tree.map(with_sharding, state, state_shardings(state, leaves, loaded.layout))


def abstract_batch(tree: Any, layout: Layout) -> Any:
    """Abstract arrays sharded along their first dimension."""
    return jax.tree.map(lambda leaf: with_sharding(leaf, layout.sharding(("batch", *[None] * (leaf.ndim - 1)))), tree)


@functools.cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """{hub id: the keys of its config.json that a plan needs}, from known_models.toml."""
    tables = tomllib.loads(resources.files(__package__).joinpath("known_models.toml").read_text())
    return {
        name: {"model_type": family} | {key: value for key, value in table.items() if key != "models"} | own
        for family, table in tables.items()
        for name, own in table["models"].items()
    }


def find_config(path_or_id: str) -> tuple[Mapping[str, Any], bool]:
    """(config.json of a folder, else the entry of known_models.toml, else of the hub; whether it is that entry).

    Raises:
        ValueError: none of them has it.
    """
    if is_folder(path_or_id):
        return config_json(path_or_id), False
    entry = known_models().get(path_or_id)
    return (_hub_config(path_or_id), False) if entry is None else (entry, True)


@functools.cache  # a plan asks many times
def _hub_config(name: str) -> Mapping[str, Any]:
    return config_json(name)
