"""The checksums next to the safetensors of a folder that this package wrote, in the format of `sha256sum -c`.

Only weights are listed: other files are text that users may edit.
"""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_jax import hosts
from rlhf_jax.checkpoint_files import checksums

SUMS = "SHA256SUMS"
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?:\./)?(?P<name>.+)")


def write_sums(folder: Path) -> None:
    """List the SHA-256 of every *.safetensors of a folder, once they are on the disk.

    All processes have to call it. Of N processes each reads every N-th file, in the order of their names: those that it
    has written itself.
    """
    hosts.barrier()
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    own = checksums(folder, names[hosts.index() :: hosts.count()], sync=True)
    found = {name: digest for each in hosts.gather(own) for name, (_, digest) in each.items()}
    if hosts.is_main():
        (folder / SUMS).write_text("".join(f"{found[name]}  {name}\n" for name in names), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Compare the files of a folder that lists their checksums with them, each file by one of the processes.

    All processes have to call it. A folder without a list is not checked; of a list of another tool, the
    safetensors in the folder itself are.

    Raises:
        ValueError: on every process, where a file is missing or has changed since it was written, or the list has.
    """
    path = folder / SUMS
    if not hosts.broadcast(path.exists()):
        return
    try:
        matches = map(_LINE.fullmatch, path.read_text(encoding="utf-8", errors="replace").splitlines())
        lines = {line["name"]: line["digest"] for line in matches if line}
        fault = "" if lines else "it lists no file"
        listed = {name: lines[name] for name in lines if name.endswith(".safetensors") and "/" not in name}
        found = checksums(folder, sorted(listed)[hosts.index() :: hosts.count()])
        fault = fault or next((f"{name} has changed" for name in found if found[name][1] != listed[name]), "")
    except OSError as error:
        fault = f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    if fault := next(filter(None, hosts.gather(fault)), ""):
        fix = f"copy the folder again, or if you have changed it yourself delete {path}"
        raise ValueError(f"{folder} is not as it was written, by its {SUMS}: {fault}: {fix}")
