"""The seconds of a PPO iteration, by phase: publish, generate, score, and one update each of actor and critic.

    python -m benchmarks.ppo_iteration [--size A] [--dtype bfloat16] [key=value ...]

Random models, and answers of full length; actor, reference, critic and reward model have the same size, and all weights
of actor and critic train.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax

from benchmarks import ceilings, timing
from benchmarks.random_models import add_overrides, engine_of, open_recipe, prompts_of
from rlhf_jax.mesh import single_device_mesh


def make_step(args: argparse.Namespace) -> Callable[[timing.Lap], None]:
    """An iteration on random models of the sizes in `args`."""
    with open_recipe(args) as recipe:
        engine, state, frozen = engine_of(recipe, single_device_mesh())
        prompts = prompts_of(recipe)
    key, number = jax.random.key(0), 0

    def step(lap: timing.Lap) -> None:
        nonlocal state, number
        number += 1

        def finish(phase: str, result):
            jax.block_until_ready(result)
            lap(phase)
            return result

        weights = finish("publish", engine.publish(state.actor.params(frozen.actor)))
        rollout = finish("generate", engine.generate(weights, *prompts, jax.random.fold_in(key, number)))
        del weights
        experience = finish("score", engine.score(state, frozen, rollout))
        for model in ("actor", "critic"):
            state, _ = finish(model, engine.update(state, frozen, experience, models=(model,)))

    return step


def main(argv: list[str] | None = None) -> dict:
    args = add_overrides(timing.make_parser(__doc__)).parse_args(argv)
    return timing.report("ppo_iteration", "rlhf_jax", args, timing.measure(make_step(args), args), ceilings.by_jax)


if __name__ == "__main__":
    main()
