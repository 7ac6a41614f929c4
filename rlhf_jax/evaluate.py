"""Evaluation of a finished run on prompts and pairs that no stage trained on: its policies side by side."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import hosts
from rlhf_jax.data import builtin_judge
from rlhf_jax.data.batches import Batch, Batches
from rlhf_jax.data.config import BUILTIN, DataConfig
from rlhf_jax.data.records import Example, RowSpec
from rlhf_jax.data.selection import NoRows, fields_of_prompts, read_examples, rows_from_examples, select_rows
from rlhf_jax.data.tokenize import keys_of
from rlhf_jax.decode import Rollout
from rlhf_jax.likelihood import answer_kl, is_own_distribution, perplexity
from rlhf_jax.models.attention import Choice
from rlhf_jax.models.pretrained import Pretrained, from_pretrained, reward_from_pretrained
from rlhf_jax.reward_functions import answered_example, call_function, load_function
from rlhf_jax.rollout import sample_answers
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.scoring import best_of, chunks, pair_accuracy, score_sequences, win_rate
from rlhf_jax.stages.models import ModelConfig, log_devices
from rlhf_jax.stages.rewards import has_messages
from rlhf_jax.stages.run_folder import RunConfig
from rlhf_jax.stages.table import exporters
from rlhf_jax.stages.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
EXAMPLES_READ_PER_PROMPT = 32  # held-out rows read per prompt that is answered


@dataclass(frozen=True)
class EvaluateConfig:
    """The [evaluate] section."""

    prompts: int = 256  # held-out prompts that are answered, at most
    pairs: int = 1024  # held-out pairs that the reward model is measured on, at most
    demonstrations: int = 256  # held-out demonstrations that the perplexity is measured on, at most; 0: none
    batch_size: int = 64  # prompts answered, and sequences scored, at once
    show: int = 6  # prompts whose answers are printed
    seed: int = 0  # seed of the sampled answers
    # FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, which scores the answers in place of the run's reward model; "": none
    reward: str = ""
    best_of: int = 1  # answers sampled to each prompt, of which the one that scores highest is evaluated
    sample: SampleConfig = SampleConfig()  # how the policies answer

    def __post_init__(self) -> None:
        if min(self.prompts, self.pairs, self.batch_size, self.best_of) < 1 or self.demonstrations < 0:
            raise ValueError("prompts, pairs, batch_size and best_of: each at least 1; demonstrations: at least 0")
        if self.sample.num_samples != 1:
            raise ValueError(f"sample.num_samples={self.sample.num_samples}: one answer is judged; set 1, and best_of")
        if self.best_of > 1 and not self.sample.temperature:
            raise ValueError(f"best_of={self.best_of} of greedy answers, which are all equal: set sample.temperature")


def evaluate(run: RunConfig, mesh: Mesh, data: DataConfig, config: EvaluateConfig, model: ModelConfig) -> str:
    """Answer held-out prompts by every policy of the run, score the answers by its reward model or a function.

    Writes RUN/evaluate.json (the numbers) and RUN/evaluate.jsonl (every answer). A moving average of a policy is one
    more policy, "ppo_ema". On `builtin:assistant` a program also judges whether each answer is good; training never
    uses that judge.

    Args:
        model: only its dtype and attention are used; two models are in memory at a time.
    Returns:
        The report, as text for a terminal.
    Raises:
        ValueError: a stage of the run is not finished, there are no held-out rows, or an error of the function.
    """
    stages, scorers = (exporters(kind, run.stages) for kind in ("policy", "scorer"))
    function = load_function(config.reward) if config.reward else None
    if not stages or not (scorers or function):
        needs = "stages that export a policy and a scorer, or a policy and evaluate.reward=FILE.py:FUNCTION"
        raise ValueError(f"run.stages = {list(run.stages)}: evaluate needs {needs}")
    if missing := [stage for stage in (*stages, *scorers[-1:]) if not run.export(stage).exists()]:
        raise ValueError(f"{run.dir}: {', '.join(missing)} not finished (no export folder): run `rlhf-jax train` first")
    log_devices(mesh, model)
    tokenizer, numbers = load_tokenizer(run.export(stages[-1]), data), {}  # one for all policies, and for the scorer
    if scorers:
        scorer = reward_from_pretrained(run.export(scorers[-1]), mesh=mesh, dtype=model.dtype)
        figures = reward_accuracy(scorer, tokenizer, scorers[-1], data, config, model.attention)
        numbers |= {"reward_accuracy": figures["accuracy"], "reward_pairs": figures}

    examples, prompts = held_out_prompts(tokenizer, stages[-1], data, config.prompts)
    score = functools.partial(score_rollout, scorer, config=config, attention=model.attention) if scorers else None
    if function is not None:
        score = function_scorer(function, examples, stages[-1], data, config.best_of)
    is_judged = all(example.source == BUILTIN for example in examples)
    demonstrations = held_out_demonstrations(tokenizer, stages[0], data, config.demonstrations)

    answers, scores, good, rollouts = {}, {}, {}, {}  # the first three are columns of evaluate.jsonl
    policies = policy_folders(run, stages)
    load = functools.partial(from_pretrained, mesh=mesh, dtype=model.dtype, one_copy=True)
    for name, folder in policies.items():
        policy = load(folder)
        rollout, texts = sample_texts(policy, prompts.tokens, prompts.mask, config, model.attention)
        if demonstrations is not None:
            given = demonstrations, config.batch_size, model.attention
            numbers[f"{name}_perplexity"] = perplexity(policy, *given)
        del policy
        rewards = np.asarray(score(rollout, texts))
        rollout, texts, rewards = keep_best(rollout, texts, rewards, config.best_of)
        ended, lengths = rollout.ended.tolist(), rollout.mask.sum(axis=1)
        answers[f"{name}_answer"], scores[f"{name}_score"], rollouts[name] = texts, rewards.tolist(), rollout
        measured = {"score": rewards, "length": lengths, "ended": ended}
        if is_judged:
            judged = zip(examples, texts, ended, strict=True)
            measured["good"] = [builtin_judge.judge(e.turns[-1][1], text, end).good for e, text, end in judged]
            good[f"{name}_good"] = measured["good"]
        numbers |= {f"{name}_{part}": float(np.mean(values)) for part, values in measured.items()}
    first, *others = scores.values()
    for name, other in zip(list(policies)[1:], others, strict=True):
        numbers |= win_numbers(name, other, first)
    numbers |= kl_numbers(load, policies, rollouts, config, model.attention)

    columns = {"prompt": [example.turns for example in examples]} | answers | scores | good
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_evaluation(Path(run.dir), {"prompts": len(records), "best_of": config.best_of, **numbers}, records)
    return format_report(list(policies), records[: config.show], numbers, len(records))


def keep_best(
    rollout: Rollout, texts: Sequence[str], rewards: np.ndarray, count: int
) -> tuple[Rollout, list[str], np.ndarray]:
    """Of `count` answers to each prompt the one with the highest reward."""
    best = best_of(rewards, count)
    return jax.tree.map(lambda x: x[best], rollout), [texts[i] for i in best], rewards[best]


def policy_folders(run: RunConfig, stages: Sequence[str]) -> dict[str, Path]:
    """{name: folder} of the policies of these stages and of their moving averages."""
    found = {}
    for stage in stages:
        found[stage] = run.export(stage)
        if (average := run.folder(stage) / "export_ema").exists():
            found[f"{stage}_ema"] = average
    return found


def reward_accuracy(
    scorer: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    stage: str,
    data: DataConfig,
    config: EvaluateConfig,
    attention: Choice,
) -> dict[str, Any]:
    """The reward model's accuracy on held-out pairs, see `pair_accuracy`; `stage` is the stage that trained it."""
    rows = select_rows(data, tokenizer, RowSpec("pair", stage), held_out=True)
    count = min(config.pairs, len(rows))
    batches = Batches(rows, batch_size=count, seed=0, shuffle=False)
    pairs, (parts, _) = batches[0], batches.draws(0)
    tokens, mask = (x.reshape(2 * count, -1) for x in (pairs.tokens, pairs.mask))
    scores = score_sequences(scorer, tokens, mask, config.batch_size, attention)
    sources = [rows.parts[part].source.path for part in parts]
    return pair_accuracy(scores.reshape(count, 2), pairs.mask.sum(axis=2), sources)


def held_out_demonstrations(
    tokenizer: PreTrainedTokenizerBase, stage: str, data: DataConfig, limit: int
) -> Batch | None:
    """At most `limit` held-out demonstrations; None where there are none, or none are wanted."""
    if not limit:
        return None
    try:
        rows = select_rows(data, tokenizer, RowSpec("demonstration", stage), held_out=True)
    except NoRows as error:
        LOGGER.info(f"the perplexity is not measured: {error}")
        return None
    return Batches(rows, batch_size=min(limit, len(rows)), seed=0, shuffle=False)[0]


def kl_numbers(
    load: Callable[[Path], Pretrained],
    policies: Mapping[str, Path],
    rollouts: Mapping[str, Rollout],
    config: EvaluateConfig,
    attention: Choice,
) -> dict[str, Any]:
    """The KL of each policy after the first to the first, on its own answers, with its 95% interval.

    {} where answers are not drawn from the policies' own distributions, or the best of several are kept.
    """
    if len(policies) < 2 or config.best_of > 1 or not is_own_distribution(config.sample):
        return {}
    first, *others = policies
    reference, found = load(policies[first]), {}
    for name in others:
        kl, low, high = answer_kl(reference, rollouts[name], config.batch_size, attention)
        found |= {f"{name}_kl": kl} | ({f"{name}_kl_interval": [low, high]} if math.isfinite(low) else {})
    return found


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
    """Sampled answers to prompts [B, P], padded on the left, and their texts.

    Prompts are answered as many at a time as have `config.batch_size` answers, or one; the `best_of` answers to each
    are in adjacent rows.
    """
    key, count = jax.random.key(config.seed), len(tokens) * config.best_of
    sample = dataclasses.replace(config.sample, num_samples=config.best_of)
    parts = [
        hosts.fetch(sample_answers(model, *part, sample, jax.random.fold_in(key, i), attention=attention))
        for i, part in enumerate(chunks(max(1, config.batch_size // config.best_of), tokens, mask))
    ]

    def join(*leaves: np.ndarray) -> np.ndarray:
        if leaves[0].ndim == 2:  # each part has its prompts in the least width that is compiled, padded on the left
            width = max(leaf.shape[1] for leaf in leaves)
            leaves = [np.pad(leaf, ((0, 0), (width - leaf.shape[1], 0))) for leaf in leaves]
        return np.concatenate(leaves)[:count]

    rollout = jax.tree.map(join, *parts)
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
    function: Callable, examples: Sequence[Example], stage: str, data: DataConfig, count: int = 1
) -> Callable[[Rollout, Sequence[str]], np.ndarray]:
    """(`count` answers to each prompt of these examples, their texts) -> [B count] scores by a reward function."""
    keys = np.repeat(keys_of(examples, data.split_seed)[:, 0], count).tolist()
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
        ("perplexity", "perplexity of demonstrations", "{:8.2f}"),
        ("kl", f"KL to {policies[0].upper()}, nats per answer", "{:8.2f}"),
    ):
        if f"{policies[-1]}_{name}" in numbers:  # the first has no KL to itself
            values = [numbers.get(f"{stage}_{name}") for stage in policies]
            shown = [" " * 8 if value is None else style.format(value) for value in values]
            lines.append(f"  {label:<38}" + " ".join(shown))
    for stage in policies[1:]:
        if f"{stage}_win_rate" in numbers:
            low, high = numbers[f"{stage}_win_rate_interval"]
            label = f"{stage.upper()}'s answer scores above {policies[0].upper()}'s"
            interval = f"(95% interval {low:.1%} to {high:.1%}, Wilson; ties count half)"
            lines.append(f"  {label:<42} {numbers[f'{stage}_win_rate']:.1%} {interval}")
    if "reward_accuracy" in numbers:
        lines.append(f"  reward model's accuracy on held-out pairs  {numbers['reward_accuracy']:.1%}")
    return "\n".join(lines + format_pairs(numbers.get("reward_pairs", {})))


def format_pairs(figures: Mapping[str, Any]) -> list[str]:
    """The figures of `pair_accuracy`, next to the accuracy of always preferring the longer answer, as lines of text."""
    if not figures:
        return []

    def line(label: str, part: Mapping[str, Any]) -> str:
        (low, high), (shortest, longest) = part["accuracy_interval"], part["longer_interval"]
        cells = (
            f"{part['accuracy']:6.1%} ({low:.1%} to {high:.1%})",
            f"{part['longer']:6.1%} ({shortest:.1%} to {longest:.1%})",
        )
        return f"    {label:<36} {part['pairs']:>6}  {cells[0]:<25} {cells[1]}"

    lines = [f"  {'of these pairs, with 95% intervals':<38} {'pairs':>6}  {'accuracy':<25} the longer answer is chosen"]
    lines += [line("all", figures)]
    for part in figures["by_length"]:
        lines.append(line(f"chosen longer by {part['from']} to {part['to']} tokens", part))
    return lines + [line(source, part) for source, part in figures.get("by_source", {}).items()]
