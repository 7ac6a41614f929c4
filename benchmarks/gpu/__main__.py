"""Run all parts, each in separate processes with a time limit, and write the two result files.

    python -m benchmarks.gpu [--small]

A part that fails or exceeds its limit is reported as failed, with its error and its measurements up to then.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.gpu.table import render
from benchmarks.provenance import RESULTS, commit, record

# Without a GPU the same tests run with XLA's attention in place of cuDNN's.
TESTS = ["-m", "pytest", "tests/test_on_gpu.py", "tests/test_attention.py", "-v", "--tb=short", "-W", "default"]
OUTCOMES = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
TOGETHER = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # allocate on demand: these parts share the GPU
ALONE = {"XLA_CLIENT_MEM_FRACTION": "0.9"}
# Name, size, and keys of the configuration, of the steps of supervised fine-tuning.
ADAPTERS = ("model.lora.rank=16", "model.lora.alpha=32", "sft.micro_batch_size=2")
TRAINING = (("training", "opt-1.3b", ()), ("training adapters", "qwen3-8b", ADAPTERS))
PEERS_LIMIT = 2400  # environments are installed first
IDENTITY = """
import json, jax
device, stats = jax.devices()[0], jax.devices()[0].memory_stats() or {}
print(json.dumps({
    "device": device.device_kind, "backend": jax.default_backend(), "count": jax.device_count(),
    "capability": str(getattr(device, "compute_capability", "")), "platform": device.client.platform_version,
    "memory": stats.get("bytes_limit"),
}))
"""


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        arguments: for Python.
        environment: additional variables.
        out: the file with its results; "": they are the lines of JSON that it prints.
    """

    name: str
    arguments: list[str]
    environment: dict[str, str]
    out: str = ""


def main(arguments: list[str]) -> int:
    small = ["--small"] if "--small" in arguments else []
    began, who = time.monotonic(), identity()
    limits = (1500, *[600] * 4) if small else (225, 160, 140, 240, 400)  # a small run may use a slow CPU
    if who["backend"] != "gpu" and not small:
        sys.exit(f"this machine's JAX sees no GPU ({who['backend']}): try the script at toy size with --small")
    with tempfile.TemporaryDirectory() as folder:

        def gpu_part(module: str, environment: dict[str, str], *more: str) -> Part:
            name = " ".join((module, *more))
            out = str(Path(folder) / f"{module}{'-'.join(more)}.json")
            return Part(name, ["-m", f"benchmarks.gpu.{module}", out, *small, *more], environment, out)

        on_gpu = ["-m", "gpu"] if who["backend"] == "gpu" else ["-m", "not gpu", "-k", "on_gpu"]
        parity = Part("parity", [*TESTS, "-p", "no:cacheprovider", *on_gpu], TOGETHER)
        memory = [gpu_part("memory", TOGETHER, name) for name in ("125m-whole", "350m-lora", "1.3b-lora")]
        # Timed parts have the GPU to themselves; the others share it, because they mostly compile.
        parts = run_together([parity, *memory], limits[0], folder)
        parts |= run_together([gpu_part("decode", ALONE)], limits[1], folder)
        parts |= run_together([gpu_part("phases", ALONE)], limits[2], folder)
        for (name, size, overrides), limit in zip(TRAINING, limits[3:], strict=True):
            sizes = ["--size", "toy" if small else size, "--dtype", "bfloat16"]
            part = Part(name, ["-m", "benchmarks.train_step", *sizes, *overrides], ALONE)
            parts |= run_together([part], limit, folder)
        if not small:  # installs torch
            parts |= run_together([Part("peers", ["-m", "benchmarks.compare"], ALONE)], PEERS_LIMIT, folder)
    result = who | {"small": bool(small), "seconds": round(time.monotonic() - began, 1), "parts": parts}
    text = render(result)
    slug = re.sub(r"[^a-z0-9]+", "-", who["device"].lower()).strip("-")
    stem = f"{slug}{'-small' if small else ''}-{who['date']}"
    record(stem, result, machine=f"{who['count']} x {who['device']}")
    (RESULTS / f"{stem}.md").write_text(text)
    print(text)
    return int(any(part["error"] for part in parts.values()))


def identity() -> dict:
    """The device and the versions of the software."""
    run = subprocess.run([sys.executable, "-c", IDENTITY], capture_output=True, text=True, env=environment(TOGETHER))
    if run.returncode:
        sys.exit(f"JAX does not start: {(run.stderr.strip().splitlines() or ['no word'])[-1]}")
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {
        **json.loads(run.stdout.splitlines()[-1]),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **packages},
        "commit": commit(),
    }


def environment(more: dict[str, str]) -> dict[str, str]:
    """The environment without a compile cache: cached programs report no memory, and compilation is to be timed."""
    return {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | more


def run_together(parts: list[Part], limit: float, folder: str) -> dict[str, dict]:
    """Starts the parts together and ends them after `limit` seconds; {name: {"seconds", "error", "result", "log"}}."""
    began, running = time.monotonic(), {}
    for part in parts:
        print(f"{part.name}: at most {limit:.0f} s", flush=True)
        log = Path(folder) / f"{part.name.replace(' ', '-')}.log"
        with log.open("w") as stream:
            options = dict(stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
            command = [sys.executable, *part.arguments]
            running[part.name] = part, log, subprocess.Popen(command, env=environment(part.environment), **options)
    done = {}
    try:
        for name, (part, log, process) in running.items():
            late = wait_or_kill(process, max(0.1, began + limit - time.monotonic()))
            seconds, said = round(time.monotonic() - began, 1), log.read_text(errors="replace")
            result = outcome(part, said)
            error = f"ended after {limit:.0f} s; what it had measured by then is kept" if late else ""
            error = error or complaint(part, process.returncode, result, said)
            print(f"{name}: {error or 'done'}", flush=True)
            done[name] = {"seconds": seconds, "error": error, "result": result, "log": said[-6000:] if error else ""}
    finally:  # an interrupted run leaves no processes
        for _, _, process in running.values():
            wait_or_kill(process, 0)
    return done


def wait_or_kill(process: subprocess.Popen, seconds: float) -> bool:
    """Wait up to `seconds`, then kill the process and its children; whether it was killed."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def complaint(part: Part, code: int, result: dict, said: str) -> str:
    """The error of a finished part; "" if there is none."""
    if code:
        lines = [line for line in said.splitlines() if line.strip()]
        return "; ".join(result.get("failed", [])) or (lines[-1] if lines else f"exit code {code}")
    if part.name == "parity" and (result["skipped"] or not result["passed"]):
        return f"{len(result['passed'])} tests passed, {len(result['skipped'])} were skipped"
    return ""


def outcome(part: Part, said: str) -> dict:
    """The results of a part so far."""
    if part.name == "parity":
        reported = {name: word for name, word in OUTCOMES.findall(said)}
        kinds = {"passed": ("PASSED",), "failed": ("FAILED", "ERROR"), "skipped": ("SKIPPED",)}
        return {kind: [name for name, word in reported.items() if word in words] for kind, words in kinds.items()}
    if not part.out:
        return {"lines": [json.loads(line) for line in said.splitlines() if re.fullmatch(r"\{.*\}", line)]}
    out = Path(part.out)
    return json.loads(out.read_text()) if out.exists() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
