"""A table of faults: each is injected into a run of the loop of steps, which ends as if there had been none, or in one
line that names the place, with everything intact that was saved before.

The faults of a step's numbers are in test_skipping.py, those of data in test_malformed.py, and a hung step and a second
interrupt in test_loop.py, as they end the process.
"""

import errno
import os
import shutil
import signal
import subprocess
import time

import jax.numpy as jnp
import pytest
from test_loop import checkpoints_of, loop, send, steps_of

from rlhf_jax import checkpoint, metrics
from rlhf_jax.checkpoint_files import MANIFEST
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.run_folder import RunConfig, open_run
from rlhf_jax.stages.stopping import StopRun, stop_on_signals
from rlhf_jax.train import prefix_errors

# A save that fails leaves reads and writes of TensorStore running, which find the event loop of the save closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TOTAL = 8
RUN = dict(total=TOTAL, save_every=2)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run that was stopped after step 5 of 8, with the checkpoints of steps 4 and 5; copied, never changed."""
    folder = tmp_path_factory.mktemp("stopped")
    with stop_on_signals(), pytest.raises(StopRun):
        loop(folder, at_step=send(signal.SIGTERM, at=4), **RUN)
    assert checkpoints_of(folder) == ["4", "5"]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return loop(tmp_path_factory.mktemp("whole"), **RUN)


def newest(folder):
    return folder / "sft/checkpoints/5"


def largest_data(folder):
    return max((path for path in newest(folder).glob("state/**/d/*")), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def cut_last_line(folder):
    path = folder / "sft/metrics.jsonl"
    path.write_text(path.read_text()[:-9])


def write(folder, name, content="x"):
    path = folder / "sft" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def each_checkpoint(damage):
    return lambda folder: [damage(step) for step in (folder / "sft/checkpoints").iterdir()]


# Faults of a stopped run, which then continues to the same end: (what happens to the folder, what is said).
SURVIVED = {
    "a bit of array data flips": (lambda f: flip(largest_data(f)), "has changed): renamed to damaged-5"),
    "array data are cut": (lambda f: cut(largest_data(f)), "bytes instead of"),
    "array data are missing": (lambda f: largest_data(f).unlink(), "is missing"),
    "array data are empty": (lambda f: largest_data(f).write_bytes(b""), "has 0 bytes instead of"),
    "the tree of arrays flips": (lambda f: flip(newest(f) / "state/_METADATA"), "state/_METADATA has changed"),
    "the tree of arrays is missing": (lambda f: (newest(f) / "state/_METADATA").unlink(), "state/_METADATA is missing"),
    "the index of chunks flips": (lambda f: flip(newest(f) / "state/manifest.ocdbt"), "manifest.ocdbt has changed"),
    "the shardings are cut": (lambda f: cut(newest(f) / "state/_sharding"), "state/_sharding has"),
    "the position in the data flips": (lambda f: flip(newest(f) / "meta/metadata"), "meta/metadata has changed"),
    "the position in the data is missing": (lambda f: (newest(f) / "meta/metadata").unlink(), "metadata is missing"),
    "Orbax's own record flips": (
        lambda f: flip(newest(f) / "_CHECKPOINT_METADATA"),
        "_CHECKPOINT_METADATA has changed",
    ),
    "the state is missing": (lambda f: shutil.rmtree(newest(f) / "state"), "is missing): renamed to damaged-5"),
    "a file is too many": (lambda f: write(f, "checkpoints/5/state/d/more"), "more does not belong to it"),
    "the checksums flip": (lambda f: flip(newest(f) / MANIFEST), f"{MANIFEST} cannot be read"),
    "the checksums are cut": (lambda f: cut(newest(f) / MANIFEST), f"{MANIFEST} cannot be read"),
    "a kill before the checksums": (lambda f: (newest(f) / MANIFEST).unlink(), "its save did not end): renamed to inc"),
    "a kill in each save": (each_checkpoint(lambda s: (s / MANIFEST).unlink()), "and the stage starts over"),
    "a kill during a save": (lambda f: write(f, "checkpoints/6.orbax-checkpoint-tmp/state/x"), ""),
    "a kill during a deletion": (lambda f: write(f, "checkpoints/2.unfinished/state/x"), ""),
    "a kill while checksums are written": (lambda f: write(f, "checkpoints/6.manifest.json.unfinished"), ""),
    "a kill while a metric is written": (cut_last_line, ""),
    "a kill while a rollout is written": (lambda f: write(f, "rollouts/000006.jsonl", '{"st'), ""),
    "a kill after a batch was kept": (lambda f: write(f, "bad_batches/000007.npz"), ""),
    "the whole stage is deleted": (lambda f: shutil.rmtree(f / "sft"), ""),
}


@pytest.mark.parametrize("name", SURVIVED)
def test_a_run_continues_over_a_fault_to_the_same_end(stopped_run, whole, tmp_path, caplog, name):
    folder, (damage, said) = tmp_path / "run", SURVIVED[name]
    shutil.copytree(stopped_run, folder)
    damage(folder)
    assert loop(folder, **RUN) == whole
    lines = [record.getMessage() for record in caplog.records if record.name == "rlhf_jax.checkpoint"]
    assert [line for line in lines if said in line] if said else lines == []
    is_lost = "metric" in name  # the record of step 5 was cut, and the checkpoint of step 5 is used
    assert steps_of(folder) == [step for step in range(1, TOTAL + 1) if not (is_lost and step == 5)]
    names = {path.name for kind in ("rollouts", "bad_batches") for path in (folder / "sft").glob(f"{kind}/*")}
    assert names == set() and checkpoints_of(folder)[:2] == ["6", "8"]


# Faults that need a hand: (what happens to the folder, the message). Nothing else in the folder changes.
REFUSED = {
    "all checkpoints are damaged": (
        each_checkpoint(lambda step: flip(step / "meta/metadata")),
        "meta/metadata has changed.*and no other one can be read: delete .*checkpoints to start over",
    ),
    "the only complete checkpoint is damaged": (
        lambda f: ((newest(f) / MANIFEST).unlink(), flip(f / "sft/checkpoints/4/meta/metadata")),
        "checkpoints/4 is damaged .* no other one can be read",
    ),
    "a metric is damaged": (
        lambda f: write(f, "metrics.jsonl", "{}\n" + (f / "sft/metrics.jsonl").read_text()),
        "metrics.jsonl is damaged .*: correct or delete it, and run the same command again",
    ),
    "checkpoints are of other shapes": (
        lambda f: (shutil.rmtree(f / "sft/checkpoints"), save_other_shapes(f)),
        r"does not fit this model and configuration.*x: int32 \[3\] in the checkpoint, int32 \[4\] here",
    ),
    "the rows have changed": (
        lambda f: (shutil.rmtree(f / "sft/checkpoints"), save_other_shapes(f, 4)),
        "the training data is no longer what the first 5 steps saw",
    ),
    "the folder of checkpoints is a file": (
        lambda f: (shutil.rmtree(f / "sft/checkpoints"), write(f, "checkpoints")),
        "File exists: .*checkpoints",
    ),
}


def save_other_shapes(folder, size=3):
    with checkpoint.Checkpoints(folder / "sft/checkpoints") as checkpoints:
        checkpoints.save(5, {"x": jnp.zeros(size, jnp.int32)}, {"data": "other rows"})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fault_that_needs_a_hand_is_one_line_and_changes_nothing(stopped_run, tmp_path, name):
    folder, (damage, message) = tmp_path / "run", REFUSED[name]
    shutil.copytree(stopped_run, folder)
    damage(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"), prefix_errors("sft"):
        loop(folder, **RUN)
    assert contents(folder) == before


def refuse(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code), "the file")

    return fail


# Faults while a run writes: (what fails after step 5, the message). The same command then continues.
WRITES = {
    "no space for the checksums": (checkpoint, "write_manifest", errno.ENOSPC, "No space left on device"),
    "read-only checkpoints": (checkpoint, "write_manifest", errno.EROFS, "Read-only file system"),
    "no permission for checkpoints": (checkpoint, "write_manifest", errno.EACCES, "Permission denied"),
    "no space for a metric": (metrics.Metrics, "write", errno.ENOSPC, "No space left on device"),
    "an input or output error": (metrics.Metrics, "write", errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_run_that_cannot_write_ends_in_one_line_and_continues_when_it_can(whole, tmp_path, monkeypatch, name):
    module, function, code, reason = WRITES[name]

    def at_step(step):
        if step == 4:
            monkeypatch.setattr(module, function, refuse(code))

    with pytest.raises(ValueError, match=f"^sft: .*{reason}") as error, prefix_errors("sft"):
        loop(tmp_path, at_step=at_step, **RUN)
    assert "run the same command again" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    assert "4" in checkpoints_of(tmp_path)
    assert loop(tmp_path, **RUN) == whole and steps_of(tmp_path) == list(range(1, TOTAL + 1))


def test_a_full_disk_ends_a_run_in_one_line_and_it_continues_when_there_is_room(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:

        def at_step(step):
            if step == 4:
                with pytest.raises(OSError, match="No space left"), (disk / "other").open("wb") as file:
                    file.write(b"x" * 2**21)

        with pytest.raises(ValueError, match="^sft: .*No space left on device.*run the same") as error:
            with prefix_errors("sft"):
                loop(disk, at_step=at_step, **RUN)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000
        assert {"2", "4"} & set(checkpoints_of(disk))
        (disk / "other").unlink()
        assert loop(disk, **RUN) == whole
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_clock_that_jumps_changes_nothing(stopped_run, whole, tmp_path, monkeypatch):
    folder, wall = tmp_path / "run", time.time
    shutil.copytree(stopped_run, folder)
    monkeypatch.setattr(time, "time", lambda: wall() - 10**8)
    assert loop(folder, stop_after="1d", **RUN) == whole


@pytest.mark.parametrize("text", ["", "[run", "[run]\nseed = 0\n"], ids=["empty", "cut", "without a section"])
def test_a_damaged_configuration_of_a_run_is_named(tmp_path, text):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/config.toml, the configuration of this run, is damaged \(.*rest"
    ):
        open_run(RunConfig(dir=str(tmp_path)), "[run]\n", Recipe)
    assert (tmp_path / "config.toml").read_text() == text


def test_the_tables_have_at_least_30_faults():
    assert len(SURVIVED) + len(REFUSED) + len(WRITES) >= 30
