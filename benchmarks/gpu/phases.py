"""Seconds of publish, generate, score and both updates of one PPO iteration, against the plan's floor and estimate.

python -m benchmarks.gpu.phases OUT [--small]

OPT-1.3B with LoRA, OPT-350M as critic and reward model, 32 prompts of 256 tokens and 256 new tokens, on all GPUs.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time

import jax

from benchmarks.gpu.models import arguments, keep, recipe_of
from benchmarks.random_models import engine_of, prompts_of
from rlhf_jax.hardware import parse_machine
from rlhf_jax.mesh import make_mesh
from rlhf_jax.plan import local_gpus
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.phases import phases
from rlhf_jax.plan.roofline import estimate_times

TRIALS = 3


def main(out: str, small: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(folder, "opt-1.3b", "opt-350m", small=small)
        result = {"tokens": rows_and_tokens(recipe), "plan": plan_of(recipe, small), "first": {}, "seconds": {}}
        keep(out, result)
        engine, state, frozen = engine_of(recipe, make_mesh(recipe.mesh))
        prompts = prompts_of(recipe)

        def time_phase(phase: str, function, *args):
            start = time.perf_counter()
            value = jax.block_until_ready(function(*args))
            result["seconds"].setdefault(phase, []).append(time.perf_counter() - start)
            return value

        for trial in range(TRIALS + 1):
            weights = time_phase("publish", engine.publish, state.actor.params(frozen.actor))
            rollout = time_phase("generate", engine.generate, weights, *prompts, jax.random.key(trial))
            del weights
            experience = time_phase("score", engine.score, state, frozen, rollout)
            actor, _ = time_phase("actor", engine.programs.actor, state.actor, frozen.actor, experience)
            critic, _ = time_phase("critic", engine.programs.critic, state.critic, frozen.critic, experience)
            state = dataclasses.replace(state, actor=actor, critic=critic)
            if trial == 0:  # includes compilation
                result["first"] = {phase: seconds.pop() for phase, seconds in result["seconds"].items()}
            keep(out, result)


def rows_and_tokens(recipe) -> dict[str, int]:
    rows, prompt = prompts_of(recipe)[0].shape
    return {"rows": rows, "prompt": prompt, "new": recipe.ppo.sample.max_new_tokens}


def plan_of(recipe, small: bool) -> dict:
    """{"gpus", "phases": {name: {"floor", "expected"}}}; the reason, if the plan does not know this GPU."""
    try:
        gpus = local_gpus()
    except ValueError as error:
        if not small:
            return {"gpus": "", "phases": {}, "error": str(error)}
        gpus = "A100-80GB"  # not the device of the toy run, whose numbers mean nothing
    wanted = parse_machine(gpus)
    mesh = abstract_mesh(recipe.mesh, wanted.count)
    table = estimate_times(recipe, phases(recipe, mesh, ("ppo",)), mesh, wanted, 0.0)
    return {"gpus": gpus, "phases": table["ppo"]["phases"]}


if __name__ == "__main__":
    out, small, _ = arguments()
    main(out, small)
