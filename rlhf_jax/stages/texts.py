"""Texts that the actor learns in the same optimizer steps as the rewards (PTX; Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_jax.data.batches import Batch, Batches, Prefetch
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import select_rows
from rlhf_jax.stages.batch_sizes import check_row_lengths
from rlhf_jax.stages.context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextsConfig:
    """The texts of mixture training."""

    # Coefficient of their next-token loss, in the actor's loss; 0: none. InstructGPT and DeepSpeed-Chat take 27.8.
    coef: float = 0.0
    batch_size: int = 64  # rows of texts of one optimizer step, over all devices
    # Where they come from, as data.sources, such as [{ path = "corpus.txt", format = "text" }]; []: the demonstrations
    # of the stage that trained the policy.
    sources: tuple[SourceConfig, ...] = ()

    def __post_init__(self) -> None:
        if self.coef < 0 or self.batch_size < 1:
            raise ValueError(f"coef={self.coef:g}, batch_size={self.batch_size}: at least 0, and at least 1")


def open_texts(
    context: StageContext, config: TextsConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int, updates: int
) -> Callable[[int], Batch] | None:
    """(number of the optimizer step) -> its `Batch` of texts, on the devices; None where the coefficient is 0.

    Raises:
        ValueError: no rows, fewer than a batch, or rows longer than the model's positions.
    """
    if not config.coef:
        return None
    data, share = context.data, context.start["policy"].parent.name
    if config.sources:
        data = dataclasses.replace(data, sources=config.sources, split={share: 1.0})
    rows = select_rows(data, tokenizer, RowSpec("demonstration", share), held_out=False)
    check_row_lengths(context.name, rows, max_positions)
    LOGGER.info(f"{context.name}: texts: {rows.report}")
    layout, size = context.layout, config.batch_size
    prefetch = Prefetch(Batches(rows, batch_size=size, seed=context.run.seed, own=layout.own_rows(size)), updates)
    return lambda update: layout.put_own_rows(prefetch[update], size)
