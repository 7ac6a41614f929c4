"""Values of the memory switches that are set to "auto": the fastest expected combination that fits, where temporaries
come from arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.hardware import GIB, GPUS, Machine
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.plan.abstract import abstract_mesh, device_bytes
from rlhf_jax.plan.phases import Pass, Phase, phases
from rlhf_jax.plan.roofline import iteration_seconds
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.models import ModelConfig


def temporary_bytes(recipe: Recipe, phase: Phase, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of temporaries on one device, without the sum of gradients, the cache and the weights in `phase.added`."""
    if not phase.passes:  # one parameter at a time
        return device_bytes(phase.args)
    layout, model, (first, *_) = Layout(mesh, TRAIN), recipe.model, phase.passes
    if phase.is_update:
        # Gradients of the current micro-batch are as large as their sum, `phase.added`.
        return phase.added + _update_bytes(model, first, layout.shards("batch"), is_actor=phase.name == "actor")
    if phase.name == "publish":
        return _publish_bytes(first.decoder, layout, model)
    if phase.name == "generate":
        slots, decoder = getattr(recipe, phase.stage).generate_rows, first.decoder
        tokens = (slots or first.rows) // (mesh.shape["data"] * mesh.shape["fsdp"]) * first.length
        inner = decoder.mlp_size // mesh.shape["tensor"] + 3 * decoder.hidden_size
        hidden = tokens * model.compute.dtype.itemsize * inner
        # All at once: keys and values of the prompts next to the cache that they are copied to, and hidden states.
        return hidden // 2 if slots else phase.cache * 3 // 4 + hidden
    passing = max(_forward_bytes(model, each, layout.shards("batch")) for each in phase.passes)
    return max(each.cast for each in phase.passes) + passing


def _layer_sizes(decoder: DecoderConfig) -> dict[str, int]:
    """{path: parameters in all layers}."""
    leaves = abstract_params(decoder)
    return {path: math.prod(leaf.shape) for path, leaf in leaves.items() if path.startswith("layers/")}


def _layer_size(decoder: DecoderConfig) -> int:
    return sum(_layer_sizes(decoder).values()) // decoder.num_layers


def _is_split(each: Pass) -> bool:
    return any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(each.params))


def _gathered_layer_bytes(model: ModelConfig, each: Pass) -> int:
    """Bytes of three gathered layers, of which two are in transfer, and the embedding; 0 where no weight is split."""
    if not _is_split(each):
        return 0
    embedding = each.decoder.padded_vocab * each.decoder.embed_size
    return model.compute.dtype.itemsize * (3 * _layer_size(each.decoder) + embedding)


def _forward_bytes(model: ModelConfig, each: Pass, count: int) -> int:
    """A forward pass that keeps no activations: one layer, or the logits of a chunk and their hidden states."""
    decoder, width, rows = each.decoder, model.compute.dtype.itemsize, each.rows // count
    hidden = rows * each.length * width * decoder.hidden_size
    wide = 4 if decoder.gated_mlp else 1 + (model.with_lora(decoder).lora.rank > 0)
    layer = rows * each.length * width * decoder.mlp_size * wide + 3 * hidden
    logits = 0 if decoder.scalar_head else 4 * rows * (model.logprob_chunk or each.length) * decoder.padded_vocab
    return _gathered_layer_bytes(model, each) + max(layer, logits + 2 * hidden)


def _update_bytes(model: ModelConfig, each: Pass, count: int, *, is_actor: bool) -> int:
    """Forward and backward pass of a micro-batch, without the gradients of the weights."""
    decoder, width, rows = each.decoder, model.compute.dtype.itemsize, each.rows // count
    wide = decoder.mlp_size * (1 + decoder.gated_mlp)
    heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    kept = decoder.hidden_size
    if model.remat != "layers":  # outputs of the products
        kept += heads + 2 * decoder.hidden_size + wide
    # Unstacked layers keep everything under "dots", see `models.unstacked.remat_layer`.
    if model.remat == "none" or (model.remat == "dots" and model.one_copy and is_actor):  # and what is between
        kept += 4 * decoder.hidden_size + heads + 2 * wide
    working = 6 * decoder.hidden_size + 3 * decoder.mlp_size * (1 + 2 * decoder.gated_mlp)
    logits = 0 if decoder.scalar_head else 3 * 4 * rows * (model.logprob_chunk or each.length) * decoder.padded_vocab
    # The gradient of a layer before it is scattered.
    scattered = 4 * _layer_size(decoder) if _is_split(each) and not model.with_lora(decoder).lora.rank else 0
    passes = rows * each.length * width * (decoder.num_layers * kept + working)
    return passes + logits + scattered + _gathered_layer_bytes(model, each)


def _publish_bytes(actor: DecoderConfig, layout: Layout, model: ModelConfig) -> int:
    """The largest stack of kernels in transfer: merged in float32, or cast, and gathered to its tensor shard."""
    if model.one_copy:
        return 0
    largest = max(size for path, size in _layer_sizes(actor).items() if path.endswith("kernel"))
    shards, tensor, width = layout.shards("vocab"), layout.mesh.shape["tensor"], model.compute.dtype.itemsize
    merged = largest * (4 * (1 + actor.gated_mlp) if model.lora.rank else width) // shards
    return merged + (largest * width // tensor if shards > tensor else 0)


# In the order in which they are tried if expected seconds are equal. ZeRO 0 holds more than 1 and is not faster.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "model.remat": ("none", "dots", "layers"),
    "mesh.zero": (1, 2, 3),
    "model.one_copy": (False, True),
    "model.offload_ema": (False, True),
    "model.offload_reference": (False, True),
    "model.offload_optimizer": (False, True),
}
# If the memory of the devices is not known.
FALLBACKS = {"model.remat": "layers", "mesh.zero": 3} | dict.fromkeys(list(SWITCHES)[2:], False)
UNLIMITED = 2**63
SAFETY_FACTOR = 1.15  # temporaries by arithmetic are off by at most this factor, where little else is resident


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
    """The switches that have no effect in this recipe.

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

    A switch without effect here, such as ZeRO without fsdp, has one value. Ties go to the earlier value of each switch.
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
    """Bytes on one device at the peak of these stages, by arithmetic: resident bytes, and temporaries times `trust`."""
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
    """(the recipe without "auto", a text per switch with its value and the reason).

    Args:
        usable: bytes on one device.
        need: bytes that a recipe needs, more than `usable` where it does not fit; called as rarely as possible.
    """
    auto = auto_switches(recipe)
    if not auto:
        return recipe, []
    needed: dict[Recipe, int] = {}

    def measured_need(candidate: Recipe) -> int:
        if candidate not in needed:
            try:
                # Resident bytes alone are a lower bound that needs no compilation.
                least = estimate_bytes(candidate, mesh, stages, trust=0.0)
                needed[candidate] = need(candidate) if least <= usable else least
            except ValueError:  # switches that exclude each other; `candidates` has raised all other errors
                needed[candidate] = UNLIMITED
        return needed[candidate]

    ordered = candidates(recipe, mesh, where, stages)
    chosen = next((each for each in ordered if measured_need(each) <= usable), None)
    if chosen is None:  # the nearest, so that the plan shows how much memory is missing
        chosen = min(ordered, key=needed.__getitem__)
    return chosen, [_reason(key, chosen, ordered, needed, usable) for key in auto]


def _reason(key: str, chosen: Recipe, ordered: list[Recipe], needed: dict[Recipe, int], usable: int) -> str:
    value, name = get_value(chosen, key), key.split(".")[1]
    text = f"{name} = {str(value).lower()}"
    if needed[chosen] > usable:
        return f"{text}: nothing fits {usable / GIB:.1f} GiB, this comes nearest with {needed[chosen] / GIB:.1f}"
    values = {get_value(each, key) for each in ordered}
    if len(values) == 1:
        return f"{text}: it would change nothing here"
    faster = [each for each in ordered[: ordered.index(chosen)] if get_value(each, key) != value]
    only = [each for each in faster if with_values(each, {key: value}) == chosen]
    if only:
        other = f"{name} = {str(get_value(only[-1], key)).lower()}"
        return f"{text}: {other} needs {needed[only[-1]] / GIB:.1f} GiB of {usable / GIB:.1f}"
    if faster:
        return f"{text}: what is faster with another value does not fit {usable / GIB:.1f} GiB"
    return f"{text}: the fastest, and {needed[chosen] / GIB:.1f} GiB of {usable / GIB:.1f} are needed"


def choose_by_arithmetic(
    recipe: Recipe, mesh: Mesh | AbstractMesh, where: Machine, stages: Sequence[str], usable: int
) -> tuple[Recipe, list[str]]:
    """`choose_switches` by arithmetic alone, without compiling."""
    return choose_switches(recipe, mesh, where, stages, usable, lambda each: estimate_bytes(each, mesh, stages))


def resolve_auto(recipe: Recipe, mesh: Mesh, limit: int | None, stages: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`choose_by_arithmetic` for the devices of a run.

    Args:
        limit: bytes that JAX may use on each device; None if unknown: FALLBACKS, with little memory and no offload.
    """
    auto = auto_switches(recipe)
    if auto and limit is not None and stages:
        kind = mesh.devices.flat[0].device_kind
        gpu = next((gpu for gpu in GPUS.values() if gpu.title == kind), GPUS["A100-80GB"])
        where, abstract = Machine(gpu, 1, mesh.size), abstract_mesh(recipe.mesh, mesh.size)
        return choose_by_arithmetic(recipe, abstract, where, stages, limit)
    why = "these devices do not report their memory" if limit is None else "nothing is left to train"
    reported = [f"{key.split('.')[1]} = {str(FALLBACKS[key]).lower()}: {why}" for key in auto]
    return with_values(recipe, {key: FALLBACKS[key] for key in auto}), reported
