"""The mean and variance that scores are divided by before they become rewards."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import select_rows
from rlhf_jax.models.decoder import bind, last_hidden, scalar_scores
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.objectives.moments import Moments, add_moments, no_moments
from rlhf_jax.stages.context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
ScoreScale = Literal["none", "demonstrations", "rollouts"]
DEMONSTRATIONS = 1024  # rows that are scored, at most


def demonstration_moments(context: StageContext, scorer: Pretrained, tokenizer: PreTrainedTokenizerBase) -> Moments:
    """The moments of the reward model's scores of demonstrated answers to the prompts of this stage.

    Kept in RUN/NAME/score_scale.json, and read from there where a run resumes.
    Source: Ouyang et al. 2022, section 3.5, and Stiennon et al. 2020, appendix G.1: the reward model's scores of
    demonstrations are given the mean 0 before reinforcement learning.

    Raises:
        ValueError: the data has no demonstrations.
    """
    path = context.folder / "score_scale.json"
    if kept := hosts.broadcast(json.loads(path.read_text(encoding="utf-8")) if path.exists() else None):
        return Moments(*(np.float32(kept[name]) for name in ("count", "mean", "squares")))
    rows = select_rows(context.data, tokenizer, RowSpec("demonstration", context.name), held_out=False)
    shards = context.layout.shards("batch")
    size = max(shards, min(64, len(rows)) // shards * shards)
    batches = Batches(rows, batch_size=size, seed=context.run.seed)

    @jax.jit
    def score(params, tokens, mask):
        hidden, _ = bind(scorer.config, params)(tokens, mask, context.model.compute, context.layout)
        return scalar_scores(params, last_hidden(hidden, mask))

    found = no_moments()
    for step in range(max(1, min(DEMONSTRATIONS // size, batches.steps_per_epoch))):
        batch = batches[step]
        found = add_moments(found, score(scorer.params, *context.layout.put_batch((batch.tokens, batch.mask))))
    kept = {name: float(value) for name, value in vars(found).items()}
    LOGGER.info(f"{context.name}: scores of {kept['count']:.0f} demonstrations: mean {kept['mean']:.4f}")
    if hosts.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    return found
