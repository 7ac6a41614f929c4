"""config.json of well-known models, for planning where neither a folder nor the hub gives one."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from rlhf_jax.models.folders import config_json


@functools.cache
def known() -> Mapping[str, Mapping[str, Any]]:
    """{hub id: what a plan needs of its config.json} of the table beside this module."""
    tables = tomllib.loads(resources.files(__package__).joinpath("known.toml").read_text())
    return {
        name: {"model_type": family} | {key: value for key, value in table.items() if key != "models"} | own
        for family, table in tables.items()
        for name, own in table["models"].items()
    }


def config_of(path_or_id: str) -> Mapping[str, Any]:
    """config.json of a folder or hub id; else of this plan's own table.

    Raises:
        ValueError: not to be had, and not in the table.
    """
    return config_json(path_or_id) if Path(path_or_id).expanduser().is_dir() else _of_hub(path_or_id)[0]


def is_from_table(path_or_id: str) -> bool:
    """Whether `config_of` takes it from the table."""
    return not Path(path_or_id).expanduser().is_dir() and _of_hub(path_or_id)[1]


@functools.cache  # a plan asks many times, and a hub that is out of reach answers slowly
def _of_hub(name: str) -> tuple[Mapping[str, Any], bool]:
    try:
        return config_json(name), False
    except ValueError:
        if name in known():
            return known()[name], True
        raise
