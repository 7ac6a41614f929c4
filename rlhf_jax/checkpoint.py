"""Checkpoints for exact resume: written while training goes on, restored into any layout."""

from __future__ import annotations

import copy
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax import hosts
from rlhf_jax.checkpoint_files import MANIFEST, find_damage, read_manifest, write_manifest

T = TypeVar("T")
LOGGER = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in `folder/STEP/`; a context manager that waits for the last save on leaving.

    The state is any pytree of jax arrays (typed PRNG keys among them), numpy arrays, ints and floats. It is written
    under its paths, "params/layers/attention/q/kernel", so the containers may change between save and restore as long
    as the paths stay. A step is written under another name and renamed when all of it is on disk. Then the checksums of
    its files are written into it, which completes it: a checkpoint without them is from a save that was killed. Older
    checkpoints are deleted after that.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, keep_best: str = "") -> None:
        """Open the folder and keep its newest `keep` steps and the best. One run at a time may have a folder open.

        Creates the folder and removes the leftovers of killed saves. Raises ValueError for `keep` below 1.

        Args:
            keep_best: "loss" also keeps the step whose value of this name is the least, "-score" the one with the
                greatest; "": none.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}: keep at least 1 checkpoint, or a run cannot be resumed")
        self._folder, self._keep, self._keep_best = Path(folder).absolute(), keep, keep_best
        hosts.on_main(self._clear)
        parts = dict(state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**parts))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._finishing: Future[float] | None = None
        self._latest = max(hosts.broadcast(self.steps()), default=None)
        self.save_seconds = 0.0  # that the last finished save took, from the copy off the devices to the checksums

    def _clear(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.orbax-checkpoint-tmp*", "*.unfinished"):
            for left in self._folder.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def steps(self) -> list[int]:
        """The steps whose checkpoints are in the folder, complete or not, ascending."""
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Copy the state off the devices and return; a thread writes the copy. `state` may be donated afterwards.

        step: greater than every step saved before. meta: JSON data (tuples come back as lists). metrics: values that
        `keep_best` may name.
        Waits for an unfinished save first, and raises its failure.
        """
        self.wait()
        started = time.monotonic()
        assert self._latest is None or step > self._latest, f"step {step} is not above {self._latest}"
        flat = {path: _as_array(leaf) for path, leaf in _by_path(state).items()}
        args = ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(copy.deepcopy(meta)))
        folder = self._folder / str(step)
        self._writer.save(folder, args=args)
        self._latest = step
        self._finishing = self._pool.submit(self._finish, folder, dict(metrics or {}), started)

    def _finish(self, folder: Path, metrics: dict[str, float], started: float) -> float:
        """Complete a checkpoint once it is written, delete those that are no longer kept; the seconds of the save."""
        self._writer.wait_until_finished()
        if hosts.is_main():
            write_manifest(folder, metrics)
        for step in self._obsolete() if hosts.is_main() else ():
            # Renamed first: what a kill leaves of a deletion is never mistaken for a checkpoint.
            deleted = (self._folder / str(step)).rename(self._folder / f"{step}.unfinished")
            shutil.rmtree(deleted)
        return time.monotonic() - started

    def _obsolete(self) -> list[int]:
        """The complete checkpoints that are neither among the newest nor the best."""
        found = {step: read_manifest(self._folder / str(step)) for step in self.steps()}
        complete = {step: manifest["metrics"] for step, manifest in found.items() if manifest is not None}
        name, sign = self._keep_best.removeprefix("-"), -1 if self._keep_best.startswith("-") else 1
        ranked = [
            (sign * metrics[name], step)
            for step, metrics in complete.items()
            if math.isfinite(metrics.get(name, math.nan))
        ]
        kept = {*sorted(complete)[-self._keep :], *([min(ranked)[1]] if ranked else [])}
        return [step for step in complete if step not in kept]

    def latest_step(self) -> int | None:
        """The newest step saved, including one being written, or None."""
        return self._latest

    def newest_intact(self) -> int | None:
        """The newest step whose checkpoint is complete and as it was written; None where there is none.

        Newer ones are renamed, with a warning: to `folder/incomplete-STEP` where the save was killed before its end
        (those of an earlier call are then deleted), and to `folder/damaged-STEP` where a file has changed.
        Raises ValueError, and renames nothing, where complete checkpoints exist and all are damaged.
        """
        self.wait()
        skipped: dict[int, tuple[str, str]] = {}
        for step in hosts.broadcast(self.steps()[::-1]):
            folder = self._folder / str(step)
            if hosts.broadcast((folder / MANIFEST).exists()):
                # Each process reads a part of the files.
                found = hosts.gather(find_damage(folder, (hosts.index(), hosts.count())))
                if not (damage := next(filter(None, found), "")):
                    break
                skipped[step] = "damaged", damage
            else:
                skipped[step] = "incomplete", f"it has no {MANIFEST}: its save did not end"
        else:
            step = None
        hosts.on_main(self._set_aside, skipped, step)
        self._latest = step
        return step

    def _set_aside(self, skipped: Mapping[int, tuple[str, str]], step: int | None) -> None:
        """Rename {step: (kind, what is wrong)}, as the checkpoint of `step` is used."""
        texts = {s: f"checkpoint {self._folder / str(s)} is {kind} ({why})" for s, (kind, why) in skipped.items()}
        if step is None and (damaged := [each for each, (kind, _) in skipped.items() if kind == "damaged"]):
            raise ValueError(f"{texts[damaged[0]]}, and no other one can be read: delete {self._folder} to start over")
        instead = "the stage starts over" if step is None else f"the checkpoint of step {step} is used"
        patterns = {"incomplete-*" if kind == "incomplete" else f"damaged-{s}" for s, (kind, _) in skipped.items()}
        for earlier in [path for pattern in patterns for path in self._folder.glob(pattern)]:
            shutil.rmtree(earlier)
        for each, (kind, _) in skipped.items():
            (self._folder / str(each)).rename(self._folder / f"{kind}-{each}")
            LOGGER.warning(f"{texts[each]}: renamed to {kind}-{each}, and {instead}")

    def restore_newest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, meta) of `newest_intact`, as `restore`; None if there is none. ValueError as both."""
        step = self.newest_intact()
        return None if step is None else (step, *self.restore(step, abstract))

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state and meta of a step, every array read directly into the sharding that `abstract` gives it.

        abstract: a pytree like the saved state; its jax leaves are `jax.ShapeDtypeStruct`s with a sharding, or arrays,
        of which shape, dtype and sharding are used. Mesh and shardings may differ from those of the save. Ints, floats
        and numpy arrays keep their types.
        Raises ValueError if there is no such step, or with every path that only one side has or whose shape or dtype
        differs, or if its files cannot be read.
        """
        self.wait()
        folder = self._folder / str(step)
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"no checkpoint of step {step} in {self._folder}: it has {known}")
        leaves = _by_path(abstract)
        wanted = {path: _as_array(leaf) for path, leaf in leaves.items()}
        missing = [path for path, leaf in wanted.items() if not isinstance(leaf, np.ndarray) and leaf.sharding is None]
        assert not missing, f"no sharding given for {missing}"
        saved = self._read(folder, lambda: dict(self._writer.metadata(folder).item_metadata["state"]))
        if faults := _differences(saved, wanted):
            raise ValueError(
                f"checkpoint {folder} does not fit this model and configuration; resume with the "
                "ones it was saved with, or start a new run folder:\n  " + "\n  ".join(faults)
            )
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), meta=ocp.args.JsonRestore())
        restored = self._read(folder, lambda: self._writer.restore(folder, args=parts))
        values = [
            type(leaf)(restored.state[path].item()) if isinstance(leaf, (int, float)) else restored.state[path]
            for path, leaf in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), values), restored.meta

    def _read(self, folder: Path, read: Callable[[], T]) -> T:
        """read(); any failure, except for a lack of memory, is raised as a ValueError of one line."""
        try:
            return read()
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:  # every library that reads a part of it has errors of its own
            what = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(f"checkpoint {folder} cannot be read ({what.partition('. See ')[0]})") from error

    def wait(self) -> None:
        """Return when the last save is complete; raises its failure."""
        finishing, self._finishing = self._finishing, None
        if finishing is None:
            return
        try:
            self.save_seconds = finishing.result()
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:  # as in `_read`; those of tensorstore are pages of JSON after the reason
            what = getattr(error, "strerror", None) or re.sub(
                r"\s*\[(os_error_code|tensorstore_spec).*", "", str(error)
            )
            fix = "the one before it is kept: make room or allow writing there, and run the same command again"
            raise ValueError(f"checkpoint {self._folder / str(self._latest)} is not saved ({what}); {fix}") from error

    def close(self) -> None:
        """`wait`, then release the threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._writer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves have the same path"
    return flat


def _as_array(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, (int, float)) else leaf


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line per path in which a checkpoint and the state to restore differ."""
    faults = [f"{path}: not in the checkpoint" for path in wanted if path not in saved]
    faults += [f"{path}: only in the checkpoint" for path in saved if path not in wanted]
    for path in wanted.keys() & saved.keys():
        leaf = wanted[path]
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # stored as its key data
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        have, want = (f"{each.dtype} {list(each.shape)}" for each in (saved[path], leaf))
        if have != want:
            faults.append(f"{path}: {have} in the checkpoint, {want} here")
    return sorted(faults)
