import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rlhf_jax.checkpoint
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.checkpoint_files import MANIFEST
from rlhf_jax.trees import record


@record
class State:
    step: int
    params: dict  # {path: array}
    opt_state: optax.OptState
    key: jax.Array


def mesh_of(fsdp, tensor):
    shape = (fsdp, tensor)
    return jax.make_mesh(
        shape,
        ("fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: fsdp * tensor],
    )


def make_state(seed=0):
    kernel, bias = jax.random.split(jax.random.key(seed))
    params = {
        "layers/attention/q/kernel": jax.random.normal(kernel, (2, 8, 16)),
        "layers/attention/q/bias": jax.random.normal(bias, (2, 16)).astype(jnp.bfloat16),
    }
    moments = jax.tree.map(lambda x: x + 1, optax.adam(1e-3).init(params))
    return State(step=7, params=params, opt_state=moments, key=jax.random.key(11))


def shard_state(state, mesh):
    """Kernels over both axes, the rest on every device."""

    def sharding(leaf):
        spec = jax.P(None, "fsdp", "tensor") if leaf.ndim == 3 else jax.P()
        return jax.NamedSharding(mesh, spec)

    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, sharding(leaf)) if isinstance(leaf, jax.Array) else leaf, state
    )


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, state
    )


def raw(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    return np.asarray(leaf)


def assert_bit_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert raw(one).dtype == raw(other).dtype
        assert raw(one).tobytes() == raw(other).tobytes()


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 4)])
def test_a_state_saved_on_four_by_two_devices_is_restored_bit_equal_on_another_mesh(tmp_path, shape):
    state = shard_state(make_state(), mesh_of(4, 2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"epoch": 3, "name": "sft"})
    wanted = abstract_of(shard_state(make_state(seed=1), mesh_of(*shape)))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 7
        restored, meta = checkpoints.restore(7, wanted)
    assert meta == {"epoch": 3, "name": "sft"}
    assert_bit_equal(restored, state)
    assert type(restored.step) is int and restored.step == 7
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        if isinstance(leaf, jax.Array):
            assert leaf.sharding == want.sharding
    assert restored.params["layers/attention/q/kernel"].addressable_shards[0].data.size == 256 // (shape[0] * shape[1])


def test_a_restored_key_gives_the_same_numbers(tmp_path):
    keys = {
        "one": jax.random.key(5),
        "many": jax.random.split(jax.random.key(6), 3),
        "rbg": jax.random.key(7, impl="rbg"),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, keys, {})
        restored, _ = checkpoints.restore(1, abstract_of(keys))
    for name in ("one", "rbg"):
        assert jax.random.uniform(restored[name]).item() == jax.random.uniform(keys[name]).item()
        assert restored[name].dtype == keys[name].dtype
    np.testing.assert_array_equal(jax.random.key_data(restored["many"]), jax.random.key_data(keys["many"]))


def test_numbers_and_numpy_arrays_keep_their_type(tmp_path):
    state = {"steps": 12, "best": 0.1, "done": True, "order": np.arange(3, dtype=np.int16), "count": jnp.int32(4)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, {**state, "steps": 0, "best": 0.0, "done": False})
    assert (restored["steps"], restored["best"], restored["done"]) == (12, 0.1, True)
    assert [type(restored[name]) for name in state] == [int, float, bool, np.ndarray, type(state["count"])]
    assert restored["order"].dtype == np.int16 and restored["order"].tolist() == [0, 1, 2]


def test_an_ongoing_save_is_not_affected_by_reuse_of_donated_buffers(tmp_path):
    @jax.jit
    def fill(value):
        return {"kernel": jnp.full((1024, 4096), value)}

    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    for on_mesh in (False, True):
        state = fill(3.0)
        if on_mesh:
            state = jax.device_put(state, jax.NamedSharding(mesh_of(4, 2), jax.P("fsdp", "tensor")))
        wanted = abstract_of(state)
        with Checkpoints(tmp_path / str(on_mesh)) as checkpoints:
            meta = {"seen": [1]}
            checkpoints.save(1, state, meta)
            meta["seen"].append(2)
            for _ in range(3):
                state = overwrite(state)
            jax.block_until_ready(state)
            restored, meta = checkpoints.restore(1, wanted)
        assert meta == {"seen": [1]}
        assert bool((restored["kernel"] == 3.0).all())
        assert bool((state["kernel"] == -1.0).all())


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 5, 9):
            checkpoints.save(step, {"x": jnp.full(2, step)}, {})
        assert checkpoints.latest_step() == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(5, {"x": jnp.zeros(2, int)})
        assert restored["x"].tolist() == [5, 5]


def test_a_save_killed_before_its_last_rename_is_never_mistaken_for_a_finished_one(tmp_path):
    """The second save dies at its final rename, as if by `kill -9`."""
    program = """
        import os, sys
        import jax.numpy as jnp
        from rlhf_jax.checkpoint import Checkpoints

        def die_at_the_rename(event, args):
            if event == "os.rename" and str(args[1]).rstrip("/").endswith("/2"):
                os._exit(9)

        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"x": jnp.full(4, 1)}, {"step": 1})
        checkpoints.wait()
        sys.addaudithook(die_at_the_rename)
        checkpoints.save(2, {"x": jnp.full(4, 2)}, {"step": 2})
        checkpoints.wait()
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
        check=False,
    )
    assert killed.returncode == 9
    left = [path.name for path in tmp_path.iterdir() if path.name != "1"]
    assert len(left) == 1 and left[0].startswith("2.")  # all of step 2 except its final name

    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        with pytest.raises(ValueError, match="no checkpoint of step 2 in .*: it has 1"):
            checkpoints.restore(2, {"x": jnp.zeros(4, int)})
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta = checkpoints.restore(1, {"x": jnp.zeros(4, int)})
        assert restored["x"].tolist() == [1, 1, 1, 1] and meta == {"step": 1}
        checkpoints.save(2, {"x": jnp.full(4, 22)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_state_that_does_not_match_is_rejected_with_every_path(tmp_path):
    saved = {"params": {"q/kernel": jnp.zeros((4, 2)), "q/bias": jnp.zeros(2), "k/kernel": jnp.zeros(3)}, "step": 1}
    wanted = {
        "params": {"q/kernel": jnp.zeros((4, 3)), "q/bias": jnp.zeros(2, jnp.bfloat16), "v/kernel": jnp.zeros(3)},
        "step": 0,
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, {})
        with pytest.raises(ValueError, match="does not fit this model") as refusal:
            checkpoints.restore(1, wanted)
    assert str(refusal.value).splitlines()[1:] == [
        "  params/k/kernel: only in the checkpoint",
        "  params/q/bias: float32 [2] in the checkpoint, bfloat16 [2] here",
        "  params/q/kernel: float32 [4, 2] in the checkpoint, float32 [4, 3] here",
        "  params/v/kernel: not in the checkpoint",
    ]


def test_a_key_of_another_generator_is_rejected(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(ValueError, match=r"key: uint32 \[2\] in the checkpoint, uint32 \[4\] here"):
            checkpoints.restore(1, {"key": jax.random.key(0, impl="rbg")})


def test_wrong_use_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="no checkpoint of step 3 in .*: it has none"):
            checkpoints.restore(3, {"x": jnp.zeros(1)})
        checkpoints.save(3, {"x": jnp.zeros(1)}, {})
        with pytest.raises(AssertionError, match="step 3 is not above 3"):
            checkpoints.save(3, {"x": jnp.zeros(1)}, {})
        with pytest.raises(AssertionError, match=r"no sharding given for \['x'\]"):
            checkpoints.restore(3, {"x": jax.ShapeDtypeStruct((1,), jnp.float32)})


def test_nothing_is_printed(tmp_path, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(1)}, {})
        checkpoints.restore(1, {"x": jnp.zeros(1)})
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


NOISE = np.random.default_rng(0).normal(size=4096).astype(np.float32)  # no compression makes it small


def save_steps(folder, *steps):
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"x": jnp.asarray(step * NOISE)}, {"step": step})
            checkpoints.wait()


def truncate(folder):
    largest = max(
        (path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    os.truncate(largest, 10)


DAMAGES = {"cut short": truncate, "no state": lambda folder: shutil.rmtree(folder / "state")}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_newest_checkpoint_that_can_be_read_is_used(tmp_path, caplog, damage):
    save_steps(tmp_path, 2, 4, 6)
    damage(tmp_path / "6")
    with Checkpoints(tmp_path) as checkpoints:
        step, state, meta = checkpoints.restore_newest({"x": jnp.zeros(4096)})
        assert (step, meta) == (4, {"step": 4}) and np.array_equal(state["x"], 4 * NOISE)
        (message,) = [record.getMessage() for record in caplog.records if record.name == "rlhf_jax.checkpoint"]
        assert message.startswith(f"checkpoint {tmp_path / '6'} is damaged (")
        assert message.endswith("): renamed to damaged-6, and the checkpoint of step 4 is used") and "\n" not in message
        checkpoints.save(5, state, {"step": 5})
        checkpoints.save(6, state, {"step": 6})
    assert {path.name for path in tmp_path.iterdir()} >= {"5", "6", "damaged-6"}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_newest({"x": jnp.zeros(4096)})[0] == 6


def test_where_all_are_damaged_the_message_says_what_to_delete_and_none_is_renamed(tmp_path):
    save_steps(tmp_path, 2, 4)
    for step in ("2", "4"):
        truncate(tmp_path / step)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=rf"checkpoint \S*4 is damaged .* no other one can be read: delete {tmp_path}"),
    ):
        checkpoints.restore_newest({"x": jnp.zeros(4096)})
    assert {path.name for path in tmp_path.iterdir()} >= {"2", "4"}


def test_a_state_of_another_shape_is_no_damage_and_a_new_folder_has_no_newest(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore_newest({"x": jnp.zeros(1)}) is None
    save_steps(tmp_path, 2, 4)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="does not fit this model"):
        checkpoints.restore_newest({"x": jnp.zeros(5)})
    assert (tmp_path / "4").exists()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4; copied, never changed."""
    folder = tmp_path_factory.mktemp("two_steps")
    save_steps(folder, 2, 4)
    return folder


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def add_file(path):
    path.with_name("extra").write_bytes(b"x")


def newest_of(folder):
    with Checkpoints(folder, keep=5) as checkpoints:
        return checkpoints.newest_intact()


@pytest.mark.parametrize("damage", [flip_bit, cut, os.remove, add_file], ids=["flipped", "cut", "missing", "extra"])
def test_damage_to_any_file_of_a_checkpoint_is_found_and_the_file_is_named(two_steps, tmp_path, caplog, damage):
    files = [path.relative_to(two_steps / "4") for path in sorted((two_steps / "4").rglob("*")) if path.is_file()]
    assert len(files) > 10 and MANIFEST in map(str, files)
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        damage(folder / "4" / name)
        caplog.clear()
        assert newest_of(folder) == 2
        is_incomplete = str(name) == MANIFEST and damage is os.remove
        kept = f"{'incomplete' if is_incomplete else 'damaged'}-4"
        assert (folder / kept).is_dir() and not (folder / "4").exists()
        (message,) = [record.getMessage() for record in caplog.records if record.name == "rlhf_jax.checkpoint"]
        assert str(name.with_name("extra") if damage is add_file else name) in message and "\n" not in message
        assert message.endswith(f"renamed to {kept}, and the checkpoint of step 2 is used")


def test_a_save_killed_before_its_checksums_are_complete_is_skipped_and_nothing_older_was_deleted(tmp_path, caplog):
    program = """
        import os, sys
        import jax.numpy as jnp
        import rlhf_jax.checkpoint
        from rlhf_jax.checkpoint import Checkpoints

        checkpoints = Checkpoints(sys.argv[1], keep=1)
        checkpoints.save(1, {"x": jnp.full(4, 1)}, {})
        checkpoints.wait()
        rlhf_jax.checkpoint.write_manifest = lambda *_: os._exit(9)
        checkpoints.save(2, {"x": jnp.full(4, 2)}, {})
        checkpoints.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    assert subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=120).returncode == 9
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        step, state, _ = checkpoints.restore_newest({"x": jnp.zeros(4, int)})
        assert step == 1 and state["x"].tolist() == [1, 1, 1, 1]
        assert "checkpoint of step 1 is used" in caplog.text and "its save did not end" in caplog.text
        checkpoints.save(2, state, {})
    assert {path.name for path in tmp_path.iterdir()} == {"2", "incomplete-2"}


def test_where_the_only_save_did_not_end_there_is_no_checkpoint(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps / "2", tmp_path / "run" / "2")
    (tmp_path / "run" / "2" / MANIFEST).unlink()
    assert newest_of(tmp_path / "run") is None
    assert "the stage starts over" in caplog.text


def test_of_several_checkpoints_without_checksums_none_is_deleted(two_steps, tmp_path):
    """As a version without checksums wrote them."""
    shutil.copytree(two_steps, tmp_path / "run")
    for step in ("2", "4"):
        (tmp_path / "run" / step / MANIFEST).unlink()
    assert newest_of(tmp_path / "run") is None
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"incomplete-2", "incomplete-4"}


def test_a_failed_save_is_raised_and_deletes_nothing(two_steps, tmp_path, monkeypatch):
    shutil.copytree(two_steps, tmp_path / "run")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rlhf_jax.checkpoint, "write_manifest", fail)
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(6, {"x": jnp.asarray(NOISE)}, {})
    message = rf"checkpoint {tmp_path}/run/6 is not saved \(No space left on device\); the one before it is kept"
    with pytest.raises(ValueError, match=message):
        checkpoints.close()
    assert newest_of(tmp_path / "run") == 4


@pytest.mark.parametrize(("keep_best", "expected"), [("loss", {"3", "5"}), ("-loss", {"1", "5"}), ("kl", {"5"})])
def test_the_best_checkpoint_by_a_metric_is_kept_too(tmp_path, keep_best, expected):
    losses = {1: 3.0, 2: 2.5, 3: 2.0}
    with Checkpoints(tmp_path, keep=1, keep_best=keep_best) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.zeros(1)}, {}, {"loss": losses[step]})
    with Checkpoints(tmp_path, keep=1, keep_best=keep_best) as checkpoints:  # the values are those in the folder
        for step in (4, 5):
            checkpoints.save(step, {"x": jnp.zeros(1)}, {}, {"loss": 2.2} if step == 4 else {})
        assert checkpoints.save_seconds > 0
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_the_checksums_are_those_of_sha256sum(two_steps):
    manifest = json.loads((two_steps / "4" / MANIFEST).read_text())
    for name, (size, digest) in manifest["files"].items():
        content = (two_steps / "4" / name).read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
