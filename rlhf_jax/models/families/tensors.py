"""The record of a family of checkpoints, and the parts of its table of tensor names: entries to be merged with |.

A table may list more than a model has (biases, say): `hf_tensors` keeps the entries of its `abstract_params`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf_jax.models.config import DecoderConfig


@dataclass(frozen=True)
class Stripe:
    """The outputs of a fused projection that one parameter holds: `length` from `offset` in every `period` outputs."""

    offset: int
    length: int
    period: int


class HfTensor(NamedTuple):
    """The tensor of a checkpoint that holds a parameter.

    The parameter, without its layer dimension where the name has {i}, and without its expert dimension where it has
    {j}, equals the file's tensor, transposed if `transpose`, of which the strip is taken along the last dimension.
    Where the parameter has more rows than the file (the padding of the vocabulary) the others are zeros.
    """

    name: str  # "{i}" stands for the layer, "{j}" for the expert (or head): parameters are stacked, the file's are not
    shape: tuple[int, ...]  # of one tensor in the file, with all parts of a fused one
    transpose: bool = False  # the file has [..., out, in], the parameter is [..., in, out]
    strip: Stripe | None = None  # along the last dimension of the parameter; None: all of it


@dataclass(frozen=True)
class Checkpoint:
    """The tensors that the files of a folder hold.

    Attributes:
        layouts: {path: its tensor in the files}; those after the first are alternatives to it, which may leave out
            entries that they share with it. The one of which the files lack the fewest tensors is used.
        prefix: of the base model's names, which the files may leave out.
        optional: paths that the files may lack.
        tolerated: names of tensors that the files may have and that are not read.
        heads: such names, of heads that another use of the model has; that they are not read is logged.
        twins: {name of a head: name of the embedding that it is tied to}.
        rename: from a name in the files to one in `layouts`; None: a tensor of another part of a multimodal folder.
    """

    layouts: Sequence[Mapping[str, HfTensor]]
    prefix: str
    optional: Collection[str] = ()
    tolerated: re.Pattern[str] | None = None
    heads: re.Pattern[str] | None = None
    twins: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str | None] = lambda name: name


Tensors = dict[str, HfTensor]  # by the path of the parameter
Reader = Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json -> fields of DecoderConfig but the common ones
TensorTable = Callable[[DecoderConfig], Tensors]  # every tensor that this configuration may have


@dataclass(frozen=True)
class Family:
    read: Reader
    tensors: TensorTable
    causal: str  # architecture of a language model
    scalar: str | None  # of a reward model; None: transformers has no such class
    prefix: str  # of the base model's tensors; a base model is saved without it
    buffers: str = "(?!)"  # regular expression of unused tensors, without the prefix, that old checkpoints have
    alternatives: Callable[[DecoderConfig], list[Tensors]] = lambda config: []  # other layouts that folders may have


def family(read: Reader, tensors: TensorTable, name: str, prefix: str = "model.", buffers: str = "(?!)") -> Family:
    """A family with the architectures NAMEForCausalLM and NAMEForSequenceClassification."""
    return Family(read, tensors, f"{name}ForCausalLM", f"{name}ForSequenceClassification", prefix, buffers)


def linear(path: str, name: str, inputs: int, outputs: int) -> Tensors:
    """Kernel [outputs, inputs] and bias of a torch Linear."""
    return {
        f"{path}/kernel": HfTensor(f"{name}.weight", (outputs, inputs), transpose=True),
        f"{path}/bias": HfTensor(f"{name}.bias", (outputs,)),
    }


def embedding_and_heads(config: DecoderConfig, embedding: str, head: str = "lm_head") -> Tensors:
    """The token embedding and the heads."""
    return {
        "embed/tokens": HfTensor(f"{embedding}.weight", (config.vocab_size, config.embed_size)),
        "head/kernel": HfTensor(f"{head}.weight", (config.vocab_size, config.embed_size)),
        "head/bias": HfTensor(f"{head}.bias", (config.vocab_size,)),
        "score/kernel": HfTensor("score.weight", (1, config.embed_size), transpose=True),
    }


def norms(width: int, names: Mapping[str, str]) -> Tensors:
    """Scales and biases of norms, from {path: name in the files}."""
    parts = [("scale", "weight"), ("bias", "bias")]
    return {f"{path}/{a}": HfTensor(f"{name}.{b}", (width,)) for path, name in names.items() for a, b in parts}


def layer_norms(config: DecoderConfig, attention: str, mlp: str, final: str) -> Tensors:
    """The norms before attention and MLP, and the last one."""
    names = {"layers/attention_norm": attention, "layers/mlp_norm": mlp, "final_norm": final}
    return norms(config.hidden_size, names)


def positions(config: DecoderConfig, name: str) -> Tensors:
    return {"embed/positions": HfTensor(f"{name}.weight", (config.position_rows, config.hidden_size))}


def fused_linears(lengths: Mapping[str, int], name: str, inputs: int, groups: int) -> Tensors:
    """Linear layers that the files have as one, one group of outputs after the other.

    Args:
        lengths: {path: number of its outputs in a group}, in the order of the file.
        name: of the fused layer in the files.
        inputs: number of inputs of each layer.
        groups: number of repetitions of that order along the outputs.
    """
    period, offset = sum(lengths.values()), 0
    table: Tensors = {}
    for path, length in lengths.items():
        whole = linear(path, name, inputs, groups * period)
        table |= {leaf: tensor._replace(strip=Stripe(offset, length, period)) for leaf, tensor in whole.items()}
        offset += length
    return table


def conv1d(table: Tensors) -> Tensors:
    """The same layers in the layout of GPT-2, whose weights are [in, out], as the parameters."""
    return {
        path: tensor._replace(shape=tensor.shape[::-1], transpose=False) if tensor.transpose else tensor
        for path, tensor in table.items()
    }


def separate_attention(config: DecoderConfig, name: str, o: str) -> Tensors:
    """The four projections of attention as separate tensors: q_proj, k_proj, v_proj and `o` of module `name`."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return (
        linear("layers/attention/q", f"{name}.q_proj", config.hidden_size, queries)
        | linear("layers/attention/k", f"{name}.k_proj", config.hidden_size, keys)
        | linear("layers/attention/v", f"{name}.v_proj", config.hidden_size, keys)
        | linear("layers/attention/o", f"{name}.{o}", queries, config.hidden_size)
    )


def grouped_attention(config: DecoderConfig, qkv: str, o: str) -> Tensors:
    """Queries, keys and values in one tensor [K, G + 2, d]: the G queries that share a key and a value, then these."""
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
