"""What a family of checkpoints is, and the parts of its table of tensor names: entries to be merged with |.

A table may list more than a model has (biases, say): `abstract_params` says which of it there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf_jax.models.config import DecoderConfig


@dataclass(frozen=True)
class Stripe:
    """What is ours of a fused projection: in every group of `period` outputs, `length` of them from `offset`."""

    offset: int
    length: int
    period: int


class HfTensor(NamedTuple):
    """A parameter as it lies in a checkpoint.

    Ours, without its layer dimension where the name has {i}, and without its expert dimension where it has {j}, equals
    the file's tensor, transposed where asked, of which the strip is taken along the last dimension. Where ours has more
    rows than the file (the padding of the vocabulary) the rest are zeros.
    """

    name: str  # "{i}" stands for the layer, "{j}" for the expert (or head): ours are stacked, the file's are not
    shape: tuple[int, ...]  # in the file, of one tensor, all of a fused one
    transpose: bool = False  # the file has [..., out, in], ours is [..., in, out]
    strip: Stripe | None = None  # along the last dimension of ours; None: all of it


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a folder hold.

    Attributes:
        layouts: {path: where it lies in the files}; those after the first are alternatives to it, which may leave out
            what they have in common with it. Of them the one is used that the files lack the fewest tensors of.
        prefix: of the base model's names, which the files may leave out.
        optional: paths that the files may lack.
        tolerated: names that the files may have and nothing reads.
        twins: {such a name: one that is read}, which have to be the same where the files have both.
    """

    layouts: Sequence[Mapping[str, HfTensor]]
    prefix: str
    optional: Collection[str] = ()
    tolerated: re.Pattern[str] | None = None
    twins: Mapping[str, str] = field(default_factory=dict)


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


def embedding_and_heads(config: DecoderConfig, embedding: str, head: str = "lm_head") -> Tensors:
    """The embedding of tokens, and the heads."""
    return {
        "embed/tokens": HfTensor(f"{embedding}.weight", (config.vocab_size, config.embed_size)),
        "head/kernel": HfTensor(f"{head}.weight", (config.vocab_size, config.embed_size)),
        "head/bias": HfTensor(f"{head}.bias", (config.vocab_size,)),
        "score/kernel": HfTensor("score.weight", (1, config.embed_size), transpose=True),
    }


def norms(width: int, ours_to_theirs: Mapping[str, str]) -> Tensors:
    """Scales and biases of norms."""
    return {path: row for ours, theirs in ours_to_theirs.items() for path, row in norm(ours, theirs, width).items()}


def layer_norms(config: DecoderConfig, attention: str, mlp: str, final: str) -> Tensors:
    """The norms before attention and MLP, and the last one."""
    names = {"layers/attention_norm": attention, "layers/mlp_norm": mlp, "final_norm": final}
    return norms(config.hidden_size, names)


def positions(config: DecoderConfig, theirs: str) -> Tensors:
    return {"embed/positions": HfTensor(f"{theirs}.weight", (config.position_rows, config.hidden_size))}


def fused_linears(ours: Mapping[str, int], theirs: str, inputs: int, groups: int) -> Tensors:
    """Linear layers that lie in one, a group of outputs after the other.

    Args:
        ours: how many outputs each of ours has in a group, in the order of the file.
        theirs: the layer that has them all.
        inputs: of each of them.
        groups: how often that order repeats along the outputs.
    """
    period = sum(ours.values())
    table: Tensors = {}
    offset = 0
    for path, length in ours.items():
        whole = linear(path, theirs, inputs, groups * period)
        table |= {name: tensor._replace(strip=Stripe(offset, length, period)) for name, tensor in whole.items()}
        offset += length
    return table


def conv1d(table: Tensors) -> Tensors:
    """The same layers as GPT-2 has them: its weights are [in, out], as ours."""
    return {
        path: tensor._replace(shape=tensor.shape[::-1], transpose=False) if tensor.transpose else tensor
        for path, tensor in table.items()
    }


def separate_attention(config: DecoderConfig, q: str, k: str, v: str, o: str) -> Tensors:
    """The four projections of attention, each with a tensor of its own."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return (
        linear("layers/attention/q", q, config.hidden_size, queries)
        | linear("layers/attention/k", k, config.hidden_size, keys)
        | linear("layers/attention/v", v, config.hidden_size, keys)
        | linear("layers/attention/o", o, queries, config.hidden_size)
    )


def grouped_attention(config: DecoderConfig, qkv: str, o: str) -> Tensors:
    """Queries, keys and values in one tensor, [K, G + 2, d]: behind the queries that share them, a key and a value."""
    d, shared_by = config.head_dim, config.num_heads // config.num_kv_heads
    group = {"layers/attention/q": shared_by * d, "layers/attention/k": d, "layers/attention/v": d}
    return fused_linears(group, qkv, config.hidden_size, config.num_kv_heads) | linear(
        "layers/attention/o", o, config.num_heads * d, config.hidden_size
    )


def mlp(config: DecoderConfig, up: str, down: str) -> Tensors:
    """The projections of an MLP without a gate."""
    return linear("layers/mlp/up", up, config.hidden_size, config.mlp_size) | linear(
        "layers/mlp/down", down, config.mlp_size, config.hidden_size
    )
