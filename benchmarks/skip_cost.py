"""What it costs that every optimizer step chooses between its result and the state before it.

    python -m benchmarks.skip_cost [--pairs 20]

The SFT step of the model of configs/demo.toml on one CPU device, and the same program with the new values in place of
the choice. Steps of both take turns, and the least CPU time of each is taken, as other work may share the cores.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import record
from benchmarks.save_cost import setting
from rlhf_jax import train_step
from rlhf_jax.data.batches import Batch
from rlhf_jax.mesh import single_device_mesh, train_layout
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, init_params
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.stages.sft import sft_objective
from rlhf_jax.train_step import init_state, make_update


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="steps of each kind (default: %(default)s)")
    record("skip_cost", measure(parser.parse_args(argv).pairs))


def measure(pairs: int) -> dict:
    config, shape, _ = setting("demo")
    layout, leaves = train_layout(single_device_mesh(), 3), abstract_params(config)
    tx = make_optimizer(OptimConfig(learning_rate=1e-4), 1000)
    loss = sft_objective(config, Compute(jnp.float32, "none", 0), layout).loss
    tokens = np.random.default_rng(0).integers(5, config.vocab_size, shape, np.int32)
    mask = np.ones(shape, bool)
    batch = layout.put_batch(Batch(tokens, mask, mask & (np.arange(shape[1]) > 0)))
    state = init_state(init_params(config, jax.random.key(0), layout), tx, leaves, layout)
    programs = {}
    for kind, select in {"checked": train_step.select, "unchecked": lambda is_finite, new, old: new}.items():
        with mock.patch.object(train_step, "select", select):
            update = make_update(loss, tx, leaves, layout, 1)
            programs[kind] = update.lower(state, {}, batch).compile()
    seconds = {kind: [] for kind in programs}
    for _ in range(pairs):
        for kind, program in programs.items():
            started = time.process_time()
            state, stats = program(state, {}, batch)
            jax.block_until_ready((state, stats))
            seconds[kind].append(time.process_time() - started)
    found = {kind: {"cpu_seconds": min(each)} for kind, each in seconds.items()}
    for kind, program in programs.items():
        found[kind]["bytes_accessed"] = program.cost_analysis()["bytes accessed"]
    ratios = {f"{key}_ratio": found["checked"][key] / found["unchecked"][key] for key in found["checked"]}
    return {"pairs": pairs, "batch": list(shape), **found, **ratios}


if __name__ == "__main__":
    main()
