"""The reward model: one score per sequence, at its last real token, higher for the preferred answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from rlhf_jax.data.batches import Batch
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.mapping import provides
from rlhf_jax.data.resolve import resolve
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.models.decoder import bind, last_hidden, scalar_scores
from rlhf_jax.objectives.masked import zero_outside
from rlhf_jax.objectives.preference import mean_of_rankings, pairwise_losses, ranking_pairs
from rlhf_jax.optim import OptimConfig
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.supervised import Objective, SupervisedConfig, run_supervised_stage
from rlhf_jax.train_step import Params


@dataclass(frozen=True)
class RewardConfig(SupervisedConfig):
    """The [reward] section."""

    eval_batches: int = 16  # held-out batches, at most; 0: never measure
    # Answers of a row, at most: with more than 2 all answers to a prompt are compared in one batch, each read once;
    # with 2 a ranking gives a row for every pair.
    answers: int = 2
    margin_coef: float = 0.0  # times the margin of a pair is what its scores should differ by; needs data with margins
    label_smoothing: float = 0.0  # share of the pairs taken to be the wrong way round, below 0.5
    centring: float = 0.0  # coefficient of the squared sum of both scores, which keeps scores around 0; such as 0.01
    optim: OptimConfig = OptimConfig(learning_rate=5e-5, weight_decay=0.1)  # the optimizer

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5 or min(self.centring, self.margin_coef) < 0 or self.answers < 2:
            names = ("label_smoothing", "centring", "margin_coef", "answers")
            wrong = ", ".join(f"{name}={getattr(self, name):g}" for name in names)
            raise ValueError(f"{wrong}: label_smoothing below 0.5, answers at least 2, the others at least 0")


def reward_objective(
    config: DecoderConfig, compute: Compute, layout: Layout, settings: RewardConfig = RewardConfig()
) -> Objective:
    """The pairwise loss of a scalar head on preference pairs and rankings."""

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Scores [B, K] of all answers, and the balance loss."""
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
        hidden, balance = bind(config, params)(tokens, mask, compute, layout)
        return scalar_scores(params, last_hidden(hidden, mask)).reshape(batch.scores.shape), balance

    def loss(params: Params, batch: Batch):
        found, balance = scores(params, batch)
        better, worse, counts = ranking_pairs(batch.scores, batch.scores)
        wanted = settings.margin_coef * zero_outside(better - worse, counts)
        chosen, rejected, _ = ranking_pairs(found, batch.scores)
        losses = pairwise_losses(chosen, rejected, settings.label_smoothing, settings.centring, wanted)
        each = {"loss": losses, "accuracy": chosen > rejected, "margin": chosen - rejected}
        stats = {name: mean_of_rankings(values, counts) for name, values in each.items()}
        return stats.pop("loss") + balance, (counts.any(axis=1).sum(), stats)

    def summarize(measured: Sequence[np.ndarray], batches: Sequence[Batch]) -> dict[str, float]:
        def pairs(values: Sequence[np.ndarray]) -> np.ndarray:
            """[P, 2] of the better and the worse answer of every pair."""
            found = []
            for each, batch in zip(values, batches, strict=True):
                better, worse, counts = map(np.asarray, ranking_pairs(each, batch.scores))
                found.append(np.stack([better, worse], axis=-1)[counts])
            return np.concatenate(found)

        scored, lengths = pairs(measured), pairs([batch.mask.sum(-1) for batch in batches])
        every = [each[~np.isnan(batch.scores)] for each, batch in zip(measured, batches, strict=True)]
        return {
            "held_out_accuracy": float((scored[:, 0] > scored[:, 1]).mean()),
            # The accuracy of a judge that prefers the longer answer; ties count half.
            "held_out_longer_is_chosen": float((0.5 + 0.5 * np.sign(lengths[:, 0] - lengths[:, 1])).mean()),
            "held_out_chosen_score": float(scored[:, 0].mean()),
            "held_out_rejected_score": float(scored[:, 1].mean()),
            "held_out_score_std": float(np.concatenate(every).std()),
        }

    return Objective(loss, lambda params, batch: scores(params, batch)[0], summarize, headline=("loss", "accuracy"))


def check_margins(data: DataConfig) -> None:
    """ValueError where a source of pairs does not say how much better its chosen answers are."""
    for source in resolve(data).sources:
        has_margins = source.margin or (source.format == "ranking" and source.scores)
        if provides(source, "pair") and not has_margins:
            fix = "name its field, data.sources.margin, or set reward.margin_coef = 0"
            raise ValueError(f"reward.margin_coef needs margins, and {source.path} has none: {fix}")


def run_reward(context: StageContext, config: RewardConfig) -> None:
    """Train a scalar head and its model, which starts from this run's policy or the model that model.reward names."""
    if config.margin_coef:
        check_margins(context.data)
    start = context.start.get("policy", context.model.reward)
    tokenizer = None if "policy" in context.start else context.tokenizer
    run_supervised_stage(context, config, start, reward_objective, scalar_head=True, tokenizer_from=tokenizer)
