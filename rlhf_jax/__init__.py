"""RLHF in JAX: supervised fine-tuning, reward model and PPO, from a pretrained language model to an assistant."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax import objectives as objectives
    from rlhf_jax.compare import compare_models as compare_models
    from rlhf_jax.decode import Rollout as Rollout
    from rlhf_jax.library import Engine as Engine
    from rlhf_jax.library import PolicyAnswer as PolicyAnswer
    from rlhf_jax.library import PolicyState as PolicyState
    from rlhf_jax.library import make_engine as make_engine
    from rlhf_jax.library.rows import pad_rows as pad_rows
    from rlhf_jax.mesh import MeshConfig as MeshConfig
    from rlhf_jax.mesh import make_mesh as make_mesh
    from rlhf_jax.models.lora import LoraConfig as LoraConfig
    from rlhf_jax.models.pretrained import Pretrained as Pretrained
    from rlhf_jax.models.pretrained import apply as apply
    from rlhf_jax.models.pretrained import from_pretrained as from_pretrained
    from rlhf_jax.models.pretrained import reward_from_pretrained as reward_from_pretrained
    from rlhf_jax.models.pretrained import save_adapter as save_adapter
    from rlhf_jax.models.pretrained import save_pretrained as save_pretrained
    from rlhf_jax.models.pretrained import score as score
    from rlhf_jax.optim import OptimConfig as OptimConfig
    from rlhf_jax.optim import make_optimizer as make_optimizer
    from rlhf_jax.rollout import sample_answers as generate  # noqa: F401
    from rlhf_jax.sampling import SampleConfig as SampleConfig
    from rlhf_jax.scoring import score_texts as score_texts

_OBJECTS = {
    "Engine": "rlhf_jax.library:Engine",
    "LoraConfig": "rlhf_jax.models.lora:LoraConfig",
    "MeshConfig": "rlhf_jax.mesh:MeshConfig",
    "OptimConfig": "rlhf_jax.optim:OptimConfig",
    "PolicyAnswer": "rlhf_jax.library:PolicyAnswer",
    "PolicyState": "rlhf_jax.library:PolicyState",
    "Pretrained": "rlhf_jax.models.pretrained:Pretrained",
    "Rollout": "rlhf_jax.decode:Rollout",
    "SampleConfig": "rlhf_jax.sampling:SampleConfig",
    "apply": "rlhf_jax.models.pretrained:apply",
    "compare_models": "rlhf_jax.compare:compare_models",
    "from_pretrained": "rlhf_jax.models.pretrained:from_pretrained",
    "generate": "rlhf_jax.rollout:sample_answers",
    "make_engine": "rlhf_jax.library:make_engine",
    "make_mesh": "rlhf_jax.mesh:make_mesh",
    "make_optimizer": "rlhf_jax.optim:make_optimizer",
    "objectives": "rlhf_jax.objectives",
    "pad_rows": "rlhf_jax.library.rows:pad_rows",
    "reward_from_pretrained": "rlhf_jax.models.pretrained:reward_from_pretrained",
    "save_adapter": "rlhf_jax.models.pretrained:save_adapter",
    "save_pretrained": "rlhf_jax.models.pretrained:save_pretrained",
    "score": "rlhf_jax.models.pretrained:score",
    "score_texts": "rlhf_jax.scoring:score_texts",
}
__all__ = list(_OBJECTS)


def __getattr__(name: str) -> Any:
    """Every public name is imported when asked for: JAX takes a second, transformers and what it imports several."""
    if name in _OBJECTS:
        return resolve_name(_OBJECTS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OBJECTS})
