"""Bytes over links, counted from the text of programs, against hand arithmetic and on eight simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.collectives import Collective, collectives, received_bytes, run_counts
from rlhf_jax.mesh import GENERATE, TRAIN, Layout

# HLO as for GPUs: separate start and done, several arrays per collective, with layouts and comments in between.
TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %p = (s32[], bf16[8,8]{1,0}) parameter(0)
  %ag = ((bf16[8,8]{1,0}, f32[2]{0}), (bf16[8,32]{1,0}, /*index=3*/f32[8]{0:S(5)})) all-gather-start(%a, %b), GROUPS
  %agd = (bf16[8,32]{1,0}, f32[8]{0}) all-gather-done(%ag)
  ROOT %t = (s32[], bf16[8,8]{1,0}) tuple(%i, %q)
}

%wrapped (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  ROOT %a2a = f32[16]{0} all-to-all(%q), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

ENTRY %main (p: bf16[8,8]) -> bf16[8,8] {
  %w = (s32[], bf16[8,8]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %ar = (f32[10]{0}, pred[]) all-reduce-start(%g, %h), replica_groups={}, to_apply=%add
  %rs = bf16[4]{0} reduce-scatter(%g), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %cp = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,0}}
  %as = ((f32[16]{0}), f32[16]{0}) async-start(%q), calls=%wrapped
  ROOT %ad = f32[16]{0} async-done(%as), calls=%wrapped
}
"""
TEXT = TEXT.replace("GROUPS", 'replica_groups=[2,4]<=[4,2]T(1,0), metadata={op_name="all-reduce("}')


def test_collectives_are_parsed_with_shapes_groups_and_run_counts():
    assert collectives(TEXT) == [
        Collective("all-gather", "bf16", (8, 32), 4, 5),
        Collective("all-gather", "f32", (8,), 4, 5),
        Collective("all-to-all", "f32", (16,), 2, 1),
        Collective("all-reduce", "f32", (10,), 8, 1),
        Collective("all-reduce", "pred", (), 8, 1),
        Collective("reduce-scatter", "bf16", (4,), 4, 1),
        Collective("collective-permute", "f32", (3,), 2, 1),
    ]
    assert tiny.collective_kinds(TEXT) == {
        "all-gather",
        "all-to-all",
        "all-reduce",
        "reduce-scatter",
        "collective-permute",
    }
    assert tiny.collective_shapes(TEXT, "all-gather") == [("bf16", (8, 32)), ("f32", (8,))]
    assert run_counts(TEXT) == {"add": 2, "body": 5, "wrapped": 1, "main": 1}


def test_received_bytes_are_those_of_ring_algorithms():
    by_hand = [5 * 512 * 3 // 4, 5 * 32 * 3 // 4, 64 // 2, 2 * 40 * 7 // 8, 2 * 7 // 8, 3 * 8, 12]
    assert [collective.received_bytes for collective in collectives(TEXT)] == by_hand
    assert received_bytes(TEXT) == sum(by_hand)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}, dimensions={0}", 3),
        ("[4,2]<=[8], dimensions={0}", 2),
        ("{}, dimensions={0}", 8),
        ("mesh['axis_0'=8,'axis_1'=1], device_ids=([4,2]T(1,0)) {'axis_0'}, dimensions={0}", 8),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}", 4),
    ],
)
def test_every_replica_group_notation_is_parsed(groups, size):
    text = TEXT.replace("{{0,1,2,3},{4,5,6,7}}, dimensions={0}", groups)
    assert [each.group for each in collectives(text) if each.kind == "reduce-scatter"] == [size]


def test_a_missing_text_and_an_unknown_replica_group_notation_raise():
    with pytest.raises(ValueError, match="without its text"):
        received_bytes("")
    with pytest.raises(ValueError, match="not understood: %rs = .*replica_groups=strange"):
        received_bytes(TEXT.replace("{{0,1,2,3},{4,5,6,7}}", "strange"))


def test_a_gather_in_a_loop_of_five_iterations_moves_five_times_the_bytes():
    mesh = tiny.mesh_of("fsdp4-tensor2")
    train, serve = (NamedSharding(mesh, PartitionSpec(None, axes)) for axes in (("tensor", "fsdp"), ("tensor",)))
    x = jax.device_put(np.ones((8, 64), np.float32), train)

    def turn(x, _):
        gathered = jax.lax.with_sharding_constraint(1.5 * x, serve)
        return jax.lax.with_sharding_constraint(gathered**2, train), None

    text = jax.jit(lambda x: jax.lax.scan(turn, x, None, length=5)[0]).lower(x).compile().as_text()
    # A device has one quarter of its half of the array and receives three.
    assert received_bytes(text) == 5 * (8 * 64 * 4) // 2 * 3 // 4


def test_an_all_reduce_over_eight_devices_moves_seven_quarters_of_its_result():
    mesh = tiny.mesh_of("fsdp4-tensor2")
    x = Layout(mesh, TRAIN).put(np.ones((16, 32), np.float32), "batch", None)
    text = jax.jit(lambda x: Layout(mesh, GENERATE).constrain(jnp.sum(x, axis=0), None)).lower(x).compile().as_text()
    assert tiny.collective_kinds(text) == {"all-reduce"} and received_bytes(text) == 32 * 4 * 7 // 4
