"""The mathematics: pure functions of arrays, each with its equation and source."""

from rlhf_jax.objectives import logprobs, masked, ppo, preference, sft

__all__ = ["logprobs", "masked", "ppo", "preference", "sft"]
