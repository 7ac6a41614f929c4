"""Memory, time and cost of a run before anything is allocated: `rlhf-jax plan`, and the check before `train`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.hardware import GIB, GPUS, Machine, compile_obstacle, parse_machine
from rlhf_jax.mesh import check_within_nodes
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.plan.abstract import abstract_mesh, find_config
from rlhf_jax.plan.auto import SWITCHES, choose_switches, get_value, idle, with_values
from rlhf_jax.plan.compile import Memory, measure_in_subprocess
from rlhf_jax.plan.phase import Phase
from rlhf_jax.plan.phases import phases
from rlhf_jax.plan.roofline import assumptions, estimate_times, token_rates
from rlhf_jax.plan.temporaries import ESTIMATE_ERROR, PeakBounds, find_bounds, largest_micro_batches
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.context import ModelKind
from rlhf_jax.stages.table import latest_export

USABLE_SHARE = 0.95  # of a GPU's memory, for JAX under XLA_CLIENT_MEM_FRACTION=0.95; the rest is CUDA's own
MAX_DEVICES = 4096
ADAPTERS = {
    "model.lora": "LoRA for the actor (model.lora.rank=128)",
    "model.reward_lora": "LoRA for reward model and critic (model.reward_lora.rank=128)",
}


def make_plan(
    recipe: Recipe, gpus: str, price: float = 0.0, stages: Sequence[str] | None = None, *, search: bool = True
) -> dict[str, Any]:
    """Memory of each phase on one of these GPUs, whether it fits, and how long it takes, as plain values for JSON.

    Args:
        gpus: machine description, see `hardware.parse_machine`.
        price: of one GPU for an hour, in any currency.
        stages: stages of the run; None: all.
        search: also search for the largest micro-batch of each stage, which takes a few more compilations.
    Returns:
        Bytes on one GPU. "fits" is True, False, or None where nothing can be compiled for these GPUs and the bounds by
        arithmetic leave it open; "peak" of a phase is then its upper bound, and "least" its lower one.
    Raises:
        ValueError: unknown GPUs, no config.json, sizes that do not divide the devices, too few positions, or a tensor
            axis across nodes without `mesh.tensor_across_nodes`.
        RuntimeError: the compiler failed.
    """
    wanted, stages = parse_machine(gpus), recipe.run.stages if stages is None else tuple(stages)
    mesh, usable = abstract_mesh(recipe.mesh, wanted.count), int(USABLE_SHARE * wanted.gpu.memory)
    if not recipe.mesh.tensor_across_nodes:
        check_within_nodes(np.arange(wanted.count).reshape(mesh.axis_sizes) // wanted.per_node)
    compiled: dict[Recipe, dict[str, Any]] = {}

    def need(candidate: Recipe) -> int:
        """The largest peak of the compiled phases: all, or up to the first that does not fit."""
        compiled[candidate] = measure_in_subprocess(candidate, gpus, stages, usable, stop=True, search=search)
        memories = compiled[candidate]["phases"]
        named = {f"{phase.stage}/{phase.name}": phase for phase in phases(candidate, mesh, stages)}
        return max(Memory(**memories[name]).peak(named[name]) for name in memories)

    obstacle = compile_obstacle(wanted.gpu)
    recipe, chosen = choose_switches(recipe, mesh, wanted, stages, usable, None if obstacle else need)
    found = phases(recipe, mesh, stages)
    seconds = estimate_times(recipe, found, mesh, wanted, price)
    if obstacle:
        table = [bounds_entry(phase, find_bounds(recipe, phase, mesh), usable) for phase in found]
        micro = largest_micro_batches(recipe, found, mesh, usable) if search else {}
    else:
        measured = compiled.get(recipe)
        if measured is None or len(measured["phases"]) < len(found):
            measured = measure_in_subprocess(recipe, gpus, stages, usable, search=search)
        memories = [Memory(**measured["phases"][f"{phase.stage}/{phase.name}"]) for phase in found]
        table = [phase_entry(phase, memory, usable) for phase, memory in zip(found, memories, strict=True)]
        micro = measured["micro_batch"]
    costs = [entry["cost"] for entry in seconds.values()]
    # False only by what must be resident, or by the compiler.
    fits = all(row["headroom"] >= 0 for row in table) or (
        None if all(row["least"] <= usable for row in table) else False
    )
    return {
        "gpus": gpus,
        "mesh": dict(mesh.shape),
        "memory": wanted.gpu.memory,
        "usable": usable,
        "compiled_for": None if obstacle else wanted.gpu.name,
        "phases": table,
        "fits": fits,
        "verdict": verdict(fits, table),
        "chosen": chosen,
        "candidates_compiled": len(compiled),
        "suggestions": [] if fits else list(suggestions(recipe, wanted.count, usable, stages, micro)),
        "micro_batch": micro,
        "seconds": seconds,
        "price_per_gpu_hour": price or None,
        "cost": sum(costs) if None not in costs else None,
        "assumptions": assumptions(recipe),
        "notes": _notes(recipe, wanted, obstacle),
    }


def local_gpus(default: str = "") -> str:
    """The GPUs of this machine in the notation of `hardware.parse_machine`; `default` if it has no known GPU.

    Raises:
        ValueError: no known GPU, and no default.
    """
    devices = jax.devices()
    known = [f"{len(devices)}x{gpu.name}" for gpu in GPUS.values() if gpu.title == devices[0].device_kind]
    if not (known or default):
        raise ValueError(
            f"this machine has {len(devices)} x {devices[0].device_kind}, which is not a GPU that plans know: "
            f"name the machine to plan, --gpus 8xNAME with one of {', '.join(GPUS)}"
        )
    return known[0] if known else default


def token_limits(recipe: Recipe, mesh: Mesh) -> dict[str, float]:
    """{stage: tokens per second that no run on these GPUs exceeds, for rows of full length}; {} for unknown ones."""
    known = [gpu for gpu in GPUS.values() if gpu.title == mesh.devices.flat[0].device_kind]
    if not known:
        return {}
    # As of one node, whose links are the faster ones: a limit for several nodes too.
    found = phases(recipe, mesh, recipe.run.stages)
    return token_rates(recipe, found, mesh, Machine(known[0], 1, mesh.size))


def hardware_of_config(path: str | Path) -> str:
    """The machine of a configuration, from its header's line "# Hardware: 8xA100-80GB"; "" without one."""
    found = re.search(r"^# Hardware: (\S+)$", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def verdict(fits: bool | None, table: Sequence[Mapping[str, Any]]) -> str:
    """What the plan says first; without the compiler, a doubt with its bounds."""
    if fits is not None:
        return "fits" if fits else "does not fit"
    least, most = (max(row[key] for row in table) / GIB for key in ("least", "peak"))
    return f"cannot tell without the plugin: between {least:.1f} and {most:.1f} GiB"


def bounds_entry(phase: Phase, bounds: PeakBounds, usable: int) -> dict[str, Any]:
    """One row of a plan without a compiler, in bytes on one GPU."""
    held = sum(phase.live.values())
    return _entry(phase, held, {"temporaries": bounds.most - held}, bounds, usable)


def phase_entry(phase: Phase, memory: Memory, usable: int) -> dict[str, Any]:
    """One row of a compiled plan, in bytes on one GPU."""
    peak, held = memory.peak(phase), sum(phase.live.values()) - memory.arguments
    return _entry(phase, held, memory._asdict(), PeakBounds(peak, peak), usable)


def _entry(phase: Phase, resident: int, parts: Mapping[str, int], peak: PeakBounds, usable: int) -> dict[str, Any]:
    named = {"stage": phase.stage, "phase": phase.name, "live": phase.live, "resident": resident, **parts}
    named |= {"cache": phase.cache, "host": phase.host}
    return named | {"least": peak.least, "peak": peak.most, "headroom": usable - peak.most}


def _notes(recipe: Recipe, wanted: Machine, obstacle: str = "") -> list[str]:
    fraction = f"run with XLA_CLIENT_MEM_FRACTION={USABLE_SHARE} (JAX's default takes 75%)"
    notes = [f"usable is {USABLE_SHARE:.0%} of the memory: {fraction}"]
    if obstacle:
        error = f"of which compiled programs had at most {ESTIMATE_ERROR:.0%} more (docs/memory.md)"
        notes.append(f"{obstacle}. Without it peaks have bounds: what must be resident, and temporaries, {error}")
    notes.append("lengths are the configuration's limits; shorter data needs less")
    named: dict[ModelKind, str] = {} if recipe.model.actor == "new" else {"policy": recipe.model.actor}
    named |= {} if recipe.model.reward_from_policy else {"scorer": recipe.model.reward}
    for kind, name in named.items():
        if not latest_export(kind, recipe.run) and find_config(name)[1]:
            notes.append(f"config.json of {name} from the plan's own table of known models")
    if wanted.gpu.capability < "8.0" and recipe.model.dtype == "bfloat16":
        fix = 'model.dtype="float16", which scales the loss, computes eight times as fast'
        notes.append(f"{wanted.gpu.name} has no bfloat16 unit: speeds are those of float32; {fix}")
    return notes


def lower_bound_bytes(recipe: Recipe, mesh: Mesh | AbstractMesh, stages: Sequence[str]) -> tuple[int, str]:
    """(bytes on one device, the phase that needs them) below which these stages cannot run, by arithmetic alone."""
    found = phases(recipe, mesh, tuple(stages))
    return max(((phase.lower_bound, f"{phase.stage}/{phase.name}") for phase in found), default=(0, ""))


def device_limit(mesh: Mesh) -> int | None:
    """Bytes that JAX may use on each device of the mesh; None where they do not report it, such as CPUs."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    limits = [each["bytes_limit"] for each in stats if "bytes_limit" in each]
    return min(limits) if len(limits) == len(stats) else None


def check_fits(recipe: Recipe, mesh: Mesh, limit: int, stages: Sequence[str]) -> None:
    """Raise for a run that cannot fit before anything is loaded, by arithmetic alone.

    Args:
        limit: bytes that JAX may use on each device.
    Raises:
        ValueError: the models, caches and gradients alone are larger; the message names changes that make it fit.
    """
    needed, where = lower_bound_bytes(recipe, mesh, stages)
    if needed > limit:
        fix = "; or ".join(suggestions(recipe, mesh.size, limit, stages, {}))
        raise ValueError(
            f"{where} holds at least {needed / GIB:.2f} GiB on each of {mesh.size} device(s), and {limit / GIB:.2f} "
            f"GiB may be used: {fix}; see `rlhf-jax plan` for details"
        )


def suggestions(
    recipe: Recipe, count: int, usable: int, stages: Sequence[str], micro_batch: dict[str, dict[str, int]]
) -> Iterator[str]:
    """Changes of the configuration or machine that each would make a run fit, the cheapest first.

    By the arithmetic of `lower_bound_bytes`, so "try": temporaries come on top. Micro-batches are as compiled.
    """
    largest = {stage: found["largest"] for stage, found in micro_batch.items() if found["largest"] < found["asked"]}
    if small := [f"{stage}.micro_batch_size={size}" for stage, size in largest.items() if size]:
        yield f"set {' '.join(small)}"

    def is_enough(change: dict[str, Any], devices: int = count) -> bool:
        try:
            changed = with_values(recipe, change)
            return lower_bound_bytes(changed, abstract_mesh(changed.mesh, devices), stages)[0] <= usable
        # Sizes that the devices do not divide, a quantised base without adapters, one copy without a base to share.
        except ValueError:
            return False

    if is_enough({}):
        yield "resident arrays fit and temporaries do not: try smaller batches, shorter lengths or model.remat=layers"
        return

    def first(changes: Iterable[dict[str, Any]]) -> list[str]:
        """The first sufficient change, as a text; [] without one."""
        change = next(filter(is_enough, filter(None, changes)), {})
        named = [ADAPTERS.get(key, f"{key}={str(value).lower()}") for key, value in change.items()]
        return [f"try {' and '.join(named)}"] if named else []

    model, useless = recipe.model, idle(recipe, count)
    flags = [key for key, values in SWITCHES.items() if values == (False, True)]
    free = [key for key in flags if key not in useless and not get_value(recipe, key)]
    together = [free[:size] for size in range(2, len(free) + 1)]
    yield from first(dict.fromkeys(keys, True) for keys in [*([key] for key in free), *together])

    adapters = LoraConfig(rank=128, alpha=128.0)
    lora = {} if model.lora.rank else {"model.lora": adapters}
    both = lora | ({} if model.reward_lora.rank else {"model.reward_lora": adapters})
    bf16 = {"model.frozen_dtype": "bfloat16"} if model.frozen_dtype == "float32" else {}
    smaller = first([bf16, lora, bf16 | lora, bf16 | both])
    if not smaller and model.frozen_dtype != "nf4":
        nf4 = {"model.frozen_dtype": "nf4"}
        every = both | nf4 | dict.fromkeys([*free, "model.one_copy"], True)
        smaller = first([nf4, lora | nf4, both | nf4, every])
    yield from smaller
    more = itertools.takewhile(lambda size: size < 2 * MAX_DEVICES, (count * 2**power for power in itertools.count(1)))
    enough = next((size for size in more if is_enough({}, size)), None)
    larger = f"take {enough} devices in place of {count}, with batches that they divide"
    yield larger if enough else "take a smaller model"
