"""Requests that come at any time: each is answered as if alone, and nothing is compiled again."""

import functools

import jax
import numpy as np
import pytest
import tiny

import rlhf_jax
from rlhf_jax.answering import Answering, Request
from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.sampling import SampleConfig

EOS = tuple(range(3, 61, 5))  # a fifth of the ids, so that answers have many lengths
NEW = 8
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 61, size).tolist() for size in (1, 3, 30, 7, 31, 2, 12, 20, 5)]
SAMPLES = [(0.7, 1.0), (0.0, 1.0), (1.3, 0.6)]  # temperature, top_p


@functools.lru_cache
def model(family):
    layout = Layout(single_device_mesh(), TRAIN)
    params = tiny.random_params(tiny.FAMILIES[family], layout.mesh)
    return Pretrained(tiny.FAMILIES[family], params, None, {"eos_token_id": list(EOS)}, {}, layout)


@functools.lru_cache
def answering(family, rows=4):
    made = Answering(model(family), rows)
    made.warm_up()
    return made


def request(i, **changes):
    temperature, top_p = SAMPLES[i % len(SAMPLES)]
    return Request(PROMPTS[i], **{**dict(max_new_tokens=NEW, temperature=temperature, top_p=top_p, seed=i), **changes})


def alone(family, i):
    """The tokens and their log-probabilities by `generate`, of one prompt and the key of the request's seed."""
    temperature, top_p = SAMPLES[i % len(SAMPLES)]
    sample = SampleConfig(NEW, temperature, top_p=top_p)
    ids = np.array([PROMPTS[i]])
    rollout = rlhf_jax.generate(model(family), ids, np.ones_like(ids), sample, jax.random.key(i))
    real = np.asarray(rollout.mask[0])
    return np.asarray(rollout.tokens[0])[real].tolist(), np.asarray(rollout.model_logprobs[0])[real]


def run(made, requests, arrive=1):
    """{owner: its tokens}; `arrive` requests come with each step, as far as rows are free."""
    found, waiting = {owner: [] for owner, _ in requests}, list(requests)
    for _ in range(1000):
        for _ in range(min(arrive, made.free, len(waiting))):
            made.add(*waiting.pop(0))
        for token in made.step():
            found[token.owner].append(token)
        if not waiting and made.free == len(made.owners):
            return found
    raise AssertionError("the requests did not end")


@pytest.mark.parametrize("family", ["llama", "opt", "sparse"])
def test_each_request_gets_the_tokens_and_logprobs_of_generate_alone_with_its_seed(family):
    found = run(answering(family), [(i, request(i)) for i in range(len(PROMPTS))], arrive=2)
    sizes = []
    for i in range(len(PROMPTS)):
        tokens, logprobs = alone(family, i)
        assert [token.id for token in found[i]] == tokens
        np.testing.assert_allclose([token.logprob for token in found[i]], logprobs, atol=1e-5)
        assert [token.is_last for token in found[i]] == [False] * (len(tokens) - 1) + [True]
        sizes.append(len(tokens))
    assert len(set(sizes)) > 2 or family == "opt", "answers of several lengths"


def test_after_the_warm_up_nothing_is_compiled():
    made = answering("llama")
    with tiny.compilations() as names:
        run(made, [(i, request(i, alternatives=i)) for i in range(len(PROMPTS))])
        run(made, [(i, request(i)) for i in range(len(PROMPTS))], arrive=4)
    assert names == []


def test_a_stopped_request_gives_no_more_tokens_and_its_row_answers_the_next():
    made = answering("llama")
    for i in range(4):
        made.add(i, request(i, max_new_tokens=9))
    made.step()
    assert made.free == 0
    made.stop(2)
    assert made.free == 1
    made.add("new", request(8))
    found = []
    while made.free < 4:
        found += made.step()
    assert 2 not in {token.owner for token in found}
    assert [token.id for token in found if token.owner == "new"] == alone("llama", 8)[0]
    made.stop("a request that has ended")


def test_the_choices_of_a_seed_are_the_samples_of_generate_to_one_prompt():
    found = run(answering("llama"), [(c, request(2, choice=c, temperature=1.5, top_p=1.0)) for c in range(4)])
    ids = np.array([PROMPTS[2]])
    sample = SampleConfig(NEW, 1.5, num_samples=4)
    rollout = rlhf_jax.generate(model("llama"), ids, np.ones_like(ids), sample, jax.random.key(2))
    for c in range(4):
        assert [token.id for token in found[c]] == np.asarray(rollout.tokens[c])[np.asarray(rollout.mask[c])].tolist()


def test_alternatives_are_the_most_likely_tokens_by_the_model_with_their_logprobs():
    (tokens,) = run(answering("llama"), [(0, request(2, alternatives=5))]).values()
    ids = PROMPTS[2] + [token.id for token in tokens]
    logits = rlhf_jax.apply(model("llama"), np.array([ids]), np.ones((1, len(ids))))
    expected = np.asarray(jax.nn.log_softmax(logits[0, len(PROMPTS[2]) - 1 : -1], axis=-1))
    for token, logprobs in zip(tokens, expected, strict=True):
        best = np.argsort(-logprobs)[:5]
        assert [id for id, _ in token.alternatives] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.alternatives], logprobs[best], atol=1e-5)


def test_an_answer_may_fill_the_context_and_not_exceed_it():
    made = answering("llama")
    assert made.context == 40
    (tokens,) = run(made, [(0, request(2, max_new_tokens=10))]).values()
    assert len(tokens) <= 10 and tokens[-1].is_last
    for ids, longest in ((PROMPTS[2], 11), ([], 3), (PROMPTS[2], 0)):
        with pytest.raises(ValueError, match="both together at most 40"):
            made.add(0, Request(ids, longest))
    assert made.free == 4


def test_a_context_beyond_the_positions_of_the_model_is_refused():
    with pytest.raises(ValueError, match="a context of 41 positions: from 2 to the 40"):
        Answering(model("llama"), 4, 41)
    with pytest.raises(ValueError, match="rows=0"):
        Answering(model("llama"), 0)


def test_logits_that_are_not_finite_are_an_error_and_after_a_reset_nothing_of_them_is_left():
    made = answering("llama")
    weights = made.weights
    made.weights = jax.tree.map(lambda x: x * np.nan if x.dtype == np.float32 else x, weights)
    made.add("broken", request(0))
    with pytest.raises(FloatingPointError, match="not finite"):
        made.step()
    made.weights = weights
    made.reset()
    assert [token.id for token in run(made, [(1, request(1))])[1]] == alone("llama", 1)[0]
