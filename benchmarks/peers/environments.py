"""The virtual environments of the peers, in runs/peers, each with packages of exact versions."""

from __future__ import annotations

import os
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


def run_module(name: str, module: str, *arguments: str, capture: bool = False) -> str:
    """`python -m module arguments` in an environment, which is made unless it exists; its output where captured."""
    python, installed = FOLDER / name / "bin" / "python", FOLDER / name / "packages.txt"
    wanted = "\n".join(PACKAGES[name])
    if not installed.exists() or installed.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
        installed.write_text(wanted)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.PIPE if capture else None
    command = [str(python), "-m", module, *arguments]
    return subprocess.run(command, check=True, env=environment, stdout=out, text=True).stdout or ""
