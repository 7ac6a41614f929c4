"""Ends a run whose step hangs, after writing what every thread was doing."""

from __future__ import annotations

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import jax

from rlhf_jax import hosts

LOGGER = logging.getLogger(__name__)
EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
COMPILES = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # JAX reports this before it compiles a program
STEPS_KNOWN = 3  # steps whose time is known before any is called hung


class Watchdog:
    """A thread that ends the process when a step takes `factor` times the usual time, and at least `floor` seconds.

    A context manager around the steps, with `start_step` at the start of each. The usual time is the median of the last
    steps. A step that compiles a program is neither timed nor watched, and neither are the bodies of `pause`. Stacks of
    all threads are written to folder/stacks-STEP.txt. A `factor` of 0 watches nothing.
    """

    def __init__(self, folder: Path, *, factor: float, floor: float):
        self.limit = float("inf")  # seconds
        self._folder, self._factor, self._floor = folder, factor, floor
        self._step, self._since, self._is_watched = 0, time.monotonic(), False
        self._seconds: deque[float] = deque(maxlen=50)
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._ignore_compiling)
        if self._factor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        jax.monitoring.unregister_event_duration_listener(self._ignore_compiling)

    def start_step(self, step: int) -> None:
        """The step before this one has ended."""
        now = time.monotonic()
        if self._is_watched:
            self._seconds.append(now - self._since)
        if self._factor and len(self._seconds) >= STEPS_KNOWN:
            self.limit = max(self._floor, self._factor * self.usual)
        self._step, self._since, self._is_watched = step, now, True

    @property
    def usual(self) -> float:
        """Seconds of a usual step; 0 before one is known."""
        return statistics.median(self._seconds) if self._seconds else 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The time of the body belongs to no step, and is not watched."""
        was_watched, started = self._is_watched, time.monotonic()
        self._is_watched = False
        yield
        self._since += time.monotonic() - started
        self._is_watched = was_watched

    def _ignore_compiling(self, event: str, *_: object, **__: object) -> None:
        if event == COMPILES:
            self._is_watched = False

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self._floor / 4)):
            taken = time.monotonic() - self._since
            if self._is_watched and taken > self.limit:
                self._end(taken)

    def _end(self, taken: float) -> None:
        name = f"stacks-{self._step}.txt" if hosts.count() == 1 else f"stacks-{self._step}.{hosts.index()}.txt"
        with (self._folder / name).open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        hung = f"step {self._step} has not ended after {taken:.0f} s, and a usual one takes {self.usual:.3g} s"
        message = f"{hung}: stacks are in {self._folder / name}"
        LOGGER.error(f"rlhf-jax: {message}")
        sys.stderr.flush()
        hosts.fail(message, EXIT_HUNG)
        os._exit(EXIT_HUNG)
