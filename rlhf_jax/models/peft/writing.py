"""Our adapters to a PEFT folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.peft.modules import CONFIG, SCORE, WEIGHTS, modules_of


def write_adapter(
    folder: Path,
    config: DecoderConfig,
    adapters: Mapping[str, jax.Array],
    *,
    base: str,
    dtype: str = "float32",
) -> None:
    """Write the adapters, and score/kernel if there is one, as PEFT's folder; `read_adapter` gives the same back.

    The adapters of a fused module are joined: their ranks add up, unless all of them have the same A, and the entry in
    alpha_pattern grows alike, so that the scale stays.

    Args:
        folder: an existing folder.
        config: of the base, with its adapters.
        adapters: {path: array}, sharded or not, every shard reachable from this process; other parameters are ignored.
        base: the folder or hub id of the base, for whoever loads the adapter.
        dtype: of the tensors, "float32", "float16" or "bfloat16".
    """
    lora = config.lora
    tensors: dict[str, np.ndarray] = {}
    written: dict[str, int] = {}  # {module's name within a layer: how many ranks lie side by side}
    modules = [module for module in modules_of(config) if any(f"{linear}/lora_a" in adapters for linear in module.rows)]
    for module in modules:
        linears = [linear for linear in module.rows if f"{linear}/lora_a" in adapters]
        a, b = ([np.asarray(adapters[f"{linear}/{leaf}"]) for linear in linears] for leaf in ("lora_a", "lora_b"))
        shared = all(np.array_equal(a[0], other) for other in a[1:])
        a = np.concatenate(a[:1] if shared else a, axis=2)
        joined = np.zeros((config.num_layers, module.outputs, a.shape[2]), a.dtype)
        for n, (linear, part) in enumerate(zip(linears, b, strict=True)):
            start = 0 if shared else n * lora.rank
            joined[:, module.rows[linear], start : start + lora.rank] = part.swapaxes(1, 2)
        for layer in range(config.num_layers):
            name = f"base_model.model.{module.name.format(i=layer)}"
            tensors |= {f"{name}.lora_A.weight": a[layer].T, f"{name}.lora_B.weight": joined[layer]}
        written[module.name.split("{i}.")[1]] = a.shape[2] // lora.rank
    has_score = SCORE in adapters
    if has_score:
        tensors["base_model.model.score.weight"] = np.asarray(adapters[SCORE]).T
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    wide = {re.escape(name): times for name, times in written.items() if times > 1}
    content = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_score else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(module.fan_in_fan_out for module in modules),
        "target_modules": sorted(written),
        "rank_pattern": {name: times * lora.rank for name, times in wide.items()},
        "alpha_pattern": {name: times * alpha for name, times in wide.items()},
        "modules_to_save": ["score"] if has_score else None,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    contiguous = {name: np.ascontiguousarray(array, jnp.dtype(dtype)) for name, array in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
