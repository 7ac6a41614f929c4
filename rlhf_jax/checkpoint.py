"""Checkpoints for exact resume: written while training goes on, restored into any layout."""

from __future__ import annotations

import copy
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

T = TypeVar("T")
LOGGER = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files cannot be read."""


class Checkpoints:
    """The checkpoints of one run, in `folder/STEP/`; a context manager that waits for the last save on leaving.

    The state is any pytree of jax arrays (typed PRNG keys among them), numpy arrays, ints and floats. It is written
    under its paths, "params/layers/attention/q/kernel", so the containers may change between save and restore as long
    as the paths stay. A step is written under another name and renamed when all of it is on disk: a killed save leaves
    nothing that could be mistaken for a checkpoint.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        """Open the folder and keep its newest `keep` steps. One process at a time may have a folder open.

        Creates the folder; a background thread then removes the leftovers of killed saves. Raises ValueError for
        `keep` below 1.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}: keep at least 1 checkpoint, or a run cannot be resumed")
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True),
        )

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copy the state off the devices and return; a thread writes the copy. `state` may be donated afterwards.

        step: greater than every step saved before. meta: JSON data (tuples come back as lists).
        Waits for an unfinished save first, and raises its failure.
        """
        latest = self.latest_step()
        assert latest is None or step > latest, f"step {step} is not above {latest}"
        flat = {path: _as_array(leaf) for path, leaf in _by_path(state).items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(copy.deepcopy(meta))),
        )

    def latest_step(self) -> int | None:
        """The newest step saved, including one being written, or None. A new process sees only finished ones."""
        return self._manager.latest_step()

    def restore_newest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, meta) of the newest checkpoint whose files can be read, as `restore`; None if there is none.

        Damaged ones that are newer are renamed to `folder/damaged-STEP`, with a warning. ValueError if all are damaged,
        or as `restore`.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, meta = self.restore(step, abstract)
            except DamagedCheckpoint as error:
                damaged[step] = error
                continue
            for other, error in damaged.items():
                kept = self._folder / f"damaged-{other}"
                shutil.rmtree(kept, ignore_errors=True)
                (self._folder / str(other)).rename(kept)
                LOGGER.warning(f"{error}: renamed to {kept.name}, and the checkpoint of step {step} is used")
            if damaged:
                self._manager.reload()
            return step, state, meta
        if damaged:
            raise ValueError(
                f"{damaged[max(damaged)]}, and no other one can be read: delete {self._folder} to start over"
            )
        return None

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state and meta of a step, every array read directly into the sharding that `abstract` gives it.

        abstract: a pytree like the saved state; its jax leaves are `jax.ShapeDtypeStruct`s with a sharding, or arrays,
        of which shape, dtype and sharding are used. Mesh and shardings may differ from those of the save. Ints, floats
        and numpy arrays keep their types.
        Raises ValueError if there is no such step, or with every path that only one side has or whose shape or dtype
        differs; DamagedCheckpoint if its files cannot be read.
        """
        self.wait()
        if step not in self._manager.all_steps():
            known = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise ValueError(f"no checkpoint of step {step} in {self._folder}: it has {known}")
        leaves = _by_path(abstract)
        wanted = {path: _as_array(leaf) for path, leaf in leaves.items()}
        missing = [path for path, leaf in wanted.items() if not isinstance(leaf, np.ndarray) and leaf.sharding is None]
        assert not missing, f"no sharding given for {missing}"
        saved = self._read(step, lambda: dict(self._manager.item_metadata(step).state))
        if faults := _differences(saved, wanted):
            raise ValueError(
                f"checkpoint {self._folder / str(step)} does not fit this model and configuration; resume with the "
                "ones it was saved with, or start a new run folder:\n  " + "\n  ".join(faults)
            )
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), meta=ocp.args.JsonRestore())
        restored = self._read(step, lambda: self._manager.restore(step, args=parts))
        values = [
            type(leaf)(restored.state[path].item()) if isinstance(leaf, (int, float)) else restored.state[path]
            for path, leaf in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), values), restored.meta

    def _read(self, step: int, read: Callable[[], T]) -> T:
        """read(); any failure, except for a lack of memory, is raised as DamagedCheckpoint."""
        try:
            return read()
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:  # every library that reads a part of it has errors of its own
            what = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        _silence_reads()
        raise DamagedCheckpoint(f"checkpoint {self._folder / str(step)} is damaged ({what.partition('. See ')[0]})")

    def wait(self) -> None:
        """Return when the last save is on disk; raises its failure."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, then release the threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _silence_reads() -> None:
    """Keep Python from printing a traceback for each read that orbax had begun when another one failed."""
    before = sys.unraisablehook

    def report(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if code is None or "orbax" not in code.co_filename:
            before(unraisable)

    sys.unraisablehook = report


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
