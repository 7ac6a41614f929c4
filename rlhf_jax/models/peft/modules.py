"""Which linears of ours a module of theirs holds, and what is called what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.families import hf_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCORE = "score/kernel"


@dataclass(frozen=True)
class Module:
    """A linear module of theirs, in every layer."""

    name: str  # "{i}" stands for the layer
    inputs: int
    outputs: int
    fan_in_fan_out: bool  # its weight is [inputs, outputs]
    rows: dict[str, np.ndarray]  # {path of a linear of ours that it holds: which of its outputs are that one's}


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
