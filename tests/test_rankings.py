"""Rankings of several answers to a prompt: their rows, and the loss over all pairs of a prompt."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_tokenizer import gpt2_like

from rlhf_jax.data.batches import Batch, Batches
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import select_rows
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.config import Compute
from rlhf_jax.objectives import preference
from rlhf_jax.stages.reward import RewardConfig, check_margins, reward_objective

NAN = float("nan")


def losses_by_hand(scores, given, smoothing, centring, coefficient):
    """The mean over rankings of the mean over their pairs, in plain loops."""
    rankings = []
    for found, ranks in zip(scores, given, strict=True):
        each = []
        for i, j in itertools.permutations(range(len(found)), 2):
            if ranks[i] > ranks[j]:
                d = found[i] - found[j] - coefficient * (ranks[i] - ranks[j])
                right, wrong = np.log1p(np.exp(-d)), np.log1p(np.exp(d))
                each.append((1 - smoothing) * right + smoothing * wrong + centring * (found[i] + found[j]) ** 2)
        rankings += [np.mean(each)] if each else []
    return np.mean(rankings)


def batch_of(given, seed=0):
    """Ragged sequences of three tokens of prompt and up to six of answer, with these scores [B, K]."""
    rng = np.random.default_rng(seed)
    given = np.array(given, np.float32)
    mask = np.arange(10) < rng.integers(4, 11, (*given.shape, 1))
    tokens = np.where(mask, rng.integers(1, 60, mask.shape), 0).astype(np.int32)
    return Batch(tokens, mask, mask & (np.arange(10) >= 3), scores=given)


GIVEN = [[3.0, 2.5, 0.0, -1.0], [1.0, 1.0, 0.5, NAN], [2.0, 1.0, NAN, NAN]]


def test_the_loss_of_rankings_is_that_of_loops_over_their_pairs_and_its_gradient_reaches_no_filler():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)

    @jax.jit
    def loss(scores, coefficient=0.3):
        better, worse, counts = preference.ranking_pairs(scores, jnp.asarray(GIVEN))
        given = preference.ranking_pairs(jnp.asarray(GIVEN), jnp.asarray(GIVEN))
        wanted = coefficient * jnp.where(counts, given[0] - given[1], 0.0)
        return preference.mean_of_rankings(preference.pairwise_losses(better, worse, 0.1, 0.01, wanted), counts)

    expected = losses_by_hand(np.asarray(scores, np.float64), GIVEN, 0.1, 0.01, 0.3)
    assert loss(scores).item() == pytest.approx(expected, rel=1e-6)
    gradient = jax.grad(loss)(scores)
    assert (gradient[1, 3], *gradient[2, 2:]) == (0.0, 0.0, 0.0) and float(jnp.abs(gradient[:2, :3]).min()) > 1e-4
    for i, j in np.ndindex(3, 4):
        step = jnp.zeros((3, 4)).at[i, j].set(1e-2)
        assert float(loss(scores + step) - loss(scores - step)) / 2e-2 == pytest.approx(float(gradient[i, j]), abs=1e-3)
    nothing = preference.mean_of_rankings(jnp.full((2, 6), NAN), jnp.zeros((2, 6), bool))
    assert nothing.item() == 0.0


def test_one_row_of_all_answers_gives_the_loss_of_every_pair_as_a_row_of_its_own():
    settings = RewardConfig(label_smoothing=0.1, centring=0.02, margin_coef=0.4)
    config, mesh = tiny.scalar(tiny.LLAMA), tiny.mesh_of("one")
    params, layout = tiny.random_params(config, mesh), Layout(mesh, TRAIN)
    objective = reward_objective(config, Compute(np.dtype("float32"), "none"), layout, settings)
    batch, whole = batch_of(GIVEN), jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (loss, (weight, stats)), gradient = whole(params, layout.put_batch(batch))
    total, mean, accuracy = 0.0, jax.tree.map(jnp.zeros_like, gradient), 0.0
    for row, ranks in enumerate(GIVEN):
        pairs = [(i, j) for i, j in itertools.combinations(range(4), 2) if ranks[i] > ranks[j]]
        parts = [getattr(batch, name)[row][np.array(pairs)] for name in ("tokens", "mask", "loss_mask", "scores")]
        each = Batch(*parts[:3], scores=parts[3])
        (value, (count, numbers)), slope = whole(params, layout.put_batch(each))
        assert count == len(pairs)
        total, accuracy = total + value / 3, accuracy + numbers["accuracy"] / 3
        mean = jax.tree.map(lambda a, b: a + b / 3, mean, slope)
    assert (weight, loss.item()) == (3, pytest.approx(total.item(), rel=1e-5))
    assert stats["accuracy"].item() == pytest.approx(accuracy.item())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, mean)
    found = objective.summarize([np.asarray(objective.measure(params, batch))], [batch])
    lengths = batch.mask.sum(-1)
    longer = [
        np.sign(int(lengths[row, i]) - int(lengths[row, j])) / 2 + 0.5
        for row, ranks in enumerate(GIVEN)
        for i, j in itertools.combinations(range(4), 2)
        if ranks[i] > ranks[j]
    ]
    assert len(longer) == 9 and found["held_out_longer_is_chosen"] == pytest.approx(np.mean(longer))


ROWS = [
    {"prompt": "one", "answers": ["bad", "best", "good"], "scores": [1, 9, 4]},
    {"prompt": "two", "answers": ["yes", "no"], "scores": [0.5, 2]},
    {"prompt": "three", "answers": ["x", "y"], "scores": [1, 1]},
    {"prompt": "four", "answers": list("abcde"), "scores": [1, 2, 3, 4, 5]},
]


def rows_of(tmp_path, rows, spec, **source):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        (SourceConfig(str(path), **source),), {"reward": 1}, held_out=0.0, cache_dir=str(tmp_path / "cache")
    )
    return select_rows(data, prepare_tokenizer(gpt2_like(pad_token="<s>")), spec, held_out=False)


def texts(batch, row):
    tokenizer = gpt2_like(pad_token="<s>")
    return [
        tokenizer.decode(ids[learned], skip_special_tokens=True).strip()
        for ids, learned in zip(batch.tokens[row], batch.loss_mask[row], strict=True)
    ]


def test_a_ranking_is_one_row_of_its_answers_best_first_and_of_fillers_without_a_score(tmp_path):
    ranking = dict(format="ranking", scores=("scores",))
    rows = rows_of(tmp_path, ROWS, RowSpec("ranking", "reward", answers=4), **ranking)
    assert "over 4 answers" in rows.report and "answers of one rank" in rows.report and len(rows) == 2
    batch = Batches(rows, batch_size=2, seed=0, shuffle=False)[0]
    assert batch.tokens.shape[:2] == batch.scores.shape == (2, 4)
    np.testing.assert_array_equal(batch.scores, [[9, 4, 1, NAN], [2, 0.5, NAN, NAN]])
    assert texts(batch, 0) == ["best", "good", "bad", "bad"] and texts(batch, 1) == ["no", "yes", "yes", "yes"]
    pairs = rows_of(tmp_path, ROWS, RowSpec("pair", "reward"), **ranking)
    found = Batches(pairs, batch_size=len(pairs), seed=0, shuffle=False)[0].scores.tolist()
    assert sorted(found[:4]) == [[2, 0.5], [4, 1], [9, 1], [9, 4]] and len(pairs) == 4 + 10


def test_the_margin_of_a_pair_is_read_from_its_field_and_needed_by_its_coefficient(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "better_by": 2.5}]
    spec = RowSpec("pair", "reward")
    assert Batches(rows_of(tmp_path, rows, spec, margin="better_by"), batch_size=1, seed=0)[0].scores.tolist() == [
        [2.5, 0]
    ]
    assert Batches(rows_of(tmp_path, rows, spec), batch_size=1, seed=0)[0].scores.tolist() == [[1, 0]]
    as_ranking = rows_of(tmp_path, rows, RowSpec("ranking", "reward", answers=3), margin="better_by")
    np.testing.assert_array_equal(Batches(as_ranking, batch_size=1, seed=0)[0].scores, [[2.5, 0, NAN]])
    place = SourceConfig(str(tmp_path / "rows.jsonl"), format="fields")
    # Llama 2 gives pairs that are "negligibly better" the margin 0: they are learned all the same.
    for sparse in (False, True):
        found = rows_of(tmp_path, [rows[0] | {"better_by": 0}], spec, margin="better_by", sparse=sparse)
        (pair,) = Batches(found, batch_size=1, seed=0)[0].scores
        assert preference.ranking_pairs(pair[None], pair[None])[2].tolist() == [[True]] and pair[0] - pair[1] < 1e-29
    for wrong in (-1, "inf"):
        with pytest.raises(ValueError, match="'better_by' must be a margin of at least 0"):
            rows_of(tmp_path, [rows[0] | {"better_by": wrong}], spec, margin="better_by")
    with pytest.raises(ValueError, match="margin_coef needs margins, and .*rows.jsonl has none: name its field"):
        check_margins(DataConfig((place,)))
    with pytest.raises(ValueError, match="answers at least 2"):
        RewardConfig(answers=1)
