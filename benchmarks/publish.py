"""The seconds of publishing: from the parameters that train to the weights that generate.

python -m benchmarks.publish [--size A] [--dtype bfloat16] [key=value ...]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks import ceilings, timing
from benchmarks.random_models import add_overrides, open_recipe
from rlhf_jax.mesh import single_device_mesh
from rlhf_jax.models.decoder import init_params
from rlhf_jax.plan.phases import decoder_configs
from rlhf_jax.rollout import make_publish


def main(argv: list[str] | None = None) -> dict:
    args, mesh = add_overrides(timing.make_parser(__doc__)).parse_args(argv), single_device_mesh()
    with open_recipe(args) as recipe:
        config = decoder_configs(recipe, 1)[0]
        params = init_params(config, jax.random.key(0), recipe.layout(mesh))
        publish = make_publish(config, mesh, jnp.dtype(recipe.model.dtype))

    def step(lap: timing.Lap) -> None:
        jax.block_until_ready(publish(params))
        lap("publish")

    return timing.report("publish", "rlhf_jax", args, timing.measure(step, args), ceilings.by_jax)


if __name__ == "__main__":
    main()
