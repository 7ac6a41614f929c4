"""What `rlhf-jax plan` says of each configuration without JAX's CUDA plugin and without the hub, and in what time.

    python -m benchmarks.plan [NAME ...]  # of files of configs/ without their suffix; default: all with hardware

Run it where the plugin is not installed. Each plan is a process of its own, so importing counts.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.fit import CONFIGS, planned_configs
from benchmarks.provenance import RESULTS, record
from rlhf_jax.config import load_config
from rlhf_jax.hardware import cuda_plugin, parse_machine
from rlhf_jax.plan import hardware_of_config
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.phases import phases
from rlhf_jax.plan.temporaries import SMALL_BUFFERS, temporary_bytes
from rlhf_jax.recipe import Recipe


def plan_in_process(path: str) -> dict[str, Any]:
    """Verdict, exit code, bounds of the peak in bytes, wall and CPU seconds."""
    # A port where nothing listens, in place of the hub.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "rlhf_jax", "plan", path, "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    plan = json.loads(run.stdout)
    return {
        "verdict": plan["verdict"],
        "exit_code": run.returncode,
        "usable": plan["usable"],
        "bounds": [max(row[key] for row in plan["phases"]) for key in ("least", "peak")],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
    }


def over_estimate(compiled: list[dict[str, Any]]) -> dict[str, Any]:
    """Temporaries of compiled programs of one configuration, as shares of the plan's estimate, with their number.

    Programs with less than SMALL_BUFFERS are left out of the least share, and that much of all others is covered.
    """
    shares = []
    for result in compiled:
        recipe = load_config(CONFIGS / f"{result['config']}.toml", result["overrides"].split(), Recipe)
        mesh = abstract_mesh(recipe.mesh, parse_machine(result["gpus"]).count)
        for phase in phases(recipe, mesh):
            measured = result["phases"][f"{phase.stage}/{phase.name}"]["compiled"]
            if measured > SMALL_BUFFERS:
                shares.append((measured - SMALL_BUFFERS) / temporary_bytes(recipe, phase, mesh))
    programs = sum(len(result["phases"]) for result in compiled)
    return {"programs": programs, "least_share": min(shares, default=None), "largest_share": max(shares, default=None)}


def main() -> int:
    if name := cuda_plugin():
        sys.exit(f"{name} is installed: run this where it is not")
    compiled = [run["result"] for run in json.loads((RESULTS / "estimates.json").read_text(encoding="utf-8"))]
    for path in planned_configs():
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            own = [result for result in compiled if result["config"] == path.stem]
            (peak,) = re.findall(r"^# Plan: peak ([\d.]+) GiB", path.read_text(encoding="utf-8"), re.MULTILINE)
            known = {"config": path.stem, "card": hardware_of_config(path), "compiled": float(peak)}
            record("plan", known | over_estimate(own) | plan_in_process(str(path)), "config")
    return 0


if __name__ == "__main__":
    sys.exit(main())
