"""The likelihood of texts: perplexity on demonstrations, and the KL divergence of a policy's own answers."""

from __future__ import annotations

import math

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.batches import Batch
from rlhf_jax.decode import Rollout
from rlhf_jax.models.attention import Choice
from rlhf_jax.models.pretrained import Pretrained, logprobs
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.scoring import chunks, mean_interval


def sequence_logprobs(
    model: Pretrained, tokens: np.ndarray, mask: np.ndarray, size: int, attention: Choice = "auto"
) -> np.ndarray:
    """[B, T - 1] of [B, T] sequences, `size` at a time, see `models.pretrained.logprobs`; 0 where all are padding."""
    (real,) = mask.any(axis=0).nonzero()  # the padding that all rows share may exceed the model's positions
    start, stop = real[0], real[-1] + 1
    parts = chunks(size, tokens[:, start:stop], mask[:, start:stop])
    found = np.zeros((len(tokens), tokens.shape[1] - 1), np.float32)
    each = [hosts.fetch(logprobs(model, *part, attention=attention)) for part in parts]
    found[:, start : stop - 1] = np.concatenate(each)[: len(tokens)]
    return found


def perplexity(model: Pretrained, batch: Batch, size: int, attention: Choice = "auto") -> float:
    """exp of the mean negative log-probability of the tokens in `loss_mask`, all rows together."""
    each, learned = sequence_logprobs(model, batch.tokens, batch.mask, size, attention), batch.loss_mask[:, 1:]
    return math.exp(-float(each[learned].astype(np.float64).mean()))


def is_own_distribution(sample: SampleConfig) -> bool:
    """Whether answers are drawn from the model's own distribution: not greedy, tempered, cut or penalised."""
    return sample == SampleConfig(sample.max_new_tokens, num_samples=sample.num_samples)


def answer_kl(
    reference: Pretrained, rollout: Rollout, size: int, attention: Choice = "auto"
) -> tuple[float, float, float]:
    """The mean KL of whole answers to the reference, in nats, and its 95% interval, see `scoring.mean_interval`.

    Of answers drawn from the policy's own distribution: the mean over them of sum_t log pi_t - log ref_t, which is k1
    of `objectives.kl`.
    """
    tokens = np.concatenate([rollout.prompts, rollout.tokens], axis=1)
    mask = np.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
    theirs = sequence_logprobs(reference, tokens, mask, size, attention)[:, rollout.prompts.shape[1] - 1 :]
    return mean_interval(np.where(rollout.mask, rollout.model_logprobs - theirs, 0.0).sum(axis=1))
