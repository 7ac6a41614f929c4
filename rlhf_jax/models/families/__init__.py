"""What each family of checkpoints calls things: config.json <-> DecoderConfig, and our paths <-> tensor names.

A new family is a table, a reader of its config.json and, at most, one new choice in `DecoderConfig`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import bloom_falcon_phi, gemma, gpt, llama, moe
from rlhf_jax.models.families.hf_fields import positive_int, refuse
from rlhf_jax.models.families.tensors import Checkpoint, Family, Tensors

# Embeddings and heads are padded to a multiple of this, so that any usual number of devices splits them evenly.
VOCAB_MULTIPLE = 128

FAMILIES: dict[str, Family] = gpt.FAMILIES | bloom_falcon_phi.FAMILIES | llama.FAMILIES | gemma.FAMILIES | moe.FAMILIES


def decoder_config(hf: Mapping[str, Any], *, scalar_head: bool, vocab_parts: int = 1) -> DecoderConfig:
    """The architecture that a config.json describes.

    Args:
        hf: the parsed config.json; what it leaves out, sizes excepted, takes the default of transformers.
        scalar_head: a reward model or critic in place of a language model.
        vocab_parts: into how many the vocabulary is going to be split.
    Raises:
        ValueError: an unsupported model_type or variant, a size that is absent, or a value of a wrong kind.
    """
    family = hf.get("model_type")
    if f"{family}_text" in FAMILIES or hf.get("text_config") is not None:
        text = f"{family}_text"
        fix = f": only its text model, {text}, is, in a folder of its own" if text in FAMILIES else ""
        raise ValueError(f"{family} is multimodal, which is not supported{fix}")
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
    """Of a classifier; 0 where config.json is not of one or does not say."""
    is_classifier = any(name.endswith("ForSequenceClassification") for name in hf.get("architectures") or ())
    return len(hf.get("id2label") or ()) or hf.get("num_labels") or 0 if is_classifier else 0


def hf_tensors(config: DecoderConfig) -> Tensors:
    """{path: where a checkpoint has it}, for every parameter of this model, in the layout of the hub."""
    table = FAMILIES[config.family].tensors(config)
    return {path: table[path] for path in abstract_params(config.without_lora())}


def alternative_tensors(config: DecoderConfig) -> list[Tensors]:
    """The same in other layouts, where folders of this family may have them."""
    tables = FAMILIES[config.family].alternatives(config)
    return [{path: table[path] for path in abstract_params(config.without_lora())} for table in tables]


def checkpoint_of(config: DecoderConfig, optional: tuple[str, ...] = ()) -> Checkpoint:
    """What folders of this model hold, which may lack the parameters at the `optional` paths."""
    layouts = [hf_tensors(config), *alternative_tensors(config)]
    return Checkpoint(layouts, base_prefix(config), optional, ignored_names(config), tied_names(config))


def base_prefix(config: DecoderConfig) -> str:
    """What names of the base model's tensors begin with, unless the folder holds a base model alone."""
    return FAMILIES[config.family].prefix


def ignored_names(config: DecoderConfig) -> re.Pattern[str]:
    """Names that a checkpoint may have beyond `hf_tensors`: buffers, and a head that this model does not use."""
    family = FAMILIES[config.family]
    names = [r".*\.rotary_emb\.inv_freq", rf"({re.escape(family.prefix)})?({family.buffers})"]
    if config.tied or config.scalar_head:
        unused = {"head/kernel", "head/bias"} - abstract_params(config).keys()
        names += [re.escape(name) for path in sorted(unused) for name in _all_names(config, path)]
    return re.compile("|".join(names))


def tied_names(config: DecoderConfig) -> dict[str, str]:
    """{name of a head: name of the embedding} that have to be the same where a folder of a tied model has both."""
    if not config.tied or config.scalar_head:
        return {}
    (embedding,) = _all_names(config, "embed/tokens")
    return dict.fromkeys(_all_names(config, "head/kernel"), embedding)


def _all_names(config: DecoderConfig, path: str) -> set[str]:
    family = FAMILIES[config.family]
    tables = [family.tensors(config), *family.alternatives(config)]
    return {table[path].name for table in tables if path in table}


def hf_config(source: Mapping[str, Any], config: DecoderConfig, *, dtype: str, pad_token_id: int | None) -> dict:
    """The config.json of an export: the source's, with what the training changed.

    auto_map is left out, as it names code that is not in the folder that we write.
    A scalar head of a family for which transformers has no such model gets an architecture of our own naming: we read
    it, transformers does not.

    Args:
        source: the config.json that `config` came from.
        dtype: of the exported tensors, "float32", "bfloat16" or "float16".
        pad_token_id: transformers finds a sequence's last real token by it, so a scalar head needs one; None: the
            source's stays.
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
    spelled = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype"]
    return hf | {"architectures": [architecture]} | dict.fromkeys(spelled, dtype)
