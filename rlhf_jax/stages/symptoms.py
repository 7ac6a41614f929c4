"""Known failures of reinforcement learning, recognised from the metrics, each logged once with what to try."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

LOGGER = logging.getLogger(__name__)
LONG = 10  # iterations that a failure must last, of those that are not of a single step
LARGE_KL = 20.0  # nats per answer, where no target is set


def find_symptoms(history: Sequence[Mapping[str, float]], *, kl_limit: float = 0.0) -> dict[str, str]:
    """{metric: what it shows and what to try} of the failures that the last iterations show.

    history: metrics of all iterations so far, by the names of docs/metrics.md; those that are absent are not judged.
    kl_limit: nats per answer that the KL should not exceed for long; 0: LARGE_KL.
    """
    limit, first, last = kl_limit or LARGE_KL, history[0], history[-1]

    def lasts(name: str, is_wrong) -> bool:
        recent = [record[name] for record in history[-LONG:] if name in record]
        return len(recent) == LONG and all(map(is_wrong, recent))

    found = {}
    if last.get("first_ratio_deviation", 0.0) > 0.02:
        found["first_ratio_deviation"] = (
            "the probability ratio of the first mini-batch is not 1, so scoring and training compute the policy "
            'differently: try model.attention="xla" and model.dtype="float32", and compare logprob_mismatch'
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
    return found


class SymptomLog:
    """Logs each symptom of a stage once."""

    def __init__(self, stage: str, *, kl_limit: float = 0.0) -> None:
        self.stage, self.kl_limit = stage, kl_limit
        self.history: list[dict[str, float]] = []
        self.logged: set[str] = set()

    def add(self, step: int, stats: Mapping[str, float]) -> None:
        """Take the metrics of one more iteration, and warn of what they newly show."""
        self.history.append({name: float(value) for name, value in stats.items()})
        for name, text in find_symptoms(self.history, kl_limit=self.kl_limit).items():
            if name not in self.logged:
                LOGGER.warning(f"{self.stage} {step}: {name} = {self.history[-1][name]:.4g}: {text}")
                self.logged.add(name)
