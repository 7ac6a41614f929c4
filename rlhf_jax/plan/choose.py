"""What the switches of memory that are set to "auto" stand for: of all that fits, what is expected to be fastest."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.gpus import GIB, GPUS, Machine
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.held import phases
from rlhf_jax.plan.seconds import iteration_seconds
from rlhf_jax.plan.temporaries import estimate
from rlhf_jax.recipe import Recipe

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
UNKNOWN = {"model.remat": "layers", "mesh.zero": 3} | dict.fromkeys(list(SWITCHES)[2:], False)
NEVER = 2**63
TRUST = 1.15  # temporaries by arithmetic are off by this much, or less, where there is little besides them


def value_of(recipe: Recipe, key: str) -> Any:
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


def automatic(recipe: Recipe) -> list[str]:
    """The switches that are set to "auto"."""
    return [key for key in SWITCHES if value_of(recipe, key) == "auto"]


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
    auto, useless = automatic(recipe), idle(recipe, mesh.shape["fsdp"])
    choices = [(UNKNOWN[key],) if key in useless else SWITCHES[key] for key in auto]
    combinations = [dict(zip(auto, values, strict=True)) for values in itertools.product(*choices)]
    found = phases(with_values(recipe, {key: UNKNOWN[key] for key in auto}), mesh, tuple(stages))

    def seconds(values: dict[str, Any]) -> float:
        return iteration_seconds(with_values(recipe, values), found, mesh, where)

    return [with_values(recipe, values) for values in sorted(combinations, key=seconds)]


def quick_need(recipe: Recipe, mesh: Mesh | AbstractMesh, stages: Sequence[str], trust: float = TRUST) -> int:
    """Bytes on one device at the peak of these stages, by arithmetic: what is held, and temporaries times `trust`."""
    found = phases(recipe, mesh, tuple(stages))
    return max((phase.least + int(trust * estimate(recipe, phase, mesh)) for phase in found), default=0)


def choose(
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
    auto = automatic(recipe)
    if not auto:
        return recipe, []
    needed: dict[Recipe, int] = {}

    def asked(candidate: Recipe) -> int:
        if candidate not in needed:
            try:
                # What is held alone is a bound, and costs no compilation.
                least = quick_need(candidate, mesh, stages, trust=0.0)
                needed[candidate] = need(candidate) if least <= usable else least
            except ValueError:  # switches that exclude each other; what is wrong without them `candidates` has raised
                needed[candidate] = NEVER
        return needed[candidate]

    ordered = candidates(recipe, mesh, where, stages)
    chosen = next((each for each in ordered if asked(each) <= usable), None)
    fits = chosen is not None
    if chosen is None:  # what comes nearest, so that the plan tells what is lacking
        chosen = min(ordered, key=lambda each: needed[each])
    return chosen, [_told(key, chosen, ordered, needed, usable, fits) for key in auto]


def _told(key: str, chosen: Recipe, ordered: list[Recipe], needed: dict[Recipe, int], usable: int, fits: bool) -> str:
    value, name = value_of(chosen, key), key.split(".")[1]
    text = f"{name} = {str(value).lower()}"
    if not fits:
        return f"{text}: nothing fits {usable / GIB:.1f} GiB, this comes nearest with {needed[chosen] / GIB:.1f}"
    values = {value_of(each, key) for each in ordered}
    if len(values) == 1:
        return f"{text}: it would change nothing here"
    faster = [each for each in ordered[: ordered.index(chosen)] if value_of(each, key) != value]
    only = [each for each in faster if _differs_in(each, chosen) == [key]]
    if only:
        other = only[-1]
        return (
            f"{text}: {name} = {str(value_of(other, key)).lower()} needs "
            f"{needed[other] / GIB:.1f} GiB of {usable / GIB:.1f}"
        )
    if faster:
        return f"{text}: what is faster with another value does not fit {usable / GIB:.1f} GiB"
    return f"{text}: the fastest, and {needed[chosen] / GIB:.1f} GiB of {usable / GIB:.1f} are needed"


def _differs_in(one: Recipe, other: Recipe) -> list[str]:
    return [key for key in SWITCHES if value_of(one, key) != value_of(other, key)]


def settled(
    recipe: Recipe, mesh: Mesh | AbstractMesh, where: Machine, stages: Sequence[str], usable: int
) -> tuple[Recipe, list[str]]:
    """`choose` by arithmetic alone, where there is no time to compile."""
    return choose(recipe, mesh, where, stages, usable, lambda each: quick_need(each, mesh, stages))


def resolve(recipe: Recipe, mesh: Mesh, limit: int | None, stages: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`settled` for the devices of a run.

    Args:
        limit: bytes that JAX may use on each device; None, not known: what takes little memory and no offload.
    """
    auto = automatic(recipe)
    if auto and limit is not None and stages:
        kind = mesh.devices.flat[0].device_kind
        gpu = next((gpu for gpu in GPUS.values() if gpu.title == kind), GPUS["A100-80GB"])
        return settled(recipe, abstract_mesh(recipe.mesh, mesh.size), Machine(gpu, 1, mesh.size), stages, limit)
    why = "these devices do not tell their memory" if limit is None else "nothing is left to train"
    told = [f"{key.split('.')[1]} = {str(UNKNOWN[key]).lower()}: {why}" for key in auto]
    return with_values(recipe, {key: UNKNOWN[key] for key in auto}), told
