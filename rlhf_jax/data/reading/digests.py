"""Digests of files, kept between runs in a memo, so that what has not changed is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

# A file that has changed within so many ns may change again without a later time stamp: its digest is not kept.
SETTLED = 2_000_000_000
Memo = dict[str, list]  # absolute path -> [size, mtime in ns, ctime in ns, inode, digest]


def file_digests(files: Sequence[str], memo: Path) -> list[str]:
    """blake2b of the bytes of each file, 32 hex digits. OSError if one cannot be read.

    `memo` is a JSON file that is made and kept up here. It saves time and nothing else: where it is broken it is made
    anew, and where it cannot be written the files are read again. Processes that write it at once lose at most each
    other's entries.
    """
    known = _load(memo)
    blake2b = partial(hashlib.blake2b, digest_size=16)

    def digest(file: str) -> tuple[str, list, str, bool]:
        path, state = os.path.abspath(file), _state(file)
        entry = known.get(path)
        if isinstance(entry, list) and entry[:-1] == state and isinstance(entry[-1], str):
            return path, state, entry[-1], False
        with open(file, "rb") as contents:
            value = hashlib.file_digest(contents, blake2b).hexdigest()
        settled = _state(file) == state and time.time_ns() - state[2] > SETTLED
        return path, state, value, settled

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter
        found = list(pool.map(digest, files))
    if new := {path: [*state, value] for path, state, value, settled in found if settled}:
        _save(memo, _load(memo) | new)  # loaded again, as another process may have written meanwhile
    return [value for _, _, value, _ in found]


def _state(file: str) -> list[int]:
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _load(memo: Path) -> Memo:
    try:
        known = json.loads(memo.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _save(memo: Path, known: Memo) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memo.parent, prefix=memo.name)
    except OSError:
        return
    try:
        with open(handle, "w") as file:
            json.dump(known, file)
        os.replace(name, memo)
    except OSError:
        os.unlink(name)
