"""The seconds of sampling answers of full length from published weights: prefill and decoding with the KV cache.

python -m benchmarks.generate [--size A] [--dtype bfloat16] [key=value ...]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks import ceilings, timing
from benchmarks.random_models import NEVER, add_overrides, open_recipe, prompts_of
from rlhf_jax.decode import Decoding
from rlhf_jax.mesh import single_device_mesh
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.inference import Inference
from rlhf_jax.plan.phases import decoder_configs
from rlhf_jax.rollout import make_generate, make_publish


def main(argv: list[str] | None = None) -> dict:
    args = add_overrides(timing.make_parser(__doc__)).parse_args(argv)
    mesh, key = single_device_mesh(), jax.random.key(0)
    with open_recipe(args) as recipe:
        config, dtype = decoder_configs(recipe, 1)[0], jnp.dtype(recipe.model.dtype)
        publish = make_publish(config, mesh, dtype)
        weights = publish(init_params(config, key, recipe.layout(mesh)))
        model = Inference(config, publish.layout, dtype, recipe.model.attention)
        generate = make_generate(Decoding(model, recipe.ppo.sample, NEVER), recipe.ppo.generate_rows)
        prompts = prompts_of(recipe)

    def step(lap: timing.Lap) -> None:
        jax.block_until_ready(generate(weights, *prompts, key))
        lap("generate")

    return timing.report("generate", "rlhf_jax", args, timing.measure(step, args), ceilings.by_jax)


if __name__ == "__main__":
    main()
