"""The seconds of an optimizer step of supervised fine-tuning, with a loss on every token.

python -m benchmarks.train_step [--size A] [--dtype bfloat16] [key=value ...]

All weights train, or with model.lora.rank=N adapters.
"""

from __future__ import annotations

import jax
import numpy as np

from benchmarks import ceilings, timing
from benchmarks.random_models import add_overrides, draw, open_recipe
from rlhf_jax.data.batches import Batch
from rlhf_jax.mesh import single_device_mesh
from rlhf_jax.optim import make_optimizer
from rlhf_jax.plan.phases import decoder_configs
from rlhf_jax.stages.batch_sizes import micro_batches
from rlhf_jax.stages.models import make_state
from rlhf_jax.stages.sft import sft_objective
from rlhf_jax.stages.supervised import make_programs


def main(argv: list[str] | None = None) -> dict:
    args = add_overrides(timing.make_parser(__doc__)).parse_args(argv)
    sizes = timing.sizes_of(args)
    with open_recipe(args) as recipe:
        config, layout, settings = decoder_configs(recipe, 1)[0], recipe.layout(single_device_mesh()), recipe.sft
        tx = make_optimizer(settings.optim, 1000)
        parts = micro_batches("sft", settings.batch_size, settings.micro_batch_size, layout)
        adapted = recipe.model.with_lora(config)
        objective = sft_objective(adapted, recipe.model.compute, layout)
        update, _ = make_programs(objective, adapted, layout, tx, parts)
        state, frozen = make_state(draw(config, 0, recipe, layout), recipe.model, tx, 0)
    tokens = np.random.default_rng(0).integers(3, sizes.vocab, (sizes.rows, sizes.length)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    batch = Batch(tokens, mask, mask & (np.arange(sizes.length) > 0))

    def step(lap: timing.Lap) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(update(state, frozen, batch))
        lap("update")

    subject = "adapter_step" if frozen else "train_step"
    return timing.report(subject, "rlhf_jax", args, timing.measure(step, args), ceilings.by_jax)


if __name__ == "__main__":
    main()
