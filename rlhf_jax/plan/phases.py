"""The programs of a run, and what is resident while each runs, as abstract shapes.

Built by the functions that build the real thing (`make_state`, `ppo_models`, `ppo_engine`, `make_programs`)
under `jax.eval_shape`, so that arrays that they hold twice are counted twice. The mesh may be an `AbstractMesh`, for
arithmetic, or one of compile-only devices, for compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.data.batches import Batch
from rlhf_jax.decode import Rollout, bucket_length
from rlhf_jax.engine import EngineState, FrozenParams, HybridEngine, with_texts
from rlhf_jax.mesh import HOST_MEMORY, TRAIN, Layout
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.hub import read_json
from rlhf_jax.models.inference import empty_cache, shared_inference_weights
from rlhf_jax.optim import make_optimizer
from rlhf_jax.plan.abstract import (
    abstract_batch,
    abstract_models,
    abstract_pretrained,
    abstract_state,
    by_layout,
    device_bytes,
    find_config,
    host_bytes,
    output_shardings,
    relayout_bytes,
    with_memory,
    with_sharding,
)
from rlhf_jax.plan.phase import Pass, Phase
from rlhf_jax.recipe import Recipe
from rlhf_jax.rollout import check_positions
from rlhf_jax.sampling import check_learnable
from rlhf_jax.stages.batch_sizes import micro_batches
from rlhf_jax.stages.context import ModelKind
from rlhf_jax.stages.from_scratch import make_hf_config
from rlhf_jax.stages.models import copy_frozen
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.supervised import jit_reference, make_programs
from rlhf_jax.stages.table import STAGES, Stage, latest_export
from rlhf_jax.train_step import OffloadedUpdate, Params, TrainState


def decoder_configs(recipe: Recipe, parts: int) -> tuple[DecoderConfig, DecoderConfig]:
    """(actor, reward model and critic) from config.json alone: of the run's exports where they exist, else of what the
    configuration names (where that is not available, from `known_models.toml`).

    Args:
        parts: number of shards of the vocabulary.
    Raises:
        ValueError: a config.json that is not available, or of an unsupported architecture.
    """

    def export_config(kind: ModelKind) -> Mapping[str, Any] | None:
        folder = latest_export(kind, recipe.run)
        return read_json(folder / "config.json") if folder else None

    actor = export_config("policy")
    if actor is None and recipe.model.actor == "new":
        base = recipe.run.folder("base") / "config.json"
        new = recipe.model.new
        actor = read_json(base) if base.exists() else make_hf_config(new, new.vocab_size)
    actor = actor or find_config(recipe.model.actor)[0]
    reward = export_config("scorer")
    reward = reward or (actor if recipe.model.reward_from_policy else find_config(recipe.model.reward)[0])
    make = functools.partial(decoder_config, vocab_parts=parts)
    return make(actor, scalar_head=False), make(reward, scalar_head=True)


class SlotsProgram(NamedTuple):
    """The generation program with refilled decode slots, with the `lower` of a jitted function."""

    program: Any

    def lower(self, *args: Any) -> jax.stages.Lowered:
        return self.program.lower(*args, in_rows=True)


def phases(recipe: Recipe, mesh: Mesh | AbstractMesh, stages: Sequence[str] | None = None) -> list[Phase]:
    """Every program of these stages, or of all of the run, in the order in which they run.

    Raises:
        ValueError: no config.json, sizes that do not divide, or too few positions.
    """
    stages = recipe.run.stages if stages is None else stages
    found = _phases(recipe, mesh, stages)
    if isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].addressable_memories():
        return found
    # Shardings over compile-only devices lose their memory kind; those over an abstract mesh keep it.
    counted = _phases(recipe, mesh.abstract_mesh, stages)
    return [phase._replace(live=twin.live, host=twin.host) for phase, twin in zip(found, counted, strict=True)]


def _phases(recipe: Recipe, mesh: Mesh | AbstractMesh, stages: Sequence[str]) -> list[Phase]:
    actor, critic = decoder_configs(recipe, Layout(mesh, TRAIN).shards("vocab"))
    found, layout = [], recipe.layout(mesh)
    for stage in map(STAGES.__getitem__, stages):
        if stage.objective:
            found += _supervised_phases(stage, recipe, critic if stage.exports == "scorer" else actor, layout)
        else:
            found += _sampled_phases(stage, recipe, actor, critic, layout)
    return found


def _supervised_phases(stage: Stage, recipe: Recipe, decoder: DecoderConfig, layout: Layout) -> list[Phase]:
    """The update of a supervised stage, and the evaluation of held-out batches while the training state is resident."""
    name, model, config, spec = stage.name, recipe.model, getattr(recipe, stage.name), recipe.row_spec(stage.name)
    tx = make_optimizer(config.optim, config.optim.warmup_steps + 1)  # shapes do not depend on the length of the run
    length = _round8(spec.pack_length or min(recipe.data.max_length, decoder.max_positions))
    num_micro = micro_batches(name, config.batch_size, config.micro_batch_size, layout)
    objective = resolve_name(stage.objective)(model.with_lora(decoder), model.compute, layout, config)
    update, measure = make_programs(objective, model.with_lora(decoder), layout, tx, num_micro, model.scaling)
    state, frozen = abstract_state(abstract_pretrained(decoder, model, layout), model, tx)
    shape = (config.batch_size, *[spec.per_row] * (spec.per_row > 1), length)
    kinds = (jnp.int32, jnp.bool, jnp.bool, *[jnp.int32] * bool(spec.pack_length))
    # How many pairs a packed row holds is known only after tokenization; the arrays by pair are small.
    answers = (8, spec.per_row) if spec.pack_length else shape[1:-1]
    each_answer = jax.ShapeDtypeStruct((config.batch_size, *answers), jnp.float32)
    more = {"scores": each_answer} if spec.per_row > 1 else {}
    more |= {"reference": each_answer} if objective.reference else {}
    host_batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in kinds), **more)
    batch = abstract_batch(host_batch, layout)
    live = _state_bytes("", state, frozen) | {"batch": device_bytes(batch)}
    gradients = by_layout(state.trainable, model.with_lora(decoder), layout.gradients)
    params = state.params(frozen)
    measured = abstract_batch(_rows(batch, config.batch_size // num_micro), layout)
    rows = math.prod(measured.tokens.shape[:-1])
    cast = device_bytes([leaf for leaf in params.values() if getattr(leaf, "dtype", None) == "float32"]) // 2
    passes = (Pass(decoder, params, rows, length, length, cast),)
    whole = Phase(name, "update", update, (state, frozen, batch), live, passes=passes, micro=num_micro)
    found = _update_phases(whole, gradients)
    if objective.reference:  # before there is a training state
        start = abstract_pretrained(decoder, model, layout).params
        rows_at_once = dataclasses.replace(measured, reference=None)
        held = {"parameters": device_bytes(start), "batch": device_bytes(rows_at_once)}
        args = start, rows_at_once
        found.insert(0, Phase(name, "reference", jit_reference(objective), args, held, passes=passes))
    if config.eval_batches:  # by micro-batches
        at_hand = live | {"batch": device_bytes(measured)}
        found.append(Phase(name, "evaluate", measure, (params, measured), at_hand, passes=passes))
    return [phase._replace(host=host_bytes(state)) for phase in found]


def _update_phases(whole: Phase, gradients: Params) -> list[Phase]:
    """One optimizer step: one program, or with offloaded moments its two kinds of program, each at its largest.

    While the step of one parameter runs, all parameters are resident, the gradients not yet applied, its own included,
    and its own moments. Of gradients of s_1 <= s_2 <= ... bytes, step k has s_k + s_k+1 + ... and 2 s_k of moments, and
    under ZeRO-1 and -2 the gathered parameter before it replaces the old one; the phase has the worst k.
    Moments on the devices are its arguments; those in host memory are arguments of no program, so that the compiler
    counts none: peak = live + temporaries + outputs - aliased for both, as for any other phase.
    """
    found, update, state = [whole._replace(added=device_bytes(gradients))], whole.program, whole.args[0]
    if isinstance(update, OffloadedUpdate):
        arguments = [update.arguments(state, path) for path in update.order(state.trainable)]
        waiting = list(itertools.accumulate(device_bytes(grad) for _, grad, _, _ in reversed(arguments)))[::-1]
        moments = [device_bytes(moments) for _, _, moments, _ in arguments]
        is_gathered = update.layout.moments.table != update.layout.table
        gathered = [is_gathered * device_bytes(param) for param, _, _, _ in arguments]
        worst = max(range(len(arguments)), key=lambda k: waiting[k] + moments[k] + gathered[k])
        extra = whole.live | {"gradients": waiting[worst], "moments on the device": moments[worst]}
        found.append(Phase(whole.stage, f"{whole.name} step", update.step, arguments[worst], extra))
    return found


def _sampled_phases(
    stage: Stage, recipe: Recipe, actor: DecoderConfig, scorer: DecoderConfig, layout: Layout
) -> list[Phase]:
    config, model = getattr(recipe, stage.name), recipe.model
    check_learnable(config.sample)
    updates = 1 + max(getattr(config, name).warmup_steps for name in ("actor", "critic") if hasattr(config, name))
    optimizers = resolve_name(stage.sampled.optimizers)(config, updates)
    # Without a reward model a critic starts from the policy.
    scorer = scorer if config.model_weight is not None else dataclasses.replace(actor, scalar_head=True)
    # A reference of its own, such as a teacher.
    named = getattr(config, "reference", "")
    make = functools.partial(decoder_config, scalar_head=False, vocab_parts=layout.shards("vocab"))
    teachers = [make(find_config(each)[0]) for each in [named] if each]
    engine = resolve_name(stage.sampled.engine)(config, model, actor, scorer, optimizers, (0,), layout, *teachers)
    for each in filter(None, vars(engine.models).values()):
        check_positions(each, 1, config.sample.max_new_tokens)
    scorer = scorer if engine.models.reward or engine.models.critic else None

    def make_models(*loaded):
        return resolve_name(stage.sampled.models)(*loaded, config)

    state, frozen = abstract_models(make_models, actor, scorer, model, layout, optimizers)
    for teacher in teachers:
        copy = functools.partial(copy_frozen, dtype=model.frozen_dtype)
        params = by_layout(jax.eval_shape(copy, abstract_pretrained(teacher, model, layout).params), teacher, layout)
        memory = HOST_MEMORY if model.offload_reference else None
        frozen = dataclasses.replace(frozen, reference=with_memory(params, memory))
    return engine_phases(stage.name, engine, (state, frozen), recipe, layout)


def engine_phases(
    stage: str, engine: HybridEngine, models: tuple[EngineState, FrozenParams], recipe: Recipe, layout: Layout
) -> list[Phase]:
    """The programs of an engine in a stage that generates, by the keys that all sections of such stages have."""
    (state, frozen), config = models, getattr(recipe, stage)
    positions = min(each.max_positions for each in vars(engine.models).values() if each)
    held = _engine_bytes(state, frozen)
    rollout = _abstract_rollout(config, prompt_positions(recipe, config, positions), engine.publish.layout)
    found = _generation(stage, engine, recipe, state.actor.params(frozen.actor), held, rollout)
    found += _learning_from(stage, engine, models, held, rollout, recipe, layout)
    return [phase._replace(host=host_bytes(models)) for phase in found]


def _engine_bytes(state: EngineState, frozen: FrozenParams) -> dict[str, int]:
    """{name: bytes on one device} of the models of an engine between its programs."""
    # A reward model shares the parameters with the critic that neither trains.
    own = {path: leaf for path, leaf in frozen.reward.items() if path not in frozen.critic}
    held = _state_bytes("actor ", state.actor, frozen.actor)
    held |= _state_bytes("critic ", state.critic, frozen.critic) if state.critic else {}
    held |= {"reference": device_bytes(frozen.reference), "reward model": device_bytes(own)}
    return held | ({"moving average": device_bytes(state.average)} if state.average else {})


def _abstract_rollout(config: PPOConfig, prompt: int, layout: Layout) -> Rollout:
    rows, new = config.rollouts, config.sample.max_new_tokens
    prompts = [jax.ShapeDtypeStruct((rows, prompt), kind) for kind in (jnp.int32, jnp.bool)]
    answers = [jax.ShapeDtypeStruct((rows, new), kind) for kind in (jnp.int32, jnp.bool, jnp.float32)]
    ended, ends = (jax.ShapeDtypeStruct((rows,), kind) for kind in (jnp.bool, jnp.int32))
    return Rollout(*abstract_batch((*prompts, *answers, ended, answers[-1], ends), layout))


def _generation(
    stage: str, engine: HybridEngine, recipe: Recipe, params: Params, held: Mapping[str, int], rollout: Rollout
) -> list[Phase]:
    """Publishing the weights, and decoding all answers, at once or in refilled decode slots."""
    actor, layout, programs = engine.models.actor, engine.publish.layout, engine.programs
    weights = output_shardings(programs.publish.program, params)
    added = device_bytes(weights) + relayout_bytes(actor, params, layout)
    weights |= shared_inference_weights(actor, params, layout, with_sharding)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    prompts, generate = (rollout.prompts, rollout.prompt_mask), programs.generate
    config, length = getattr(recipe, stage), rollout.prompts.shape[1] + rollout.tokens.shape[1]
    rows = config.rollouts
    if 0 < config.generate_rows < rows:
        rows, generate = config.generate_rows, SlotsProgram(generate)
        prompts = tuple(with_sharding(x, everywhere) for x in prompts)
    key = with_sharding(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    dtype = recipe.model.compute.dtype
    cache = device_bytes(output_shardings(jax.jit(lambda: empty_cache(actor, rows, length, dtype, layout))))
    live = {**held, "generation weights": added, "prompts": device_bytes(prompts)}
    passes = (Pass(actor.without_lora(), weights, config.rollouts, rollout.prompts.shape[1], 1),)
    return [
        Phase(stage, "publish", programs.publish, (params,), dict(held), added=added, passes=passes),
        Phase(stage, "generate", generate, (weights, *prompts, key), live, cache=cache, added=cache, passes=passes),
    ]


def _learning_from(
    stage: str,
    engine: HybridEngine,
    models: tuple[EngineState, FrozenParams],
    held: Mapping[str, int],
    rollout: Rollout,
    recipe: Recipe,
    layout: Layout,
) -> list[Phase]:
    """Scoring, one optimizer step of each trained model, and one update of the moving average."""
    (state, frozen), programs, config = models, engine.programs, getattr(recipe, stage)
    # As the engine fetches from host memory: the whole reference to score, and the average one array at a time.
    fetched = dataclasses.replace(frozen, reference=with_memory(frozen.reference, None))
    ended = rollout.ended
    scores = None if engine.models.reward else jax.ShapeDtypeStruct(ended.shape, jnp.float32, sharding=ended.sharding)
    scored = dataclasses.replace(state, average={}), fetched, rollout, scores
    live = {**held, "rollout": device_bytes(rollout)}
    new, batch_size = rollout.tokens.shape[1], config.update_size
    micro = micro_batches(stage, batch_size, config.micro_batch_size, layout)
    passes = {
        name: Pass(
            getattr(engine.models, name).without_lora(),
            learner.params(getattr(frozen, name)),
            *(batch_size // micro, rollout.prompts.shape[1] + new, new),
            device_bytes(learner.trainable) // 2,
        )
        for name in ("actor", "critic")
        if (learner := getattr(state, name))
    }
    # The reference has the actor's architecture, and the reward model the critic's.
    by_actor = (config.old_logprobs == "score") + bool(engine.models.reference)
    critics = [each for name, each in passes.items() if name == "critic"]
    scoring, scorer = [*[passes["actor"]] * by_actor, *critics], engine.models.reward
    if scorer:
        own = passes["actor"]._replace(decoder=scorer, params=frozen.reward, cast=0)
        scoring.append(passes.get("critic", own))
    resident, count = live | {"reference": device_bytes(fetched.reference)}, micro * config.rollouts // batch_size
    score = Phase(stage, "score", programs.score, scored, resident, passes=tuple(scoring), micro=count)
    found, experience = [score], output_shardings(programs.score, *scored)
    part = abstract_batch(_rows(experience, batch_size), layout)
    live |= {"experience": device_bytes(experience)}
    if batch_size < config.rollouts:
        live |= {"part of the experience": device_bytes(part)}
    for name, each in passes.items():
        learner = getattr(state, name)
        args = learner, getattr(frozen, name), part
        if name == "actor" and hasattr(config, "texts") and config.texts.coef:
            texts = _abstract_texts(config, recipe.data.max_length, engine.models.actor.max_positions)
            args = *args[:2], abstract_batch(jax.eval_shape(with_texts, part, texts), layout)
            # Their tokens as rows of the rollouts' length, all of them with logits.
            more = -(-(config.texts.batch_size // micro) * texts.tokens.shape[1] // each.length)
            each = each._replace(rows=each.rows + more, head_tokens=each.length)
        whole = Phase(stage, name, getattr(programs, name), args, dict(live), passes=(each,), micro=micro)
        sums = by_layout(learner.trainable, getattr(engine.models, name), layout.gradients)
        found += _update_phases(whole._replace(runs=config.updates(1)), sums)
    if state.average:
        there = with_memory(state.average, None)
        largest = max(there, key=lambda path: device_bytes(there[path]))
        if host_bytes(state.average):
            live |= {"moving average": device_bytes(there[largest])}
        args = there[largest], state.actor.trainable[largest], jax.ShapeDtypeStruct((), jnp.bool_)
        found.append(Phase(stage, "average", programs.average, args, live))
    return found


def _abstract_texts(config: PPOConfig, max_length: int, positions: int) -> Batch:
    """The longest batch of texts of an update."""
    shape = (config.texts.batch_size, min(_round8(max_length), positions))
    return Batch(*(jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool, jnp.bool)))


def prompt_positions(recipe: Recipe, config: PPOConfig, max_positions: int) -> int:
    """P of the longest prompts that the configuration accepts, as `make_generate` truncates them."""
    longest = min(recipe.data.max_prompt_length, max_positions - config.sample.max_new_tokens)
    return min(_round8(longest), bucket_length(longest))


def _state_bytes(name: str, state: TrainState, frozen: Params) -> dict[str, int]:
    parts = {
        "frozen": frozen,
        "trainable": state.trainable,
        "optimizer": (state.step, state.opt_state, state.skips, state.scale),
    }
    return {f"{name}{part}": device_bytes(tree) for part, tree in parts.items()}


def _rows(tree: Any, count: int) -> Any:
    """The same arrays with `count` rows, without a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), tree)


def _round8(length: int) -> int:
    return -(-length // 8) * 8
