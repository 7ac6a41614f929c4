"""What the switches of memory that are set to "auto" stand for: of all that fits, what is expected to be fastest."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.hardware import GIB, GPUS, Machine
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import Leaf, abstract_params
from rlhf_jax.plan.abstract import abstract_mesh, device_bytes
from rlhf_jax.plan.phases import Phase, decoder_configs, phases, prompt_positions
from rlhf_jax.plan.roofline import iteration_seconds
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.ppo import ppo_sizes
from rlhf_jax.stages.table import STAGES


def temporary_bytes(recipe: Recipe, phase: Phase, mesh) -> int:
    """Bytes of temporaries on one device, without the sum of gradients, the cache and the weights in `phase.added`."""
    if phase.name.endswith(" step") or phase.name == "average":  # over one parameter after the other
        return device_bytes(phase.args)
    layout = Layout(mesh, TRAIN)
    actor, critic = decoder_configs(recipe, layout.shards("vocab"))
    width, count = recipe.model.compute.dtype.itemsize, layout.shards("batch")
    chunk = recipe.model.logprob_chunk
    if STAGES[phase.stage].objective:
        decoder = critic if STAGES[phase.stage].exports == "scorer" else actor
        batch = phase.args[-1]
        rows, length = math.prod(batch.tokens.shape[:-1]), batch.tokens.shape[-1]
        if phase.name == "evaluate":
            params = phase.args[0]
            float32 = [leaf for leaf in params.values() if getattr(leaf, "dtype", None) == "float32"]
            adapted, gathered = (
                recipe.model.with_lora(decoder).lora.rank > 0,
                _gathered_layer_bytes(decoder, params, width),
            )
            passing = _forward_bytes(decoder, rows // count, length, chunk, width, adapted)
            return device_bytes(float32) // 2 + gathered + passing
        config = getattr(recipe, phase.stage)
        rows = rows * (config.micro_batch_size or config.batch_size) // config.batch_size
        return _update_bytes(recipe, decoder, phase, rows // count, length, width)
    config = getattr(recipe, phase.stage)
    batch_size, micros = ppo_sizes(config, layout)
    prompt = prompt_positions(recipe, min(actor.max_positions, critic.max_positions))
    length, rows = prompt + config.sample.max_new_tokens, batch_size // micros // count
    if phase.name == "publish":
        return _publish_bytes(actor, layout, recipe, width)
    if phase.name == "generate":
        tokens = (config.generate_rows or config.rollouts) // (mesh.shape["data"] * mesh.shape["fsdp"]) * prompt
        hidden = tokens * width * (actor.mlp_size // mesh.shape["tensor"] + 3 * actor.hidden_size)
        # All at once: keys and values of the prompts beside the cache that they are put in, and what moves on the way.
        return hidden // 2 if config.generate_rows else phase.cache * 3 // 4 + hidden
    if phase.name == "score":
        state, frozen, *_ = phase.args
        trained = {"actor": actor, "critic": critic} if state.critic else {"actor": actor}
        casts = max(device_bytes(getattr(state, name).trainable) // 2 for name in trained)
        passes = (
            _gathered_layer_bytes(each, getattr(state, name).params(getattr(frozen, name)), width)
            + _forward_bytes(each, rows, length, chunk, width, recipe.model.with_lora(each).lora.rank > 0)
            for name, each in trained.items()
        )
        return casts + max(passes)
    decoder = actor if phase.name == "actor" else critic
    return _update_bytes(recipe, decoder, phase, rows, length, width)


def _layer(decoder: DecoderConfig) -> dict[str, Leaf]:
    return {path: leaf for path, leaf in abstract_params(decoder).items() if path.startswith("layers/")}


def _is_split(params: Mapping[str, Any]) -> bool:
    return any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(params))


def _gathered_layer_bytes(decoder: DecoderConfig, params: Mapping[str, Any], width: int) -> int:
    """Bytes of three layers, of which two are on their way, and the embedding; 0 where each device has all of them."""
    if not _is_split(params):
        return 0
    layer = sum(math.prod(leaf.shape[1:]) for leaf in _layer(decoder).values())
    return width * (3 * layer + decoder.padded_vocab * decoder.embed_size)


def _forward_bytes(decoder: DecoderConfig, rows: int, length: int, chunk: int, width: int, adapted: bool) -> int:
    """One pass that keeps nothing: a layer, or the logits of a chunk beside the states that they are of."""
    tokens = rows * length
    wide = 4 if decoder.gated_mlp else 1 + adapted
    layer = tokens * width * (decoder.mlp_size * wide + 3 * decoder.hidden_size)
    logits = 0 if decoder.scalar_head else 4 * rows * (chunk or length) * decoder.padded_vocab
    return max(layer, logits + 2 * tokens * width * decoder.hidden_size)


def _update_bytes(recipe: Recipe, decoder: DecoderConfig, phase: Phase, rows: int, length: int, width: int) -> int:
    params = phase.args[0].params(phase.args[1])
    tokens, wide = rows * length, decoder.mlp_size * (1 + decoder.gated_mlp)
    heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    kept = decoder.hidden_size
    # Layers of their own keep everything under "dots", see `models.unstacked.remat_layer`.
    all_kept = recipe.model.remat == "none" or (
        recipe.model.remat == "dots" and recipe.model.one_copy and phase.name == "actor"
    )
    if recipe.model.remat != "layers":  # outputs of the products
        kept += heads + 2 * decoder.hidden_size + wide
    if all_kept:  # what lies between them
        kept += 4 * decoder.hidden_size + heads + 2 * wide
    working = 6 * decoder.hidden_size + 3 * decoder.mlp_size * (1 + 2 * decoder.gated_mlp)
    chunk = recipe.model.logprob_chunk or length
    logits = 0 if decoder.scalar_head else 3 * 4 * rows * chunk * decoder.padded_vocab
    scattered = 0
    if _is_split(params) and not recipe.model.with_lora(decoder).lora.rank:  # a layer's gradient, whole
        scattered = 4 * sum(math.prod(leaf.shape[1:]) for leaf in _layer(decoder).values())
    passes = tokens * width * (decoder.num_layers * kept + working)
    # Gradients of the micro-batch at hand are as large as their sum, which `phase.added` is.
    return phase.added + passes + logits + scattered + _gathered_layer_bytes(decoder, params, width)


def _publish_bytes(actor: DecoderConfig, layout: Layout, recipe: Recipe, width: int) -> int:
    """The largest stack of kernels on its way: merged in float32, or cast, and gathered to its tensor-parallel part."""
    if recipe.model.one_copy:
        return 0
    largest = max(math.prod(leaf.shape) for path, leaf in _layer(actor).items() if path.endswith("kernel"))
    shards, tensor = layout.shards("vocab"), layout.mesh.shape["tensor"]
    merged = largest * (4 * (1 + actor.gated_mlp) if recipe.model.lora.rank else width) // shards
    return merged + (largest * width // tensor if shards > tensor else 0)


# In the order in which they are tried where nothing else decides. ZeRO 0 holds more than 1 and is not faster.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "model.remat": ("none", "dots", "layers"),
    "mesh.zero": (1, 2, 3),
    "model.one_copy": (False, True),
    "model.offload_ema": (False, True),
    "model.offload_reference": (False, True),
    "model.offload_optimizer": (False, True),
}
# Where nobody knows how much memory there is.
FALLBACKS = {"model.remat": "layers", "mesh.zero": 3} | dict.fromkeys(list(SWITCHES)[2:], False)
UNLIMITED = 2**63
SAFETY_FACTOR = 1.15  # temporaries by arithmetic are off by this much, or less, where there is little besides them


def get_value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with {"section.key": value} changed."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        changes.setdefault(section, {})[name] = value
    parts = {section: dataclasses.replace(getattr(recipe, section), **change) for section, change in changes.items()}
    return dataclasses.replace(recipe, **parts)


def auto_switches(recipe: Recipe) -> list[str]:
    """The switches that are set to "auto"."""
    return [key for key in SWITCHES if get_value(recipe, key) == "auto"]


def idle(recipe: Recipe, fsdp: int) -> set[str]:
    """The switches that change nothing in this recipe.

    Args:
        fsdp: size of that axis of the mesh.
    """
    useless = {
        "mesh.zero": fsdp == 1,
        "model.one_copy": not recipe.model.can_share,
        "model.offload_reference": recipe.model.lora.rank > 0,
        "model.offload_ema": not recipe.ppo.ema_decay,
    }
    return {key for key, is_useless in useless.items() if is_useless}


def candidates(recipe: Recipe, mesh: Mesh | AbstractMesh, where: Machine, stages: Sequence[str]) -> list[Recipe]:
    """The recipe with every combination of values of its automatic switches, the fastest first.

    A switch that changes nothing here, as ZeRO without fsdp, has one value. Ties go to what is nearest to the plain.
    """
    auto, useless = auto_switches(recipe), idle(recipe, mesh.shape["fsdp"])
    choices = [(FALLBACKS[key],) if key in useless else SWITCHES[key] for key in auto]
    combinations = [dict(zip(auto, values, strict=True)) for values in itertools.product(*choices)]
    found = phases(with_values(recipe, {key: FALLBACKS[key] for key in auto}), mesh, tuple(stages))

    def seconds(values: dict[str, Any]) -> float:
        return iteration_seconds(with_values(recipe, values), found, mesh, where)

    return [with_values(recipe, values) for values in sorted(combinations, key=seconds)]


def estimate_bytes(
    recipe: Recipe, mesh: Mesh | AbstractMesh, stages: Sequence[str], trust: float = SAFETY_FACTOR
) -> int:
    """Bytes on one device at the peak of these stages, by arithmetic: what is held, and temporaries times `trust`."""
    found = phases(recipe, mesh, tuple(stages))
    return max((phase.lower_bound + int(trust * temporary_bytes(recipe, phase, mesh)) for phase in found), default=0)


def choose_switches(
    recipe: Recipe,
    mesh: Mesh | AbstractMesh,
    where: Machine,
    stages: Sequence[str],
    usable: int,
    need: Callable[[Recipe], int],
) -> tuple[Recipe, list[str]]:
    """(the recipe without "auto", for each switch what it became and why).

    Args:
        usable: bytes on one device.
        need: bytes that a recipe takes, more than `usable` where it does not fit; asked as seldom as may be.
    """
    auto = auto_switches(recipe)
    if not auto:
        return recipe, []
    needed: dict[Recipe, int] = {}

    def measured_need(candidate: Recipe) -> int:
        if candidate not in needed:
            try:
                # What is held alone is a bound, and costs no compilation.
                least = estimate_bytes(candidate, mesh, stages, trust=0.0)
                needed[candidate] = need(candidate) if least <= usable else least
            except ValueError:  # switches that exclude each other; what is wrong without them `candidates` has raised
                needed[candidate] = UNLIMITED
        return needed[candidate]

    ordered = candidates(recipe, mesh, where, stages)
    chosen = next((each for each in ordered if measured_need(each) <= usable), None)
    fits = chosen is not None
    if chosen is None:  # what comes nearest, so that the plan tells what is lacking
        chosen = min(ordered, key=lambda each: needed[each])
    return chosen, [_reason(key, chosen, ordered, needed, usable, fits) for key in auto]


def _reason(key: str, chosen: Recipe, ordered: list[Recipe], needed: dict[Recipe, int], usable: int, fits: bool) -> str:
    value, name = get_value(chosen, key), key.split(".")[1]
    text = f"{name} = {str(value).lower()}"
    if not fits:
        return f"{text}: nothing fits {usable / GIB:.1f} GiB, this comes nearest with {needed[chosen] / GIB:.1f}"
    values = {get_value(each, key) for each in ordered}
    if len(values) == 1:
        return f"{text}: it would change nothing here"
    faster = [each for each in ordered[: ordered.index(chosen)] if get_value(each, key) != value]
    only = [each for each in faster if _differing_switches(each, chosen) == [key]]
    if only:
        other = only[-1]
        return (
            f"{text}: {name} = {str(get_value(other, key)).lower()} needs "
            f"{needed[other] / GIB:.1f} GiB of {usable / GIB:.1f}"
        )
    if faster:
        return f"{text}: what is faster with another value does not fit {usable / GIB:.1f} GiB"
    return f"{text}: the fastest, and {needed[chosen] / GIB:.1f} GiB of {usable / GIB:.1f} are needed"


def _differing_switches(one: Recipe, other: Recipe) -> list[str]:
    return [key for key in SWITCHES if get_value(one, key) != get_value(other, key)]


def choose_by_arithmetic(
    recipe: Recipe, mesh: Mesh | AbstractMesh, where: Machine, stages: Sequence[str], usable: int
) -> tuple[Recipe, list[str]]:
    """`choose_switches` by arithmetic alone, where there is no time to compile."""
    return choose_switches(recipe, mesh, where, stages, usable, lambda each: estimate_bytes(each, mesh, stages))


def resolve_auto(recipe: Recipe, mesh: Mesh, limit: int | None, stages: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`choose_by_arithmetic` for the devices of a run.

    Args:
        limit: bytes that JAX may use on each device; None, not known: what takes little memory and no offload.
    """
    auto = auto_switches(recipe)
    if auto and limit is not None and stages:
        kind = mesh.devices.flat[0].device_kind
        gpu = next((gpu for gpu in GPUS.values() if gpu.title == kind), GPUS["A100-80GB"])
        return choose_by_arithmetic(
            recipe, abstract_mesh(recipe.mesh, mesh.size), Machine(gpu, 1, mesh.size), stages, limit
        )
    why = "these devices do not tell their memory" if limit is None else "nothing is left to train"
    reported = [f"{key.split('.')[1]} = {str(FALLBACKS[key]).lower()}: {why}" for key in auto]
    return with_values(recipe, {key: FALLBACKS[key] for key in auto}), reported
