"""Which rows a stage trains on, and which it is measured on: chosen by the split, mixed by the blend."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import splits
from rlhf_jax.data.blend import Part, quotas
from rlhf_jax.data.build import Job, limit_of, tokenised
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.encode import encode_block, wanted
from rlhf_jax.data.example import KINDS, Example, RowKind, RowSpec
from rlhf_jax.data.mapping.mapper import mapper, resolved, serves
from rlhf_jax.data.reading.places import has_splits, read
from rlhf_jax.data.rows import Rows, SourceRows, packed
from rlhf_jax.data.store import in_memory, record_batch
from rlhf_jax.data.stream import StreamRows, stream_of
from rlhf_jax.data.tokenise import SHOWN, Shares, Tally, check_bad, key_turns, mapped

ROWS_AT_ONCE = 4096
OF_A_STREAM = 100_000  # examples that are read where text is wanted, and not rows
WITHHELD, REPEATED = "prompt held out by eval_path or eval_split", "repeated prompt"


class NoRows(ValueError):
    """A stage has no rows to train on, or none to be measured on."""


def select_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase, spec: RowSpec, *, held_out: bool) -> Rows:
    """The rows that a stage trains on, or with `held_out` those that it is evaluated on.

    Training rows are shared out by prompt (`splits.trains`): a prompt trains one stage. Held-out rows are not shared
    out: no stage trains on them, so they serve the evaluation of every stage. They are the rows of `eval_path` or
    `eval_split` where a source has one, else those whose prompt is held out by hash. A row of any source whose prompt
    is held out by any source is trained by none. Sources that name no field for rows of `spec.kind` are left out.

    Raises:
        NoRows: no row is left to train on, or none to measure on.
        ValueError: `data.split` has no share `spec.share`; and as `build.tokenised`.
    """
    check_share(config, spec)
    if spec.pack_length and spec.pack_length < config.max_length:
        raise ValueError(
            f"{spec.share}.pack_length = {spec.pack_length}: a row must hold a document of data.max_length = "
            f"{config.max_length} tokens; make them equal, or pack_length larger, or 0 to pack nothing"
        )
    sources = [source for source in map(resolved, config.sources) if takes_part(source, spec.kind, held_out)]
    if spec.pack_length and any(source.stream for source in sources):
        raise ValueError(f"rows of a stream are not packed: set {spec.share}.pack_length = 0, or stream = false")
    want = wanted(config, spec)
    withheld = np.zeros(0, np.uint64) if held_out else withheld_keys(config)
    found: list[SourceRows | StreamRows] = []
    seen = np.zeros(0, np.uint64)
    for source in sources:
        is_apart, place = has_eval(source), place_of(source, config, held_out)
        if source.stream and not held_out:
            shares = dataclasses.replace(
                train_shares(config, spec, True), left_out=0.0 if is_apart else config.held_out
            )
            found.append(stream_of(Job(source, place, config, tokenizer, want, shares, spec.share), withheld))
            continue
        shares = train_shares(config, spec, is_apart)
        if held_out and is_apart:
            shares = Shares("", {}, seed=config.split_seed)
        store, tallies = tokenised(Job(source, place, config, tokenizer, want, shares, spec.share))
        tally, keys = tallies[held_out and not is_apart], store.keys()
        dropped = Counter(tally.dropped)
        take = falls(keys, config, spec, held_out, is_apart)
        elsewhere = take & np.isin(keys[:, 0], withheld)
        dropped[WITHHELD] += int(elsewhere.sum())
        (picked,) = (take & ~elsewhere).nonzero()
        if spec.kind == "prompt":  # each prompt once
            _, first = np.unique(keys[picked, 0], return_index=True)
            fresh = np.sort(first[~np.isin(keys[picked[first], 0], seen)])
            dropped[REPEATED] += len(picked) - len(fresh)
            picked = picked[fresh]
            seen = np.concatenate([seen, keys[picked, 0]])
        part = Part(len(picked), source.weight, source.epochs, source.max_rows)
        tally = dataclasses.replace(tally, dropped=dict(+dropped))
        found.append(SourceRows(source.path, store, picked.astype(np.int32), part, tally))
    return _assembled(found, config, spec, held_out=held_out)


def _assembled(found: list[SourceRows | StreamRows], config: DataConfig, spec: RowSpec, *, held_out: bool) -> Rows:
    total, tallies = sum(map(len, found)), [part.tally for part in found]
    dropped = sum((Counter(tally.dropped) for tally in tallies), Counter())
    shown = [message for tally in tallies for message in tally.bad_shown]
    bad, cut = sum(tally.bad for tally in tallies), sum(part.cut for part in found)
    told = [f"{total:,} rows"]
    told += [f"{count:,} dropped: {reason}" for reason, count in dropped.items()]
    told += [f"{cut:,} cut at {config.max_length} tokens"] * (cut > 0)
    told += [f"{bad:,} bad rows left out: {message}" for message in shown[:1]]
    if not total and held_out:
        mends = ["raise data.held_out", "give a source an eval_path", f"set {spec.share}.eval_batches=0"]
        mends = mends[: 2 if spec.kind == "prompt" else 3]  # a stage of prompts has no such key: `evaluate` measures it
        raise NoRows(
            f"{spec.share}: there are no held-out rows to measure on ({', '.join(told)}): {', '.join(mends[:-1])}, or "
            f"{mends[-1]}"
        )
    if not total:
        raise NoRows(
            f"{spec.share}: there are no rows to train on ({', '.join(told)}): add rows, raise the stage's share in "
            f"data.split = {_shown(config.split)}, lower data.held_out = "
            f"{config.held_out}, raise data.max_prompt_length, or name the fields that it needs in data.sources"
        )
    if spec.pack_length:
        found = [packed(part, spec.pack_length) for part in found]
        fill = sum(float(part.lengths.sum()) for part in found) / (sum(map(len, found)) * spec.pack_length)
        told.append(f"packed into {sum(map(len, found)):,} of {spec.pack_length} tokens, {fill:.1%} of them real")
    # What is measured is each row once.
    quota = [len(part) for part in found] if held_out else quotas([part.blend for part in found], config.temperature)
    quota = tuple(int(count) for count in quota)
    streams = [part.name for part in found if isinstance(part, StreamRows)]
    told += [f"streamed: {name}, of which this is one window" for name in streams]
    if quota != tuple(map(len, found)):
        of = ", ".join(f"{count:,} of {part.name}" for count, part in zip(quota, found, strict=True))
        told.append(f"an epoch draws {sum(quota):,}: {of}")
    return Rows(tuple(found), spec.per_row, quota, ", ".join(told))


def rows_of(examples: Sequence[Example], config: DataConfig, tokenizer: PreTrainedTokenizerBase, spec: RowSpec) -> Rows:
    """The rows of given examples, in memory; `store.numbers()` is which example each of them is.

    Raises:
        ValueError: more than `config.max_bad_rows` examples cannot be encoded, or no row is left.
    """
    want = wanted(config, spec)
    block = encode_block(examples, tokenizer, want)
    bad = [f"{examples[i].source}, row {examples[i].row}: {failure}" for i, failure in block.failures.items()]
    shown = tuple(bad[:SHOWN])
    check_bad(len(bad), shown, config.max_bad_rows)
    keys = splits.as_keys([splits.prompt_key(key_turns(examples[i])) for i in block.kept])
    batch = record_batch(block.sequences, keys, block.kept, block.cut, want.per_row, len(tokenizer))
    store = in_memory([batch], want.per_row, len(tokenizer))
    picked, dropped = np.arange(len(store), dtype=np.int32), Counter(block.dropped.values())
    if spec.kind == "prompt":
        picked = np.sort(np.unique(keys[:, 0], return_index=True)[1]).astype(np.int32)
        dropped[REPEATED] += len(store) - len(picked)
    tally = Tally(len(examples), len(examples) - len(bad), dict(+dropped), len(bad), shown)
    part = SourceRows("examples", store, picked, Part(len(picked)), tally)
    return _assembled([part], config, spec, held_out=False)


def read_examples(config: DataConfig, spec: RowSpec, *, held_out: bool) -> Iterator[Example]:
    """The examples of `select_rows` as text, one after the other in the order of the sources; a stream's first ones.

    Raises:
        ValueError: as `select_rows`, but for no rows.
    """
    check_share(config, spec)
    withheld = np.zeros(0, np.uint64) if held_out else withheld_keys(config)
    for source in map(resolved, config.sources):
        yield from itertools.islice(
            _examples_of(source, config, spec, held_out, withheld), OF_A_STREAM if source.stream else None
        )


def source_sizes(config: DataConfig, spec: RowSpec) -> list[int]:
    """Examples of each source that a stage trains on, before any is dropped. ValueError as `read_examples`."""
    check_share(config, spec)
    withheld = withheld_keys(config)
    return [
        sum(1 for _ in _examples_of(source, config, spec, False, withheld)) for source in map(resolved, config.sources)
    ]


def _examples_of(
    source: SourceConfig, config: DataConfig, spec: RowSpec, held_out: bool, withheld: np.ndarray
) -> Iterator[Example]:
    if not takes_part(source, spec.kind, held_out):
        return
    is_apart = has_eval(source)
    for examples, keys in keyed_examples(source, place_of(source, config, held_out), config, spec.kind):
        take = falls(keys, config, spec, held_out, is_apart)
        yield from itertools.compress(examples, take & ~np.isin(keys[:, 0], withheld))


def falls(keys: np.ndarray, config: DataConfig, spec: RowSpec, held_out: bool, is_apart: bool) -> np.ndarray:
    """[n] bool of keys [n, 2]: whether the stage trains on the prompt, or with `held_out` is measured on it.

    is_apart: the source has a place of held-out rows, of which all are measured on, and holds out none by hash.
    """
    by_hash = np.zeros(len(keys), bool) if is_apart else splits.held_out(keys, config.held_out)
    if held_out:
        return by_hash | is_apart
    return splits.trains(keys, spec.share, config.split) & ~by_hash


def keyed_examples(
    source: SourceConfig, place: dict[str, Any], config: DataConfig, kind: RowKind, *others: RowKind
) -> Iterator[tuple[list[Example], np.ndarray]]:
    """Examples of a kind of a place with their keys [n, 2], some at a time, and after them those of other kinds.

    ValueError for more bad rows than are allowed; those that only the others refuse are left out.
    """
    here = dataclasses.replace(source, path=place["path"])
    to_examples, *to_others = (mapper(here, each) for each in (kind, *others))
    rows, bad = iter(itertools.islice(read(**place), limit_of(source, place))), []
    while block := list(itertools.islice(rows, ROWS_AT_ONCE)):
        examples, _, wrong = mapped(block, to_examples)
        bad += wrong
        check_bad(len(bad), bad[:SHOWN], config.max_bad_rows)
        examples += [example for to_other in to_others for example in mapped(block, to_other)[0]]
        keys = [splits.prompt_key(key_turns(example)) for example in examples]
        yield examples, splits.as_keys(keys, config.split_seed)


def withheld_keys(config: DataConfig) -> np.ndarray:
    """[n] uint64, first words of the keys of prompts that some source holds out and another might train on.

    What is held out by hash is so in all sources that have no eval_path, and needs no list where all are such.
    """
    sources = [resolved(source) for source in config.sources]
    apart = any(map(has_eval, sources))
    found = [np.zeros(0, np.uint64)]
    for source in sources:
        is_apart = has_eval(source)
        # Prompts alone are the least that is asked of a row; but one without may still give a pair to be measured on.
        kinds = [kind for kind in reversed(KINDS) if serves(source, kind)]
        if is_apart or (apart and not source.stream):
            for _, keys in keyed_examples(source, place_of(source, config, is_apart), config, *kinds):
                found.append(keys[is_apart | splits.held_out(keys, config.held_out), 0])
    return np.unique(np.concatenate(found))


def has_eval(source: SourceConfig) -> bool:
    """Whether the source's held-out rows stand in a place of their own."""
    return bool(source.eval_path or source.eval_split)


def takes_part(source: SourceConfig, kind: RowKind, held_out: bool) -> bool:
    """Whether rows of a kind are trained on of the source, or measured on.

    On a stream it is measured where that has a place of held-out rows: nobody reads it to its end for those by hash.
    """
    return serves(source, kind) and not (held_out and source.stream and not has_eval(source))


def train_shares(config: DataConfig, spec: RowSpec, is_apart: bool) -> Shares:
    held_out = 0.0 if is_apart else config.held_out
    return Shares(spec.share, config.split, held_out, seed=config.split_seed)


def check_share(config: DataConfig, spec: RowSpec) -> None:
    """ValueError if `data.split` is no table with the share of the stage."""
    if isinstance(config.split, str) or spec.share not in config.split:
        split, name = _shown(config.split), spec.share
        raise ValueError(f"data.split = {split} has no share for {name}: add one, as in {{ {name} = 1 }}")


def _shown(split: Mapping[str, float] | str) -> str:
    """As in TOML."""
    is_text = isinstance(split, str)
    return repr(split) if is_text else f"{{ {', '.join(f'{name} = {share:g}' for name, share in split.items())} }}"


def place_of(source: SourceConfig, config: DataConfig, held_out: bool) -> dict[str, Any]:
    """The arguments of `places.read` for a source's rows, or for its held-out rows where they have a place.

    ValueError for a split of files that have none: all of their rows would be taken for that split.
    """
    path, split = source.path, source.split
    if source.eval_split and not has_splits(source.eval_path or path):
        raise ValueError(
            f"{source.eval_path or path}: has no splits, so data.sources.eval_split = {source.eval_split!r} cannot be "
            "read of it: name the file of the held-out rows in data.sources.eval_path, and leave eval_split out"
        )
    if split != SourceConfig.split and not has_splits(path):
        raise ValueError(
            f"{path}: has no splits, so data.sources.split = {split!r} cannot be read of it: name the file of that "
            "split in data.sources.path, and leave split out"
        )
    if held_out and has_eval(source):
        path, split = source.eval_path or path, source.eval_split or split
    seeds = {"builtin_seed": config.builtin_seed, "builtin_rows": config.builtin_rows}
    return {"path": path, "name": source.name, "split": split, **seeds}
