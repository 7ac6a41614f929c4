"""RUN/events.jsonl: when commands of a run started and ended, on which machine, and what they warned of."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax import hosts
from rlhf_jax.redact import redact

PACKAGE = logging.getLogger("rlhf_jax")


@contextmanager
def record_events(folder: Path, start: Mapping[str, Any]) -> Iterator[None]:
    """Append a record of the start with these fields, each warning of this package in the body, and the end.

    The main process writes. A command that is killed leaves no end.
    """
    if not hosts.is_main():
        yield
        return
    path = folder / "events.jsonl"

    def write(event: str, fields: Mapping[str, Any]) -> None:
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
        with path.open("a", encoding="utf-8") as file:
            file.write(redact(json.dumps(record, ensure_ascii=False)) + "\n")

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: write(record.levelname.lower(), {"message": record.getMessage()})
    PACKAGE.addHandler(handler)
    try:
        write("start", start)
        yield
        write("end", {"outcome": "finished"})
    except BaseException as error:  # also signals, which end a run in order
        with suppress(OSError):  # such as a full disk, which `error` says already
            write("end", {"outcome": f"{type(error).__name__}: {error}"})
        raise
    finally:
        PACKAGE.removeHandler(handler)


def describe_machine(mesh: Mesh) -> dict[str, Any]:
    """Devices, processors, memory in bytes of this computer, and versions."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.+)$", described, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": " x ".join(f"{name} {size}" for name, size in mesh.shape.items()),
        "processes": hosts.count(),
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "cores": cores,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
