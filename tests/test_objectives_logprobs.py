import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import logprobs

B, T, D, V = 2, 7, 5, 11


@pytest.fixture
def arrays(rng):
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def by_numpy(hidden, head, targets):
    """(log-probabilities, entropy) in float64, by the definition."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    return chosen, -(np.exp(log_p) * log_p).sum(-1)


def test_logprobs_and_entropy_of_probabilities_one_half_one_quarter_one_quarter():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]])) + 3.0
    chosen, entropy = logprobs.from_logits(logits, jnp.array([[0, 2]]))
    np.testing.assert_allclose(chosen, [[-0.6931472, -1.3862944]], rtol=1e-6)  # -log 2, -log 4
    np.testing.assert_allclose(entropy, [[1.0397208, 1.0397208]], rtol=1e-6)  # 1.5 log 2


def test_logits_of_ten_thousand_do_not_overflow():
    chosen, entropy = logprobs.from_logits(jnp.array([[[1e4, 1e4, -1e4]]]), jnp.array([[1]]))
    assert chosen.item() == pytest.approx(-0.6931472)
    assert entropy.item() == pytest.approx(0.6931472)


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 7, 100])
def test_every_chunk_size_gives_the_numpy_result(arrays, chunk):
    chosen, entropy = logprobs.token_logprobs_and_entropy(*arrays, chunk=chunk)
    want_chosen, want_entropy = by_numpy(*arrays)
    assert chosen.shape == entropy.shape == (B, T) and chosen.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(chosen, want_chosen, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(entropy, want_entropy, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(logprobs.token_logprobs(*arrays, chunk=chunk), chosen)


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradients_equal_those_through_unchunked_logits(arrays, chunk):
    hidden, head, targets = arrays
    weight = jnp.linspace(-1.0, 2.0, B * T).reshape(B, T)

    def whole(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head)
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return (weight * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0] + entropy**2).sum()

    def with_chunks(hidden, head):
        chosen, entropy = logprobs.token_logprobs_and_entropy(hidden, head, targets, chunk=chunk)
        return (weight * chosen + entropy**2).sum()

    ours, theirs = jax.grad(with_chunks, (0, 1))(hidden, head), jax.grad(whole, (0, 1))(hidden, head)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 3])
def test_padding_columns_of_the_vocabulary_have_no_effect(arrays, chunk):
    hidden, head, targets = arrays

    def loss(hidden, head):
        chosen, entropy = logprobs.token_logprobs_and_entropy(hidden, head, targets % 8, chunk=chunk, num_real=8)
        return chosen.sum() + entropy.sum(), (chosen, entropy)

    junk = head.at[:, 8:].set(50.0)
    (gradient_hidden, gradient_head), (chosen, entropy) = jax.grad(loss, (0, 1), has_aux=True)(hidden, junk)
    want_chosen, want_entropy = by_numpy(hidden, head[:, :8], targets % 8)
    np.testing.assert_allclose(chosen, want_chosen, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(entropy, want_entropy, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(gradient_head[:, 8:], np.zeros((D, 3)))
    assert np.isfinite(gradient_hidden).all()
    np.testing.assert_array_equal(gradient_hidden, jax.grad(loss, has_aux=True)(hidden, head)[0])


def largest_array(jaxpr):
    """Elements of the largest intermediate of a jaxpr and of all jaxprs inside it."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(out.aval.shape)) for out in equation.outvars if hasattr(out.aval, "shape")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


def test_no_array_is_larger_than_the_logits_of_one_chunk_forward_or_backward():
    length, vocab, chunk = 64, 1000, 8
    hidden, head = jnp.ones((B, length, 4)), jnp.ones((4, vocab))
    targets = jnp.zeros((B, length), jnp.int32)

    def loss(hidden, head, chunk):
        return logprobs.token_logprobs(hidden, head, targets, chunk=chunk).sum()

    def largest(chunk):
        step = jax.value_and_grad(lambda hidden, head: loss(hidden, head, chunk), (0, 1))
        return largest_array(jax.make_jaxpr(step)(hidden, head).jaxpr)

    assert largest(chunk) == B * chunk * vocab
    assert largest(0) == B * length * vocab  # the measure detects unchunked logits


def test_sums_over_bfloat16_inputs_are_float32(arrays):
    hidden, head, targets = arrays
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    chosen = logprobs.token_logprobs(hidden, head, targets, chunk=2)
    assert chosen.dtype == jnp.float32
    np.testing.assert_allclose(chosen, by_numpy(hidden, head, targets)[0], rtol=2e-5, atol=2e-6)


def test_a_head_sharded_over_the_vocabulary_gives_the_same_result(arrays):
    hidden, head, targets = arrays
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    padded = jax.device_put(jnp.pad(head, [(0, 0), (0, 1)]), jax.NamedSharding(mesh, jax.P(None, "tensor")))
    rows = jax.device_put(hidden, jax.NamedSharding(mesh, jax.P("fsdp")))
    chosen = jax.jit(lambda *xs: logprobs.token_logprobs(*xs, chunk=3, num_real=V))(rows, padded, targets)
    np.testing.assert_allclose(chosen, by_numpy(hidden, head, targets)[0], rtol=2e-5, atol=2e-6)


def test_a_negative_chunk_size_is_rejected(arrays):
    with pytest.raises(ValueError, match="chunk is -1: give the positions per chunk, or 0"):
        logprobs.token_logprobs(*arrays, chunk=-1)
