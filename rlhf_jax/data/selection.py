"""Selects the rows that a stage trains on, and those that it is evaluated on, by the split and the mixture."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.data.cache import load_or_tokenize, withheld_keys
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.mapping import make_mapper, provides
from rlhf_jax.data.mixture import draws_per_epoch
from rlhf_jax.data.records import Example, RowKind, RowSpec
from rlhf_jax.data.resolve import resolve
from rlhf_jax.data.rows import Rows, SourceRows, pack_rows
from rlhf_jax.data.sources import has_eval, read_rows
from rlhf_jax.data.store import memory_store
from rlhf_jax.data.stream import StreamRows, open_stream
from rlhf_jax.data.tokenize import MAX_SHOWN, Job, check_bad_rows, encode_rows, keys_of, map_rows, split_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 4096
STREAM_EXAMPLES = 100_000  # examples that `read_examples` reads of a stream
WITHHELD, REPEATED = "prompt held out by eval_path or eval_split", "repeated prompt"


class NoRows(ValueError):
    """A stage has no rows to train on, or none to be evaluated on."""


def select_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase, spec: RowSpec, *, held_out: bool) -> Rows:
    """The rows that a stage trains on, or with `held_out` those that it is evaluated on.

    Training rows are divided by prompt (`splits.is_trained_by`): a prompt trains one stage. Held-out rows are not
    divided: no stage trains on them, so every stage is evaluated on them. They are the rows of `eval_path` or
    `eval_split` where a source has one, else those whose prompt is held out by hash. No stage trains on a row, of any
    source, whose prompt is held out by any source. Sources without fields for rows of `spec.kind` are left out.

    Raises:
        NoRows: no row is left to train on, or none to evaluate on.
        ValueError: `data.split` has no share `spec.share`; and as `cache.load_or_tokenize`.
    """
    config = resolve(config)
    check_share(config, spec)
    if spec.pack_length and spec.pack_length < config.max_length:
        raise ValueError(
            f"{spec.share}.pack_length = {spec.pack_length}: a row must hold a document of data.max_length = "
            f"{config.max_length} tokens; make them equal, or pack_length larger, or 0 to pack nothing"
        )
    sources = [source for source in config.sources if used_by(source, spec.kind, held_out)]
    if spec.pack_length and any(source.stream for source in sources):
        raise ValueError(f"rows of a stream are not packed: set {spec.share}.pack_length = 0, or stream = false")
    jobs = [Job(source, config, tokenizer, spec, held_out) for source in sources]
    stored = {at: hosts.main_first(load_or_tokenize, job) for at, job in enumerate(jobs) if not job.is_streamed}
    # After the sources are tokenized, which caches most of these keys.
    withheld = np.zeros(0, np.uint64) if held_out else hosts.main_first(withheld_keys, config)
    found: list[SourceRows | StreamRows] = []
    seen = np.zeros(0, np.uint64)
    for at, job in enumerate(jobs):
        if at not in stored:
            found.append(open_stream(job, withheld))
            continue
        store, tallies = stored[at]
        tally, keys = tallies[held_out], store.keys()
        dropped = Counter(tally.dropped)
        take = job.sides(keys)[held_out]
        elsewhere = take & np.isin(keys[:, 0], withheld)
        dropped[WITHHELD] += int(elsewhere.sum())
        (picked,) = (take & ~elsewhere).nonzero()
        if spec.kind == "prompt":  # each prompt once
            _, first = np.unique(keys[picked, 0], return_index=True)
            fresh = np.sort(first[~np.isin(keys[picked[first], 0], seen)])
            dropped[REPEATED] += len(picked) - len(fresh)
            picked = picked[fresh]
            seen = np.concatenate([seen, keys[picked, 0]])
        tally = dataclasses.replace(tally, dropped=dict(+dropped))
        found.append(SourceRows(job.source, store, picked.astype(np.int32), tally))
    return _assemble_rows(found, config, spec, held_out=held_out)


def rows_from_examples(
    examples: Sequence[Example], config: DataConfig, tokenizer: PreTrainedTokenizerBase, spec: RowSpec
) -> Rows:
    """The rows of given examples, in memory; `store.numbers()` are the indices of the examples.

    Raises:
        ValueError: more than `config.max_bad_rows` examples cannot be encoded, or no row is left.
    """
    job = Job(SourceConfig("examples"), config, tokenizer, spec, held_out=False)
    wheres = [f"{example.source}, row {example.row}" for example in examples]
    numbered = [dataclasses.replace(example, row=number) for number, example in enumerate(examples)]
    keys = keys_of(examples, 0)
    batch, tally, _ = encode_rows(numbered, wheres, keys, np.zeros(len(examples), bool), job)
    check_bad_rows(tally.bad, tally.bad_shown, config.max_bad_rows)
    store = memory_store([batch], spec.per_row, len(tokenizer))
    picked, dropped = np.arange(len(store), dtype=np.int32), Counter(tally.dropped)
    if spec.kind == "prompt":
        picked = np.sort(np.unique(store.keys()[:, 0], return_index=True)[1]).astype(np.int32)
        dropped[REPEATED] += len(store) - len(picked)
    tally = dataclasses.replace(tally, rows=len(examples), dropped=dict(+dropped))
    return _assemble_rows([SourceRows(job.source, store, picked, tally)], config, spec, held_out=False)


def read_examples(config: DataConfig, spec: RowSpec, *, held_out: bool) -> Iterator[Example]:
    """The examples of `select_rows` as text, in the order of the sources; of a stream the first STREAM_EXAMPLES.

    Raises:
        ValueError: as `select_rows`, except for no rows.
    """
    for source, examples in _by_source(config, spec, held_out):
        yield from itertools.islice(examples, STREAM_EXAMPLES if source.stream else None)


def fields_of_prompts(
    config: DataConfig, spec: RowSpec, wanted: Iterable[int], *, held_out: bool
) -> dict[int, tuple[Example, Mapping[str, Any]]]:
    """{first word of a prompt's key: its example, and the fields of its row}, of training or of held-out prompts.

    Of a prompt that is repeated, its first row, which is the one that `select_rows` takes. Streams are not read.
    """
    config, wanted = resolve(config), set(wanted)
    found: dict[int, tuple[Example, Mapping[str, Any]]] = {}
    for source in config.sources:
        job = Job(source, config, None, spec, held_out)
        if job.is_streamed or not used_by(source, spec.kind, held_out):
            continue
        to_examples = make_mapper(dataclasses.replace(source, path=job.place["path"]), spec.kind)
        for block in split_blocks(itertools.islice(read_rows(**job.place), job.limit), ROWS_AT_ONCE):
            each = [(example, row.fields) for row in block for example in map_rows([row], to_examples)[0]]
            keys = keys_of([example for example, _ in each], config.split_seed)
            mine = job.sides(keys)[held_out]
            for key, pair, is_mine in zip(keys[:, 0].tolist(), each, mine, strict=True):
                if is_mine and key in wanted:
                    found.setdefault(key, pair)
    return found


def source_sizes(config: DataConfig, spec: RowSpec) -> list[int]:
    """Number of examples of each source that a stage trains on, before drops. ValueError as `read_examples`."""
    return [sum(1 for _ in examples) for _, examples in _by_source(config, spec, False)]


def _by_source(config: DataConfig, spec: RowSpec, held_out: bool) -> Iterator[tuple[SourceConfig, Iterator[Example]]]:
    config = resolve(config)
    check_share(config, spec)
    withheld = np.zeros(0, np.uint64) if held_out else withheld_keys(config)
    for source in config.sources:
        yield source, _source_examples(Job(source, config, None, spec, held_out), withheld)


def _source_examples(job: Job, withheld: np.ndarray) -> Iterator[Example]:
    """The training or held-out examples of a source. ValueError for more than `max_bad_rows` bad rows."""
    if not used_by(job.source, job.spec.kind, job.held_out):
        return
    to_examples = make_mapper(dataclasses.replace(job.source, path=job.place["path"]), job.spec.kind)
    bad: list[str] = []
    for block in split_blocks(itertools.islice(read_rows(**job.place), job.limit), ROWS_AT_ONCE):
        examples, _, wrong = map_rows(block, to_examples)
        bad += wrong
        check_bad_rows(len(bad), bad[:MAX_SHOWN], job.config.max_bad_rows)
        keys = keys_of(examples, job.config.split_seed)
        yield from itertools.compress(examples, job.sides(keys)[job.held_out] & ~np.isin(keys[:, 0], withheld))


def _assemble_rows(found: list[SourceRows | StreamRows], config: DataConfig, spec: RowSpec, *, held_out: bool) -> Rows:
    total, tallies = sum(map(len, found)), [part.stats for part in found]
    dropped = sum((Counter(tally.dropped) for tally in tallies), Counter())
    left = sum((Counter(tally.unwritten) for tally in tallies), Counter())
    shown = [message for tally in tallies for message in tally.bad_shown]
    bad, cut = sum(tally.bad for tally in tallies), sum(part.cut for part in found)
    reported = [f"{total:,} rows"]
    reported += [f"{count:,} dropped: {reason}" for reason, count in dropped.items()]
    reported += [f"{n:,} without {what}, which the template does not write (data.template)" for what, n in left.items()]
    reported += [f"{cut:,} cut at {config.max_length} tokens"] * (cut > 0)
    reported += [f"{bad:,} bad rows left out: {message}" for message in shown[:1]]
    if not total and held_out:
        fixes = ["raise data.held_out", "give a source an eval_path", f"set {spec.share}.eval_batches=0"]
        # A stage of prompts has no eval_batches: it is evaluated by `evaluate`.
        fixes = fixes[: 2 if spec.kind == "prompt" else 3]
        raise NoRows(
            f"{spec.share}: there are no held-out rows to evaluate on ({', '.join(reported)}): "
            f"{', '.join(fixes[:-1])}, or {fixes[-1]}"
        )
    if not total:
        raise NoRows(
            f"{spec.share}: there are no rows to train on ({', '.join(reported)}): add rows, raise the stage's share "
            f"in data.split = {_split_text(config.split)}, lower data.held_out = {config.held_out}, raise "
            "data.max_prompt_length, name the fields that it needs in data.sources, or leave it out of run.stages"
        )
    if spec.pack_length:
        found = [pack_rows(part, spec.pack_length) for part in found]
        count = sum(map(len, found))
        fill = sum(float(part.lengths.sum()) for part in found) / (count * spec.pack_length * spec.per_row)
        reported.append(f"packed into {count:,} of {spec.packed_tokens} tokens, {fill:.1%} of them real")
    sizes, sources = tuple(map(len, found)), [part.source for part in found]
    # Evaluation draws each row once.
    quota = sizes if held_out else tuple(draws_per_epoch(sizes, sources, config.temperature).tolist())
    streams = [part.source.path for part in found if isinstance(part, StreamRows)]
    reported += [f"streamed: {name}, of which this is one window" for name in streams]
    if quota != sizes:
        of = ", ".join(f"{count:,} of {part.source.path}" for count, part in zip(quota, found, strict=True))
        reported.append(f"an epoch draws {sum(quota):,}: {of}")
    return Rows(tuple(found), spec.per_row, quota, ", ".join(reported))


def used_by(source: SourceConfig, kind: RowKind, held_out: bool) -> bool:
    """Whether a stage trains on rows of a kind of the source, or with `held_out` is evaluated on them.

    A stream has held-out rows only in a separate evaluation set: it is never read to its end to find those by hash.
    """
    return provides(source, kind) and not (held_out and source.stream and not has_eval(source))


def check_share(config: DataConfig, spec: RowSpec) -> None:
    """ValueError unless `data.split` is a table with the share of the stage."""
    if isinstance(config.split, str) or spec.share not in config.split:
        split, name = _split_text(config.split), spec.share
        raise ValueError(f"data.split = {split} has no share for {name}: add one, as in {{ {name} = 1 }}")


def _split_text(split: Mapping[str, float] | str) -> str:
    """The split as in TOML."""
    is_text = isinstance(split, str)
    return repr(split) if is_text else f"{{ {', '.join(f'{name} = {share:g}' for name, share in split.items())} }}"
