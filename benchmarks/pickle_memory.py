"""Peak memory of reading a random OPT-1.3B that is only a pickle, as old repositories of the hub are, on one device.

    python -m benchmarks.pickle_memory [FOLDER]

Makes the checkpoint, one pytorch_model.bin of 2.6 GB of float16, in FOLDER (default: runs/opt-1.3b-pickle) unless it
exists, for which torch must be installed. Linux only.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.import_export import CONFIG, LAYERS, layer_shapes, memory, outer_shapes
from benchmarks.provenance import record

SHAPES = outer_shapes()
for layer in range(LAYERS):
    SHAPES |= layer_shapes(f"model.decoder.layers.{layer}")


def main(folder: Path) -> None:
    if not (folder / "config.json").exists():
        make_checkpoint(folder)
    results = []
    for dtype in ("float16", "float32"):
        command = [sys.executable, "-m", "benchmarks.pickle_memory", "--measure", str(folder), dtype]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        results.append(json.loads(ran.stdout.splitlines()[-1]))
    for result in results:
        print(result)
        record("pickle_memory", result, "dtype")


def make_checkpoint(folder: Path) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {
        name: torch.from_numpy((0.02 * rng.standard_normal(shape, np.float32)).astype("f2"))
        for name, shape in SHAPES.items()
    }
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))  # last: it marks the checkpoint as complete


def measure(folder: Path, dtype: str) -> dict:
    """Bytes of the parameters and of the largest tensor in this dtype, and of what reading adds to resident memory."""
    import jax

    from rlhf_jax.models.pretrained import from_pretrained

    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # the libraries and their threads are loaded
    (before,) = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    model = from_pretrained(folder, dtype=dtype)
    peak = memory("VmHWM")[0] - before
    size = np.dtype(dtype).itemsize
    parameters = sum(array.nbytes for array in model.params.values())
    largest = max(math.prod(shape) for shape in SHAPES.values()) * size
    return {
        "dtype": dtype,
        "parameter_bytes": parameters,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "largest_tensors_above_parameters": round((peak - parameters) / largest, 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        main(Path(sys.argv[1] if sys.argv[1:] else "runs/opt-1.3b-pickle"))
