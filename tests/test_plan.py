"""The plan against the arrays of real engines and against hand arithmetic, and its messages for mistakes of a user."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_recipe

import rlhf_jax.plan
import rlhf_jax.plan.abstract
import rlhf_jax.train
from rlhf_jax.cli import main
from rlhf_jax.config import parse_config
from rlhf_jax.engine import (
    Algorithm,
    Architectures,
    EngineState,
    Execution,
    FrozenParams,
    Optimizers,
    Sampling,
    make_hybrid_engine,
)
from rlhf_jax.hardware import GPUS, compile_only_devices, cuda_plugin, parse_machine
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, make_mesh, to_devices
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.inference import shared_shardings
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.models.quantised import is_quantisable
from rlhf_jax.models.unstacked import Unstacked, is_shareable
from rlhf_jax.optim import make_optimizer
from rlhf_jax.plan import _notes, check_fits, compile, lower_bound_bytes
from rlhf_jax.plan.abstract import (
    abstract_mesh,
    abstract_pretrained,
    abstract_state,
    device_bytes,
    host_bytes,
    known_models,
)
from rlhf_jax.plan.compile import Memory, measure, measure_all, micro_batch_sizes, with_micro_batch
from rlhf_jax.plan.phase import Phase
from rlhf_jax.plan.phases import decoder_configs, engine_phases, phases
from rlhf_jax.plan.report import format_plan
from rlhf_jax.plan.roofline import forward_flops, weights_per_token, work_of_phases
from rlhf_jax.plan.temporaries import SMALL_BUFFERS, find_bounds
from rlhf_jax.recipe import Recipe
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.grpo_config import GRPOConfig
from rlhf_jax.stages.models import relayout
from rlhf_jax.stages.ppo import ppo_engine, ppo_models, ppo_optimizers

V, D, F, L, H, P = 384, 32, 64, 2, 4, 64  # no mesh here pads V
HF = {
    "model_type": "opt",
    "vocab_size": V,
    "hidden_size": D,
    "ffn_dim": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "max_position_embeddings": P,
    "word_embed_proj_dim": D,
}
# Embedding and positions; per layer four projections, two MLP matrices, their biases, two norms; the final norm.
WEIGHTS = V * D + (P + 2) * D + L * (4 * (D * D + D) + 2 * D * F + F + D + 4 * D) + 2 * D
LORA = {"rank": 4, "alpha": 8.0}
SETTINGS = {
    "whole": {},
    "whole-bfloat16": {"frozen_dtype": "bfloat16"},
    "lora": {"lora": LORA, "frozen_dtype": "bfloat16"},
    "both-lora": {"lora": LORA, "reward_lora": LORA, "frozen_dtype": "bfloat16"},
    "offload": {"offload_optimizer": True},
    "lora-float32": {"lora": LORA},
    "one-copy": {"lora": LORA, "one_copy": True},
    "lora-offload": {"lora": LORA, "frozen_dtype": "bfloat16", "offload_optimizer": True},
}
# Where the moving average of the actor's trained weights and the reference are kept.
AVERAGED = {
    "average": {},
    "average-offloaded": {"offload_ema": True},
    "all-offloaded": {"offload_ema": True, "offload_reference": True, "frozen_dtype": "bfloat16"},
    "lora-offloaded": {"lora": LORA, "offload_ema": True, "offload_reference": True},
}
SETTINGS |= AVERAGED


def recipe_of(folder, setting="whole", mesh="one", zero=3, **ppo) -> Recipe:
    """A recipe whose model is a folder that holds only a config.json."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(HF))
    config = {
        "run": {"dir": str(folder / "run")},
        "mesh": dataclasses.asdict(tiny.MESHES[mesh]) | {"zero": zero},
        "model": {"actor": str(folder / "model"), "dtype": "float32", "remat": "none"} | SETTINGS[setting],
        "data": {"sources": [{"path": "builtin:assistant"}], "max_prompt_length": 24, "max_length": 40},
        "sft": {"batch_size": 16},
        "reward": {"batch_size": 16},
        "ppo": {
            "rollout_batch_size": 16,
            "sample": {"max_new_tokens": 16},
            "ema_decay": 0.99 if setting in AVERAGED else 0.0,
        }
        | ppo,
    }
    return parse_config(Recipe, config, "the test")


def on_first_device(tree, memory="device") -> int:
    """Bytes in this memory of the first device; an array that several models share counts once."""
    leaves = list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())
    (device,) = {leaf.sharding.mesh.devices.flat[0] for leaf in leaves if hasattr(leaf.sharding, "mesh")}
    leaves = [leaf for leaf in leaves if leaf.sharding.memory_kind == memory]
    shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def share_params(decoder, params, layout):
    """Parameters with one copy for both training and generation."""
    result = dict(params)
    for path in filter(is_shareable, params):
        leaf = Unstacked(tuple(params[path])) if is_quantisable(path) else params[path]
        result[path] = jax.device_put(leaf, shared_shardings(decoder, path, leaf, layout))
    return result


HELD = [(setting, mesh_name, 3) for setting in SETTINGS for mesh_name in ("one", "fsdp4-tensor2")]
HELD += [(setting, "data2-fsdp2-tensor2", 3) for setting in ("whole", "both-lora", "one-copy")]
HELD += [("whole", "fsdp4-tensor2", 1), ("lora-offload", "fsdp4-tensor2", 1), ("one-copy", "fsdp4-tensor2", 0)]


@pytest.mark.parametrize(("setting", "mesh_name", "zero"), HELD)
def test_the_arrays_of_an_engine_have_the_planned_bytes_within_two_percent(setting, mesh_name, zero, tmp_path):
    recipe, mesh = recipe_of(tmp_path, setting, mesh_name, zero), tiny.mesh_of(mesh_name)
    model, layout = recipe.model, recipe.layout(mesh)
    loaded = []
    for decoder in decoder_configs(recipe, Layout(mesh, TRAIN).shards("vocab")):
        dtype = model.stored_dtype(scalar_head=decoder.scalar_head)
        params = {path: leaf.astype(dtype) for path, leaf in tiny.random_params(decoder, mesh).items()}
        if model.one_copy and not decoder.scalar_head:
            params = share_params(decoder, params, Layout(mesh, GENERATE))
        loaded.append(relayout(Pretrained(decoder, params, None, HF, {}, Layout(mesh, TRAIN)), layout))
    optimizers = ppo_optimizers(recipe.ppo, 1)
    state, frozen = ppo_models(*loaded, model, optimizers, 0, recipe.ppo)
    engine = ppo_engine(recipe.ppo, model, loaded[0].config, loaded[1].config, optimizers, (0,), layout)
    weights = engine.publish(state.actor.params(frozen.actor))

    planned = {phase.name: phase for phase in phases(recipe, abstract_mesh(recipe.mesh, mesh.size), ("ppo",))}
    np.testing.assert_allclose(sum(planned["publish"].live.values()), on_first_device((state, frozen)), rtol=0.02)
    assert {phase.host for phase in planned.values()} == {on_first_device((state, frozen), "pinned_host")}
    np.testing.assert_allclose(device_bytes(planned["generate"].args[0]), on_first_device(weights), rtol=0.02)
    both = sum(planned["publish"].live.values()) + planned["generate"].live["generation weights"]
    np.testing.assert_allclose(both, on_first_device((state, frozen, weights)), rtol=0.02)
    scoring = state, dataclasses.replace(frozen, reference=to_devices(frozen.reference))
    planned_to_score = sum(size for what, size in planned["score"].live.items() if what != "rollout")
    np.testing.assert_allclose(planned_to_score, on_first_device(scoring), rtol=0.02)
    assert ("average" in planned) == (setting in AVERAGED)
    if setting in AVERAGED:
        sizes = [on_first_device(to_devices(leaf)) for leaf in state.average.values()]
        largest = max(sizes) if model.offload_ema else sum(sizes)
        assert planned["average"].live["moving average"] == largest
        extra = sum(planned["critic"].live.values()) - planned["critic"].live["moving average"]
        assert sum(planned["average"].live.values()) == extra + largest


def test_arrays_in_host_memory_are_on_the_device_only_during_use_as_computed_by_hand(tmp_path):
    def plan_phases(setting):
        recipe = recipe_of(tmp_path, setting)
        return {phase.name: phase for phase in phases(recipe, abstract_mesh(recipe.mesh, 1), ("ppo",))}

    plain, away, adapted = (plan_phases(setting) for setting in ("average", "all-offloaded", "lora-offloaded"))
    assert {phase.live["moving average"] for phase in plain.values()} == {4 * WEIGHTS}
    assert {phase.host for phase in plain.values()} == {0}
    assert {name: phase.live["moving average"] for name, phase in away.items()} == {
        **dict.fromkeys(("publish", "generate", "score", "actor", "critic"), 0),
        "average": 4 * V * D,  # the embedding, the largest array
    }
    assert {name for name, phase in away.items() if phase.live["reference"]} == {"score"}
    assert away["score"].live["reference"] == 2 * WEIGHTS
    assert {phase.host for phase in away.values()} == {(4 + 2) * WEIGHTS}
    assert adapted["publish"].host == 4 * L * 4 * (4 * (D + D) + 2 * (D + F)), "adapters of rank 4 on six linears"
    assert {phase.live["reference"] for phase in adapted.values()} == {0}


@pytest.mark.parametrize("setting", ["whole", "both-lora", "offload"])
def test_compiled_argument_bytes_equal_the_arithmetic_and_the_donated_state_is_aliased(setting, tmp_path):
    recipe = recipe_of(tmp_path, setting, "fsdp4-tensor2")
    found = phases(recipe, tiny.mesh_of("fsdp4-tensor2"))
    names = [f"{phase.stage} {phase.name}" for phase in found]
    updates = ["sft update", "sft evaluate", "reward update", "reward evaluate"]
    wanted = [*updates, "ppo publish", "ppo generate", "ppo score", "ppo actor", "ppo critic"]
    assert [name for name in names if not name.endswith(" step")] == wanted
    stepped = [f"{name} step" for name in wanted if name.endswith(("update", "actor", "critic"))]
    assert [name for name in names if name.endswith(" step")] == (stepped if setting == "offload" else [])
    for phase in found:
        memory, given = measure(phase), device_bytes(phase.args)
        assert memory.peak(phase) >= phase.lower_bound, phase.name
        if phase.name.endswith(" step"):
            param, _, moments, _ = phase.args
            assert memory.arguments == given, "all of it is on the devices"
            np.testing.assert_allclose(memory.aliased, device_bytes((param, moments)), rtol=0.02)
        elif setting == "offload" and phase.name in ("update", "actor", "critic"):
            state, _, batch = phase.args
            assert memory.arguments <= device_bytes((state.trainable, batch)) + 64, "no moments"
            gradients = device_bytes(state.trainable)
            counters = 256 + device_bytes(state.skips) + 4 * 12  # a number and a pointer for each of four outputs
            assert memory.aliased == 0 and gradients <= memory.outputs <= gradients + counters
        elif phase.name in ("update", "actor", "critic"):
            state, _, batch = phase.args
            assert given - device_bytes(batch) <= memory.arguments <= given
            np.testing.assert_allclose(memory.aliased, device_bytes(state), rtol=0.02)
        elif phase.name == "generate":
            assert memory.arguments == given and memory.temporaries >= phase.cache
        else:  # arguments that a program does not use are not passed to it
            assert memory.arguments <= given


def test_the_plan_of_a_tiny_model_equals_hand_arithmetic(tmp_path):
    recipe = recipe_of(tmp_path)
    planned = {f"{phase.stage} {phase.name}": phase for phase in phases(recipe, abstract_mesh(recipe.mesh, 1))}
    scorer = WEIGHTS + D  # one row instead of the head, which is tied to the embedding
    live = planned["ppo publish"].live
    # Steps: the state's, two of the optimizer, skipped ones twice; and a byte for each of the actor's 20 parameters.
    counters = 5 * 4 + 20
    assert live == {
        "actor frozen": 0,
        "actor trainable": 4 * WEIGHTS,
        "actor optimizer": 8 * WEIGHTS + counters,
        "critic frozen": 0,
        "critic trainable": 4 * scorer,
        "critic optimizer": 8 * scorer + counters + 1,  # with a head of its own
        "reference": 4 * WEIGHTS,
        "reward model": 4 * scorer,
    }
    # 32 prompt positions would be a bucket, but the longest prompt has 24 tokens.
    assert planned["ppo generate"].cache == 2 * L * 16 * D * (24 + 16) * 4 + 16 * (24 + 16)
    # In addition to the training weights, generation has the embedding once more, as a head.
    assert planned["ppo generate"].live["generation weights"] == 4 * (WEIGHTS + V * D)
    tokens = 16 * 40
    assert planned["sft update"].live["batch"] == tokens * (4 + 1 + 1)
    assert planned["reward update"].live["batch"] == 2 * tokens * (4 + 1 + 1) + 16 * 2 * 4  # and two scores each


def test_the_plan_of_an_actor_alone_has_no_phase_and_no_byte_of_the_missing_models(tmp_path):
    recipe = recipe_of(tmp_path)
    layout, sample = recipe.layout(tiny.mesh_of("one")), recipe.ppo.sample
    decoder, tx = decoder_configs(recipe, 1)[0], make_optimizer(recipe.ppo.actor, 1)
    engine = make_hybrid_engine(
        Architectures(decoder),
        Algorithm(lambda scored: (scored.logprobs, scored.logprobs, None), lambda logprobs, *_: (logprobs.mean(), {})),
        Optimizers(tx),
        Sampling(sample, (0,)),
        Execution(layout, recipe.model.compute),
    )
    state, base = abstract_state(abstract_pretrained(decoder, recipe.model, layout), recipe.model, tx)
    found = engine_phases("ppo", engine, (EngineState(state), FrozenParams(base)), recipe, layout)
    assert [phase.name for phase in found] == ["publish", "generate", "score", "actor"]
    held = {"actor frozen": 0, "actor trainable": 4 * WEIGHTS, "actor optimizer": 8 * WEIGHTS + 5 * 4 + 20}
    assert found[0].live == held | {"reference": 0, "reward model": 0}
    assert all(phase.program.lower(*phase.args) for phase in found)


def test_where_rollouts_give_the_logprobs_scoring_is_planned_without_a_pass_of_the_actor(tmp_path):
    def score_of(recipe, stage):
        return next(phase for phase in phases(recipe, mesh, (stage,)) if phase.name == "score")

    recipe, less = recipe_of(tmp_path), recipe_of(tmp_path, old_logprobs="rollout")
    mesh = abstract_mesh(recipe.mesh, 1)
    whole, saved = score_of(recipe, "ppo"), score_of(less, "ppo")
    flops = [work_of_phases(recipe, [each], mesh)["ppo/score"].flops for each in (whole, saved)]
    actor = next(each for each in whole.passes if not each.decoder.scalar_head)
    assert flops[0] - flops[1] == forward_flops(actor.decoder, actor.rows, actor.length, actor.head_tokens)
    # Without a reward model and a KL no model scores.
    alone = GRPOConfig(rewards=("a.py:b",), sample=SampleConfig(16, num_samples=2), old_logprobs="rollout")
    alone = score_of(dataclasses.replace(recipe, grpo=alone), "grpo")
    bounds = find_bounds(recipe, alone, mesh)
    assert alone.passes == () and bounds.most - bounds.least == SMALL_BUFFERS


def test_four_answers_per_prompt_are_planned_as_four_times_the_rows(tmp_path):
    recipe = recipe_of(tmp_path, micro_batch_size=32, sample={"max_new_tokens": 16, "num_samples": 4})
    planned = {phase.name: phase for phase in phases(recipe, abstract_mesh(recipe.mesh, 1), ("ppo",))}
    _, prompts, mask, _ = planned["generate"].args
    assert prompts.shape == mask.shape == (64, 24)
    assert planned["generate"].live["prompts"] == 64 * 24 * (4 + 1)
    assert planned["generate"].cache == 2 * L * 64 * D * (24 + 16) * 4 + 64 * (24 + 16)
    assert micro_batch_sizes(recipe, "ppo", 8) == (32, [8, 16, 32, 64])
    assert micro_batch_sizes(with_micro_batch(recipe, "ppo", 0), "ppo", 8) == (64, [8, 16, 32, 64])


def test_offloaded_moments_are_in_host_memory_and_a_step_has_those_of_one_parameter_as_computed_by_hand(tmp_path):
    recipe = recipe_of(tmp_path, "offload")
    planned = {f"{phase.stage} {phase.name}": phase for phase in phases(recipe, abstract_mesh(recipe.mesh, 1))}
    update, step, scorer = planned["sft update"], planned["sft update step"], WEIGHTS + D
    counters = 5 * 4 + 20
    assert update.live["optimizer"] == counters and update.host == 8 * WEIGHTS and update.added == 4 * WEIGHTS
    assert planned["ppo critic step"].host == 8 * (WEIGHTS + scorer), "the actor's too"
    # The embedding is the largest and the last, so no other gradient is held at the same time.
    largest = 4 * V * D
    assert step.live == update.live | {"gradients": largest, "moments on the device": 2 * largest}
    assert device_bytes(step.args) == 4 * largest + 2 * 4  # the state's own counters belong to the other program
    assert host_bytes(step.args) == 0


@pytest.mark.parametrize(
    ("zero", "params", "gradients", "moments"), [(3, 8, 8, 8), (2, 2, 8, 8), (1, 2, 2, 8), (0, 2, 2, 2)]
)
def test_each_zero_stage_shards_one_more_group_of_arrays_over_eight_devices_as_computed_by_hand(
    zero, params, gradients, moments, tmp_path
):
    recipe = recipe_of(tmp_path, "whole", "fsdp4-tensor2", zero)
    update, *_ = phases(recipe, abstract_mesh(recipe.mesh, 8), ("sft",))
    whole = (L * (4 + 2) + 2) * D  # norms, and biases of layers with hidden outputs
    positions = (P + 2) * D
    split = WEIGHTS - whole - positions
    # Position tables are sharded over the hidden dimension by all devices or by none.
    held = [split // n + whole + positions // (n if n == 8 else 1) for n in (params, gradients, moments)]
    assert update.live["trainable"] == 4 * held[0]
    assert update.added == 4 * held[1]
    assert update.live["optimizer"] == 8 * held[2] + 5 * 4 + 20


def test_flops_are_two_per_weight_and_token_and_four_per_attended_pair_and_head_dimension():
    decoder = decoder_config(HF, scalar_head=False)
    body = L * (4 * D * D + 2 * D * F)
    assert weights_per_token(decoder) == (body, V * D)
    assert forward_flops(decoder, 3, 10, 4) == 3 * (10 * 2 * body + 4 * 10 * 10 * D * L + 4 * 2 * V * D)


def test_publishing_sends_the_generation_weights_that_a_gpu_lacks_over_the_links(tmp_path):
    recipe = recipe_of(tmp_path, mesh="fsdp4-tensor2")
    mesh = abstract_mesh(recipe.mesh, 8)
    found = phases(recipe, mesh)
    need = work_of_phases(recipe, found, mesh)["ppo/publish"]
    weights = next(phase for phase in found if phase.name == "generate").live["generation weights"]
    assert need.link == weights * (1 - 2 / 8)
    recipe = recipe_of(tmp_path, mesh="fsdp4-tensor2", zero=2)
    assert work_of_phases(recipe, phases(recipe, mesh), mesh)["ppo/publish"].link == 0


def test_zero_stages_trade_memory_for_link_traffic_as_computed_by_hand(tmp_path):
    link = {}
    for zero in (3, 2, 1, 0):
        recipe = recipe_of(tmp_path, mesh="fsdp4-tensor2", zero=zero)
        mesh = abstract_mesh(recipe.mesh, 8)
        found = phases(recipe, mesh, ("sft",))
        link[zero] = work_of_phases(recipe, found, mesh)["sft/update"].link
    # Two passes, nothing recomputed, in float32; then gradients, then new parameters.
    for zero, held, sums, moments in ((3, 8, 8, 8), (2, 2, 8, 8), (1, 2, 2, 8), (0, 2, 2, 2)):
        trainable = 4 * WEIGHTS
        passes = 2 * trainable * (1 - 1 / held)
        reduced = trainable * ((1 - 1 / sums) + 2 / sums * (1 - sums / 8))
        np.testing.assert_allclose(link[zero], passes + reduced + trainable * (1 / held - 1 / moments), rtol=1e-6)


@pytest.mark.parametrize("text", ["8xB100", "0xH200", "H200x8", "8", "", "2x2x2xH200"])
def test_an_unknown_gpu_is_rejected_with_the_known_ones(text, tmp_path, capsys):
    assert main(["plan", str(tiny_recipe.write_recipe(tmp_path)), "--gpus", text or " "]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in GPUS) and len(said.splitlines()) == 1


def test_without_attached_or_named_gpus_the_plan_says_how_to_name_them(tmp_path, capsys):
    assert main(["plan", str(tiny_recipe.write_recipe(tmp_path))]) == 2
    assert "--gpus 8xNAME" in capsys.readouterr().err


def test_a_model_without_an_available_config_is_rejected_by_name(tmp_path):
    recipe = recipe_of(tmp_path)
    for actor, reported in (("absent/model", "config.json of absent/model"), (str(tmp_path / "no"), "no folder")):
        lost = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, actor=actor))
        with pytest.raises(ValueError, match=reported):
            phases(lost, abstract_mesh(recipe.mesh, 1))


@pytest.mark.parametrize(
    ("setting", "limit_of", "fix"),
    [
        ("whole", {"frozen_dtype": "bfloat16"}, "model.frozen_dtype=bfloat16"),
        ("whole-bfloat16", SETTINGS["lora"], "LoRA for the actor"),
        ("lora", SETTINGS["both-lora"], "model.reward_lora.rank=128"),
        ("both-lora", {"lora": LORA, "reward_lora": LORA, "frozen_dtype": "bfloat16"}, "devices in place of 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_rejected_with_a_change_that_makes_it_fit(
    setting, limit_of, fix, tmp_path, monkeypatch
):
    # Adapters of rank 128 are larger than this model: the suggestion is tried at a rank that suits the model.
    monkeypatch.setattr(rlhf_jax.plan, "LoraConfig", lambda rank, alpha: parse_lora())
    recipe = recipe_of(tmp_path, setting)
    mesh = abstract_mesh(recipe.mesh, 1)
    fixed = parse_config(type(recipe.model), {"actor": recipe.model.actor, "dtype": "float32"} | limit_of, "the test")
    limit, _ = lower_bound_bytes(dataclasses.replace(recipe, model=fixed), mesh, ("ppo",))
    if setting == "both-lora":
        recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, fsdp=-1))
        limit -= 1
    with pytest.raises(ValueError, match="holds at least") as refusal:
        check_fits(recipe, mesh, limit, ("ppo",))
    assert fix in str(refusal.value)
    check_fits(recipe, mesh, lower_bound_bytes(recipe, mesh, ("ppo",))[0], ("ppo",))


def parse_lora():
    from rlhf_jax.models.lora import LoraConfig

    return LoraConfig(**LORA)


def test_train_stops_before_loading_or_writing_anything_when_the_devices_are_too_small(tmp_path, capsys, monkeypatch):
    path = tiny_recipe.write_recipe(tmp_path)
    monkeypatch.setattr(rlhf_jax.train, "device_limit", lambda mesh: 100_000)
    assert tiny_recipe.run("train", path, f"run.dir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert "holds at least" in said and "0.00 GiB may be used" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [1, 4, 16])
@pytest.mark.parametrize("largest", [0, 1, 2, 8, 16])
def test_the_largest_micro_batch_equals_the_result_of_trying_all(asked, largest, tmp_path, monkeypatch):
    def one_phase(recipe, mesh, stages):
        return [Phase("sft", "update", None, (recipe.sft.micro_batch_size,), {"state": 5000})]

    def linear(phase):
        tried.append(phase.args[0])
        return Memory(arguments=5000, outputs=5000, aliased=5000, temporaries=1000 * phase.args[0])

    monkeypatch.setattr(compile, "phases", one_phase)
    monkeypatch.setattr(compile, "measure", linear)
    tried, recipe = [], with_micro_batch(recipe_of(tmp_path), "sft", asked)
    found = measure_all(recipe, tiny.mesh_of("one"), ("sft",), 5000 + 1000 * largest + 500)["micro_batch"]["sft"]
    assert found == {"asked": asked, "largest": largest, "compilations": len(tried)}
    assert len(tried) == len(set(tried)) <= 4 and set(tried) <= {1, 2, 4, 8, 16}


def test_the_plan_of_a_whole_recipe_is_printed_as_json_and_as_a_table(tmp_path, capsys):
    path = tiny_recipe.write_recipe(tmp_path)
    command = [
        "plan",
        str(path),
        "--gpus",
        "2xA100-40GB",
        "--json",
        "--price-per-gpu-hour",
        "2",
        f"run.dir={tmp_path}/r",
    ]
    assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
    assert [row["phase"] for row in plan["phases"]][-5:] == ["publish", "generate", "score", "actor", "critic"]
    for row in plan["phases"]:
        assert row["peak"] + row["headroom"] == plan["usable"] and row["least"] <= row["peak"]
        given = row.get("arguments", 0) + row.get("outputs", 0) - row.get("aliased", 0)
        assert row["peak"] == row["resident"] + row["temporaries"] + given
    assert 0 < plan["seconds"]["ppo"]["floor"] < plan["seconds"]["ppo"]["expected"]
    assert plan["seconds"]["ppo"]["steps"] == 5 and plan["cost"] > 0
    has_plugin = cuda_plugin() is not None
    assert plan["micro_batch"]["sft"] == {"asked": 8, "largest": 8, "compilations": int(has_plugin)}
    assert plan["compiled_for"] == ("A100-40GB" if has_plugin else None)
    assert has_plugin or "of which compiled programs had at most 30% more" in plan["notes"][1]
    text = format_plan(plan)
    assert "largest micro-batch" in text and "assumed: " in text and "cost at 2 per GPU" in text
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(cuda_plugin() is None, reason="needs JAX's CUDA plugin: pip install 'rlhf_jax[cuda12]'")
def test_programs_compile_for_gpus_that_are_not_attached(tmp_path):
    recipe = recipe_of(tmp_path, "lora", "fsdp4-tensor2")
    mesh = make_mesh(recipe.mesh, compile_only_devices("8xA100-80GB"))
    for phase in phases(recipe, mesh, ("ppo",)):
        assert measure(phase).peak(phase) >= phase.lower_bound, phase.name
    assert jnp.zeros(1).devices() == {jax.devices("cpu")[0]}


PUBLISHED = {
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "facebook/opt-30b": 29_974_540_288,
    "facebook/opt-66b": 65.7e9,
    "facebook/opt-175b": 175e9,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


@pytest.mark.parametrize("name", known_models())
def test_each_known_config_has_the_published_number_of_parameters(name):
    decoder = decoder_config(known_models()[name], scalar_head=False)
    padding = (decoder.padded_vocab - decoder.vocab_size) * decoder.embed_size * (1 if decoder.tied else 2)
    count = sum(math.prod(leaf.shape) for leaf in abstract_params(decoder).values()) - padding
    reported = PUBLISHED[name]
    assert count == reported if isinstance(reported, int) else abs(count / reported - 1) < 3e-3


def test_known_models_are_planned_from_the_table_and_only_others_ask_the_hub_once(tmp_path, monkeypatch):
    asked = []

    def hub_config(name):
        if not Path(name).is_dir():
            asked.append(name)
        return HF

    monkeypatch.setattr(rlhf_jax.plan.abstract, "config_json", hub_config)
    rlhf_jax.plan.abstract._hub_config.cache_clear()
    recipe, notes = recipe_of(tmp_path), {}
    for actor in ("facebook/opt-125m", "someone/opt", str(tmp_path / "model")):
        changed = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, actor=actor))
        phases(changed, abstract_mesh(recipe.mesh, 1))
        assert decoder_configs(changed, 1)[0].hidden_size == (768 if actor.startswith("facebook/") else D)
        notes[actor] = "\n".join(_notes(changed, parse_machine("A100-80GB")))
    assert asked == ["someone/opt"]
    assert [actor for actor in notes if "own table" in notes[actor]] == ["facebook/opt-125m"]
    rlhf_jax.plan.abstract._hub_config.cache_clear()


def test_the_table_of_known_models_is_part_of_the_installed_package():
    listed = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert listed["package-data"]["rlhf_jax.plan"] == ["known_models.toml"]
