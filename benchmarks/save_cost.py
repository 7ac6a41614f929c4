"""What checkpoints cost: a save's share of the steps between two saves, its size, and the seconds of resuming.

    python -m benchmarks.save_cost [--models demo 125m]

On one CPU device: the model of configs/demo.toml with its batch size and save interval, and OPT-125M with random
weights at the default interval. A save is timed from the copy off the devices to its checksums, as if no step
ran meanwhile, so the share is the most that it can cost; the time in which the loop itself waits is the least.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import record
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.checkpoint_files import find_damage
from rlhf_jax.config import load_config
from rlhf_jax.data.batches import Batch
from rlhf_jax.mesh import single_device_mesh, train_layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.models.decoder import abstract_params, init_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.plan.abstract import find_config
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.from_scratch import make_hf_config
from rlhf_jax.stages.run_folder import RunConfig
from rlhf_jax.stages.sft import sft_objective
from rlhf_jax.train_step import TrainState, init_state, make_update

STEPS, SAVES = 5, 3


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "125m"], choices=["demo", "125m"])
    for name in parser.parse_args(argv).models:
        record("save_cost", {"model": name, **measure(*setting(name))}, "model")


def setting(name: str) -> tuple[DecoderConfig, tuple[int, int], int]:
    """The model, (rows, tokens) of a batch, and the steps between saves."""
    if name == "125m":
        return decoder_config(find_config("facebook/opt-125m")[0], scalar_head=False), (8, 256), RunConfig.save_every
    recipe = load_config("configs/demo.toml", [], Recipe)
    hf = make_hf_config(recipe.model.new, recipe.model.new.vocab_size)
    return decoder_config(hf, scalar_head=False), (recipe.sft.batch_size, recipe.data.max_length), recipe.run.save_every


def measure(config: DecoderConfig, shape: tuple[int, int], interval: int) -> dict:
    layout = train_layout(single_device_mesh(), 3)
    leaves, tx = abstract_params(config), make_optimizer(OptimConfig(learning_rate=1e-4), 1000)
    state = init_state(init_params(config, jax.random.key(0), layout), tx, leaves, layout)
    loss = sft_objective(config, Compute(jnp.float32, "none", 0), layout).loss
    update = make_update(loss, tx, leaves, layout, 1)
    tokens = np.random.default_rng(0).integers(5, config.vocab_size, shape, np.int32)
    mask = np.ones(shape, bool)
    batch = layout.put_batch(Batch(tokens, mask, mask & (np.arange(shape[1]) > 0)))

    def step(state: TrainState) -> tuple[TrainState, float]:
        started = time.perf_counter()
        state, stats = update(state, {}, batch)
        jax.block_until_ready((state, stats))
        return state, time.perf_counter() - started

    state, _ = step(state)
    seconds, waits, saves = [], [], []
    for _ in range(STEPS):
        state, taken = step(state)
        seconds.append(taken)
    with tempfile.TemporaryDirectory() as folder:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        with Checkpoints(folder) as checkpoints:
            for number in range(1, SAVES + 1):
                started = time.perf_counter()
                checkpoints.save(number, state, {})
                waits.append(time.perf_counter() - started)
                checkpoints.wait()
                saves.append(checkpoints.save_seconds)
        newest = Path(folder) / str(SAVES)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        started = time.perf_counter()
        assert find_damage(newest) == ""
        hashing = time.perf_counter() - started
        jax.tree.map(lambda x: x.delete(), state)
        with Checkpoints(folder) as checkpoints:
            started = time.perf_counter()
            jax.block_until_ready(checkpoints.restore_newest(abstract)[1])
            resuming = time.perf_counter() - started
    each = statistics.median(seconds)
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves.values()),
        "batch": list(shape),
        "save_every": interval,
        "seconds_step": each,
        "seconds_wait": statistics.median(waits),
        "seconds_save": statistics.median(saves),
        "share_least": statistics.median(waits) / (interval * each),
        "share_most": statistics.median(saves) / (interval * each),
        "bytes": size,
        "seconds_checksums": hashing,
        "seconds_resume": resuming,
    }


if __name__ == "__main__":
    main()
