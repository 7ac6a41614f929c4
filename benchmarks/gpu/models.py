"""Random models with OPT's sizes in the recipe of configs/opt-1.3b-single_gpu.toml; nothing is downloaded."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.timing import SIZES
from rlhf_jax.config import load_config
from rlhf_jax.recipe import Recipe

CONFIG = "configs/opt-1.3b-single_gpu.toml"
TOY = ["data.max_prompt_length=32", "data.max_length=48", "ppo.sample.max_new_tokens=16", "ppo.rollout_batch_size=16"]
TOY += ["ppo.micro_batch_size=8", "model.lora.rank=4"]


def recipe_of(folder: str | Path, actor: str, critic: str, *overrides: str, small: bool = False) -> Recipe:
    """The recipe with models that consist of a config.json; `small`: with toy models instead."""
    for role, name in (("actor", actor), ("critic", critic)):
        path = Path(folder) / role / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(SIZES["toy" if small else name].hf_config))
    paths = f"model.actor={folder}/actor", f"model.reward={folder}/critic", f"run.dir={folder}/run"
    data = 'data.sources=[{ path = "builtin:assistant" }]'
    return load_config(CONFIG, [*paths, data, *(TOY if small else []), *overrides], Recipe)


def keep(out: str, result: dict) -> None:
    """Write the results so far, atomically."""
    part = Path(f"{out}.part")
    part.write_text(json.dumps(result))
    os.replace(part, out)


def arguments() -> tuple[str, bool, list[str]]:
    """(output file, whether at toy size, other arguments)."""
    out, *rest = sys.argv[1:]
    return out, "--small" in rest, [each for each in rest if each != "--small"]
