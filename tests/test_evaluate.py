"""Evaluation: SFT and PPO side by side on held-out prompts."""

import json

import jax
import numpy as np
import pytest
import tiny
import tiny_recipe
from row_specs import SPECS
from tiny_recipe import records

import rlhf_jax
from rlhf_jax.config import load_config
from rlhf_jax.data.selection import read_examples
from rlhf_jax.data.splits import prompt_key
from rlhf_jax.evaluate import (
    EvaluateConfig,
    format_report,
    held_out_demonstrations,
    policy_folders,
    sample_texts,
    score_sequences,
)
from rlhf_jax.likelihood import answer_kl, is_own_distribution
from rlhf_jax.recipe import Recipe
from rlhf_jax.scoring import best_of, pair_accuracy, win_rate
from rlhf_jax.stages.run_folder import RunConfig


@pytest.fixture
def finished_folder(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """(run folder, printed text)."""
    folder = tiny_recipe.finished_run(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *args, **options: said.append(" ".join(map(str, args))))
        assert tiny_recipe.run("evaluate", folder.parent / "tiny.toml", f"run.dir={folder}") == 0
    return folder, "\n".join(said)


def test_the_metrics_and_all_answers_are_written(evaluation):
    folder, _ = evaluation
    numbers, rows = json.loads((folder / "evaluate.json").read_text()), records(folder / "evaluate.jsonl")
    assert numbers["prompts"] == len(rows) == 8
    for stage in ("sft", "ppo"):
        assert numbers[f"{stage}_score"] == pytest.approx(np.mean([row[f"{stage}_score"] for row in rows]), abs=1e-5)
        assert numbers[f"{stage}_good"] == np.mean([row[f"{stage}_good"] for row in rows])
        assert 1 <= numbers[f"{stage}_length"] <= 12
        assert 0 <= numbers[f"{stage}_ended"] <= 1
    wins = [np.sign(row["ppo_score"] - row["sft_score"]) / 2 + 0.5 for row in rows]
    assert numbers["ppo_win_rate"] == np.mean(wins)
    pairs = numbers["reward_pairs"]
    assert pairs["pairs"] == 12 == sum(part["pairs"] for part in pairs["by_length"]) and "by_source" not in pairs
    assert numbers["reward_accuracy"] == pairs["accuracy"] == pytest.approx(round(pairs["accuracy"] * 12) / 12)
    low, high = numbers["ppo_kl_interval"]
    assert low < numbers["ppo_kl"] < high and "sft_kl" not in numbers


def test_the_perplexity_is_that_of_the_answers_of_held_out_demonstrations(evaluation):
    folder, _ = evaluation
    data = load_config(folder / "config.toml", [], Recipe).data
    numbers = json.loads((folder / "evaluate.json").read_text())
    for stage in ("sft", "ppo"):
        model = rlhf_jax.from_pretrained(folder / stage / "export")
        batch = held_out_demonstrations(model.tokenizer, "sft", data, 256)
        logits = np.asarray(rlhf_jax.apply(model, batch.tokens, batch.mask), np.float64)[:, :-1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(logprobs, batch.tokens[:, 1:, None], axis=2)[..., 0]
        expected = np.exp(-chosen[batch.loss_mask[:, 1:]].mean())
        assert numbers[f"{stage}_perplexity"] == pytest.approx(expected, rel=1e-5) and expected > 2
    assert held_out_demonstrations(model.tokenizer, "sft", data, 0) is None


def test_the_kl_of_answers_is_the_mean_difference_of_log_probabilities_of_both_models(finished_folder):
    policy, reference = (rlhf_jax.from_pretrained(finished_folder / name / "export") for name in ("ppo", "sft"))
    prompts = np.random.default_rng(0).integers(3, 300, (6, 9)).astype(np.int32)
    real = np.arange(9) >= np.array([0, 3, 5, 1, 0, 8])[:, None]
    sample = rlhf_jax.SampleConfig(max_new_tokens=5)
    rollout = jax.tree.map(np.asarray, rlhf_jax.generate(policy, prompts, real, sample, jax.random.key(1)))
    differences = []
    for row in range(6):
        start = [rollout.prompts[row][rollout.prompt_mask[row]], rollout.tokens[row][rollout.mask[row]]]
        tokens = np.concatenate(start)[None]
        sums = []
        for model in (policy, reference):
            logits = np.asarray(rlhf_jax.apply(model, tokens, np.ones_like(tokens, bool)), np.float64)[0]
            logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            sums.append(sum(logprobs[at - 1, tokens[0, at]] for at in range(len(start[0]), tokens.shape[1])))
        differences.append(sums[0] - sums[1])
    mean, low, high = answer_kl(reference, rollout, 4)
    assert mean == pytest.approx(np.mean(differences), abs=1e-5) and abs(mean) > 1e-4
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(differences, ddof=1) / np.sqrt(6), rel=1e-3)
    assert answer_kl(policy, rollout, 4)[0] == pytest.approx(0.0, abs=1e-5)
    assert is_own_distribution(sample) and not is_own_distribution(rlhf_jax.SampleConfig(5, temperature=0.5))


def test_the_accuracy_on_pairs_is_given_by_length_and_source_next_to_that_of_the_longer_answer():
    scores = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [4.0, 1.0], [1.0, 1.0], [0.0, 5.0], [2.0, 0.0], [9.0, 1.0]])
    lengths = np.array([[5, 1], [9, 2], [3, 9], [4, 4], [1, 2], [2, 1], [3, 9], [7, 9]])
    found = pair_accuracy(scores, lengths, ["a"] * 6 + ["b"] * 2)
    assert (found["pairs"], found["accuracy"], found["longer"]) == (8, 5.5 / 8, 3.5 / 8)
    assert found["accuracy_interval"] == list(win_rate(scores[:, 0], scores[:, 1])[1:])
    assert [(part["from"], part["to"]) for part in found["by_length"]] == [(-6, -6), (-2, -1), (0, 1), (4, 7)]
    assert [part["accuracy"] for part in found["by_length"]] == [1.0, 0.75, 0.5, 0.5]
    assert [part["longer"] for part in found["by_length"]] == [0.0, 0.0, 0.75, 1.0]
    assert {name: (part["pairs"], part["accuracy"]) for name, part in found["by_source"].items()} == {
        "a": (6, 3.5 / 6),
        "b": (2, 1.0),
    }
    lengths = np.array([[1, 3], *[[2, 2]] * 5, [3, 2], [4, 2]])
    by_length = pair_accuracy(scores, lengths, ["a"] * 8)["by_length"]
    assert [(part["from"], part["to"], part["pairs"]) for part in by_length] == [(-2, -2, 1), (0, 0, 5), (1, 2, 2)]
    assert best_of(np.array([1.0, 3.0, 2.0, 5.0, 5.0, 0.0]), 3).tolist() == [1, 3]


def test_prompts_are_printed_with_both_answers_and_their_scores(evaluation):
    folder, said = evaluation
    for row in records(folder / "evaluate.jsonl")[:2]:
        assert row["prompt"][-1][1] in said
        for stage in ("sft", "ppo"):
            assert f"  {stage.upper()} (score {row[f'{stage}_score']:+.2f}, not good):" in said
    assert records(folder / "evaluate.jsonl")[2]["prompt"][-1][1] not in said  # evaluate.show is 2
    assert "over 8 held-out prompts:" in said
    assert "reward model's accuracy on held-out pairs" in said and "the longer answer is chosen" in said
    assert "perplexity of demonstrations" in said and "KL to SFT, nats per answer" in said


def test_no_evaluation_prompt_is_trained_on_in_any_stage(evaluation):
    folder, _ = evaluation
    data = load_config(folder / "config.toml", [], Recipe).data
    asked = {prompt_key(tuple(map(tuple, row["prompt"]))) for row in records(folder / "evaluate.jsonl")}
    for stage in ("sft", "reward", "ppo"):
        trained = {prompt_key(example.turns) for example in read_examples(data, SPECS[stage], held_out=False)}
        assert asked & trained == set()


def test_repeating_the_evaluation_on_one_or_eight_devices_gives_the_same_answers(evaluation):
    folder, _ = evaluation
    before = (folder / "evaluate.jsonl").read_bytes()
    recipe = folder.parent / "tiny.toml"
    assert tiny_recipe.run("evaluate", recipe, f"run.dir={folder}") == 0
    assert (folder / "evaluate.jsonl").read_bytes() == before
    assert tiny_recipe.run("evaluate", recipe, f"run.dir={folder}", "mesh.fsdp=4", "mesh.tensor=2", devices=8) == 0
    for line, old in zip(records(folder / "evaluate.jsonl"), before.decode().splitlines(), strict=True):
        assert line["ppo_answer"] == json.loads(old)["ppo_answer"]


def test_an_evaluation_uses_the_configured_attention(finished_folder, capsys):
    recipe = finished_folder.parent / "tiny.toml"
    assert tiny_recipe.run("evaluate", recipe, f"run.dir={finished_folder}", "model.attention=cudnn") == 2
    assert 'model.attention="cudnn" is impossible: fused attention runs on GPUs' in capsys.readouterr().err


def test_requested_fused_attention_is_rejected_for_rows_that_do_not_divide(finished_folder):
    scorer = rlhf_jax.reward_from_pretrained(finished_folder / "reward/export", mesh=tiny.mesh_of("fsdp4-tensor2"))
    with pytest.raises(ValueError, match='wants rows that 8 devices divide, and there are 3: pad them, or set "auto"'):
        rlhf_jax.score(scorer, np.ones((3, 4), np.int32), np.ones((3, 4), bool), attention="cudnn")


def test_a_score_does_not_depend_on_padding_or_on_other_rows_of_the_batch(finished_folder):
    scorer = rlhf_jax.reward_from_pretrained(finished_folder / "reward/export")
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(3, 300, (5, 12)).astype(np.int32), np.zeros((5, 12), bool)
    for row, size in enumerate((3, 12, 7, 5, 9)):
        mask[row, :size] = True
    alone = [
        float(rlhf_jax.score(scorer, tokens[i : i + 1, : mask[i].sum()], mask[i : i + 1, mask[i]])[0]) for i in range(5)
    ]
    np.testing.assert_allclose(score_sequences(scorer, tokens, mask, 2), alone, rtol=1e-5, atol=1e-6)
    # 200 columns are more than the model's 160 positions, but no row has more than 160 tokens.
    wide = [np.pad(x, ((0, 0), (150, 38))) for x in (tokens, mask)]
    np.testing.assert_allclose(score_sequences(scorer, *wide, 4), alone, rtol=1e-5, atol=1e-6)


def test_data_without_a_judge_have_no_share_of_good_answers():
    records = [
        {"prompt": (("user", "Hm?"),), "sft_answer": "a", "ppo_answer": "b", "sft_score": -1.0, "ppo_score": 2.0}
    ]
    numbers = {"ppo_win_rate": 1.0, "ppo_win_rate_interval": [0.25, 1.0], "reward_accuracy": 0.75}
    for stage, score in (("sft", -1.0), ("ppo", 2.0)):
        numbers |= {f"{stage}_score": score, f"{stage}_length": 1.0, f"{stage}_ended": 0.5}
    reported = format_report(("sft", "ppo"), records, numbers, 1)
    assert "good" not in reported
    assert "  SFT (score -1.00): a\n  PPO (score +2.00): b" in reported
    assert "75.0%" in reported and "100.0% (95% interval 25.0% to 100.0%" in reported


def test_moving_averages_are_policies_of_their_own_after_the_stage_that_made_them(tmp_path):
    for folder in ("sft/export", "ppo/export", "ppo/export_ema", "grpo/export"):
        (tmp_path / folder).mkdir(parents=True)
    found = policy_folders(RunConfig(str(tmp_path)), ["sft", "ppo", "grpo"])
    assert list(found) == ["sft", "ppo", "ppo_ema", "grpo"] and found["ppo_ema"] == tmp_path / "ppo/export_ema"


@pytest.mark.parametrize(
    ("keys", "fix"),
    [
        (dict(best_of=0), "best_of: each at least 1"),
        (dict(sample=rlhf_jax.SampleConfig(num_samples=2)), "set 1, and best_of"),
        (dict(best_of=2, sample=rlhf_jax.SampleConfig(temperature=0.0)), "set sample.temperature"),
    ],
)
def test_an_evaluation_of_several_answers_needs_different_ones(keys, fix):
    with pytest.raises(ValueError, match=fix):
        EvaluateConfig(**keys)


def test_an_unfinished_run_is_not_evaluated(tmp_path, capsys):
    recipe = tiny_recipe.write_recipe(tmp_path)
    assert tiny_recipe.run("evaluate", recipe, f"run.dir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert error == (
        f"rlhf-jax: {tmp_path / 'run'}: sft, ppo, reward not finished (no export folder): run `rlhf-jax train` first\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_policy_or_a_scorer_is_not_evaluated(tmp_path, capsys):
    recipe = tiny_recipe.write_recipe(tmp_path)
    assert tiny_recipe.run("evaluate", recipe, f"run.dir={tmp_path / 'run'}", 'run.stages=["sft"]') == 2
    needs = "stages that export a policy and a scorer, or a policy and evaluate.reward=FILE.py:FUNCTION"
    reported = f"run.stages = ['sft']: evaluate needs {needs}"
    assert capsys.readouterr().err == f"rlhf-jax: {reported}\n"


def test_a_run_is_not_evaluated_on_data_whose_held_out_part_it_may_have_trained_on(finished_folder, capsys):
    recipe = finished_folder.parent / "tiny.toml"
    assert tiny_recipe.run("evaluate", recipe, f"run.dir={finished_folder}", "data.held_out=0.5") == 2
    error = capsys.readouterr().err
    assert "was trained on other data (data.held_out: 0.15 -> 0.5)" in error
    assert error.count("\n") == 1


def test_prompts_of_several_lengths_are_answered_in_small_batches_as_in_a_large_one(finished_folder):
    policy = rlhf_jax.from_pretrained(finished_folder / "sft/export")
    sizes = np.array([3, 40, 5, 4, 9])
    mask = np.arange(48) >= 48 - sizes[:, None]
    tokens = np.where(mask, np.random.default_rng(0).integers(10, 100, mask.shape), 0)
    greedy = rlhf_jax.SampleConfig(max_new_tokens=4, temperature=0.0)
    large, small = (sample_texts(policy, tokens, mask, EvaluateConfig(batch_size=n, sample=greedy)) for n in (5, 2))
    assert large[1] == small[1] and (large[0].tokens == small[0].tokens).all()
    assert [row[real].tolist() for row, real in zip(small[0].prompts, small[0].prompt_mask, strict=True)] == [
        row[real].tolist() for row, real in zip(tokens, mask, strict=True)
    ]
