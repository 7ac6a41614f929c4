"""Reads the rows of a place: a file, a glob, a folder, a folder of `save_to_disk`, the hub, or the built-in set.

A path that looks like a file (a known ending, a glob, a / or . at the start) is never looked up on the hub.
"""

from __future__ import annotations

import glob
import hashlib
import inspect
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_jax.data import builtin
from rlhf_jax.data.config import BUILTIN, DataConfig, SourceConfig
from rlhf_jax.data.json_rows import COMPRESSIONS
from rlhf_jax.data.readers import ENDINGS, file_format, read_file, unreadable_message
from rlhf_jax.data.records import Row
from rlhf_jax.hub_access import hub_obstacle

# A file that changed within the last SETTLED ns may change again with the same time stamp: its digest is not kept.
SETTLED = 2_000_000_000
Memo = dict[str, list]  # absolute path -> [size, mtime in ns, ctime in ns, inode, digest]


def file_digests(files: Sequence[str], memo: Path) -> list[str]:
    """blake2b of the bytes of each file, 32 hex digits. OSError if one cannot be read.

    `memo` is a JSON file that this function creates and updates. It only saves time: a corrupt memo is rebuilt, and
    without write access the files are read again. Processes that write it at once lose at most each other's entries.
    """
    known = _load_memo(memo)
    blake2b = partial(hashlib.blake2b, digest_size=16)

    def digest(file: str) -> tuple[str, list, str, bool]:
        path, state = os.path.abspath(file), _stat(file)
        entry = known.get(path)
        if isinstance(entry, list) and entry[:-1] == state and isinstance(entry[-1], str):
            return path, state, entry[-1], False
        with open(file, "rb") as contents:
            value = hashlib.file_digest(contents, blake2b).hexdigest()
        settled = _stat(file) == state and time.time_ns() - state[2] > SETTLED
        return path, state, value, settled

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        found = list(pool.map(digest, files))
    if new := {path: [*state, value] for path, state, value, settled in found if settled}:
        _save_memo(memo, _load_memo(memo) | new)  # loaded again, as another process may have written meanwhile
    return [value for _, _, value, _ in found]


def _stat(file: str) -> list[int]:
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _load_memo(memo: Path) -> Memo:
    try:
        known = json.loads(memo.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _save_memo(memo: Path, known: Memo) -> None:
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


KNOWN_ENDINGS = f"{', '.join(ENDINGS)}, each also with {' or '.join(COMPRESSIONS)} after it"
METADATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # describe data sets, and have no rows


def read_rows(
    path: str, *, name: str = "", split: str = "train", builtin_seed: int = 0, builtin_rows: int = 8192
) -> Iterator[Row]:
    """Every row of a place, in a fixed order, lazily. `name` and `split` as in `SourceConfig`.

    ValueError, with the fix, if a place cannot be read, at once or when the file's turn comes: no such file, no
    permission, an unknown ending, no rows, no such split, no such data set.
    """
    files = source_files(path, split)
    if path == BUILTIN:
        rows = (Row(path, i, row) for i, row in enumerate(builtin.make_rows(builtin_seed, builtin_rows), start=1))
    elif files is not None:
        rows = itertools.chain.from_iterable(map(read_file, files))
    else:
        rows = _hub_rows(path, split, _load_hub_set(path, name, split))
    return _require_rows(path, rows)


def read_hub_stream(path: str, name: str, split: str) -> Iterator[Row]:
    """The rows of a hub data set, streamed from the network; nothing is kept on disk. ValueError as for `read_rows`."""
    return _require_rows(path, _hub_rows(path, split, _load_hub_set(path, name, split, streaming=True)))


def content_key(path: str, *, name: str, split: str, builtin_seed: int, builtin_rows: int, memo: Path) -> str:
    """32 hex digits that identify the contents of a place, whatever its path and time of writing.

    Files count by their bytes, their formats and their order; a hub data set by its fingerprint; the built-in set by
    its arguments and its source code. `memo`: file of digests, see `file_digests`. ValueError as for `read_rows`,
    except for places that turn out to have no rows.
    """
    files = source_files(path, split)
    if path == BUILTIN:
        parts = [path, str(builtin_seed), str(builtin_rows), inspect.getsource(builtin)]
    elif files is not None:
        try:
            digests = file_digests(files, memo)
        except OSError as error:
            raise ValueError(unreadable_message(error.filename or path, error)) from error
        parts = [part for file, digest in zip(files, digests, strict=True) for part in (*file_format(file), digest)]
    else:
        parts = [path, name, split, _load_hub_set(path, name, split)._fingerprint]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def has_eval(source: SourceConfig) -> bool:
    """Whether the source has a separate evaluation set."""
    return bool(source.eval_path or source.eval_split)


def place_of(source: SourceConfig, config: DataConfig, held_out: bool) -> dict[str, Any]:
    """The arguments of `read_rows` for a source's rows, or for its evaluation set.

    ValueError for a split of files without splits: all of their rows would be used as that split.
    """
    path, split = source.path, source.split
    if source.eval_split and not has_splits(source.eval_path or path):
        raise ValueError(
            f"{source.eval_path or path}: has no splits, so data.sources.eval_split = {source.eval_split!r} cannot be "
            "read of it: name the file of the held-out rows in data.sources.eval_path, and leave eval_split out"
        )
    if split != SourceConfig.split and not has_splits(path):
        raise ValueError(
            f"{path}: has no splits, so data.sources.split = {split!r} cannot be read of it: name the file of that "
            "split in data.sources.path, and leave split out"
        )
    if held_out and has_eval(source):
        path, split = source.eval_path or path, source.eval_split or split
    seeds = {"builtin_seed": config.builtin_seed, "builtin_rows": config.builtin_rows}
    return {"path": path, "name": source.name, "split": split, **seeds}


def limit_of(source: SourceConfig, place: dict[str, Any]) -> int | None:
    """The number of rows to read of a place; None: all, as of an evaluation set."""
    is_own = (place["path"], place["split"]) == (source.path, source.split)
    return source.limit or None if is_own else None


def has_splits(path: str) -> bool:
    """Whether a place may have splits: a folder of `save_to_disk`, or a path that is not here but may be on the hub."""
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        return any(os.path.isfile(os.path.join(place, name)) for name in ("dataset_dict.json", "state.json"))
    return not (path.startswith("builtin:") or os.path.exists(place) or glob.has_magic(place))


def source_files(path: str, split: str) -> list[str] | None:
    """The files of a place, in the order in which they are read; [] for the built-in set, None for a hub data set."""
    if path.startswith("builtin:"):
        if path != BUILTIN:
            raise ValueError(f"there is no built-in set {path!r}, only {BUILTIN!r}")
        return []
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        files = _saved_files(path, split) or _known_files(path, _walk_files(path))
    elif os.path.isfile(path):
        files = _known_files(path, [path])
    elif glob.has_magic(path):
        found = [file for file in sorted(glob.glob(path, recursive=True)) if os.path.isfile(file)]
        if not found:
            raise ValueError(f"{path}: matches no file; the folder here is {os.getcwd()}")
        files = _known_files(path, found)
    else:
        try:
            os.stat(path)
        except PermissionError as error:
            raise ValueError(unreadable_message(path, error)) from error
        except OSError:
            pass
        else:
            raise ValueError(f"{path}: is neither a file nor a folder")
        # The name of a hub data set holds at most one /.
        if file_format(path) or path.startswith((".", os.sep)) or path.count("/") > 1:
            raise ValueError(f"{path}: no such file; the folder here is {os.getcwd()}")
        return None
    for file in files:
        if not os.access(file, os.R_OK):
            error = PermissionError() if os.path.exists(file) else FileNotFoundError()
            raise ValueError(unreadable_message(file, error))
    if not any(os.path.getsize(file) for file in files):
        raise ValueError(f"{path}: holds no rows, it is empty")
    return files


def _known_files(path: str, files: list[str]) -> list[str]:
    """The files of known endings; ValueError if there are none."""
    if known := [file for file in files if file_format(file)]:
        return known
    what = "unknown ending" if files == [path] else "holds no file of a known ending"
    raise ValueError(f"{path}: {what}; the known ones are {KNOWN_ENDINGS}")


def _walk_files(folder: str) -> list[str]:
    """The files of a folder and its subfolders, linked ones too, sorted; without hidden files and METADATA."""

    def fail(error: OSError) -> None:
        raise ValueError(unreadable_message(error.filename, error)) from error

    files: list[str] = []
    seen: set[str] = set()  # a link may lead upwards
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [os.path.join(place, name) for name in names if not name.startswith(".") and name not in METADATA]
    return sorted(file for file in files if os.path.isfile(file))


def _saved_files(folder: str, split: str) -> list[str]:
    """The Arrow files of a data set that `save_to_disk` wrote, or of one of its splits; [] if the folder has none."""
    splits = _metadata(folder, "dataset_dict.json").get("splits")
    if splits is not None:
        if split not in splits:
            raise ValueError(f"{folder}: has no split {split!r}, only {', '.join(splits)}: set data.sources.split")
        folder = os.path.join(folder, split)
    state = _metadata(folder, "state.json")
    if splits is None and "_data_files" not in state:
        return []
    if splits is None and split not in ("train", held := state.get("_split") or split):
        raise ValueError(f"{folder}: has no split {split!r}, only {held}: set data.sources.split")
    names = [file.get("filename", "") for file in state.get("_data_files", [])]
    if not all(names) or not names:
        raise ValueError(f"{folder}: state.json names no files; write the data set again with save_to_disk")
    return [os.path.join(folder, name) for name in names]


def _metadata(folder: str, name: str) -> dict[str, Any]:
    file = os.path.join(folder, name)
    try:
        value = json.loads(Path(file).read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(unreadable_message(file, error)) from error
    except ValueError as error:
        raise ValueError(f"{file}: malformed JSON ({error}); write the data set again with save_to_disk") from error
    return value if isinstance(value, dict) else {}


def _load_hub_set(path: str, name: str, split: str, **options: bool) -> Any:
    """A `datasets.Dataset`, or with streaming=True an `IterableDataset`."""
    import datasets  # here, because it takes seconds, which runs on files save

    obstacle = hub_obstacle()
    try:
        return datasets.load_dataset(path, name or None, split=split, **options)
    except Exception as error:  # of the hub, the network, the disk, or the data set's code: the set is not available
        what = " ".join(str(error).split()) or type(error).__name__
        if "Config" in what and "vailable" in what:  # several, which the message lists, or none of this name
            raise ValueError(f"the hub data set {path!r}: {what}; set data.sources.name to one of them") from error
        if "Unknown split" in what or "Bad split" in what:
            raise ValueError(f"the hub data set {path!r}: {what}; set data.sources.split") from error
        what += f" ({obstacle})" * bool(obstacle)
        raise ValueError(f"{path!r} is no file here, and cannot be had from the hub: {what}") from error


def _hub_rows(path: str, split: str, rows: Any) -> Iterator[Row]:
    file = f"{path} ({split})"
    number = 0
    try:
        for number, fields in enumerate(rows, start=1):
            yield Row(file, number, fields)
    except Exception as error:  # the network while streaming, or a file of the data set
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the hub data set {path!r} broke off after row {number} of {split}: {what}") from error


def _require_rows(path: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; ValueError at once if there are none."""
    if (first := next(rows, None)) is None:
        raise ValueError(f"{path}: holds no rows")
    return itertools.chain((first,), rows)
