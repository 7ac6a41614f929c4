"""The mathematics: pure functions of arrays, each with its equation and source."""

from rlhf_jax.objectives import grpo as grpo
from rlhf_jax.objectives import logprobs as logprobs
from rlhf_jax.objectives import masked as masked
from rlhf_jax.objectives import ppo as ppo
from rlhf_jax.objectives import preference as preference
from rlhf_jax.objectives import sft as sft
