"""The library's engine: gradients, sampling and scoring, saved states, and what wrong inputs are answered with."""

import dataclasses
import functools
import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_processes

import rlhf_jax
from rlhf_jax.data.batches import Batch
from rlhf_jax.engine import (
    Architectures,
    EngineState,
    Execution,
    FrozenParams,
    Optimizers,
    Sampling,
    make_hybrid_engine,
)
from rlhf_jax.library import Engine
from rlhf_jax.library.states import bit_sum
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, bind, logits
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.lora import NO_LORA, is_adapter
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.objectives import grpo, masked
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.grpo import GRPOConfig, grpo_algorithm
from rlhf_jax.stages.sft import sft_objective
from rlhf_jax.train_step import init_state, make_update

EOS = (3, 15, 24, 39)
SGD = optax.sgd(1.0)  # parameters before a step minus those after it are the gradient
ADAM = make_optimizer(OptimConfig(0.02, "constant", eps=1e-3, clip_norm=0.5), 10)


def model_on(mesh="one", config=tiny.LLAMA, seed=0) -> Pretrained:
    there = tiny.mesh_of(mesh)
    params = tiny.random_params(config, there, seed)
    return Pretrained(config, params, None, {}, {"eos_token_id": list(EOS)}, Layout(there, TRAIN), "base")


@functools.lru_cache
def engine_on(mesh="one", lora=NO_LORA, micro=0, tx=SGD) -> tuple[Engine, Pretrained]:
    model = model_on(mesh)
    engine = rlhf_jax.make_engine(model, tx, lora=lora, logprob_chunk=4, micro_batch_size=micro, remat="none")
    return engine, model


def rows_of(count=16, seed=0) -> list[dict]:
    """Ragged rows of 2 to 12 tokens, the first 1 to 10 of which are a prompt."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        size = rng.integers(2, 13)
        prompt = rng.integers(1, max(2, size - 2))
        rows.append(
            dict(
                tokens=rng.integers(0, 61, size).tolist(),
                loss_mask=[0] * prompt + [1] * (size - prompt),
                old=np.where(np.arange(size) < prompt, 0, -4 + rng.normal(size=size)),
                gain=float(rng.normal()),
            )
        )
    return rows


def batch_of(count=16, seed=0, length=16):
    return rlhf_jax.pad_rows(rows_of(count, seed), length)


def part(batch, start, stop):
    return {name: array[start:stop] for name, array in batch.items()}


def clip_losses(logprobs, batch):
    ratio = grpo.log_ratios(logprobs, batch["old"], batch["loss_mask"], "token")
    losses = grpo.clipped_losses(ratio, batch["gain"][:, None], low=0.2, high=0.2)
    return losses, {"ratio": jnp.exp(ratio)}


def token_loss(logprobs, batch):
    losses, stats = clip_losses(logprobs, batch)
    return masked.mean(losses, batch["loss_mask"]), {k: masked.mean(v, batch["loss_mask"]) for k, v in stats.items()}


def row_loss(logprobs, batch):
    losses, mask = clip_losses(logprobs, batch)[0], batch["loss_mask"]
    return ((losses * mask).sum(axis=1) / mask.sum(axis=1)).mean(), {"gain": batch["gain"].mean()}


def sum_loss(logprobs, batch):
    losses = clip_losses(logprobs, batch)[0] * batch["loss_mask"]
    return losses.sum() / 70.0, {"tokens": batch["loss_mask"].sum()}


LOSSES = {"tokens": token_loss, "rows": row_loss, "sum": sum_loss}


def direct_gradient(params, batch, loss, config=tiny.LLAMA):
    """Loss and gradient of one large batch, through whole logits and without any part of the library."""

    def value(params):
        hidden, _ = bind(config, params)(batch["tokens"], batch["mask"], Compute(jnp.dtype("float32"), "none"), None)
        every = jax.nn.log_softmax(logits(config, params, hidden))[:, :-1]
        chosen = jnp.take_along_axis(every, batch["tokens"][:, 1:, None], axis=2)[..., 0]
        return loss(jnp.where(batch["mask"], jnp.pad(chosen, ((0, 0), (1, 0))), 0.0), batch)[0]

    return jax.jit(jax.value_and_grad(value))(params)


@functools.lru_cache
def direct(over):
    return jax.device_get(direct_gradient(model_on().params, batch_of(), LOSSES[over]))


def gradient(engine, model, calls, over, loss=None):
    """(metrics of the calls, metrics of the step, gradient) of several calls and one step of gradient descent."""
    state, stats = engine.init(model), []
    before = jax.device_get(state.train.trainable)
    for batch in calls:
        state, each = engine.forward_backward(state, batch, loss or LOSSES[over], over=over)
        stats.append(each)
    state, step = engine.optim_step(state)
    after = jax.device_get(state.train.trainable)
    return jax.device_get(stats), jax.device_get(step), {path: before[path] - after[path] for path in before}


def assert_same_gradient(found, expected, atol=2e-6):
    assert max(np.abs(each).max() for each in expected.values()) > 0.05
    for path, each in expected.items():
        np.testing.assert_allclose(found[path], each, atol=atol, err_msg=path)


@pytest.mark.parametrize("over", LOSSES)
@pytest.mark.parametrize(
    ("mesh", "micro", "cuts"), [("one", 0, (0, 16)), ("one", 4, (0, 4, 16)), ("fsdp4-tensor2", 8, (0, 8, 16))]
)
def test_any_calls_micro_batches_and_devices_give_the_gradient_of_one_large_batch(over, mesh, micro, cuts):
    batch, (loss, expected) = batch_of(), direct(over)
    calls = [part(batch, *each) for each in zip(cuts[:-1], cuts[1:], strict=True)]
    stats, step, found = gradient(*engine_on(mesh, micro=micro), calls, over)
    assert_same_gradient(found, expected)
    assert float(step["loss"]) == pytest.approx(loss, abs=1e-5)
    assert float(step["grad_norm"]) == pytest.approx(np.sqrt(sum((g**2).sum() for g in expected.values())), rel=1e-4)
    weights = [{"tokens": each["loss_mask"].sum(), "rows": len(each["tokens"]), "sum": 1}[over] for each in calls]
    whole = sum(w * each["loss"] for w, each in zip(weights, stats, strict=True)) / (
        1 if over == "sum" else sum(weights)
    )
    assert whole == pytest.approx(loss, abs=1e-5), "losses of the calls combine to that of all"
    if over == "sum":
        assert sum(each["tokens"] for each in stats) == batch["loss_mask"].sum()


OPTIMIZERS = {
    "adafactor": optax.adafactor(0.02, min_dim_size_to_factor=8),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, eps=1e-3),
    "multi": optax.multi_transform(
        {"layers": optax.adam(0.02, eps=1e-3), "others": optax.sgd(1.0)},
        lambda params: {path: "layers" if path.startswith("layers/") else "others" for path in params},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_whose_state_has_other_shapes_take_the_same_steps_on_eight_devices(name):
    found = []
    for mesh in ("one", "fsdp4-tensor2"):
        engine, model = (
            rlhf_jax.make_engine(model_on(mesh), OPTIMIZERS[name], logprob_chunk=4, remat="none"),
            model_on(mesh),
        )
        state = engine.init(model)
        for _ in range(2):
            state, _ = engine.forward_backward(state, batch_of(), token_loss)
            state, _ = engine.optim_step(state)
        found.append(jax.device_get(state.train.trainable))
    start = jax.device_get(model.params)
    assert min(np.abs(found[0][path] - leaf).max() for path, leaf in start.items()) > 1e-3
    for path, leaf in found[0].items():
        np.testing.assert_allclose(found[1][path], leaf, atol=1e-4, err_msg=path)


def test_padding_changes_no_gradient():
    engine, model = engine_on()
    wide = gradient(engine, model, [batch_of(length=24)], "tokens")[2]
    assert_same_gradient(wide, direct("tokens")[1])


def test_a_step_equals_that_of_the_supervised_stage():
    batch, (engine, model) = batch_of(), engine_on(tx=ADAM, micro=4)
    compute, layout = Compute(jnp.dtype("float32"), "none", 4), model.layout
    objective = sft_objective(tiny.LLAMA, compute, layout)
    theirs = init_state(model_on().params, ADAM, abstract_params(tiny.LLAMA), layout)
    update = make_update(objective.loss, ADAM, abstract_params(tiny.LLAMA), layout, 4)
    state = engine.init(model)

    def likelihood(logprobs, batch):
        return -masked.mean(logprobs, batch["loss_mask"]), {}

    for _ in range(2):
        theirs, stats = update(
            theirs, {}, layout.put_batch(Batch(*(batch[n] for n in ("tokens", "mask", "loss_mask"))))
        )
        state, _ = engine.forward_backward(state, batch, likelihood)
        state, step = engine.optim_step(state)
        assert {name: float(x) for name, x in step.items()} == pytest.approx({n: float(x) for n, x in stats.items()})
    for path, leaf in theirs.trainable.items():
        np.testing.assert_allclose(state.train.trainable[path], leaf, atol=1e-6, err_msg=path)


def test_a_gradient_equals_that_of_the_group_stage_on_its_rollouts():
    sample, model = SampleConfig(6, temperature=0.7, num_samples=4), model_on()
    algorithm = grpo_algorithm(GRPOConfig(sample=sample, clip_high=0.28))
    execution = Execution(model.layout, Compute(jnp.dtype("float32"), "none", 4), num_micro=2)
    stage = make_hybrid_engine(Architectures(tiny.LLAMA), algorithm, Optimizers(SGD), Sampling(sample, EOS), execution)
    theirs = EngineState(init_state(model.params, SGD, abstract_params(tiny.LLAMA), model.layout))
    before, prompts = jax.device_get(theirs.actor.trainable), tiny.prompts(tiny.LLAMA, [5, 1, 3, 8], 8)
    rollout = stage.generate(stage.publish(theirs.actor.trainable), *prompts, jax.random.key(0))
    experience = stage.score(theirs, FrozenParams({}), rollout, np.asarray(rollout.tokens[:, 0]) % 7)
    # Ratios other than 1, so that some are clipped.
    noise = 0.3 * np.random.default_rng(0).normal(size=experience.logprobs.shape).astype(np.float32)
    experience = jax.device_get(dataclasses.replace(experience, logprobs=experience.logprobs + noise))
    rows = []
    for index in range(16):
        start, size = experience.starts[index], experience.action_mask[index].sum()
        spread = {name: np.zeros(start + size) for name in ("old", "gain")}
        spread["old"][start:] = experience.logprobs[index, :size]
        spread["gain"][start:] = experience.advantages[index, :size]
        mask = np.arange(start + size) >= start
        rows.append(dict(tokens=experience.tokens[index, : start + size], loss_mask=mask, **spread))
    theirs, stats = stage.update(theirs, FrozenParams({}), model.layout.put_batch(experience))
    expected = {path: before[path] - leaf for path, leaf in jax.device_get(theirs.actor.trainable).items()}

    def loss(logprobs, batch):
        ratio = grpo.log_ratios(logprobs, batch["old"], batch["loss_mask"], "token")
        bounds, mask = dict(low=0.2, high=0.28), batch["loss_mask"]
        clipped = grpo.is_clipped(ratio, batch["gain"], **bounds)
        losses = grpo.clipped_losses(ratio, batch["gain"], **bounds)
        return masked.mean(losses, mask), {"clip_fraction": masked.mean(clipped, mask)}

    engine, model = engine_on(micro=4)
    state, found = engine.forward_backward(engine.init(model), rlhf_jax.pad_rows(rows, 16), loss, temperature=0.7)
    state, step = engine.optim_step(state)
    assert 0.05 < float(found["clip_fraction"]) == pytest.approx(float(stats["actor_clip_fraction"]))
    assert float(step["loss"]) == pytest.approx(float(stats["actor_loss"]), abs=1e-6)
    assert_same_gradient({path: before[path] - leaf for path, leaf in state.train.trainable.items()}, expected)


@pytest.mark.parametrize(("mesh", "lora"), [("one", NO_LORA), ("fsdp4-tensor2", tiny.LORA)])
def test_logprobs_of_samples_equal_their_score_at_any_temperature(mesh, lora):
    engine, model = engine_on(mesh, lora)
    state = engine.init(model)
    if lora.rank:  # adapters at their start change nothing
        noise = {path: leaf + 0.02 for path, leaf in state.train.trainable.items()}
        state = dataclasses.replace(state, train=dataclasses.replace(state.train, trainable=noise))
    prompts = [row["tokens"][:5] for row in rows_of(8)]
    weights = engine.publish(state)
    for temperature in (1.0, 0.7):
        config = SampleConfig(8, temperature, num_samples=2)
        answers = engine.sample(weights, prompts, config, jax.random.key(1))
        assert len(answers) == 16 and any(a.ended for a in answers) and not all(a.ended for a in answers)
        assert answers == engine.sample(state, prompts, config, jax.random.key(1))
        rows = []
        for index, answer in enumerate(answers):
            assert answer.ended == (answer.tokens[-1] in EOS) and 1 <= len(answer.tokens) == len(answer.logprobs) <= 8
            prompt = prompts[index // 2]
            rows.append(dict(tokens=prompt + answer.tokens, drawn=[0.0] * len(prompt) + answer.logprobs))
        batch = rlhf_jax.pad_rows(rows, 16)
        scores = engine.score(state, batch, temperature=temperature)
        is_drawn = batch["drawn"] < 0
        np.testing.assert_allclose(scores[is_drawn], batch["drawn"][is_drawn], atol=1e-5)
        assert (scores[:, 0] == 0).all() and (scores[~batch["mask"]] == 0).all()


def test_samples_of_eight_devices_are_those_of_one_and_stop_ids_end_them():
    config, prompts = SampleConfig(8), [[5, 6, 7], [8], [9, 10, 11, 12, 13], [1, 2]] * 2
    found = {}
    for mesh in ("one", "fsdp4-tensor2"):
        engine, model = engine_on(mesh)
        state = engine.init(model)
        found[mesh] = engine.sample(state, prompts, config, jax.random.key(2))
        other = engine.sample(state, prompts, config, jax.random.key(2), stop_ids=range(30))
        assert all(answer.tokens[-1] < 30 for answer in other if answer.ended) and sum(a.ended for a in other) > 4
    assert [a.tokens for a in found["one"]] == [a.tokens for a in found["fsdp4-tensor2"]]


def test_adapters_train_over_a_base_that_keeps_its_bits_and_is_the_reference():
    engine, model = engine_on(lora=tiny.LORA, tx=ADAM)
    before, batch = bit_sum(model.params), batch_of()
    state = engine.init(model)
    assert all(map(is_adapter, state.train.trainable)) and state.frozen.keys() == model.params.keys()
    np.testing.assert_allclose(engine.score(state, batch), engine.score(model, batch), atol=1e-6)
    for _ in range(3):
        state, _ = engine.forward_backward(state, batch, token_loss)
        state, _ = engine.optim_step(state)
    assert bit_sum(model.params) == bit_sum(state.frozen) == before and int(state.train.step) == 3
    moved = np.abs(engine.score(state, batch) - engine.score(model, batch)).max()
    assert moved > 0.05, "the policy has left the reference"


def test_the_model_can_be_used_after_full_training_and_a_state_whose_memory_was_taken_cannot():
    engine, model = engine_on(tx=ADAM)
    first, batch = engine.init(model), batch_of()
    start = engine.score(model, batch)
    once, _ = engine.forward_backward(first, batch, token_loss)
    twice, _ = engine.forward_backward(once, batch, token_loss)
    after, _ = engine.optim_step(twice)
    np.testing.assert_array_equal(engine.score(model, batch), start)
    for taken in (first, once, twice):
        with pytest.raises(ValueError, match="memory of this state was taken .* go on with the state that it returned"):
            engine.score(taken, batch)
    assert np.abs(engine.score(after, batch) - start).max() > 0.01


def test_nothing_is_compiled_after_warm_up_with_two_losses_in_turn():
    engine, model = engine_on(tx=ADAM, micro=8)
    state, config = engine.init(model), SampleConfig(4)

    def iterate(state, seed):
        answers = engine.sample(state, [[5, 6], [7]] * 4, config, jax.random.key(seed))
        batch = batch_of(8, seed)
        batch["old"] = engine.score(state, batch)
        state, _ = engine.forward_backward(state, batch, token_loss)
        state, _ = engine.forward_backward(state, batch, row_loss)
        state, _ = engine.forward_backward(state, batch, token_loss, temperature=1.0 + seed / 10)
        return engine.optim_step(state)[0], answers

    state, _ = iterate(state, 0)
    state, _ = iterate(state, 1)
    with tiny.compilations() as names:
        for seed in range(2, 5):
            state, _ = iterate(state, seed)
    assert names == []
    with tiny.compilations() as names:
        state, _ = engine.forward_backward(state, batch_of(8, 9), lambda logprobs, batch: (logprobs.mean(), {}))
    assert names.count("jit(accumulate)") + names.count("accumulate") == 1


def test_functions_made_in_the_loop_are_named_in_a_warning(caplog):
    engine, model = engine_on()
    state = engine.init(model)
    with caplog.at_level(logging.INFO, "rlhf_jax"):
        for scale in (1.0, 2.0, 3.0, 4.0):
            state, stats = engine.forward_backward(
                state, batch_of(), lambda logprobs, batch, scale=scale: (scale * logprobs.mean(), {})
            )
    text = caplog.text
    assert text.count("compiling test_functions_made_in_the_loop_are_named_in_a_warning.<locals>.<lambda>") == 4
    assert text.count("was compiled for 4 function objects") == 1 and "make the function once" in text


@pytest.mark.parametrize("lora", [NO_LORA, tiny.LORA], ids=["whole", "lora"])
def test_a_saved_state_continues_bit_for_bit_and_has_the_same_bits_on_another_device_count(lora, tmp_path):
    engine, model = engine_on("fsdp4-tensor2", lora, tx=ADAM)

    def steps(engine, state, seeds):
        for seed in seeds:
            state, _ = engine.forward_backward(state, batch_of(8, seed), token_loss)
            state, _ = engine.optim_step(state)
        return state

    state = steps(engine, engine.init(model, seed=3), (0, 1))
    engine.save_state(state, tmp_path / "run", meta={"seed": 2})
    saved = jax.device_get(state.train)
    whole = jax.device_get(steps(engine, state, (2, 3)).train)
    loaded, meta = engine.load_state(tmp_path / "run", model)
    assert meta == {"seed": 2} and int(loaded.train.step) == 2
    again = steps(engine, loaded, (2, 3)).train
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), whole)

    alone, same = engine_on("one", lora, tx=ADAM)
    loaded, _ = alone.load_state(tmp_path / "run", same)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.train), saved)
    after = steps(alone, loaded, (2, 3)).train.trainable
    for path, leaf in after.items():
        np.testing.assert_allclose(leaf, whole.trainable[path], atol=1e-5, err_msg=path)


def test_states_that_do_not_fit_are_not_saved_and_not_loaded(tmp_path):
    engine, model = engine_on(lora=tiny.LORA, tx=ADAM)
    state = engine.init(model)
    engine.save_state(state, tmp_path / "run")
    reported = [
        (lambda: engine.save_state(state, tmp_path / "run"), "has step 0, and this state is of step 0: give another"),
        (
            lambda: engine.load_state(tmp_path / "none", model),
            "none is no folder: give one that save_state has written",
        ),
        (
            lambda: engine.load_state(tmp_path, model),
            "has no complete state: give a folder that save_state has written",
        ),
        (lambda: engine.load_state(tmp_path / "run", model_on(seed=1)), "belong to another base"),
        (lambda: engine.load_state(tmp_path / "run", model_on(config=tiny.OPT)), "another architecture or mesh"),
        (lambda: engine_on(tx=ADAM)[0].load_state(tmp_path / "run", model), "does not fit this model"),
        (lambda: engine.optim_step(state), "no gradients to step by: call forward_backward first"),
    ]
    for call, message in reported:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    more, _ = engine.forward_backward(state, batch_of(), token_loss)
    with pytest.raises(ValueError, match="call optim_step before save_state"):
        engine.save_state(more, tmp_path / "other")
    with pytest.raises(ValueError, match='over="rows" after over="tokens"'):
        engine.forward_backward(more, batch_of(), row_loss, over="rows")


def change(**arrays):
    return lambda batch: batch | {name: make(batch[name].copy()) for name, make in arrays.items()}


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


WRONG = {
    "no loss mask": (
        lambda b: {k: v for k, v in b.items() if k != "loss_mask"},
        "the batch has no loss_mask: rlhf_jax.pad_rows makes",
    ),
    "shifted field": (
        change(old=lambda x: x[:, 1:]),
        "old has shape [16, 15] and tokens [16, 16]: give one entry per token",
    ),
    "fewer rows": (change(gain=lambda x: x[:3]), "gain has shape [3] and tokens [16, 16]"),
    "float tokens": (change(tokens=lambda x: x * 1.0), "tokens is float32 [16, 16]: give token ids, integers [B, T]"),
    "flat tokens": (change(tokens=lambda x: x[0]), "tokens is int32 [16]: give token ids, integers [B, T]"),
    "text": (change(gain=lambda x: x.astype(str)), "give bool, integers or floats"),
    "wide integers": (change(gain=lambda x: np.full(16, 2**40)), "gain has integers of more than 32 bits"),
    "weights as mask": (change(loss_mask=lambda x: x * 0.5), "loss_mask is float32: give bool, or 0 and 1"),
    "not finite": (change(old=put((2, 1), np.nan)), "old[2, 1] is nan: give finite numbers"),
    "unknown id": (change(tokens=put((4, 0), 61)), "tokens[4, 0] is 61, and the model has the ids 0 to 60"),
    "negative id": (change(tokens=put((4, 0), -1)), "tokens[4, 0] is -1, and the model has the ids 0 to 60"),
    "nothing learned": (change(loss_mask=np.zeros_like), "loss_mask is false everywhere"),
    "learned padding": (change(loss_mask=put((1, 15), True)), "loss_mask[1, 15] is true on padding"),
    "learned start": (
        change(loss_mask=put((1, 0), True)),
        "loss_mask[1, 0] is true, and no token before it predicts it",
    ),
    "empty row": (change(mask=put(5, False)), "row 5 of mask has no token"),
    "left padding": (change(mask=lambda x: x[:, ::-1]), "of mask has padding before a token: put tokens first"),
    "odd rows": (lambda b: part(b, 0, 6), "rows of a batch=6 does not divide over 4 rows of a micro-batch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_batch_is_rejected_with_the_fix(name):
    engine, model = engine_on(micro=4)
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.forward_backward(engine.init(model), change(batch_of()), token_loss)


def test_rows_that_are_too_long_or_do_not_divide_over_devices_are_rejected():
    engine, model = engine_on()
    long = rlhf_jax.pad_rows([dict(tokens=[1] * 41, loss_mask=[0] + [1] * 40)])
    with pytest.raises(ValueError, match="row 0 has 41 tokens, and the model has 40 positions: cut the row"):
        engine.forward_backward(engine.init(model), long, token_loss)
    engine, model = engine_on("fsdp4-tensor2")
    with pytest.raises(ValueError, match="rows of a micro-batch=6 does not divide over 8 devices"):
        engine.score(model, batch_of(6))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logprobs, batch: logprobs.mean(), "return (loss, {name: number})"),
        (lambda logprobs, batch: (logprobs, {}), "returned its loss of shape [16, 16]: reduce it to one number"),
        (lambda logprobs, batch: (logprobs.mean(), {"each": logprobs}), "returned each of shape [16, 16]"),
        (lambda logprobs, batch: (logprobs.mean(), {"loss": 1.0}), 'a metric called "loss"'),
    ],
)
def test_a_wrong_result_of_a_loss_function_is_rejected_by_its_name_and_line(loss, message):
    engine, model = engine_on()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        engine.forward_backward(engine.init(model), batch_of(), loss)
    assert "test_library.py:" in str(caught.value)


def test_wrong_prompts_settings_and_models_are_rejected_with_the_fix():
    engine, model = engine_on()
    state, config, key = engine.init(model), SampleConfig(8), jax.random.key(0)
    scorer = model_on(config=tiny.scalar(tiny.LLAMA))
    adapted = model_on(config=tiny.with_lora(tiny.LLAMA, tiny.LORA))
    reported = [
        (lambda: engine.sample(state, [], config, key), "there are no prompts"),
        (lambda: engine.sample(state, [[1], []], config, key), "prompt 1 is float64 [0]: give token ids"),
        (lambda: engine.sample(state, ["text"], config, key), "prompt 0 is <U4 []: give token ids"),
        (lambda: engine.sample(state, [[1, 61]], config, key), "is 61, and the model has the ids 0 to 60"),
        (lambda: engine.sample(state, [[1] * 35], config, key), "shorten the prompt to 32 tokens"),
        (lambda: engine.score(state, batch_of(), temperature=0.0), "temperature=0.0: above 0"),
        (lambda: engine.sample(model, [[1]], config, key), "a Pretrained is no state of this engine: give what init"),
        (lambda: engine.score(engine.publish(state), batch_of()), "a dict is no state of this engine"),
        (lambda: engine.optim_step((state, {})), "a tuple is no state of this engine"),
        (lambda: engine.score(scorer, batch_of()), "give a state, or a language model"),
        (lambda: engine.score(model_on("fsdp4-tensor2"), batch_of()), "loaded with the mesh of this engine"),
        (
            lambda: engine.forward_backward(state, batch_of(), token_loss, over="token"),
            "choose among tokens, rows, sum",
        ),
        (lambda: engine.init(adapted), "another architecture or mesh"),
        (lambda: rlhf_jax.make_engine(scorer, SGD), "scalar head"),
        (lambda: rlhf_jax.make_engine(adapted, SGD, lora=tiny.LORA), "leave lora out"),
        (lambda: rlhf_jax.make_engine(model, SGD, dtype="int8"), 'dtype="int8": choose among float32'),
        (lambda: rlhf_jax.make_engine(model, SGD, remat="all"), 'remat="all": choose among layers'),
        (lambda: rlhf_jax.make_engine(model, SGD, micro_batch_size=-1), "at least 0"),
    ]
    for call, message in reported:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "give at least one row"),
        ([dict(loss_mask=[1])], 'each a mapping with "tokens"'),
        ([dict(tokens=[1], a=1.0), dict(tokens=[1])], "row 1 has the keys ['tokens'] and row 0 ['a', 'tokens']"),
        ([dict(tokens=[1, 2], old=[0.5])], "old of row 0 has shape [1] and the row 2 tokens"),
        ([dict(tokens=[1], old=0.5), dict(tokens=[1], old=[0.5])], "old of row 1 has shape [1]"),
        ([dict(tokens=[1, 2], loss_mask=[0, 0.5])], "loss_mask is float64: give bool, or 0 and 1"),
        ([dict(tokens=[1, 2], mask=[1, 0])], 'a row has no "mask"'),
        ([dict(tokens=[1] * 9)], "row 0 has 9 tokens: set length to at least that, or cut it"),
    ],
)
def test_wrong_rows_are_rejected_with_the_fix(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rlhf_jax.pad_rows(rows, 8)


def test_rows_are_padded_on_the_right_in_the_widest_type_of_their_values():
    batch = rlhf_jax.pad_rows(
        [
            dict(tokens=[7], loss_mask=[0], gain=1, old=[0]),
            dict(tokens=[8, 9, 6], loss_mask=[0, 1, 1], gain=0.5, old=[0, -1.5, -2]),
        ],
        4,
    )
    expected = {
        "tokens": np.array([[7, 0, 0, 0], [8, 9, 6, 0]], np.int32),
        "mask": np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool),
        "loss_mask": np.array([[0, 0, 0, 0], [0, 1, 1, 0]], bool),
        "gain": np.array([1, 0.5], np.float32),
        "old": np.array([[0, 0, 0, 0], [0, -1.5, -2, 0]], np.float32),
    }
    assert batch.keys() == expected.keys()
    for name, array in expected.items():
        assert batch[name].dtype == array.dtype
        np.testing.assert_array_equal(batch[name], array)
    assert rlhf_jax.pad_rows([dict(tokens=[1] * 33)])["tokens"].shape == (1, 64)


PROCESS = """
import json, sys
import jax, numpy as np, optax
from rlhf_jax import hosts
hosts.start()
import rlhf_jax
from rlhf_jax.objectives import masked

folder = sys.argv[1]
model = rlhf_jax.from_pretrained(folder + "/model", mesh=rlhf_jax.make_mesh(rlhf_jax.MeshConfig()))
engine = rlhf_jax.make_engine(model, optax.adam(0.01), lora=rlhf_jax.LoraConfig(rank=4, alpha=8))
state, report = engine.init(model), []
loss = lambda logprobs, batch: (-masked.mean(logprobs * batch["gain"][:, None], batch["loss_mask"]), {})
for step in range(2):
    answers = engine.sample(state, [[5, 6], [7], [8, 9, 10], [11]], rlhf_jax.SampleConfig(6), jax.random.key(step))
    masks = [[0] + [1] * len(answer.tokens) for answer in answers]
    rows = [dict(tokens=[5] + a.tokens, loss_mask=m, gain=i - 1.5) for i, (a, m) in enumerate(zip(answers, masks))]
    batch = rlhf_jax.pad_rows(rows)
    scores = engine.score(state, batch)
    state, _ = engine.forward_backward(state, batch, loss)
    state, stats = engine.optim_step(state)
    report.append([[a.tokens for a in answers], float(scores.sum()), float(stats["loss"]), float(stats["grad_norm"])])
engine.save_state(state, folder + f"/run{hosts.count()}", meta={"step": 2})
loaded, meta = engine.load_state(folder + f"/run{hosts.count()}", model)
same = np.array_equal(engine.score(loaded, batch), engine.score(state, batch))
engine.export(state, folder + f"/export{hosts.count()}")
print(json.dumps([report, meta, same]))
"""


def test_two_processes_run_the_loop_of_one_and_write_its_files(tmp_path):
    mesh = tiny.mesh_of("one")
    hf = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=61, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=8, max_position_embeddings=40,
        rms_norm_eps=1e-6, eos_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    config = decoder_config(hf, scalar_head=False)
    params = tiny.random_params(config, mesh)
    rlhf_jax.save_pretrained(Pretrained(config, params, None, hf, {}, Layout(mesh, TRAIN)), tmp_path / "model")
    found = []
    for processes in (1, 2):
        running = tiny_processes.start(processes, 4 // processes, "-c", PROCESS, str(tmp_path))
        ended = tiny_processes.finish(running, 300)
        assert [code for code, _, _ in ended] == [0] * processes, ended[-1][2][-2000:]
        found += [json.loads(out.splitlines()[-1]) for _, out, _ in ended]
    for report, meta, same in found:
        assert meta == {"step": 2} and same
        for (tokens, *numbers), (expected, *others) in zip(report, found[0][0], strict=True):
            assert tokens == expected and numbers == pytest.approx(others, rel=1e-4)
    one, two = (rlhf_jax.from_pretrained(tmp_path / f"export{count}").params for count in (1, 2))
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, atol=1e-5, err_msg=path)
