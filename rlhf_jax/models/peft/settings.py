"""adapter_config.json: what is refused, and what it says about each module."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.models.folders import read_json
from rlhf_jax.models.peft.modules import CONFIG

MERGE = "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and load the result"

# Settings that leave the stored function as it is, or that are acted on below. Any other that is on is refused.
_KNOWN = frozenset(
    "peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version r lora_alpha "
    "lora_dropout fan_in_fan_out bias target_modules exclude_modules modules_to_save layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern use_rslora init_lora_weights megatron_core loftq_config eva_config "
    "corda_config lora_ga_config qalora_group_size velora_config ensure_weight_tying runtime_config".split()
)
_DEFAULTS = {"r": 8, "lora_alpha": 8, "bias": "none", "init_lora_weights": True, "use_rslora": False}
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # those that leave the base as it was
# PEFT adds both names of a head to the adapters of classifiers; a head that is listed but not stored does no harm.
_HEADS = ("score", "classifier", "lm_head")


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json with its defaults; refuses what is not plain LoRA on an untouched base."""
    adapter = read_json(folder / CONFIG)
    kind = adapter.get("peft_type")
    if kind != "LORA":
        raise ValueError(f'{folder} has an adapter of peft_type "{kind}", only "LORA" is supported: {MERGE}')
    adapter = _DEFAULTS | {key: value for key, value in adapter.items() if value is not None}
    wrong = [key for key in ("r", "lora_alpha") if not isinstance(adapter[key], int | float) or adapter["r"] < 1]
    if wrong:
        raise ValueError(f"{folder / CONFIG}: {wrong[0]} has to be a number, and r at least 1: download it again")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "exclude_modules", "target_modules"):
        adapter.setdefault(key, ())
    refused = {key: value for key, value in adapter.items() if key not in _KNOWN and value}
    if adapter["bias"] != "none":
        refused["bias"] = adapter["bias"]
    if adapter["init_lora_weights"] not in _INITS:
        refused["init_lora_weights"] = adapter["init_lora_weights"]  # it took something out of the base's kernels
    if set(adapter["modules_to_save"]) - set(_HEADS):
        refused["modules_to_save"] = adapter["modules_to_save"]
    if refused:
        told = ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(refused.items()))
        raise ValueError(f"{folder / CONFIG} has what cannot be an adapter beside our kernels ({told}): {MERGE}")
    return adapter


def targeted(adapter: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT gives this module of ours an adapter (its `check_target_module_exists`)."""

    def named(choice: str | list[str]) -> bool:
        if isinstance(choice, str):
            return re.fullmatch(choice, name) is not None
        return any(name == one or name.endswith(f".{one}") for one in choice)

    targets, layers = adapter["target_modules"], adapter.get("layers_to_transform", [])
    if named(adapter["exclude_modules"]):
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or named(targets)
    if layers == [] or name in targets or not named(targets):
        return named(targets)
    lists = adapter.get("layers_pattern") or r"[^.]*"  # what the list of layers is called
    found = (re.match(rf"(.*?\.)?{one}\.(\d+)\.", name) for one in ([lists] if isinstance(lists, str) else lists))
    layer = next((int(match[2]) for match in found if match), None)
    return layer in ([layers] if isinstance(layers, int) else layers)


def pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name (PEFT's `get_pattern_key`)."""
    return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), default)
