"""Direct preference optimisation: its losses against hand arithmetic, and runs of a few steps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_recipe
from jax.test_util import check_grads
from tiny_recipe import records, tensors, untimed_records, write_recipe

import rlhf_jax
import rlhf_jax.stages.dpo
import rlhf_jax.stages.reference
import rlhf_jax.stages.supervised
from rlhf_jax.config import load_config
from rlhf_jax.data.batches import Batch, Batches
from rlhf_jax.data.chat_template import Encoding, prepare_tokenizer
from rlhf_jax.data.config import SourceConfig
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.rows import Rows, SourceRows, pack_rows
from rlhf_jax.data.selection import select_rows
from rlhf_jax.data.store import memory_store, record_batch
from rlhf_jax.data.tokenize import RowStats
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.objectives.logprobs import from_logits
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.plan.phases import phases
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.dpo import DPOConfig, dpo_objective, pair_losses
from rlhf_jax.stages.reference import Reference, drawn_rows
from rlhf_jax.train_step import init_state, make_update

LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "orpo")
# Three pairs, chosen then rejected: log-probabilities, tokens, and log-probabilities by the reference.
LOGPROBS = jnp.array([[-6.0, -8.0], [-9.0, -3.0], [-2.0, -2.5]])
COUNTS = jnp.array([[3, 4], [6, 1], [2, 5]])
REFERENCE = jnp.array([[-7.0, -6.0], [-8.0, -3.5], [-2.0, -2.0]])
DPO = ["run.stages=['sft','dpo']", "sft.steps=2", "dpo.batch_size=8", "dpo.steps=4", "dpo.eval_batches=2"]
DPO += ["dpo.optim={learning_rate=3e-3}", "dpo.micro_batch_size=4"]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def loss_by_hand(config: DPOConfig, logprobs, counts, reference) -> float:
    """The loss of one pair, each argument (chosen, rejected)."""
    ratios = [own - other for own, other in zip(logprobs, reference, strict=True)]
    means = [own / count for own, count in zip(logprobs, counts, strict=True)]
    smoothing, margin = config.label_smoothing, config.beta * (ratios[0] - ratios[1])
    if config.loss == "simpo":
        margin = config.beta * (means[0] - means[1]) - config.simpo_margin
    if config.loss == "hinge":
        loss = max(0.0, 1.0 - margin)
    elif config.loss == "ipo":
        loss = (ratios[0] / counts[0] - ratios[1] / counts[1] - 1 / (2 * config.beta)) ** 2
    elif config.loss == "orpo":
        odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
        loss = -means[0] - config.beta * log_sigmoid(math.log(odds[0] / odds[1]))
    else:
        loss = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    return loss - config.nll_coef * means[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_equals_hand_arithmetic_and_its_gradient_finite_differences(name, smoothing):
    smoothing = smoothing if name in ("sigmoid", "simpo") else 0.0
    config = DPOConfig(loss=name, beta=0.6, label_smoothing=smoothing, nll_coef=smoothing)
    reference = None if name in ("simpo", "orpo") else REFERENCE
    losses, rewards = pair_losses(config, LOGPROBS, COUNTS, reference)
    pairs = zip(LOGPROBS.tolist(), COUNTS.tolist(), REFERENCE.tolist(), strict=True)
    assert losses.tolist() == pytest.approx([loss_by_hand(config, *pair) for pair in pairs], rel=1e-5)
    expected = LOGPROBS / COUNTS if reference is None else LOGPROBS - REFERENCE
    np.testing.assert_allclose(rewards, 0.6 * expected, rtol=1e-6)
    check_grads(lambda x: pair_losses(config, x, COUNTS, reference)[0], (LOGPROBS,), 1, ["rev"], 1e-2, 1e-2)


def test_an_answer_without_a_token_that_trains_gives_finite_losses_and_gradients():
    for name in LOSSES:
        reference = None if name in ("simpo", "orpo") else jnp.zeros((1, 2))
        nothing = jnp.zeros((1, 2)), jnp.zeros((1, 2), jnp.int32), reference
        loss = lambda x, name=name, rest=nothing[1:]: pair_losses(DPOConfig(loss=name), x, *rest)[0].sum()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(nothing[0])
        assert np.isfinite(value) and np.isfinite(gradient).all(), name


def test_settings_without_effect_or_meaning_are_rejected():
    with pytest.raises(ValueError, match="beta=0: above 0"):
        DPOConfig(beta=0.0)
    with pytest.raises(ValueError, match="from 0 to below 0.5"):
        DPOConfig(label_smoothing=0.5)
    with pytest.raises(ValueError, match='is of "sigmoid" and "simpo", and loss="ipo"'):
        DPOConfig(loss="ipo", label_smoothing=0.1)


def one_update(mesh, batch, num_micro):
    """The objective's loss and the parameters after one step, and the reference's values of the batch."""
    config, layout, settings = tiny.LLAMA, Layout(mesh, TRAIN), DPOConfig(beta=0.5, nll_coef=0.1)
    objective = dpo_objective(config, Compute(jnp.dtype("float32"), "layers", 4), layout, settings)
    tx = make_optimizer(OptimConfig(learning_rate=0.02, schedule="constant", eps=1e-3), 10)
    reference = Reference(jax.jit(objective.reference), tiny.random_params(config, mesh, seed=1), layout)(batch)
    state = init_state(tiny.random_params(config, mesh), tx, abstract_params(config), layout)
    update = make_update(objective.loss, tx, abstract_params(config), layout, num_micro)
    state, stats = update(state, {}, layout.put_batch(dataclasses.replace(batch, reference=reference)))
    return jax.device_get((stats, state.trainable, reference))


def test_padding_micro_batches_and_eight_devices_change_no_loss_and_no_step():
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(1, 61, (16, 2, 24), np.int32), rng.integers(4, 17, (16, 2, 1))
    mask = np.arange(24) < lengths
    batch = Batch(np.where(mask, tokens, 0), mask, mask & (np.arange(24) >= 3))
    short = jax.tree.map(lambda x: x[..., :16], batch)
    expected = one_update(tiny.mesh_of("one"), short, 1)
    for mesh, given, num_micro in (("one", batch, 4), ("fsdp4-tensor2", short, 2)):
        found = one_update(tiny.mesh_of(mesh), given, num_micro)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def pair_rows(count: int) -> tuple[Rows, Rows]:
    """Random pairs, loose and packed into rows of 2 x 24 tokens; all tokens of an answer but three are trained."""
    rng = np.random.default_rng(0)
    sequences = [
        Encoding(rng.integers(1, 61, length).astype(np.int32), np.array([[3, length]], np.int32))
        for length in rng.integers(4, 17, 2 * count)
    ]
    sequences = [each._replace(score=1.0 - s % 2) for s, each in enumerate(sequences)]
    keys = np.arange(2 * count, dtype=np.uint64).reshape(count, 2)
    store = memory_store([record_batch(sequences, keys, range(count), [False] * count, 2, 61)], 2, 61)
    part = SourceRows(SourceConfig("made"), store, np.arange(count, dtype=np.int32), RowStats())
    return tuple(Rows((each,), 2, (len(each),), "") for each in (part, pack_rows(part, 24)))


def packed_and_loose(number: int) -> tuple[Batch, Batch]:
    """A batch of `number` packed rows, and one of the pairs that it holds, in the same order."""
    loose, packed = pair_rows(4 * number)
    batches = Batches(packed, batch_size=number, seed=0, width=24)
    rows, bins = batches.draws(0)[1], packed.parts[0].bins
    pairs = np.concatenate([bins.members[bins.span(row)] for row in rows])
    apart = Batches(loose, batch_size=len(pairs), seed=0).make(np.zeros_like(pairs), pairs)
    assert np.diff(bins.offsets)[rows].tolist() != [2] * number and len(pairs) > 1.5 * number
    return batches[0], apart


def bigram_logprobs(config, params, tokens, *rest):
    """In place of a model: the log-probability of each token after the one before it, by a table."""
    return jax.nn.log_softmax(params["table"])[tokens[:, :-1], tokens[:, 1:]], jnp.float32(0)


def test_losses_metrics_gradients_and_the_reference_of_packed_pairs_equal_those_of_the_pairs_apart(monkeypatch):
    monkeypatch.setattr(rlhf_jax.stages.dpo, "next_token_logprobs", bigram_logprobs)
    every = [DPOConfig(loss=name, beta=0.5, nll_coef=0.1) for name in LOSSES]
    every[0] = dataclasses.replace(every[0], label_smoothing=0.2)
    layout = Layout(tiny.mesh_of("one"), TRAIN)
    objectives = [dpo_objective(tiny.LLAMA, Compute(jnp.dtype("float32"), "none", 0), layout, each) for each in every]
    params, start = ({"table": jax.random.normal(jax.random.key(seed), (61, 61))} for seed in (0, 1))

    @jax.jit
    def compute(params, start, batch):
        reference = objectives[0].reference(start, batch)
        batches = [dataclasses.replace(batch, reference=each.reference and reference) for each in objectives]

        def loss(params):
            found = [each.loss(params, given) for each, given in zip(objectives, batches, strict=True)]
            return sum(value for value, _ in found), found

        gradients, found = jax.grad(loss, has_aux=True)(params)
        measured = [each.measure(params, given) for each, given in zip(objectives, batches, strict=True)]
        return gradients, found, measured, reference

    packed, apart = packed_and_loose(8)
    (gradients, found, measured, reference), expected = (
        jax.device_get(compute(params, start, each)) for each in (packed, apart)
    )
    assert found[0][1][0] == len(apart.tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected[1])
    largest = np.abs(expected[0]["table"]).max()
    assert largest > 0.01
    np.testing.assert_allclose(gradients["table"], expected[0]["table"], atol=1e-5 * largest)
    is_pair = ~np.isnan(packed.scores[..., 0])
    np.testing.assert_allclose(reference[is_pair], expected[3], rtol=1e-5)
    for objective, one, other in zip(objectives, measured, expected[2], strict=True):
        assert objective.summarize([one], [packed]) == pytest.approx(objective.summarize([other], [apart]), rel=1e-5)


def test_micro_batches_of_unequal_numbers_of_pairs_and_eight_devices_change_no_loss_and_no_step():
    packed, apart = packed_and_loose(8)
    *expected, reference = one_update(tiny.mesh_of("one"), apart, 1)
    *found, by_row = one_update(tiny.mesh_of("fsdp4-tensor2"), packed, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)
    is_pair = ~np.isnan(packed.scores[..., 0])
    np.testing.assert_allclose(by_row[is_pair], reference, rtol=1e-5)
    first, second = (is_pair[start::2].sum() for start in (0, 1))  # as `split_micro_batches` divides them
    assert first != second


@pytest.fixture(scope="module")
def dpo_folder(tmp_path_factory):
    """The folder of a finished run of SFT and DPO, next to its recipe."""
    folder = tmp_path_factory.mktemp("dpo")
    assert tiny_recipe.run("train", write_recipe(folder), f"run.dir={folder / 'run'}", *DPO) == 0
    return folder / "run"


def logprobs_by_logits(model, batch: Batch) -> np.ndarray:
    """[B, 2] log-probability of each answer."""
    columns = []
    for side in range(2):
        logits = rlhf_jax.apply(model, batch.tokens[:, side], batch.mask[:, side])
        each = from_logits(logits[:, :-1, : model.config.vocab_size], batch.tokens[:, side, 1:])[0]
        columns.append((each * batch.loss_mask[:, side, 1:]).sum(axis=1))
    return np.stack(columns, axis=1)


def test_the_reference_is_the_sft_policy_and_the_first_loss_is_log_2(dpo_folder):
    model = rlhf_jax.from_pretrained(dpo_folder / "sft/export")
    data = load_config(dpo_folder / "config.toml", [], Recipe).data
    rows = select_rows(data, prepare_tokenizer(model.tokenizer), RowSpec("pair", "dpo"), held_out=False)
    batches = Batches(rows, batch_size=8, seed=0)
    saved = np.load(dpo_folder / "dpo/reference.npz")["0"]
    (drawn,) = drawn_rows(batches, 4)
    assert len(drawn) == 32 and np.isnan(saved).all(axis=1).sum() == len(rows) - 32
    for step in range(4):
        expected = logprobs_by_logits(model, batches[step])
        np.testing.assert_allclose(saved[batches.draws(step)[1]], expected, rtol=1e-5, atol=1e-4)
    first, *_, last = [line for line in records(dpo_folder / "dpo/metrics.jsonl") if "loss" in line]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["margin"]) < 1e-4
    assert first["logprob_chosen"] == pytest.approx(logprobs_by_logits(model, batches[0])[:, 0].mean(), rel=1e-5)
    assert last["loss"] < first["loss"] and last["margin"] > 0


def test_held_out_metrics_are_those_of_the_exported_policy_against_the_reference(dpo_folder):
    before, after = (rlhf_jax.from_pretrained(dpo_folder / stage / "export") for stage in ("sft", "dpo"))
    data = load_config(dpo_folder / "config.toml", [], Recipe).data
    rows = select_rows(data, prepare_tokenizer(after.tokenizer), RowSpec("pair", "dpo"), held_out=True)
    held_out = [Batches(rows, batch_size=4, seed=0)[step] for step in range(4)]
    rewards = 0.1 * np.concatenate(
        [logprobs_by_logits(after, each) - logprobs_by_logits(before, each) for each in held_out]
    )
    margins, last = rewards[:, 0] - rewards[:, 1], records(dpo_folder / "dpo/metrics.jsonl")[-1]
    assert last["held_out_margin"] == pytest.approx(margins.mean(), abs=1e-4)
    assert last["held_out_accuracy"] == (margins > 0).mean()
    assert last["held_out_rewards_chosen"] == pytest.approx(rewards[:, 0].mean(), abs=1e-4)
    assert last["held_out_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)


def test_a_stopped_run_reads_its_reference_and_ends_bit_equal(dpo_folder, tmp_path, monkeypatch):
    loop = rlhf_jax.stages.supervised.train_loop

    def interrupted_loop(context, total, state, step_fn, **options):
        def stop(state, step):
            result = step_fn(state, step)
            if context.name == "dpo" and step == 2:
                raise KeyboardInterrupt
            return result

        return loop(context, total, state, stop, **options)

    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(rlhf_jax.stages.supervised, "train_loop", interrupted_loop)
        assert tiny_recipe.run("train", recipe, f"run.dir={run}", *DPO) == 130
    monkeypatch.setattr(rlhf_jax.stages.reference, "drawn_rows", None)  # to compute it again would call this
    assert tiny_recipe.run("train", recipe, f"run.dir={run}", *DPO) == 0
    assert untimed_records(run / "dpo/metrics.jsonl") == untimed_records(dpo_folder / "dpo/metrics.jsonl")
    ours, theirs = (tensors(folder / "dpo/export") for folder in (run, dpo_folder))
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


PACKED = [*DPO, "run.stages=['dpo']", "dpo.pack_length=300", "dpo.nll_coef=1.0", "dpo.batch_size=2", "dpo.steps=3"]
PACKED += ["dpo.micro_batch_size=1", "dpo.eval_batches=40"]


def test_a_packed_run_measures_every_held_out_pair_once(dpo_folder, tmp_path):
    base, run = dpo_folder / "sft/export", tmp_path / "run"
    options = [*PACKED, f"model.actor={base}", f"run.dir={run}"]
    assert tiny_recipe.run("train", write_recipe(tmp_path), *options) == 0
    model = rlhf_jax.from_pretrained(base)
    data = load_config(run / "config.toml", [], Recipe).data
    spec, tokenizer = RowSpec("pair", "dpo", pack_length=300), prepare_tokenizer(model.tokenizer)
    packed = select_rows(data, tokenizer, spec, held_out=True)
    rows = select_rows(data, tokenizer, dataclasses.replace(spec, pack_length=0), held_out=True)
    assert (len(rows), len(packed)) == (30, 10)
    held_out = Batches(rows, batch_size=len(rows), seed=0)[0]
    chosen = (logprobs_by_logits(model, held_out) / held_out.loss_mask.sum(axis=-1))[:, 0]
    first, *_, last = records(run / "dpo/metrics.jsonl")
    assert first["held_out_loss"] == pytest.approx(math.log(2) - chosen.mean(), rel=1e-5)
    assert last["held_out_loss"] < first["held_out_loss"] and last["held_out_accuracy"] > 0.5


def test_a_stopped_run_of_packed_pairs_ends_bit_equal(dpo_folder, tmp_path, monkeypatch):
    recipe, folders = write_recipe(tmp_path), [tmp_path / name for name in ("stopped", "whole")]
    options = [*PACKED, f"model.actor={dpo_folder / 'sft/export'}"]
    with monkeypatch.context() as patch:
        tiny_recipe.interrupt_stage(patch, "dpo", 2)
        assert tiny_recipe.run("train", recipe, f"run.dir={folders[0]}", *options) == 130
    for folder in folders:
        assert tiny_recipe.run("train", recipe, f"run.dir={folder}", *options) == 0
    stopped, whole = (untimed_records(folder / "dpo/metrics.jsonl") for folder in folders)
    assert stopped == whole and len(whole) > 3
    ours, theirs = (tensors(folder / "dpo/export") for folder in folders)
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def test_adapters_length_buckets_and_no_sft_give_the_same_first_loss_and_leave_the_base(dpo_folder, tmp_path):
    base, run = dpo_folder / "sft/export", tmp_path / "run"
    options = ["run.stages=['dpo']", f"model.actor={base}", "model.lora={rank=2, alpha=4.0}", "dpo.length_buckets=3"]
    assert tiny_recipe.run("train", write_recipe(tmp_path), f"run.dir={run}", *DPO, *options) == 0
    first, *later = [line["loss"] for line in records(run / "dpo/metrics.jsonl") if "loss" in line]
    # Every step has other pairs, so that the least of the later losses says that the adapters learn.
    assert first == pytest.approx(math.log(2), abs=1e-5) and min(later) < first - 0.01
    assert (run / "dpo/export_adapter/adapter_model.safetensors").exists()


def test_a_loss_without_a_reference_computes_none(dpo_folder, tmp_path):
    run, options = (
        tmp_path / "run",
        ["run.stages=['dpo']", f"model.actor={dpo_folder / 'sft/export'}", "dpo.loss=simpo"],
    )
    assert tiny_recipe.run("train", write_recipe(tmp_path), f"run.dir={run}", *DPO, *options, "dpo.steps=2") == 0
    assert not (run / "dpo/reference.npz").exists()


def test_the_plan_has_a_pass_of_the_reference_alone_and_no_reference_in_training(dpo_folder):
    recipe = load_config(dpo_folder / "config.toml", [], Recipe)
    found = {each.name: each for each in phases(recipe, tiny.mesh_of("one"), ("dpo",))}
    assert list(found) == ["reference", "update", "evaluate"]
    # The head is tied to the embedding, whose rows are padded to a multiple of 128.
    size = sum(array.size for array in tensors(dpo_folder / "sft/export").values()) + 16 * (384 - 300)
    assert found["reference"].live["parameters"] == 4 * size
    resident = {name: bytes_ for name, bytes_ in found["update"].live.items() if name != "batch"}
    counters = 5 * 4 + 11  # five numbers, and a byte for each of the 11 parameters
    assert resident == {"frozen": 0, "trainable": 4 * size, "optimizer": 8 * size + counters}
    tokens = 8 * 2 * 144
    numbers = 8 * 2 * (4 + 4)  # the scores that rank the answers, and their log-probabilities by the reference
    assert found["update"].live["batch"] == tokens * (4 + 1 + 1) + numbers
    assert all(each.program.lower(*each.args) for each in found.values())
    packed = dataclasses.replace(recipe, dpo=dataclasses.replace(recipe.dpo, pack_length=288))
    found = {each.name: each for each in phases(packed, tiny.mesh_of("one"), ("dpo",))}
    tokens, numbers = 8 * 2 * 288, 8 * 8 * 2 * (4 + 4)  # with the number of each token's answer; of 8 pairs a row
    assert found["update"].live["batch"] == tokens * (4 + 1 + 1 + 4) + numbers
    assert found["evaluate"].program.lower(*found["evaluate"].args)
