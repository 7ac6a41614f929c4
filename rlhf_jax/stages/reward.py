"""The reward model: one score per sequence, at its last real token, higher for the preferred answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from rlhf_jax.data.batches import Batch
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.models.decoder import bind, last_hidden, scalar_scores
from rlhf_jax.objectives.preference import pairwise_losses
from rlhf_jax.optim import OptimConfig
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.supervised import Objective, SupervisedConfig, run_supervised_stage
from rlhf_jax.train_step import Params


@dataclass(frozen=True)
class RewardConfig(SupervisedConfig):
    """The [reward] section."""

    eval_batches: int = 16  # held-out batches, at most; 0: never measure
    label_smoothing: float = 0.0  # share of the pairs taken to be the wrong way round, below 0.5
    centring: float = 0.0  # coefficient of the squared sum of both scores, which keeps scores around 0; such as 0.01
    optim: OptimConfig = OptimConfig(learning_rate=5e-5, weight_decay=0.1)  # the optimizer

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5 or self.centring < 0:
            wrong = f"label_smoothing={self.label_smoothing:g}, centring={self.centring:g}"
            raise ValueError(f"{wrong}: from 0 to below 0.5, and at least 0")


def reward_objective(
    config: DecoderConfig, compute: Compute, layout: Layout, settings: RewardConfig = RewardConfig()
) -> Objective:
    """The pairwise loss of a scalar head on preference pairs."""

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Scores [B, 2] of the chosen and the rejected answer, and the balance loss."""
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
        hidden, balance = bind(config, params)(tokens, mask, compute, layout)
        return scalar_scores(params, last_hidden(hidden, mask)).reshape(-1, 2), balance

    def loss(params: Params, batch: Batch):
        both, balance = scores(params, batch)
        chosen, rejected = both.T
        stats = {"accuracy": (chosen > rejected).mean(), "margin": (chosen - rejected).mean()}
        losses = pairwise_losses(chosen, rejected, settings.label_smoothing, settings.centring)
        return losses.mean() + balance, (chosen.shape[0], stats)

    def summarize(measured: Sequence[np.ndarray], batches: Sequence[Batch]) -> dict[str, float]:
        scored = np.concatenate(measured)
        lengths = np.concatenate([batch.mask.sum(-1) for batch in batches])
        return {
            "held_out_accuracy": float((scored[:, 0] > scored[:, 1]).mean()),
            # The accuracy of a judge that prefers the longer answer; ties count half.
            "held_out_longer_is_chosen": float((0.5 + 0.5 * np.sign(lengths[:, 0] - lengths[:, 1])).mean()),
            "held_out_chosen_score": float(scored[:, 0].mean()),
            "held_out_rejected_score": float(scored[:, 1].mean()),
            "held_out_score_std": float(scored.std()),
        }

    return Objective(loss, lambda params, batch: scores(params, batch)[0], summarize, headline=("loss", "accuracy"))


def run_reward(context: StageContext, config: RewardConfig) -> None:
    """Train a scalar head and its model, which starts from this run's policy or the model that model.reward names."""
    start = context.start.get("policy", context.model.reward)
    tokenizer = None if "policy" in context.start else context.tokenizer
    run_supervised_stage(context, config, start, reward_objective, scalar_head=True, tokenizer_from=tokenizer)
