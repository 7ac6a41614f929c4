"""What each family of checkpoints calls things: config.json <-> DecoderConfig, and our paths <-> tensor names.

A new family is a table, a reader of its config.json and, at most, one new choice in `DecoderConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_jax.models.decoder import DecoderConfig, abstract_params

# Embeddings and heads are padded to a multiple of this, so that any usual number of devices splits them evenly.
VOCAB_MULTIPLE = 128


class HfTensor(NamedTuple):
    """A parameter as it lies in a checkpoint."""

    name: str  # "{i}" stands for the layer: ours are stacked, theirs are not
    transform: str  # "same"; "transpose": theirs are [out, in]; "rows": ours has further rows of zeros
    shape: tuple[int, ...]  # in the file, of one layer


def _linears(ours_to_theirs: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Kernel and bias of each linear."""
    table = {}
    for ours, theirs in ours_to_theirs.items():
        table[f"{ours}/kernel"] = (f"{theirs}.weight", "transpose")
        table[f"{ours}/bias"] = (f"{theirs}.bias", "same")
    return table


def _norms(ours_to_theirs: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Scale and bias of each norm."""
    table = {}
    for ours, theirs in ours_to_theirs.items():
        table[f"{ours}/scale"] = (f"{theirs}.weight", "same")
        table[f"{ours}/bias"] = (f"{theirs}.bias", "same")
    return table


_HEADS = {"head/kernel": ("lm_head.weight", "rows"), "score/kernel": ("score.weight", "transpose")}

# Every name that a family may have; which of them a checkpoint has follows from `abstract_params`.
TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "opt": {
        "embed/tokens": ("model.decoder.embed_tokens.weight", "rows"),
        "embed/positions": ("model.decoder.embed_positions.weight", "same"),
        **_norms(
            {
                "final_norm": "model.decoder.final_layer_norm",
                "layers/attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
                "layers/mlp_norm": "model.decoder.layers.{i}.final_layer_norm",
            }
        ),
        **_linears(
            {
                "project_in": "model.decoder.project_in",
                "project_out": "model.decoder.project_out",
                "layers/attention/q": "model.decoder.layers.{i}.self_attn.q_proj",
                "layers/attention/k": "model.decoder.layers.{i}.self_attn.k_proj",
                "layers/attention/v": "model.decoder.layers.{i}.self_attn.v_proj",
                "layers/attention/o": "model.decoder.layers.{i}.self_attn.out_proj",
                "layers/mlp/up": "model.decoder.layers.{i}.fc1",
                "layers/mlp/down": "model.decoder.layers.{i}.fc2",
            }
        ),
        **_HEADS,
    },
    "llama": {
        "embed/tokens": ("model.embed_tokens.weight", "rows"),
        **_norms(
            {
                "final_norm": "model.norm",
                "layers/attention_norm": "model.layers.{i}.input_layernorm",
                "layers/mlp_norm": "model.layers.{i}.post_attention_layernorm",
            }
        ),
        **_linears(
            {
                "layers/attention/q": "model.layers.{i}.self_attn.q_proj",
                "layers/attention/k": "model.layers.{i}.self_attn.k_proj",
                "layers/attention/v": "model.layers.{i}.self_attn.v_proj",
                "layers/attention/o": "model.layers.{i}.self_attn.o_proj",
                "layers/mlp/gate": "model.layers.{i}.mlp.gate_proj",
                "layers/mlp/up": "model.layers.{i}.mlp.up_proj",
                "layers/mlp/down": "model.layers.{i}.mlp.down_proj",
            }
        ),
        **_HEADS,
    },
}

_ARCHITECTURES = {  # of a language model, of a scalar head
    "opt": ("OPTForCausalLM", "OPTForSequenceClassification"),
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
}
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}


def hf_tensors(config: DecoderConfig) -> dict[str, HfTensor]:
    """{path: where a checkpoint has it}, for every parameter of this model."""
    table = TABLES[config.family]
    tensors = {}
    for path, leaf in abstract_params(config).items():
        name, transform = table[path]
        shape = leaf.shape[1:] if "{i}" in name else leaf.shape
        if transform == "transpose":
            shape = shape[::-1]
        elif transform == "rows":
            shape = (config.vocab_size, *shape[1:])
        tensors[path] = HfTensor(name, transform, shape)
    return tensors


def tolerated_surplus(config: DecoderConfig) -> re.Pattern[str]:
    """Names that a checkpoint may have beyond `hf_tensors`: buffers, and a head that this model does not use."""
    names = [r".*\.rotary_emb\.inv_freq"]
    if config.tied or config.scalar_head:
        names.append(r"lm_head\.weight")
    return re.compile("|".join(names))


def decoder_config(hf: Mapping[str, Any], *, scalar_head: bool) -> DecoderConfig:
    """The architecture that a config.json describes.

    Args:
        hf: the parsed config.json; what it leaves out takes the default of transformers.
        scalar_head: a reward model or critic in place of a language model.
    Raises:
        ValueError: an unsupported model_type or variant, or a size that is absent.
    """
    readers = {"opt": _opt_config, "llama": _llama_config}
    family = hf.get("model_type")
    if family not in readers:
        raise ValueError(f'model_type "{family}" is not supported; supported: {", ".join(sorted(readers))}')
    if hf.get("quantization_config"):
        raise ValueError("a quantised checkpoint (quantization_config) is not supported: use the unquantised one")
    vocab = _size(hf, "vocab_size")
    return DecoderConfig(
        family=family,
        vocab_size=vocab,
        padded_vocab=-(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=_size(hf, "hidden_size"),
        num_layers=_size(hf, "num_hidden_layers"),
        num_heads=_size(hf, "num_attention_heads"),
        max_positions=_size(hf, "max_position_embeddings"),
        scalar_head=scalar_head,
        **readers[family](hf),
    )


def _opt_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    if not hf.get("layer_norm_elementwise_affine", True):
        raise ValueError("OPT with layer_norm_elementwise_affine=false is not supported")
    hidden, heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
    if hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    pre_norm, biased = hf.get("do_layer_norm_before", True), hf.get("enable_bias", True)
    return dict(
        embed_size=_given(hf, "word_embed_proj_dim", hidden),
        num_kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=_size(hf, "ffn_dim"),
        activation=_activation(hf, "activation_function", "relu"),
        gated_mlp=False,
        norm="layer",
        norm_eps=1e-5,  # torch's default, which OPT does not change
        post_norm=not pre_norm,
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        rope_theta=0.0,
        attention_bias=biased,
        mlp_bias=biased,
        tied=hf.get("tie_word_embeddings", True),
    )


def _llama_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
    kv_heads = _given(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if not _given(hf, "head_dim", 0) and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    # transformers 5 writes rope_parameters; before, it was rope_theta beside rope_scaling, with "type" for "rope_type".
    rope = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f'LLaMA with rope scaling "{kind}" is not supported; supported: default (LLaMA 1 and 2)')
    if _given(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("LLaMA with partial_rotary_factor other than 1 is not supported")
    return dict(
        embed_size=hidden,
        num_kv_heads=kv_heads,
        head_dim=_given(hf, "head_dim", hidden // heads),
        mlp_size=_size(hf, "intermediate_size"),
        activation=_activation(hf, "hidden_act", "silu"),
        gated_mlp=True,
        norm="rms",
        norm_eps=float(_given(hf, "rms_norm_eps", 1e-6)),
        post_norm=False,
        final_norm=True,
        rope_theta=float(_given(rope, "rope_theta", 10000.0)),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        tied=hf.get("tie_word_embeddings", False),
    )


def _size(hf: Mapping[str, Any], key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} has to be a whole number of at least 1, not {value!r}")
    return value


def _given(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value, or the default where it is absent or null."""
    value = hf.get(key)
    return default if value is None else value


def _activation(hf: Mapping[str, Any], key: str, default: str) -> str:
    name = hf.get(key, default)
    if name not in _ACTIVATIONS:
        raise ValueError(f'{key} "{name}" is not supported; supported: {", ".join(_ACTIVATIONS)}')
    return _ACTIVATIONS[name]


def hf_config(source: Mapping[str, Any], config: DecoderConfig, *, dtype: str, pad_token_id: int | None) -> dict:
    """The config.json of an export: the source's, with what the training changed.

    Args:
        source: the config.json that `config` came from.
        dtype: of the exported tensors, "float32", "bfloat16" or "float16".
        pad_token_id: transformers finds a sequence's last real token by it, so a scalar head needs one.
    """
    dropped = {"torch_dtype", "transformers_version", "_name_or_path", "num_labels", "id2label", "label2id"}
    hf = {key: value for key, value in source.items() if key not in dropped}
    hf |= {"architectures": [_ARCHITECTURES[config.family][config.scalar_head]], "dtype": dtype}
    hf["pad_token_id"] = pad_token_id
    if config.scalar_head:
        hf |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return hf
