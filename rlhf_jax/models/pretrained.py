"""Hugging Face folders in and out, and the two things to do with a model that need no engine: `apply` and `score`."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
from rlhf_jax.models.decoder import DecoderConfig, abstract_params, bind, head_kernel, last_hidden, scalar
from rlhf_jax.models.families import decoder_config, hf_config, hf_tensors, tolerated_surplus
from rlhf_jax.models.safetensors_io import pickle_refusal, read_params, write_params

DTYPES = ("float32", "bfloat16", "float16")
_SCORE = "score/kernel"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]


@dataclass(frozen=True)
class Pretrained:
    """A language model, or a reward model where config.scalar_head, on its devices."""

    config: DecoderConfig
    params: dict[str, jax.Array]  # {path: array}, as `abstract_params(config)` lists them
    tokenizer: Any  # a transformers tokenizer; None if the folder has none
    hf_config: dict[str, Any]  # the config.json it came from
    generation_config: dict[str, Any]  # generation_config.json; {} if there was none
    layout: Layout


def from_pretrained(path_or_id: str | Path, *, mesh: Mesh | None = None, dtype: str = "float32") -> Pretrained:
    """A language model from a Hugging Face folder, or from the hub.

    Args:
        path_or_id: a folder with config.json and safetensors; where there is no such folder, an id of the hub.
        mesh: a ("data", "fsdp", "tensor") mesh, over which parameters are split as in training; None: one device.
        dtype: of the parameters, "float32", "bfloat16" or "float16".
    Raises:
        ValueError: no such folder or id, only a pickle, an unsupported architecture, or tensors that do not fit.
    """
    return _load(path_or_id, scalar_head=False, mesh=mesh, dtype=dtype, seed=0)


def reward_from_pretrained(
    path_or_id: str | Path, *, mesh: Mesh | None = None, dtype: str = "float32", seed: int = 0
) -> Pretrained:
    """A model with a scalar head; from a language model, whose head is left out, the new one is random and logged.

    Args:
        seed: of a new head, drawn from N(0, 1 / (E + 1)) as by Stiennon et al. 2020 (arXiv 2009.01325), code release.
        Others, and what is raised: as `from_pretrained`.
    """
    return _load(path_or_id, scalar_head=True, mesh=mesh, dtype=dtype, seed=seed)


def _load(path_or_id: str | Path, *, scalar_head: bool, mesh: Mesh | None, dtype: str, seed: int) -> Pretrained:
    if dtype not in DTYPES:
        raise ValueError(f'dtype "{dtype}" is not supported; supported: {", ".join(DTYPES)}')
    folder = _folder(path_or_id)
    hf = _read_json(folder / "config.json")
    config = decoder_config(hf, scalar_head=scalar_head)
    layout = Layout(single_device_mesh() if mesh is None else mesh, TRAIN)
    leaves = abstract_params(config)
    params = read_params(
        folder,
        leaves,
        hf_tensors(config),
        layout,
        dtype,
        optional=(_SCORE,) if scalar_head else (),
        tolerated=tolerated_surplus(config),
    )
    if scalar_head and _SCORE not in params:
        logging.getLogger(__name__).warning(f"{folder} has no score.weight: the scalar head starts at random")
        params[_SCORE] = _new_score(config, layout, dtype, seed)
    generation = folder / "generation_config.json"
    return Pretrained(
        config=config,
        params={path: params[path] for path in leaves},
        tokenizer=_tokenizer(folder, config),
        hf_config=hf,
        generation_config=_read_json(generation) if generation.exists() else {},
        layout=layout,
    )


def _new_score(config: DecoderConfig, layout: Layout, dtype: str, seed: int) -> jax.Array:
    leaf = abstract_params(config)[_SCORE]

    def init(key):
        return (jax.random.normal(key, leaf.shape) * (config.embed_size + 1) ** -0.5).astype(dtype)

    return jax.jit(init, out_shardings=layout.sharding(leaf.axes))(jax.random.key(seed))


def _folder(path_or_id: str | Path) -> Path:
    """The local folder, downloaded where there is none of this name."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {folder}")
    # Imported where used: with transformers it takes seconds, and torch where that is installed.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name} is neither a folder here nor to be had from the Hugging Face hub: {reason}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(pickle_refusal(name, f"{name} has weights on the hub", name.split("/")[-1]))
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}: is {path.parent} a Hugging Face model folder?") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error


def _tokenizer(folder: Path, config: DecoderConfig) -> Any:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # here for the same reason as in `_folder`

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} ids, its model only {config.vocab_size}: "
            "they do not belong together, take both from one checkpoint"
        )
    return tokenizer


def save_pretrained(
    model: Pretrained, folder: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Write a Hugging Face folder: config.json, generation_config.json, safetensors and the tokenizer's files.

    A scalar head becomes ...ForSequenceClassification with one label. The folder appears complete or not at all.

    Args:
        folder: where to; its parents are made.
        dtype: of the files; None: that of the parameters.
        overwrite: replace a folder that is there already.
    Raises:
        ValueError: the folder is there and not empty, an unknown dtype, or a scalar head with no pad token to be had.
    """
    dtype = dtype or str(model.params["embed/tokens"].dtype)
    if dtype not in DTYPES:
        raise ValueError(f'dtype "{dtype}" is not supported; supported: {", ".join(DTYPES)}')
    generation = _generation_config(model)
    pad = generation.get("pad_token_id")
    if model.config.scalar_head and pad is None:
        raise ValueError("a scalar head is exported with a pad token: set tokenizer.pad_token")
    with _replaced(Path(folder).expanduser(), overwrite) as unfinished:
        config = hf_config(model.hf_config, model.config, dtype=dtype, pad_token_id=pad)
        _write_json(unfinished / "config.json", config)
        if not model.config.scalar_head:
            _write_json(unfinished / "generation_config.json", generation)
        write_params(unfinished, model.params, hf_tensors(model.config), dtype)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(unfinished)


def _generation_config(model: Pretrained) -> dict[str, Any]:
    """The source's, with every id that ends an answer, by whichever of the three places knows it."""
    known = {key: model.hf_config.get(key) for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    config = {key: value for key, value in known.items() if value is not None} | model.generation_config
    ends: list[int] = []
    for place in (known["eos_token_id"], model.generation_config.get("eos_token_id")):
        ends += place if isinstance(place, list) else [place]
    if model.tokenizer is not None:
        ends.append(model.tokenizer.eos_token_id)
        if model.tokenizer.pad_token_id is not None:
            config["pad_token_id"] = model.tokenizer.pad_token_id
    ends = sorted({end for end in ends if end is not None})
    if ends:
        config["eos_token_id"] = ends
        config.setdefault("pad_token_id", ends[0])
    return config


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextmanager
def _replaced(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `folder`, which takes its place when the body has ended well."""
    unfinished, old = (folder.with_name(f"{folder.name}.{state}") for state in ("unfinished", "old"))
    if folder.exists() and not overwrite and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty: remove it, or choose another folder")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    unfinished.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def apply(model: Pretrained, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Logits of a language model.

    Args:
        input_ids: [B, T] int.
        attention_mask: [B, T] int or bool, true on real tokens; padding may lie on either side.
    Returns:
        [B, T, V] float32; arbitrary but finite on padding.
    Raises:
        ValueError: a scalar head, shapes that differ, or more positions than the model has.
    """
    if model.config.scalar_head:
        raise ValueError("this model has a scalar head and no logits: use score")
    return _call(_logits, model, input_ids, attention_mask)


def score(scorer: Pretrained, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """What the scalar head says at the last real token of each row.

    Args:
        input_ids: [B, T] int.
        attention_mask: [B, T] int or bool, true on real tokens, of which each row has at least one.
    Returns:
        [B] float32.
    Raises:
        ValueError: no scalar head, shapes that differ, or more positions than the model has.
    """
    if not scorer.config.scalar_head:
        raise ValueError("this model has no scalar head: load it with reward_from_pretrained")
    return _call(_scores, scorer, input_ids, attention_mask)


def _call(program, model: Pretrained, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    tokens, mask = jnp.asarray(input_ids, jnp.int32), jnp.asarray(attention_mask, bool)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(f"input_ids {tokens.shape} and attention_mask {mask.shape} have to be [B, T] both")
    if tokens.shape[1] > model.config.max_positions:
        raise ValueError(
            f"{tokens.shape[1]} positions are more than the model's {model.config.max_positions}: cut them"
        )
    # A batch that does not divide is left to the compiler: anybody's three rows have to work on eight devices too.
    divides = tokens.shape[0] % model.layout.shards("batch") == 0
    return program(model.config, model.layout if divides else None, model.params, tokens, mask)


def _hidden(config: DecoderConfig, layout: Layout | None, params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    dtype = params["embed/tokens"].dtype
    return bind(config, params)(tokens, mask, dtype=dtype, layout=layout, remat=False)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config: DecoderConfig, layout: Layout | None, params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("float32"):  # a GPU would round float32 to TF32
        hidden = _hidden(config, layout, params, tokens, mask)
        head = head_kernel(config, params)[:, : config.vocab_size]
        return jnp.einsum("bte,ev->btv", hidden, head, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(config: DecoderConfig, layout: Layout | None, params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        hidden = _hidden(config, layout, params, tokens, mask)
        return scalar(params, last_hidden(hidden, mask))
