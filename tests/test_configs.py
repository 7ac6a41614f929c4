"""Every shipped configuration: its header, that its sizes divide, that it fits its hardware, and how one is chosen."""

import dataclasses
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # which asks the plugin for the version of cuDNN

from rlhf_jax.config import load_config
from rlhf_jax.hardware import COMPILE_OPTIONS, GPUS, compile_only_devices, parse_machine
from rlhf_jax.mesh import TRAIN, Layout, MeshConfig, make_mesh, single_device_mesh
from rlhf_jax.models import attention
from rlhf_jax.plan import USABLE_SHARE, abstract, hardware_of_config, lower_bound_bytes, make_plan
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.auto import choose_switches
from rlhf_jax.plan.phases import SlotsProgram, decoder_configs, phases
from rlhf_jax.recipe import Recipe
from rlhf_jax.train_step import OffloadedUpdate

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "configs").glob("*.toml"))
PLANNED = [path for path in ALL if hardware_of_config(path)]
DEPLOYMENTS = {"single_gpu": (1, 1), "single_node": (1, 8), "multi_node": (8, 8)}


def script(path: str):
    """The script as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Removes access to models, as on a machine without them and without a network."""

    def nothing(name):
        raise ValueError(f"{name}: no network here")

    monkeypatch.setattr(abstract, "config_json", nothing)
    abstract._hub_config.cache_clear()
    yield
    abstract._hub_config.cache_clear()


def test_every_model_size_and_machine_has_a_configuration():
    assert len(PLANNED) == 27 and {path.stem for path in ALL} - {path.stem for path in PLANNED} == {
        "demo",
        "alpaca_pairs",
        "gsm8k",
        "real_data",
    }


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_header_starts_with_its_purpose_and_the_training_command(path):
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ") and second.startswith(f"#   rlhf-jax train configs/{path.name}")


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_the_hardware_of_a_header_matches_the_file_name_and_is_followed_by_a_plan(path):
    lines = path.read_text().splitlines()
    assert all(len(line) <= 150 for line in lines), "the plan is the longest line"
    where = parse_machine(hardware_of_config(path))
    deployment = path.stem.rsplit("-", 1)[1]
    assert (where.nodes, where.per_node) == DEPLOYMENTS[deployment]
    assert lines[2].startswith("# Hardware: ") and lines[3].startswith("# Plan: ")
    recipe = load_config(path, [], Recipe)
    assert path.stem.startswith(recipe.model.actor.split("/")[-1])


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_configuration_divides_among_its_devices_at_four_sequences_each_and_holds_less_than_its_card(path):
    recipe, where = load_config(path, [], Recipe), parse_machine(hardware_of_config(path))
    mesh = abstract_mesh(recipe.mesh, where.count)
    shards = Layout(mesh, TRAIN).shards("batch")
    for config in (recipe.sft, recipe.reward, recipe.ppo):
        assert config.micro_batch_size >= 4 * shards
    assert recipe.data.max_prompt_length == 256 and recipe.ppo.sample.max_new_tokens == 256
    usable = int(USABLE_SHARE * where.gpu.memory)
    needed, phase = lower_bound_bytes(
        choose_switches(recipe, mesh, where, recipe.run.stages, usable)[0], mesh, recipe.run.stages
    )
    assert needed < usable, phase


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_actor_and_reward_model_share_a_vocabulary(path):
    recipe = load_config(path, [], Recipe)
    families = ("facebook/opt", "Llama-2|TinyLlama", "Llama-3", "Qwen2.5")
    if recipe.model.reward != "sft":
        assert any(re.search(each, recipe.model.actor) and re.search(each, recipe.model.reward) for each in families)


@pytest.mark.cuda
@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_configuration_compiled_for_its_hardware_fits_in_95_percent_of_the_card(path):
    plan = make_plan(load_config(path, [], Recipe), hardware_of_config(path), search=False)
    assert plan["compiled_for"] == parse_machine(hardware_of_config(path)).gpu.name
    assert plan["fits"], {(row["stage"], row["phase"]): row["headroom"] for row in plan["phases"]}


def gpus_of(path):
    """What the choice of a kernel asks of a mesh, of the GPUs in a header."""
    device = SimpleNamespace(platform="gpu", compute_capability=parse_machine(hardware_of_config(path)).gpu.capability)
    return SimpleNamespace(devices=np.array([device]))


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_configuration_chooses_cudnns_attention_for_its_actor_and_its_reward_model(path):
    recipe = load_config(path, [], Recipe)
    packed = any(recipe.row_spec(stage).pack_length for stage in recipe.run.stages)
    for decoder in decoder_configs(recipe, 1):
        how = gpus_of(path), decoder, recipe.model.compute.dtype, recipe.data.max_length, recipe.model.attention
        assert attention.kernel_for_mesh(*how, packed=packed) == ("cudnn", "bfloat16, causal")


class ForCuda(NamedTuple):
    """A jitted function whose `lower` is for NVIDIA GPUs, on any machine."""

    program: Any

    def lower(self, *args, **options):
        return self.program.trace(*args, **options).lower(lowering_platforms=("cuda",))


def for_cuda(program):
    """A program of the plan, lowered for NVIDIA GPUs."""
    if isinstance(program, SlotsProgram):
        return SlotsProgram(ForCuda(program.program))
    if isinstance(program, OffloadedUpdate):
        return dataclasses.replace(program, gradients=ForCuda(program.gradients))
    return ForCuda(program)


@pytest.fixture
def on_gpus(monkeypatch):
    """A function that makes kernels be chosen as on the GPUs in a header, by a JAX with cuDNN 9.10."""
    obstacle = attention.device_obstacle

    def choose(path):
        monkeypatch.setattr(attention, "device_obstacle", lambda mesh, dtype: obstacle(gpus_of(path), dtype))
        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)

    return choose


@pytest.fixture
def one_layer(monkeypatch):
    """Makes every model one of a single layer: each runs the same kernel."""
    shallow = {name: {**config, "num_hidden_layers": 1} for name, config in abstract.known_models().items()}
    monkeypatch.setattr(abstract, "known_models", lambda: shallow)


def attending(recipe, mesh, stage):
    """The programs of a stage in which models read whole rows."""
    return [phase for phase in phases(recipe, mesh, (stage,)) if phase.passes and phase.name != "publish"]


def check_fused_calls(phase, text):
    """Each model, of one layer, has one forward call, or two with rematerialisation, and if it trains one backward."""
    calls = Counter(re.findall(r"__cudnn\$fmha(\w+)", text))
    assert calls["SoftmaxBackward"] == phase.is_update, (phase.stage, phase.name)
    assert len(phase.passes) <= calls["Softmax"] <= len(phase.passes) * (1 + phase.is_update), (phase.stage, phase.name)


STAGES = ("sft", "reward", "ppo")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_every_program_of_a_configuration_has_cudnns_attention_forward_and_backward(path, stage, one_layer, on_gpus):
    """On one device: over several, its calls are in the text only after XLA has split them."""
    on_gpus(path)
    recipe = dataclasses.replace(load_config(path, [], Recipe), mesh=MeshConfig())
    assert recipe.run.stages == STAGES
    found = attending(recipe, single_device_mesh(), stage)
    wanted = ["generate", "score", "actor", "critic"] if stage == "ppo" else ["update", "evaluate"]
    assert [phase.name for phase in found] == wanted
    for phase in found:
        check_fused_calls(phase, for_cuda(phase.program).lower(*phase.args).as_text())


def test_packed_rows_are_read_without_cudnns_attention_and_the_reason_says_so(one_layer, on_gpus):
    path = ROOT / "configs" / "opt-1.3b-single_gpu.toml"
    on_gpus(path)
    recipe = dataclasses.replace(load_config(path, ["sft.pack_length=512"], Recipe), mesh=MeshConfig())
    phase = attending(recipe, single_device_mesh(), "sft")[-1]
    assert "fmha" not in for_cuda(phase.program).lower(*phase.args).as_text()
    how = single_device_mesh(), phase.passes[0].decoder, recipe.model.compute.dtype, 512, recipe.model.attention
    assert "rows are packed" in attention.kernel_for_mesh(*how, packed=True).reason


@pytest.mark.cuda
@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_programs_compiled_for_the_devices_of_a_configuration_have_cudnns_attention(path, one_layer):
    recipe = load_config(path, [], Recipe)
    mesh = make_mesh(recipe.mesh, compile_only_devices(hardware_of_config(path)))
    for phase in attending(recipe, mesh, "ppo"):
        text = phase.program.lower(*phase.args).compile(COMPILE_OPTIONS).as_text()
        check_fused_calls(phase, text)


@pytest.mark.parametrize(
    ("name", "deployment", "card", "stem"),
    [
        ("opt-13b", "single_gpu", "A100-40GB", "opt-13b-single_gpu"),
        ("opt-13b", "single_gpu", "A6000-48GB", "opt-13b-a6000-single_gpu"),
        ("opt-30b", "single_gpu", "A6000-48GB", "opt-30b-nf4-single_gpu"),
        ("opt-30b", "single_gpu", "A100-80GB", "opt-30b-single_gpu"),
        ("opt-30b", "single_gpu", "A100-40GB", "opt-30b-single_gpu"),  # which says that it does not fit
        ("opt-30b", "single_gpu", None, "opt-30b-single_gpu"),
        ("Llama-2-7b-hf", "single_node", "H200", "Llama-2-7b-hf-single_node"),
        ("opt-1.3b", "multi_node", "A100-80GB", None),
        ("opt-1", "single_gpu", "A100-80GB", None),
    ],
)
def test_the_single_script_takes_the_recipe_of_the_largest_card_that_is_no_larger_than_the_attached_one(
    name, deployment, card, stem
):
    found = script("scripts/train.py").choose(name, deployment, GPUS[card].memory if card else 0)
    assert (found and found.stem) == stem


def test_the_single_script_starts_the_recipe_with_its_arguments_and_rejects_other_reward_models(monkeypatch, capsys):
    train, started = script("scripts/train.py"), []
    monkeypatch.setattr(train, "rlhf_jax", lambda argv: started.append(argv) or 0)
    monkeypatch.setattr(train, "memory_here", lambda: 0)
    assert train.main(["--actor-model", "facebook/opt-13b", "--output-dir", "runs/x"]) == 0
    assert train.main(["--step", "2", "1", "--reward-model", "mine"]) == 0
    config = [str(ROOT / "configs" / f"{name}-single_gpu.toml") for name in ("opt-13b", "opt-1.3b")]
    late = ["model.actor=facebook/opt-1.3b", "model.reward=mine"]
    assert started == [
        ["train", config[0], "model.actor=facebook/opt-13b", "run.dir=runs/x"],
        ["sft", config[1], *late],
        ["reward", config[1], *late],
    ]
    assert "made for 1xA100-40GB" in capsys.readouterr().out
    assert train.main(["--actor-model", "facebook/opt-125m"]) == 2
    assert "opt-30b-nf4-single_gpu" in capsys.readouterr().err


def test_a_header_is_rewritten_only_from_the_numbers_of_the_plan(tmp_path, monkeypatch, capsys):
    fit = script("benchmarks/fit.py")
    path = tmp_path / "opt-1.3b-single_gpu.toml"
    path.write_text((ROOT / "configs" / path.name).read_text())
    rows = [{"stage": "sft", "phase": "update", "peak": 3 * 2**30, "headroom": 2**30}]
    rows += [{"stage": "ppo", "phase": name, "peak": 2 * 2**30, "headroom": 2 * 2**30} for name in fit.PHASES]
    seconds = {"ppo": {"floor": 1.5, "expected": 4.25}}
    plan = {"phases": rows, "usable": 4 * 2**30, "seconds": seconds, "compiled_for": "A100-80GB"}
    monkeypatch.setattr(fit, "CONFIGS", tmp_path)
    monkeypatch.setattr(fit, "plan_of", lambda path: plan)
    monkeypatch.setattr(sys, "argv", ["fit.py", "--check"])
    assert fit.main() == 1
    monkeypatch.setattr(sys, "argv", ["fit.py", "--headers"])
    assert fit.main() == 0
    line = (
        "# Plan: peak 3.0 GiB per GPU (sft update), headroom 1.0 of 4.0; a PPO iteration 1.5 s at least, 4.25 "
        "expected; compiled for A100-80GB, not run"
    )
    assert path.read_text().splitlines()[3] == line and load_config(path, [], Recipe)
    monkeypatch.setattr(sys, "argv", ["fit.py", "--check"])
    assert fit.main() == 0


def test_multi_node_outside_a_launcher_prints_the_commands_that_start_it(capsys):
    argv = ["--actor-model", "facebook/opt-13b", "--deployment-type", "multi_node", "--output-dir", "runs/my run"]
    assert script("scripts/train.py").main(argv) == 2
    printed = capsys.readouterr().err
    command = f"{ROOT}/configs/opt-13b-multi_node.toml model.actor=facebook/opt-13b 'run.dir=runs/my run'"
    assert f"sbatch --nodes=8 scripts/slurm_train.sbatch {command}" in printed
    assert f"RLHF_JAX_PROCESSES=8 RLHF_JAX_PROCESS_ID=I .venv/bin/rlhf-jax train {command}" in printed
