"""A source that is read as training goes: tokenised a window at a time, each kept as a small store of its own.

A window holds the next `WINDOW` rows that serve, in random order; when the source ends it begins anew. Windows stay on
disk, and beside each stands from where in the source the next one goes on: a resumed run finds the ones it has had,
and any window can be made again from its number alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock

from rlhf_jax.data.cache import cache_folder, folder_of, key_parts
from rlhf_jax.data.chat_template import Encoding
from rlhf_jax.data.records import Row
from rlhf_jax.data.sources import read_hub_stream, read_rows, source_files
from rlhf_jax.data.store import Store, write_store
from rlhf_jax.data.tokenize import ROWS_PER_BLOCK, Job, RowStats, check_bad_rows, encode_blocks, parse_row_stats

WINDOW = 8192  # rows

# Where in the source a window begins: how often the source has been read to its end, which block of ROWS_PER_BLOCK
# rows of it comes next, and from which of those rows of the block that are used.
Position = tuple[int, int, int]


def compact(rows: tuple[Position, pa.RecordBatch]) -> pa.RecordBatch:
    """The batch without the rows that a slice has left out, so that offsets begin at 0."""
    return rows[1].take(pa.array(np.arange(len(rows[1]))))


def _split_batches(ready: list[tuple[Position, pa.RecordBatch]], count: int) -> tuple[list, list]:
    """The first `count` rows, and the rest."""
    taken: list[tuple[Position, pa.RecordBatch]] = []
    for i, ((turn, block, row), batch) in enumerate(ready):
        if len(batch) >= count:
            rest = [((turn, block, row + count), batch.slice(count)), *ready[i + 1 :]]
            return [*taken, (ready[i][0], batch.slice(0, count))], [each for each in rest if len(each[1])]
        taken.append(ready[i])
        count -= len(batch)
    raise AssertionError("fewer rows than asked for")


class StreamRows:
    """A stream in the place of a `SourceRows`: rows w x WINDOW and on are those of window w.

    The windows are made in their order and kept in a folder, by one thread, which holds the open source.
    """

    def __init__(self, job: Job, withheld: np.ndarray, folder: Path):
        """withheld: [n] uint64, first words of the keys of prompts that are not trained."""
        self.job, self.source, self.withheld, self.folder, self.bins = job, job.source, withheld, folder, None
        self._next = -1  # the window that `_blocks` goes on with
        self._blocks: Iterator[tuple[Position, pa.RecordBatch, RowStats]] = iter(())
        self._ready: list[tuple[Position, pa.RecordBatch]] = []  # rows of no window yet, from where
        self._tally = RowStats()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._held: dict[int, Future] = {}
        self._lock = threading.Lock()  # a step counts its rows while the thread of `Prefetch` reads the next ones
        self.lengths = self._window(0).lengths  # of the first rows, which stand for the others

    def __len__(self) -> int:
        return WINDOW

    @property
    def longest(self) -> int:
        """Tokens that no document has more than."""
        return self.job.config.max_length

    longest_row = longest

    @property
    def digest(self) -> str:
        """Stands for what is streamed, not for its tokens, which nobody has seen yet."""
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
        """A window; the one after it is made meanwhile."""
        with self._lock:
            for wanted in (number, number + 1):
                if wanted not in self._held:
                    self._held[wanted] = self._pool.submit(lambda n: self.make_window(n)[0], wanted)
            self._held = {n: future for n, future in self._held.items() if abs(n - number) <= 1}
            future = self._held[number]
        return future.result()

    def make_window(self, number: int) -> tuple[Store, RowStats]:
        """A window, made if it is not there, with all before it; and what became of the rows up to it.

        Raises:
            ValueError: more bad rows than are allowed; the source has no row that serves; as `sources.read_rows`.
        """
        if not self._report(number).exists():
            with FileLock(self.folder / "windows.lock"):
                while not self._report(number).exists():
                    self._make(next(n for n in range(number, -1, -1) if n == 0 or self._report(n - 1).exists()))
        report = json.loads(self._report(number).read_text(encoding="utf-8"))
        tally = parse_row_stats(report["tally"])
        check_bad_rows(tally.bad, tally.bad_shown, self.job.config.max_bad_rows)
        return Store(self._rows(number), self.job.spec.per_row, report["digest"]), tally

    def _report(self, number: int) -> Path:
        return self.folder / f"{number:06}.json"

    def _rows(self, number: int) -> Path:
        return self.folder / f"{number:06}.arrow"

    def _make(self, number: int) -> None:
        if self._next != number:
            self._begin(number)
        self._next = -1  # until the window is there
        while sum(len(batch) for _, batch in self._ready) < WINDOW:
            at, batch, tally = next(self._blocks)
            if at[0]:  # the same bad rows again
                tally = dataclasses.replace(tally, bad=0, bad_shown=())
            self._tally = self._tally.plus(tally)
            check_bad_rows(self._tally.bad, self._tally.bad_shown, self.job.config.max_bad_rows)
            self._ready.append((at, batch))
        turn, block, _ = self._ready[-1][0]
        taken, self._ready = _split_batches(self._ready, WINDOW)
        end = self._ready[0][0] if self._ready else (turn, block + 1, 0)
        unfinished = self.folder / f"{number:06}.{os.getpid()}.unfinished"
        digest = write_store(map(compact, taken), unfinished, len(self.job.tokenizer))
        unfinished.rename(self._rows(number))
        report = {"digest": digest, "end": end, "tally": dataclasses.asdict(self._tally)}
        unfinished.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        unfinished.rename(self._report(number))
        self._next = number + 1

    def _begin(self, number: int) -> None:
        """Open the source where the window before ended."""
        start, self._tally, self._ready = (0, 0, 0), RowStats(), []
        if number:
            report = json.loads(self._report(number - 1).read_text(encoding="utf-8"))
            start, self._tally = tuple(report["end"]), parse_row_stats(report["tally"])
        self._blocks = self._blocks_from(start)
        if row := start[2]:  # of a block that the window before has counted
            self._ready = [(start, next(self._blocks)[1].slice(row))]

    def _blocks_from(self, start: Position) -> Iterator[tuple[Position, pa.RecordBatch, RowStats]]:
        """Blocks of the source from that of `start` on, again and again."""
        first, skipped, _ = start
        for turn in itertools.count(first):
            rows, served = itertools.islice(self._read(), skipped * ROWS_PER_BLOCK, None), 0
            for block, (batch, tally, _) in enumerate(encode_blocks(rows, self.job), start=skipped):
                batch = batch.filter(pa.array(~np.isin(batch["held_key"].to_numpy(), self.withheld)))
                served += len(batch)
                yield (turn, block, 0), batch, tally
            if not served and not skipped:
                raise ValueError(f"{self.job.source.path}: none of its rows serves the stage {self.job.spec.share}")
            skipped = 0

    def _read(self) -> Iterator[Row]:
        place = self.job.place
        path, split = place["path"], place["split"]
        is_remote = not path.startswith("builtin:") and source_files(path, split) is None
        rows = read_hub_stream(path, place["name"], split) if is_remote else read_rows(**place)
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
    """Of a file too large to be read for its digest."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
