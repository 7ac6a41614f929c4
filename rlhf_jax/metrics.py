"""Writes a stage's metrics to the log, to `metrics.jsonl`, to TensorBoard and to the trackers of the run.

with Metrics(run_dir, "sft", total_steps=100) as metrics:
    metrics.write(step, {"loss": loss})
    metrics.advance(step, {"loss": loss})
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from rlhf_jax import hosts
from rlhf_jax.trackers import Trackers

LOGGER = logging.getLogger(__name__)
BAR = logging.getLogger(f"{__name__}.bar")  # writes nothing; disabling it disables the progress bar
SECONDS_BETWEEN_LINES = 10.0  # used where the output is a file, which a bar would fill with carriage returns


class Metrics:
    """A stage's metrics in RUN/<stage>/metrics.jsonl and RUN/tensorboard, and its progress as a bar on stderr.

    A stage that resumes passes the last finished step as `start_step`: records of later steps, which an interrupted
    run left and the resumed run writes again, are dropped, so both runs end with the same file. A `start_step` of 0
    starts over and drops all.
    """

    def __init__(
        self, run_dir: Path, stage: str, trackers: Trackers | None = None, *, total_steps: int, start_step: int = 0
    ):
        self.stage, self.total_steps, self.step, self._trackers = stage, total_steps, start_step, trackers
        path, is_main = Path(run_dir) / stage / "metrics.jsonl", hosts.is_main()
        if is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept, dropped = _keep_until(path, start_step)
            self._board = _replay(Path(run_dir) / "tensorboard", stage, kept)
            if trackers:
                trackers.start_stage(stage, kept, dropped)
        else:  # its values are those of the main process
            path, self._board = Path(os.devnull), None
        self._file = path.open("a", encoding="utf-8")
        hidden = BAR.disabled or not sys.stderr.isatty() or not is_main
        counts = dict(total=total_steps, initial=start_step)
        self._bar = tqdm(desc=stage, **counts, unit="step", dynamic_ncols=True, disable=hidden)
        self._first_step, self._started, self._printed = start_step, time.monotonic(), -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._board:
            try:
                self._board.close()
            except OSError as error:  # it repeats metrics.jsonl, and is written again when the run resumes
                LOGGER.warning(f"{self.stage}: the records for TensorBoard are not complete: {error}")

    def write(self, step: int, values: Mapping[str, Any], *, must_be_finite: bool = True) -> None:
        """Record `values`, {name: Python, numpy or jax scalar}, of `step` in metrics.jsonl and as <stage>/<name>.

        metrics.jsonl is on disk when this returns. A NaN or infinite value is recorded as the string "nan", "inf" or
        "-inf" (JSON has no number for it); unless it may be one, FloatingPointError is raised after all are recorded.
        """
        numbers = {name: _number(value) for name, value in values.items()}
        record = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, "stage": self.stage, **record}, allow_nan=False) + "\n")
        self._file.flush()
        _scalars(self._board, self.stage, step, numbers)
        if self._trackers:
            self._trackers.log(self.stage, step, numbers)
        wrong = [f"'{name}' is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if wrong and must_be_finite:
            raise FloatingPointError(f"{self.stage} step {step}: {', '.join(wrong)}; lower the learning rate")

    def advance(self, step: int, headline: Mapping[str, Any] | None = None) -> None:
        """Move the progress bar to `step` and show the few values of `headline` next to it.

        Where no bar is drawn, log a line at the first and the last step and every SECONDS_BETWEEN_LINES between them.
        """
        shown = {name: f"{_number(value):.4g}" for name, value in (headline or {}).items()}
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self.step)
        self.step = step
        now = time.monotonic()
        if self._bar.disable and (step == self.total_steps or now - self._printed >= SECONDS_BETWEEN_LINES):
            self._printed = now
            left = (now - self._started) / max(step - self._first_step, 1) * (self.total_steps - step)
            where = f"{self.stage} {step}/{self.total_steps} eta {tqdm.format_interval(left)}"
            LOGGER.info(" ".join([where, *map("=".join, shown.items())]))


def _number(value: Any) -> int | float:
    scalar = value.item() if hasattr(value, "item") else value
    assert isinstance(scalar, int | float), f"a metric must be a number, not {value!r}"
    return scalar


def _keep_until(path: Path, last_step: int) -> tuple[list[dict[str, Any]], int]:
    """Drop the records after `last_step` and a last line that a killed run left incomplete.

    Returns the kept records, and the number of those that were dropped and complete.
    """
    errors = "strict" if last_step > 0 else "replace"  # what is not kept may be damaged
    text = path.read_text(encoding="utf-8", errors=errors) if path.exists() else ""
    lines = text.splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n")]
    try:
        records = [(line, json.loads(line)) for line in complete] if last_step > 0 else []
        kept = [(line, record) for line, record in records if record["step"] <= last_step]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): correct or delete it, and run the same command again"
        ) from error
    # Written to another name and then renamed, so that a kill at this moment loses nothing.
    unfinished = path.with_name(path.name + ".kept")
    unfinished.write_text("".join(line for line, _ in kept), encoding="utf-8")
    unfinished.replace(path)
    return [record for _, record in kept], len(complete) - len(kept)


def _replay(folder: Path, stage: str, records: list[dict[str, Any]]) -> Any:
    """A TensorBoard SummaryWriter whose history is exactly `records`.

    TensorBoard's own purge_step does not help: it drops the later steps of every stage in the folder.
    """
    from tensorboardX import SummaryWriter  # imports torch where that is installed, more than a second at any start

    for stale in folder.glob(f"events.out.tfevents.*.{stage}"):
        stale.unlink()
    board = SummaryWriter(str(folder), filename_suffix=f".{stage}", flush_secs=10)
    for record in records:
        numbers = {name: float(value) for name, value in record.items() if name not in ("step", "stage")}
        _scalars(board, stage, record["step"], numbers)
    return board


def _scalars(board: Any, stage: str, step: int, numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items() if board else ():
        board.add_scalar(f"{stage}/{name}", number, step)
