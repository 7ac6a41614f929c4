"""Options of PPO in whole runs: what they change, that they survive a resume, and metrics recomputed from rollouts."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import tiny_recipe
from tiny_recipe import interrupt_stage, records, start_before_ppo, tensors, untimed_records

import rlhf_jax
import rlhf_jax.stages.ppo
from rlhf_jax.config import load_config
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import select_rows
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.ppo_config import PPOConfig


@pytest.fixture
def finished_folder(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory)


def test_with_four_passes_clip_fraction_kl_and_ratios_equal_a_recomputation_from_the_saved_rollouts(
    tmp_path, finished_folder, monkeypatch
):
    """The weights before each optimizer step are recorded; probabilities are a float64 softmax of their logits."""
    make, before = rlhf_jax.stages.ppo.ppo_engine, []

    def engine_that_records(*args):
        engine = make(*args)

        def update(state, frozen, *rest):
            before.append(jax.device_get(state.actor.params(frozen.actor)))
            return engine.update(state, frozen, *rest)

        return engine._replace(update=update)

    monkeypatch.setattr(rlhf_jax.stages.ppo, "ppo_engine", engine_that_records)
    options = ["ppo.steps=1", "ppo.ppo_epochs=4", "ppo.save_tokens=true", "ppo.clip=0.01"]
    assert tiny_recipe.run(*start_before_ppo(tmp_path, finished_folder, *options, "ppo.actor.learning_rate=3e-3")) == 0

    model, rollouts = rlhf_jax.from_pretrained(tmp_path / "sft/export"), records(tmp_path / "ppo/rollouts/000001.jsonl")
    found = {"clip_fraction": [], "approx_kl": [], "ratio": [], "ratio_deviation": []}
    assert len(before) == 4 and len(rollouts) == 8
    for params in before:
        changed, clipped, ratios = dataclasses.replace(model, params=params), [], []
        for row in rollouts:
            ids = np.array([row["prompt_ids"] + row["response_ids"]])
            logits = np.float64(rlhf_jax.apply(changed, ids, np.ones_like(ids)))[0, len(row["prompt_ids"]) - 1 : -1]
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            ratio = np.exp(logp[np.arange(len(logp)), row["response_ids"]] - row["logprobs"])
            gain = np.array(row["advantages"])
            clipped += list((gain > 0) & (ratio > 1.01) | (gain < 0) & (ratio < 0.99))
            ratios += list(ratio)
        ratios = np.array(ratios)
        found["clip_fraction"].append(np.mean(clipped))
        found["approx_kl"].append(np.mean(ratios - 1 - np.log(ratios)))
        found["ratio"].append(ratios.mean())
        found["ratio_deviation"].append(np.abs(ratios - 1).mean())
    (metrics,) = records(tmp_path / "ppo/metrics.jsonl")
    for name, each in found.items():
        assert metrics[f"actor_{name}"] == pytest.approx(np.mean(each), rel=1e-4, abs=1e-7), name
    assert found["ratio_deviation"][0] < 1e-5 < 1e-3 < found["ratio_deviation"][3] and found["clip_fraction"][3] > 0.1


OPTIONS = [
    *("ppo.steps=3", "ppo.ppo_epochs=2", "ppo.batch_size=4", "ppo.micro_batch_size=2"),
    *("ppo.kl_target=0.5", "ppo.kl_estimator=k3", "ppo.kl_limit=10", "ppo.stop_kl=100", "ppo.entropy_coef=0.01"),
    *("ppo.score_scale=rollouts", "ppo.missing_eos=replace", "ppo.missing_eos_penalty=1", "ppo.overlong_tokens=4"),
    *("ppo.critic_lam=1", "ppo.clip_high=0.3", "ppo.dual_clip=3", "ppo.mismatch=sequence"),
    *("ppo.critic_head=zero", "ppo.critic_warmup_steps=1", "ppo.texts={coef=0.5, batch_size=4}"),
]


def test_a_run_with_all_options_equals_itself_resumed_and_carries_coefficient_and_moments(
    tmp_path, finished_folder, monkeypatch
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert tiny_recipe.run(*start_before_ppo(whole, finished_folder, *OPTIONS)) == 0
    command = start_before_ppo(stopped, finished_folder, *OPTIONS)
    with monkeypatch.context() as patch:
        interrupt_stage(patch, "ppo", 2)
        assert tiny_recipe.run(*command) == 130
    assert tiny_recipe.run(*command) == 0
    lines = untimed_records(whole / "ppo/metrics.jsonl")
    assert untimed_records(stopped / "ppo/metrics.jsonl") == lines
    for export in ("ppo/export", "ppo/export_critic"):
        ours, theirs = tensors(stopped / export), tensors(whole / export)
        assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []

    assert [line["updates"] for line in lines] == [4, 4, 4]
    assert ["actor_loss" in line for line in lines] == [False, True, True]  # one iteration for the critic alone
    assert lines[1]["kl"] == pytest.approx(0, abs=1e-4) and lines[2]["kl"] > 0
    assert lines[1]["actor_text_loss"] == pytest.approx(math.log(300), rel=0.2)
    coefficient = 0.1
    for line in lines:
        assert line["kl_coef"] == pytest.approx(coefficient, rel=1e-5)
        coefficient *= 1 + 0.1 * min(max(line["kl"] / 0.5 - 1, -0.2), 0.2)
    scores = [[row["score"] for row in records(whole / f"ppo/rollouts/{step:06d}.jsonl")] for step in (1, 2)]
    assert lines[2]["score_scale_mean"] == pytest.approx(np.mean(scores), rel=1e-4)
    assert lines[2]["score_scale_std"] == pytest.approx(np.std(scores), rel=1e-4)


def test_a_correction_for_the_mismatch_needs_logprobs_of_both_policies():
    with pytest.raises(ValueError, match='mismatch="token" compares two policies, .* has one: set "score"'):
        PPOConfig(mismatch="token", old_logprobs="rollout")


def test_scores_of_demonstrations_have_mean_0_and_variance_1_in_the_scale_of_a_run(tmp_path, finished_folder):
    options = ["ppo.steps=1", "ppo.score_scale=demonstrations", "ppo.kl_in=loss", "ppo.score_clip=100"]
    assert tiny_recipe.run(*start_before_ppo(tmp_path, finished_folder, *options)) == 0
    kept = json.loads((tmp_path / "ppo/score_scale.json").read_text())
    scorer = rlhf_jax.reward_from_pretrained(tmp_path / "reward/export")
    recipe = load_config(tmp_path / "config.toml", [], Recipe)
    rows = select_rows(
        recipe.data, prepare_tokenizer(scorer.tokenizer), RowSpec("demonstration", "ppo"), held_out=False
    )
    batch = Batches(rows, batch_size=64, seed=0)[0]
    scores = np.asarray(rlhf_jax.score(scorer, batch.tokens, batch.mask))
    assert kept["count"] == 64 and np.std(scores) > 0.01
    assert kept["mean"] == pytest.approx(np.mean(scores), rel=1e-4)
    std = np.std(scores)
    assert math.sqrt(kept["squares"] / kept["count"]) == pytest.approx(std, rel=1e-4)
    for row in records(tmp_path / "ppo/rollouts/000001.jsonl"):  # with the KL in the loss, the reward is the score
        assert row["reward"] == pytest.approx((row["score"] - np.mean(scores)) / std, rel=1e-3, abs=1e-4)
