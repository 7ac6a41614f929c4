"""Multimodal folders: the config.json of the text model that they contain, and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# {model_type of a folder: model_types of text models that compute for text alone what they compute in it, the first of
# them where text_config names none}. Those of Qwen rotate by three positions, which are equal in a text.
CONTAINERS = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("mistral",),
    "llava": ("llama", "mistral", "qwen2"),
    "llava_next": ("llama", "mistral", "qwen2"),
    "qwen2_vl": ("qwen2",),
    "qwen2_5_vl": ("qwen2",),
}
# Where the folder does not say: transformers' tie_word_embeddings of the classes that differ from `false`.
_TIED = ("gemma3", "mistral3")
# Sizes that text_config leaves out where they are those of transformers' classes.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES = (*_SIZES, "max_position_embeddings")
_DEFAULTS = {
    "gemma3_text": (262208, 2304, 9216, 26, 8, 131072),
    "llama": (32000, 4096, 11008, 32, 32, 2048),
    "mistral": (32000, 4096, 14336, 32, 32, 131072),
}
_OF_ALL = (  # keys of the whole folder that are true of its text model
    "architectures bos_token_id eos_token_id pad_token_id dtype torch_dtype transformers_version quantization_config "
    "num_labels id2label label2id problem_type"
).split()
# In the order in which they are tried: prefixes in the files, and those in a folder of the text model alone.
_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.": "model.",
    **{name: name for name in ("lm_head.", "score.", "v_head.")},
    **{name: name for name in ("model.embed_tokens.", "model.layers.", "model.norm.")},
}
# Classes that hold a whole model in an attribute, and their files therefore each name after it: TRL, DeepSpeed-Chat.
_WRAPPERS = re.compile(r"(pretrained_model|rwtransformer)\.")


def is_container(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a multimodal folder whose text model is read."""
    return hf.get("model_type") in CONTAINERS


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model of a multimodal folder; that of another folder unchanged.

    Raises:
        ValueError: a multimodal folder, or a text model in it, that is not supported.
    """
    kind, text = hf.get("model_type"), hf.get("text_config")
    if not is_container(hf):
        if isinstance(text, Mapping):
            raise ValueError(
                f'multimodal folders of model_type "{kind}" are not supported; supported, for their text model: '
                f"{', '.join(CONTAINERS)}"
            )
        return dict(hf)
    is_qwen = kind.startswith("qwen")
    if not isinstance(text, Mapping):
        if not is_qwen:
            raise ValueError(f"config.json of this {kind} has no text_config: download it again")
        text = {key: value for key, value in hf.items() if key != "vision_config"}  # as Qwen published it
    known = CONTAINERS[kind]
    text_kind = known[0] if is_qwen else text.get("model_type") or known[0]
    if text_kind not in known:
        raise ValueError(f"{kind} over {text_kind} is not supported; supported: {kind} over {', '.join(known)}")
    sizes = dict(zip(_SIZES, _DEFAULTS.get(text_kind, ()), strict=False))
    text = {**text, **{key: size for key, size in sizes.items() if text.get(key) is None}}
    text |= {key: hf[key] for key in _OF_ALL if hf.get(key) is not None}
    tied = hf.get("tie_word_embeddings")
    text["tie_word_embeddings"] = (kind in _TIED if tied is None else tied) or bool(text.get("tie_word_embeddings"))
    if is_qwen:
        text |= {"rope_theta": 1e6} if "rope_theta" not in text and "rope_parameters" not in text else {}
        for key in ("rope_scaling", "rope_parameters"):
            text |= {key: _without_sections(text[key])} if text.get(key) else {}
    return text | {"model_type": text_kind}


def _without_sections(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a rotation by three positions as those of one by a single position."""
    kept = {key: value for key, value in rope.items() if key not in ("mrope_section", "type", "rope_type")}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kept | {"rope_type": "default" if kind == "mrope" else kind}


def text_name(name: str, *, in_container: bool) -> str | None:
    """The name that a tensor of a folder has in a folder of the text model alone; None: it is not of the text model."""
    name = _WRAPPERS.sub("", name, count=1) if _WRAPPERS.match(name) else name
    if not in_container:
        return name
    found = (own + name.removeprefix(prefix) for prefix, own in _PREFIXES.items() if name.startswith(prefix))
    return next(found, None)


def names_in_container(name: str) -> list[str]:
    """The names that a tensor of a text model, or a template of them, may have in a multimodal folder."""
    return [prefix + name.removeprefix(own) for prefix, own in _PREFIXES.items() if name.startswith(own)]
