import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import chi2

import rlhf_jax
from rlhf_jax.decode import Decoding, bucket_length, decode_step, empty_state
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, single_device_mesh
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel
from rlhf_jax.models.inference import Inference, empty_cache
from rlhf_jax.models.lora import NO_LORA
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.models.quantised import block_axis, is_quantisable, quantise
from rlhf_jax.models.unstacked import Unstacked
from rlhf_jax.rollout import check_positions, make_generate, make_publish
from rlhf_jax.sampling import SampleConfig, check_sample, draw, truncate_logits

EIGHT = [name for name in tiny.MESHES if name != "one"]
BFLOAT16, FLOAT16, FLOAT32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))
NEW = 6
LENGTHS = [8, 1, 5, 3, 8, 2, 7, 4]
KEY = jax.random.key(11)
NO_EOS = (-1,)


@functools.lru_cache
def params_of(family, name):
    return tiny.random_params(tiny.FAMILIES[family], tiny.mesh_of(name))


@functools.lru_cache
def weights_of(family, name):
    return make_publish(tiny.FAMILIES[family], tiny.mesh_of(name), FLOAT32)(params_of(family, name))


def answers(family, sample, *, name="one", eos=NO_EOS, lengths=tuple(LENGTHS), width=8, key=KEY):
    config, mesh = tiny.FAMILIES[family], tiny.mesh_of(name)
    tokens, mask = tiny.prompts(config, lengths, width)
    rollout = make_generate(tiny.decoding(config, sample, eos, mesh, FLOAT32))(
        weights_of(family, name), tokens, mask, key
    )
    return jax.tree.map(np.asarray, rollout)


@functools.partial(jax.jit, static_argnums=0)
def last_logits(config, params, tokens, sizes):
    """[B, V] logits of the training decoder at the last of the first `sizes` tokens of each right-padded row."""
    mask = jnp.arange(tokens.shape[1]) < sizes[:, None]
    hidden = bind(config, params)(tokens, mask, Compute(jnp.float32, "none"))[0]
    at_last = jnp.take_along_axis(hidden, sizes[:, None, None] - 1, axis=1)[:, 0]
    return at_last @ head_kernel(config, params)[:, : config.vocab_size]


@jax.jit
def draw_one(key, row, t, logits):
    return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), t), logits)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def truncate_logprobs(logits, sample):
    """[V] float64 log-probabilities of the sampling distribution, -inf for truncated tokens."""
    logp = log_softmax(logits / (sample.temperature or 1.0))
    if sample.top_k:
        kept = np.argsort(-logp)[: sample.top_k]
        logp = log_softmax(np.where(np.isin(np.arange(logp.size), kept), logp, -np.inf))
    if sample.top_p < 1:
        order = np.argsort(-logp)
        kept = order[: 1 + np.searchsorted(np.cumsum(np.exp(logp[order])), sample.top_p)]
        logp = log_softmax(np.where(np.isin(np.arange(logp.size), kept), logp, -np.inf))
    return logp


def token_by_token(family, sample, lengths=LENGTHS, width=8, key=KEY):
    """(tokens, logprobs), [B, NEW]: every token by a full forward pass over all tokens before it."""
    config = tiny.FAMILIES[family]
    prompts, mask = tiny.prompts(config, lengths, width)
    rows, sizes = len(lengths), np.asarray(lengths)
    so_far = np.zeros((rows, width + NEW), np.int32)
    for row in range(rows):
        so_far[row, : sizes[row]] = prompts[row][mask[row]]
    tokens, logprobs = np.zeros((rows, NEW), np.int32), np.zeros((rows, NEW))
    for t in range(NEW):
        logits = np.asarray(last_logits(config, params_of(family, "one"), so_far, sizes + t))
        for row in range(rows):
            logp = truncate_logprobs(logits[row], sample)
            if sample.temperature == 0:
                token = int(np.argmax(logits[row]))
            else:
                # The padding of the vocabulary is part of the draw with probability 0: the noise depends on its length.
                padded = np.full(config.padded_vocab, -np.inf, np.float32)
                padded[: config.vocab_size] = logp
                token = int(draw_one(key, row, t, padded))
            tokens[row, t], logprobs[row, t] = token, logp[token]
            so_far[row, sizes[row] + t] = token
    return tokens, logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_generation_equals_a_full_forward_pass_for_every_token(family, temperature):
    sample = SampleConfig(NEW, temperature)
    tokens, logprobs = token_by_token(family, sample)
    rollout = answers(family, sample)
    assert rollout.mask.all() and not rollout.ended.any()
    np.testing.assert_array_equal(rollout.tokens, tokens)
    np.testing.assert_allclose(rollout.logprobs, logprobs, atol=1e-5)
    assert rollout.tokens.dtype == np.int32 and rollout.logprobs.dtype == np.float32


@pytest.mark.parametrize(
    ("family", "dtype", "kept"),
    [
        ("opt", BFLOAT16, FLOAT32),
        ("llama-tied", BFLOAT16, FLOAT32),
        ("llama", BFLOAT16, BFLOAT16),
        ("opt", FLOAT16, FLOAT16),
    ],
)
def test_on_cpus_the_cache_is_in_float32_for_bfloat16_and_heads_with_keys_of_their_own(family, dtype, kept):
    config, layout = tiny.FAMILIES[family], Layout(tiny.mesh_of("fsdp4-tensor2"), GENERATE)
    assert {each.dtype for each in empty_cache(config, 8, 16, dtype, layout).keys} == {kept}
    without_devices = dataclasses.replace(layout, mesh=layout.mesh.abstract_mesh)
    abstract = jax.eval_shape(lambda: empty_cache(config, 8, 16, dtype, without_devices))
    assert {each.dtype for each in abstract.values} == {dtype}
    tokens, mask = tiny.prompts(config, LENGTHS, 8)
    mesh, sample, right = single_device_mesh(), SampleConfig(NEW, 0.0), np.zeros((len(LENGTHS), 8 + NEW), np.int32)
    weights = make_publish(config, mesh, dtype)(params_of(family, "one"))
    rollout = make_generate(tiny.decoding(config, sample, NO_EOS, mesh, dtype))(weights, tokens, mask, KEY)
    for row, length in enumerate(LENGTHS):
        right[row, :length], right[row, length : length + NEW] = tokens[row][mask[row]], rollout.tokens[row]
    for t in range(NEW):
        logits = last_logits(config, params_of(family, "one"), right, np.asarray(LENGTHS) + t)
        expected = np.take_along_axis(log_softmax(np.asarray(logits)), np.asarray(rollout.tokens[:, t : t + 1]), -1)
        np.testing.assert_allclose(rollout.logprobs[:, t], expected[:, 0], atol=0.05)


@pytest.mark.parametrize(
    "sample", [SampleConfig(NEW, 1.0, top_k=5), SampleConfig(NEW, 1.3, top_p=0.7), SampleConfig(NEW, 0.7, 9, 0.8)]
)
def test_with_top_k_and_top_p_logprobs_are_those_of_the_truncated_distribution(sample):
    tokens, logprobs = token_by_token("llama", sample)
    rollout = answers("llama", sample)
    np.testing.assert_array_equal(rollout.tokens, tokens)
    np.testing.assert_allclose(rollout.logprobs, logprobs, atol=1e-5)
    plain = token_by_token("llama", dataclasses.replace(sample, top_k=0, top_p=1.0))[1]
    assert np.abs(plain - logprobs).max() > 0.1, "truncation changes the samples"


@pytest.mark.parametrize(
    ("family", "name"),
    [(f, n) for f in ("opt", "llama") for n in EIGHT] + [("opt-350m", EIGHT[0]), ("llama-tied", EIGHT[1])],
)
def test_eight_devices_sample_the_tokens_of_one(family, name):
    sample = SampleConfig(NEW, 0.7)
    one, eight = answers(family, sample), answers(family, sample, name=name)
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    np.testing.assert_allclose(eight.logprobs, one.logprobs, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 5, 7])
def test_rows_that_do_not_divide_among_the_devices_are_padded_and_give_the_same_answers(rows):
    sample = SampleConfig(NEW, 0.7)
    whole = answers("llama", sample)
    config, mesh = tiny.LLAMA, tiny.mesh_of("fsdp4-tensor2")
    tokens, mask = tiny.prompts(config, LENGTHS, 8)
    run = make_generate(tiny.decoding(config, sample, NO_EOS, mesh, FLOAT32))
    part = run(weights_of("llama", "fsdp4-tensor2"), tokens[:rows], mask[:rows], KEY)
    assert part.tokens.shape == part.mask.shape == part.logprobs.shape == (rows, NEW)
    assert part.prompts.shape == (rows, 8) and part.ended.shape == (rows,)
    np.testing.assert_array_equal(part.tokens, whole.tokens[:rows])
    np.testing.assert_allclose(part.logprobs, whole.logprobs[:rows], atol=1e-5)


def test_a_row_ends_at_its_eos_without_affecting_the_others():
    sample = SampleConfig(NEW, 0.7)
    free = answers("llama", sample)
    early = {int(free.tokens[0, 0]), int(free.tokens[1, 2])}
    late = next(
        row
        for row in range(2, 8)
        if free.tokens[row, -1] not in free.tokens[row, :-1] and not early & set(free.tokens[row].tolist())
    )
    eos = tuple(sorted(early | {int(free.tokens[late, -1])}))
    cut = answers("llama", sample, eos=eos)
    is_end = np.isin(free.tokens, eos)
    sizes = np.where(is_end.any(1), is_end.argmax(1) + 1, NEW)
    assert sizes[0] == 1 and sizes[1] <= 3 and not is_end.any(1).all(), "several lengths, and rows without an EOS"
    np.testing.assert_array_equal(cut.mask, np.arange(NEW) < sizes[:, None])
    np.testing.assert_array_equal(cut.ended, is_end.any(1))
    assert sizes[late] == NEW and cut.ended[late], "an EOS as the last token ends the answer"
    np.testing.assert_array_equal(cut.tokens[cut.mask], free.tokens[cut.mask])
    np.testing.assert_allclose(cut.logprobs[cut.mask], free.logprobs[cut.mask], atol=1e-5)
    assert not cut.logprobs[~cut.mask].any()
    last = cut.tokens[np.arange(8), sizes - 1]
    assert np.isin(last[cut.ended], eos).all() and not np.isin(last[~cut.ended], eos).any()


def test_the_loop_ends_when_every_row_has_ended():
    rollout = answers("llama", SampleConfig(NEW, 0.7), eos=tuple(range(61)))
    assert rollout.ended.all() and rollout.mask.sum() == 8
    assert rollout.tokens[:, 0].any() and not rollout.tokens[:, 1:].any(), "nothing is sampled after the first token"


def test_one_new_token_after_a_one_token_prompt_equals_the_first_of_many():
    many = answers("opt", SampleConfig(NEW, 0.0), lengths=(1, 1))
    one = answers("opt", SampleConfig(1, 0.0), lengths=(1, 1), width=1)
    assert one.tokens.shape == (2, 1)
    tokens, mask = tiny.prompts(tiny.OPT, (1, 1), 1)
    wide, wide_mask = tiny.prompts(tiny.OPT, (1, 1), 8)
    np.testing.assert_array_equal(wide[wide_mask], tokens[mask])
    np.testing.assert_array_equal(one.tokens, many.tokens[:, :1])
    np.testing.assert_allclose(one.logprobs, many.logprobs[:, :1], atol=1e-5)


def test_the_width_of_left_padding_does_not_change_the_answers():
    sample = SampleConfig(NEW, 0.7)
    narrow = answers("opt", sample)
    config = tiny.OPT
    tokens, mask = tiny.prompts(config, LENGTHS, 8)
    wide, wide_mask = (np.pad(x, ((0, 0), (33, 0))) for x in (tokens, mask))
    run = make_generate(tiny.decoding(config, sample, NO_EOS, single_device_mesh(), FLOAT32))
    rollout = run(weights_of("opt", "one"), wide, wide_mask, KEY)
    assert rollout.prompts.shape == (8, 32), "41 columns, of which no row needs more than 8, are cut to the bucket"
    np.testing.assert_array_equal(rollout.tokens, narrow.tokens)
    np.testing.assert_allclose(rollout.logprobs, narrow.logprobs, atol=1e-5)


def test_the_same_key_samples_the_same_tokens_and_another_key_others():
    sample = SampleConfig(NEW, 0.7)
    one, same, other = (answers("llama", sample, key=key) for key in (KEY, jax.random.key(11), jax.random.key(12)))
    np.testing.assert_array_equal(same.tokens, one.tokens)
    np.testing.assert_array_equal(same.logprobs, one.logprobs)
    assert (other.tokens != one.tokens).mean() > 0.5


def test_rows_with_the_same_prompt_are_sampled_independently():
    config = tiny.LLAMA
    tokens, mask = tiny.prompts(config, [5], 8)
    run = make_generate(tiny.decoding(config, SampleConfig(NEW, 0.7), NO_EOS, single_device_mesh(), FLOAT32))
    rollout = run(weights_of("llama", "one"), np.repeat(tokens, 8, 0), np.repeat(mask, 8, 0), KEY)
    assert len({tuple(row) for row in np.asarray(rollout.tokens)}) == 8


@pytest.mark.parametrize(
    "sample",
    [
        SampleConfig(1),
        SampleConfig(1, 0.7),
        SampleConfig(1, top_k=4),
        SampleConfig(1, 1.5, top_k=1),
        SampleConfig(1, top_p=0.75),
        SampleConfig(1, 1.4, top_k=6, top_p=0.8),
        SampleConfig(1, top_k=100),
        SampleConfig(1, top_p=1e-6),
    ],
)
def test_forty_thousand_samples_fit_the_distribution_of_a_numpy_reference(sample):
    logits = np.random.default_rng(3).normal(0, 1.2, 12).astype(np.float32)
    count = 40_000
    tokens, logprobs = jax.jit(draw, static_argnums=2)(
        jnp.broadcast_to(logits, (count, 12)), jax.random.split(jax.random.key(4), count), sample
    )
    logp = truncate_logprobs(logits, sample)
    seen, expected = np.bincount(tokens, minlength=12), count * np.exp(logp)
    kept = expected > 0
    assert not seen[~kept].any(), "truncated tokens are never sampled"
    np.testing.assert_allclose(logprobs, logp[tokens], atol=1e-5)
    statistic = ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic <= chi2.ppf(0.999, max(kept.sum() - 1, 1))


def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_p():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))
    for p, kept in [(0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)]:
        cut = np.isfinite(truncate_logits(logits, SampleConfig(1, top_p=p)))
        assert cut.sum(1).tolist() == [kept, kept] and cut[0, 0] and cut[1, 3]


def test_top_p_is_applied_to_the_mass_left_by_top_k():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    cut = truncate_logits(logits, SampleConfig(1, top_k=2, top_p=0.56))  # probabilities 4/7 and 3/7
    assert np.isfinite(cut).tolist() == [[True, False, False, False]]


def test_the_padding_of_the_vocabulary_is_never_sampled_at_any_temperature():
    rollout = answers("llama", SampleConfig(NEW, 100.0), lengths=tuple([4] * 64))
    assert rollout.tokens.max() < 61 and len(np.unique(rollout.tokens)) > 55
    assert rollout.logprobs.min() > np.log(1 / 61) - 0.5, "61 ids share the mass, not 64"


def test_lengths_are_rounded_up_to_powers_of_two_of_at_least_32():
    assert [bucket_length(n) for n in (1, 31, 32, 33, 64, 65, 1000)] == [32, 32, 32, 64, 64, 128, 1024]


@pytest.mark.parametrize(
    ("sample", "reported"),
    [
        (SampleConfig(0), "max_new_tokens=0: at least 1"),
        (SampleConfig(1, -0.1), "temperature=-0.1: at least 0"),
        (SampleConfig(1, top_k=-1), "top_k=-1: at least 0"),
        (SampleConfig(1, top_p=0.0), "top_p=0.0: above 0 and at most 1"),
        (SampleConfig(1, top_p=1.1), "top_p=1.1: above 0 and at most 1"),
    ],
)
def test_settings_that_define_no_distribution_are_rejected(sample, reported):
    with pytest.raises(ValueError, match=reported):
        check_sample(sample)
    with pytest.raises(ValueError, match=reported):
        make_generate(tiny.decoding(tiny.LLAMA, sample, NO_EOS, single_device_mesh(), FLOAT32))


def test_an_empty_prompt_is_rejected_with_its_row():
    with pytest.raises(ValueError, match="row 2 of the prompts is empty: give it at least one token"):
        answers("opt", SampleConfig(NEW), lengths=(3, 1, 0, 2))


def test_more_positions_than_the_model_has_are_rejected_with_both_fixes():
    check_positions(tiny.OPT, 34, 6)
    with pytest.raises(ValueError) as error:
        answers("opt", SampleConfig(NEW), lengths=(35, 1), width=35)
    assert str(error.value) == (
        "a prompt of 35 tokens and 6 new ones need 41 positions, and the model has 40: "
        "shorten the prompt to 34 tokens or set max_new_tokens to at most 5"
    )


def test_a_prompt_and_an_answer_that_fill_all_positions_are_accepted():
    family, sample = "opt", SampleConfig(NEW, 0.0)
    rollout = answers(family, sample, lengths=(34, 3), width=34)
    np.testing.assert_array_equal(rollout.tokens, token_by_token(family, sample, (34, 3), 34)[0])


def load(family, name="one", eos=-1, **more):
    layout = Layout(tiny.mesh_of(name), TRAIN)
    model = Pretrained(tiny.FAMILIES[family], params_of(family, name), None, {"eos_token_id": eos}, {}, layout)
    return dataclasses.replace(model, **more)


def test_public_generate_accepts_padding_on_either_side():
    family, sample = "opt-350m", SampleConfig(NEW, 0.7)
    expected = answers(family, sample)
    for side in ("left", "right"):
        tokens, mask = tiny.prompts(tiny.FAMILIES[family], LENGTHS, 8, side=side)
        for ids, attended in ((tokens, mask), (np.where(mask, tokens, 9).astype(np.int64), mask.astype(np.int64))):
            rollout = rlhf_jax.generate(load(family), ids, attended, sample, KEY)
            np.testing.assert_array_equal(rollout.tokens, expected.tokens)
            np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-5)


def test_public_generate_on_eight_devices_equals_one_with_any_number_of_rows():
    tokens, mask = tiny.prompts(tiny.LLAMA, LENGTHS[:3], 8, side="right")
    one, eight = (
        rlhf_jax.generate(load("llama", name), tokens, mask, SampleConfig(NEW, 0.7), KEY)
        for name in ("one", "fsdp4-tensor2")
    )
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    np.testing.assert_allclose(eight.logprobs, one.logprobs, atol=1e-5)


def test_greedy_answers_are_the_argmax_of_public_apply():
    model = load("llama")
    tokens, mask = tiny.prompts(tiny.LLAMA, LENGTHS, 8)
    rollout = rlhf_jax.generate(model, tokens, mask, SampleConfig(NEW, 0.0), KEY)
    whole = np.concatenate([tokens, rollout.tokens], axis=1)
    logits = rlhf_jax.apply(model, whole, np.pad(mask, ((0, 0), (0, NEW)), constant_values=True))
    np.testing.assert_array_equal(np.argmax(logits[:, 7:-1], axis=-1), rollout.tokens)
    logp = log_softmax(np.asarray(logits[:, 7:-1]))
    chosen = np.take_along_axis(logp, np.asarray(rollout.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(rollout.logprobs, chosen, atol=1e-5)


def test_an_eos_named_in_any_configuration_file_ends_answers():
    free = answers("llama", SampleConfig(NEW, 0.7))
    one, other = int(free.tokens[0, 0]), int(free.tokens[1, 0])
    model = load("llama", eos=one, generation_config={"eos_token_id": [other]})
    tokens, mask = tiny.prompts(tiny.LLAMA, LENGTHS, 8)
    rollout = rlhf_jax.generate(model, tokens, mask, SampleConfig(NEW, 0.7), KEY)
    assert rollout.ended[:2].all() and rollout.mask[:2].sum() == 2
    with pytest.raises(ValueError, match="names no EOS token, .* set eos_token_id"):
        rlhf_jax.generate(load("llama", eos=None), tokens, mask, SampleConfig(NEW), KEY)


def test_a_model_with_a_scalar_head_cannot_generate():
    model = load("llama", config=tiny.scalar(tiny.LLAMA))
    with pytest.raises(ValueError, match="scalar head and cannot generate: load it with from_pretrained"):
        rlhf_jax.generate(model, *tiny.prompts(tiny.LLAMA, [2], 2), SampleConfig(NEW), KEY)


# Products of the tiny LLaMA: per layer (two) query-key-value, scores, weighted values, output, gate-up, and down;
# then the head. If generation reads the training base: five linears instead of two, and two products per adapter.
PRODUCTS = {"fused": 13, "one_copy": 19, "one_copy-lora": 47, "nf4": 19, "nf4-lora": 47}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_decode_step_multiplies_by_every_weight_once_as_traced_and_as_compiled(kind):
    kept, _, lora = kind.partition("-")
    config, mesh = tiny.with_lora(tiny.LLAMA, tiny.LORA if lora else NO_LORA), single_device_mesh()
    params, leaves = tiny.random_params(config, mesh), abstract_params(config)
    for path in filter(is_quantisable, leaves):
        if kept == "one_copy":
            params[path] = Unstacked(tuple(params[path]))
        elif kept == "nf4":
            params[path] = quantise(params[path], "nf4", block_axis(leaves[path].axes))
    model = Inference(config, Layout(mesh, GENERATE), FLOAT32)
    weights, cache = make_publish(config, mesh, FLOAT32)(params), empty_cache(config, 2, 8, FLOAT32, model.layout)
    state = empty_state(Decoding(model, SampleConfig(NEW), NO_EOS), 2, 2)
    lowered = jax.jit(decode_step, static_argnums=0).lower(model, weights, state.newest, cache, 4)
    assert lowered.as_text().count("stablehlo.dot_general ") == PRODUCTS[kind]
    assert lowered.compile().as_text().count(" dot(") == PRODUCTS[kind]
