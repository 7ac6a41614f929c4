"""Resolution of "auto": the first combination that fits, in order of expected seconds, and the reasons given."""

import dataclasses
import itertools

import pytest
import tiny
import tiny_recipe
from test_plan import LORA, D, F, H, L, P, V, recipe_of

from rlhf_jax.hardware import parse_machine
from rlhf_jax.plan import check_fits
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.auto import (
    FALLBACKS,
    SWITCHES,
    auto_switches,
    candidates,
    choose_switches,
    get_value,
    largest_bounds,
    resolve_auto,
    with_values,
)
from rlhf_jax.plan.phases import phases
from rlhf_jax.plan.roofline import iteration_seconds, work_of_phases

A100 = parse_machine("A100-80GB")


def with_auto(recipe, *keys):
    return with_values(recipe, dict.fromkeys(keys or SWITCHES, "auto"))


def test_devices_that_do_not_report_their_memory_get_the_fallbacks_without_offloading(tmp_path):
    recipe = with_auto(recipe_of(tmp_path))
    chosen, reported = resolve_auto(recipe, tiny.mesh_of("one"), None, ("ppo",))
    assert {key: get_value(chosen, key) for key in SWITCHES} == FALLBACKS
    assert (FALLBACKS["model.remat"], FALLBACKS["mesh.zero"]) == ("layers", 3)
    assert not any(value for key, value in FALLBACKS.items() if "offload" in key or "copy" in key)
    assert len(reported) == 6 and all("do not report their memory" in text for text in reported)


def test_settings_other_than_auto_are_kept(tmp_path):
    recipe = recipe_of(tmp_path)
    assert resolve_auto(recipe, tiny.mesh_of("one"), 10**9, ("ppo",)) == (recipe, [])
    mixed = with_auto(recipe, "model.remat")
    chosen, reported = choose_switches(mixed, abstract_mesh(mixed.mesh, 1), A100, ("ppo",), 10**12)
    assert chosen == with_values(recipe, {"model.remat": "none"}) and len(reported) == 1


def test_with_enough_memory_nothing_is_recomputed_offloaded_or_sharded_more_than_necessary(tmp_path):
    recipe = with_auto(recipe_of(tmp_path, "lora-float32"))
    chosen, reported = choose_switches(recipe, abstract_mesh(recipe.mesh, 1), A100, ("ppo",), 10**12)
    plain = {"model.remat": "none", "mesh.zero": 3} | dict.fromkeys(list(SWITCHES)[3:], False)
    assert {key: get_value(chosen, key) for key in plain} == plain
    by_name = dict(text.split(" = ", 1) for text in reported)
    assert "the fastest" in by_name["remat"]
    for idle in ("zero", "offload_ema", "offload_reference"):  # one device, no average, a reference that is the base
        assert "would change nothing" in by_name[idle]


@pytest.mark.parametrize("setting", ["whole", "lora-float32"])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.7, 0.5])
def test_the_choice_is_the_fastest_combination_that_fits(setting, share, tmp_path):
    recipe = with_auto(recipe_of(tmp_path, setting))
    mesh = abstract_mesh(recipe.mesh, 1)
    ordered = candidates(recipe, mesh, A100, ("ppo",))
    need = {each: 1000 + int(9000 * (i + 1) / len(ordered)) for i, each in enumerate(reversed(ordered))}
    asked = []

    def measure(candidate):
        asked.append(candidate)
        return need[candidate] * 10**6

    chosen, reported = choose_switches(recipe, mesh, A100, ("ppo",), int(share * 10**10), measure)
    fitting = [each for each in ordered if need[each] * 10**6 <= share * 10**10]
    assert chosen == fitting[0] and auto_switches(chosen) == []
    assert asked == ordered[: ordered.index(chosen) + 1], "only faster combinations are compiled"
    assert len(reported) == len(SWITCHES)


def test_combinations_are_ordered_by_the_expected_seconds_of_an_iteration(tmp_path):
    recipe = with_auto(recipe_of(tmp_path, "whole", "fsdp4-tensor2"))
    mesh, where = abstract_mesh(recipe.mesh, 8), parse_machine("8xA100-80GB")
    ordered = candidates(recipe, mesh, where, ("ppo",))
    assert len(ordered) == len(set(ordered)) == 3 * 3 * 1 * 1 * 2 * 2
    found = phases(with_values(recipe, FALLBACKS), mesh, ("ppo",))
    seconds = [iteration_seconds(each, found, mesh, where) for each in ordered]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]


def test_a_combination_whose_arrays_alone_do_not_fit_is_never_compiled(tmp_path):
    recipe = with_auto(recipe_of(tmp_path), "model.remat")
    mesh = abstract_mesh(recipe.mesh, 1)
    usable = largest_bounds(with_values(recipe, FALLBACKS), mesh, ("ppo",)).least - 1

    def fail(candidate):
        raise AssertionError("compiled for nothing")

    chosen, reported = choose_switches(recipe, mesh, A100, ("ppo",), usable, fail)
    assert auto_switches(chosen) == [] and "nothing surely fits" in reported[0]
    with pytest.raises(ValueError, match="holds at least"):
        check_fits(chosen, mesh, usable, ("ppo",))


def test_the_reason_gives_the_memory_that_the_other_value_needs(tmp_path):
    recipe = with_auto(recipe_of(tmp_path), "model.remat")

    def need(candidate):
        return {"none": 81 * 2**30, "dots": 77 * 2**30, "layers": 60 * 2**30}[candidate.model.remat]

    chosen, reported = choose_switches(recipe, abstract_mesh(recipe.mesh, 1), A100, ("ppo",), 75 * 2**30, need)
    assert chosen.model.remat == "layers"
    assert reported == ["remat = layers: remat = dots needs 77.0 GiB of 75.0"]


def test_combinations_that_the_program_rejects_are_skipped(tmp_path):
    recipe = with_auto(recipe_of(tmp_path), "model.remat")

    def need(candidate):
        if candidate.model.remat != "layers":
            raise ValueError("these two exclude each other")
        return 1

    chosen, _ = choose_switches(recipe, abstract_mesh(recipe.mesh, 1), A100, ("ppo",), 10**9, need)
    assert chosen.model.remat == "layers"


def test_an_automatic_run_keeps_auto_in_its_folder_and_logs_the_choice(tmp_path, capsys):
    path = tiny_recipe.write_recipe(tmp_path)
    overrides = ["model.remat=auto", "mesh.zero=auto", "sft.steps=1", "sft.eval_batches=0"]
    for _ in range(2):  # the second run finds its own configuration and has nothing to do
        assert tiny_recipe.run("sft", path, f"run.dir={tmp_path / 'run'}", *overrides) == 0
        assert "auto: remat = layers" in capsys.readouterr().err
    kept = (tmp_path / "run" / "config.toml").read_text()
    assert 'remat = "auto"' in kept and 'zero = "auto"' in kept


# Cost of each setting. The N trained weights are those of the actor, in float32.
def needs_with(recipe, values, mesh_name="fsdp4-tensor2"):
    mesh = abstract_mesh(recipe.mesh, tiny.mesh_of(mesh_name).size)
    found = phases(with_values(recipe, FALLBACKS), mesh, ("ppo",))
    return work_of_phases(with_values(recipe, FALLBACKS | values), found, mesh)


def test_offloaded_moments_are_moved_to_the_gpu_and_back_once_per_update(tmp_path):
    recipe = recipe_of(tmp_path, "whole", "fsdp4-tensor2", batch_size=8)
    weights = V * D + (P + 2) * D + L * (4 * (D * D + D) + 2 * D * F + F + D + 4 * D) + 2 * D
    host = needs_with(recipe, {"model.offload_optimizer": True})["ppo/actor"].host
    assert host == 2 * (2 * 2 * 4 * weights / 8)  # two updates; two moments, both directions, an eighth of each
    assert needs_with(recipe, {})["ppo/actor"].host == 0
    assert needs_with(recipe, {"model.offload_reference": True})["ppo/score"].host == 4 * weights / 8


def test_a_lower_zero_stage_moves_no_more_bytes_and_fewer_with_micro_batches(tmp_path):
    recipe = recipe_of(tmp_path, "whole", "fsdp4-tensor2", micro_batch_size=8)
    link = {zero: needs_with(recipe, {"mesh.zero": zero})["ppo/actor"].link for zero in (1, 2, 3)}
    assert link[2] < link[1] and link[2] < link[3]
    assert needs_with(recipe, {"mesh.zero": 2})["ppo/publish"].link == 0
    # Weights sharded over tensor are gathered at every stage.
    score = [needs_with(recipe, {"mesh.zero": zero})["ppo/score"].link for zero in (2, 3)]
    assert score[0] / score[1] == pytest.approx((1 - 1 / 2) / (1 - 1 / 8))


def test_recomputing_layers_costs_a_forward_pass_and_recomputing_attention_its_share_of_one(tmp_path):
    recipe = recipe_of(tmp_path)
    flops = {
        kind: needs_with(recipe, {"model.remat": kind}, "one")["ppo/actor"].flops for kind in ("none", "dots", "layers")
    }
    attention = 4 * 16 * 40 * 40 * D * L
    assert flops["dots"] - flops["none"] == attention
    assert flops["layers"] == pytest.approx(flops["none"] * 4 / 3)


def test_one_copy_reads_the_adapters_at_every_token_and_publishing_moves_nothing(tmp_path):
    recipe = recipe_of(tmp_path, "lora-float32", "fsdp4-tensor2")
    two, one = needs_with(recipe, {}), needs_with(recipe, {"model.one_copy": True})
    rank = LORA["rank"]
    adapters = L * rank * (4 * 2 * D + 2 * (D + F))
    assert one["ppo/generate"].memory - two["ppo/generate"].memory == pytest.approx(16 * adapters * 4 / 2)
    assert one["ppo/publish"].link == 0 < two["ppo/publish"].link


def test_every_setting_can_be_auto_and_each_of_its_values_is_valid_in_the_configuration(tmp_path):
    recipe = recipe_of(tmp_path, "lora-float32")
    for key, values in SWITCHES.items():
        for value in itertools.chain(values, ["auto"]):
            assert get_value(with_values(recipe, {key: value}), key) == value
    assert auto_switches(with_auto(recipe)) == list(SWITCHES) and dataclasses.is_dataclass(recipe) and H == 4
