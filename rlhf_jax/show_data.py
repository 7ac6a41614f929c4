"""`rlhf-jax data`: counts of each source for each stage, and some rows as the model will see them."""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, TextIO

import numpy as np

from rlhf_jax.data.batches import Batches
from rlhf_jax.data.chat_template import Encoding
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.mapping import provides
from rlhf_jax.data.records import RowKind, RowSpec
from rlhf_jax.data.resolve import resolve
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.selection import NoRows, select_rows, used_by
from rlhf_jax.data.sources import has_eval
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.from_scratch import make_tokenizer
from rlhf_jax.stages.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEN, DIM, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
USES: dict[RowKind, str] = {"demonstration": "a dialogue", "pair": "a pair", "prompt": "a prompt"}
USES["ranking"] = "a ranking"
LEGEND = """\
share: rows whose prompt belongs to the stage, or is held out; dropped: those of them that are unusable, for the reasons
given; used: the others; cut: used rows that were truncated; median, 95% and longest: tokens of a sequence;
tokens: of all sequences together\
"""
UNWRITTEN = "not written by the chat template (data.template gives another), used without it:"
COUNTS = ("share", "dropped", "used", "cut", "median", "95%", "longest", "tokens")
NAME, WIDTH = 32, 8  # characters of a source's name and of a column in a table
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters of a terminal


def show_data(recipe: Recipe, examples: int, out: TextIO | None = None) -> None:
    """Print for each stage and source counts, drops with reasons, lengths, and `examples` rows of each source.

    Tokens with loss are bold green on a terminal, and between ⟦ and ⟧ elsewhere.

    Raises:
        ValueError: as `select_rows`, except that a stage without rows is printed.
    """
    out = out or sys.stdout
    tokenizer, data = tokenizer_of(recipe), resolve(recipe.data)
    colours = out.isatty() and not os.environ.get("NO_COLOR")
    # Everything is read before anything is printed: bad data stops the command, and totals are reported once.
    specs = {stage: replace(recipe.row_spec(stage), pack_length=0) for stage in recipe.run.stages}
    found = {(s, side): _load_rows(data, tokenizer, spec, side) for s, spec in specs.items() for side in (False, True)}
    names = short_names([source.path for source in data.sources])
    place = "new" if recipe.tokenizer == recipe.run.folder("base") else recipe.tokenizer
    title = f"tokenizer: {place}, {len(tokenizer):,} tokens"
    lines = [title, "", *source_lines(data, names, specs, found), "", LEGEND]
    for stage, spec in specs.items():
        serving = [name for name, source in zip(names, data.sources, strict=True) if provides(source, spec.kind)]
        lines += ["", _columns(f"{stage}: a row is {USES[spec.kind]}", COUNTS)]
        for held_out in (False, True):
            used = [used_by(source, spec.kind, held_out) for source in data.sources]
            lines += stage_table(list(itertools.compress(names, used)), found[stage, held_out], held_out)
        rows = found[stage, False]
        if isinstance(rows, Rows):
            lines += epoch_lines(recipe, tokenizer, stage, rows, serving)
            for name, part in zip(serving, rows.parts, strict=True):
                for row in range(min(examples, len(part))):
                    (document,) = part.documents(row)
                    lines += ["", f"  {name}, row {part.number(row)}"]
                    lines += row_text(document, tokenizer, colours)
    out.write("\n".join(lines) + "\n")


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the run; of a new model the one in its folder, or one trained now. ValueError without one."""
    base = recipe.run.folder("base")
    if recipe.tokenizer == base and not base.exists():
        specs = map(recipe.row_spec, recipe.run.stages)
        rows = min(specs, key=lambda spec: spec.kind != "demonstration")  # as in `make_base_model`
        return make_tokenizer(recipe.model, recipe.data, rows)
    return load_tokenizer(recipe.tokenizer, recipe.data)


def _load_rows(data: DataConfig, tokenizer: PreTrainedTokenizerBase, spec: RowSpec, held_out: bool) -> Rows | NoRows:
    try:
        return select_rows(data, tokenizer, spec, held_out=held_out)
    except NoRows as error:
        return error


def short_names(paths: Sequence[str]) -> list[str]:
    """Numbered names, with as much of the end of each path as fits a column."""
    names = []
    for number, path in enumerate(paths, start=1):
        end = path if path.startswith("builtin:") else "/".join(PurePath(path).parts[-2:])
        name = f"{number} {end}"
        names.append(name if len(name) <= NAME else f"{number} …{name[-(NAME - len(str(number)) - 2) :]}")
    return names


def source_lines(
    data: DataConfig,
    names: Sequence[str],
    specs: Mapping[str, RowSpec],
    found: Mapping[tuple[str, bool], Rows | NoRows],
) -> list[str]:
    """The path and format of each source, how many rows were read, and which were bad."""
    lines = ["sources"]
    for at, (source, name) in enumerate(zip(data.sources, names, strict=True)):
        tallies = {False: {}, True: {}}  # of the training rows and of the held-out rows, {stage: tally}
        for (stage, held_out), rows in found.items():
            if isinstance(rows, Rows) and used_by(source, specs[stage].kind, held_out):
                before = sum(used_by(other, specs[stage].kind, held_out) for other in data.sources[:at])
                tallies[held_out][stage] = rows.parts[before].stats
        read = {side: next((tally.rows for tally in each.values()), None) for side, each in tallies.items()}
        counts = {side: "" if count is None else f", {count:,} rows" for side, count in read.items()}
        if has_eval(source):
            held = (source.eval_path or f"split {source.eval_split}") + counts[True]
        else:
            held = f"{data.held_out:.1%} of its prompts" if data.held_out else "nothing"
            held += ", left out, as it is streamed" * (source.stream and data.held_out > 0)
        counts[False] += " in its first window, which is what all numbers below describe" * source.stream
        unserved = [f", not for {stage}" for stage, spec in specs.items() if not provides(source, spec.kind)]
        reported = f"{counts[False]}, format {source.format}{''.join(unserved)}; held out: {held}"
        lines.append(f"  {name.split()[0]} {source.path}{reported}")
        for held_out in (False, True) if has_eval(source) else (False,):
            bad = {stage: tally.bad for stage, tally in tallies[held_out].items() if tally.bad}
            if bad:
                of = ", ".join(f"{count:,} for {stage}" for stage, count in bad.items())
                lines.append(f"    bad rows left out{' of those held out' if held_out else ''}: {of}")
            shown = (message for tally in tallies[held_out].values() for message in tally.bad_shown)
            lines += [f"      {message}" for message in dict.fromkeys(shown)]
    return lines


def stage_table(serving: Sequence[str], rows: Rows | NoRows, held_out: bool) -> list[str]:
    """One line per source of the stage, one for all if there are several, and why rows were dropped."""
    title = "held out" if held_out else "training"
    if isinstance(rows, NoRows):
        return [f"  {title}: {rows}"]
    lines, reasons = [f"  {title}"], dict[tuple[str, str], Counter[str]]()
    counts = np.zeros(4, int)
    for name, part in zip(serving, rows.parts, strict=True):
        row = np.array([part.stats.share, sum(part.stats.dropped.values()), len(part), part.cut])
        lines.append(_line(name, row, part.lengths.reshape(-1)))
        counts += row
        for label, found in (("dropped:", part.stats.dropped), (UNWRITTEN, part.stats.unwritten)):
            for why, count in sorted(found.items()):
                reasons.setdefault((label, why), Counter())[name.split()[0]] = count
    if len(rows.parts) > 1:
        lines.append(_line("all", counts, np.concatenate([part.lengths.reshape(-1) for part in rows.parts])))
    for (label, why), of in sorted(reasons.items(), key=lambda each: each[0][0] == UNWRITTEN):
        by = f" ({', '.join(f'{count:,} of {number}' for number, count in of.items())})" if len(serving) > 1 else ""
        lines.append(f"    {label} {of.total():,} {why}{by}")
    return lines


def _line(name: str, counts: np.ndarray, lengths: np.ndarray) -> str:
    """lengths: [n] tokens of sequences."""
    ends = np.quantile(lengths, (0.5, 0.95, 1.0), method="higher").tolist() if len(lengths) else ["-"] * 3
    values = (*counts.tolist(), *ends, int(lengths.sum()))
    return _columns(f"  {name}", [value if isinstance(value, str) else f"{value:,}" for value in values])


def _columns(name: str, values: Sequence[str]) -> str:
    return f"{name:{NAME + 2}}" + "".join(f" {value:>{WIDTH}}" for value in values[:-1]) + f" {values[-1]:>{WIDTH + 5}}"


def epoch_lines(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stage: str, rows: Rows, serving: Sequence[str]
) -> list[str]:
    """Rows drawn of each source per epoch, unless each row once; steps per epoch; and the share of padding."""
    lines, spec, config = [], recipe.row_spec(stage), getattr(recipe, stage)
    if spec.pack_length:
        rows = select_rows(recipe.data, tokenizer, spec, held_out=False)
        lines.append(f"  packed: {sum(map(len, rows.parts)):,} rows of {spec.packed_tokens} tokens")
    if rows.quota != tuple(map(len, rows.parts)):
        drawn = ", ".join(f"{count:,} of {name.split()[0]}" for name, count in zip(serving, rows.quota, strict=True))
        lines.append(f"  drawn in an epoch: {len(rows):,} rows, {drawn}")
    size = getattr(config, "rollout_batch_size", config.batch_size)
    if size > len(rows):
        return [*lines, f"  a batch has {size} rows, more than there are: add rows, or make it smaller"]
    batches = Batches(rows, batch_size=size, seed=recipe.run.seed, buckets=getattr(config, "length_buckets", 1))
    steps = range(0, batches.steps_per_epoch, max(1, batches.steps_per_epoch // 32))
    real = np.mean([batches[step].mask.mean() for step in steps])
    shapes, count = ", ".join(map(str, batches.lengths)), batches.steps_per_epoch
    reported = f"{count:,} step{'s' * (count != 1)} of {size} rows, padded to {shapes} tokens: {1 - real:.1%} padding"
    return [*lines, f"  an epoch: {reported}"]


def row_text(row: Sequence[Encoding], tokenizer: PreTrainedTokenizerBase, colours: bool) -> list[str]:
    """The text of a row with tokens with loss marked; for a pair or a ranking the prompt once, then its answers."""
    if len(row) == 1:
        return _add_border(sequence_text(row[0], 0, tokenizer, colours))
    best = row[0]
    first = int(best.spans[0, 0]) if len(best.spans) else 0
    if not all(np.array_equal(best.tokens[:first], answer.tokens[:first]) for answer in row):
        first = 0
    prompt = Encoding(best.tokens[:first], best.spans[:0])
    lines = _add_border(sequence_text(prompt, 0, tokenizer, colours)) if first else []
    answers = [answer for answer in row if not math.isnan(answer.score)]  # without those that only fill the row
    labels = ("chosen", "rejected") if len(row) == 2 else [f"score {answer.score:g}" for answer in answers]
    for label, answer in zip(labels, answers, strict=True):
        lines += [f"    {label}:", *_add_border(sequence_text(answer, first, tokenizer, colours))]
    return lines


def sequence_text(sequence: Encoding, first: int, tokenizer: PreTrainedTokenizerBase, colours: bool) -> str:
    """The text of a sequence after its `first` tokens, with tokens with loss marked."""
    bounds = [first, *(at for at in sequence.spans.reshape(-1).tolist() if at >= first), len(sequence.tokens)]
    text = ""
    for i, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        piece, learned = _text(sequence.tokens, begin, end, tokenizer), i % 2 == 1
        if colours:
            text += _paint(piece, GREEN if learned else DIM)
        else:
            text += f"⟦{piece}⟧" if learned else piece
    return text


def _text(tokens: np.ndarray, begin: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens[begin:end] in its context: some tokenizers strip a blank at the start of a text."""
    before, upto = (tokenizer.decode(tokens[:at], clean_up_tokenization_spaces=False) for at in (begin, end))
    if not upto.startswith(before):  # a character of several tokens crosses the bound
        before, upto = "", tokenizer.decode(tokens[begin:end], clean_up_tokenization_spaces=False)
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], upto.removeprefix(before))


def _paint(text: str, colour: str) -> str:
    """Colour each line separately, because pagers reset colours at the end of a line."""
    return "\n".join(f"{colour}{line}{PLAIN}" if line else "" for line in text.split("\n"))


def _add_border(text: str) -> list[str]:
    return [f"    | {line}".rstrip() for line in text.split("\n")]
