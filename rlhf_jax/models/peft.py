"""LoRA adapters in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors.

PEFT has an adapter for each module of each layer, with a rank and a scale of its own; ours are stacked over the layers
and share one rank and one scale. A PEFT module may hold several linears of this model (a fused projection), each of
which has its own A here. On both sides the scale times the product of A and B is the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from rlhf_jax import hosts
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import HEADS_OF_VALUES, OTHER_HEADS, hf_tensors
from rlhf_jax.models.hub import read_json, write_json
from rlhf_jax.models.lora import LINEARS, LoraConfig, is_adapter
from rlhf_jax.models.peft_base import (
    MERGE,
    check_parameter_targets,
    is_parameter_target,
    merge_products,
    merge_targets,
    replaced_embeddings,
)
from rlhf_jax.models.safetensors_io import NUMPY_DTYPES, join_names, open_file
from rlhf_jax.models.safetensors_io.files import PICKLE, VALUE_HEADS
from rlhf_jax.models.safetensors_io.reading import log_unused_heads
from rlhf_jax.models.unstacked import Param

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCORE = "score/kernel"


@dataclass(frozen=True)
class Module:
    """A linear module of a PEFT adapter, in every layer."""

    name: str  # "{i}" stands for the layer
    inputs: int
    outputs: int
    fan_in_fan_out: bool  # its weight is [inputs, outputs]
    rows: dict[str, np.ndarray]  # {path of a linear that it holds: indices of its outputs in the module}


def modules_of(config: DecoderConfig) -> list[Module]:
    """The modules whose linears can have an adapter here."""
    modules: dict[str, Module] = {}
    for path, tensor in hf_tensors(config).items():
        if path.startswith(("layers/attention/", "layers/mlp/")) and path.endswith("/kernel"):
            name = tensor.name.removesuffix(".weight")
            outputs, inputs = tensor.shape if tensor.transpose else tensor.shape[::-1]
            rows = np.arange(outputs)
            if tensor.strip:
                ours = slice(tensor.strip.offset, tensor.strip.offset + tensor.strip.length)
                rows = rows.reshape(-1, tensor.strip.period)[:, ours].reshape(-1)
            module = modules.setdefault(name, Module(name, inputs, outputs, not tensor.transpose, {}))
            module.rows[path.removesuffix("/kernel")] = rows
    return list(modules.values())


# Settings that leave the stored function as it is, or that are acted on below. Any other that is on is refused.
_KNOWN_SETTINGS = frozenset(
    "peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version r lora_alpha "
    "lora_dropout fan_in_fan_out bias target_modules target_parameters exclude_modules modules_to_save "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern use_rslora init_lora_weights megatron_core "
    "loftq_config eva_config "
    "corda_config lora_ga_config qalora_group_size velora_config ensure_weight_tying runtime_config".split()
)
_DEFAULTS = {"r": 8, "lora_alpha": 8, "bias": "none", "init_lora_weights": True, "use_rslora": False}
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # those that leave the base as it was
# PEFT adds both names of a head to the adapters of classifiers; a head that is listed but not stored does no harm. What
# else is saved whole has to be stored, and to be an embedding.
_HEADS = ("score", "classifier", "lm_head")


def read_settings(folder: Path, adapter: Mapping[str, Any], stored: Iterable[str]) -> dict[str, Any]:
    """adapter_config.json with its defaults; refuses what is not plain LoRA, with or without modules `stored` whole."""
    kind = adapter.get("peft_type")
    if kind != "LORA":
        raise ValueError(f'{folder} has an adapter of peft_type "{kind}", only "LORA" is supported: {MERGE}')
    adapter = _DEFAULTS | {key: value for key, value in adapter.items() if value is not None}
    wrong = [key for key in ("r", "lora_alpha") if not isinstance(adapter[key], int | float) or adapter["r"] < 1]
    if wrong:
        raise ValueError(f"{folder / CONFIG}: {wrong[0]} has to be a number, and r at least 1: download it again")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "exclude_modules", "target_modules"):
        adapter.setdefault(key, ())
    refused = {key: value for key, value in adapter.items() if key not in _KNOWN_SETTINGS and value}
    if adapter["bias"] != "none":
        refused["bias"] = adapter["bias"]
    if adapter["init_lora_weights"] not in _INITS:
        refused["init_lora_weights"] = adapter["init_lora_weights"]  # it took something out of the base's kernels
    whole, saved = ({name.rpartition(".")[2] for name in names} for names in (stored, adapter["modules_to_save"]))
    # PEFT stores an embedding that it keeps tied to the head once, under the name of the head.
    if saved - whole - set(_HEADS) and not (adapter.get("ensure_weight_tying") and "lm_head" in whole):
        refused["modules_to_save"] = adapter["modules_to_save"]
    if refused:
        reported = ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(refused.items()))
        raise ValueError(f"{folder / CONFIG} has settings that separate adapters do not have ({reported}): {MERGE}")
    return adapter


def is_target(adapter: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT gives this module an adapter (its `check_target_module_exists`)."""

    def matches(choice: str | list[str]) -> bool:
        if isinstance(choice, str):
            return re.fullmatch(choice, name) is not None
        return any(name == one or name.endswith(f".{one}") for one in choice)

    targets, layers = adapter["target_modules"], adapter.get("layers_to_transform", [])
    if matches(adapter["exclude_modules"]):
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or matches(targets)
    if layers == [] or name in targets or not matches(targets):
        return matches(targets)
    lists = adapter.get("layers_pattern") or r"[^.]*"  # what the list of layers is called
    found = (re.match(rf"(.*?\.)?{one}\.(\d+)\.", name) for one in ([lists] if isinstance(lists, str) else lists))
    layer = next((int(match[2]) for match in found if match), None)
    return layer in ([layers] if isinstance(layers, int) else layers)


def match_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name (PEFT's `get_pattern_key`)."""
    return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), default)


_PICKLE = "adapter_model.bin"

# What PEFT calls a tensor; ours is the module with its kind, or without one where the module is saved whole.
_NAME = re.compile(r"base_model\.model\.(?P<module>.+?)(\.modules_to_save)?(?P<kind>\.lora_[AB])?(\.default)?\.weight")


class _Part(NamedTuple):
    """The adapter of one linear layer of this model in one block."""

    linear: str
    layer: int
    a: np.ndarray  # [rank, in]
    b: np.ndarray  # [out, rank]
    alpha: float
    divisor: float  # alpha / divisor is the scale


def read_adapter(
    folder: Path, config: DecoderConfig, layout: Layout, params: Mapping[str, Param]
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    """Read a PEFT LoRA adapter as adapters of this model's kernels, and what else it changes as changed parameters.

    The rank is the largest that a linear has; smaller ones are filled up with zeros, and so are the layers that PEFT
    left without. That is exact in training too: where a column of A and its row of B are both zero, so are their
    gradients. Scales that differ from the largest one are folded into B.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        config: of the base.
        layout: sharding of the adapters.
        params: of the base.
    Returns:
        `config` with the adapters, whose targets are the linears that have one in any layer, and {path: float32 array}:
        .../lora_a [L, in, rank], .../lora_b [L, rank, out], and score/kernel [E, 1] if the adapter has a scalar head;
        and those parameters of the base, in its dtype, that the adapter changes otherwise (see `models.peft_base`).
    Raises:
        ValueError: a file is absent or damaged, the weights are a pickle, the adapter is of a kind or changes a module
            that cannot be had here, or its tensors are not those that its configuration describes (all in one message).
    """
    content, stored, modules = read_json(folder / CONFIG), _read_tensors(folder), modules_of(config)
    adapter = read_settings(folder, content, stored)

    def scale_of(name: str, rank: int) -> float:
        alpha = match_pattern(adapter["alpha_pattern"], name, adapter["lora_alpha"])
        return alpha / (math.sqrt(rank) if adapter["use_rslora"] else rank)

    names = [f"{module.name}.weight" for module in modules] + [target.name for target in merge_targets(config)]
    check_parameter_targets(folder / CONFIG, adapter, names, config.num_layers)
    _add_value_head(folder, stored, config)
    changed = replaced_embeddings(folder, adapter, stored, config, params, layout)
    changed |= merge_products(folder, adapter, stored, config, {**params, **changed}, scale_of)
    _refuse_foreign(folder, stored, modules, config)
    places = [(module, i, module.name.format(i=i)) for module in modules for i in range(config.num_layers)]
    places = [p for p in places if is_target(adapter, p[2]) or is_parameter_target(adapter, f"{p[2]}.weight")]
    if not places and changed and not stored:
        return config, changed
    if not places:
        raise ValueError(f"the target_modules of {folder / CONFIG} are no linears of this model: is its base another?")
    shapes: dict[str, tuple[int, ...]] = {}
    for module, _, name in places:
        rank = match_pattern(adapter["rank_pattern"], name, adapter["r"])
        shapes |= {f"{name}.lora_A": (rank, module.inputs), f"{name}.lora_B": (module.outputs, rank)}
    if config.scalar_head and ("score" in stored or "score" in adapter["modules_to_save"]):
        shapes["score"] = (1, config.embed_size)
    _check(folder, stored, shapes)

    parts = []
    for module, layer, name in places:
        a, b = stored[f"{name}.lora_A"], stored[f"{name}.lora_B"]
        alpha = match_pattern(adapter["alpha_pattern"], name, adapter["lora_alpha"])
        divisor = math.sqrt(len(a)) if adapter["use_rslora"] else len(a)
        for linear, rows in module.rows.items():
            # A column of B that is zero for this one, but not for its neighbours in a fused module, is theirs alone:
            # `write_adapter` joins adapters so, and here they come apart again, each with the rank it had. Where its
            # row of A is zero as well there is nothing.
            mine = np.any(b[rows], axis=0) | (~np.any(b, axis=0) & np.any(a, axis=1))
            if mine.any():
                parts.append(_Part(linear, layer, a[mine], b[rows][:, mine], alpha, divisor))
    if not parts:
        raise ValueError(f"every tensor of {folder / WEIGHTS} is zero: load the base without it")
    lora, host = _stack(parts, config.num_layers)
    if "score" in shapes:
        host[SCORE] = stored["score"].T
    config = dataclasses.replace(config, lora=lora)
    leaves = abstract_params(config)
    return config, changed | {path: layout.put(array, *leaves[path].axes) for path, array in host.items()}


def _stack(parts: Sequence[_Part], num_layers: int) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    rank = max(len(part.a) for part in parts)
    alphas = [part.alpha * rank / part.divisor for part in parts]  # in this order exact for whole numbers
    largest = max(alphas, key=abs)
    host: dict[str, np.ndarray] = {}
    for part, alpha in zip(parts, alphas, strict=True):
        a, b = f"{part.linear}/lora_a", f"{part.linear}/lora_b"
        if a not in host:
            host[a] = np.zeros((num_layers, part.a.shape[1], rank), np.float32)
            host[b] = np.zeros((num_layers, rank, part.b.shape[0]), np.float32)
        host[a][part.layer, :, : len(part.a)] = part.a.T
        host[b][part.layer, : len(part.a)] = part.b.T if alpha == largest else part.b.T * (alpha / largest)
    adapted = {part.linear.rpartition("/")[2] for part in parts}
    return LoraConfig(rank, float(largest), tuple(name for name in LINEARS if name in adapted)), host


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """{"model.layers.0.mlp.up_proj.lora_A", "score", ...: float32}; a name that is not PEFT's for LoRA stays whole."""
    path = next((folder / name for name in (WEIGHTS, _PICKLE) if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"there is no {folder / WEIGHTS}: is {folder} the folder of a PEFT adapter?")
    stored, foreign = {}, []  # the latter of another dtype
    for name, entry in open_file(path).items():
        match = _NAME.fullmatch(name)
        key = match["module"] + (match["kind"] or "") if match else name
        if entry.dtype in NUMPY_DTYPES:
            stored[name if key in stored else key] = entry.array().astype(np.float32)
        else:
            foreign.append(name)
    if foreign:
        raise ValueError(f"{path}: {join_names(foreign)} are not {', '.join(NUMPY_DTYPES)}: save it as one of them")
    return stored


def _add_value_head(folder: Path, stored: dict[str, np.ndarray], config: DecoderConfig) -> None:
    """Take the head of values in a file next to the adapter, of TRL or LLaMA-Factory, as its scalar head.

    What this model does not use of it is logged.
    """
    path = next((folder / name for name in (*VALUE_HEADS, PICKLE) if (folder / name).exists()), None)
    files = open_file(path) if path else {}
    heads = files if all(map(OTHER_HEADS.fullmatch, files)) else {}  # and not a whole model
    is_needed = config.scalar_head and "score" not in stored
    used = {name for name in (*HEADS_OF_VALUES, "score.weight") if is_needed and name in heads}
    for name in used:
        stored["score"] = heads[name].array().astype(np.float32)
    log_unused_heads(path, heads.keys() - used, heads, used)


def _refuse_foreign(folder: Path, stored: Iterable[str], modules: Iterable[Module], config: DecoderConfig) -> None:
    known = {module.name.format(i=i) for module in modules for i in range(config.num_layers)}
    foreign = set(stored) - {f"{name}.{kind}" for name in known for kind in ("lora_A", "lora_B")} - {"score"}
    if foreign:
        linears = ", ".join(sorted({module.name.split("{i}.")[1] for module in modules}))
        raise ValueError(
            f"{folder} changes {join_names(foreign)}, but in this model only {linears} of its {config.num_layers} "
            f"layers can have adapters (no embeddings, heads or experts): if it was trained on this base, {MERGE}"
        )
    if "score" in stored and not config.scalar_head:
        raise ValueError(f"{folder} has a scalar head: load it with reward_from_pretrained")


def _check(folder: Path, stored: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    faults = {
        "missing": shapes.keys() - stored.keys(),
        "surplus": stored.keys() - shapes.keys(),
        "misshaped": [
            f"{name} ({list(stored[name].shape)} in place of {list(shape)})"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if any(faults.values()):
        reported = "; ".join(f"{fault}: {join_names(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"the tensors of {folder / WEIGHTS} are not those that {CONFIG} describes; {reported}")


def write_adapter(folder: Path, config: DecoderConfig, adapters: Mapping[str, jax.Array], *, base: str) -> None:
    """Write the adapters, and score/kernel if there is one, as PEFT's folder, in float32; `read_adapter` gives the same
    back.

    The adapters of a fused module are joined: their ranks add up, unless all of them have the same A, and the entry in
    alpha_pattern grows alike, so that the scale stays.

    Args:
        folder: an existing folder.
        config: of the base, with its adapters.
        adapters: {path: array}, sharded or not; other parameters are ignored.
        base: the folder or hub id of the base, written for tools that load the adapter.
    """
    lora = config.lora
    adapters = hosts.fetch({path: leaf for path, leaf in adapters.items() if path == SCORE or is_adapter(path)})
    if not hosts.is_main():
        return
    tensors: dict[str, np.ndarray] = {}
    written: dict[str, int] = {}  # {module's name within a layer: how many ranks are concatenated}
    modules = [module for module in modules_of(config) if any(f"{linear}/lora_a" in adapters for linear in module.rows)]
    for module in modules:
        linears = [linear for linear in module.rows if f"{linear}/lora_a" in adapters]
        a, b = ([adapters[f"{linear}/{leaf}"] for linear in linears] for leaf in ("lora_a", "lora_b"))
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
        tensors["base_model.model.score.weight"] = adapters[SCORE].T
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
    write_json(folder / CONFIG, content)
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
