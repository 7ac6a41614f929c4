"""What each family of checkpoints calls things: config.json <-> DecoderConfig, and our paths <-> tensor names.

A new family is a table, a reader of its config.json and, at most, one new choice in `DecoderConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import gemma, gpt, llama, multi, sparse
from rlhf_jax.models.families.family import Family, Tensors
from rlhf_jax.models.families.reading import refuse, size

# Embeddings and heads are padded to a multiple of this, so that any usual number of devices splits them evenly.
VOCAB_MULTIPLE = 128

FAMILIES: dict[str, Family] = gpt.FAMILIES | multi.FAMILIES | llama.FAMILIES | gemma.FAMILIES | sparse.FAMILIES

# Not exported: what is of another training or another folder. auto_map names code that is not in the one we write.
_DROPPED = frozenset(
    "torch_dtype transformers_version _name_or_path auto_map num_labels id2label label2id problem_type".split()
)


def decoder_config(hf: Mapping[str, Any], *, scalar_head: bool) -> DecoderConfig:
    """The architecture that a config.json describes.

    Args:
        hf: the parsed config.json; what it leaves out takes the default of transformers.
        scalar_head: a reward model or critic in place of a language model.
    Raises:
        ValueError: an unsupported model_type or variant, or a size that is absent.
    """
    family = hf.get("model_type")
    if f"{family}_text" in FAMILIES or hf.get("text_config") is not None:
        text = f"{family}_text"
        mend = f": only its text model, {text}, is, in a folder of its own" if text in FAMILIES else ""
        raise ValueError(f"{family} is multimodal, which is not supported{mend}")
    if family not in FAMILIES:
        raise ValueError(f'model_type "{family}" is not supported; supported: {", ".join(sorted(FAMILIES))}')
    if hf.get("quantization_config"):
        raise ValueError("a quantised checkpoint (quantization_config) is not supported: use the unquantised one")
    refuse(hf, is_causal=True, per_layer_config={}, is_encoder_decoder=False)
    vocab = size(hf, "vocab_size")
    return DecoderConfig(
        family=family,
        padded_vocab=-(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        scalar_head=scalar_head,
        **FAMILIES[family].read(hf),
    )


def hf_tensors(config: DecoderConfig) -> Tensors:
    """{path: where a checkpoint has it}, for every parameter of this model, in the layout of the hub."""
    table = FAMILIES[config.family].tensors(config)
    return {path: table[path] for path in abstract_params(config)}


def alternatives(config: DecoderConfig) -> list[Tensors]:
    """The same in other layouts, where folders of this family may have them."""
    tables = FAMILIES[config.family].alternatives(config)
    return [{path: table[path] for path in abstract_params(config)} for table in tables]


def base_prefix(config: DecoderConfig) -> str:
    """What names of the base model's tensors begin with, unless the folder holds a base model alone."""
    return FAMILIES[config.family].prefix


def tolerated_surplus(config: DecoderConfig) -> re.Pattern[str]:
    """Names that a checkpoint may have beyond `hf_tensors`: buffers, and a head that this model does not use."""
    family, used = FAMILIES[config.family], abstract_params(config)
    names = [r".*\.rotary_emb\.inv_freq", rf"({re.escape(family.prefix)})?({family.buffers})"]
    table = family.tensors(config)
    unused = {"head/kernel", "head/bias"} & table.keys() - used.keys() if config.tied or config.scalar_head else set()
    names += [re.escape(table[path].name) for path in sorted(unused)]
    return re.compile("|".join(names))


def hf_config(source: Mapping[str, Any], config: DecoderConfig, *, dtype: str, pad_token_id: int | None) -> dict:
    """The config.json of an export: the source's, with what the training changed.

    A scalar head of a family for which transformers has no such model gets an architecture of our own naming: we read
    it, transformers does not.

    Args:
        source: the config.json that `config` came from.
        dtype: of the exported tensors, "float32", "bfloat16" or "float16".
        pad_token_id: transformers finds a sequence's last real token by it, so a scalar head needs one.
    """
    family = FAMILIES[config.family]
    hf = {key: value for key, value in source.items() if key not in _DROPPED}
    architecture = family.causal
    if config.scalar_head:
        architecture = family.scalar or f"{family.causal.removesuffix('ForCausalLM')}ForScalarHead"
        hf |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if pad_token_id is not None:
        hf["pad_token_id"] = pad_token_id
    return hf | {"architectures": [architecture], "dtype": dtype}
