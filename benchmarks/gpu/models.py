"""Random models with OPT's sizes in the recipe of configs/opt-1.3b-single_gpu.toml; nothing is downloaded."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import load_config
from rlhf_jax.engine import EngineState, FrozenParams, HybridEngine
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.plan.phases import decoder_configs, prompt_positions
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.ppo import ppo_engine, ppo_models, ppo_optimizers

CONFIG = "configs/opt-1.3b-single_gpu.toml"
NEVER = (-1,)  # no token ends an answer, so all answers have full length
# hidden size, layers, heads, MLP width, size of the embedding
SIZES = {
    "opt-125m": (768, 12, 12, 3072, 768),
    "opt-350m": (1024, 24, 16, 4096, 512),
    "opt-1.3b": (2048, 24, 32, 8192, 2048),
    "toy": (64, 2, 4, 128, 64),
}
TOY = ["data.max_prompt_length=32", "data.max_length=48", "ppo.sample.max_new_tokens=16", "ppo.rollout_batch_size=8"]
TOY += ["ppo.micro_batch_size=4", "model.lora.rank=4"]


def hf_config(name: str) -> dict:
    """The config.json of an OPT of this size."""
    hidden, layers, heads, mlp, embed = SIZES[name]
    return {
        "model_type": "opt",
        "vocab_size": 512 if name == "toy" else 50272,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": mlp,
        "word_embed_proj_dim": embed,
        "max_position_embeddings": 64 if name == "toy" else 2048,
        "do_layer_norm_before": name != "opt-350m",
    }


def recipe_of(folder: str | Path, actor: str, critic: str, *overrides: str, small: bool = False) -> Recipe:
    """The recipe with models that consist of a config.json; `small`: with toy models instead."""
    for role, name in (("actor", actor), ("critic", critic)):
        path = Path(folder) / role / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(hf_config("toy" if small else name)))
    paths = f"model.actor={folder}/actor", f"model.reward={folder}/critic", f"run.dir={folder}/run"
    data = 'data.sources=[{ path = "builtin:assistant" }]'
    return load_config(CONFIG, [*paths, data, *(TOY if small else []), *overrides], Recipe)


def engine_of(recipe: Recipe, mesh: Mesh) -> tuple[HybridEngine, EngineState, FrozenParams]:
    """The engine of the recipe, and random models as `ppo` holds them."""
    layout, loaded = recipe.layout(mesh), []
    for seed, decoder in enumerate(decoder_configs(recipe, layout.shards("vocab"))):
        drawn = init_params(decoder, jax.random.key(seed), layout)
        dtype = recipe.model.stored_dtype(scalar_head=decoder.scalar_head)
        params = {path: drawn.pop(path).astype(dtype) for path in list(drawn)}  # frees the float32 leaves one by one
        loaded.append(Pretrained(decoder, params, None, {}, {}, layout))
    actor, critic = loaded
    optimizers = ppo_optimizers(recipe.ppo, max(recipe.ppo.actor.warmup_steps, recipe.ppo.critic.warmup_steps) + 1)
    engine = ppo_engine(recipe.ppo, recipe.model, actor.config, critic.config, optimizers, NEVER, layout)
    return engine, *jax.block_until_ready(ppo_models(actor, critic, recipe.model, optimizers, 0, recipe.ppo))


def prompts_of(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, P], mask) of prompts without padding."""
    vocab = decoder_configs(recipe, 1)[0].vocab_size
    shape = (
        recipe.ppo.rollout_batch_size,
        prompt_positions(recipe, recipe.ppo, decoder_configs(recipe, 1)[0].max_positions),
    )
    return np.random.default_rng(0).integers(3, vocab, shape).astype(np.int32), np.ones(shape, bool)


def keep(out: str, result: dict) -> None:
    """Write the results so far, atomically."""
    part = Path(f"{out}.part")
    part.write_text(json.dumps(result))
    os.replace(part, out)


def arguments() -> tuple[str, bool, list[str]]:
    """(output file, whether at toy size, other arguments)."""
    out, *rest = sys.argv[1:]
    return out, "--small" in rest, [each for each in rest if each != "--small"]
