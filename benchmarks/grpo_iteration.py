"""The seconds of a GRPO iteration, by phase: publish, generate, a reward in Python, score by the reference, update.

    python -m benchmarks.grpo_iteration [--size qwen3] [--dtype bfloat16] [key=value ...]

A random model, answers of full length, all weights trained.
"""

from __future__ import annotations

import jax
import numpy as np

from benchmarks import ceilings, timing
from benchmarks.peers import words
from benchmarks.random_models import NEVER, add_overrides, open_recipe
from rlhf_jax.mesh import single_device_mesh
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.plan.phases import decoder_configs
from rlhf_jax.stages.grpo import grpo_engine, grpo_models, grpo_optimizers


def main(argv: list[str] | None = None) -> dict:
    args = add_overrides(timing.make_parser(__doc__, "qwen3")).parse_args(argv)
    sizes, key = timing.sizes_of(args), jax.random.key(0)
    with open_recipe(args) as recipe:
        config, layout, settings = decoder_configs(recipe, 1)[0], recipe.layout(single_device_mesh()), recipe.grpo
        optimizers = grpo_optimizers(settings, 1000)
        actor = Pretrained(config, init_params(config, key, layout), None, {}, {}, layout)
        engine = grpo_engine(settings, recipe.model, config, config, optimizers, NEVER, layout)
        state, frozen = grpo_models(actor, None, recipe.model, optimizers, 0, settings)
    tokenizer = words.make_tokenizer(sizes.vocab)
    prompts = np.array(tokenizer(words.make_prompts(sizes)).input_ids, np.int32)
    number = 0

    def step(lap: timing.Lap) -> None:
        nonlocal state, number
        number += 1
        weights = jax.block_until_ready(engine.publish(state.actor.params(frozen.actor)))
        lap("publish")
        given = prompts, np.ones(prompts.shape, bool), jax.random.fold_in(key, number)
        rollout = jax.block_until_ready(engine.generate(weights, *given))
        lap("generate")
        scores = words.share_of_distinct(tokenizer.batch_decode(np.asarray(rollout.tokens)))
        lap("reward")
        experience = jax.block_until_ready(engine.score(state, frozen, rollout, scores))
        lap("score")
        state, _ = jax.block_until_ready(engine.update(state, frozen, experience))
        lap("update")

    return timing.report("grpo_iteration", "rlhf_jax", args, timing.measure(step, args), ceilings.by_jax)


if __name__ == "__main__":
    main()
