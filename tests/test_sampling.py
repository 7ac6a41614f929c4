"""Sampling against NumPy and transformers: penalties, bans and truncation, in the order of transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import chi2

from rlhf_jax.mesh import single_device_mesh
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import bind, head_kernel
from rlhf_jax.rollout import make_generate, make_publish
from rlhf_jax.sampling import (
    SampleConfig,
    check_learnable,
    check_sample,
    draw,
    is_model_distribution,
    most_likely,
    penalise_logits,
    seen_ids,
    truncate_logits,
)

FLOAT32 = jnp.dtype("float32")
VOCAB, NEW, DRAWS = 12, 8, 40_000
SIGNIFICANCE = 0.001  # of each chi-square test; keys are fixed, so a test passes always or never
EOS = (2, 7)
PROMPT = np.array([1, 4, 4, 9])
PENALISED = SampleConfig(NEW, repetition_penalty=1.7)
FORBIDDEN = SampleConfig(NEW, min_new_tokens=3)
ALL = SampleConfig(NEW, 0.9, top_k=9, top_p=0.9, min_p=0.08, repetition_penalty=1.4, min_new_tokens=3)
SETTINGS = [
    SampleConfig(NEW, min_p=0.2),
    SampleConfig(NEW, 1.6, min_p=0.35),
    SampleConfig(NEW, min_p=1.0),
    PENALISED,
    SampleConfig(NEW, 1.6, repetition_penalty=0.6),
    FORBIDDEN,
    ALL,
]


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def reference(logits, sample, prefix, drawn):
    """[V] float64 log-probabilities of the next token after `prefix`, whose last `drawn` tokens are the answer."""
    x = logits.astype(np.float64).copy()
    for token in set(prefix.tolist()) if sample.repetition_penalty != 1 else ():
        x[token] = x[token] * sample.repetition_penalty if x[token] < 0 else x[token] / sample.repetition_penalty
    if drawn < sample.min_new_tokens:
        x[list(EOS)] = -np.inf
    x = x / (sample.temperature or 1.0)
    if sample.temperature:
        order = np.argsort(-x, kind="stable")
        if sample.top_k:
            x[order[sample.top_k :]] = -np.inf
        if sample.top_p < 1:
            mass = np.cumsum(np.exp(log_softmax(x))[order])
            x[order[1 + np.searchsorted(mass, sample.top_p) :]] = -np.inf
        if sample.min_p:
            p = np.exp(log_softmax(x))
            x[p < sample.min_p * p.max() * (1 - 1e-12)] = -np.inf
    return log_softmax(x)


def some_logits():
    return np.random.default_rng(3).normal(0, 1.2, VOCAB).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def draws(sample, drawn, logits, seen, keys):
    count = len(keys)
    many = jnp.broadcast_to(logits, (count, VOCAB)), jnp.broadcast_to(seen, (count, VOCAB))
    return draw(penalise_logits(many[0], sample, many[1], jnp.full(count, drawn), EOS), keys, sample)


@pytest.mark.parametrize("drawn", [0, 2, 3])
@pytest.mark.parametrize("sample", SETTINGS)
def test_forty_thousand_samples_fit_the_numpy_reference_by_chi_square(sample, drawn):
    logits, seen = some_logits(), np.isin(np.arange(VOCAB), PROMPT)
    tokens, logprobs = draws(sample, drawn, logits, seen, jax.random.split(jax.random.key(4), DRAWS))
    logp = reference(logits, sample, PROMPT, drawn)
    seen_often, expected = np.bincount(tokens, minlength=VOCAB), DRAWS * np.exp(logp)
    kept = expected > 0
    assert not seen_often[~kept].any(), "truncated and forbidden tokens are never sampled"
    np.testing.assert_allclose(logprobs, logp[np.asarray(tokens)], atol=1e-5)
    assert expected[kept].min() > 5, "the chi-square test needs an expected count of five"
    statistic = ((seen_often - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic <= chi2.ppf(1 - SIGNIFICANCE, max(kept.sum() - 1, 1))


def test_a_wrong_order_or_a_missing_step_fails_the_chi_square_test():
    logits, seen = some_logits(), np.isin(np.arange(VOCAB), PROMPT)
    keys = jax.random.split(jax.random.key(4), DRAWS)
    for other in (
        dataclasses.replace(PENALISED, repetition_penalty=1.6),
        dataclasses.replace(PENALISED, temperature=1.05),
        dataclasses.replace(PENALISED, min_p=0.01),
    ):
        tokens, _ = draws(other, 0, logits, seen, keys)
        expected = DRAWS * np.exp(reference(logits, PENALISED, PROMPT, 0))
        statistic = ((np.bincount(tokens, minlength=VOCAB) - expected) ** 2 / expected).sum()
        assert statistic > chi2.ppf(1 - SIGNIFICANCE, VOCAB - 1), other


def test_min_p_keeps_tokens_of_at_least_that_share_of_the_likeliest_after_top_p():
    logits = jnp.log(jnp.array([[0.5, 0.26, 0.14, 0.1]]))
    for p, kept in [(0.19, 4), (0.21, 3), (0.27, 3), (0.29, 2), (0.53, 1), (1.0, 1)]:
        assert np.isfinite(truncate_logits(logits, SampleConfig(1, min_p=p))).sum() == kept
    assert np.isfinite(truncate_logits(logits, SampleConfig(1, top_p=0.8, min_p=0.21))).sum() == 3
    assert np.isfinite(truncate_logits(logits, SampleConfig(1, top_p=0.7, min_p=0.21))).sum() == 2


def test_the_repetition_penalty_counts_only_real_tokens_and_each_once():
    tokens = jnp.array([[0, 0, 5, 5, 3]])
    seen = seen_ids(tokens, jnp.array([[False, False, True, True, True]]), 8)
    assert np.flatnonzero(seen[0]).tolist() == [3, 5], "padding is not counted"
    logits = jnp.array([[1.0, 1.0, 1.0, -2.0, 1.0, 3.0, 1.0, 1.0]])
    penalised = penalise_logits(logits, SampleConfig(1, repetition_penalty=2.0), seen, jnp.zeros(1, int), EOS)
    assert penalised[0].tolist() == [1.0, 1.0, 1.0, -4.0, 1.0, 1.5, 1.0, 1.0]


@pytest.mark.parity
@pytest.mark.parametrize("drawn", [0, 2, 3])
@pytest.mark.parametrize("sample", [*SETTINGS, SampleConfig(NEW, 0.7, 5, 0.8), dataclasses.replace(ALL, top_k=0)])
def test_the_distribution_equals_that_of_the_logits_processors_of_transformers(sample, drawn):
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    options = GenerationConfig(
        do_sample=True,
        max_new_tokens=NEW,
        eos_token_id=list(EOS),
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        min_p=sample.min_p or None,
        repetition_penalty=sample.repetition_penalty,
        min_new_tokens=sample.min_new_tokens or None,
    )
    options._eos_token_tensor = torch.tensor(EOS)
    processors = model._get_logits_processor(options, input_ids_seq_length=len(PROMPT), device="cpu")
    rng = np.random.default_rng(5)
    for _ in range(20):
        logits = rng.normal(0, 2, (1, 64)).astype(np.float32)
        prefix = np.concatenate([PROMPT, rng.integers(0, 64, drawn)])[None]
        theirs = torch.log_softmax(processors(torch.tensor(prefix), torch.tensor(logits)), -1).numpy()
        seen = seen_ids(jnp.asarray(prefix), jnp.ones_like(prefix, bool), 64)
        ours = penalise_logits(jnp.asarray(logits), sample, seen, jnp.array([drawn]), EOS)
        np.testing.assert_allclose(jax.nn.log_softmax(truncate_logits(ours, sample)), theirs, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def whole_logits(config, params, tokens, mask):
    hidden = bind(config, params)(tokens, mask, Compute(jnp.float32, "none"))[0]
    return hidden @ head_kernel(config, params)[:, : config.vocab_size]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.9])
@pytest.mark.parametrize("sample", [SampleConfig(NEW), *SETTINGS])
def test_a_rollout_has_the_logprobs_of_the_sampling_distribution_and_of_the_model(sample, temperature):
    sample = dataclasses.replace(sample, temperature=temperature)
    mesh, config = single_device_mesh(), tiny.LLAMA
    params = tiny.random_params(config, mesh)
    weights = make_publish(config, mesh, FLOAT32)(params)
    prompts, mask = tiny.prompts(config, [5, 2, 6, 1], 6)
    rollout = make_generate(tiny.decoding(config, sample, EOS, mesh, FLOAT32))(
        weights, prompts, mask, jax.random.key(1)
    )
    rollout = jax.tree.map(np.asarray, rollout)
    assert is_model_distribution(sample) == (sample in (SampleConfig(NEW), SampleConfig(NEW, 0.0)))
    for row, size in enumerate(mask.sum(1)):
        length = rollout.mask[row].sum()
        whole = np.concatenate([prompts[row][mask[row]], rollout.tokens[row, :length]])
        filled = np.pad(whole, (0, 6 + NEW - len(whole)))[None]
        logits = np.asarray(whole_logits(config, params, filled, np.arange(6 + NEW)[None] < len(whole)))[0]
        for t in range(length):
            at, token = size + t - 1, rollout.tokens[row, t]
            drawn_from = reference(logits[at], sample, whole[: size + t], t)
            assert abs(rollout.logprobs[row, t] - drawn_from[token]) < 2e-5
            assert abs(rollout.model_logprobs[row, t] - log_softmax(logits[at].astype(np.float64))[token]) < 2e-5
            if temperature == 0:
                assert token == drawn_from.argmax()


def test_no_answer_ends_before_min_new_tokens_and_some_end_right_after():
    mesh, config, eos = single_device_mesh(), tiny.LLAMA, tuple(range(0, 61, 2))
    weights = make_publish(config, mesh, FLOAT32)(tiny.random_params(config, mesh))
    prompts, mask = tiny.prompts(config, [4] * 64, 4)
    for least in (0, 1, 3, NEW):
        sample = SampleConfig(NEW, 2.0, min_new_tokens=least)
        rollout = make_generate(tiny.decoding(config, sample, eos, mesh, FLOAT32))(
            weights, prompts, mask, jax.random.key(1)
        )
        sizes = np.asarray(rollout.mask.sum(1))
        assert sizes.min() == min(least + 1, NEW)
        assert rollout.ended.any() == (least < NEW)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (dict(min_p=-0.1), "min_p=-0.1: from 0 to 1"),
        (dict(min_p=1.5), "min_p=1.5: from 0 to 1"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0: above 0"),
        (dict(min_new_tokens=-1), "min_new_tokens=-1: from 0 to max_new_tokens=8"),
        (dict(min_new_tokens=9), "min_new_tokens=9: from 0 to max_new_tokens=8"),
        (dict(num_samples=0), "num_samples=0: at least 1"),
    ],
)
def test_settings_that_define_no_distribution_are_rejected(change, reported):
    with pytest.raises(ValueError, match=reported):
        check_sample(SampleConfig(NEW, **change))


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        (dict(temperature=0.0), "set it above 0"),
        (dict(top_k=5), "set top_k=0 and top_p=1.0"),
        (dict(min_p=0.1), "set min_p=0.0"),
        (dict(repetition_penalty=1.1), "set repetition_penalty=1.0"),
        (dict(min_new_tokens=1), "set min_new_tokens=0"),
    ],
)
def test_ppo_rejects_sampling_settings_that_change_the_distribution_and_names_the_fix(change, fix):
    with pytest.raises(ValueError, match=fix):
        check_learnable(SampleConfig(NEW, **change))


def test_ppo_accepts_a_temperature_and_several_samples_per_prompt():
    check_learnable(SampleConfig(NEW, 0.7, num_samples=4))


def test_the_tokens_drawn_are_those_of_argmax_and_of_categorical():
    logits = jax.random.normal(jax.random.key(0), (64, 300))
    logits = logits.at[:, 200:].set(-jnp.inf).at[0].set(0.0).at[1].set(jnp.finfo(jnp.float32).min)
    keys = jax.random.split(jax.random.key(1), 64)
    greedy, drawn = (
        jax.jit(lambda x, t=t: draw(x, keys, SampleConfig(1, temperature=t))[0])(logits) for t in (0.0, 1.0)
    )
    assert (greedy == logits.argmax(-1)).all()
    assert (drawn == jax.vmap(jax.random.categorical)(keys, logits)).all()
    assert (most_likely(jnp.full((2, 5), jnp.nan)) == 0).all()
