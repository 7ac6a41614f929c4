import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from rlhf_jax.mesh import (
    AXES,
    GENERATE,
    TRAIN,
    WHOLE,
    Layout,
    MeshConfig,
    check_divides,
    check_model_divides,
    make_mesh,
    nearest_sizes,
    single_device_mesh,
    train_layout,
)

EIGHT = [name for name in tiny.MESHES if name != "one"]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(1, -1, 2), (1, 4, 2)),
        (MeshConfig(-1, 2, 2), (2, 2, 2)),
        (MeshConfig(2, 1, -1), (2, 1, 4)),
        (MeshConfig(8, 1, 1), (8, 1, 1)),
        (MeshConfig(2, 4, -1), (2, 4, 1)),
    ],
)
def test_minus_one_takes_the_remaining_of_eight_devices(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES and mesh.devices.shape == sizes
    assert list(mesh.devices.flat) == jax.devices(), "every mesh has the same device order"


def test_given_devices_keep_their_order():
    """Those of a plan are of machines that are not here."""
    assert list(make_mesh(MeshConfig(), jax.devices()[::-1]).devices.flat) == jax.devices()[::-1]


def test_the_default_mesh_is_the_first_device():
    assert list(single_device_mesh().devices.flat) == jax.devices()[:1]


@pytest.mark.parametrize(
    ("config", "reported"),
    [
        (MeshConfig(-1, -1, 2), ["mesh.data=-1 and mesh.fsdp=-1", "at most one is -1"]),
        (MeshConfig(1, 0, 2), ["mesh.fsdp=0", "at least 1"]),
        (MeshConfig(1, -1, -2), ["mesh.tensor=-2", "at least 1"]),
        (MeshConfig(1, -1, 3), ["data 1 x fsdp -1 x tensor 3", "8 device(s)", "multiply to 3", "one of 1, 2, 4"]),
        (MeshConfig(3, -1, 2), ["multiply to 6", "one of 2, 4, 8"]),
        (MeshConfig(1, 2, 2), ["multiply to 4", "make them multiply to 8, or set one of them to -1"]),
        (MeshConfig(1, 16, 1), ["multiply to 16", "make them multiply to 8, or"]),
    ],
)
def test_a_mesh_that_does_not_cover_the_devices_is_rejected_with_the_nearest_that_do(config, reported):
    with pytest.raises(ValueError) as error:
        make_mesh(config)
    for part in reported:
        assert part in str(error.value)


def test_a_mesh_with_all_sizes_given_that_covers_the_devices_is_accepted():
    assert make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2]).shape == {"data": 1, "fsdp": 1, "tensor": 2}


def test_the_three_nearest_divisors_of_24_are_reported_in_order():
    assert nearest_sizes(5, [1, 2, 3, 4, 6, 8, 12, 24]) == "3, 4, 6"
    assert nearest_sizes(100, [1, 2]) == "1, 2"


@pytest.mark.parametrize(("size", "near"), [(10, "[8, 12]"), (3, "[4]"), (0, "[4]"), (-5, "[4]"), (13, "[12, 16]")])
def test_a_size_that_is_not_divisible_by_four_is_rejected_with_its_two_neighbours(size, near):
    with pytest.raises(ValueError) as error:
        check_divides("sft.batch_size", size, 4, "devices of the mesh")
    wanted = f"sft.batch_size={size} does not divide over 4 devices of the mesh; nearest that do: {near}"
    assert str(error.value) == wanted


def test_a_divisible_size_is_accepted():
    check_divides("n", 12, 4, "parts")


def test_a_tensor_axis_that_splits_heads_unevenly_is_rejected_with_the_heads_and_the_valid_sizes():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    check_model_divides({"attention heads": 8, "key-value heads": 16}, mesh)
    with pytest.raises(ValueError) as error:
        check_model_divides({"attention heads": 32, "key-value heads": 4}, mesh)
    assert str(error.value) == (
        "mesh.tensor=8 does not divide 4 key-value heads of this model; sizes that divide: 1, 2, 4"
    )
    with pytest.raises(ValueError, match="12 attention heads, 12 key-value heads .* sizes that divide: 4, 6, 12"):
        check_model_divides({"attention heads": 12, "key-value heads": 12}, mesh)


def test_training_shards_tensor_major_and_the_batch_over_the_same_axes_in_the_same_order():
    layout = Layout(tiny.mesh_of("fsdp4-tensor2"), TRAIN)
    assert layout.spec(("layers", "embed", "heads")) == PartitionSpec(None, None, ("tensor", "fsdp"))
    assert layout.spec(("vocab", None)) == PartitionSpec(("tensor", "fsdp"), None)
    assert layout.spec(("batch", None)) == PartitionSpec(("data", "tensor", "fsdp"), None)
    assert layout.shards("batch") == layout.shards("mlp") == 8 and layout.shards("embed") == 1


def test_generation_keeps_the_tensor_sharding_and_uses_the_other_axes_for_the_batch():
    layout = Layout(tiny.mesh_of("fsdp4-tensor2"), GENERATE)
    assert layout.spec(("layers", "embed", "mlp")) == PartitionSpec(None, None, ("tensor",))
    assert layout.spec((None, "positions")) == PartitionSpec(None, None)
    assert layout.spec(("batch", "kv_heads")) == PartitionSpec(("data", "fsdp"), ("tensor",))
    assert layout.shards("batch") == 4 and layout.shards("heads") == 2


@pytest.mark.parametrize(
    ("zero", "tables"),
    [(3, (TRAIN, TRAIN, TRAIN)), (2, (WHOLE, TRAIN, TRAIN)), (1, (WHOLE, WHOLE, TRAIN)), (0, (WHOLE, WHOLE, WHOLE))],
)
def test_a_zero_stage_is_one_table_each_for_parameters_gradients_and_moments(zero, tables):
    layout = train_layout(tiny.mesh_of("fsdp4-tensor2"), zero)
    assert (layout.table, layout.gradients.table, layout.moments.table) == tables and layout.moments_in is None
    assert layout.shards("batch") == 8 and layout.shards("mlp") == (8 if zero == 3 else 2)
    offloaded = train_layout(layout.mesh, zero, offload_moments=True)
    assert offloaded.moments_in == "pinned_host" and offloaded.moments == layout.moments, (
        "offloaded moments keep their sharding"
    )


def test_weights_at_lower_zero_stages_are_sharded_as_in_generation_on_every_axis_except_the_batch():
    differing = [axis for axis, names in vars(WHOLE).items() if names != getattr(GENERATE, axis)]
    assert differing == ["batch"] and WHOLE.batch == TRAIN.batch


@pytest.mark.parametrize("axis", ["vocab", "heads", "kv_heads", "mlp", "positions"])
@pytest.mark.parametrize("name", EIGHT)
def test_the_training_shard_of_a_device_is_part_of_its_generation_shard(name, axis):
    mesh = tiny.mesh_of(name)
    train, serve = (Layout(mesh, table).sharding((axis,)).devices_indices_map((64,)) for table in (TRAIN, GENERATE))
    for device in mesh.devices.flat:
        mine, whole = (range(64)[index[device][0]] for index in (train, serve))
        assert set(mine) <= set(whole), f"{device}: the way back would need another device"


@pytest.mark.parametrize("name", EIGHT)
def test_put_reads_only_the_shards_from_the_host(name):
    layout, asked = Layout(tiny.mesh_of(name), TRAIN), []

    class Host(np.ndarray):
        def __getitem__(self, index):
            asked.append(np.asarray(super().__getitem__(index)).shape)
            return super().__getitem__(index)

    whole = np.arange(64 * 3, dtype=np.float32).reshape(64, 3)
    array = layout.put(whole.view(Host), "vocab", None)
    split = layout.shards("vocab")
    assert set(asked) == {(64 // split, 3)}
    assert {shard.data.shape for shard in array.addressable_shards} == {(64 // split, 3)}
    np.testing.assert_array_equal(array, whole)


def test_put_batch_shards_the_rows_of_every_leaf_over_all_eight_devices():
    layout = Layout(tiny.mesh_of("data2-fsdp2-tensor2"), TRAIN)
    batch = layout.put_batch({"tokens": np.zeros((16, 5), np.int32), "score": np.zeros(16, np.float32)})
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 5)}
    assert {shard.data.shape for shard in batch["score"].addressable_shards} == {(2,)}
