"""Evaluation of a finished run on prompts and pairs that no stage trained on: its policies side by side."""

from __future__ import annotations

import functools
import itertools
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rlhf_jax import hosts
from rlhf_jax.data import builtin_judge
from rlhf_jax.data.batches import Batch, Batches
from rlhf_jax.data.config import BUILTIN, DataConfig
from rlhf_jax.data.records import Example, RowSpec
from rlhf_jax.data.selection import fields_of_prompts, read_examples, rows_from_examples, select_rows
from rlhf_jax.data.tokenize import keys_of
from rlhf_jax.decode import Rollout
from rlhf_jax.models.attention import Choice
from rlhf_jax.models.pretrained import Pretrained, from_pretrained, reward_from_pretrained
from rlhf_jax.reward_functions import answered_example, call_function, load_function
from rlhf_jax.rollout import sample_answers
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.scoring import chunks, score_sequences, win_rate
from rlhf_jax.stages.models import ModelConfig, log_devices
from rlhf_jax.stages.rewards import has_messages
from rlhf_jax.stages.run_folder import RunConfig
from rlhf_jax.stages.table import exporters
from rlhf_jax.stages.tokenizers import load_tokenizer

EXAMPLES_READ_PER_PROMPT = 32  # held-out rows read per prompt that is answered


@dataclass(frozen=True)
class EvaluateConfig:
    """The [evaluate] section."""

    prompts: int = 256  # held-out prompts that are answered, at most
    pairs: int = 1024  # held-out pairs that the reward model is measured on, at most
    batch_size: int = 64  # prompts answered, and sequences scored, at once
    show: int = 6  # prompts whose answers are printed
    seed: int = 0  # seed of the sampled answers
    # FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, which scores the answers in place of the run's reward model; "": none
    reward: str = ""
    sample: SampleConfig = SampleConfig()  # how the policies answer

    def __post_init__(self) -> None:
        if min(self.prompts, self.pairs, self.batch_size) < 1:
            raise ValueError("prompts, pairs and batch_size: each at least 1")
        if self.sample.num_samples != 1:
            raise ValueError(f"sample.num_samples={self.sample.num_samples}: one answer per prompt is judged; set 1")


def evaluate(run: RunConfig, mesh: Mesh, data: DataConfig, config: EvaluateConfig, model: ModelConfig) -> str:
    """Answer held-out prompts by every policy of the run, score the answers by its reward model or a function.

    Writes RUN/evaluate.json (the numbers) and RUN/evaluate.jsonl (every answer). On `builtin:assistant` a program also
    judges whether each answer is good; training never uses that judge.

    Args:
        model: only its dtype and attention are used; two models are in memory at a time.
    Returns:
        The report, as text for a terminal.
    Raises:
        ValueError: a stage of the run is not finished, there are no held-out rows, or an error of the function.
    """
    dtype, attention = model.dtype, model.attention
    policies, scorers = (exporters(kind, run.stages) for kind in ("policy", "scorer"))
    function = load_function(config.reward) if config.reward else None
    if not policies or not (scorers or function):
        needs = "stages that export a policy and a scorer, or a policy and evaluate.reward=FILE.py:FUNCTION"
        raise ValueError(f"run.stages = {list(run.stages)}: evaluate needs {needs}")
    if missing := [stage for stage in (*policies, *scorers[-1:]) if not run.export(stage).exists()]:
        raise ValueError(f"{run.dir}: {', '.join(missing)} not finished (no export folder): run `rlhf-jax train` first")
    log_devices(mesh, model)
    tokenizer, numbers = load_tokenizer(run.export(policies[-1]), data), {}  # one for all policies, and for the scorer
    if scorers:
        scorer = reward_from_pretrained(run.export(scorers[-1]), mesh=mesh, dtype=dtype)
        numbers = {"reward_accuracy": reward_accuracy(scorer, tokenizer, scorers[-1], data, config, attention)}

    examples, prompts = held_out_prompts(tokenizer, policies[-1], data, config.prompts)
    score = functools.partial(score_rollout, scorer, config=config, attention=attention) if scorers else None
    if function is not None:
        score = function_scorer(function, examples, policies[-1], data)
    is_judged = all(example.source == BUILTIN for example in examples)

    answers, scores, good = {}, {}, {}  # columns of evaluate.jsonl
    for stage in policies:
        policy = from_pretrained(run.export(stage), mesh=mesh, dtype=dtype, one_copy=True)
        rollout, texts = sample_texts(policy, prompts.tokens, prompts.mask, config, attention)
        del policy
        rewards, ended, lengths = score(rollout, texts), rollout.ended.tolist(), rollout.mask.sum(axis=1)
        answers[f"{stage}_answer"], scores[f"{stage}_score"] = texts, rewards.tolist()
        measured = {"score": rewards, "length": lengths, "ended": ended}
        if is_judged:
            judged = zip(examples, texts, ended, strict=True)
            measured["good"] = [builtin_judge.judge(e.turns[-1][1], text, end).good for e, text, end in judged]
            good[f"{stage}_good"] = measured["good"]
        numbers |= {f"{stage}_{name}": float(np.mean(values)) for name, values in measured.items()}
    first, *others = scores.values()
    for stage, other in zip(policies[1:], others, strict=True):
        numbers |= win_numbers(stage, other, first)

    columns = {"prompt": [example.turns for example in examples]} | answers | scores | good
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_evaluation(Path(run.dir), {"prompts": len(records), **numbers}, records)
    return format_report(policies, records[: config.show], numbers, len(records))


def reward_accuracy(
    scorer: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    stage: str,
    data: DataConfig,
    config: EvaluateConfig,
    attention: Choice,
) -> float:
    """Share of held-out pairs whose chosen answer scores higher; `stage` is the stage that trained the scorer."""
    rows = select_rows(data, tokenizer, RowSpec("pair", stage), held_out=True)
    count = min(config.pairs, len(rows))
    pairs = Batches(rows, batch_size=count, seed=0, shuffle=False)[0]
    tokens, mask = (x.reshape(2 * count, -1) for x in (pairs.tokens, pairs.mask))
    scores = score_sequences(scorer, tokens, mask, config.batch_size, attention)
    chosen, rejected = scores.reshape(count, 2).T
    return float((chosen > rejected).mean())


def held_out_prompts(
    tokenizer: PreTrainedTokenizerBase, stage: str, data: DataConfig, limit: int
) -> tuple[list[Example], Batch]:
    """At most `limit` held-out examples with distinct prompts that fit, and the batch of those prompts.

    Raises:
        ValueError: there are none.
    """
    spec = RowSpec("prompt", stage)
    # Some examples are dropped, and preference data repeat prompts: enough are read that `limit` remain.
    read = itertools.islice(read_examples(data, spec, held_out=True), EXAMPLES_READ_PER_PROMPT * limit)
    if not (examples := list(read)):
        raise ValueError("there are no held-out prompts: train with data.held_out or an eval_path")
    rows = rows_from_examples(examples, data, tokenizer, spec)
    (part,) = rows.parts
    count = min(limit, len(rows))
    prompts = Batches(rows, batch_size=count, seed=0, side="left", shuffle=False)[0]
    return [examples[index] for index in part.store.numbers()[part.selected[:count]]], prompts


def sample_texts(
    model: Pretrained, tokens: np.ndarray, mask: np.ndarray, config: EvaluateConfig, attention: Choice = "auto"
) -> tuple[Rollout, list[str]]:
    """Sampled answers to prompts [B, P], padded on the left, `config.batch_size` at a time; and their texts."""
    key, count = jax.random.key(config.seed), len(tokens)
    parts = [
        hosts.fetch(sample_answers(model, *part, config.sample, jax.random.fold_in(key, i), attention=attention))
        for i, part in enumerate(chunks(config.batch_size, tokens, mask))
    ]
    rollout = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
    texts = [
        model.tokenizer.decode(row[real], skip_special_tokens=True).strip()
        for row, real in zip(rollout.tokens, rollout.mask, strict=True)
    ]
    return rollout, texts


def score_rollout(
    scorer: Pretrained, rollout: Rollout, texts: Sequence[str], config: EvaluateConfig, attention: Choice
) -> np.ndarray:
    """[B] scores of answers by a reward model, which reads their tokens."""
    tokens = np.concatenate([rollout.prompts, rollout.tokens], axis=1)
    mask = np.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
    return score_sequences(scorer, tokens, mask, config.batch_size, attention)


def function_scorer(
    function: Callable, examples: Sequence[Example], stage: str, data: DataConfig
) -> Callable[[Rollout, Sequence[str]], np.ndarray]:
    """(answers to the prompts of these examples, their texts) -> [B] scores by a reward function."""
    keys = keys_of(examples, data.split_seed)[:, 0].tolist()
    found = fields_of_prompts(data, RowSpec("prompt", stage), keys, held_out=True)
    as_messages = has_messages(data, examples)

    def score(rollout: Rollout, texts: Sequence[str]) -> np.ndarray:
        given = zip(keys, texts, rollout.ended.tolist(), strict=True)
        answers = [answered_example(found[key][0], text, end, found[key][1]) for key, text, end in given]
        return np.array(hosts.on_main(lambda: call_function(function, answers, as_messages=as_messages).tolist()))

    return score


def win_numbers(name: str, scores: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """The win rate of a policy over the first one, and its 95% interval, see `win_rate`."""
    rate, low, high = win_rate(scores, first)
    return {f"{name}_win_rate": rate, f"{name}_win_rate_interval": [low, high]}


def write_evaluation(folder: Path, numbers: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Write evaluate.json, the numbers, and evaluate.jsonl, every answer; by the main process."""
    if not hosts.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "evaluate.jsonl").write_text(lines, encoding="utf-8")
    (folder / "evaluate.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def format_report(
    policies: Sequence[str], records: list[dict], numbers: dict[str, Any], count: int, what: str = "held-out prompts"
) -> str:
    """The answers of every policy to the same prompts, and the metrics over all prompts, as text for a terminal."""
    lines = []
    for record in records:
        lines.append("\n" + record["prompt"][-1][1])
        for stage in policies:
            verdict = {True: ", good", False: ", not good", None: ""}[record.get(f"{stage}_good")]
            score = f" (score {record[f'{stage}_score']:+.2f}{verdict})" if f"{stage}_score" in record else ""
            head = f"  {stage.upper()}{score}: "
            lines.append(textwrap.fill(record[f"{stage}_answer"], 110, initial_indent=head, subsequent_indent="      "))
    names = " ".join(f"{stage.upper():>8}" for stage in policies)
    lines += ["", f"{f'over {count} {what}:':<40}{names}"]
    for name, label, style in (
        ("good", "judged good", "{:8.1%}"),
        ("score", "mean score", "{:8.2f}"),
        ("length", "mean answer length, tokens", "{:8.1f}"),
        ("ended", "ended by EOS", "{:8.1%}"),
    ):
        if f"{policies[0]}_{name}" in numbers:
            lines.append(f"  {label:<38}" + " ".join(style.format(numbers[f"{stage}_{name}"]) for stage in policies))
    for stage in policies[1:]:
        if f"{stage}_win_rate" in numbers:
            low, high = numbers[f"{stage}_win_rate_interval"]
            label = f"{stage.upper()}'s answer scores above {policies[0].upper()}'s"
            interval = f"(95% interval {low:.1%} to {high:.1%}, Wilson; ties count half)"
            lines.append(f"  {label:<42} {numbers[f'{stage}_win_rate']:.1%} {interval}")
    if "reward_accuracy" in numbers:
        lines.append(f"  reward model's accuracy on held-out pairs  {numbers['reward_accuracy']:.1%}")
    return "\n".join(lines)
