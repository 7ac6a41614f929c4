"""Hugging Face folders in and out of the command line: `rlhf-jax import` and `rlhf-jax export`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlhf_jax.models.folders import local_folder, replacing
from rlhf_jax.models.pretrained import (
    DTYPES,
    Pretrained,
    from_pretrained,
    is_scorer,
    reward_from_pretrained,
    save_pretrained,
)

EXPORTS = {"ppo": "ppo/export", "sft": "sft/export", "reward": "reward/export", "critic": "ppo/export_critic"}


def import_model(source: str, destination: str, *, adapter: str | None = None, dtype: str | None = None) -> None:
    """Read a Hugging Face folder or hub id as training would, and write it to `destination`.

    What it does: check every tensor against config.json, merge an adapter, change the dtype, split or join files.

    Args:
        adapter: a PEFT folder whose LoRA is merged.
        dtype: of the result; None: what the source's config.json says.
    Raises:
        ValueError: what `from_pretrained` and `save_pretrained` raise.
    """
    folder = local_folder(source)
    hf = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    kept = hf.get("dtype", hf.get("torch_dtype"))
    dtype = dtype or (kept if kept in DTYPES else "float32")
    load = reward_from_pretrained if is_scorer(hf) else from_pretrained
    model = load(folder, adapter, dtype=dtype)
    save_pretrained(model, destination, dtype=dtype)
    print(f"import: {_told(model)} in {dtype} lies in {destination}", flush=True)


def export_run(run: str, destination: str, *, stage: str, adapter: bool = False, dtype: str | None = None) -> None:
    """Hand on what a run has trained.

    Args:
        stage: a key of EXPORTS.
        adapter: the LoRA adapter alone, for PEFT, in place of the whole model.
        dtype: of the whole model; None: that of the run's export.
    Raises:
        ValueError: no run, a stage that is not finished, no adapter, a destination that is there and not empty.
    """
    if not (Path(run) / "config.toml").exists():
        raise ValueError(f"{run} is no run folder (it has no config.toml): give the run.dir of a training")
    folder = Path(run) / EXPORTS[stage]
    if not folder.exists():
        done = ", ".join(name for name, place in EXPORTS.items() if (Path(run) / place).exists()) or "none"
        raise ValueError(f"{stage} of {run} is not finished ({folder} is not there); finished: {done}")
    if not adapter:
        import_model(str(folder), destination, dtype=dtype)
        return
    folder = folder.with_name(f"{folder.name}_adapter")
    if not folder.exists():
        raise ValueError(f"{stage} of {run} was trained whole, without LoRA, so it has no adapter: leave --adapter out")
    with replacing(Path(destination)) as unfinished:
        shutil.copytree(folder, unfinished, dirs_exist_ok=True)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    print(f"export: a LoRA adapter of {base} lies in {destination}", flush=True)


def _told(model: Pretrained) -> str:
    count = sum(leaf.size for leaf in model.params.values())
    kind = "reward model" if model.config.scalar_head else "language model"
    return f"a {model.config.family} {kind} of {count:,} parameters"
