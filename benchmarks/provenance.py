"""Provenance in every file of benchmarks/results/: command, commit, date and machine of a measurement."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(name: str, result: dict[str, Any], *keys: str, machine: str = "", note: str = "") -> None:
    """Write a measurement into benchmarks/results/NAME.json, a list of runs.

    Args:
        result: the numbers, JSON values.
        keys: runs whose results have the same values for these keys are replaced, others kept; none: all are replaced.
        machine: the accelerator measured; "": this machine's CPU.
        note: on the conditions, such as that other processes shared the machine; "": none.
    """
    run = {
        "command": command(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine or cpu(),
        "result": json.loads(json.dumps(result)),  # as read back from JSON, so that keys compare equal
    } | ({"note": note} if note else {})
    path = RESULTS / f"{name}.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if keys and path.exists() else []
    same = [i for i, old in enumerate(runs) if all(old["result"][key] == run["result"][key] for key in keys)]
    if same:
        runs[same[0]] = run
    else:
        runs.append(run)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}; `python scripts/write_docs.py` brings it into the documents")


def command() -> str:
    """The command line of this process, such as `python -m benchmarks.demo --seeds 0`."""
    spec = sys.modules["__main__"].__spec__  # None for a script that was not started by `-m`
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def commit() -> str:
    """The checked-out commit, with "-dirty" if tracked files other than results and documents differ from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    excluded = [":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)*.md"]
    is_clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":(top)", *excluded]).returncode == 0
    return head.stdout.strip() + ("" if is_clean else "-dirty")


def cpu() -> str:
    """The name of the processor, its vector instructions, and the number of cores that this process may use."""
    name = re.search(r"^model name\s*: (.+)$", _read_cpuinfo(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = name[1] if name else "unknown processor", vector_instructions(), f"{cores} cores"
    return ", ".join(filter(None, parts))


def vector_instructions() -> str:
    """Those that products take: "AMX" or "AVX512-BF16", which multiply in bfloat16, "AVX-512" or "AVX2"; "": others."""
    flags = re.search(r"^flags\s*: (.+)$", _read_cpuinfo(), re.MULTILINE)
    kinds = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    return next((kinds[each] for each in kinds if flags and each in flags[1].split()), "")


def _read_cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
