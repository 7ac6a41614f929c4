"""Temporaries of programs compiled for cards that are not attached: what the plan's estimate is calibrated against.

    python -m benchmarks.estimates [NAME ...]  # of files of configs/ without their suffix; default: all with hardware

Needs JAX's CUDA plugin, no GPU, no network. Nothing is run or timed.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.fit import CONFIGS, planned_configs
from benchmarks.provenance import record
from rlhf_jax.config import load_config
from rlhf_jax.hardware import compile_only_devices, parse_machine
from rlhf_jax.mesh import make_mesh
from rlhf_jax.plan import hardware_of_config
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.compile import measure
from rlhf_jax.plan.phases import phases
from rlhf_jax.recipe import Recipe

# Settings that change what is temporary, on one card and on eight.
VARIANTS = {
    "opt-1.3b-single_gpu": (
        ("model.remat=none",),
        ("model.remat=dots",),
        ("ppo.generate_rows=16",),
        ("model.logprob_chunk=0",),
        ("model.frozen_dtype=bfloat16", "model.one_copy=true"),
    ),
    "opt-1.3b-single_node": (
        ("model.remat=none",),
        ("model.remat=dots",),
        ("mesh.zero=1",),
        ("mesh.zero=2",),
        ("model.offload_optimizer=true",),
        ("mesh.tensor=1",),
        ("mesh.tensor=8",),
    ),
    "Qwen2.5-7B-single_gpu": (("model.remat=dots",), ("sft.pack_length=1024",), ("model.frozen_dtype=int8",)),
}


def compiled_temporaries(name: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """{phase: bytes on one device}: "least", what must be resident, and "compiled", the temporaries on top of it."""
    path = CONFIGS / f"{name}.toml"
    recipe, gpus = load_config(path, list(overrides), Recipe), hardware_of_config(path)
    plain = abstract_mesh(recipe.mesh, parse_machine(gpus).count)
    real = phases(recipe, make_mesh(recipe.mesh, compile_only_devices(gpus)))
    rows = {}
    for phase, compiled in zip(phases(recipe, plain), real, strict=True):
        rows[f"{phase.stage}/{phase.name}"] = {
            "least": phase.lower_bound,
            "compiled": measure(compiled).peak(compiled) - phase.lower_bound,
        }
    return {"config": name, "overrides": " ".join(overrides), "gpus": gpus, "phases": rows}


def main() -> int:
    for path in planned_configs():
        for overrides in ((), *VARIANTS.get(path.stem, ())):
            if not sys.argv[1:] or path.stem in sys.argv[1:]:
                record("estimates", compiled_temporaries(path.stem, overrides), "config", "overrides")
    return 0


if __name__ == "__main__":
    sys.exit(main())
