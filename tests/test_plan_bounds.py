"""Plans without the CUDA plugin: bounds of the peaks, the three verdicts, and their exit codes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_plan import recipe_of

import rlhf_jax.plan
from rlhf_jax.cli import main
from rlhf_jax.config import load_config
from rlhf_jax.hardware import parse_machine
from rlhf_jax.mesh import MeshConfig, make_mesh
from rlhf_jax.plan import make_plan, token_limits
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.compile import micro_batch_sizes, with_micro_batch
from rlhf_jax.plan.phases import phases
from rlhf_jax.plan.roofline import token_rates
from rlhf_jax.plan.temporaries import ESTIMATE_ERROR, find_bounds, largest_micro_batches, temporary_bytes
from rlhf_jax.recipe import Recipe

ROOT = Path(__file__).parents[1]
COMPILED = [run["result"] for run in json.loads((ROOT / "benchmarks/results/estimates.json").read_text())]
PUBLISHED = json.loads((ROOT / "benchmarks/results/plan.json").read_text())
OPT = ROOT / "configs" / "opt-30b-single_gpu.toml"


@pytest.fixture(autouse=True)
def no_plugin(monkeypatch):
    monkeypatch.setattr(rlhf_jax.plan, "compile_obstacle", lambda gpu: "no plugin")


def ids_of(compiled):
    return " ".join([compiled["config"], compiled["overrides"]]).strip()


@pytest.mark.parametrize("compiled", COMPILED, ids=ids_of)
def test_recorded_peaks_of_compiled_programs_are_within_the_bounds_and_what_fits_is_said_to_fit(compiled):
    recipe = load_config(ROOT / "configs" / f"{compiled['config']}.toml", compiled["overrides"].split(), Recipe)
    machine = parse_machine(compiled["gpus"])
    mesh, usable = abstract_mesh(recipe.mesh, machine.count), int(0.95 * machine.gpu.memory)
    found = phases(recipe, mesh)
    assert [f"{phase.stage}/{phase.name}" for phase in found] == list(compiled["phases"])
    for phase, recorded in zip(found, compiled["phases"].values(), strict=True):
        bounds = find_bounds(recipe, phase, mesh)
        assert recorded["least"] == bounds.least
        assert 0 <= recorded["compiled"] <= bounds.most - bounds.least, (phase.stage, phase.name)
        assert bounds.most <= usable or bounds.least + recorded["compiled"] > usable or compiled["overrides"]


def test_the_published_bounds_of_every_configuration_contain_its_compiled_peak_and_what_fits_is_said_to_fit():
    published = {run["result"]["config"]: run["result"] for run in PUBLISHED}
    for path in sorted((ROOT / "configs").glob("*.toml")):
        if found := re.search(r"^# Plan: peak ([\d.]+) GiB", path.read_text(), re.MULTILINE):
            least, most = published[path.stem]["bounds"]
            assert least / 2**30 - 0.05 <= float(found[1]) <= most / 2**30 + 0.05, path.stem
            assert (published[path.stem]["verdict"], published[path.stem]["exit_code"]) == ("fits", 0)
    assert len(published) == 27 and max(each["seconds"] for each in published.values()) < 20


def test_a_plan_refuses_a_tensor_axis_across_nodes_as_a_run_does():
    recipe = load_config(ROOT / "configs/opt-1.3b-single_node.toml", ["mesh.tensor=16", "sft.batch_size=256"], Recipe)
    with pytest.raises(
        ValueError, match=r"mesh.tensor=16 .* machines of 8 devices.*\[1, 2, 4, 8\].*tensor_across_nodes"
    ):
        make_plan(recipe, "2x8xA100-80GB")


@pytest.mark.parametrize(
    ("override", "gpus", "fits"),
    [
        ("model.offload_optimizer=auto", "A100-80GB", True),
        ("ppo.micro_batch_size=32", "A100-80GB", None),
        ("ppo.batch_size=0", "A100-40GB", False),
    ],
)
def test_fits_does_not_fit_and_cannot_tell_have_an_exit_code_each(override, gpus, fits, capsys, monkeypatch):
    if fits is False:  # the suggestions have tests of their own, and try a dozen plans
        monkeypatch.setattr(rlhf_jax.plan, "suggestions", lambda *args: ["a smaller model"])
    code = main(["plan", str(OPT), override, "--gpus", gpus, "--json"])
    assert code == {True: 0, False: 1, None: 3}[fits]
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is fits and plan["compiled_for"] is None
    least, most = (max(row[key] for row in plan["phases"]) for key in ("least", "peak"))
    if fits is None:
        between = f"between {least / 2**30:.1f} and {most / 2**30:.1f} GiB"
        assert plan["verdict"] == f"cannot tell without the plugin: {between}"
        assert least <= plan["usable"] < most and plan["suggestions"][0].startswith("set ppo.micro_batch_size=")
    else:
        assert plan["verdict"] == ("fits" if fits else "does not fit")
        assert most <= plan["usable"] if fits else least > plan["usable"]


def test_nothing_is_compiled_without_the_plugin(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("compiled")

    monkeypatch.setattr(rlhf_jax.plan, "measure_in_subprocess", fail)
    assert make_plan(recipe_of(tmp_path), "A100-80GB")["fits"]


def test_the_largest_micro_batch_is_the_last_whose_own_plan_has_an_upper_bound_that_fits(tmp_path):
    recipe = recipe_of(tmp_path)
    mesh, (asked, legal) = abstract_mesh(recipe.mesh, 1), micro_batch_sizes(recipe, "ppo", 1)
    most, found = {}, phases(recipe, mesh, ("ppo",))
    for size in legal:
        changed = with_micro_batch(recipe, "ppo", size)
        updates = [phase for phase in phases(changed, mesh, ("ppo",)) if phase.is_update]
        most[size] = max(find_bounds(changed, phase, mesh).most for phase in updates)
    for usable in (0, *most.values()):
        largest = max((size for size in legal if most[size] <= usable), default=0)
        wanted = {"asked": asked, "largest": largest, "compilations": 0}
        assert largest_micro_batches(recipe, found, mesh, usable) == {"ppo": wanted}


def test_the_upper_bound_adds_the_stated_error_to_the_temporaries(tmp_path):
    recipe = recipe_of(tmp_path)
    mesh = abstract_mesh(recipe.mesh, 1)
    for phase in phases(recipe, mesh):
        least, most = find_bounds(recipe, phase, mesh)
        assert least == sum(phase.live.values()) + phase.added
        assert most - least == int((1 + ESTIMATE_ERROR) * temporary_bytes(recipe, phase, mesh)) + 2**26
        assert temporary_bytes(recipe, phase._replace(micro=2), mesh) >= temporary_bytes(recipe, phase, mesh)


def test_the_most_tokens_per_second_are_those_of_full_rows_at_the_floor(tmp_path):
    recipe, machine = recipe_of(tmp_path), parse_machine("A100-80GB")
    mesh = abstract_mesh(recipe.mesh, 1)
    rates = token_rates(recipe, phases(recipe, mesh), mesh, machine)
    floors = {stage: entry["floor"] for stage, entry in make_plan(recipe, "A100-80GB")["seconds"].items()}
    data, ppo = recipe.data, recipe.ppo
    tokens = {
        "sft": recipe.sft.batch_size * data.max_length,
        "reward": 2 * recipe.reward.batch_size * data.max_length,
        "ppo": ppo.rollout_batch_size * (data.max_prompt_length + ppo.sample.max_new_tokens),
    }
    assert rates == pytest.approx({stage: tokens[stage] / floor for stage, floor in floors.items()})
    assert rates.keys() == tokens.keys()
    ranked = replace(recipe, reward=replace(recipe.reward, answers=4))
    most = token_rates(ranked, phases(ranked, mesh), mesh, machine)["reward"]
    assert most == pytest.approx(rates["reward"], rel=0.2)  # twice the tokens, and twice the work


def test_a_machine_that_is_not_in_the_table_has_no_limit_of_tokens_per_second(tmp_path):
    assert token_limits(recipe_of(tmp_path), make_mesh(MeshConfig())) == {}
