"""Peak memory of PPO on one GPU, from the allocator, against the plan: one model per process.

python -m benchmarks.gpu.memory OUT [--small] 125m-whole|350m-lora|1.3b-lora

The allocator reports the peak since the process started, so both are reported as the largest up to each phase.
"""

from __future__ import annotations

import tempfile

import jax

from benchmarks.gpu.models import arguments, keep, recipe_of
from benchmarks.random_models import engine_of, prompts_of
from rlhf_jax.mesh import single_device_mesh
from rlhf_jax.plan.compile import measure
from rlhf_jax.plan.phases import phases

WHOLE = ("model.lora.rank=0", "model.frozen_dtype=float32")
MODELS = {
    "125m-whole": ("opt-125m", "opt-125m", *WHOLE),
    "350m-lora": ("opt-350m", "opt-350m"),
    "1.3b-lora": ("opt-1.3b", "opt-350m"),
}


def main(out: str, small: bool, name: str) -> None:
    mesh, device = single_device_mesh(), jax.devices()[0]

    def peak() -> int | None:
        """Peak bytes; None if the device does not report them, as on CPUs."""
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(folder, *MODELS[name], small=small)
        found = phases(recipe, mesh, ("ppo",))
        result = {"model": name, "plan": {phase.name: measure(phase).peak(phase) for phase in found}, "phases": {}}
        keep(out, result)
        engine, state, frozen = engine_of(recipe, mesh)
        result["loading"] = peak()  # if this exceeds the plan, later peaks mean nothing
        planned = 0

        def record(phase: str, value):
            nonlocal planned
            jax.block_until_ready(value)
            planned, got = max(planned, result["plan"][phase]), peak()
            off = got / planned - 1 if got else None
            result["phases"][phase] = {"planned": planned, "measured": got, "off": off}
            keep(out, result)
            return value

        weights = record("publish", engine.publish(state.actor.params(frozen.actor)))
        rollout = record("generate", engine.generate(weights, *prompts_of(recipe), jax.random.key(0)))
        del weights
        experience = record("score", engine.score(state, frozen, rollout))
        record("actor", engine.programs.actor(state.actor, frozen.actor, experience))
        record("critic", engine.programs.critic(state.critic, frozen.critic, experience))


if __name__ == "__main__":
    out, small, (name,) = arguments()
    main(out, small, name)
