"""Frequencies of rotary embeddings, with every scaling that transformers computes.

Frequencies are float32, and the order of operations is that of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlhf_jax.models.config import Rope
from rlhf_jax.models.families.hf_fields import positive_int, value_or

_Scaled = tuple[np.ndarray, float, int]  # frequencies, factor of cosine and sine, number of positions


def rope(
    hf: Mapping[str, Any], dim: int, *, theta: float = 10000.0, positions: int | None = None, interleaved: bool = False
) -> tuple[Rope, int]:
    """The rotary embedding that a config.json describes, and the number of positions that it supports.

    Args:
        dim: number of dimensions of each head that are rotated.
        theta: used where config.json has none.
        positions: used where config.json does not spell them max_position_embeddings.
        interleaved: see `Rope`.
    Raises:
        ValueError: an unknown scaling, an absent value of a scaling, or an odd `dim`.
    """
    parameters = rope_parameters(hf)
    if dim < 2 or dim % 2:
        raise ValueError(f"config.json: the rotated part of a head has to be a positive even number, not {dim}")
    kind = parameters["rope_type"]
    if kind not in _SCALINGS:
        raise ValueError(f'rope scaling "{kind}" is not supported; supported: {", ".join(_SCALINGS)} (config.json)')
    positions = positive_int(hf, "max_position_embeddings") if positions is None else positions
    original = value_or(parameters, "original_max_position_embeddings", positions)
    parameters["original_max_position_embeddings"] = value_or(hf, "original_max_position_embeddings", original)
    base = float(value_or(parameters, "rope_theta", theta))
    wavelengths = base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)  # divided by 2 pi
    frequencies, factor, positions = _SCALINGS[kind](parameters, wavelengths, base, positions)
    assert frequencies.dtype == np.float32 and frequencies.shape == (dim // 2,)
    return Rope(tuple(frequencies.tolist()), interleaved, factor), positions


def rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of config.json in the spelling of transformers 5; rope_type is always set.

    Earlier versions wrote rope_theta and partial_rotary_factor next to rope_scaling, with "type" for "rope_type".
    """
    parameters = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json: rope_scaling and rope_parameters have to be objects, not {parameters!r}")
    parameters = dict(parameters)
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(f"{hf.get('model_type')} with rope_parameters for {' and '.join(nested)} is not supported")
    for key in ("rope_theta", "partial_rotary_factor"):
        parameters[key] = value_or(parameters, key, hf.get(key))
    parameters["rope_type"] = value_or(parameters, "rope_type", value_or(parameters, "type", "default"))
    return parameters


def rotary_dim(hf: Mapping[str, Any], head_dim: int, default: float = 1.0) -> int:
    """Number of dimensions of a head that are rotated, by partial_rotary_factor."""
    return int(head_dim * value_or(rope_parameters(hf), "partial_rotary_factor", default))


def _number(parameters: Mapping[str, Any], key: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'config.json: rope scaling "{parameters["rope_type"]}" needs a number {key}, not {value!r}')
    return value


def _linear(parameters: Mapping[str, Any], wavelengths: np.ndarray, base: float, positions: int) -> _Scaled:
    """Frequencies over the factor: "linear". Frequencies alone: "default", and "dynamic".

    "dynamic" scales only past max_position_embeddings, and then by the length of the sequence: each new token would
    change the rotation of all keys, but a cache holds rotated keys. So the positions end there.
    """
    kind = parameters["rope_type"]
    factor = 1.0 if kind == "default" else _number(parameters, "factor")
    return 1.0 / wavelengths / (factor if kind == "linear" else 1.0), 1.0, positions


def _yarn(parameters: Mapping[str, Any], wavelengths: np.ndarray, base: float, positions: int) -> _Scaled:
    """Peng et al. 2023 (arXiv 2309.00071): interpolates long wavelengths, keeps short ones, with a ramp in between."""
    original = _number(parameters, "original_max_position_embeddings")
    factor = positions / original if parameters.get("factor") is None else _number(parameters, "factor")

    def magnitude(scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if parameters.get("attention_factor") is not None:
        attention = float(_number(parameters, "attention_factor"))
    elif mscale and mscale_all_dim:
        attention = magnitude(mscale) / magnitude(mscale_all_dim)
    else:
        attention = magnitude()

    dim = 2 * len(wavelengths)

    def dimension(rotations: float) -> float:  # whose wavelength fits `rotations` times into the original positions
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return 1.0 / (factor * wavelengths) * ramp + 1.0 / wavelengths * (1 - ramp), attention, positions


def _longrope(parameters: Mapping[str, Any], wavelengths: np.ndarray, base: float, positions: int) -> _Scaled:
    """Ding et al. 2024 (arXiv 2402.13753): one factor per wavelength."""
    original = positive_int(parameters, "original_max_position_embeddings")
    factor = positions / original if parameters.get("factor") is None else _number(parameters, "factor")
    if parameters.get("attention_factor") is not None:
        attention = float(_number(parameters, "attention_factor"))
    else:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short = parameters.get("short_factor")
    if not isinstance(short, list) or len(short) != len(wavelengths):
        raise ValueError(f"config.json: rope scaling needs a list short_factor of {len(wavelengths)} numbers")
    # A sequence longer than `original` has other frequencies at all its positions, the first ones included, so a cache
    # of rotated keys becomes invalid when it grows past `original`. So the positions end there.
    return 1.0 / (np.asarray(short, np.float32) * wavelengths), attention, min(original, positions)


def _llama3(parameters: Mapping[str, Any], wavelengths: np.ndarray, base: float, positions: int) -> _Scaled:
    """Grattafiori et al. 2024 (arXiv 2407.21783), code release: as yarn, with another ramp."""
    keys = "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"
    factor, original, low, high = (_number(parameters, key) for key in keys)
    frequencies = 1.0 / wavelengths
    lengths = 2 * math.pi / frequencies
    smooth = (original / lengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    long = np.where(lengths > original / low, frequencies / factor, between)
    return np.where(lengths < original / high, frequencies, long), 1.0, positions


_SCALINGS: dict[str, Callable[[Mapping[str, Any], np.ndarray, float, int], _Scaled]] = {
    "default": _linear,
    "linear": _linear,
    "dynamic": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
