"""Temporaries of a program by arithmetic, and with them the bounds of its peak that need no compiler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.dtypes import QUANTISED_KINDS
from rlhf_jax.models.quantised import is_quantisable
from rlhf_jax.plan.abstract import device_bytes
from rlhf_jax.plan.compile import micro_batch_sizes
from rlhf_jax.plan.phase import Pass, Phase
from rlhf_jax.recipe import Recipe
from rlhf_jax.slots import ROWS_PER_REFILL
from rlhf_jax.stages.models import ModelConfig

# Compiled programs had at most this much more of temporaries than `temporary_bytes` says, as a share of it
# (docs/memory.md, benchmarks/results/estimates.json).
ESTIMATE_ERROR = 0.3
SMALL_BUFFERS = 2**26  # bytes for what the estimate leaves out


class PeakBounds(NamedTuple):
    """Bounds of the peak of a program, in bytes on one device.

    Attributes:
        least: what must be resident at once: parameters, optimizer state, gradients, cache, generation weights, batch.
        most: with the estimate of temporaries, times 1 + ESTIMATE_ERROR, and SMALL_BUFFERS.
    """

    least: int
    most: int


def find_bounds(recipe: Recipe, phase: Phase, mesh: Mesh | AbstractMesh) -> PeakBounds:
    """The bounds of the peak of a program, by arithmetic."""
    extra = int((1 + ESTIMATE_ERROR) * temporary_bytes(recipe, phase, mesh)) + SMALL_BUFFERS
    return PeakBounds(phase.lower_bound, phase.lower_bound + extra)


def largest_micro_batches(
    recipe: Recipe, found: Sequence[Phase], mesh: Mesh | AbstractMesh, usable: int
) -> dict[str, dict[str, int]]:
    """{stage: {"asked", "largest", "compilations": 0}}: the largest micro-batch whose upper bound is usable; 0: none.

    Args:
        found: `phases` of the recipe.
    """
    sizes = {}
    for stage in dict.fromkeys(phase.stage for phase in found):
        asked, legal = micro_batch_sizes(recipe, stage, Layout(mesh, TRAIN).shards("batch"))
        updates = [phase for phase in found if phase.stage == stage and phase.is_update]

        def fits(size: int, asked=asked, updates=updates) -> bool:
            resized = (
                phase._replace(
                    passes=tuple(each._replace(rows=each.rows * size // asked) for each in phase.passes),
                    micro=phase.micro * asked // size,
                )
                for phase in updates
            )
            return all(find_bounds(recipe, phase, mesh).most <= usable for phase in resized)

        sizes[stage] = {"asked": asked, "largest": max(filter(fits, legal), default=0), "compilations": 0}
    return sizes


def temporary_bytes(recipe: Recipe, phase: Phase, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of temporaries on one device, without the sum of gradients, the cache and the weights in `phase.added`."""
    layout, model = Layout(mesh, TRAIN), recipe.model
    count = layout.shards("batch")
    if phase.name == "score":  # where an engine holds one model, none may score
        passing = max((_forward_bytes(model, each, count) for each in phase.passes), default=0)
        return max((each.cast for each in phase.passes), default=0) + passing
    if not phase.passes:  # one parameter at a time, and the new one before it replaces the old
        return device_bytes(phase.args[0])
    first = phase.passes[0]
    if phase.is_update:
        # In a loop over micro-batches, the gradients of the current one are as large as their sum, `phase.added`, and
        # weights are cast once before it.
        again = (phase.added + first.cast) * (phase.micro > 1)
        return again + _update_bytes(model, first, count, is_actor=phase.name == "actor")
    if phase.name == "publish":
        return _publish_bytes(first.decoder, layout, model)
    if phase.name == "generate":
        return _generate_bytes(recipe, phase, mesh)
    return first.cast + _forward_bytes(model, first, count)


def _generate_bytes(recipe: Recipe, phase: Phase, mesh: Mesh | AbstractMesh) -> int:
    """Prefill of all prompts, or of those of a refill: keys and values that are not yet in the cache, and states."""
    (first,), model = phase.passes, recipe.model
    decoder, slots = first.decoder, getattr(recipe, phase.stage).generate_rows
    held = (slots or first.rows) // (mesh.shape["data"] * mesh.shape["fsdp"])
    rows = max(1, held // ROWS_PER_REFILL) if slots else held
    width, tensor = model.compute.dtype.itemsize, mesh.shape["tensor"]
    states = rows * first.length * width * (decoder.mlp_size // tensor + 3 * decoder.hidden_size)
    kernel = _dequantised_bytes(model, first)
    if not slots:
        return phase.cache * 3 // 4 + states + kernel
    total = first.length + getattr(recipe, phase.stage).sample.max_new_tokens
    scores = rows * decoder.num_heads * first.length**2 * (4 + width) // tensor
    return phase.cache * rows * first.length // (held * total) + 2 * states + scores + kernel


def _dequantised_bytes(model: ModelConfig, each: Pass, *, whole_layer: bool = False) -> int:
    """Bytes of the largest kernel of a quantised base in the dtype of the computation, or of all kernels of a layer."""
    if model.stored_dtype(scalar_head=each.decoder.scalar_head) not in QUANTISED_KINDS:
        return 0
    kernels = [size for path, size in _layer_sizes(each.decoder).items() if is_quantisable(path)]
    return model.compute.dtype.itemsize * (sum if whole_layer else max)(kernels) // each.decoder.num_layers


def _layer_sizes(decoder: DecoderConfig) -> dict[str, int]:
    """{path: parameters in all layers}."""
    leaves = abstract_params(decoder)
    return {path: math.prod(leaf.shape) for path, leaf in leaves.items() if path.startswith("layers/")}


def _layer_size(decoder: DecoderConfig) -> int:
    return sum(_layer_sizes(decoder).values()) // decoder.num_layers


def _is_split(each: Pass) -> bool:
    return any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(each.params))


def _gathered_layer_bytes(model: ModelConfig, each: Pass) -> int:
    """Bytes of four gathered layers, most of them in transfer, and the embedding; 0 where no weight is split."""
    if not _is_split(each):
        return 0
    embedding = each.decoder.padded_vocab * each.decoder.embed_size
    return model.compute.dtype.itemsize * (4 * _layer_size(each.decoder) + embedding)


def _forward_bytes(model: ModelConfig, each: Pass, count: int) -> int:
    """A forward pass that keeps no activations: one layer, or the logits of a chunk and their hidden states."""
    decoder, width, rows = each.decoder, model.compute.dtype.itemsize, each.rows // count
    hidden = rows * each.length * width * decoder.hidden_size
    wide = 4 if decoder.gated_mlp else 1 + (model.with_lora(decoder).lora.rank > 0)
    layer = rows * each.length * width * decoder.mlp_size * wide + 3 * hidden
    logits = 0 if decoder.scalar_head else 4 * rows * (model.logprob_chunk or each.length) * decoder.padded_vocab
    return _gathered_layer_bytes(model, each) + _dequantised_bytes(model, each) + max(layer, logits + 2 * hidden)


def _update_bytes(model: ModelConfig, each: Pass, count: int, *, is_actor: bool) -> int:
    """Forward and backward pass of a micro-batch, without the gradients of the weights."""
    decoder, width, rows = each.decoder, model.compute.dtype.itemsize, each.rows // count
    wide = decoder.mlp_size * (1 + decoder.gated_mlp)
    heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    kept = decoder.hidden_size
    if model.remat != "layers":  # outputs of the products; "dots" also keeps what adapters add to each
        adapted = model.remat == "dots" and model.with_lora(decoder).lora.rank > 0
        kept += (heads + 2 * decoder.hidden_size + wide) * (1 + adapted)
    # Unstacked layers keep everything under "dots", see `models.unstacked.remat_layer`.
    if model.remat == "none" or (model.remat == "dots" and model.one_copy and is_actor):  # and what is between
        kept += 4 * decoder.hidden_size + heads + 2 * wide
    working = 6 * decoder.hidden_size + 3 * decoder.mlp_size * (1 + 2 * decoder.gated_mlp)
    logits = 0 if decoder.scalar_head else 3 * 4 * rows * (model.logprob_chunk or each.length) * decoder.padded_vocab
    # The gradient of a layer before it is scattered.
    scattered = 4 * _layer_size(decoder) if _is_split(each) and not model.with_lora(decoder).lora.rank else 0
    passes = rows * each.length * width * (decoder.num_layers * kept + working)
    kernels = _dequantised_bytes(model, each, whole_layer=True)
    return passes + logits + scattered + kernels + _gathered_layer_bytes(model, each)


def _publish_bytes(actor: DecoderConfig, layout: Layout, model: ModelConfig) -> int:
    """The largest stack of kernels in transfer: merged in float32, or cast, and gathered to its tensor shard."""
    if model.one_copy:
        return 0
    largest = max(size for path, size in _layer_sizes(actor).items() if path.endswith("kernel"))
    shards, tensor, width = layout.shards("vocab"), layout.mesh.shape["tensor"], model.compute.dtype.itemsize
    merged = largest * (4 * (1 + actor.gated_mlp) if model.lora.rank else width) // shards
    return merged + (largest * width // tensor if shards > tensor else 0)
