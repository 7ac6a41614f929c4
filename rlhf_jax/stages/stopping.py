"""Ends a run early with its last step saved: at a signal, or before the time of its job ends."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_jax import hosts

LOGGER = logging.getLogger(__name__)
STARTED = time.monotonic()  # when this process started, up to its imports
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_received: list[int] = []  # signals since the run started
_inside: list[bool] = []  # one item in a loop of steps, which ends after the step


class StopRun(BaseException):
    """Ends a run before its end; `code` is the exit code. No error, so no handler of errors may catch it."""

    def __init__(self, reason: str, code: int = EXIT_REQUEUE):
        super().__init__(f"{reason}; the same command resumes from the last checkpoint")
        self.code = code


def parse_duration(text: str) -> float:
    """Seconds of "3h50m", "90m" or "1d2h30m15s"; "" is infinite. Raises ValueError for anything else."""
    if not text:
        return float("inf")
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    seconds = (
        sum(int(number or 0) * unit for number, unit in zip(parts.groups(), UNITS.values(), strict=True))
        if parts
        else 0
    )
    if not seconds:
        raise ValueError(f'"{text}" is no duration: write days, hours, minutes and seconds as in "3h50m" or "1d2h"')
    return float(seconds)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """In the body SIGTERM, SIGUSR1 and SIGINT end the run by StopRun: in a loop of steps after the step, else at once.

    A second SIGINT ends the process at once. Does nothing outside the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    before = {number: signal.signal(number, _receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _receive(number: int, _: object) -> None:
    if number == signal.SIGINT and number in _received:
        print("rlhf-jax: interrupted twice: ended without saving", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)
    _received.append(number)
    if not _inside:
        raise _stop(number)
    LOGGER.warning(
        f"{signal.Signals(number).name}: the step is finished and saved"
        + ", Ctrl-C again ends at once" * (number == signal.SIGINT)
    )


def _stop(number: int) -> StopRun:
    if number == signal.SIGINT:
        return StopRun("interrupted", EXIT_INTERRUPTED)
    return StopRun(f"stopped by {signal.Signals(number).name}")


@contextmanager
def finish_steps() -> Iterator[None]:
    """In the body, a loop of steps, signals wait for its next call of `stop_request`."""
    _inside.append(True)
    try:
        yield
    finally:
        _inside.pop()


def stop_request(limit: float, margin: float) -> StopRun | None:
    """Why the run must end after this step, the same on all processes; None: it goes on.

    Args:
        limit: seconds from the start of the process to the end of its time.
        margin: seconds that another step and the save need.
    """
    spent = time.monotonic() - STARTED
    found = hosts.gather([_received[-1] if _received else 0, spent if spent + margin >= limit else 0])
    number, spent = (max(each) for each in zip(*found, strict=True))
    if number:
        return _stop(number)
    return StopRun(f"run.stop_after: {spent:.0f} s have passed") if spent else None
