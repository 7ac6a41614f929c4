"""What a phase needs beside what it holds, by arithmetic: for choosing before a run, when there is no time to compile.

The terms are those that the compiled programs turned out to consist of, for A100s: gradients (their sum, and those of
the micro-batch at hand), the inputs of layers that are kept, one layer's activations, the logits of a chunk, gathered
or cast weights. B sequences of T tokens on one device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.decoder import Leaf, abstract_params
from rlhf_jax.plan.abstract import device_bytes
from rlhf_jax.plan.held import Phase, architectures, prompt_positions
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.ppo import ppo_sizes
from rlhf_jax.stages.table import STAGES


def estimate(recipe: Recipe, phase: Phase, mesh) -> int:
    """Bytes of temporaries on one device, without the sum of gradients, the cache and the weights in `phase.added`."""
    if phase.name.endswith(" step") or phase.name == "average":  # over one parameter after the other
        return device_bytes(phase.args)
    layout = Layout(mesh, TRAIN)
    actor, critic = architectures(recipe, layout.shards("vocab"))
    width, count = recipe.model.compute.dtype.itemsize, layout.shards("batch")
    chunk = recipe.model.logprob_chunk
    if STAGES[phase.stage].objective:
        decoder = critic if STAGES[phase.stage].exports == "scorer" else actor
        batch = phase.args[-1]
        rows, length = math.prod(batch.tokens.shape[:-1]), batch.tokens.shape[-1]
        if phase.name == "evaluate":
            params = phase.args[0]
            float32 = [leaf for leaf in params.values() if getattr(leaf, "dtype", None) == "float32"]
            adapted, gathered = recipe.model.with_lora(decoder).lora.rank > 0, _gathered(decoder, params, width)
            passing = _forward(decoder, rows // count, length, chunk, width, adapted)
            return device_bytes(float32) // 2 + gathered + passing
        config = getattr(recipe, phase.stage)
        rows = rows * (config.micro_batch_size or config.batch_size) // config.batch_size
        return _update(recipe, decoder, phase, rows // count, length, width)
    config = getattr(recipe, phase.stage)
    batch_size, micros = ppo_sizes(config, layout)
    prompt = prompt_positions(recipe, min(actor.max_positions, critic.max_positions))
    length, rows = prompt + config.sample.max_new_tokens, batch_size // micros // count
    if phase.name == "publish":
        return _publish(actor, layout, recipe, width)
    if phase.name == "generate":
        tokens = (config.generate_rows or config.rollouts) // (mesh.shape["data"] * mesh.shape["fsdp"]) * prompt
        hidden = tokens * width * (actor.mlp_size // mesh.shape["tensor"] + 3 * actor.hidden_size)
        # All at once: keys and values of the prompts beside the cache that they are put in, and what moves on the way.
        return hidden // 2 if config.generate_rows else phase.cache * 3 // 4 + hidden
    if phase.name == "score":
        state, frozen, *_ = phase.args
        trained = {"actor": actor, "critic": critic} if state.critic else {"actor": actor}
        casts = max(device_bytes(getattr(state, name).trainable) // 2 for name in trained)
        passes = (
            _gathered(each, getattr(state, name).params(getattr(frozen, name)), width)
            + _forward(each, rows, length, chunk, width, recipe.model.with_lora(each).lora.rank > 0)
            for name, each in trained.items()
        )
        return casts + max(passes)
    decoder = actor if phase.name == "actor" else critic
    return _update(recipe, decoder, phase, rows, length, width)


def _layer(decoder: DecoderConfig) -> dict[str, Leaf]:
    return {path: leaf for path, leaf in abstract_params(decoder).items() if path.startswith("layers/")}


def _is_split(params: Mapping[str, Any]) -> bool:
    return any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(params))


def _gathered(decoder: DecoderConfig, params: Mapping[str, Any], width: int) -> int:
    """Bytes of three layers, of which two are on their way, and the embedding; 0 where each device has all of them."""
    if not _is_split(params):
        return 0
    layer = sum(math.prod(leaf.shape[1:]) for leaf in _layer(decoder).values())
    return width * (3 * layer + decoder.padded_vocab * decoder.embed_size)


def _forward(decoder: DecoderConfig, rows: int, length: int, chunk: int, width: int, adapted: bool) -> int:
    """One pass that keeps nothing: a layer, or the logits of a chunk beside the states that they are of."""
    tokens = rows * length
    wide = 4 if decoder.gated_mlp else 1 + adapted
    layer = tokens * width * (decoder.mlp_size * wide + 3 * decoder.hidden_size)
    logits = 0 if decoder.scalar_head else 4 * rows * (chunk or length) * decoder.padded_vocab
    return max(layer, logits + 2 * tokens * width * decoder.hidden_size)


def _update(recipe: Recipe, decoder: DecoderConfig, phase: Phase, rows: int, length: int, width: int) -> int:
    params = phase.args[0].params(phase.args[1])
    tokens, wide = rows * length, decoder.mlp_size * (1 + decoder.gated_mlp)
    heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    kept = decoder.hidden_size
    # Layers of their own keep everything under "dots", see `models.per_layer.recomputed`.
    all_kept = recipe.model.remat == "none" or (
        recipe.model.remat == "dots" and recipe.model.one_copy and phase.name == "actor"
    )
    if recipe.model.remat != "layers":  # outputs of the products
        kept += heads + 2 * decoder.hidden_size + wide
    if all_kept:  # what lies between them
        kept += 4 * decoder.hidden_size + heads + 2 * wide
    working = 6 * decoder.hidden_size + 3 * decoder.mlp_size * (1 + 2 * decoder.gated_mlp)
    chunk = recipe.model.logprob_chunk or length
    logits = 0 if decoder.scalar_head else 3 * 4 * rows * chunk * decoder.padded_vocab
    scattered = 0
    if _is_split(params) and not recipe.model.with_lora(decoder).lora.rank:  # a layer's gradient, whole
        scattered = 4 * sum(math.prod(leaf.shape[1:]) for leaf in _layer(decoder).values())
    passes = tokens * width * (decoder.num_layers * kept + working)
    # Gradients of the micro-batch at hand are as large as their sum, which `phase.added` is.
    return phase.added + passes + logits + scattered + _gathered(decoder, params, width)


def _publish(actor: DecoderConfig, layout: Layout, recipe: Recipe, width: int) -> int:
    """The largest stack of kernels on its way: merged in float32, or cast, and gathered to its tensor-parallel part."""
    if recipe.model.one_copy:
        return 0
    largest = max(math.prod(leaf.shape) for path, leaf in _layer(actor).items() if path.endswith("kernel"))
    shards, tensor = layout.shards("vocab"), layout.mesh.shape["tensor"]
    merged = largest * (4 * (1 + actor.gated_mlp) if recipe.model.lora.rank else width) // shards
    return merged + (largest * width // tensor if shards > tensor else 0)
