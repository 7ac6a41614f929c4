"""The keys of an exported config.json: values that transformers would assume, and older spellings of newer keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

LOGGER = logging.getLogger(__name__)

# Ids of tokens are those of the tokenizer, and an absent one is none.
_NOT_ASSUMED = ("transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters")
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def with_all_spellings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the values that transformers assumes for absent keys, and with older keys next to newer ones.

    mlx-lm, CTranslate2, keras-hub, llama.cpp and transformers 4 read only the older keys, and some assume other values
    than transformers where a key is absent. No key of `hf` with a value is changed.
    """
    from huggingface_hub.errors import StrictDataclassError  # imported where used: with transformers it takes seconds
    from transformers import AutoConfig

    try:
        full = AutoConfig.for_model(**hf).to_diff_dict()
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        LOGGER.warning(f"transformers does not read this config.json, which is exported as it is: {error}")
        full = {}
    if full.get("multi_query") and not full.get("new_decoder_architecture"):
        full["num_kv_heads"] = 1  # transformers assumes one per head and does not use it; llama.cpp and others do
    assumed = {key: value for key, value in full.items() if key not in _NOT_ASSUMED}
    known = assumed | dict(hf)
    return known | {key: value for key, value in _older_keys(full | known).items() if known.get(key) is None}


def _older_keys(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4 for those of version 5, and what other programs require."""
    rope = hf.get("rope_parameters") or {}
    local, rope = rope.get("sliding_attention") or {}, rope.get("full_attention") or rope
    older = {key: rope[key] for key in _NOT_SCALING if key in rope}
    if hf["model_type"] == "gpt_neox":
        older = {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        older["rope_scaling"] = {"type": kind} | {key: rope[key] for key in rope.keys() - {*_NOT_SCALING}}
        if older["rope_scaling"].keys() == {"type", "rope_type", "factor"}:  # OLMo 2 allows no more than two keys
            del older["rope_scaling"]["rope_type"]
        if hf["model_type"] == "phi3":  # transformers 4 allows three keys, and has the original positions outside
            positions = "original_max_position_embeddings"
            older[positions] = rope.get(positions)
            more = rope.keys() - {*_NOT_SCALING, "rope_type", "factor", positions, "short_factor", "long_factor"}
            three = {key: rope.get(key) for key in ("short_factor", "long_factor")} | {"type": kind}
            older["rope_scaling"] = None if more else three
    if "rope_theta" in local:
        older["rope_local_base_freq"] = local["rope_theta"]
        full_layers = [i + 1 for i, kind in enumerate(hf["layer_types"]) if kind == "full_attention"]
        every = full_layers[0] if full_layers else len(hf["layer_types"]) + 1
        if full_layers == list(range(every, len(hf["layer_types"]) + 1, every)):
            older["sliding_window_pattern"] = every
    for one, other in (("num_experts", "num_local_experts"), ("n_ctx", "n_positions"), ("torch_dtype", "dtype")):
        older |= {one: hf[other]} if hf.get(other) is not None else {}
        older |= {other: hf[one]} if one != "n_ctx" and hf.get(one) is not None else {}
    return {key: value for key, value in older.items() if value is not None}
