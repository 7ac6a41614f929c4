"""Models of any folders side by side on any prompts, and scores of the rows of a file: `evaluate` and `score`."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.chat_template import encode_prompts, prepare_tokenizer
from rlhf_jax.data.places import kind_of, parse_place, read_place
from rlhf_jax.data.records import Dialogue, Example
from rlhf_jax.data.tokenize import split_blocks
from rlhf_jax.evaluate import EvaluateConfig, format_report, sample_texts, win_numbers, write_evaluation
from rlhf_jax.mesh import MeshConfig, make_mesh
from rlhf_jax.models.hub import local_folder, read_json
from rlhf_jax.models.pretrained import from_pretrained, has_scalar_head, reward_from_pretrained
from rlhf_jax.reward_functions import (
    answered_example,
    call_function,
    is_function,
    load_function,
    messages_of,
    plain_turns,
)
from rlhf_jax.scoring import best_of, encode_each, score_answers, score_rows, scorer_tokenizer, win_rate
from rlhf_jax.stages.run_folder import date_of_export

LOGGER = logging.getLogger(__name__)
ROWS_PER_WRITE = 4096  # of a file that are scored before their scores are written
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Comparison(NamedTuple):
    """Answers of several models to the same prompts."""

    report: str  # text for a terminal
    numbers: dict[str, Any]  # means, and win rates over the first model with their 95% intervals
    records: list[dict[str, Any]]  # one per prompt: the prompt, and every model's answer and score


class SampledAnswer(NamedTuple):
    """One model's answer to one prompt."""

    text: str
    ended: bool  # by EOS or an end of turn, not by the maximum length
    length: int  # in tokens


def compare_models(
    folders: Sequence[str],
    prompts: str,
    reward: str = "",
    config: EvaluateConfig | None = None,
    *,
    dtype: str = "float32",
    output: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Comparison:
    """Answer the same prompts by every model, and score and compare the answers.

    Every model renders the prompts by its own chat template, and a reward model reads the answers as text by its own.

    Args:
        folders: Hugging Face folders or hub ids; win rates are over the first.
        prompts: a place of rows as in `data.sources`: a path, a hub id, or an inline table of TOML.
        reward: the folder of a reward model, or FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, see
            `reward_functions.call_function`; "": the answers are not scored.
        config: number of prompts, batch size, seed, sampling; None: the defaults.
        dtype: of the models' parameters, as in `from_pretrained`.
        output: a folder to write evaluate.json and evaluate.jsonl to, and with `config.best_of` above 1 NAME_best.jsonl
            for each model, see `write_best`; None: none.
        mesh: None: all devices.
    Raises:
        ValueError: a folder, row or function that cannot be used, or no prompt that every model has room for.
    """
    config, mesh = config or EvaluateConfig(), mesh or make_mesh(MeshConfig())
    source = parse_place(prompts, "--prompts", as_prompts=True)
    rows = list(itertools.islice(read_place(source, "prompt"), config.prompts))
    if reward and not is_function(reward):
        check_reward_model(reward)
    if config.best_of > 1 and not reward:
        raise ValueError(f"best_of={config.best_of}: give --reward, which says which of the answers is the best")
    if not rows:
        raise ValueError(f"{source.path} gives no prompts: name their field, as '{{ path = ..., prompt = ... }}'")
    names, templates = LETTERS[: len(folders)], {}
    config = replace(config, batch_size=min(config.batch_size, len(rows)))
    found: dict[str, dict[int, list[SampledAnswer]]] = {}
    for name, folder in zip(names, folders, strict=True):
        found[name], templates[name] = answer_prompts(folder, [each for _, each in rows], config, dtype, mesh)
    kept = [i for i in range(len(rows)) if all(i in answers for answers in found.values())]
    if len(kept) < len(rows):
        why = "with an answer of max_new_tokens they exceed the positions of a model"
        LOGGER.warning(f"{len(rows) - len(kept)} of {len(rows)} prompts are left out: {why}")
    if not kept:
        raise ValueError("no prompt is left that all models have room for: lower sample.max_new_tokens or shorten them")
    prompted = [rows[i] for i in kept]
    sampled = {name: [answer for i in kept for answer in answers[i]] for name, answers in found.items()}
    scores: dict[str, np.ndarray] = {}
    if reward:
        options = dict(as_messages=source.format in ("messages", "sharegpt"), dtype=dtype, mesh=mesh)
        scores = score_all(reward, prompted, sampled, templates, config, **options)
        best = {name: best_of(each, config.best_of) for name, each in scores.items()}
        sampled = {name: [sampled[name][at] for at in each] for name, each in best.items()}
        scores = {name: scores[name][each] for name, each in best.items()}

    numbers: dict[str, Any] = {"models": dict(zip(names, folders, strict=True)), "reward": reward, "prompts": len(kept)}
    numbers["best_of"] = config.best_of
    columns: dict[str, list] = {"prompt": [plain_turns(example.turns) for _, example in prompted]}
    for name, answers in sampled.items():
        columns[f"{name}_answer"] = [answer.text for answer in answers]
        measured = {part: [getattr(answer, part) for answer in answers] for part in ("length", "ended")}
        if name in scores:
            columns[f"{name}_score"] = measured["score"] = scores[name].tolist()
        numbers |= {f"{name}_{part}": float(np.mean(values)) for part, values in measured.items()}
        if name != names[0] and scores:
            numbers |= win_numbers(name, scores[name], scores[names[0]])
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    report = format_report(names, records[: config.show], numbers, len(kept), "prompts")
    report += "".join(f"\n  {name} is {folder}" for name, folder in zip(names, folders, strict=True))
    if output is not None:
        write_evaluation(Path(output), numbers, records)
        for name in names if config.best_of > 1 else ():
            examples = [example for _, example in prompted]
            write_best(Path(output) / f"{name}_best.jsonl", examples, sampled[name], scores[name])
    return Comparison(report, numbers, records)


def score_all(
    reward: str,
    prompted: Sequence[tuple[Mapping[str, Any], Example]],
    sampled: Mapping[str, Sequence[SampledAnswer]],
    templates: Mapping[str, str],
    config: EvaluateConfig,
    *,
    as_messages: bool,
    dtype: str,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """{model: [B best_of] scores} of the answers of each to these prompts, by a function or a reward model's folder."""
    each = [row for row in prompted for _ in range(config.best_of)]
    answered = {
        name: [
            answered_example(example, answer.text, answer.ended, fields)
            for (fields, example), answer in zip(each, answers, strict=True)
        ]
        for name, answers in sampled.items()
    }
    if is_function(reward):
        function = load_function(reward)
        as_messages = as_messages or any(len(example.turns) > 1 for _, example in prompted)
        return {name: call_function(function, these, as_messages=as_messages) for name, these in answered.items()}
    scorer = reward_from_pretrained(reward, mesh=mesh, dtype=dtype)
    if others := [name for name in templates if templates[name] != scorer_tokenizer(scorer).chat_template]:
        LOGGER.info(f"{reward} scores the texts in its own chat template, which is not that of {', '.join(others)}")
    return {name: score_answers(scorer, these, config.batch_size) for name, these in answered.items()}


def write_best(
    path: Path, examples: Sequence[Example], answers: Sequence[SampledAnswer], scores: Sequence[float]
) -> None:
    """Write prompts with their best answers as demonstrations, one {"messages", "score"} a line, for another SFT round.

    Answers that were cut at the maximum length are left out: SFT would teach their cut as the end.
    """
    with path.open("w", encoding="utf-8") as out:
        for example, answer, score in zip(examples, answers, scores, strict=True):
            if answer.ended:
                turns = messages_of((*example.turns, ("assistant", answer.text)))
                tools = {"tools": list(example.tools)} if example.tools else {}
                out.write(json.dumps({"messages": turns, **tools, "score": float(score)}, ensure_ascii=False) + "\n")
    ended = sum(answer.ended for answer in answers)
    LOGGER.info(f"{path}: {ended} demonstrations; {len(answers) - ended} best answers were cut and are left out")


def answer_prompts(
    folder: str, examples: Sequence[Example], config: EvaluateConfig, dtype: str, mesh: Mesh
) -> tuple[dict[int, list[SampledAnswer]], str]:
    """{index of an example: the model's `best_of` answers}, and the model's chat template.

    Prompts that leave no room for max_new_tokens have no answer.
    """
    model = from_pretrained(folder, mesh=mesh, dtype=dtype, one_copy=True)
    if model.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer: save one into the folder (tokenizer.save_pretrained)")
    tokenizer = prepare_tokenizer(model.tokenizer, date=date_of_export(model.folder))
    prompts = encode_prompts(tokenizer, [Dialogue(example.turns, example.tools) for example in examples])
    for example, ids in zip(examples, prompts, strict=True):
        if isinstance(ids, ValueError):
            raise ValueError(f"{folder}, {example.source}, row {example.row}: {ids}") from ids
    room = model.config.max_positions - config.sample.max_new_tokens
    kept = [i for i, ids in enumerate(prompts) if len(ids) <= room]
    if not kept:
        return {}, tokenizer.chat_template
    width = max(len(prompts[i]) for i in kept)
    tokens, mask = np.zeros((len(kept), width), np.int32), np.zeros((len(kept), width), bool)
    for row, i in enumerate(kept):
        tokens[row, width - len(prompts[i]) :], mask[row, width - len(prompts[i]) :] = prompts[i], True
    rollout, texts = sample_texts(model, tokens, mask, config)
    lengths, count = rollout.mask.sum(axis=1).tolist(), config.best_of
    answers = list(map(SampledAnswer, texts, rollout.ended.tolist(), lengths))
    return {i: answers[at * count : (at + 1) * count] for at, i in enumerate(kept)}, tokenizer.chat_template


def check_reward_model(folder: str, adapter: str | None = None) -> None:
    """ValueError unless this is a reward model, or an adapter makes it one."""
    if adapter is not None and read_json(local_folder(adapter) / "adapter_config.json").get("task_type") == "SEQ_CLS":
        return
    if not has_scalar_head(hf := read_json(local_folder(folder) / "config.json")):
        kind = ", ".join(hf.get("architectures") or ["of no named architecture"])
        raise ValueError(
            f"{folder} is a language model ({kind}) and has no head that scores: give the folder of a reward model, "
            "such as RUN/reward/export, whose architecture ends with ForSequenceClassification"
        )


def score_file(
    folder: str, file: str, *, adapter: str | None = None, dtype: str = "float32", batch_size: int = 64, out: TextIO
) -> None:
    """Write a line of JSON to `out` for every row of `file`: its number and its score, of a pair both answers' scores.

    Texts are encoded as they are, dialogues by the chat template of the reward model. Of a row that exceeds its
    positions the beginning is left out, which its line and the log say.

    Args:
        file: a place of rows, as `prompts` of `compare_models`.
        adapter: a PEFT folder with the reward model's adapter and head.
    Raises:
        ValueError: no reward model, or a row that cannot be scored.
    """
    check_reward_model(folder, adapter)
    source = parse_place(file, "FILE")
    kind = kind_of(source)
    scorer = reward_from_pretrained(folder, adapter, mesh=make_mesh(MeshConfig()), dtype=dtype)
    tokenizer, margins, count, cut = scorer_tokenizer(scorer), [], 0, 0
    labels = ("chosen", "rejected") if kind == "pair" else ("score",)
    for block in split_blocks(read_place(source, kind), ROWS_PER_WRITE):
        texts = [text for _, example in block for text in texts_to_score(example, kind)]
        encoded = encode_each(tokenizer, texts)
        excess = [max(0, len(ids) - scorer.config.max_positions) for ids in encoded]
        scores, per_row = score_rows(scorer, encoded, batch_size).tolist(), len(texts) // len(block)
        for i, (_, example) in enumerate(block):
            mine, over = (each[i * per_row : (i + 1) * per_row] for each in (scores, excess))
            line = {"row": example.row, **dict(zip(labels, mine, strict=True))}
            line |= {"tokens_left_out": max(over)} if any(over) else {}
            out.write(json.dumps(line) + "\n")
            margins += [mine[0] - mine[1]] if kind == "pair" else []
            count, cut = count + 1, cut + any(over)
    if cut:
        LOGGER.warning(
            f"{cut} of {count} rows exceed the {scorer.config.max_positions} positions of the reward model and were "
            "scored without their beginning (tokens_left_out)"
        )
    if margins:
        rate, low, high = win_rate(margins, np.zeros(len(margins)))
        LOGGER.info(
            f"the chosen answer scores higher in {rate:.1%} of {count} pairs (95% interval {low:.1%} to {high:.1%}, "
            f"Wilson; ties count half); mean difference {np.mean(margins):+.3f}"
        )


def texts_to_score(example: Example, kind: str) -> list[str | Dialogue]:
    """The text of an example, or its dialogue with the answer, or with either answer of a pair."""
    if not example.turns:
        return [example.text]
    answers = [example.chosen, example.rejected] if kind == "pair" else [example.answer]
    return [Dialogue((*example.turns, *example.continuation(answer)), example.tools) for answer in answers]
