"""What a run holds and runs, without its weights: abstract models, and every program with what lies beside it.

Built by the functions that build the real thing (`make_state`, `ppo_models`, `ppo_engine`, `sft_programs`,
`reward_programs`) under `jax.eval_shape`, so that what they hold twice is counted twice. The mesh may be an
`AbstractMesh`, for arithmetic, or one of devices that are not there, for compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.data.batches import Batch
from rlhf_jax.engine import Engine, Models
from rlhf_jax.generate import Rollout, bucket
from rlhf_jax.mesh import AXES, GENERATE, TRAIN, Layout, MeshConfig, check_model_divides, mesh_sizes
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.cached import empty_cache
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.folders import read_json
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.models.quantised import KINDS, abstract, is_quantisable
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.plan.known import config_of
from rlhf_jax.recipe import Recipe
from rlhf_jax.rollout import check_positions
from rlhf_jax.sampling import check_learnable
from rlhf_jax.stages.base import new_hf_config
from rlhf_jax.stages.models import ModelConfig, make_state
from rlhf_jax.stages.ppo import ppo_engine, ppo_models, ppo_sizes
from rlhf_jax.stages.reward import reward_programs
from rlhf_jax.stages.sft import sft_programs
from rlhf_jax.stages.sizes import micro_batches
from rlhf_jax.train_step import TrainState, state_shardings

STAGES = ("sft", "reward", "ppo")


class Phase(NamedTuple):
    """One program of a stage, at the moment when it runs.

    Attributes:
        stage, name: for example "ppo" and "generate".
        program: jitted; `program.lower(*args)` compiles it.
        args: abstract arrays with their shardings.
        live: {what: bytes on one device} of all that lies there then, arguments included.
        cache: bytes on one device of keys and values; they are temporaries of the program.
        added: bytes on one device that the program cannot do without beside `live`: the weights that it publishes, the
            cache, the sum of gradients.
    """

    stage: str
    name: str
    program: Any
    args: tuple
    live: dict[str, int]
    cache: int = 0
    added: int = 0

    @property
    def least(self) -> int:
        """A bound below the peak, by arithmetic alone."""
        return sum(self.live.values()) + self.added


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """The mesh of `config` over `count` devices that need not be there; raises as `make_mesh`."""
    return AbstractMesh(tuple(mesh_sizes(config, count).values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_bytes(tree: Any) -> int:
    """Bytes on one device of (abstract) arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else 8
        for leaf in jax.tree.leaves(tree)
    )


def architectures(recipe: Recipe, parts: int) -> tuple[DecoderConfig, DecoderConfig]:
    """(actor, reward model and critic) from config.json alone: of the run's exports where there are some, else of what
    the configuration names (where it is not to be had, of `known.toml`).

    Args:
        parts: into how many the vocabulary is split.
    Raises:
        ValueError: a config.json that is not to be had, or of no supported architecture.
    """

    def exported(stage: str) -> Mapping[str, Any] | None:
        path = recipe.run.export(stage) / "config.json"
        return read_json(path) if path.exists() else None

    actor = exported("sft")
    if actor is None and recipe.model.actor == "new":
        base = recipe.run.folder("base") / "config.json"
        new = recipe.model.new
        actor = read_json(base) if base.exists() else new_hf_config(new, new.vocab_size)
    actor = actor or config_of(recipe.model.actor)
    reward = exported("reward") or (actor if recipe.model.reward == "sft" else config_of(recipe.model.reward))
    return (
        decoder_config(actor, scalar_head=False, vocab_parts=parts),
        decoder_config(reward, scalar_head=True, vocab_parts=parts),
    )


def phases(recipe: Recipe, mesh: Mesh | AbstractMesh, stages: tuple[str, ...] = STAGES) -> list[Phase]:
    """Every program of these stages in the order in which they run.

    Raises:
        ValueError: no config.json, sizes that do not divide, or too few positions.
    """
    actor, critic = architectures(recipe, Layout(mesh, TRAIN).shards("vocab"))
    found: list[Phase] = []
    if "sft" in stages:
        found += _supervised("sft", recipe.model, recipe.sft, recipe.data.max_length, actor, mesh)
    if "reward" in stages:
        found += _supervised("reward", recipe.model, recipe.reward, recipe.data.max_length, critic, mesh)
    if "ppo" in stages:
        found += _ppo(recipe, actor, critic, mesh)
    return found


def _supervised(stage: str, model: ModelConfig, config, max_length: int, decoder: DecoderConfig, mesh) -> list[Phase]:
    """SFT or reward model: its update, and the measuring of held-out batches beside the whole training state."""
    layout, tx = Layout(mesh, TRAIN), _optimizer(config.optim)
    length = _round8(min(max_length, decoder.max_positions))
    num_micro = micro_batches(stage, config.batch_size, config.micro_batch_size, layout)
    programs = sft_programs if stage == "sft" else reward_programs
    update, measure = programs(model.role(decoder), model.compute, layout, tx, num_micro)
    state = abstract_state(abstract_pretrained(decoder, model, mesh), model, tx)
    shape = (config.batch_size, length) if stage == "sft" else (config.batch_size, 2, length)
    batch = _batch(Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool, jnp.bool))), layout)
    live = _state_bytes("", state) | {"batch": device_bytes(batch)}
    found = [Phase(stage, "update", update, (state, batch), live, added=_gradients(state))]
    if config.eval_batches:
        found.append(Phase(stage, "evaluate", measure, (state.params, batch), live))
    return found


def _ppo(recipe: Recipe, actor: DecoderConfig, critic: DecoderConfig, mesh) -> list[Phase]:
    config, model, layout = recipe.ppo, recipe.model, Layout(mesh, TRAIN)
    batch_size, _ = ppo_sizes(config, layout)
    check_learnable(config.sample)
    for each in (actor, critic):
        check_positions(each, 1, config.sample.max_new_tokens)
    txs = _optimizer(config.actor), _optimizer(config.critic)
    engine: Engine = ppo_engine(config, model, actor, critic, *txs, eos_ids=(0,), mesh=mesh)
    models = _abstract_models(actor, critic, model, mesh, txs)
    held = _state_bytes("actor ", models.actor) | _state_bytes("critic ", models.critic)
    # A reward model shares with the critic what neither trains.
    own = {path: leaf for path, leaf in models.reward.items() if path not in models.critic.frozen}
    held |= {"reference": device_bytes(models.reference), "reward model": device_bytes(own)}

    rows, new = config.rollouts, config.sample.max_new_tokens
    prompt = prompt_positions(recipe, min(actor.max_positions, critic.max_positions))
    weights = pinned(engine.programs["publish"], models.actor.params)
    generating = Layout(mesh, GENERATE)
    in_rows = 0 < config.generate_rows < rows

    def prompts_of(count: int):
        return tuple(jax.ShapeDtypeStruct((count, prompt), dtype) for dtype in (jnp.int32, jnp.bool))

    everywhere = NamedSharding(mesh, PartitionSpec())
    prompts = _batch(prompts_of(config.rollout_batch_size), generating)
    if in_rows:
        prompts = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), prompts)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    dtype = model.compute.dtype
    cache = pinned(
        jax.jit(lambda: empty_cache(actor, config.generate_rows if in_rows else rows, prompt + new, dtype, generating))
    )
    answers = [jax.ShapeDtypeStruct((rows, new), dtype) for dtype in (jnp.int32, jnp.bool, jnp.float32)]
    ended, ends = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.bool, jnp.int32))
    rollout = Rollout(*_batch((*prompts_of(rows), *answers, ended, answers[-1], ends), generating))
    experience = pinned(engine.programs["score"], models, rollout)
    part = _batch(jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), experience), layout)

    published, rolled = {"generation weights": device_bytes(weights)}, {"rollout": device_bytes(rollout)}
    learned = rolled | {"experience": device_bytes(experience)}
    if batch_size < rows:
        learned |= {"part of the experience": device_bytes(part)}
    programs = engine.programs
    return [
        Phase("ppo", "publish", programs["publish"], (models.actor.params,), held, added=device_bytes(weights)),
        Phase(
            "ppo",
            "generate",
            jax.jit(lambda *args: programs["generate"](*args, True)) if in_rows else programs["generate"],
            (weights, *prompts, key),
            held | published | {"prompts": device_bytes(prompts)},
            cache=device_bytes(cache),
            added=device_bytes(cache),
        ),
        Phase("ppo", "score", programs["score"], (models, rollout), held | rolled),
        Phase("ppo", "actor", programs["actor"], (models.actor, part), held | learned, added=_gradients(models.actor)),
        Phase(
            "ppo", "critic", programs["critic"], (models.critic, part), held | learned, added=_gradients(models.critic)
        ),
    ]


def prompt_positions(recipe: Recipe, max_positions: int) -> int:
    """P of the longest prompts that the configuration lets through, as `make_generate` cuts them."""
    longest = min(recipe.data.max_prompt_length, max_positions - recipe.ppo.sample.max_new_tokens)
    return min(_round8(longest), bucket(longest))


def abstract_pretrained(decoder: DecoderConfig, model: ModelConfig, mesh) -> Pretrained:
    """What `stages.models.load` gives, without a tokenizer and with nothing in its arrays."""
    check_model_divides({"attention heads": decoder.num_heads}, mesh)
    layout, stored = Layout(mesh, TRAIN), model.stored_dtype(scalar_head=decoder.scalar_head)
    dtype = jnp.dtype("bfloat16" if stored in KINDS else stored)
    params = {
        path: abstract(leaf.shape, leaf.axes, stored, layout)
        if stored in KINDS and is_quantisable(path)
        else jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=layout.sharding(leaf.axes))
        for path, leaf in abstract_params(decoder).items()
    }
    return Pretrained(decoder, params, None, {}, {}, layout)


def abstract_state(pretrained: Pretrained, model: ModelConfig, tx: optax.GradientTransformation) -> TrainState:
    """What `make_state` makes of it."""
    state = _silent(
        lambda params: make_state(dataclasses.replace(pretrained, params=params), model, tx, 0), pretrained.params
    )
    return _state_laid_out(state, pretrained, model)


def _abstract_models(actor: DecoderConfig, critic: DecoderConfig, model: ModelConfig, mesh, txs) -> Models:
    """What `ppo_models` makes of two loaded models."""
    first, second = (abstract_pretrained(each, model, mesh) for each in (actor, critic))

    def build(a, c):
        loaded = dataclasses.replace(first, params=a), dataclasses.replace(second, params=c)
        return ppo_models(*loaded, model, *txs, 0)

    models, layout = _silent(build, first.params, second.params), first.layout

    def laid_out(params, loaded, shared=()):
        leaves = abstract_params(loaded.config)
        return {
            path: loaded.params[path]
            if path in shared
            else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(leaves[path].axes))
            for path, leaf in params.items()
        }

    return Models(
        _state_laid_out(models.actor, first, model),
        _state_laid_out(models.critic, second, model),
        laid_out(models.reference, first),
        laid_out(models.reward, second, models.critic.frozen.keys()),
    )


def pinned(program: Callable, *args: Any) -> Any:
    """Abstract outputs of a jitted program, in the shardings that it pins them to; replicated where it pins none."""
    closed, shapes = jax.make_jaxpr(program, return_shape=True)(*args)
    jaxpr, pins = closed.jaxpr, _pins(closed.jaxpr)
    mesh = next(iter(pins.values())).mesh
    free = NamedSharding(mesh, PartitionSpec())
    leaves, structure = jax.tree.flatten(shapes)
    laid = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=pins.get(var, free))
        for leaf, var in zip(leaves, jaxpr.outvars, strict=True)
    ]
    return jax.tree.unflatten(structure, laid)


def _pins(jaxpr: Any) -> dict[Any, NamedSharding]:
    """{variable: the sharding that it is pinned or put to}, through whatever is jitted inside."""
    pins = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            pins[eqn.outvars[0]] = eqn.params["sharding"]
        elif eqn.primitive.name == "device_put":
            pins |= zip(eqn.outvars, eqn.params["devices"], strict=True)
        elif eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"].jaxpr
            inside = _pins(inner)
            # A literal has no hash, and is pinned to nothing.
            named = [(out, var) for out, var in zip(eqn.outvars, inner.outvars, strict=True) if not hasattr(var, "val")]
            pins |= {out: inside[var] for out, var in named if var in inside}
    return pins


def _silent(build: Callable, *args: Any) -> Any:
    """`jax.eval_shape`, without what the real functions print on the way."""
    with contextlib.redirect_stdout(io.StringIO()):
        return jax.eval_shape(build, *args)


def _state_laid_out(state: TrainState, loaded: Pretrained, model: ModelConfig) -> TrainState:
    """With its shardings; what is frozen is as it was loaded."""
    moving = dataclasses.replace(state, frozen={})
    shardings = state_shardings(moving, abstract_params(loaded.config, model.role(loaded.config).lora), loaded.layout)
    moving = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), moving, shardings)
    return dataclasses.replace(moving, frozen={path: loaded.params[path] for path in state.frozen})


def _batch(tree: Any, layout: Layout) -> Any:
    """Abstract arrays split by their first dimension."""

    def laid_out(leaf):
        return layout.sharding(("batch", *[None] * (leaf.ndim - 1)))

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=laid_out(leaf)), tree)


def _state_bytes(name: str, state: TrainState) -> dict[str, int]:
    parts = {"frozen": state.frozen, "trainable": state.trainable, "optimizer": (state.step, state.opt_state)}
    return {f"{name}{part}": device_bytes(tree) for part, tree in parts.items()}


def _gradients(state: TrainState) -> int:
    """Bytes on one device of the sum of gradients, float32 like what they are of."""
    return device_bytes(state.trainable)


def _optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Its state has the same shapes however long the run is."""
    return make_optimizer(config, config.warmup_steps + 1)


def _round8(length: int) -> int:
    return -(-length // 8) * 8
