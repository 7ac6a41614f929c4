"""A source that is read during training: tokenized one window at a time, each window a small store of its own.

A window holds the next `WINDOW` usable rows in random order; at its end the source starts over. Windows stay on disk,
each with the source position at which the next one starts: a resumed run finds its earlier windows, and any window can
be made again from its number alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock

from rlhf_jax import hosts
from rlhf_jax.data.cache import cache_folder, folder_of, key_parts
from rlhf_jax.data.chat_template import Encoding
from rlhf_jax.data.records import Row
from rlhf_jax.data.sources import read_hub_stream, read_rows, source_files
from rlhf_jax.data.store import Store, write_store
from rlhf_jax.data.tokenize import ROWS_PER_BLOCK, Job, RowStats, check_bad_rows, encode_blocks, parse_row_stats

WINDOW = 8192  # rows
WAIT = 0.2  # seconds between looks for a window that another process makes

# Position in the source at which a window begins: how often the source has been read to its end, the number of the
# block of ROWS_PER_BLOCK rows, and the index of the first row among the usable rows of the block.
Position = tuple[int, int, int]


class StreamRows:
    """A stream in place of a `SourceRows`: rows w x WINDOW to (w + 1) x WINDOW - 1 are those of window w.

    The windows are made in order and stored in a folder, by one thread, which holds the open source.
    """

    def __init__(self, job: Job, withheld: np.ndarray, folder: Path):
        """withheld: [n] uint64, first words of the keys of prompts that are not trained."""
        self.job, self.source, self.withheld, self.folder, self.bins = job, job.source, withheld, folder, None
        self._next = -1  # the window that `_blocks` continues with
        self._blocks: Iterator[tuple[Position, pa.RecordBatch, RowStats]] = iter(())
        self._ready: list[pa.RecordBatch] = []  # rows of no window yet
        self._last: Position = (0, 0, 0)  # of the last batch of `_ready`
        self._tally = RowStats()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._held: dict[int, Future] = {}
        self._lock = threading.Lock()  # a step counts its rows while the thread of `Prefetch` reads the next ones
        self.lengths = self._window(0).lengths  # of the first rows, which represent the others

    def __len__(self) -> int:
        return WINDOW

    @property
    def longest(self) -> int:
        """Upper bound of the tokens of a document."""
        return self.job.config.max_length

    longest_row = longest

    @property
    def digest(self) -> str:
        """Identifies the source, not its tokens, most of which are not known yet."""
        return self.folder.name

    @property
    def cut(self) -> int:
        """Documents of the first window that were cut."""
        return int(self._window(0).cut().sum())

    @property
    def stats(self) -> RowStats:
        return self.make_window(0)[1]

    def row_lengths(self, rows: np.ndarray) -> np.ndarray:
        """[n] tokens of rows [n]."""
        return np.array([self._window(row // WINDOW).lengths[row % WINDOW].max() for row in rows.tolist()], np.int64)

    def documents(self, row: int) -> list[list[Encoding]]:
        return [self._window(row // WINDOW).row(row % WINDOW)]

    def number(self, row: int) -> int:
        """The row's number in the source."""
        return int(self._window(row // WINDOW).numbers()[row % WINDOW])

    def release(self) -> None:
        with self._lock:
            held = list(self._held.values())
        for future in held:
            if future.done() and future.exception() is None:
                future.result().release()

    def _window(self, number: int) -> Store:
        """A window; the next one is made in the background."""
        with self._lock:
            for n in (number, number + 1):
                if n not in self._held:
                    self._held[n] = self._pool.submit(lambda n: self.make_window(n)[0], n)
            self._held = {n: future for n, future in self._held.items() if abs(n - number) <= 1}
            future = self._held[number]
        return future.result()

    def make_window(self, number: int) -> tuple[Store, RowStats]:
        """A window, made with all before it if it does not exist; and the counts of the rows up to its end.

        Of several processes the main one makes them, and the others wait for it.

        Raises:
            ValueError: more bad rows than are allowed; the source has no usable row; as `sources.read_rows`.
        """
        if hosts.is_main() and not self._report(number).exists():
            with FileLock(self.folder / "windows.lock"):
                while not self._report(number).exists():
                    self._make(next(n for n in range(number, -1, -1) if n == 0 or self._report(n - 1).exists()))
        while not self._report(number).exists():
            time.sleep(WAIT)
        report = json.loads(self._report(number).read_text(encoding="utf-8"))
        tally = parse_row_stats(report["tally"])
        check_bad_rows(tally.bad, tally.bad_shown, self.job.config.max_bad_rows)
        rows = self._report(number).with_suffix(".arrow")
        return Store(rows, self.job.spec.per_row, report["digest"]), tally

    def _report(self, number: int) -> Path:
        return self.folder / f"{number:06}.json"

    def _make(self, number: int) -> None:
        if self._next != number:
            self._begin(number)
        self._next = -1  # until the window exists
        while sum(map(len, self._ready)) < WINDOW:
            self._last, batch, tally = next(self._blocks)
            if self._last[0]:  # the same bad rows again
                tally = dataclasses.replace(tally, bad=0, bad_shown=())
            self._tally = self._tally.plus(tally)
            check_bad_rows(self._tally.bad, self._tally.bad_shown, self.job.config.max_bad_rows)
            self._ready.append(batch)
        turn, block, row = self._last
        *taken, last = self._ready
        count = WINDOW - sum(map(len, taken))
        # Copied by `take`: the offsets of a slice do not begin at 0.
        taken += [last.take(pa.array(np.arange(count)))]
        self._ready = [last.slice(count)] if len(last) > count else []
        self._last = end = (turn, block, row + count) if self._ready else (turn, block + 1, 0)
        unfinished = self.folder / f"{number:06}.{os.getpid()}.unfinished"
        digest = write_store(taken, unfinished, len(self.job.tokenizer))
        unfinished.rename(self._report(number).with_suffix(".arrow"))
        report = {"digest": digest, "end": end, "tally": dataclasses.asdict(self._tally)}
        unfinished.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        unfinished.rename(self._report(number))
        self._next = number + 1

    def _begin(self, number: int) -> None:
        """Open the source at the end of the previous window."""
        self._last, self._tally, self._ready = (0, 0, 0), RowStats(), []
        if number:
            report = json.loads(self._report(number - 1).read_text(encoding="utf-8"))
            self._last, self._tally = tuple(report["end"]), parse_row_stats(report["tally"])
        self._blocks = self._blocks_from(self._last)
        if row := self._last[2]:  # of a block that the previous window has counted
            self._ready = [next(self._blocks)[1].slice(row)]

    def _blocks_from(self, start: Position) -> Iterator[tuple[Position, pa.RecordBatch, RowStats]]:
        """Blocks of the source from the block of `start` on, endlessly."""
        first, skipped, _ = start
        for turn in itertools.count(first):
            rows, served = itertools.islice(self._read(), skipped * ROWS_PER_BLOCK, None), 0
            for block, (batch, tally, _) in enumerate(encode_blocks(rows, self.job), start=skipped):
                batch = batch.filter(pa.array(~np.isin(batch["held_key"].to_numpy(), self.withheld)))
                served += len(batch)
                yield (turn, block, 0), batch, tally
            if not served and not skipped:
                raise ValueError(
                    f"{self.job.source.path}: none of its rows is usable by the stage {self.job.spec.share}"
                )
            skipped = 0

    def _read(self) -> Iterator[Row]:
        place = self.job.place
        is_remote = source_files(place["path"], place["split"]) is None
        rows = read_hub_stream(place["path"], place["name"], place["split"]) if is_remote else read_rows(**place)
        return itertools.islice(rows, self.job.limit)


def open_stream(job: Job, withheld: np.ndarray) -> StreamRows:
    """The stream of a source, with its first window made. ValueError as `StreamRows.make_window`.

    withheld: [n] uint64, as of `StreamRows`.
    """
    place = job.place
    files = [_file_state(path) for path in source_files(place["path"], place["split"]) or []]
    content = [place, files, hashlib.blake2b(withheld.tobytes(), digest_size=16).hexdigest()]
    folder = folder_of(cache_folder(job.config), key_parts(job, content)).with_suffix(".stream")
    folder.mkdir(exist_ok=True)
    return StreamRows(job, withheld, folder)


def _file_state(path: str) -> list:
    """Path, size and time stamp of a file, which may be too large to read for its digest."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
