"""GRPO and its relatives: the update against its invariants, groups without a signal, and runs of a few steps."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_recipe
from safetensors.numpy import save_file
from tiny_recipe import records, tensors, untimed_records, write_recipe

import rlhf_jax.stages.grpo
from rlhf_jax.config import load_config
from rlhf_jax.decode import Rollout
from rlhf_jax.engine import EngineState, FrozenParams
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.optim import OptimConfig
from rlhf_jax.plan.phases import phases
from rlhf_jax.recipe import Recipe
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.stages.grpo import (
    Answers,
    grpo_engine,
    grpo_optimizers,
    refill_groups,
    update_order,
)
from rlhf_jax.stages.grpo_config import GRPOConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.sft import SFTConfig
from rlhf_jax.stages.table import STAGES, check_stages, sources
from rlhf_jax.train_step import init_state

REWARDS = """
def digits(prompts, responses, examples):
    assert all(isinstance(row["prompt"], str) for row in examples)
    return [float(sum(map(str.isdigit, text))) for text in responses]
def is_even(completions):
    return [float(len(text) % 2 == 0) for text in completions]
"""
GRPO = ["run.stages=['sft','grpo']", "sft.steps=2", "grpo.rollout_batch_size=4", "grpo.batch_size=8", "grpo.steps=3"]
GRPO += ["grpo.sample={max_new_tokens=8,num_samples=4}", "grpo.actor={learning_rate=1e-3}", "grpo.passes=2"]


def options(folder, *more):
    """The options of a run whose rewards are two functions; the file of functions is written to the folder."""
    (folder / "rewards_of_test.py").write_text(REWARDS)
    names = [f"{folder / 'rewards_of_test.py'}:{name}" for name in ("digits", "is_even")]
    return [*GRPO, f"grpo.rewards={names}", "grpo.reward_weights=[1.0,0.5]", *more]


@pytest.fixture(scope="module")
def grpo_folder(tmp_path_factory):
    """The folder of a finished run of SFT and GRPO, next to its recipe."""
    folder = tmp_path_factory.mktemp("grpo")
    assert tiny_recipe.run("train", write_recipe(folder), *options(folder), f"run.dir={folder / 'run'}") == 0
    return folder / "run"


def test_every_rollout_has_the_scores_of_its_functions_and_their_weighted_sum(grpo_folder):
    lines = records(grpo_folder / "grpo/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        rollouts = records(grpo_folder / f"grpo/rollouts/{line['step']:06d}.jsonl")
        assert len(rollouts) == 16 and len({each["prompt"] for each in rollouts}) == 4
        for name in ("digits", "is_even"):
            (key,) = [key for key in rollouts[0] if key.endswith(name)]
            assert line[f"reward/{name}"] == pytest.approx(np.mean([each[key] for each in rollouts]), rel=1e-6)
        text = rollouts[0]["response"].replace("</s>", "")
        assert rollouts[0][[key for key in rollouts[0] if key.endswith("digits")][0]] == sum(map(str.isdigit, text))
        totals = [
            sum(w * each[k] for k in each for n, w in (("digits", 1.0), ("is_even", 0.5)) if k.endswith(n))
            for each in rollouts
        ]
        assert [each["score"] for each in rollouts] == pytest.approx(totals)
        groups = np.reshape(totals, (4, 4))
        assert line["groups_without_signal"] == (np.ptp(groups, axis=1) == 0).mean()
        assert line["logprob_mismatch"] < 1e-4 and "kl" not in line
    assert (grpo_folder / "grpo/export/model.safetensors").exists()


def test_a_run_without_a_reward_model_is_evaluated_by_a_function(grpo_folder, capsys):
    recipe = write_recipe(grpo_folder.parent)
    given = [*options(grpo_folder.parent), f"run.dir={grpo_folder}"]
    assert tiny_recipe.run("evaluate", recipe, *given) == 2
    assert "or a policy and evaluate.reward=FILE.py:FUNCTION" in capsys.readouterr().err
    function = f"evaluate.reward={grpo_folder.parent / 'rewards_of_test.py'}:digits"
    assert tiny_recipe.run("evaluate", recipe, *given, function) == 0
    assert "SFT" in (report := capsys.readouterr().out) and "GRPO" in report
    numbers, lines = json.loads((grpo_folder / "evaluate.json").read_text()), records(grpo_folder / "evaluate.jsonl")
    for stage in ("sft", "grpo"):
        expected = [sum(map(str.isdigit, line[f"{stage}_answer"])) for line in lines]
        assert [line[f"{stage}_score"] for line in lines] == expected
        assert numbers[f"{stage}_score"] == pytest.approx(np.mean(expected))
    assert "reward_accuracy" not in numbers and "grpo_win_rate" in numbers


def test_a_stage_starts_from_the_latest_policy_or_from_the_one_that_it_names():
    names, model = ["sft", "ppo", "dpo", "grpo"], ModelConfig()
    functions = GRPOConfig(rewards=("a:b",))
    assert sources("grpo", names, model, functions) == {"policy": "dpo"}
    assert sources("grpo", names, model, dataclasses.replace(functions, start="sft")) == {"policy": "sft"}
    assert sources("grpo", ["grpo"], model, functions) == {}
    configs = dict.fromkeys(STAGES) | {"sft": SFTConfig(), "dpo": DPOConfig(start="reward")}
    with pytest.raises(
        ValueError, match=r'dpo.start="reward": the stages before it that export a policy are \[.sft.\]'
    ):
        check_stages(["sft", "dpo"], model, configs)


def test_the_plan_of_functions_alone_has_one_model_and_no_reference(grpo_folder):
    recipe = load_config(grpo_folder / "config.toml", [], Recipe)
    found = {each.name: each for each in phases(recipe, tiny.mesh_of("one"), ("grpo",))}
    assert list(found) == ["publish", "generate", "score", "actor"] and found["actor"].runs == 4
    size = sum(array.size for array in tensors(grpo_folder / "sft/export").values()) + 16 * (384 - 300)
    counters = 5 * 4 + 11  # five numbers, and a byte for each of the 11 parameters
    assert found["publish"].live == {
        **{"actor frozen": 0, "actor trainable": 4 * size, "actor optimizer": 8 * size + counters},
        **{"reference": 0, "reward model": 0},
    }
    with_all = dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, stages=("sft", "reward", "grpo")),
        data=dataclasses.replace(recipe.data, split={}),
        grpo=dataclasses.replace(recipe.grpo, kl_coef=0.1, rewards=("model",), reward_weights=()),
    )
    with_all = {each.name: each for each in phases(with_all, tiny.mesh_of("one"), ("grpo",))}
    assert with_all["publish"].live["reference"] == 4 * size
    assert with_all["publish"].live["reward model"] == 4 * (size + 16), "the embedding, and one row for the score"
    assert [len(each["score"].passes) for each in (found, with_all)] == [1, 3]
    assert all(each.program.lower(*each.args) for each in (*found.values(), *with_all.values()))


def test_a_stopped_run_that_refills_groups_ends_bit_equal(tmp_path, monkeypatch):
    more = ["grpo.refill_rounds=2", "grpo.kl_coef=0.1", "grpo.ema_decay=0.5", "grpo.advantage=global"]
    more.append("grpo.old_logprobs=rollout")
    recipe, given = write_recipe(tmp_path), options(tmp_path, *more)
    assert tiny_recipe.run("train", recipe, *given, f"run.dir={tmp_path / 'whole'}") == 0
    loop = rlhf_jax.stages.grpo.train_loop

    def interrupted_loop(context, total, state, step_fn, **rest):
        def stop(state, step):
            result = step_fn(state, step)
            if step == 2:
                raise KeyboardInterrupt
            return result

        return loop(context, total, state, stop, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(rlhf_jax.stages.grpo, "train_loop", interrupted_loop)
        assert tiny_recipe.run("train", recipe, *given, f"run.dir={tmp_path / 'stopped'}") == 130
    assert tiny_recipe.run("train", recipe, *given, f"run.dir={tmp_path / 'stopped'}") == 0
    whole, stopped = (untimed_records(tmp_path / name / "grpo/metrics.jsonl") for name in ("whole", "stopped"))
    assert whole == stopped and all("kl" in line and "actor_kl_loss" in line for line in whole)
    for export in ("export", "export_ema"):
        ours, theirs = (tensors(tmp_path / name / "grpo" / export) for name in ("whole", "stopped"))
        assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def test_a_reward_model_and_a_function_are_added_with_their_weights(tmp_path):
    folder, given = tmp_path / "run", options(tmp_path, "run.stages=['sft','reward','grpo']", "reward.steps=2")
    function = f"{tmp_path / 'rewards_of_test.py'}:digits"
    given += ["grpo.steps=1", f"grpo.rewards=['model','{function}']", "grpo.reward_weights=[2.0,100.0]"]
    assert tiny_recipe.run("train", write_recipe(tmp_path), *given, "model.lora={rank=2}", f"run.dir={folder}") == 0
    rollouts = records(folder / "grpo/rollouts/000001.jsonl")
    rest = np.array([each["score"] - 100 * each[function] for each in rollouts])
    assert len(np.unique(rest)) > 8 and np.abs(rest).max() < 50, "twice the score of the model"


def test_the_scores_of_an_answer_are_the_weighted_model_plus_what_the_caller_gives():
    given, found = np.arange(16.0), {}
    for name, weights in (("model", (1.0,)), ("both", (2.5, 7.0))):
        rewards = ("model", "a:b")[: len(weights)]
        config = GRPOConfig(rewards, weights, rollout_batch_size=4, sample=SampleConfig(6, num_samples=4))
        engine, state, frozen = engine_of(tiny.mesh_of("one"), config, scorer=tiny.scalar(tiny.LLAMA))
        found[name] = engine.score(state, frozen, rollout_of(5), given if name == "both" else None).score
    np.testing.assert_allclose(found["both"], 2.5 * found["model"] + given, rtol=1e-6)


def test_a_stage_without_anything_that_scores_is_rejected_before_it_starts(tmp_path, capsys):
    assert tiny_recipe.run("train", write_recipe(tmp_path), f"run.dir={tmp_path / 'run'}", *GRPO) == 2
    assert 'or score by functions alone, grpo.rewards = ["FILE.py:FUNCTION"]' in capsys.readouterr().err
    missing = options(tmp_path, "grpo.rewards=['nothing_here:f']", "grpo.reward_weights=[]")
    assert tiny_recipe.run("train", write_recipe(tmp_path), f"run.dir={tmp_path / 'run'}", *missing) == 2
    assert "the reward function nothing_here:f: ModuleNotFoundError" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sizes_that_would_split_a_group_are_rejected():
    layout = Layout(tiny.mesh_of("one"), TRAIN)
    config = GRPOConfig(rollout_batch_size=6, batch_size=12, sample=SampleConfig(num_samples=4))
    assert config.check_sizes("grpo", layout) == 1
    with pytest.raises(ValueError, match="answers of a group"):
        dataclasses.replace(config, batch_size=6).check_sizes("grpo", layout)
    with pytest.raises(ValueError, match="compares the answers to a prompt with each other: at least 2"):
        GRPOConfig(sample=SampleConfig(num_samples=1))


def test_every_optimizer_step_has_whole_groups_and_every_pass_all_of_them():
    config = GRPOConfig(rollout_batch_size=6, batch_size=8, passes=3, sample=SampleConfig(num_samples=4))
    orders = update_order(config, 0, 5)
    assert len(orders) == config.updates(1) == 9
    for number in range(3):
        assert sorted(np.concatenate(orders[3 * number : 3 * number + 3])) == list(range(24))
    for index in orders:
        assert (np.diff(index.reshape(-1, 4), axis=1) == 1).all() and (index[::4] % 4 == 0).all()


# One update of a tiny model on given answers.
CASES = {
    "grpo": dict(scale="sequence", kl_coef=0.2),
    "dapo": dict(scale="token", clip_high=0.4),
    "dr-grpo": dict(scale="constant", advantage="group_mean"),
    "rloo": dict(ratio="product", scale="sequence", advantage="leave_one_out", kl_coef=0.2, kl_in="score"),
    "reinforce++": dict(advantage="global", kl_coef=0.2, kl_in="score"),
    "gspo": dict(ratio="sequence", scale="sequence"),
    "cispo": dict(surrogate="cispo", advantage="batch_std"),
}


def engine_of(mesh, config, scorer=None):
    """(engine, state, frozen) of a tiny actor, whose reference has other weights."""
    layout, optim = Layout(mesh, TRAIN), OptimConfig(learning_rate=0.02, schedule="constant", eps=1e-3)
    config, actor = dataclasses.replace(config, actor=optim), tiny.LLAMA
    config = config if scorer else dataclasses.replace(config, rewards=("a:b",))
    optimizers = grpo_optimizers(config, 10)
    model = ModelConfig(dtype="float32", remat="none", logprob_chunk=4)
    engine = grpo_engine(config, model, actor, scorer, optimizers, (3, 15, 24), layout)
    state = init_state(tiny.random_params(actor, mesh), optimizers.actor, abstract_params(actor), layout)
    reference = tiny.random_params(actor, mesh, seed=2) if config.kl_coef else {}
    reward = tiny.random_params(scorer, mesh, seed=3) if scorer else {}
    return engine, EngineState(state), FrozenParams({}, reference=reference, reward=reward)


def rollout_of(prompt_width):
    """Sixteen answers of ragged lengths to four prompts, as sampled from some other policy."""
    prompts, prompt_mask = tiny.prompts(tiny.LLAMA, np.repeat([3, 5, 1, 4], 4), prompt_width)
    rng = np.random.default_rng(5)
    mask = np.arange(6) < rng.integers(1, 7, 16)[:, None]
    tokens = np.where(mask, rng.integers(1, 61, (16, 6)), 0).astype(np.int32)
    return Rollout(prompts, prompt_mask, tokens, mask, -4.0 * mask, mask.sum(1) < 6, -4.0 * mask, mask.sum(1))


@pytest.mark.parametrize("case", CASES)
def test_padding_micro_batches_and_eight_devices_change_no_update(case):
    config = GRPOConfig(rollout_batch_size=4, sample=SampleConfig(6, num_samples=4), **CASES[case])
    scores, found = np.random.default_rng(1).normal(size=16), []
    for mesh, micro, width in (("one", 0, 5), ("one", 4, 8), ("fsdp4-tensor2", 8, 5)):
        engine, state, frozen = engine_of(tiny.mesh_of(mesh), dataclasses.replace(config, micro_batch_size=micro))
        rollout = engine.publish.layout.put_batch(rollout_of(width))
        experience = engine.score(state, frozen, rollout, scores)
        # Log-probabilities of a policy a little different, so that ratios are not 1 and some are clipped.
        noise = jnp.asarray(np.random.default_rng(2).normal(0, 0.3, (16, 6)), jnp.float32)
        experience = dataclasses.replace(experience, logprobs=experience.logprobs + noise)
        state, stats = engine.update(state, frozen, experience)
        found.append(jax.device_get((stats, state.actor.trainable)))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-4, atol=3e-5), other, found[0])


def answers_of(config, scores, width):
    """Answers with these scores to prompts of this width, whose tokens are their scores."""
    engine, state, frozen = answers_of.engine
    rollout = rollout_of(width)
    rollout = dataclasses.replace(rollout, tokens=np.where(rollout.mask, np.asarray(scores, int)[:, None], 0))
    return Answers(rollout, engine.score(state, frozen, rollout, scores), {"f": np.asarray(scores, float)})


def test_groups_without_a_signal_are_replaced_by_those_of_later_rounds_in_order():
    config = GRPOConfig(rollout_batch_size=4, refill_rounds=2, sample=SampleConfig(6, num_samples=4))
    config = dataclasses.replace(config, rewards=("a:b",))
    answers_of.engine = engine_of(tiny.mesh_of("one"), config)
    dead, rounds = [1.0] * 4, []

    def sample(number):
        rounds.append(number)
        scores = {1: [*dead, 20, 21, 22, 23, *dead, *dead], 2: [30, 31, 32, 33, *dead, 40, 41, 42, 43, *dead]}[number]
        return answers_of(config, scores, 8)

    first = answers_of(config, [2, 3, 4, 5, *dead, *dead, *dead], 5)
    found, stats = refill_groups(first, sample, config)
    assert rounds == [1, 2] and found.scores["f"].tolist() == [
        2,
        3,
        4,
        5,
        20,
        21,
        22,
        23,
        30,
        31,
        32,
        33,
        40,
        41,
        42,
        43,
    ]
    assert stats == {"groups_without_signal": 0.75, "refill_rounds": 2, "groups_left_without_signal": 0.0}
    mask = found.rollout.mask
    np.testing.assert_array_equal(found.rollout.tokens[mask], np.repeat(found.scores["f"], mask.sum(1)))
    np.testing.assert_array_equal(found.experience.score, found.scores["f"])
    each = found.experience.advantages.sum(axis=1) / found.experience.action_mask.sum(axis=1)
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / (np.std([0, 1, 2, 3], ddof=1) + 1e-4)
    np.testing.assert_allclose(each.reshape(4, 4), np.tile(expected, (4, 1)), rtol=1e-5)
    # Right-padded sequences hold prompt and answer whatever the width of their round.
    for row in range(16):
        own = found.rollout.prompts[row][found.rollout.prompt_mask[row]], found.rollout.tokens[row][mask[row]]
        np.testing.assert_array_equal(found.experience.tokens[row][found.experience.mask[row]], np.concatenate(own))
    unchanged, stats = refill_groups(first, sample, dataclasses.replace(config, refill_rounds=0))
    assert unchanged is first and stats == {"groups_without_signal": 0.75}


def test_the_compute_of_a_stage_holds_no_reference_without_a_coefficient():
    for coefficient in (0.0, 0.1):
        config = GRPOConfig(rollout_batch_size=4, kl_coef=coefficient, sample=SampleConfig(6, num_samples=4))
        engine, state, frozen = engine_of(tiny.mesh_of("one"), config)
        assert (engine.models.reference is None) == (coefficient == 0.0) and engine.models.critic is None


def test_ppo_learns_from_functions_alone_with_a_critic_that_starts_at_0(tmp_path):
    folder, given = tmp_path / "run", options(tmp_path, "run.stages=['sft','ppo']", "ppo.steps=2")
    names = [f"{tmp_path / 'rewards_of_test.py'}:{name}" for name in ("digits", "is_even")]
    given += [f"ppo.rewards={names}", "ppo.reward_weights=[1.0,0.5]", "ppo.rollout_batch_size=8"]
    assert tiny_recipe.run("train", write_recipe(tmp_path), *given, f"run.dir={folder}") == 0
    first, second = records(folder / "ppo/metrics.jsonl")
    assert first["value_mean"] == 0.0 and second["value_mean"] != 0.0
    for line in (first, second):
        assert line["score_mean"] == pytest.approx(line["reward/digits"] + 0.5 * line["reward/is_even"], rel=1e-5)
    recipe = load_config(folder / "config.toml", [], Recipe)
    found = {each.name: each for each in phases(recipe, tiny.mesh_of("one"), ("ppo",))}
    assert list(found) == ["publish", "generate", "score", "actor", "critic"]
    assert found["publish"].live["reward model"] == 0 and len(found["score"].passes) == 3
    assert found["score"].program.lower(*found["score"].args)


def test_distillation_from_a_teacher_lowers_the_kl_to_it_without_any_reward(grpo_folder, tmp_path):
    # The teacher is the student with three times its embedding, which is its head too: its tokens are far less random.
    teacher, base = tmp_path / "teacher", grpo_folder / "base"
    shutil.copytree(base, teacher, ignore=shutil.ignore_patterns("SHA256SUMS"))
    weights = tensors(teacher) | {name: 3 * each for name, each in tensors(teacher).items() if "embed_tokens" in name}
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    given = ["run.stages=['grpo']", f"model.actor={base}", f"grpo.reference={teacher}", "grpo.rewards=[]"]
    given += ["grpo.kl_coef=1.0", "grpo.steps=25", "grpo.rollout_batch_size=16", "grpo.actor={learning_rate=3e-2}"]
    given += ["grpo.sample={max_new_tokens=8,num_samples=1}"]
    assert tiny_recipe.run("train", write_recipe(tmp_path), *given, f"run.dir={tmp_path / 'run'}") == 0
    kl = [line["kl"] for line in records(tmp_path / "run/grpo/metrics.jsonl")]
    assert 0 < np.mean(kl[-5:]) < 0.8 * np.mean(kl[:5]), kl
    recipe = load_config(tmp_path / "run/config.toml", [], Recipe)
    found = {each.name: each for each in phases(recipe, tiny.mesh_of("one"), ("grpo",))}
    assert found["publish"].live["reference"] == found["publish"].live["actor trainable"]
    assert found["score"].program.lower(*found["score"].args)


def test_a_reference_without_a_coefficient_or_of_another_vocabulary_is_rejected(grpo_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match='reference="a" has no effect with kl_coef=0'):
        GRPOConfig(rewards=(), reference="a")
    with pytest.raises(ValueError, match="name at least one"):
        GRPOConfig(rewards=())
    other = ["run.stages=['grpo']", "model.new.vocab_size=280", "grpo.rewards=[]", "grpo.kl_coef=1.0"]
    other += [f"grpo.reference={grpo_folder / 'sft/export'}", "grpo.rollout_batch_size=8"]
    assert tiny_recipe.run("train", write_recipe(tmp_path), *other, f"run.dir={tmp_path / 'run'}") == 2
    assert "has another vocabulary than the actor: take a teacher of the same family" in capsys.readouterr().err
