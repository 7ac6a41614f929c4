"""The virtual environments of the peers, in runs/peers, each with packages of exact versions.

They compute on this machine's NVIDIA GPU if it has one. PyPI's torch for Linux is built for CUDA; JAX has an extra.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path("runs/peers")
TORCH = ("transformers==5.24.0", "torch==2.13.0", "accelerate==1.15.0", "datasets==5.2.0")
PACKAGES = {
    "trl-1.9.2": ("trl==1.9.2", *TORCH),
    "trl-1.16.0": ("trl==1.16.0", *TORCH),
    "tunix-0.1.7": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "transformers==5.12.1"),
}


def gpu(field: str = "name") -> str:
    """What nvidia-smi says of this machine's first GPU; "" without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return (subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines() or [""])[0]


def jax_extra() -> str:
    """The extra of JAX for the driver of this machine's GPU; "" without one."""
    driver = gpu("driver_version").partition(".")[0]
    return ("cuda13" if int(driver) >= 580 else "cuda12") if driver else ""


def packages(name: str) -> list[str]:
    """Those of an environment, for this machine."""
    extra = jax_extra()
    with_extra = "jax==", f"jax[{extra}]==" if extra else "jax=="
    return [each.replace(*with_extra) for each in PACKAGES[name]]


def run_module(name: str, module: str, *arguments: str, capture: bool = False) -> str:
    """`python -m module arguments` in an environment, which is made unless it exists; its output where captured."""
    python, installed = FOLDER / name / "bin" / "python", FOLDER / name / "packages.txt"
    wanted = "\n".join(packages(name))
    if not installed.exists() or installed.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages(name)], check=True)
        installed.write_text(wanted)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({} if gpu() else {"CUDA_VISIBLE_DEVICES": ""})
    out = subprocess.PIPE if capture else None
    command = [str(python), "-m", module, *arguments]
    return subprocess.run(command, check=True, env=environment, stdout=out, text=True).stdout or ""
