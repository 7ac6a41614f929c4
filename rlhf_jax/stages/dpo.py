"""Direct preference optimisation: the policy learns from pairs of answers, without a reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import Batch
from rlhf_jax.mesh import Layout
from rlhf_jax.models.config import Compute, DecoderConfig
from rlhf_jax.models.decoder import bind, head_kernel, head_options
from rlhf_jax.objectives.logprobs import token_logprobs
from rlhf_jax.objectives.masked import zero_outside
from rlhf_jax.objectives.preference import hinge_loss, ipo_loss, orpo_loss, smoothed_logistic_loss
from rlhf_jax.optim import OptimConfig
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


def dpo_objective(config: DecoderConfig, compute: Compute, layout: Layout, settings: DPOConfig) -> Objective:
    """The loss of preference pairs, by the log-probabilities of both answers."""

    def answers(config: DecoderConfig, compute: Compute, params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        """[B, 2] log-probability of each answer and number of its tokens, and the balance loss."""
        tokens, mask, learned = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask, batch.loss_mask))
        hidden, balance = bind(config, params)(tokens, mask, compute, layout)
        head, options = head_kernel(config, params), head_options(config, params)
        logprobs = token_logprobs(hidden[:, :-1], head, tokens[:, 1:], chunk=compute.chunk, **options)
        sums = zero_outside(logprobs, learned[:, 1:]).sum(axis=1), learned[:, 1:].sum(axis=1)
        return *(x.reshape(-1, 2) for x in sums), balance

    def measure(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logprobs, counts, _ = answers(config, compute, params, batch)
        return pair_losses(settings, logprobs, counts, batch.reference)

    def loss(params: Params, batch: Batch):
        logprobs, counts, balance = answers(config, compute, params, batch)
        losses, rewards = pair_losses(settings, logprobs, counts, batch.reference)
        chosen, rejected = jax.lax.stop_gradient(rewards).T
        stats = {"rewards_chosen": chosen.mean(), "rewards_rejected": rejected.mean()}
        stats |= {"margin": (chosen - rejected).mean(), "accuracy": (chosen > rejected).mean()}
        stats |= dict(zip(("logprob_chosen", "logprob_rejected"), logprobs.mean(axis=0), strict=True))
        return losses.mean() + balance, (losses.shape[0], stats)

    def summarize(measured: Sequence[tuple], batches: Sequence[Batch]) -> dict[str, float]:
        losses, rewards = (np.concatenate(each) for each in zip(*measured, strict=True))
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
