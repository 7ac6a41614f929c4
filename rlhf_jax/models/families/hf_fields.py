"""Readers of the keys of config.json that several families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def positive_int(hf: Mapping[str, Any], key: str) -> int:
    """The whole number of at least 1 under this key; ValueError for any other value."""
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} has to be a whole number of at least 1, not {value!r}")
    return value


def value_or(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value, or the default where it is absent or null."""
    value = hf.get(key)
    return default if value is None else value


def activation(hf: Mapping[str, Any], key: str, default: str) -> str:
    name = value_or(hf, key, default)
    if name not in _ACTIVATIONS:
        raise ValueError(f'config.json: {key} "{name}" is not supported; supported: {", ".join(_ACTIVATIONS)}')
    return _ACTIVATIONS[name]


def refuse(hf: Mapping[str, Any], **expected: Any) -> None:
    """Raise ValueError naming every key that is set, not to null, to another value than the supported one."""
    family = hf.get("model_type")
    wrong = [f"{key}={hf[key]!r}" for key, value in expected.items() if value_or(hf, key, value) != value]
    if wrong:
        raise ValueError(f"{family} with {', '.join(wrong)} is not supported (config.json)")


def head_size(hf: Mapping[str, Any], hidden: str, heads: str) -> int:
    """hidden / heads; ValueError where that is not a whole number."""
    if positive_int(hf, hidden) % positive_int(hf, heads):
        raise ValueError(f"config.json: {hidden} {hf[hidden]} is not a multiple of {heads} {hf[heads]}")
    return hf[hidden] // hf[heads]


def with_standard_keys(hf: Mapping[str, Any], **usual: str) -> dict[str, Any]:
    """config.json with the keys of a family's own spelling (n_embd="hidden_size") under the usual one.

    Raises:
        ValueError: config.json has both spellings, with different values.
    """
    as_usual = dict(hf)
    for key, name in usual.items():
        value = as_usual.pop(key, None)
        if value is None:
            continue
        if value_or(hf, name, value) != value:
            raise ValueError(f"config.json: {key} {value!r} and {name} {hf[name]!r} mean the same and differ")
        as_usual[name] = value
    return as_usual


def kv_heads(hf: Mapping[str, Any], default: int | None = None) -> int:
    """num_key_value_heads: the number of query heads where null, and where absent and without a default.

    Raises:
        ValueError: the query heads do not share them evenly.
    """
    value, heads = hf.get("num_key_value_heads", default), positive_int(hf, "num_attention_heads")
    value = heads if value is None else positive_int({"num_key_value_heads": value}, "num_key_value_heads")
    if heads % value:
        raise ValueError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {value}")
    return value


def windows(hf: Mapping[str, Any], window: int | None, usual: Sequence[bool]) -> tuple[int, ...]:
    """`DecoderConfig.windows` by layer_types, or by `usual`, which layers have the window, where config.json has none.

    Raises:
        ValueError: an unknown kind of layer, a number of kinds other than that of layers, or no window where a layer
            needs one.
    """
    layers = positive_int(hf, "num_hidden_layers")
    kinds = value_or(hf, "layer_types", ["sliding_attention" if sliding else "full_attention" for sliding in usual])
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise ValueError(
            f"config.json: layer_types has to be sliding_attention or full_attention for each of {layers} layers, "
            f"not {len(kinds)} of them{''.join(f', {kind}' for kind in unknown)}"
        )
    if "sliding_attention" not in kinds:
        return ()
    window = positive_int({"sliding_window": window}, "sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def equal_windows(hf: Mapping[str, Any], window: int | None) -> tuple[int, ...]:
    """The window, or none, in every layer; ValueError for a layer_types that differs."""
    usual = [window is not None] * positive_int(hf, "num_hidden_layers")
    same = windows({**hf, "layer_types": None}, window, usual)
    if windows(hf, window, usual) != same:
        raise ValueError(f"{hf.get('model_type')} with layer_types that differ is not supported (config.json)")
    return same


def biases(value: bool) -> dict[str, bool]:
    """Fields for biases on all linears of a layer, or on none."""
    return dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), value)


def attention_biases(hf: Mapping[str, Any], default: bool = False) -> dict[str, bool]:
    """Fields that attention_bias sets."""
    return dict.fromkeys(("qkv_bias", "o_bias"), value_or(hf, "attention_bias", default))


def common_fields(hf: Mapping[str, Any], act: tuple[str, str], tied: bool, eps: str = "layer_norm_epsilon"):
    """Fields of activation, head and norms.

    Args:
        act: key of the activation, and its default.
        tied: value of an absent tie_word_embeddings.
        eps: key of the norms' epsilon.
    """
    tied = value_or(hf, "tie_word_embeddings", tied)
    return dict(activation=activation(hf, *act), tied=tied, norm_eps=value_or(hf, eps, 1e-5))


def multi_head_sizes(hf: Mapping[str, Any], head_dim: int | None = None, **defaults: int) -> dict[str, Any]:
    """Sizes of a decoder in which each query head has its own keys, and the usual scale of its scores.

    Args:
        hf: config.json in the usual spelling; an absent MLP width is 4 times hidden_size.
        head_dim: None: hidden_size over the number of heads.
        defaults: values of other sizes that may be absent, by their keys.
    """
    d = head_dim or head_size(hf, "hidden_size", "num_attention_heads")
    hidden, heads = positive_int(hf, "hidden_size"), positive_int(hf, "num_attention_heads")
    defaults = {"intermediate_size": 4 * hidden} | defaults
    hf = {**hf, **{key: value_or(hf, key, value) for key, value in defaults.items()}}
    return dict(
        vocab_size=positive_int(hf, "vocab_size"),
        hidden_size=hidden,
        embed_size=hidden,
        num_layers=positive_int(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=d,
        mlp_size=positive_int(hf, "intermediate_size"),
        max_positions=positive_int(hf, "max_position_embeddings"),
        attention_scale=d**-0.5,
    )
