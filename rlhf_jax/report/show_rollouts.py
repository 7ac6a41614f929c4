"""`rlhf-jax rollouts`: pages through the rollouts of a run."""

from __future__ import annotations

import json
import logging
import os
import pydoc
import sys
from collections.abc import Iterable
from pathlib import Path

from rlhf_jax.report.rollouts import Filters, format_rollout, select_rollouts

LOGGER = logging.getLogger(__name__)


def show_rollouts(folder: Path, filters: Filters, *, as_json: bool = False) -> None:
    """Print the rollouts that pass the filters: in a pager on a terminal, elsewhere as plain lines.

    Raises:
        ValueError: there are none.
    """
    faults: list[str] = []
    is_terminal = sys.stdout.isatty()
    colour = is_terminal and not os.environ.get("NO_COLOR")
    found = select_rollouts(folder, filters, faults)
    texts = (json.dumps(each) + "\n" if as_json else format_rollout(each, colour) + "\n" for each in found)
    if (first := next(iter(texts), None)) is None:
        raise ValueError(f"no rollout of {folder} passes these filters: leave some out{_also(faults)}")
    if is_terminal:
        os.environ.setdefault("LESS", "-R")  # colours pass
        pydoc.pager("".join([first, *texts]))
    else:
        _write(first, texts)
    for text in faults:
        LOGGER.warning(text)


def _also(faults: list[str]) -> str:
    return "".join(f"; {text}" for text in faults)


def _write(first: str, texts: Iterable[str]) -> None:
    try:
        sys.stdout.write(first)
        sys.stdout.writelines(texts)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python must not write the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
