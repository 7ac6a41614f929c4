"""A PEFT folder to our adapters."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax.mesh import Layout
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.lora import LINEARS, LoraConfig
from rlhf_jax.models.peft.modules import CONFIG, SCORE, WEIGHTS, Module, modules_of
from rlhf_jax.models.peft.settings import MERGE, pattern, read_settings, targeted
from rlhf_jax.models.safetensors_io import listed

_PICKLE = "adapter_model.bin"
_DTYPES = ("F32", "F16", "BF16")

# What PEFT calls a tensor; ours is the module with its kind, or without one where the module is saved whole.
_NAME = re.compile(r"base_model\.model\.(?P<module>.+?)(\.modules_to_save)?(?P<kind>\.lora_[AB])?(\.default)?\.weight")


class _Part(NamedTuple):
    """The adapter of one linear of ours in one layer."""

    linear: str
    layer: int
    a: np.ndarray  # [rank, in]
    b: np.ndarray  # [out, rank]
    alpha: float
    divisor: float  # alpha / divisor is the scale


def read_adapter(
    folder: Path, config: DecoderConfig, layout: Layout, dtype: str = "float32"
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    """A LoRA adapter of PEFT's as adapters beside our kernels.

    The rank is the largest that a linear has; smaller ones are filled up with zeros, and so are the layers that PEFT
    left without. That is exact in training too: where a column of A and its row of B are both zero, so are their
    gradients. Scales that differ from the largest one are folded into B.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        config: of the base.
        layout: where each adapter lies.
        dtype: of the result.
    Returns:
        `config` with the adapters, whose targets are the linears that have one in any layer, and {path: array}:
        .../lora_a [L, in, rank], .../lora_b [L, rank, out], and score/kernel [E, 1] if the adapter has a scalar head.
    Raises:
        ValueError: a file is absent or damaged, the weights are a pickle, the adapter is of a kind or changes a module
            that cannot be had here, or its tensors are not those that its configuration describes (all in one message).
    """
    adapter, stored, modules = read_settings(folder), _stored(folder), modules_of(config)
    _refuse_foreign(folder, stored, modules, config)
    places = [(module, i, module.name.format(i=i)) for module in modules for i in range(config.num_layers)]
    places = [place for place in places if targeted(adapter, place[2])]
    if not places:
        raise ValueError(f"the target_modules of {folder / CONFIG} are no linears of this model: is its base another?")
    shapes: dict[str, tuple[int, ...]] = {}
    for module, _, name in places:
        rank = pattern(adapter["rank_pattern"], name, adapter["r"])
        shapes |= {f"{name}.lora_A": (rank, module.inputs), f"{name}.lora_B": (module.outputs, rank)}
    if config.scalar_head and ("score" in stored or "score" in adapter["modules_to_save"]):
        shapes["score"] = (1, config.embed_size)
    _check(folder, stored, shapes)

    parts = []
    for module, layer, name in places:
        a, b = stored[f"{name}.lora_A"], stored[f"{name}.lora_B"]
        alpha = pattern(adapter["alpha_pattern"], name, adapter["lora_alpha"])
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
    lora, host = _stacked(parts, config.num_layers)
    if "score" in shapes:
        host[SCORE] = stored["score"].T
    config = dataclasses.replace(config, lora=lora)
    leaves = abstract_params(config)
    return config, {
        path: layout.put(array.astype(jnp.dtype(dtype)), *leaves[path].axes) for path, array in host.items()
    }


def _stacked(parts: Sequence[_Part], num_layers: int) -> tuple[LoraConfig, dict[str, np.ndarray]]:
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


def _stored(folder: Path) -> dict[str, np.ndarray]:
    """{"model.layers.0.mlp.up_proj.lora_A", "score", ...: float32}; a name that is not PEFT's for LoRA stays whole."""
    if not (folder / WEIGHTS).exists():
        if (folder / _PICKLE).exists():
            raise ValueError(
                f"{folder} has {_PICKLE} but no safetensors: a pickle can run any code, so it is not read; where you "
                f'trust it, convert it with torch installed: python -c "import torch, safetensors.torch as s; '
                f"s.save_file(torch.load('{folder / _PICKLE}'), '{folder / WEIGHTS}')\""
            )
        raise ValueError(f"there is no {folder / WEIGHTS}: is {folder} the folder of a PEFT adapter?")
    stored, foreign = {}, []  # the latter of another dtype
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                match = _NAME.fullmatch(name)
                key = match["module"] + (match["kind"] or "") if match else name
                if file.get_slice(name).get_dtype() in _DTYPES:
                    stored[name if key in stored else key] = file.get_tensor(name).astype(np.float32)
                else:
                    foreign.append(name)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): download it again") from error
    if foreign:
        raise ValueError(f"{folder / WEIGHTS}: {listed(foreign)} are not {', '.join(_DTYPES)}: save it as one of them")
    return stored


def _refuse_foreign(folder: Path, stored: Iterable[str], modules: Iterable[Module], config: DecoderConfig) -> None:
    known = {module.name.format(i=i) for module in modules for i in range(config.num_layers)}
    ours = {f"{name}.{kind}" for name in known for kind in ("lora_A", "lora_B")} | {"score"}
    foreign = set(stored) - ours
    if foreign:
        linears = ", ".join(sorted({module.name.split("{i}.")[1] for module in modules}))
        raise ValueError(
            f"{folder} changes {listed(foreign)}, but in this model only {linears} of its {config.num_layers} layers "
            f"can have adapters (no embeddings, heads or experts): if it is of this base, {MERGE}"
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
        told = "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"the tensors of {folder / WEIGHTS} are not those that {CONFIG} describes; {told}")
