"""The inputs that a run passes to each of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.records import RowSpec
from rlhf_jax.mesh import Layout
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.run_folder import RunConfig
from rlhf_jax.trackers import Trackers

ModelKind = Literal["policy", "scorer"]


@dataclass(frozen=True)
class StageContext:
    """The inputs of a stage in addition to its own section of the configuration."""

    name: str  # name of the stage and of its folder, and the first word of its messages
    rows: RowSpec  # the rows that it learns from
    run: RunConfig
    layout: Layout  # layout of everything that is trained
    model: ModelConfig
    data: DataConfig
    tokenizer: str | Path  # folder or hub id of the tokenizer, and so of the chat template, of all stages of the run
    start: Mapping[ModelKind, Path]  # the exports that it starts from, one for each kind that it needs
    trackers: Trackers | None = None  # of the main process

    @property
    def folder(self) -> Path:
        return self.run.folder(self.name)

    @property
    def export(self) -> Path:
        return self.run.export(self.name)
