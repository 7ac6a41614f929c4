"""The package's engine with random models of given sizes, by a configuration as `rlhf-jax train` reads it."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tomli_w

from benchmarks import timing
from rlhf_jax.config import load_config
from rlhf_jax.recipe import Recipe


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
