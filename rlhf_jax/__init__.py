"""RLHF in JAX: supervised fine-tuning, reward model and PPO, from a pretrained language model to an assistant."""

import importlib
from typing import Any

from rlhf_jax import objectives
from rlhf_jax.decode import Rollout
from rlhf_jax.mesh import MeshConfig, make_mesh
from rlhf_jax.models.lora import LoraConfig
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
    "Engine",
    "LoraConfig",
    "MeshConfig",
    "OptimConfig",
    "PolicyAnswer",
    "PolicyState",
    "Pretrained",
    "Rollout",
    "SampleConfig",
    "apply",
    "compare_models",
    "from_pretrained",
    "generate",
    "make_engine",
    "make_mesh",
    "make_optimizer",
    "objectives",
    "pad_rows",
    "reward_from_pretrained",
    "save_adapter",
    "save_pretrained",
    "score",
    "score_texts",
]

_LATE = {
    "Engine": "rlhf_jax.library",
    "OptimConfig": "rlhf_jax.optim",
    "PolicyState": "rlhf_jax.library",
    "PolicyAnswer": "rlhf_jax.library",
    "compare_models": "rlhf_jax.compare",
    "make_engine": "rlhf_jax.library",
    "make_optimizer": "rlhf_jax.optim",
    "pad_rows": "rlhf_jax.library.rows",
    "score_texts": "rlhf_jax.scoring",
}


def __getattr__(name: str) -> Any:
    """Some names are imported when asked for: with optax and orbax they take long, with transformers seconds."""
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
