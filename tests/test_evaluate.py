"""Evaluation: SFT and PPO side by side on held-out prompts."""

import json

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
from rlhf_jax.evaluate import format_report, score_sequences
from rlhf_jax.recipe import Recipe


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
    # of 12 pairs
    assert numbers["reward_accuracy"] * 12 == pytest.approx(round(numbers["reward_accuracy"] * 12))


def test_prompts_are_printed_with_both_answers_and_their_scores(evaluation):
    folder, said = evaluation
    for row in records(folder / "evaluate.jsonl")[:2]:
        assert row["prompt"][-1][1] in said
        for stage in ("sft", "ppo"):
            assert f"  {stage.upper()} (score {row[f'{stage}_score']:+.2f}, not good):" in said
    assert records(folder / "evaluate.jsonl")[2]["prompt"][-1][1] not in said  # evaluate.show is 2
    assert "over 8 held-out prompts:" in said
    assert "reward model's accuracy on held-out pairs" in said


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
