"""The losses and metrics of each stage against hand arithmetic."""

import dataclasses
import math
from pkgutil import resolve_name

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipe
from row_specs import SPECS
from tiny_recipe import records, write_recipe

import rlhf_jax
from rlhf_jax.config import load_config
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.chat_template import encode_prompt, encode_response, prepare_tokenizer
from rlhf_jax.data.records import Example
from rlhf_jax.data.selection import rows_from_examples, select_rows
from rlhf_jax.decode import Rollout
from rlhf_jax.engine import Experience
from rlhf_jax.mesh import TRAIN, Layout, MeshConfig, make_mesh
from rlhf_jax.objectives.sft import next_token_loss
from rlhf_jax.recipe import Recipe
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.batch_sizes import check_row_lengths, held_out_batches, micro_batches, total_steps
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.ppo_losses import actor_loss, critic_loss, estimate, rollout_metrics, shaped_rewards
from rlhf_jax.stages.table import STAGES


@pytest.fixture
def finished_folder(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory)


@pytest.fixture
def data(finished_folder):
    return load_config(finished_folder / "config.toml", [], Recipe).data


def layout_of(devices: int) -> Layout:
    return Layout(make_mesh(MeshConfig(), jax.devices()[:devices]), TRAIN)


def loss_of(model, batch) -> float:
    logits = rlhf_jax.apply(model, batch.tokens, batch.mask)
    return float(next_token_loss(logits[:, :-1], batch.tokens[:, 1:], batch.loss_mask[:, 1:]))


def test_the_table_of_stages_names_functions_that_exist():
    for stage in STAGES.values():
        assert bool(stage.objective) != bool(stage.sampled), stage.name
        functions = [resolve_name(name) for name in (stage.run, stage.objective, *(stage.sampled or ())) if name]
        assert len(functions) == (2 if stage.objective else 4) and all(map(callable, functions)), stage.name


@pytest.mark.parametrize("learn", ["answer", "everything"])
def test_the_sft_loss_mask_includes_the_prompt_only_if_configured(finished_folder, data, learn):
    tokenizer = prepare_tokenizer(rlhf_jax.from_pretrained(finished_folder / "base").tokenizer)
    example = Example((("user", "What is 3 + 4?"),), "Sure! 3 + 4 = 7.", "", "", "by hand", 1)
    prompt, answer = encode_prompt(tokenizer, example.turns), encode_response(tokenizer, example.turns, example.answer)
    batch = Batches(
        rows_from_examples([example], data, tokenizer, dataclasses.replace(SPECS["sft"], learn=learn)),
        batch_size=1,
        seed=0,
    )[0]
    size = len(prompt) + len(answer)
    first = 1 if learn == "everything" else len(prompt)  # no token predicts the very first one
    expected = [first <= t < size for t in range(batch.tokens.shape[1])]
    assert batch.loss_mask[0].tolist() == expected
    assert batch.tokens[0, size - 1] == tokenizer.eos_token_id  # EOS has a loss


@pytest.mark.parametrize("learn", ["answer", "everything"])
def test_the_first_sft_loss_is_the_next_token_loss_of_the_logits(tmp_path, finished_folder, data, learn):
    model = rlhf_jax.from_pretrained(finished_folder / "base")
    tokenizer, folder = prepare_tokenizer(model.tokenizer), finished_folder
    if learn == "everything":
        folder = tmp_path / "run"
        options = ("sft.steps=1", f"sft.learn={learn}", "sft.micro_batch_size=2", "model.logprob_chunk=16")
        assert tiny_recipe.run("sft", write_recipe(tmp_path), f"run.dir={folder}", *options) == 0
    lines = records(folder / "sft/metrics.jsonl")
    rows, held_out = (
        select_rows(data, tokenizer, dataclasses.replace(SPECS["sft"], learn=learn), held_out=h) for h in (False, True)
    )
    first = Batches(rows, batch_size=8, seed=0)[0]
    trained = next(line for line in lines if "loss" in line)
    assert trained["loss"] == pytest.approx(loss_of(model, first), rel=1e-5)
    # Expected loss of an untrained model whose logits are N(0, 1): log V + 1/2.
    assert trained["loss"] == pytest.approx(math.log(300) + 0.5, rel=0.05)
    measured = Batches(held_out, batch_size=8, seed=0)[0]
    assert lines[0]["held_out_loss"] == pytest.approx(loss_of(model, measured), rel=1e-5)


def test_the_held_out_loss_of_sft_is_the_mean_over_tokens_of_all_batches(tmp_path, finished_folder, data):
    folder = tmp_path / "run"
    assert tiny_recipe.run("sft", write_recipe(tmp_path), f"run.dir={folder}", "sft.steps=1", "sft.eval_batches=2") == 0
    model = rlhf_jax.from_pretrained(folder / "sft/export")
    rows = select_rows(data, model.tokenizer, SPECS["sft"], held_out=True)
    batches = [Batches(rows, batch_size=8, seed=0)[step] for step in range(2)]
    weights = [batch.loss_mask.sum() for batch in batches]
    expected = np.average([loss_of(model, batch) for batch in batches], weights=weights)
    assert records(folder / "sft/metrics.jsonl")[-1]["held_out_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_reward_stage_scores_the_last_real_token_of_both_answers(finished_folder, data):
    scorer = rlhf_jax.reward_from_pretrained(finished_folder / "sft/export", seed=0)  # the initial reward model
    tokenizer = prepare_tokenizer(scorer.tokenizer)
    rows = select_rows(data, tokenizer, SPECS["reward"], held_out=False)
    batch = Batches(rows, batch_size=8, seed=0)[0]
    scores = np.stack([rlhf_jax.score(scorer, batch.tokens[:, side], batch.mask[:, side]) for side in range(2)], 1)
    for pair in range(2):  # alone and without padding, so the last column is the last real token
        tokens = batch.tokens[pair, 1][batch.mask[pair, 1]][None]
        assert tokens[0, -1] == tokenizer.eos_token_id
        alone = float(rlhf_jax.score(scorer, tokens, np.ones_like(tokens))[0])
        assert alone == pytest.approx(scores[pair, 1], abs=1e-5)
    margin = scores[:, 0] - scores[:, 1]
    first = next(line for line in records(finished_folder / "reward/metrics.jsonl") if "loss" in line)
    assert first["accuracy"] == np.mean(margin > 0)
    assert first["margin"] == pytest.approx(margin.mean(), abs=1e-5)
    assert first["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)


def test_held_out_accuracy_is_reported_next_to_that_of_choosing_the_longer_answer(finished_folder, data):
    scorer = rlhf_jax.reward_from_pretrained(finished_folder / "reward/export")
    rows = select_rows(data, prepare_tokenizer(scorer.tokenizer), SPECS["reward"], held_out=True)
    batch = Batches(rows, batch_size=8, seed=0)[0]
    scores = np.stack([rlhf_jax.score(scorer, batch.tokens[:, side], batch.mask[:, side]) for side in range(2)], 1)
    lengths = batch.mask.sum(-1)
    last = records(finished_folder / "reward/metrics.jsonl")[-1]
    assert last["held_out_accuracy"] == np.mean(scores[:, 0] > scores[:, 1])
    longer = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in lengths]
    assert last["held_out_longer_is_chosen"] == np.mean(longer)
    assert last["held_out_chosen_score"] == pytest.approx(scores[:, 0].mean(), abs=1e-5)
    assert last["held_out_score_std"] == pytest.approx(scores.std(), rel=1e-4)


# Two answers of three tokens: one ended by EOS at its second token, one cut at the third.
MASK = jnp.array([[True, True, False], [True, True, True]])
JUNK = 99.0  # values after the end of an answer have no effect
EXPERIENCE = Experience(
    tokens=jnp.zeros((2, 5), jnp.int32),
    mask=jnp.ones((2, 5), bool),
    starts=jnp.array([2, 2]),
    actions=jnp.zeros((2, 3), jnp.int32),
    action_mask=MASK,
    ended=jnp.array([True, False]),
    logprobs=jnp.array([[-1.0, -2.0, JUNK], [-1.0, -1.0, -1.0]]),
    ref_logprobs=jnp.array([[-1.5, -1.0, -JUNK], [-1.0, -2.0, -4.0]]),
    values=jnp.array([[0.5, 1.0, JUNK], [0.0, 0.25, 0.5]]),
    score=jnp.array([2.0, 7.0]),
    rewards=jnp.zeros((2, 3)),
    advantages=jnp.zeros((2, 3)),
    returns=jnp.zeros((2, 3)),
)
PPO = PPOConfig(kl_coef=0.1, score_clip=5.0, gamma=1.0, lam=0.5, whiten_advantages=False)


def test_rewards_are_the_kl_penalty_per_token_plus_the_clipped_score_at_the_last():
    # log-ratios: 0.5, -1 | 0, 1, 3; the score 7 is clipped to 5.
    expected = [[-0.05, 0.1 + 2.0, 0.0], [0.0, -0.1, -0.3 + 5.0]]
    np.testing.assert_allclose(shaped_rewards(EXPERIENCE, PPO), expected, atol=1e-6)


def test_the_penalty_for_an_unfinished_answer_is_subtracted_before_the_clip():
    config = dataclasses.replace(PPO, missing_eos_penalty=3.0)
    expected = [[-0.05, 0.1 + 2.0, 0.0], [0.0, -0.1, -0.3 + 4.0]]  # 7 - 3; the answer that ended keeps its 2
    np.testing.assert_allclose(shaped_rewards(EXPERIENCE, config), expected, atol=1e-6)


def test_advantages_and_returns_equal_hand_arithmetic():
    earned, gains, returns = estimate(EXPERIENCE, PPO)
    np.testing.assert_array_equal(earned, shaped_rewards(EXPERIENCE, PPO))
    # d = r + V' - V: row 0: -0.05 + 1 - 0.5 = 0.45, 2.1 - 1 = 1.1; row 1: 0.25, -0.1 + 0.25 = 0.15, 4.7 - 0.5 = 4.2
    expected = [[0.45 + 0.5 * 1.1, 1.1, 0.0], [0.25 + 0.5 * 2.25, 0.15 + 0.5 * 4.2, 4.2]]
    np.testing.assert_allclose(gains, expected, atol=1e-6)
    np.testing.assert_allclose(returns[MASK], (gains + EXPERIENCE.values)[MASK], atol=1e-6)


def test_whitened_advantages_have_mean_0_and_variance_1_over_real_tokens_and_returns_are_unchanged():
    _, gains, returns = estimate(EXPERIENCE, dataclasses.replace(PPO, whiten_advantages=True))
    assert gains[MASK].mean() == pytest.approx(0, abs=1e-6) and gains[MASK].var() == pytest.approx(1, abs=1e-5)
    assert gains[0, 2] == 0
    np.testing.assert_array_equal(returns, estimate(EXPERIENCE, PPO)[2])


def test_the_summary_equals_hand_arithmetic():
    earned, gains, returns = estimate(EXPERIENCE, PPO)
    experience = dataclasses.replace(EXPERIENCE, rewards=earned, advantages=gains, returns=returns)
    sampled = jnp.array([[-1.0, -2.5, JUNK], [-1.0, -1.0, -1.0]])
    rollout = Rollout(None, None, None, None, sampled, None, None, None)
    numbers = {name: float(value) for name, value in rollout_metrics(experience, rollout).items()}
    values, aims = np.array([0.5, 1.0, 0.0, 0.25, 0.5]), np.asarray(returns[MASK])
    assert numbers == pytest.approx(
        {
            "score_mean": 4.5,
            "score_std": 2.5,
            "kl": (-0.5 + 4.0) / 2,  # per sequence: the sum over its tokens
            "reward_mean": (2.05 + 4.6) / 2,
            "value_mean": values.mean(),
            "return_mean": aims.mean(),
            "explained_variance": 1 - (aims - values).var() / aims.var(),
            "response_length": 2.5,
            "ended_by_eos": 0.5,
            "logprob_mismatch": 0.5 / 5,
        },
        abs=1e-5,
    )


def test_the_losses_equal_hand_arithmetic():
    gains = jnp.array([[1.0, -1.0, JUNK], [2.0, 2.0, -2.0]])
    experience = dataclasses.replace(EXPERIENCE, advantages=gains, returns=EXPERIENCE.values + 1.0)
    ratios = np.array([[1.5, 1.5, 1.0], [1.0, 0.5, 0.5]])
    logprobs = experience.logprobs + jnp.log(ratios)
    loss, stats = actor_loss(logprobs, jnp.where(MASK, 2.0, JUNK), experience, PPO)
    # -min(A w, A clip(w, 0.8, 1.2)): 1.2 | -1.5 | 2 | 1 | -1.6
    assert float(loss) == pytest.approx(-(1.2 - 1.5 + 2.0 + 1.0 - 1.6) / 5, abs=1e-6)
    assert float(stats["clip_fraction"]) == pytest.approx(2 / 5)  # the first and the last have no gradient
    assert float(stats["entropy"]) == 2.0
    kl = [w - 1 - math.log(w) for w in (1.5, 1.5, 1.0, 0.5, 0.5)]
    assert float(stats["approx_kl"]) == pytest.approx(np.mean(kl), abs=1e-6)

    # Values rise by 0.1 (within the clip) and by 0.5 (clipped to 0.2); the return is 1 above the old value.
    rise = jnp.array([[0.1, 0.1, JUNK], [0.1, 0.5, 0.5]])
    loss, stats = critic_loss(experience.values + rise, experience, PPO)
    assert float(loss) == pytest.approx(0.5 * (3 * 0.9**2 + 2 * 0.8**2) / 5, abs=1e-6)
    assert float(stats["clip_fraction"]) == pytest.approx(2 / 5)


def test_micro_batches_divide_the_batch_and_are_a_multiple_of_the_devices():
    assert micro_batches("sft", 32, 0, layout_of(8)) == 1
    assert micro_batches("sft", 32, 8, layout_of(8)) == 4
    assert micro_batches("sft", 3, 1, layout_of(1)) == 3
    with pytest.raises(ValueError, match=r"sft.batch_size=12 does not divide over 8 devices.*\[8, 16\]"):
        micro_batches("sft", 12, 0, layout_of(8))
    with pytest.raises(ValueError, match=r"sft.micro_batch_size=4 does not divide over 8 devices.*\[8\]"):
        micro_batches("sft", 16, 4, layout_of(8))
    with pytest.raises(ValueError, match=r"sft.micro_batch_size=16 does not divide batch_size=24; these do: \[8, 24\]"):
        micro_batches("sft", 24, 16, layout_of(8))
    for size in (0, -8):
        with pytest.raises(ValueError, match="nearest that do"):
            micro_batches("sft", size, 0, layout_of(8))


def test_ppo_batches_must_divide_the_rollouts():
    whole = PPOConfig(rollout_batch_size=64)
    assert whole.update_size == 64 and whole.check_sizes("ppo", layout_of(8)) == 1
    halves = PPOConfig(rollout_batch_size=64, batch_size=32, micro_batch_size=8)
    assert halves.update_size == 32 and halves.check_sizes("ppo", layout_of(8)) == 4
    several = PPOConfig(rollout_batch_size=16, sample=SampleConfig(num_samples=4))
    assert several.rollouts == several.update_size == 64 and several.check_sizes("ppo", layout_of(8)) == 1
    PPOConfig(generate_rows=16).check_sizes("ppo", layout_of(8))
    with pytest.raises(ValueError, match=r"ppo.generate_rows=12 does not divide over 8 devices .* \[8, 16\]"):
        PPOConfig(generate_rows=12).check_sizes("ppo", layout_of(8))
    with pytest.raises(ValueError, match=r"ppo.rollout_batch_size=64 does not divide over 24 rollouts of ppo"):
        PPOConfig(rollout_batch_size=64, batch_size=24).check_sizes("ppo", layout_of(8))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 992])
def test_a_moving_average_decay_outside_0_to_1_is_rejected(decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay:g}: at least 0 .no average. and below 1, such as 0.992"):
        PPOConfig(ema_decay=decay)


def test_steps_are_the_configured_number_or_all_epochs():
    assert total_steps(7, 3, 10) == 7
    assert total_steps(0, 3, 10) == 30


def test_held_out_batches_are_as_large_as_the_rows_and_the_mesh_allow(finished_folder, data):
    tokenizer = prepare_tokenizer(rlhf_jax.from_pretrained(finished_folder / "base").tokenizer)
    turns = [(("user", f"{i}"),) for i in range(13)]
    rows = rows_from_examples([Example(t, "a", "", "", "", 1) for t in turns], data, tokenizer, SPECS["sft"])
    assert [batch.tokens.shape[0] for batch in held_out_batches(rows, 16, 5, layout_of(8))] == [8]
    assert [batch.tokens.shape[0] for batch in held_out_batches(rows, 4, 2, layout_of(1))] == [4, 4]
    assert held_out_batches(None, 4, 0, layout_of(1)) == []
    few = rows_from_examples([Example(turns[0], "a", "", "", "", 1)], data, tokenizer, SPECS["sft"])
    with pytest.raises(ValueError, match="1 held-out rows are fewer than the 8 devices"):
        held_out_batches(few, 16, 5, layout_of(8))


def test_rows_as_long_as_the_positions_are_accepted_and_longer_ones_rejected(finished_folder, data):
    tokenizer = prepare_tokenizer(rlhf_jax.from_pretrained(finished_folder / "base").tokenizer)
    rows = rows_from_examples([Example((("user", "a"),), "7" * 50, "", "", "", 1)], data, tokenizer, SPECS["sft"])
    size = rows.longest
    check_row_lengths("sft", rows, size)
    with pytest.raises(ValueError, match=f"sft: the longest row has {size} tokens, and the model has {size - 1} pos"):
        check_row_lengths("sft", rows, size - 1)
