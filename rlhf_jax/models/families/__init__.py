"""Families of checkpoints: config.json <-> DecoderConfig, and paths of parameters <-> names of tensors.

A new family is a table, a reader of its config.json and, at most, one new choice in `DecoderConfig`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import bloom_falcon_phi, gemma, gpt, llama, moe
from rlhf_jax.models.families.containers import text_config, text_name
from rlhf_jax.models.families.hf_fields import positive_int, refuse
from rlhf_jax.models.families.spellings import with_all_spellings
from rlhf_jax.models.families.tensors import Checkpoint, Family, HfTensor, Tensors

# Embeddings and heads are padded to a multiple of this, so that common numbers of devices split them evenly.
VOCAB_MULTIPLE = 128

FAMILIES: dict[str, Family] = gpt.FAMILIES | bloom_falcon_phi.FAMILIES | llama.FAMILIES | gemma.FAMILIES | moe.FAMILIES


def decoder_config(hf: Mapping[str, Any], *, scalar_head: bool, vocab_parts: int = 1) -> DecoderConfig:
    """The architecture that a config.json describes.

    Args:
        hf: the parsed config.json, of a multimodal folder too, whose text model it is then; absent keys, other than
            sizes, take the default of transformers.
        scalar_head: a reward model or critic instead of a language model.
        vocab_parts: number of shards of the vocabulary.
    Raises:
        ValueError: an unsupported model_type or variant, an absent size, or a value of a wrong kind.
    """
    hf = text_config(hf)
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f'model_type "{family}" is not supported; supported: {", ".join(sorted(FAMILIES))}')
    if hf.get("quantization_config"):
        raise ValueError("a quantised checkpoint (quantization_config) is not supported: use the unquantised one")
    refuse(hf, is_causal=True, per_layer_config={}, is_encoder_decoder=False)
    if scalar_head and (labels := _num_labels(hf)) > 1:
        raise ValueError(f"the model has {labels} labels, and a reward model has one (id2label of config.json)")
    vocab, multiple = positive_int(hf, "vocab_size"), math.lcm(VOCAB_MULTIPLE, vocab_parts)
    try:
        fields = FAMILIES[family].read(hf)
    except (TypeError, AttributeError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(
            f"config.json of this {family} has a value of a wrong kind ({error}): compare it with the hub's"
        ) from error
    return DecoderConfig(
        family=family, padded_vocab=-(-vocab // multiple) * multiple, scalar_head=scalar_head, **fields
    )


def _num_labels(hf: Mapping[str, Any]) -> int:
    """Number of labels of a classifier; 0 where config.json describes none or does not give it."""
    is_classifier = any(name.endswith("ForSequenceClassification") for name in hf.get("architectures") or ())
    return len(hf.get("id2label") or ()) or hf.get("num_labels") or 0 if is_classifier else 0


def hf_tensors(config: DecoderConfig) -> Tensors:
    """{path: its tensor in a checkpoint} of every parameter of this model, in the layout of the hub."""
    return _select(config, FAMILIES[config.family].tensors(config))


def head_tensor(config: DecoderConfig) -> HfTensor | None:
    """The tensor of the head, which a tied model's folder may have too."""
    return FAMILIES[config.family].tensors(config).get("head/kernel")


def embedding_names(config: DecoderConfig) -> dict[str, set[str]]:
    """{path: names of its module in the files} of the embedding and of a linear head, also where they are tied."""
    paths = ("embed/tokens", "head/kernel")
    return {path: {name.removesuffix(".weight") for name in _all_names(config, path)} for path in paths}


def alternative_tensors(config: DecoderConfig) -> list[Tensors]:
    """The same in the other layouts that folders of this family may have."""
    return [_select(config, table) for table in FAMILIES[config.family].alternatives(config)]


def _select(config: DecoderConfig, table: Tensors) -> Tensors:
    return {path: table[path] for path in abstract_params(config.without_lora())}


# Heads of values, as TRL and LLaMA-Factory, DeepSpeed-Chat, and OpenRLHF name them; all are read as the scalar head.
HEADS_OF_VALUES = ("v_head.summary.weight", "v_head.weight", "value_head.weight")
OTHER_HEADS = re.compile(r"(v_head|value_head|score)\..*")


def checkpoint_of(config: DecoderConfig, optional: tuple[str, ...] = (), *, in_container: bool = False) -> Checkpoint:
    """The tensors of folders of this model.

    A tied model's embedding may be stored under the name of the head alone, and a scalar head as a head of values.

    Args:
        optional: paths of parameters that the folders may lack.
        in_container: the folders are multimodal.
    """
    layouts = [hf_tensors(config), *alternative_tensors(config)]
    renamed: list[Tensors] = [{}]
    if config.scalar_head:
        shape = (1, config.embed_size)
        renamed += [{"score/kernel": HfTensor(name, shape, transpose=True)} for name in HEADS_OF_VALUES]
    if config.tied:
        heads, shape = sorted(_all_names(config, "head/kernel")), (config.vocab_size, config.embed_size)
        renamed += [{**other, "embed/tokens": HfTensor(head, shape)} for other in renamed for head in heads]
    return Checkpoint(
        [{**layout, **other} for other, layout in itertools.product(renamed, layouts)],
        base_prefix(config),
        optional,
        ignored_names(config),
        OTHER_HEADS,
        tied_names(config),
        functools.partial(text_name, in_container=in_container),
    )


def base_prefix(config: DecoderConfig) -> str:
    """Prefix of the names of the base model's tensors, absent where the folder holds a base model alone."""
    return FAMILIES[config.family].prefix


def ignored_names(config: DecoderConfig) -> re.Pattern[str]:
    """Names that a checkpoint may have besides `hf_tensors`: buffers, and a head that this model does not use."""
    family = FAMILIES[config.family]
    names = [r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)", r"(.*\.)?position_ids"]
    names += [rf"({re.escape(family.prefix)})?({family.buffers})"]
    if config.tied or config.scalar_head:
        unused = {"head/kernel", "head/bias"} - abstract_params(config).keys()
        names += [re.escape(name) for path in sorted(unused) for name in _all_names(config, path)]
    return re.compile("|".join(names))


def tied_names(config: DecoderConfig) -> dict[str, str]:
    """{name of a head: name of the embedding}, one of which a folder of a tied model may lack."""
    if not config.tied or config.scalar_head:
        return {}
    (embedding,) = _all_names(config, "embed/tokens")
    return dict.fromkeys(_all_names(config, "head/kernel"), embedding)


def _all_names(config: DecoderConfig, path: str) -> set[str]:
    family = FAMILIES[config.family]
    tables = [family.tensors(config), *family.alternatives(config)]
    return {table[path].name for table in tables if path in table}


def hf_config(source: Mapping[str, Any], config: DecoderConfig, *, dtype: str, pad_token_id: int | None) -> dict:
    """The config.json of an export: that of the source with the changes of training, see `with_all_spellings`.

    auto_map is left out, as it names code that is not in the written folder.
    A scalar head of a family for which transformers has no such model gets an architecture named by this package, which
    reads it; transformers does not.

    Args:
        source: the config.json that `config` was read from.
        dtype: of the exported tensors, "float32", "bfloat16" or "float16".
        pad_token_id: transformers finds a sequence's last real token by it, so a scalar head needs one; None: that of
            the source.
    """
    family = FAMILIES[config.family]
    hf = {key: value for key, value in source.items() if key != "auto_map"}
    architecture = family.causal
    if config.scalar_head:
        architecture = family.scalar or f"{family.causal.removesuffix('ForCausalLM')}ForScalarHead"
        if _num_labels(hf) != 1:
            hf.pop("problem_type", None)
            hf |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if pad_token_id is not None:
        hf["pad_token_id"] = pad_token_id
    hf |= {"architectures": [architecture], "tie_word_embeddings": config.tied, "dtype": dtype, "torch_dtype": dtype}
    return with_all_spellings(hf)
