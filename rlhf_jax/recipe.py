"""A configuration file: one section per component that reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from jax.sharding import AbstractMesh, Mesh

from rlhf_jax.data.chat_template import read_template
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.splits import named_shares
from rlhf_jax.evaluate import EvaluateConfig
from rlhf_jax.mesh import Layout, MeshConfig, train_layout
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.stages.grpo_config import GRPOConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.reward import RewardConfig
from rlhf_jax.stages.run_folder import RunConfig, run_date
from rlhf_jax.stages.sft import SFTConfig
from rlhf_jax.stages.table import STAGES, check_stages, exporters, sources
from rlhf_jax.stages.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Recipe:
    """The whole configuration of a run.

    Raises:
        ValueError: stages that cannot run in this order, or a stage without a share of the data.
    """

    data: DataConfig
    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    dpo: DPOConfig = DPOConfig()
    grpo: GRPOConfig = GRPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        stages = self.run.stages
        check_stages(stages, self.model, {name: getattr(self, name) for name in STAGES})
        split = named_shares(self.data.split, tuple(STAGES), {name: STAGES[name].share for name in stages})
        if missing := [name for name in stages if name not in split]:
            raise ValueError(f"data.split has no share for {', '.join(missing)}: add it, or take it out of run.stages")
        object.__setattr__(self, "data", replace(self.data, split=split))

    def row_spec(self, stage: str) -> RowSpec:
        """The rows that a stage needs."""
        config = getattr(self, stage)
        answers, learn = getattr(config, "answers", 2), getattr(config, "learn", "answer")
        kind = "ranking" if answers > 2 else STAGES[stage].rows
        return RowSpec(kind, stage, learn, getattr(config, "pack_length", 0), answers)

    @property
    def tokenizer(self) -> str | Path:
        """The folder or hub id whose tokenizer and template all stages use: the actor's, if any stage trains one."""
        if not exporters("policy", self.run.stages):
            return self.model.reward
        return self.run.folder("base") if self.model.actor == "new" else self.model.actor

    def with_date(self, *, start: bool = False) -> Recipe:
        """The recipe with `data.date`: its own, else that of its run, else with `start` now if the template asks."""
        date = self.data.date or run_date(self.run.dir)
        if start and not date and self._asks_for_date():
            date = datetime.now().isoformat(timespec="seconds")
        return replace(self, data=replace(self.data, date=date))

    def _asks_for_date(self) -> bool:
        template, place = read_template(self.data.template), self.tokenizer
        if not template and (place != self.run.folder("base") or self.run.folder("base").exists()):
            try:
                template = str(load_tokenizer(place, self.data).chat_template)
            except ValueError:  # the stage that reads this folder says what is wrong with it
                return False
        return "strftime_now" in template

    def context(self, stage: str, mesh: Mesh) -> StageContext:
        """The inputs of the stage; the exports that it starts from need not exist yet."""
        found = sources(stage, self.run.stages, self.model, getattr(self, stage))
        start = {kind: self.run.export(name) for kind, name in found.items()}
        settings = self.row_spec(stage), self.run, self.layout(mesh), self.model, self.data
        return StageContext(stage, *settings, self.tokenizer, start)

    def layout(self, mesh: Mesh | AbstractMesh) -> Layout:
        """The layout of everything that trains on this mesh."""
        return train_layout(mesh, self.mesh.zero, offload_moments=self.model.offload_optimizer)
