"""The package's engine with random models of given sizes, by a configuration as `rlhf-jax train` reads it."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tomli_w
from jax.sharding import Mesh

import benchmarks.process_settings  # noqa: F401
from benchmarks import timing
from rlhf_jax.config import load_config
from rlhf_jax.engine import EngineState, FrozenParams, HybridEngine
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.plan.phases import decoder_configs, prompt_positions
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.ppo import ppo_engine, ppo_models, ppo_optimizers

NEVER = (-1,)  # no token ends an answer, so all answers have full length


def add_overrides(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """With keys of the configuration as further arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the configuration")
    return parser


def make_recipe(args: argparse.Namespace, folder: str | Path) -> Recipe:
    """A recipe whose models are a config.json in `folder`; whole batches, nothing recomputed, all weights trained."""
    sizes, folder = timing.sizes_of(args), Path(folder)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(sizes.hf_config))
    place, sample = str(folder / "model"), {"max_new_tokens": sizes.answer}
    table = {
        "run": {"dir": str(folder / "run")},
        "model": {"actor": place, "reward": place, "dtype": args.dtype, "frozen_dtype": args.dtype, "remat": "none"},
        "data": {
            "sources": [{"path": "builtin:assistant"}],
            "max_prompt_length": sizes.prompt,
            "max_length": sizes.length,
        },
        "sft": {"batch_size": sizes.rows},
        "ppo": {"rollout_batch_size": sizes.prompts, "sample": sample},
        "grpo": {
            "rollout_batch_size": sizes.prompts,
            "sample": sample | {"num_samples": max(2, sizes.samples)},
            "rewards": ["benchmarks.peers.words:share_of_distinct"],
            "kl_coef": 0.04,
        },
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(table))
    return load_config(folder / "recipe.toml", args.overrides, Recipe)


@contextlib.contextmanager
def open_recipe(args: argparse.Namespace) -> Iterator[Recipe]:
    """`make_recipe`, in a folder that exists meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        yield make_recipe(args, folder)


def draw(decoder: DecoderConfig, seed: int, recipe: Recipe, layout: Layout) -> Pretrained:
    """A random model in the dtype in which the recipe stores it."""
    drawn = init_params(decoder, jax.random.key(seed), layout)
    dtype = recipe.model.stored_dtype(scalar_head=decoder.scalar_head)
    params = {path: drawn.pop(path).astype(dtype) for path in list(drawn)}  # frees the float32 leaves one by one
    return Pretrained(decoder, params, None, {}, {}, layout)


def engine_of(recipe: Recipe, mesh: Mesh) -> tuple[HybridEngine, EngineState, FrozenParams]:
    """The engine of the recipe, and random models as `ppo` holds them."""
    layout = recipe.layout(mesh)
    models = enumerate(decoder_configs(recipe, layout.shards("vocab")))
    actor, critic = (draw(decoder, seed, recipe, layout) for seed, decoder in models)
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
