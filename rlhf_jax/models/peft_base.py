"""What a PEFT adapter changes besides the linears of layers: it is merged into the base as the adapter is read.

These are LoRA on experts and routers (PEFT's `target_parameters`), on OPT's projections and on an untied head, and
embeddings or heads that are saved whole, which PEFT does for some without a change.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import alternative_tensors, embedding_names, hf_tensors
from rlhf_jax.models.families.tensors import HfTensor
from rlhf_jax.models.safetensors_io import join_names

LOGGER = logging.getLogger(__name__)
MERGE = "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and load the result"

Stored = MutableMapping[str, np.ndarray]  # {"model.layers.0.mlp.up_proj.lora_A", "lm_head", ...: float32}
_Params = dict[str, jax.Array]


class Target(NamedTuple):
    """A parameter of PEFT's model: of a linear or router, or of the experts of a layer together."""

    name: str  # as `target_parameters` names it; "{i}" stands for the layer
    module: str  # with the names of its A and B
    parts: dict[str, HfTensor]  # {path of a kernel that it holds: its tensor}
    experts: int  # number of matrices

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs of each matrix."""
        *_, rows, columns = next(iter(self.parts.values())).shape
        return columns, rows


def merge_targets(config: DecoderConfig) -> list[Target]:
    """The parameters whose adapters are merged."""
    tables = alternative_tensors(config) if config.experts else [hf_tensors(config)]  # PEFT sees the stacked experts
    found: dict[str, Target] = {}
    for path, tensor in tables[0].items():
        if path.endswith("/kernel") and not path.startswith(("layers/attention/", "layers/mlp/", "score")):
            stacked = len(tensor.shape) == 3
            module = tensor.name.rpartition(".")[0]
            target = Target(tensor.name, module, {}, tensor.shape[0] if stacked else 1)
            found.setdefault(tensor.name, target).parts[path] = tensor
    return list(found.values())


def check_parameter_targets(where: Path, adapter: Mapping[str, Any], names: list[str], num_layers: int) -> None:
    """ValueError with the parameters' `names`, where "{i}" stands for the layer, if `target_parameters` has none."""
    known = (name.format(i=i) for name in names for i in range(num_layers))
    if adapter.get("target_parameters") and not any(is_parameter_target(adapter, name) for name in known):
        own = join_names({name.split("{i}.")[-1] for name in names})
        raise ValueError(
            f"the target_parameters of {where} are none of this model, which are {own}: is its base another?"
        )


def is_parameter_target(adapter: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT gives this parameter an adapter by `target_parameters`."""
    return any(name == one or name.endswith(f".{one}") for one in adapter.get("target_parameters") or ())


def merge_products(
    folder: Path,
    adapter: Mapping[str, Any],
    stored: Stored,
    config: DecoderConfig,
    params: Mapping[str, Any],
    scale_of: Callable[[str, int], float],
) -> _Params:
    """The base's kernels with those products of A and B that are not of a linear in a layer, which leave `stored`.

    Args:
        folder: of the adapter, for messages.
        adapter: its settings.
        params: of the base.
        scale_of: (name, rank) -> scale of a product.
    Raises:
        ValueError: A or B is absent or misshaped, or the base is quantised or unstacked.
    """
    merged: _Params = {}
    names = set()
    for target in merge_targets(config):
        for i in range(config.num_layers) if "{i}" in target.name else (None,):
            name, module = target.name.format(i=i), target.module.format(i=i)
            pair = _take_pair(stored, module, target)
            if pair is None:
                if is_parameter_target(adapter, name):
                    raise ValueError(f"{folder} has no adapter of {name}, which its target_parameters name")
                continue
            names.add(target.name.replace("{i}", "*"))
            rank = len(pair[0]) // target.experts
            scale = scale_of(name if target.experts > 1 else module, rank)
            a = pair[0].reshape(target.experts, rank, -1)
            b = pair[1].reshape(len(pair[1]), rank, target.experts).transpose(2, 0, 1)
            for path, tensor in target.parts.items():
                kernel = merged.get(path, params[path])
                if not isinstance(kernel, jax.Array):
                    fix = f"rlhf-jax import BASE NEW --adapter {folder} merges it into a new base"
                    raise ValueError(f"{folder} changes {path} of a base that is quantised or shared: {fix}")
                rows = b if tensor.strip is None else b[:, tensor.strip.offset :][:, : tensor.strip.length]
                if path not in merged:
                    kernel = jnp.copy(kernel)  # as each product is added in place
                squeezed = (x if target.experts > 1 else x[0] for x in (a, rows * np.float32(scale)))
                merged[path] = _add_product(kernel, *squeezed, i, is_transposed=tensor.transpose)
    if names:
        LOGGER.info(f"{folder}: the adapters of {join_names(names)} are merged into the base")
    return merged


def _take_pair(stored: Stored, module: str, target: Target) -> tuple[np.ndarray, np.ndarray] | None:
    """A [experts * rank, in] and B [out, rank * experts] of a target, which leave `stored`.

    PEFT nests the adapters of two parameters of one module, so their sizes say which is which.
    """
    for key in (module, f"{module}.base_layer"):
        pair = tuple(stored.get(f"{key}.{kind}") for kind in ("lora_A", "lora_B"))
        a, b = pair
        if a is None or b is None:
            continue
        if (a.shape[1:], b.shape[:1]) == ((target.sizes[0],), (target.sizes[1],)) and len(a) == b.shape[1]:
            if len(a) % target.experts == 0:
                del stored[f"{key}.lora_A"], stored[f"{key}.lora_B"]
                return a, b
    return None


@functools.partial(jax.jit, static_argnames="is_transposed", donate_argnums=0)
def _add_product(kernel: jax.Array, a: jax.Array, b: jax.Array, layer: int | None, *, is_transposed: bool) -> jax.Array:
    """The kernel plus the product of A [..., rank, in] and B [..., out, rank], of one layer where one is given."""
    with jax.default_matmul_precision("float32"):
        product = jnp.einsum("...ri,...or->...io" if is_transposed else "...ri,...or->...oi", a, b)
    old = kernel if layer is None else kernel[layer]
    product = jnp.pad(product, [(0, have - got) for have, got in zip(old.shape, product.shape, strict=True)])
    new = (old.astype(jnp.float32) + product).astype(kernel.dtype)
    return new if layer is None else kernel.at[layer].set(new)


def replaced_embeddings(
    folder: Path,
    adapter: Mapping[str, Any],
    stored: Stored,
    config: DecoderConfig,
    params: Mapping[str, Any],
    layout: Layout,
) -> _Params:
    """The embedding and the head of the base that the adapter has whole and changed; whole ones leave `stored`.

    Raises:
        ValueError: of another number of rows, or the two of a tied model differ.
    """
    found: dict[str, np.ndarray] = {}
    saved_alone = set()
    for path, names in embedding_names(config).items():
        for name in names:
            for key in (name, f"{name}.base_layer"):
                if key in stored:
                    found[path] = stored.pop(key)
                    if name.rpartition(".")[2] in adapter["modules_to_save"]:
                        saved_alone.add(path)
    if config.scalar_head and found.pop("head/kernel", None) is not None:
        LOGGER.warning(f"{folder}: its head of a language model is left out, as a scalar head is in its place")
    if not found:
        return {}
    rows = {len(array) for array in found.values()} - {config.vocab_size}
    if rows:
        raise ValueError(
            f"{folder} resized the vocabulary of its base from {config.vocab_size} to {rows.pop()} tokens: {MERGE}"
        )
    leaves, changed = abstract_params(config), {}
    for path, array in found.items():
        own = path if path in params else "embed/tokens"  # the head of a tied model
        old = params[own]
        padded = np.pad(array, [(0, old.shape[0] - len(array)), (0, 0)])
        new = layout.put(padded.astype(old.dtype), *leaves[own].axes)
        if not bool(jnp.array_equal(new, old)):
            changed[path] = new
    if config.tied and changed and not config.scalar_head:
        is_split = len(found) == 1 and saved_alone and not adapter.get("ensure_weight_tying")
        if is_split or (len(found) == 2 and (len(changed) == 1 or not jnp.array_equal(*changed.values()))):
            raise ValueError(f"{folder} changes one of embedding and head, which its base ties: {MERGE}")
        changed = {"embed/tokens": next(iter(changed.values()))}
    same = found.keys() - changed.keys()
    if changed:
        LOGGER.warning(f"{folder} has a changed {join_names(changed)}: it takes the place of that of the base")
    elif same:
        LOGGER.info(f"{folder} has {join_names(same)} as in the base: nothing is changed by it")
    return changed
