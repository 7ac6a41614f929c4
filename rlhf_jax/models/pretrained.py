"""Hugging Face folders in and out, and the two things to do with a model that need no engine: `apply` and `score`."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import hosts
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, single_device_mesh
from rlhf_jax.models import peft
from rlhf_jax.models.attention import kernel_for_mesh
from rlhf_jax.models.config import Choice, Compute, DecoderConfig
from rlhf_jax.models.containers import write_container
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel, head_options, last_hidden, logits, scalar_scores
from rlhf_jax.models.dtypes import DTYPES, QUANTISED_KINDS
from rlhf_jax.models.families import checkpoint_of, decoder_config, hf_config, hf_tensors
from rlhf_jax.models.families.containers import is_container, text_config
from rlhf_jax.models.hub import is_folder, local_folder, read_json, read_tokenizer, replace_folder, write_json
from rlhf_jax.models.inference import shared_leaves
from rlhf_jax.models.quantised import UNQUANTISED_DTYPE
from rlhf_jax.models.safetensors_io import check_sums, different_twin, read_params, write_params, write_sums
from rlhf_jax.models.tokenizer_files import write_tokenizer
from rlhf_jax.models.unstacked import Param
from rlhf_jax.objectives.logprobs import token_logprobs

LOGGER = logging.getLogger(__name__)
_SCORE = "score/kernel"
LOGPROB_CHUNK = 128  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Pretrained:
    """A language model, or a reward model where config.scalar_head, on its devices."""

    config: DecoderConfig
    params: dict[str, Param]  # {path: array}, as `abstract_params(config)` lists them
    tokenizer: Any  # a transformers tokenizer; None if the folder has none
    hf_config: dict[str, Any]  # the config.json it came from
    generation_config: dict[str, Any]  # generation_config.json; {} if there was none
    layout: Layout
    source: str = ""  # the absolute folder, or the hub id, it came from
    folder: Path | None = None  # its local path
    changed: tuple[str, ...] = ()  # paths of parameters that an adapter has changed as it was read


def from_pretrained(
    path_or_id: str | Path,
    adapter: str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    one_copy: bool = False,
) -> Pretrained:
    """A language model from a Hugging Face folder, or from the hub.

    Args:
        path_or_id: a folder with config.json and safetensors; where there is no such folder, an id of the hub.
        adapter: a PEFT folder (or id) with a LoRA adapter of this model; it is not merged, see `config.lora`.
        mesh: a ("data", "fsdp", "tensor") mesh, over which parameters are split as in training; None: one device.
        dtype: of the parameters, "float32", "bfloat16" or "float16"; "int8" or "nf4": the kernels of the layers'
            linears quantised as they are read (see `models.quantised`), all else bfloat16.
        one_copy: use the generation layout for what it can share with training (see `models.unstacked`).
    Raises:
        ValueError: no such folder or id, only a pickle, an unsupported architecture, tensors that do not fit, or files
            that are not those that the folder's SHA256SUMS lists.
    """
    return _load(path_or_id, adapter, scalar_head=False, mesh=mesh, dtype=dtype, seed=0, one_copy=one_copy)


def reward_from_pretrained(
    path_or_id: str | Path,
    adapter: str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> Pretrained:
    """A model with a scalar head; from a language model, whose head is left out, the new one is random and logged.

    Args:
        seed: of a new head, drawn from N(0, 1 / (E + 1)) as by Stiennon et al. 2020 (arXiv 2009.01325), code release.
        Others, and what is raised: as `from_pretrained`.
    """
    return _load(path_or_id, adapter, scalar_head=True, mesh=mesh, dtype=dtype, seed=seed)


def _load(
    path_or_id, adapter, *, scalar_head: bool, mesh: Mesh | None, dtype: str, seed: int, one_copy: bool = False
) -> Pretrained:
    _check_dtype(dtype, (*DTYPES, *QUANTISED_KINDS))
    dtype, kind = (UNQUANTISED_DTYPE, dtype) if dtype in QUANTISED_KINDS else (dtype, None)
    folder = local_folder(path_or_id)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is a PEFT adapter: give the folder of its base, and this one as `adapter`")
    check_sums(folder)
    whole = read_json(folder / "config.json")
    hf = text_config(whole)
    if has_scalar_head(hf) and not scalar_head:
        raise ValueError(
            f"{folder} is a model with a scalar head ({hf['architectures'][0]}), such as a reward model: it scores "
            "(reward_from_pretrained) and has no logits to answer with"
        )
    if is_container(whole):
        LOGGER.info(f"{folder} is multimodal ({whole['model_type']}): only its text model, {hf['model_type']}, is read")
    layout = Layout(single_device_mesh() if mesh is None else mesh, TRAIN)
    config = decoder_config(hf, scalar_head=scalar_head, vocab_parts=layout.shards("vocab"))
    optional = (_SCORE,) if scalar_head and not has_scalar_head(hf) else ()
    checkpoint = checkpoint_of(config, optional, in_container=is_container(whole))
    if checkpoint.twins and (names := different_twin(folder, checkpoint)):
        LOGGER.warning(
            f"{folder} is tied (tie_word_embeddings), but its {names[0]} is not its {names[1]}: both are used, and the "
            "model is not tied, as in transformers 5; its version 4 uses the embedding for both"
        )
        hf["tie_word_embeddings"] = False
        config = dataclasses.replace(config, tied=False)
        checkpoint = checkpoint_of(config, optional, in_container=is_container(whole))
    serving = Layout(layout.mesh, GENERATE) if one_copy else None
    params = read_params(
        folder,
        abstract_params(config) if serving is None else shared_leaves(config, serving),
        checkpoint,
        layout,
        dtype,
        kind=kind,
        serving=serving,
    )
    changed: tuple[str, ...] = ()
    if adapter is not None:
        # Adapters are small and their products large sums, so they are read in float32 whatever the base is.
        check_sums(local_folder(adapter))
        config, adapters = peft.read_adapter(local_folder(adapter), config, layout, params)
        changed = tuple(sorted(params.keys() & adapters.keys() - {_SCORE}))
        params |= adapters
    if scalar_head and _SCORE not in params:
        LOGGER.warning(f"{folder} has no score.weight: the scalar head starts at random")
        params[_SCORE] = _init_scalar_head(config, layout, dtype, seed)
    generation = folder / "generation_config.json"
    return Pretrained(
        config=config,
        params={path: params[path] for path in abstract_params(config)},
        tokenizer=read_tokenizer(folder, config.vocab_size),
        hf_config=hf,
        generation_config=read_json(generation) if generation.exists() else {},
        layout=layout,
        source=str(folder.resolve() if is_folder(path_or_id) else path_or_id),
        folder=folder,
        changed=changed,
    )


def _check_dtype(dtype: str, supported: Sequence[str]) -> None:
    if dtype not in supported:
        raise ValueError(f'dtype "{dtype}" is not supported; supported: {", ".join(supported)}')


def has_scalar_head(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model with a scalar head."""
    return any(name.endswith(("ForSequenceClassification", "ForScalarHead")) for name in hf.get("architectures") or ())


def _init_scalar_head(config: DecoderConfig, layout: Layout, dtype: str, seed: int) -> jax.Array:
    leaf = abstract_params(config)[_SCORE]

    def init(key):
        return (jax.random.normal(key, leaf.shape) * (config.embed_size + 1) ** -0.5).astype(dtype)

    return jax.jit(init, out_shardings=layout.sharding(leaf.axes))(jax.random.key(seed))


def save_pretrained(
    model: Pretrained,
    folder: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    container: str | Path | None = None,
) -> None:
    """Write a Hugging Face folder: config.json, generation_config.json, safetensors, SHA256SUMS, the tokenizer's files.

    Adapters are merged, kernel by kernel, and quantised kernels written dense. A scalar head becomes
    ...ForSequenceClassification with one label, where transformers has that class for the family. The folder appears
    complete or not at all.

    Args:
        folder: where to; its parents are made.
        dtype: of the files; None: that of the parameters (bfloat16 where kernels are quantised).
        overwrite: replace an existing folder.
        container: the multimodal folder, or id, that the model is the text model of: all of it is written, with these
            weights in the dtype that its text model has; the other tensors and files stay as they are.
    Raises:
        ValueError: the folder is there and not empty, an unknown dtype, a scalar head with no pad token to be had, or a
            container of another text model, or with a dtype.
    """
    assert model.params.keys() == abstract_params(model.config).keys(), "parameters of another model"
    if dtype and container:
        raise ValueError("the weights in a multimodal folder keep the dtype that they have there: leave dtype out")
    dtype = dtype or str(model.params["embed/tokens"].dtype)
    _check_dtype(dtype, DTYPES)
    pad = model.hf_config.get("pad_token_id")
    if model.config.scalar_head and pad is None:
        pad = None if model.tokenizer is None else model.tokenizer.pad_token_id
        if pad is None:
            raise ValueError(
                "a scalar head is exported with the id that pads, by which transformers finds the end of a text: set "
                "pad_token_id in hf_config, or the tokenizer's pad_token"
            )
    with replace_folder(Path(folder).expanduser(), overwrite) as unfinished:
        if container:
            write_container(unfinished, local_folder(container), model.config, model.params)
        else:
            config = hf_config(model.hf_config, model.config, dtype=dtype, pad_token_id=pad)
            write_json(unfinished / "config.json", config)
            write_params(unfinished, model.params, hf_tensors(model.config), dtype, model.config.lora)
        write_sums(unfinished)
        if not model.config.scalar_head:
            write_json(unfinished / "generation_config.json", _generation_config(model))
        if hosts.is_main():
            write_tokenizer(model.tokenizer, unfinished, model.folder)


def save_adapter(model: Pretrained, folder: str | Path, *, base: str, overwrite: bool = False) -> None:
    """Write the adapters alone, with the scalar head if there is one, as a folder that PEFT loads with `base`.

    Args:
        base: the folder or hub id of the model that they belong to.
        Others: as `save_pretrained`.
    Raises:
        ValueError: the model has no adapters, or the folder is there and not empty.
    """
    if not model.config.lora.rank:
        raise ValueError("this model has no adapters: use save_pretrained")
    if model.changed:
        names = ", ".join(model.changed)
        raise ValueError(f"the adapter that was read has changed {names} of the base too: use save_pretrained")
    with replace_folder(Path(folder).expanduser(), overwrite) as unfinished:
        peft.write_adapter(unfinished, model.config, model.params, base=base)
        write_sums(unfinished)
        if hosts.is_main():
            write_tokenizer(model.tokenizer, unfinished, model.folder)


def _generation_config(model: Pretrained) -> dict[str, Any]:
    """The source's; where it had none, the ids that its config.json names."""
    ids = {key: model.hf_config.get(key) for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    return model.generation_config or {key: value for key, value in ids.items() if value is not None}


def apply(model: Pretrained, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Logits of a language model.

    Args:
        input_ids: [B, T] int.
        attention_mask: [B, T] int or bool, true on real tokens; padding may be on either side.
    Returns:
        [B, T, V] float32; arbitrary but finite on padding.
    Raises:
        ValueError: a scalar head, shapes that differ, more positions than the model has, or an id that it does not.
    """
    if model.config.scalar_head:
        raise ValueError("this model has a scalar head and no logits: use score")
    return _outputs(_head_outputs, model, input_ids, attention_mask, "auto")


def logprobs(
    model: Pretrained, input_ids: jax.Array, attention_mask: jax.Array, *, attention: Choice = "auto"
) -> jax.Array:
    """Log-probability of each token after those before it, by a language model; the logits are never kept.

    Args:
        input_ids, attention_mask: [B, T], as `apply` takes them.
        attention: the kernel, see `kernel_for_mesh`.
    Returns:
        [B, T - 1] float32, of the tokens from the second on; arbitrary but finite on padding.
    Raises:
        ValueError: as `apply`, or "cudnn" where it cannot.
    """
    if model.config.scalar_head:
        raise ValueError("this model has a scalar head and no logits: use score")
    return _outputs(_token_logprobs, model, input_ids, attention_mask, attention)


def score(
    scorer: Pretrained, input_ids: jax.Array, attention_mask: jax.Array, *, attention: Choice = "auto"
) -> jax.Array:
    """What the scalar head says at the last real token of each row.

    Args:
        input_ids: [B, T] int.
        attention_mask: [B, T] int or bool, true on real tokens, of which each row has at least one.
        attention: the kernel, see `kernel_for_mesh`.
    Returns:
        [B] float32.
    Raises:
        ValueError: no scalar head, shapes that differ, more positions than the model has, or "cudnn" where it cannot.
    """
    if not scorer.config.scalar_head:
        raise ValueError("this model has no scalar head: load it with reward_from_pretrained")
    return _outputs(_head_outputs, scorer, input_ids, attention_mask, attention)


def check_in_vocabulary(config: DecoderConfig, tokens: Any, mask: Any, name: str = "input_ids") -> None:
    """Raise ValueError where a real token has no row in the embedding; only for arrays whose values are here."""
    arrays = [array for array in (tokens, mask) if isinstance(array, jax.Array)]
    if any(isinstance(array, jax.core.Tracer) or not array.is_fully_addressable for array in arrays):
        return
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    outside = mask & ((tokens < 0) | (tokens >= config.vocab_size))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"{name}[{row}, {column}] is {tokens[row, column]}, and the model has the ids 0 to "
            f"{config.vocab_size - 1}: use the tokenizer of its folder"
        )


def _outputs(
    program: Callable, model: Pretrained, input_ids: jax.Array, attention_mask: jax.Array, attention: Choice
) -> jax.Array:
    tokens, mask = jnp.asarray(input_ids, jnp.int32), jnp.asarray(attention_mask, bool)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(f"input_ids {tokens.shape} and attention_mask {mask.shape} have to be [B, T] both")
    if tokens.shape[1] > model.config.max_positions:
        raise ValueError(
            f"{tokens.shape[1]} positions are more than the model's {model.config.max_positions}: cut them"
        )
    check_in_vocabulary(model.config, tokens, mask)
    # A batch that does not divide is left to the compiler: anybody's three rows have to work on eight devices too.
    divides = tokens.shape[0] % model.layout.shards("batch") == 0
    if attention == "cudnn" and not divides:
        raise ValueError(
            f'attention="cudnn" wants rows that {model.layout.shards("batch")} devices divide, and there are '
            f'{tokens.shape[0]}: pad them, or set "auto"'
        )
    layout, dtype = model.layout if divides else None, model.params["embed/tokens"].dtype
    kernel = kernel_for_mesh(model.layout.mesh, model.config, dtype, tokens.shape[1], attention).name
    return program(model.config, layout, kernel if divides else "xla", model.params, tokens, mask)


def _hidden(config: DecoderConfig, layout: Layout | None, kernel: str, params, tokens, mask) -> jax.Array:
    decoder, compute = bind(config, params), Compute(params["embed/tokens"].dtype, "none", attention=kernel)
    if kernel == "xla":
        return decoder(tokens, mask, compute, layout)[0]
    order = jnp.argsort(~mask, axis=1, stable=True)  # fused attention takes right-padded rows
    tokens, mask = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, mask))
    hidden, _ = decoder(tokens, mask, compute, layout)
    return jnp.take_along_axis(hidden, jnp.argsort(order, axis=1)[..., None], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _head_outputs(config: DecoderConfig, layout: Layout | None, kernel: str, params, tokens, mask) -> jax.Array:
    with jax.default_matmul_precision("float32"):  # a GPU would round float32 to TF32
        hidden = _hidden(config, layout, kernel, params, tokens, mask)
        if config.scalar_head:
            return scalar_scores(params, last_hidden(hidden, mask))
        return logits(config, params, hidden)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _token_logprobs(config: DecoderConfig, layout: Layout | None, kernel: str, params, tokens, mask) -> jax.Array:
    with jax.default_matmul_precision("float32"):  # as in `_head_outputs`
        hidden = _hidden(config, layout, kernel, params, tokens, mask)[:, :-1]
        options = head_options(config, params)
        return token_logprobs(hidden, head_kernel(config, params), tokens[:, 1:], chunk=LOGPROB_CHUNK, **options)
