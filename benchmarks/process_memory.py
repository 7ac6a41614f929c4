"""Peak memory of each of two processes that import a random OPT-1.3B in four files, on two simulated devices each.

    python -m benchmarks.process_memory [FOLDER]

Makes the checkpoint as benchmarks.import_export does, in FOLDER (default: runs/opt-1.3b-random) unless it exists. Linux
only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.import_export import HIDDEN, VOCAB, make_checkpoint, memory
from benchmarks.provenance import record

PROCESSES, DEVICES = 2, 2


def main(folder: Path) -> None:
    if not (folder / "config.json").exists():
        make_checkpoint(folder)
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    measure = [sys.executable, "-m", "benchmarks.process_memory", "--measure", str(folder)]
    command = ["scripts/launch_local.sh", str(PROCESSES), *measure]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    for result in sorted((json.loads(line) for line in ran.stdout.splitlines() if line[:1] == "{"), key=str):
        print(result)
        record("process_memory", result, "process")


def measure(folder: Path) -> dict:
    """Bytes of this process's shards and of the largest tensor, in float32, and what importing adds to its memory."""
    import jax

    import rlhf_jax
    from rlhf_jax import hosts
    from rlhf_jax.mesh import MeshConfig, make_mesh

    hosts.start()
    mesh = make_mesh(MeshConfig())
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(1) + 1)())  # the libraries and their threads are loaded
    hosts.barrier()
    (before,) = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    model = rlhf_jax.from_pretrained(folder, mesh=mesh)
    peak = memory("VmHWM")[0] - before
    shards = sum(shard.data.nbytes for param in model.params.values() for shard in param.addressable_shards)
    largest = VOCAB * HIDDEN * 4
    return {
        "process": hosts.index(),
        "parameter_bytes": sum(param.nbytes for param in model.params.values()),
        "shard_bytes": shards,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "largest_tensors_above_shards": round((peak - shards) / largest, 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))), flush=True)
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/opt-1.3b-random"))
