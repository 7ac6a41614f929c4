"""Rows of a table of tensor names: a linear, a norm, and what most families call the ends."""

from __future__ import annotations

from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.families.family import Tensors
from rlhf_jax.models.tensors import HfTensor


def linear(path: str, name: str, inputs: int, outputs: int) -> Tensors:
    """Kernel [outputs, inputs] and bias of torch's Linear."""
    return {
        f"{path}/kernel": HfTensor(f"{name}.weight", (outputs, inputs), transpose=True),
        f"{path}/bias": HfTensor(f"{name}.bias", (outputs,)),
    }


def norm(path: str, name: str, width: int) -> Tensors:
    """Scale and bias of a norm."""
    return {
        f"{path}/scale": HfTensor(f"{name}.weight", (width,)),
        f"{path}/bias": HfTensor(f"{name}.bias", (width,)),
    }


def ends(config: DecoderConfig, embedding: str, head: str = "lm_head") -> Tensors:
    """The embedding of tokens, and the heads."""
    return {
        "embed/tokens": HfTensor(f"{embedding}.weight", (config.vocab_size, config.embed_size)),
        "head/kernel": HfTensor(f"{head}.weight", (config.vocab_size, config.embed_size)),
        "head/bias": HfTensor(f"{head}.bias", (config.vocab_size,)),
        "score/kernel": HfTensor("score.weight", (1, config.embed_size), transpose=True),
    }
