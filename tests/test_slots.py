"""Slot refill: many prompts in few decode slots, with the same answers as one batch in fewer decode steps."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import rlhf_jax
from rlhf_jax.decode import Decoding
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, single_device_mesh
from rlhf_jax.models.inference import Inference
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.rollout import generate_program, make_generate, make_publish
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.slots import generate_slots

EIGHT = [name for name in tiny.MESHES if name != "one"]
FLOAT32 = jnp.dtype("float32")
NEW = 12
LENGTHS = [8, 1, 5, 3, 8, 2, 7, 4, 6, 6, 1, 8, 3, 5, 2, 7, 4, 4, 8, 1, 3]
EOS = tuple(range(3, 61, 5))  # a fifth of the ids, so that answers have many lengths
KEY = jax.random.key(11)
SAMPLE = SampleConfig(NEW, 0.7)
RICH = SampleConfig(NEW, 1.2, top_k=30, min_p=0.01, repetition_penalty=1.3, min_new_tokens=2)
FIELDS = ("prompts", "prompt_mask", "tokens", "mask", "ended")


@functools.lru_cache
def weights_of(family, name):
    params = tiny.random_params(tiny.FAMILIES[family], tiny.mesh_of(name))
    return make_publish(tiny.FAMILIES[family], tiny.mesh_of(name), FLOAT32)(params)


@functools.lru_cache
def answers(family, rows=0, name="one", sample=SAMPLE, eos=EOS, count=None):
    config, mesh = tiny.FAMILIES[family], tiny.mesh_of(name)
    run = make_generate(tiny.decoding(config, sample, eos, mesh, FLOAT32), rows)
    tokens, mask = tiny.prompts(config, LENGTHS, 8)
    return jax.tree.map(np.asarray, run(weights_of(family, name), tokens[:count], mask[:count], KEY))


def assert_same(one, other):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
    for field in ("logprobs", "model_logprobs"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-5, err_msg=field)


# Windows, rotary and learned positions, ALiBi: everything that depends on a token's position in the cache.
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_few_slots_give_the_answers_of_one_batch_in_the_order_of_the_prompts(family):
    whole = answers(family)
    sizes = whole.mask.sum(1)
    assert len(set(sizes.tolist())) > 4, "answers of several lengths"
    assert_same(answers(family, rows=4), whole)


@pytest.mark.parametrize("sample", [SAMPLE, RICH, dataclasses.replace(RICH, temperature=0.0)])
@pytest.mark.parametrize("rows", [1, 8, 21, 64, 2, 4, 16, 20])
def test_any_number_of_slots_gives_the_same_samples(rows, sample):
    assert_same(answers("llama", rows=rows, sample=sample), answers("llama", sample=sample))


def test_further_prompts_do_not_change_the_answers_to_earlier_ones():
    whole, part = answers("llama", rows=4), answers("llama", rows=4, count=9)
    assert_same(part, jax.tree.map(lambda leaf: leaf[:9], whole))


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("name", EIGHT)
def test_eight_devices_refill_their_own_slots_and_give_the_samples_of_one(name, rows):
    for sample in (SAMPLE, RICH):
        assert_same(answers("llama", rows, name, sample), answers("llama", 4, sample=sample))


def test_without_an_eos_every_answer_is_truncated_and_the_last_round_is_shorter():
    whole, rows = answers("opt", eos=(-1,)), answers("opt", rows=8, eos=(-1,))
    assert_same(rows, whole)
    assert rows.mask.all() and not rows.ended.any()
    assert rows.steps.max() >= 3 * (NEW - 1), "21 prompts fill 8 slots three times"


def test_if_every_first_token_is_an_eos_nothing_is_decoded():
    rows = answers("llama", rows=4, eos=tuple(range(61)))
    assert rows.ended.all() and rows.mask.sum() == len(LENGTHS) and rows.steps.max() == 0
    assert_same(rows, answers("llama", eos=tuple(range(61))))


def test_two_samples_per_prompt_equal_those_of_the_prompt_given_twice():
    config, mesh = tiny.LLAMA, single_device_mesh()
    prompts = tiny.prompts(config, LENGTHS[:6], 8)
    pairs = dataclasses.replace(SAMPLE, num_samples=2)
    for rows in (0, 4):
        run = make_generate(tiny.decoding(config, pairs, EOS, mesh, FLOAT32), rows)
        rollout = jax.tree.map(np.asarray, run(weights_of("llama", "one"), *prompts, KEY))
        twice = (np.repeat(x, 2, axis=0) for x in prompts)
        expected = make_generate(tiny.decoding(config, SAMPLE, EOS, mesh, FLOAT32))(
            weights_of("llama", "one"), *twice, KEY
        )
        assert rollout.tokens.shape == (12, NEW)
        assert_same(rollout, jax.tree.map(np.asarray, expected))
        same = (rollout.tokens[0::2] == rollout.tokens[1::2]).all(axis=1)
        assert same.sum() <= 1, "samples of one prompt differ, except that two may both be a single EOS"


@pytest.mark.parametrize(("mesh", "shared"), [("one", True), ("fsdp4-tensor2", True), ("fsdp4-tensor2", False)])
def test_the_samples_of_a_prompt_share_its_prefill_where_the_devices_divide_the_prompts(mesh, shared):
    config, mesh = tiny.LLAMA, tiny.mesh_of(mesh)
    prompts = tiny.prompts(config, [8] * (4 if shared else 2), 32)
    short, found = SampleConfig(1), {}
    for samples in (1, 4):
        decoder = tiny.decoding(config, dataclasses.replace(short, num_samples=samples), EOS, mesh, FLOAT32)
        rows = decoder.model.layout.put_batch(tuple(np.repeat(x, 4, axis=0) for x in prompts))
        weights = make_publish(config, mesh, FLOAT32)(tiny.random_params(config, mesh))
        compiled = generate_program(decoder).lower(weights, *rows, KEY).compile()
        found[samples] = compiled.cost_analysis()["flops"], jax.tree.map(np.asarray, compiled(weights, *rows, KEY))
    assert_same(found[4][1], found[1][1])
    assert (found[4][0] < 0.5 * found[1][0]) == shared


def test_public_generate_accepts_a_number_of_slots():
    layout = Layout(single_device_mesh(), TRAIN)
    params = tiny.random_params(tiny.LLAMA, layout.mesh)
    model = Pretrained(tiny.LLAMA, params, None, {"eos_token_id": list(EOS)}, {}, layout)
    tokens, mask = tiny.prompts(tiny.LLAMA, LENGTHS, 8, side="right")
    rollout = rlhf_jax.generate(model, tokens, mask, SAMPLE, KEY, rows=4)
    whole = answers("llama")
    np.testing.assert_array_equal(rollout.tokens, whole.tokens)
    np.testing.assert_array_equal(rollout.mask, whole.mask)


def test_slots_that_do_not_divide_among_the_devices_are_rejected_with_the_nearest_that_do():
    reported = "rows=6 does not divide over 4 devices of mesh.data x mesh.fsdp; nearest that do: [4, 8]"
    for rows, message in ((6, reported), (-4, "rows=-4 does not divide over 4")):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_generate(tiny.decoding(tiny.LLAMA, SAMPLE, EOS, tiny.mesh_of("fsdp4-tensor2"), FLOAT32), rows)


# With all weights 0, all 64 tokens are equally likely, and one of them is EOS: lengths are geometric, mean 64.
FLAT = dataclasses.replace(tiny.OPT, vocab_size=64, padded_vocab=64, max_positions=300, position_rows=302, num_layers=1)
LONG = SampleConfig(256)


def flat_run(rows):
    mesh = single_device_mesh()
    params = {path: jnp.zeros_like(leaf) for path, leaf in tiny.random_params(FLAT, mesh).items()}
    weights = make_publish(FLAT, mesh, FLOAT32)(params)
    run = make_generate(tiny.decoding(FLAT, LONG, (7,), mesh, FLOAT32), rows)
    return lambda prompts, mask: jax.tree.map(np.asarray, run(weights, prompts, mask, KEY))


@pytest.mark.parametrize(("rows", "times"), [(16, 2.5), (32, 2.5), (64, 2.5)])
def test_geometric_answers_take_two_and_a_half_times_fewer_decode_steps_than_waiting_for_the_slowest(rows, times):
    count = 1024
    prompts, mask = tiny.prompts(FLAT, [4] * count, 4)
    refilled, batch = flat_run(rows)(prompts, mask), flat_run(0)
    lengths = refilled.mask.sum(1)
    # The mean of a geometric length of mean 64, cut at 256, is 62.9; its standard error over 1024 is 1.8.
    assert abs(lengths.mean() - 62.9) < 3 * 1.8 and lengths.max() == 256
    steps = sum(int(batch(prompts[i : i + rows], mask[i : i + rows]).steps.max()) for i in range(0, count, rows))
    assert steps > 0.6 * 256 * count / rows, "most batches wait for a long answer"
    assert times * refilled.steps.max() <= steps
    # The minimum for any program: each slot produces one token per step, and the first comes with the prefill.
    assert refilled.steps.max() >= (lengths - 1).sum() / rows


def test_a_second_rollout_of_the_same_shape_compiles_nothing():
    run = flat_run(16)
    run(*tiny.prompts(FLAT, [4] * 40, 4))
    with tiny.compilations() as names:
        run(*tiny.prompts(FLAT, [3] * 40, 4))
    assert names == []


def test_every_compilation_is_logged_with_the_bound_and_prompts_have_few_lengths(caplog):
    config = dataclasses.replace(FLAT, max_positions=200, position_rows=202)
    params = {path: jnp.zeros_like(leaf) for path, leaf in tiny.random_params(config, single_device_mesh()).items()}
    weights = make_publish(config, single_device_mesh(), FLOAT32)(params)
    run = make_generate(tiny.decoding(config, SampleConfig(2), (7,), single_device_mesh(), FLOAT32), 2)
    with caplog.at_level("INFO", "rlhf_jax"), tiny.compilations() as names:
        for length in (3, 30, 32, 33, 60, 64, 65, 120, 150, 190):
            run(weights, *tiny.prompts(config, [length] * 4, 192), KEY)
    said = [record.getMessage() for record in caplog.records if record.name == "rlhf_jax.rollout"]
    assert names.count("jit(program)") == len(said) == 4
    assert said[0] == (
        "generate: compiling program 1, for 4 answers in 2 rows to prompts of 32 tokens; the model's positions allow 4 "
        "lengths"
    )


def test_no_key_or_value_is_moved_between_devices():
    config, mesh = tiny.LLAMA, tiny.mesh_of("fsdp4-tensor2")
    layout = Layout(mesh, GENERATE)
    tokens, mask = (layout.put(x, None, None) for x in tiny.prompts(config, LENGTHS, 8))

    decoding = Decoding(Inference(config, layout, FLOAT32), SAMPLE, EOS)

    def program(weights, tokens, mask, key):
        return generate_slots(decoding, weights, tokens, mask, key, 16)

    text = jax.jit(program).lower(weights_of("llama", "fsdp4-tensor2"), tokens, mask, KEY).compile().as_text()
    moved = re.findall(r"= \(?(\w+\[[\d,]*\]\S*) (?:all-gather|all-to-all|collective-permute)\(", text)
    assert moved, "tokens and log-probabilities are gathered"
    for what in moved:
        shape = [int(n) for n in re.search(r"\[([\d,]*)\]", what)[1].split(",") if n]
        # 24 prompts, divided among the devices, of 8 + 12 tokens.
        assert len(shape) <= 2 and np.prod(shape) <= 24 * NEW, f"more than one number per token: {what}"
