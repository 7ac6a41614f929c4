"""A configuration file: one section for each thing that reads it."""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.data.config import DataConfig
from rlhf_jax.evaluate import EvaluateConfig
from rlhf_jax.mesh import Layout, MeshConfig, train_layout
from rlhf_jax.stages.loop import RunConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo import PPOConfig
from rlhf_jax.stages.reward import RewardConfig
from rlhf_jax.stages.sft import SFTConfig


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

    def layout(self, mesh: Mesh | AbstractMesh) -> Layout:
        """Where all that is trained lies on the mesh of these settings."""
        return train_layout(mesh, self.mesh.zero, offload_moments=self.model.offload_optimizer)
