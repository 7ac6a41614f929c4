"""Direct preference optimisation: the policy learns from pairs of answers, without a reward model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import Batch
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.objectives.masked import mean, zero_outside
from rlhf_jax.objectives.preference import hinge_loss, ipo_loss, orpo_loss, smoothed_logistic_loss
from rlhf_jax.optim import OptimConfig
from rlhf_jax.policy import next_token_logprobs
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.from_scratch import make_base_model
from rlhf_jax.stages.supervised import Objective, SupervisedConfig, run_supervised_stage
from rlhf_jax.train_step import Params

REFERENCE_FREE = ("simpo", "orpo")


@dataclass(frozen=True)
class DPOConfig(SupervisedConfig):
    """The [dpo] section."""

    start: str = ""  # earlier stage whose policy it starts from; "": the latest, or without one model.actor
    # "sigmoid" (DPO), "hinge" (SLiC), "ipo"; "simpo" and "orpo" compare mean log-probabilities and need no reference
    loss: Literal["sigmoid", "hinge", "ipo", "simpo", "orpo"] = "sigmoid"
    beta: float = 0.1  # scale of a reward: beta x (log-probability of the answer - the reference's, where there is one)
    label_smoothing: float = 0.0  # share of the pairs taken to be the wrong way round, of "sigmoid" and "simpo"
    simpo_margin: float = 0.5  # by how much "simpo" wants the chosen reward above the rejected one
    nll_coef: float = 0.0  # coefficient of the chosen answer's mean negative log-likelihood, added to the loss
    # tokens of each of the two sub-rows of a row of several pairs, which do not attend to each other; 0: one pair
    pack_length: int = 0
    optim: OptimConfig = OptimConfig(learning_rate=1e-6)  # the optimizer

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta:g}: above 0, such as 0.1")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing:g}: from 0 to below 0.5")
        if self.label_smoothing and self.loss not in ("sigmoid", "simpo"):
            raise ValueError(f'label_smoothing is of "sigmoid" and "simpo", and loss="{self.loss}": set it to 0')


def pair_losses(
    config: DPOConfig, logprobs: jax.Array, counts: jax.Array, reference: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The loss [B] and the rewards [B, 2] of each pair, chosen then rejected.

    logprobs, reference [B, 2] float32: log-probability of each whole answer; counts [B, 2]: its tokens.
    """
    counts = jnp.maximum(counts, 1)
    means = logprobs / counts
    ratios = means if reference is None else logprobs - reference
    rewards = config.beta * ratios
    margin = rewards[:, 0] - rewards[:, 1]
    if config.loss == "hinge":
        losses = hinge_loss(margin)
    elif config.loss == "ipo":
        losses = ipo_loss(*(ratios / counts).T, beta=config.beta)
    elif config.loss == "orpo":
        losses = orpo_loss(*means.T, beta=config.beta)
    else:
        wanted = config.simpo_margin if config.loss == "simpo" else 0.0
        losses = smoothed_logistic_loss(margin - wanted, config.label_smoothing)
    return losses - config.nll_coef * means[:, 0], rewards


def sum_by_answer(logprobs: jax.Array, learned: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each answer and number of its tokens, both [B, 2], or [B, D, 2] of packed rows; 0 of none.

    logprobs, learned: [B, 2, T - 1] of each token after the first, and whether it belongs to an answer.
    """
    if batch.segments is None:
        return zero_outside(logprobs, learned).sum(axis=-1), learned.sum(axis=-1)
    shape = batch.scores.shape
    # A comparison instead of a scatter: it splits over devices, and its sums have a fixed order.
    mine = learned[..., None] & (batch.segments[..., 1:, None] == np.arange(1, math.prod(shape[1:]) + 1))
    sums = zero_outside(logprobs[..., None], mine).sum(axis=(1, 2)), mine.sum(axis=(1, 2))
    return sums[0].reshape(shape), sums[1].reshape(shape)


def dpo_objective(config: DecoderConfig, compute: Compute, layout: Layout, settings: DPOConfig) -> Objective:
    """The loss of preference pairs, by the log-probabilities of both answers."""

    def answers(config: DecoderConfig, compute: Compute, params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        """Log-probability of each answer and number of its tokens, both as `Batch.reference`, and the balance loss."""
        arrays = batch.tokens, batch.mask, batch.segments
        tokens, mask, segments = (x if x is None else x.reshape(-1, x.shape[-1]) for x in arrays)
        logprobs, balance = next_token_logprobs(config, params, tokens, mask, compute, layout, segments)
        learned = batch.loss_mask[..., 1:]
        return *sum_by_answer(logprobs.reshape(learned.shape), learned, batch), balance

    def pairs(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        """Loss [P], rewards and log-probabilities [P, 2] of each pair, whether there is one [P], and the balance loss.

        P is B, or B D of packed rows.
        """
        logprobs, counts, balance = answers(config, compute, params, batch)
        is_pair = jnp.ones(len(logprobs), bool) if batch.segments is None else ~jnp.isnan(batch.scores[..., 0])
        of_pairs = (x if x is None else x.reshape(-1, 2) for x in (logprobs, counts, batch.reference))
        return *pair_losses(settings, *of_pairs), logprobs.reshape(-1, 2), is_pair.reshape(-1), balance

    def measure(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        losses, rewards, _, is_pair, _ = pairs(params, batch)
        return losses, rewards, is_pair

    def loss(params: Params, batch: Batch):
        losses, rewards, logprobs, is_pair, balance = pairs(params, batch)
        chosen, rejected = jax.lax.stop_gradient(rewards).T
        each = {"rewards_chosen": chosen, "rewards_rejected": rejected}
        each |= {"margin": chosen - rejected, "accuracy": chosen > rejected}
        each |= dict(zip(("logprob_chosen", "logprob_rejected"), logprobs.T, strict=True))
        stats = {name: mean(values, is_pair) for name, values in each.items()}
        return mean(losses, is_pair) + balance, (is_pair.sum(), stats)

    def summarize(measured: Sequence[tuple], batches: Sequence[Batch]) -> dict[str, float]:
        losses, rewards, is_pair = (np.concatenate(each) for each in zip(*measured, strict=True))
        losses, rewards = losses[is_pair], rewards[is_pair]
        return {
            "held_out_loss": float(losses.mean()),
            "held_out_accuracy": float((rewards[:, 0] > rewards[:, 1]).mean()),
            "held_out_margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
            "held_out_rewards_chosen": float(rewards[:, 0].mean()),
            "held_out_rewards_rejected": float(rewards[:, 1].mean()),
        }

    def reference(params: Params, batch: Batch) -> jax.Array:
        return answers(config.without_lora(), dataclasses.replace(compute, remat="none"), params, batch)[0]

    needs_reference = settings.loss not in REFERENCE_FREE
    return Objective(loss, measure, summarize, ("loss", "accuracy"), reference if needs_reference else None)


def run_dpo(context: StageContext, config: DPOConfig) -> None:
    """Train this run's policy, or without one the model that model.actor names, on preference pairs."""
    start = context.start.get("policy") or make_base_model(context)
    run_supervised_stage(context, config, start, dpo_objective)
