"""Batches made before they are asked for, so that no step waits for its data."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

B_co = TypeVar("B_co", covariant=True)
DEPTH = 2  # batches ahead


class ByStep(Protocol[B_co]):
    def __getitem__(self, step: int) -> B_co: ...


class Ahead:
    """`batches[step]`, and a thread that makes the next ones meanwhile. What goes wrong in it is raised by [step].

    Any step may be asked for; only the ones right after it are at hand.
    """

    __iter__ = None

    def __init__(self, batches: ByStep, stop: int):
        """stop: the step after the last one that will be asked for."""
        self._batches, self._stop = batches, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: dict[int, Future] = {}

    def __getitem__(self, step: int):
        for ahead in range(step, min(step + DEPTH + 1, max(self._stop, step + 1))):
            if ahead not in self._made:
                self._made[ahead] = self._pool.submit(self._batches.__getitem__, ahead)
        self._made = {at: future for at, future in self._made.items() if at >= step}
        return self._made.pop(step).result()
