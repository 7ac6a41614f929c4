"""What scores the answers of a stage that generates: this run's reward model, Python functions, or a weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.records import Example
from rlhf_jax.data.resolve import resolve
from rlhf_jax.data.selection import fields_of_prompts
from rlhf_jax.decode import Rollout
from rlhf_jax.reward_functions import answered_example, call_function, is_function, load_function
from rlhf_jax.stages.context import StageContext
from rlhf_jax.stages.reference import drawn_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = "model"  # the name of this run's reward model among the rewards


@dataclass(frozen=True)
class RewardsConfig:
    """The keys of every stage that scores answers."""

    # What scores an answer: "model", this run's reward model; FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, a function
    rewards: tuple[str, ...] = (MODEL,)
    # Of each of `rewards` in the sum of the scores; []: each 1. A function of weight 0 is a judge: it is only logged,
    # and a warning says where it falls while the score rises.
    reward_weights: tuple[float, ...] = ()
    reward_seconds: float = 600.0  # time limit of a function for the answers of one iteration; 0: none

    def __post_init__(self) -> None:
        # A teacher alone, `grpo.reference`, is enough to learn from.
        if not (self.rewards or getattr(self, "reference", "")) or len(set(self.rewards)) < len(self.rewards):
            raise ValueError(f"rewards = {list(self.rewards)}: name at least one, and each once")
        for name in self.rewards:
            if name != MODEL and not is_function(name):
                raise ValueError(
                    f'rewards has "{name}", which is neither "{MODEL}" nor FILE.py:FUNCTION nor PACKAGE.MODULE:FUNCTION'
                )
        if len(self.reward_weights) not in (0, len(self.rewards)):
            raise ValueError(f"reward_weights = {list(self.reward_weights)}: one for each of {list(self.rewards)}")
        if not all(map(math.isfinite, (*self.reward_weights, self.reward_seconds))) or self.reward_seconds < 0:
            raise ValueError("reward_weights and reward_seconds: finite numbers, and the seconds at least 0")

        if self.rewards and not any(self.weights.values()) and not getattr(self, "reference", ""):
            raise ValueError(f"reward_weights = {list(self.reward_weights)}: nothing to learn from, all are 0")
        if self.model_weight == 0:
            raise ValueError(f'reward_weights: "{MODEL}" of weight 0 has no effect, since only functions are judges')

    def check_functions(self) -> None:
        """Raise ValueError for a function that does not exist."""
        for name in self.functions:
            load_function(name)

    @property
    def weights(self) -> dict[str, float]:
        """{name of a reward: its weight}."""
        return dict(zip(self.rewards, self.reward_weights or [1.0] * len(self.rewards), strict=True))

    @property
    def functions(self) -> list[str]:
        """The rewards that are functions."""
        return [name for name in self.rewards if name != MODEL]

    @property
    def judges(self) -> list[str]:
        """The metrics of the functions of weight 0, which nothing learns from."""
        return [metric_of(name) for name in self.functions if self.weights[name] == 0]

    @property
    def model_weight(self) -> float | None:
        """The weight of the reward model; None: it is not used."""
        return self.weights.get(MODEL)


class RewardFunctions(NamedTuple):
    """The functions of a stage, with the rows that its prompts come from.

    Attributes:
        functions: {name of a reward: its function}.
        keys: of each part of the rows, [rows] uint64, the keys of its prompts.
        examples: {key of a prompt: its example, and the fields of its row}.
    """

    config: RewardsConfig
    functions: Mapping[str, Callable]
    keys: Sequence[np.ndarray]
    examples: Mapping[int, tuple[Example, Mapping[str, Any]]]
    as_messages: bool
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prompts: Batches, step: int, rollout: Rollout) -> dict[str, np.ndarray]:
        """The scores of each function by its name, [B x num_samples] float64, of the answers to the prompts of a step.

        Of several processes the main one calls them. Raises ValueError as `call_function`.
        """
        rollout = hosts.fetch(rollout)
        drawn = [self.examples[int(self.keys[p][r])] for p, r in zip(*prompts.draws(step), strict=True)]
        samples = len(rollout.ended) // len(drawn)
        answers = [
            answered_example(drawn[i // samples][0], self.text(rollout, i), bool(ended), drawn[i // samples][1])
            for i, ended in enumerate(rollout.ended)
        ]
        options = dict(as_messages=self.as_messages, seconds=self.config.reward_seconds)

        def scores_of(name: str) -> list[float]:
            return call_function(self.functions[name], answers, **options).tolist()

        return {name: np.array(hosts.on_main(scores_of, name)) for name in self.functions}

    def total(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """[B] float32, the weighted sum of the scores of all functions."""
        return np.asarray(sum(self.config.weights[name] * each for name, each in scores.items()), np.float32)

    def text(self, rollout: Rollout, row: int) -> str:
        """The text of an answer, without its EOS."""
        return self.tokenizer.decode(rollout.tokens[row][rollout.mask[row]], skip_special_tokens=True).strip()


def reward_metrics(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean score of each function, as metrics "reward/NAME"."""
    return {metric_of(name): float(values.mean()) for name, values in scores.items()}


def metric_of(name: str) -> str:
    """The metric of a function."""
    return f"reward/{name.rpartition(':')[2]}"


def has_messages(data: DataConfig, examples: Iterable[Example]) -> bool:
    """Whether functions are given lists of messages: where rows hold them, or a prompt has several turns."""
    formats = {source.format for source in resolve(data).sources}
    return bool(formats & {"messages", "sharegpt"}) or any(len(example.turns) > 1 for example in examples)


def open_functions(
    context: StageContext, config: RewardsConfig, tokenizer: PreTrainedTokenizerBase, *prompts: tuple[Batches, int]
) -> RewardFunctions | None:
    """The functions of a stage; None where it has none.

    Args:
        prompts: batches of the same rows, each with the number of its steps; the fields of what they draw are kept in
            memory.
    Raises:
        ValueError: no such function, or a streamed source, of which the fields of a row are not found again.
    """
    if not config.functions:
        return None
    if any(batches.rows.endless for batches, _ in prompts):
        raise ValueError("reward functions read the fields of rows, which a stream does not keep: set stream = false")
    keys = [part.store.keys()[part.selected, 0] for part in prompts[0][0].rows.parts]
    wanted: set[int] = set()
    for batches, steps in prompts:
        wanted.update(
            key for each, drawn in zip(keys, drawn_rows(batches, steps), strict=True) for key in each[drawn].tolist()
        )
    examples = fields_of_prompts(context.data, context.rows, wanted, held_out=False)
    assert len(examples) == len(wanted), "every prompt has the row that it was made from"
    as_messages = has_messages(context.data, [example for example, _ in examples.values()])
    functions = {name: load_function(name) for name in config.functions}
    return RewardFunctions(config, functions, keys, examples, as_messages, tokenizer)
