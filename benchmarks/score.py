"""The seconds of scoring rollouts by the four models of PPO: log-probabilities, values, rewards and advantages.

python -m benchmarks.score [--size A] [--dtype bfloat16] [key=value ...]
"""

from __future__ import annotations

import jax

from benchmarks import ceilings, timing
from benchmarks.random_models import add_overrides, engine_of, open_recipe, prompts_of
from rlhf_jax.mesh import single_device_mesh


def main(argv: list[str] | None = None) -> dict:
    args = add_overrides(timing.make_parser(__doc__)).parse_args(argv)
    with open_recipe(args) as recipe:
        engine, state, frozen = engine_of(recipe, single_device_mesh())
        prompts = prompts_of(recipe)
    rollout = engine.generate(engine.publish(state.actor.params(frozen.actor)), *prompts, jax.random.key(0))

    def step(lap: timing.Lap) -> None:
        jax.block_until_ready(engine.score(state, frozen, rollout))
        lap("score")

    return timing.report("score", "rlhf_jax", args, timing.measure(step, args), ceilings.by_jax)


if __name__ == "__main__":
    main()
