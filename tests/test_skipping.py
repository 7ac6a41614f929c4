"""Steps whose loss or gradient is not finite: what they leave, how they are reported, and when they end a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_recipe
from test_engine import CASES, LENGTHS, WIDTH, engine_of
from test_loss_scale import OPTIM
from test_train_step import copy_to_host

import rlhf_jax.stages.supervised
from rlhf_jax.mesh import train_layout
from rlhf_jax.models.decoder import Leaf
from rlhf_jax.optim import make_optimizer
from rlhf_jax.skipping import describe_skips
from rlhf_jax.train_step import init_state, make_update

LEAVES = {path: Leaf((1,), (None,)) for path in ("a", "b", "c")}


def three_weights(offload=False, name="one"):
    """loss = mean of x (a + b) + y c: NaN in x spoils the loss and the gradients of a and b, in z the loss alone."""
    layout = train_layout(tiny.mesh_of(name), 3, offload_moments=offload)

    def loss_fn(params, batch):
        loss = batch["x"] * (params["a"] + params["b"]) + batch["y"] * params["c"]
        return loss.mean() + jax.lax.stop_gradient(batch["z"].mean()), (batch["x"].shape[0], {})

    tx = make_optimizer(OPTIM, 10)
    start = {path: layout.put(np.array([1.0], np.float32), None) for path in LEAVES}
    update = make_update(loss_fn, tx, LEAVES, layout, 2)
    return update, init_state(start, tx, LEAVES, layout), layout


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("spoiled", "wrong", "described"),
    [
        ("x", [True, True, False], "the gradient of a, b (2 of 3 parameters)"),
        ("y", [False, False, True], "the gradient of c (1 of 3 parameters)"),
        ("z", [False, False, False], "the loss or the norm of all gradients together"),
    ],
)
def test_a_step_in_float32_that_is_not_finite_changes_nothing_and_names_the_parameters(
    offload, spoiled, wrong, described
):
    update, state, layout = three_weights(offload)
    good = {name: np.arange(4, dtype=np.float32) for name in "xyz"}
    bad = good | {spoiled: np.array([0, 1, np.nan, 3], np.float32)}
    state, stats = update(state, {}, layout.put_batch(good))
    assert (int(stats["skipped_steps"]), int(state.step)) == (0, 1)
    before = copy_to_host(dataclasses.replace(state, skips=None))
    for number in (1, 2):
        state, stats = update(state, {}, layout.put_batch(bad))
        after = copy_to_host(dataclasses.replace(state, skips=None))
        jax.tree.map(np.testing.assert_array_equal, after, before)
        assert [int(x) for x in (stats["skipped_steps"], state.skips.total, state.skips.in_a_row)] == [number] * 3
        assert np.isnan(float(stats["loss"]))
    assert state.skips.wrong.tolist() == wrong and describe_skips(state.skips, list(LEAVES)) == described
    state, stats = update(state, {}, layout.put_batch(good))
    assert (int(state.step), int(state.skips.total), int(state.skips.in_a_row)) == (2, 2, 0)
    assert float(state.trainable["c"][0]) != float(before.trainable["c"][0])


def test_without_wrong_values_a_skipping_step_gives_the_bits_of_one_that_applies_every_update():
    update, state, layout = three_weights()
    batch = {name: np.random.default_rng(0).normal(size=8).astype(np.float32) for name in "xyz"}
    tx, grads = make_optimizer(OPTIM, 10), {}
    grads = {path: jnp.array([batch["y" if path == "c" else "x"].mean()], jnp.float32) for path in LEAVES}
    params, opt_state = copy_to_host(state.trainable), copy_to_host(state.opt_state)
    state, _ = update(state, {}, layout.put_batch(batch))
    updates, _ = tx.update(grads, opt_state, params)
    for path in LEAVES:
        np.testing.assert_allclose(np.asarray(state.trainable[path]), params[path] + updates[path], rtol=1e-6)


def spoil_batches(patch, chosen):
    """Makes the loss of these supervised steps NaN, as a fault of the device would."""
    make_programs = rlhf_jax.stages.supervised.make_programs
    count = iter(range(10**6))

    def make(objective, *args, **options):
        def loss(params, batch):
            value, rest = objective.loss(params, batch)
            return value * jnp.where(batch.tokens[0, -1] < 0, jnp.nan, 1.0), rest

        update, measure = make_programs(objective._replace(loss=loss), *args, **options)

        def call(state, frozen, batch):
            if next(count) in chosen:
                batch = dataclasses.replace(batch, tokens=batch.tokens.at[0, -1].set(-1))
            return update(state, frozen, batch)

        return call, measure

    patch.setattr(rlhf_jax.stages.supervised, "make_programs", make)


def test_a_score_that_is_not_finite_skips_the_updates_of_actor_and_critic():
    engine, state, frozen = engine_of("llama", tiny.mesh_of("one"))
    prompts = tiny.prompts(tiny.FAMILIES[CASES["llama"][0]], LENGTHS, WIDTH)
    rollout = engine.generate(engine.publish(state.actor.params(frozen.actor)), *prompts, jax.random.key(7))
    reward = dict(frozen.reward)
    reward["score/kernel"] = reward["score/kernel"] * jnp.nan
    experience = engine.score(state, dataclasses.replace(frozen, reward=reward), rollout)
    assert np.isnan(np.asarray(experience.score)).all()
    before = copy_to_host((state.actor.trainable, state.critic.trainable))
    state, stats = engine.update(state, frozen, experience)
    jax.tree.map(np.testing.assert_array_equal, copy_to_host((state.actor.trainable, state.critic.trainable)), before)
    assert (int(stats["actor_skipped_steps"]), int(stats["critic_skipped_steps"])) == (1, 1)


SHORT = ("sft.steps=6", "sft.eval_batches=0", "run.save_every=1", "run.keep=3")


def test_a_single_bad_step_is_skipped_counted_and_named_and_its_batch_is_kept(tmp_path, capsys):
    recipe, run = tiny_recipe.write_recipe(tmp_path), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        spoil_batches(patch, {2})
        assert tiny_recipe.run("sft", recipe, f"run.dir={run}", *SHORT) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert said.startswith("sft 3: skipped, not finite: the gradient of ") and "parameters); its batch is kept" in said
    rows = tiny_recipe.records(run / "sft/metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["step"] for row in rows if row["loss"] == "nan"] == [3] and json.dumps(rows)
    kept = np.load(run / "sft/bad_batches/000003.npz")
    assert {"tokens", "mask", "loss_mask"} == set(kept) and kept["tokens"].shape[0] == 8 and kept["tokens"].min() >= 0
    exported = tiny_recipe.tensors(run / "sft/export").values()
    assert all(np.isfinite(tensor).all() for tensor in exported)


def test_bad_steps_in_a_row_end_the_run_with_the_checkpoint_before_them(tmp_path, capsys):
    recipe, run = tiny_recipe.write_recipe(tmp_path), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        spoil_batches(patch, {2, 3, 4, 5})
        assert tiny_recipe.run("sft", recipe, f"run.dir={run}", "run.max_skipped=2", *SHORT) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("rlhf-jax: sft step 4: 2 optimizer steps in a row were skipped (run.max_skipped), not fin")
    assert "lower the learning rate" in error and error.endswith("the checkpoint before them is kept")
    assert sorted(path.name for path in (run / "sft/checkpoints").iterdir()) == ["1", "2"]
    assert len(list((run / "sft/bad_batches").iterdir())) == 2
    # Where the fault does not come back, the same command continues from the good checkpoint.
    assert tiny_recipe.run("sft", recipe, f"run.dir={run}", *SHORT) == 0
    assert "sft: resumed at step 2 of 6" in capsys.readouterr().err
    assert list((run / "sft/bad_batches").iterdir()) == []
    assert tiny_recipe.records(run / "sft/metrics.jsonl")[-1]["skipped_steps"] == 0
