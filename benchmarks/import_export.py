"""Import and export of a random OPT-1.3B on eight simulated devices: peak memory, and speed against a plain copy.

    python -m benchmarks.import_export [FOLDER]

Makes the checkpoint, 2.6 GB of float16 in four files, in FOLDER (default: runs/opt-1.3b-random) unless it exists, and
needs twice as much additional disk space, which is freed. Linux only.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.provenance import record

HIDDEN, WIDTH, LAYERS, HEADS, VOCAB, POSITIONS = 2048, 8192, 24, 32, 50272, 2048
DEVICES = 8
TRIALS = 3  # the fastest is reported; memory is that of the first
WARM_BYTES = 6 * 10**9  # touched and freed first: pages new to a virtual machine are slow
CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "torch_dtype": "float16",
}


def main(folder: Path) -> None:
    if not (folder / "config.json").exists():
        make_checkpoint(folder)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        file.read_bytes()  # so that they are in the page cache
    for dtype in ("float32", "float16"):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "benchmarks.import_export", "--measure", str(folder), dtype]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        record("import_export", json.loads(ran.stdout.splitlines()[-1]), "dtype")


def make_checkpoint(folder: Path) -> None:
    """Writes six layers per file, with the embeddings in the first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    weight_map = {}
    per_file = LAYERS // 4
    for number in range(4):
        shapes = outer_shapes() if number == 0 else {}
        for layer in range(number * per_file, (number + 1) * per_file):
            shapes |= layer_shapes(f"model.decoder.layers.{layer}")
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        tensors = {name: (0.02 * rng.standard_normal(shape, np.float32)).astype("f2") for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))  # last: it marks the checkpoint as complete


def outer_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "model.decoder.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.decoder.embed_positions.weight": (POSITIONS + 2, HIDDEN),
        "model.decoder.final_layer_norm.weight": (HIDDEN,),
        "model.decoder.final_layer_norm.bias": (HIDDEN,),
    }


def layer_shapes(layer: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    linear = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "out")}
    for name, (outputs, inputs) in {**linear, "fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}.items():
        shapes |= {f"{layer}.{name}.weight": (outputs, inputs), f"{layer}.{name}.bias": (outputs,)}
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        shapes |= {f"{layer}.{name}.weight": (HIDDEN,), f"{layer}.{name}.bias": (HIDDEN,)}
    return shapes


class Watch(threading.Thread):
    """Measures the seconds of a call and its peak memory above that at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended = threading.Event()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.before = self.peak = memory("VmHWM", "RssAnon")

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.peak = tuple(map(max, self.peak, memory("VmHWM", "RssAnon")))

    def call(self, function: Callable[[], Any]) -> Any:
        self.start()
        start = time.perf_counter()
        result = function()
        self.seconds = time.perf_counter() - start
        self.ended.set()
        self.join()
        return result

    def peaks(self) -> tuple[int, ...]:
        """Peak bytes of resident memory (from the kernel) and of anonymous memory (sampled)."""
        return tuple(peak - before for peak, before in zip(self.peak, self.before, strict=True))


def memory(*names: str) -> tuple[int, ...]:
    """Bytes of this process for these names in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return tuple(found[name] for name in names)


def measure(folder: Path, dtype: str) -> None:
    import jax

    import rlhf_jax
    from rlhf_jax.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(fsdp=DEVICES))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(3)))  # loads the compiler, which is not part of the import
    np.ones(WARM_BYTES, np.uint8)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    out, copy = folder.with_name(f"{folder.name}.out"), folder.with_name(f"{folder.name}.copy")
    loading, saving, copying = [], [], []
    for trial in range(TRIALS):
        model = None  # frees the model of one trial before the next
        gc.collect()
        watch = Watch()
        model = watch.call(lambda: rlhf_jax.from_pretrained(folder, mesh=mesh, dtype=dtype))
        loading.append(watch.seconds)
        if trial == 0:
            held = sum(param.nbytes for param in model.params.values())
            resident, anonymous = watch.peaks()
        watch = Watch()
        watch.call(lambda model=model: rlhf_jax.save_pretrained(model, out, overwrite=True))
        saving.append(watch.seconds)
        if trial == 0:
            exporting, _ = watch.peaks()
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        start = time.perf_counter()
        copy.mkdir()
        for file in sorted(folder.glob("*.safetensors")):
            shutil.copyfile(file, copy / file.name)
        copying.append(time.perf_counter() - start)
        shutil.rmtree(copy)
    largest = VOCAB * HIDDEN * 2
    numbers = {"devices": held, "largest": largest, "resident": resident, "anonymous": anonymous}
    within = resident <= held + 1.5 * largest
    speeds = {"import": files / min(loading), "export": written / min(saving), "copy": files / min(copying)}
    print(json.dumps({"dtype": dtype, **numbers, "within": within, "exporting": exporting, **speeds}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), sys.argv[3])
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/opt-1.3b-random"))
