"""`rlhf-jax data`: what each source gives, and some rows as the model will see them."""

from __future__ import annotations

import os
import sys
from typing import TextIO

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_jax.data.batches import Batches
from rlhf_jax.data.encode import Learn
from rlhf_jax.data.rows import Rows, SourceRows, stage_rows
from rlhf_jax.data.splits import STAGES
from rlhf_jax.data.template import Encoded, prepare_tokenizer
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.base import new_tokenizer

QUANTILES = (0.05, 0.5, 0.95, 1.0)
GREEN, DIM, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
USES = {
    "sft": "supervised fine-tuning: a dialogue a row",
    "reward": "reward model: a pair a row",
    "ppo": "PPO: a prompt a row",
}


def show_data(recipe: Recipe, examples: int, out: TextIO | None = None) -> None:
    """Print, for each stage and source, counts, drops with reasons, and lengths, and `examples` rows of each source.

    What the model learns stands in bold green on a terminal, and between ⟦ and ⟧ elsewhere.

    Raises:
        ValueError: as `stage_rows`, but where a stage has no rows that is printed.
    """
    out = out or sys.stdout
    tokenizer = tokenizer_of(recipe)
    colours = out.isatty() and not os.environ.get("NO_COLOR")
    print(f"tokenizer: {recipe.model.actor}, {len(tokenizer):,} words", file=out)
    for stage in STAGES:
        print(f"\n{stage} - {USES[stage]}", file=out)
        learn: Learn = recipe.sft.learn if stage == "sft" else "answer"
        pack_length = recipe.sft.pack_length if stage == "sft" else 0
        for held_out in (False, True):
            try:
                rows = stage_rows(recipe.data, tokenizer, stage, held_out=held_out, learn=learn)
            except ValueError as error:
                if "there are no " not in str(error):
                    raise
                print(f"  {error}", file=out)
                continue
            print(f"  {'held out' if held_out else 'training'}: {rows.report}", file=out)
            for part in rows.parts:
                for line in described(part):
                    print(f"    {line}", file=out)
            if held_out:
                continue
            print(f"  {padding(recipe, rows, stage)}", file=out)
            if pack_length:
                packed = stage_rows(recipe.data, tokenizer, stage, held_out=False, learn=learn, pack_length=pack_length)
                print(f"  packed: {packed.report}", file=out)
            for part in rows.parts:
                for row in range(min(examples, len(part))):
                    number = part.store.numbers()[part.picked[row]]
                    print(f"\n  {part.name}, row {number}:", file=out)
                    (document,) = part.documents(row)
                    for sequence in document:
                        print(indented(shown(sequence, tokenizer, colours)), file=out)


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """That of model.actor; of a new model the one that its run has, or that would be trained now."""
    if recipe.model.actor != "new":
        return prepare_tokenizer(AutoTokenizer.from_pretrained(recipe.model.actor), recipe.data.template)
    folder = recipe.run.folder("base")
    if folder.exists():
        return prepare_tokenizer(AutoTokenizer.from_pretrained(folder), recipe.data.template)
    return new_tokenizer(recipe.model, recipe.data)


def described(part: SourceRows) -> list[str]:
    """Lines about one source: what was read, what became of it, and the lengths in tokens of what is left."""
    tally = part.tally
    lines = [
        f"{part.name}: {tally.rows:,} rows read, {tally.elsewhere:,} for other stages, {tally.bad:,} bad, "
        f"{sum(tally.dropped.values()):,} dropped, {tally.cut:,} cut; {len(part):,} here"
    ]
    lines += [f"  dropped: {count:,} {reason}" for reason, count in sorted(tally.dropped.items())]
    lines += [f"  bad: {message}" for message in tally.bad_shown]
    if len(part):
        lengths = part.lengths.reshape(-1)
        ends = np.quantile(lengths, QUANTILES, method="higher")
        told = ", ".join(f"{share:.0%} {end}" for share, end in zip(QUANTILES, ends, strict=True))
        lines.append(f"  tokens of a sequence: mean {lengths.mean():.1f}, up to {told}; in all {int(lengths.sum()):,}")
    return lines


def padding(recipe: Recipe, rows: Rows, stage: str) -> str:
    """What share of the positions of an epoch's batches is padding."""
    config = getattr(recipe, stage)
    size = config.rollout_batch_size if stage == "ppo" else config.batch_size
    if size > len(rows):
        return f"fewer rows than a batch has ({size})"
    batches = Batches(rows, batch_size=size, seed=recipe.run.seed, buckets=getattr(config, "length_buckets", 1))
    steps = range(0, batches.steps_per_epoch, max(1, batches.steps_per_epoch // 32))
    real = np.mean([batches[step].mask.mean() for step in steps])
    shapes = ", ".join(map(str, batches.lengths))
    return f"{batches.steps_per_epoch:,} steps of {size} an epoch, rows of {shapes} tokens, {1 - real:.1%} padding"


def shown(sequence: Encoded, tokenizer: PreTrainedTokenizerBase, colours: bool) -> str:
    """The text of a sequence, what is learned of it set off."""
    begin, end, other = (GREEN, PLAIN + DIM, DIM) if colours else ("⟦", "⟧", "")
    text, at = other, 0
    for first, last in sequence.spans.tolist():
        text += (
            tokenizer.decode(sequence.tokens[at:first]) + begin + tokenizer.decode(sequence.tokens[first:last]) + end
        )
        at = last
    return text + tokenizer.decode(sequence.tokens[at:]) + (PLAIN if colours else "")


def indented(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.split("\n"))
