"""Local processes that run a program together, each with simulated CPU devices of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from rlhf_jax import hosts

ROOT = Path(__file__).parents[1]
FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(processes: int, devices: int, *argv: str) -> list[subprocess.Popen]:
    """`python ARGV` in every process, with `devices` devices each."""
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FLAGS.format(devices),
        "PYTHONPATH": str(ROOT),
        hosts.COORDINATOR: f"127.0.0.1:{free_port()}",
        hosts.PROCESSES: str(processes),
    }
    return [
        subprocess.Popen(
            [sys.executable, *argv],
            env=environ | {hosts.PROCESS_ID: str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(running: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process; those that have not ended in time are killed, and the test fails."""
    try:
        found = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, found, strict=True)]
