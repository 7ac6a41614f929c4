"""The list of checksums that completes a checkpoint, and the check of a checkpoint's files against it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
HASH_THREADS = 4  # files read at a time; hashing releases Python's lock


def file_names(folder: Path) -> list[str]:
    """The files of a checkpoint, by their sorted paths in its folder, without the manifest."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path.relative_to(folder)) for path in files if path != folder / MANIFEST)


def write_manifest(folder: Path, values: Mapping[str, float]) -> None:
    """Write the size and SHA-256 of every file, and the metrics of the checkpoint, to folder/manifest.json.

    Every file is on disk before the manifest appears, which it does at once and complete. Raises OSError.
    """
    listed = {"files": checksums(folder, file_names(folder), sync=True), "metrics": dict(values)}
    text = json.dumps({**listed, "sha256": _digest(listed)}, indent=1)
    unfinished = folder.with_name(f"{folder.name}.{MANIFEST}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST)


def checksums(folder: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, list[Any]]:
    """{name: [bytes, hexadecimal SHA-256]}, read in small pieces; `sync`: also written to the disk."""

    def checksum(name: str) -> list[Any]:
        with (folder / name).open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    names = list(names)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """{"files": {name: [bytes, SHA-256]}, "metrics": {name: value}}; None where there is none, or a damaged one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest.pop("sha256") == _digest(manifest) else None
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return None


def _digest(listed: Any) -> str:
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def find_damage(folder: Path, part: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the files of a checkpoint that has a manifest, naming one of them; "" if nothing is.

    part: (index, count): only every count-th file is read, from the index-th.
    """
    if (manifest := read_manifest(folder)) is None:
        return f"{MANIFEST} cannot be read"
    listed = manifest["files"]
    present = file_names(folder)
    if missing := sorted(listed.keys() - set(present)):
        return f"{missing[0]} is missing"
    if extra := sorted(set(present) - listed.keys()):
        return f"{extra[0]} does not belong to it"
    for name in present:
        if (size := (folder / name).stat().st_size) != listed[name][0]:
            return f"{name} has {size} bytes instead of {listed[name][0]}"
    own = present[part[0] :: part[1]]
    try:
        found = checksums(folder, own)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    return next((f"{name} has changed" for name in own if found[name] != listed[name]), "")
