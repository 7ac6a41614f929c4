"""A configuration file: one section for each thing that reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.example import RowKind, RowSpec
from rlhf_jax.data.splits import named_shares
from rlhf_jax.evaluate import EvaluateConfig
from rlhf_jax.mesh import Layout, MeshConfig, train_layout
from rlhf_jax.stages.loop import RunConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo import PPOConfig
from rlhf_jax.stages.reward import RewardConfig
from rlhf_jax.stages.sft import SFTConfig

ROW_KINDS: dict[str, RowKind] = {"sft": "demonstration", "reward": "pair", "ppo": "prompt"}
SHARES = {"sft": 2.0, "reward": 4.0, "ppo": 4.0}  # where `data.split` is empty


@dataclass(frozen=True)
class Recipe:
    data: DataConfig
    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        split = named_shares(self.data.split, tuple(ROW_KINDS), SHARES)
        object.__setattr__(self, "data", replace(self.data, split=split))

    def row_spec(self, stage: str) -> RowSpec:
        """The rows that a stage asks for."""
        config = getattr(self, stage)
        return RowSpec(ROW_KINDS[stage], stage, getattr(config, "learn", "answer"), getattr(config, "pack_length", 0))

    def layout(self, mesh: Mesh | AbstractMesh) -> Layout:
        """Where all that is trained lies on the mesh of these settings."""
        return train_layout(mesh, self.mesh.zero, offload_moments=self.model.offload_optimizer)
