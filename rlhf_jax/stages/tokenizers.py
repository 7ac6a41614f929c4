"""One tokenizer and one chat template for a run: those of its actor."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.config import DataConfig
from rlhf_jax.hub_access import hub_obstacle
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.models.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)


def load_tokenizer(place: str | Path, data: DataConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with the template of the run. ValueError where there is none."""
    obstacle = "" if Path(place).is_dir() else hub_obstacle()
    try:
        tokenizer = open_tokenizer(place)
    except (OSError, ValueError) as error:
        reason = ": ".join(filter(None, [obstacle, str(error).partition("\n")[0]]))
        raise ValueError(
            f"{place}: its tokenizer is neither in a local folder nor available from the Hugging Face hub ({reason}); "
            "set model.actor to the folder of a model"
        ) from error
    return prepare_tokenizer(tokenizer, *data.rendering)


def adopt_tokenizer(name: str, model: Pretrained, tokenizer: PreTrainedTokenizerBase) -> Pretrained:
    """A reward model or critic with the actor's tokenizer, whose ids it is given, and so its template and end of turn.

    Logged where its own template was another. ValueError as `check_same_ids`.
    """
    own = model.tokenizer
    check_same_ids(tokenizer, own, model.source, model.config.vocab_size)
    if own.chat_template != tokenizer.chat_template:
        LOGGER.info(
            f"{name}: the chat template of {model.source} is not the actor's: this run uses the actor's template and "
            "end of turn for both, and exports the reward model with them"
        )
    is_same = own.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    return dataclasses.replace(model, tokenizer=tokenizer, folder=model.folder if is_same else None)


def check_same_ids(
    actor: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase, place: str, rows: int | None = None
) -> None:
    """Check that the reward model of `place` can be given the actor's token ids.

    Each of the actor's tokens has the same id there, or is unknown there and has an id that no other token has. The
    reward model may know more tokens.

    Args:
        rows: rows of the reward model's embedding; None: not known yet.
    Raises:
        ValueError: it cannot.
    """
    ids, others = actor.get_vocab(), reward.get_vocab()
    used = set(others.values())
    clashes = [
        token
        for token, number in ids.items()
        if others.get(token, number) != number
        or (token not in others and (number in used or (rows is not None and number >= rows)))
    ]
    if clashes:
        example = min(clashes, key=ids.__getitem__)
        theirs = f"id {others[example]}" if example in others else "no id"
        raise ValueError(
            f"model.reward = {place}: its vocabulary is not the actor's ({len(clashes):,} of the actor's {len(ids):,} "
            f"tokens differ: {example!r} has id {ids[example]} there and {theirs} here). PPO scores the actor's own "
            'tokens, so take a reward model with the tokenizer of the actor, or set model.reward = "sft"'
        )
