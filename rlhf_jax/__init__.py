"""RLHF in JAX: supervised fine-tuning, reward model and PPO, from a pretrained language model to an assistant."""

import importlib
from typing import Any

from rlhf_jax import objectives
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

_LATE = {"compare_models": "rlhf_jax.compare", "score_texts": "rlhf_jax.scoring"}


def __getattr__(name: str) -> Any:
    """Functions that read texts are imported when asked for: with transformers they take seconds, and torch."""
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
