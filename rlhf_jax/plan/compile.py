"""Memory of the compiled programs, for GPUs that need not be attached; JAX's CUDA plugin compiles them.

Compilation runs in a separate process (`python -m rlhf_jax.plan.compile`, a request as JSON on stdin, the answer on
stdout): the plugin needs environment variables before JAX is imported, and the caller may already hold devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from rlhf_jax.config import dump_config, parse_config
from rlhf_jax.hardware import COMPILE_OPTIONS, compile_only_devices
from rlhf_jax.mesh import TRAIN, Layout, make_mesh
from rlhf_jax.plan.phase import Phase
from rlhf_jax.plan.phases import phases
from rlhf_jax.recipe import Recipe


class Memory(NamedTuple):
    """Bytes on one device, as XLA reports them for a compiled program.

    Attributes:
        arguments: that the program reads; arguments that it does not use do not count.
        outputs: of which `aliased` reuse donated arguments.
        temporaries: activations, gradients, cache, and everything else allocated while it runs.
        cublas_only: compiled without Triton's matrix products, for some of which the compiler finds no tiles when it
            cannot time them; cuBLAS may need a little more workspace.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    cublas_only: bool = False

    def peak(self, phase: Phase) -> int:
        """Peak including everything resident besides the arguments."""
        return sum(phase.live.values()) + self.temporaries + self.outputs - self.aliased


def measure(phase: Phase) -> Memory:
    """Compile one program for the devices of its arguments, without running it."""
    lowered, cublas_only = phase.program.lower(*phase.args), False
    try:
        compiled = lowered.compile(COMPILE_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
        compiled, cublas_only = lowered.compile(COMPILE_OPTIONS | {"xla_gpu_enable_triton_gemm": False}), True
    stats = compiled.memory_analysis()
    sizes = (getattr(stats, f"{kind}_size_in_bytes") for kind in ("argument", "output", "alias", "temp"))
    return Memory(*sizes, cublas_only)


def measure_all(
    recipe: Recipe, mesh, stages: Sequence[str], usable: int, *, stop: bool = False, search: bool = True
) -> dict[str, Any]:
    """{"phases": {"stage/name": Memory}, "micro_batch": {stage: {"asked", "largest", "compilations"}}}.

    With `stop`, compilation ends with the first phase that does not fit `usable` bytes.

    With `search`, the largest micro-batch is found by bisection over those that divide the batch and the devices, each
    tried by compiling: the peak of a stage's updates grows with it. 0: not even the smallest fits.
    """
    memories, found = {}, {}
    for phase in phases(recipe, mesh, stages):
        memories[f"{phase.stage}/{phase.name}"] = phase, (memory := measure(phase))
        if stop and memory.peak(phase) > usable:
            search = False
            break
    for stage in stages if search else ():
        asked, legal = micro_batch_sizes(recipe, stage, Layout(mesh, TRAIN).shards("batch"))
        tried = {asked: all(m.peak(p) <= usable for p, m in memories.values() if p.stage == stage and p.is_update)}

        def fits(micro: int, stage=stage, tried=tried) -> bool:
            if micro not in tried:
                learning = [p for p in phases(with_micro_batch(recipe, stage, micro), mesh, (stage,)) if p.is_update]
                tried[micro] = all(measure(phase).peak(phase) <= usable for phase in learning)
            return tried[micro]

        low, high = (legal.index(asked) + 1, len(legal)) if tried[asked] else (0, legal.index(asked))
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fits(legal[middle]) else (low, middle)
        found[stage] = {"asked": asked, "largest": legal[low - 1] if low else 0, "compilations": len(tried)}
    return {"phases": {name: memory._asdict() for name, (_, memory) in memories.items()}, "micro_batch": found}


def micro_batch_sizes(recipe: Recipe, stage: str, shards: int) -> tuple[int, list[int]]:
    """(the configured micro-batch, all that divide the batch and are divisible by the devices, ascending)."""
    config = getattr(recipe, stage)
    batch = config.batch_size or config.rollouts
    return config.micro_batch_size or batch, [n for n in range(shards, batch + 1, shards) if batch % n == 0]


def with_micro_batch(recipe: Recipe, stage: str, micro: int) -> Recipe:
    """The recipe with the micro-batch of one stage replaced."""
    return dataclasses.replace(recipe, **{stage: dataclasses.replace(getattr(recipe, stage), micro_batch_size=micro)})


def measure_in_subprocess(
    recipe: Recipe, gpus: str, stages: Sequence[str], usable: int, *, stop: bool = False, search: bool = True
) -> dict[str, Any]:
    """`measure_all` in a separate process.

    Raises:
        RuntimeError: the compiler failed, with the last line of its output.
    """
    # If frames are hidden, the last line of a traceback is not the error.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"}
    environment["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # programs that are never run are not cached
    options = {"stages": list(stages), "usable": usable, "stop": stop, "search": search}
    request = json.dumps({"recipe": dump_config(recipe), "gpus": gpus, "options": options})
    command = [sys.executable, "-m", "rlhf_jax.plan.compile"]
    run = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    if run.returncode:
        said = run.stderr.strip().splitlines() or ["no word"]
        raise RuntimeError(f"compiling for {gpus} failed (exit code {run.returncode}): {said[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Entry point of the separate process."""
    request = json.load(sys.stdin)
    recipe = parse_config(Recipe, tomllib.loads(request["recipe"]), "the plan's request")
    mesh = make_mesh(recipe.mesh, compile_only_devices(request["gpus"]))
    print(json.dumps(measure_all(recipe, mesh, **request["options"])), flush=True)


if __name__ == "__main__":
    main()
