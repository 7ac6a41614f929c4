"""Known failures of reinforcement learning, recognised from the metrics, each logged once with what to try."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

LOGGER = logging.getLogger(__name__)
LONG = 10  # iterations that a failure must last, of those that are not of a single step
LARGE_KL = 20.0  # nats per answer, where no target is set
# Standard errors of a difference of two means that is taken for a change. Every iteration tests, against the best of
# all earlier ones: with 3, a judge of pure noise is warned of in every run of 500 iterations, with 5 in 1 of 40.
CERTAIN = 5.0


def find_symptoms(
    history: Sequence[Mapping[str, float]], *, kl_limit: float = 0.0, judges: Sequence[str] = ()
) -> dict[str, str]:
    """{metric: what it shows and what to try} of the failures that the last iterations show.

    history: metrics of all iterations so far, by the names of docs/metrics.md; those that are absent are not judged.
    kl_limit: nats per answer that the KL should not exceed for long; 0: LARGE_KL.
    judges: metrics of held-out judges, by which nothing is trained.
    """
    limit, first, last = kl_limit or LARGE_KL, history[0], history[-1]

    def lasts(name: str, is_wrong) -> bool:
        recent = [record[name] for record in history[-LONG:] if name in record]
        return len(recent) == LONG and all(map(is_wrong, recent))

    found = {}
    if last.get("first_ratio_deviation", 0.0) > 0.02:
        found["first_ratio_deviation"] = (
            'the probability ratio of the first mini-batch is not 1, so scoring (with old_logprobs="rollout" '
            'sampling) and training differ: try old_logprobs="score", model.attention="xla" and model.dtype="float32"'
        )
    if lasts("kl", lambda kl: kl > limit):
        found["kl"] = (
            f"the KL to the reference has been above {limit:g} nats per answer for {LONG} iterations: raise kl_coef, "
            "set kl_target, or lower the actor's learning rate"
        )
    if lasts("actor_entropy", lambda entropy: entropy < 0.05 * first.get("actor_entropy", 0.0)):
        found["actor_entropy"] = (
            "the entropy has fallen to a twentieth of the first iteration's, so the samples hardly differ: lower the "
            "actor's learning rate, raise kl_coef, or set entropy_coef or clip_high"
        )
    if lasts("response_length", lambda length: length < 0.25 * first["response_length"]):
        found["response_length"] = (
            "the answers have shrunk to a quarter: read RUN/*/rollouts for what the reward prefers, and raise kl_coef"
        )
    if lasts("ended_by_eos", lambda share: share < min(0.1, 0.5 * first["ended_by_eos"])):
        found["ended_by_eos"] = (
            "nearly all answers are cut at max_new_tokens: set missing_eos_penalty or overlong_tokens, or raise "
            "sample.max_new_tokens"
        )
    if lasts("explained_variance", lambda share: share < 0.0):
        found["explained_variance"] = (
            f"the critic has predicted worse than a constant for {LONG} iterations: set critic_warmup_steps or "
            "score_scale, or change the critic's learning rate"
        )
    for judge in judges:
        if is_overoptimised(history, judge):
            found[judge] = (
                "this judge, by which nothing is trained, has fallen from its best iterations while the score rose, so "
                "the policy exploits the reward: stop there, raise kl_coef, lower the actor's learning rate, or train "
                "a reward model on answers of this policy"
            )
    return found


def is_overoptimised(history: Sequence[Mapping[str, float]], judge: str) -> bool:
    """Whether the last LONG iterations have a lower mean of the judge than the LONG earlier ones where it was highest,
    and a higher score than those, both by more than CERTAIN standard errors.

    Source of the symptom: Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization" (arXiv 2210.10760).
    """
    if len(history) < 2 * LONG or any(judge not in record for record in history):
        return False
    judged, scores = (np.array([record[name] for record in history]) for name in (judge, "score_mean"))
    sums = np.convolve(judged[:-LONG], np.ones(LONG), "valid")
    best = slice(start := int(sums.argmax()), start + LONG)

    def change(values: np.ndarray) -> float:
        """The mean of the last iterations minus that of the best, in standard errors."""
        error = np.diff(values).std() / math.sqrt(LONG)  # noise by differences, which a trend does not widen
        return float(values[-LONG:].mean() - values[best].mean()) / max(error, 1e-12)

    return change(judged) < -CERTAIN and change(scores) > CERTAIN


class SymptomLog:
    """Logs each symptom of a stage once."""

    def __init__(self, stage: str, *, kl_limit: float = 0.0, judges: Sequence[str] = ()) -> None:
        self.stage, self.kl_limit, self.judges = stage, kl_limit, judges
        self.history: list[dict[str, float]] = []
        self.logged: set[str] = set()

    def add(self, step: int, stats: Mapping[str, float]) -> None:
        """Take the metrics of one more iteration, and warn of what they newly show."""
        self.history.append({name: float(value) for name, value in stats.items()})
        for name, text in find_symptoms(self.history, kl_limit=self.kl_limit, judges=self.judges).items():
            if name not in self.logged:
                LOGGER.warning(f"{self.stage} {step}: {name} = {self.history[-1][name]:.4g}: {text}")
                self.logged.add(name)
