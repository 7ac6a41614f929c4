"""What a family of checkpoints is: a reader of its config.json, a table of its tensors, and its names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.tensors import HfTensor

Tensors = dict[str, HfTensor]  # by the path of our parameter


@dataclass(frozen=True)
class Family:
    read: Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json -> fields of DecoderConfig, but the common ones
    tensors: Callable[[DecoderConfig], Tensors]  # all that this configuration may have; `abstract_params` says which
    causal: str  # architecture of a language model
    scalar: str | None  # of a reward model; None: transformers has no such class
    prefix: str  # of the base model's tensors, which a base model is saved without
    buffers: str = "(?!)"  # regular expression of tensors, without the prefix, that old checkpoints have for nothing
    alternatives: Callable[[DecoderConfig], list[Tensors]] = lambda config: []  # other layouts, where folders have them


def family(
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    tensors: Callable[[DecoderConfig], Tensors],
    name: str,
    prefix: str = "model.",
    buffers: str = "(?!)",
) -> Family:
    """With architectures NAMEForCausalLM and NAMEForSequenceClassification."""
    return Family(read, tensors, f"{name}ForCausalLM", f"{name}ForSequenceClassification", prefix, buffers)
