"""Supervised fine-tuning: the next token of the answer, given the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from rlhf_jax.data.batches import Batch
from rlhf_jax.data.records import Learn
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.optim import OptimConfig
from rlhf_jax.policy import next_token_losses
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.from_scratch import make_base_model
from rlhf_jax.stages.supervised import Objective, SupervisedConfig, run_supervised_stage
from rlhf_jax.train_step import Params


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """The [sft] section."""

    learn: Learn = "answer"  # the last answer, every turn of the "assistant", or "everything"
    pack_length: int = 0  # tokens per row of several documents, which do not attend to each other; 0: one document
    optim: OptimConfig = OptimConfig(learning_rate=9.65e-6)  # the optimizer


def sft_objective(
    config: DecoderConfig, compute: Compute, layout: Layout, settings: SFTConfig | None = None
) -> Objective:
    """The mean negative log-likelihood of the tokens in the loss mask."""

    def losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        return next_token_losses(config, params, batch, compute, layout)

    def loss(params: Params, batch: Batch):
        mean, balance, count = losses(params, batch)
        return mean + balance, (count, {})

    def summarize(measured: Sequence[tuple], batches: Sequence[Batch]) -> dict[str, float]:
        means, _, counts = zip(*measured, strict=True)
        return {"held_out_loss": float(np.average([float(mean) for mean in means], weights=[int(n) for n in counts]))}

    return Objective(loss, losses, summarize, headline=("loss", "grad_norm"))


def run_sft(context: StageContext, config: SFTConfig) -> None:
    """Fine-tune the language model that model.actor names."""
    run_supervised_stage(context, config, make_base_model(context), sft_objective)
