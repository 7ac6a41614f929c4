"""The ready mappings of well-known data sets, from the table beside this module."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from rlhf_jax.config import parse
from rlhf_jax.data.config import DataConfig, SourceConfig

SPLITS = ("name", "split", "eval_split")  # what only a place that has configurations and splits can be asked for


@functools.cache
def known_sets() -> Mapping[str, SourceConfig]:
    """{name on the hub, in small letters: how the set is read}."""
    tables = tomllib.loads(resources.files(__package__).joinpath("known.toml").read_text(encoding="utf-8"))
    return {
        name.casefold(): parse(SourceConfig, {"path": name} | table, f"known.toml, {name}")
        for name, table in tables.items()
    }


def resolve(config: DataConfig) -> DataConfig:
    """The configuration with the formats of all its sources settled."""
    return dataclasses.replace(config, sources=tuple(map(resolved, config.sources)))


def resolved(source: SourceConfig) -> SourceConfig:
    """The source with its format settled: where it is "", what is known of the set that `path` names, or "fields".

    `path` names a set if it is its name on the hub, in letters of either case, or ends with "/" and that name, as a
    local copy does. A name in the table that is not the set's on the hub ("mkqa-Japanese") is replaced by the set's.

    A key that the source sets otherwise than by default stands. One that it sets to the default cannot be told from one
    that it leaves out: whoever wants nothing of what is known names the format. `name`, `split` and `eval_split` are
    not filled in for local files, which have none, nor `eval_split` beside an `eval_path`.
    """
    if source.format:
        return source
    path = source.path.casefold().rstrip("/")
    known = next((known for name, known in known_sets().items() if path == name or path.endswith(f"/{name}")), None)
    if known is None:
        return dataclasses.replace(source, format="fields")
    local = Path(source.path).exists()
    left = {"eval_split"} if source.eval_path else set()
    if local and not Path(source.path, "dataset_dict.json").is_file():
        left |= set(SPLITS)
    filled = {
        field.name: getattr(known, field.name)
        for field in dataclasses.fields(source)
        if field.name not in left and getattr(source, field.name) == field.default
    }
    if path in known_sets() and not local:
        filled["path"] = known.path
    return dataclasses.replace(source, **filled)
