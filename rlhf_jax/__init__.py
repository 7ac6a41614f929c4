"""RLHF in JAX: supervised fine-tuning, reward model and PPO, from a pretrained language model to an assistant."""

from rlhf_jax import objectives
from rlhf_jax.compare import compare_models
from rlhf_jax.decode import Rollout
from rlhf_jax.models.pretrained import (
    Pretrained,
    apply,
    from_pretrained,
    reward_from_pretrained,
    save_adapter,
    save_pretrained,
    score,
)
from rlhf_jax.rollout import sample_answers as generate
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.scoring import score_texts

__all__ = [
    "Pretrained",
    "Rollout",
    "SampleConfig",
    "apply",
    "compare_models",
    "from_pretrained",
    "generate",
    "objectives",
    "reward_from_pretrained",
    "save_adapter",
    "save_pretrained",
    "score",
    "score_texts",
]
