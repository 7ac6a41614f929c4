"""Values of the memory switches that are set to "auto": the fastest expected combination that fits, where temporaries
come from arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.hardware import GIB, GPUS, Machine
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.phases import phases
from rlhf_jax.plan.roofline import iteration_seconds
from rlhf_jax.plan.temporaries import PeakBounds, find_bounds
from rlhf_jax.recipe import Recipe

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
        "model.offload_ema": not any(getattr(getattr(recipe, name), "ema_decay", 0) for name in recipe.run.stages),
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


def largest_bounds(recipe: Recipe, mesh: Mesh | AbstractMesh, stages: Sequence[str]) -> PeakBounds:
    """The bounds of the peak of these stages on one device, by arithmetic."""
    each = [find_bounds(recipe, phase, mesh) for phase in phases(recipe, mesh, tuple(stages))]
    return PeakBounds(*(max(sizes, default=0) for sizes in zip(*each, strict=True))) if each else PeakBounds(0, 0)


def choose_switches(
    recipe: Recipe,
    mesh: Mesh | AbstractMesh,
    where: Machine,
    stages: Sequence[str],
    usable: int,
    need: Callable[[Recipe], int] | None = None,
) -> tuple[Recipe, list[str]]:
    """(the recipe without "auto", a text per switch with its value and the reason).

    Args:
        usable: bytes on one device.
        need: bytes that a recipe needs, more than `usable` where it does not fit; called as rarely as possible. None:
            the upper bound by arithmetic.
    """
    auto = auto_switches(recipe)
    if not auto:
        return recipe, []
    needed: dict[Recipe, int] = {}

    def measured_need(candidate: Recipe) -> int:
        if candidate not in needed:
            try:
                bounds = largest_bounds(candidate, mesh, stages)
                most = bounds.most if need is None or bounds.least > usable else need(candidate)
                needed[candidate] = bounds.least if bounds.least > usable else most
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
        return f"{text}: nothing surely fits {usable / GIB:.1f} GiB, this comes nearest with {needed[chosen] / GIB:.1f}"
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


def resolve_auto(recipe: Recipe, mesh: Mesh, limit: int | None, stages: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`choose_switches` by arithmetic for the devices of a run.

    Args:
        limit: bytes that JAX may use on each device; None if unknown: FALLBACKS, with little memory and no offload.
    """
    auto = auto_switches(recipe)
    if auto and limit is not None and stages:
        kind = mesh.devices.flat[0].device_kind
        gpu = next((gpu for gpu in GPUS.values() if gpu.title == kind), GPUS["A100-80GB"])
        where, abstract = Machine(gpu, 1, mesh.size), abstract_mesh(recipe.mesh, mesh.size)
        return choose_switches(recipe, abstract, where, stages, limit)
    why = "these devices do not report their memory" if limit is None else "nothing is left to train"
    reported = [f"{key.split('.')[1]} = {str(FALLBACKS[key]).lower()}: {why}" for key in auto]
    return with_values(recipe, {key: FALLBACKS[key] for key in auto}), reported
