"""Fused attention: when it is chosen and why, and that its calls compute the same as `attention`."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from einops import rearrange

from rlhf_jax.decode import prefill
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, single_device_mesh
from rlhf_jax.models import decoder, inference, pretrained, transformer
from rlhf_jax.models.attention import (
    AttentionKernel,
    describe_kernel,
    kernel_for_mesh,
    uniform_window,
)
from rlhf_jax.models.config import Alibi, Compute
from rlhf_jax.models.decoder import bind
from rlhf_jax.models.layers import attention, causal_attention, fused_attention, roll_rows, softmax

BFLOAT16, FLOAT16, FLOAT32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))
WINDOWED = dataclasses.replace(tiny.LLAMA, windows=(5, 5))
ALTERNATING = dataclasses.replace(tiny.LLAMA, windows=(0, 5))


def kernel(config=tiny.LLAMA, dtype=BFLOAT16, length=16, choice="auto", *, platform="gpu", capability="8.0", **of):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    return kernel_for_mesh(SimpleNamespace(devices=np.array([device])), config, dtype, length, choice, **of)


@pytest.mark.parametrize(
    "allowed",
    [
        {},
        {"dtype": FLOAT16},
        {"choice": "cudnn", "capability": "9.0"},
        {"capability": "12.0"},
        {"config": dataclasses.replace(tiny.LLAMA, head_dim=128)},
        {"config": WINDOWED},
        {"config": ALTERNATING, "length": 5},
        {"config": tiny.SPARSE},
        {"config": tiny.scalar(tiny.OPT)},
        {"length": 511},
    ],
)
def test_attention_is_fused_if_gpu_dtype_and_model_allow_it(allowed):
    assert kernel(**allowed).name == "cudnn"


OBSTACLES = [
    ({"platform": "cpu", "capability": ""}, "the devices are cpu"),
    ({"platform": "tpu", "capability": ""}, "the devices are tpu"),
    ({"capability": "gfx90a"}, "not NVIDIA's"),
    ({"capability": ""}, "not NVIDIA's"),
    ({"capability": "7.0"}, "needs compute capability 8.0, and these GPUs have 7.0"),
    ({"dtype": FLOAT32}, "the dtype is float32"),
    ({"config": dataclasses.replace(tiny.LLAMA, attention_softcap=50.0)}, "soft-capped at 50"),
    ({"config": dataclasses.replace(tiny.LLAMA, alibi=Alibi((0.5,) * 8))}, "biased"),
    ({"config": dataclasses.replace(tiny.LLAMA, head_dim=256)}, "heads have size 256"),
    ({"config": dataclasses.replace(tiny.LLAMA, head_dim=12)}, "heads have size 12"),
    ({"config": ALTERNATING}, "windows differ between the layers and rows of 16 tokens are longer"),
    ({"packed": True}, "rows are packed"),
    ({"choice": "xla"}, 'model.attention="xla"'),
]


@pytest.mark.parametrize(("circumstance", "reason"), OBSTACLES)
def test_otherwise_attention_is_xlas_with_the_reason(circumstance, reason):
    chosen = kernel(**circumstance)
    assert chosen.name == "xla" and reason in chosen.reason


@pytest.mark.parametrize(("circumstance", "reason"), OBSTACLES[:-1])
def test_requesting_impossible_fused_attention_is_an_error_with_the_fix(circumstance, reason):
    with pytest.raises(ValueError, match='model.attention="cudnn" is impossible') as error:
        kernel(**circumstance, choice="cudnn")
    assert reason in str(error.value) and 'set it to "auto" or "xla"' in str(error.value)


def test_attention_on_cpus_is_xlas():
    assert kernel_for_mesh(single_device_mesh(), tiny.LLAMA, BFLOAT16, 16, "auto").name == "xla"


def test_the_log_line_of_a_run_names_the_phases():
    said = describe_kernel(kernel(), "scoring and prefill", decodes=True)
    assert said == "cuDNN for scoring and prefill (bfloat16, causal), XLA for decoding (one query)"
    assert describe_kernel(kernel(dtype=FLOAT32), "training", decodes=True).startswith(
        "XLA (fused attention computes in"
    )


def test_windows_longer_than_the_rows_are_dropped():
    assert [uniform_window(ALTERNATING, length) for length in (4, 5, 6)] == [0, 0, None]
    assert [uniform_window(WINDOWED, length) for length in (5, 6)] == [0, 5]


def arrays(dtype, heads, kv_heads, batch=3, length=12, size=8):
    """Queries [B, T, K, G, d], keys and values [B, T, K, d]."""
    rng = np.random.default_rng(0)
    shapes = (batch, length, kv_heads, heads // kv_heads, size), *[(batch, length, kv_heads, size)] * 2
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def attention_output(q, k, v, mask, window):
    """The result of `attention` with the full mask: real tokens, none after the query, within the window."""
    back = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    visible = (back >= 0) & (back < (window or q.shape[1])) & mask[:, None, :]
    return attention(q, *(rearrange(y, "b t k d -> b k t d") for y in (k, v)), visible, scale=0.3)


# float32: sums in another order. bfloat16: both round the attention weights and the result to 8 bits.
TOLERANCE = {FLOAT32: 1e-6, BFLOAT16: 2e-2}
GRIDS = [
    pytest.mark.parametrize("window", [0, 1, 5]),
    pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str),
]


@pytest.mark.parametrize(("length", "blocks"), [(12, 1), (128, 1), (300, 3), (2000, 8)])
def test_by_blocks_of_queries_causal_attention_and_its_gradients_are_the_same(length, blocks):
    q, k, v = arrays(FLOAT32, 4, 2, 2, length, 4)
    k, v = (rearrange(y, "b t k d -> b k t d") for y in (k, v))
    mask = np.tril(np.ones((length, length), bool)) & (np.arange(length) >= np.array([[0], [5]]))[:, None]
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, 2, 1, length)), jnp.float32)
    real = jnp.asarray(mask.any(-1))[..., None, None, None]

    def run(attend):
        def output(*qkv):
            return jnp.where(real, attend(*qkv, jnp.asarray(mask), scale=0.5, cap=5.0, bias=bias), 0.0)

        return output(q, k, v), jax.grad(lambda *qkv: jnp.sin(output(*qkv)).sum(), argnums=(0, 1, 2))(q, k, v)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-5), run(causal_attention), run(attention)
    )
    text = jax.jit(functools.partial(causal_attention, scale=0.5)).lower(q, k, v, jnp.asarray(mask)).as_text()
    assert text.count("stablehlo.dot_general ") == 2 * blocks


def in_all_cases(test):
    for grid in GRIDS:
        test = grid(test)
    return test


@in_all_cases
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_fused_attention_computes_the_same_on_right_padded_rows(heads, window, dtype):
    q, k, v = arrays(dtype, *heads)
    mask = np.arange(12) < np.array([12, 7, 1])[:, None]
    fused = fused_attention(q, k, v, scale=0.3, window=window, implementation="xla")
    assert fused.dtype == dtype and fused.shape == q.shape
    expected = attention_output(q, k, v, mask, window)
    difference = np.abs(np.asarray(fused, np.float32) - np.asarray(expected, np.float32))
    assert difference[mask].max() < TOLERANCE[dtype]


@in_all_cases
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_fused_attention_of_left_padded_rows_equals_that_of_rolled_rows(heads, window, dtype):
    q, k, v = arrays(dtype, *heads)
    padding = np.array([0, 5, 11])
    mask = np.arange(12) >= padding[:, None]
    rolled = (roll_rows(y, padding) for y in (q, k, v))
    fused = roll_rows(fused_attention(*rolled, scale=0.3, window=window, implementation="xla"), -padding)
    expected = attention_output(q, k, v, mask, window)
    difference = np.abs(np.asarray(fused, np.float32) - np.asarray(expected, np.float32))
    assert difference[mask].max() < TOLERANCE[dtype]


def test_no_gradient_flows_into_or_out_of_padding_through_fused_attention():
    q, k, v = arrays(FLOAT32, 4, 2)
    mask = np.arange(12) < np.array([12, 7, 1])[:, None]

    def loss(function):
        return jax.grad(lambda x: (jnp.square(function(*x)) * mask[..., None, None, None]).sum())((q, k, v))

    fused = loss(lambda q, k, v: fused_attention(q, k, v, scale=0.3, window=0, implementation="xla"))
    expected = loss(lambda q, k, v: attention_output(q, k, v, mask, 0))
    for got, wanted in zip(fused, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert not np.asarray(got)[~mask].any()


@pytest.fixture
def fused_calls(monkeypatch):
    """Behaves as on a GPU, with XLA in place of cuDNN; yields (query heads, window) of every fused attention call."""
    calls = []

    def call(q, k, v, *, scale, window):
        calls.append((q.shape[2] * q.shape[3], window))
        return fused_attention(q, k, v, scale=scale, window=window, implementation="xla")

    def choose(mesh, config, dtype, length, choice, packed=False):
        return AttentionKernel("xla" if choice == "xla" or packed else "cudnn", "")

    for module in (decoder, inference, pretrained):
        monkeypatch.setattr(module, "kernel_for_mesh", choose)
    monkeypatch.setattr(transformer, "fused_attention", call)
    return calls


FUSED = {"opt": tiny.OPT, "llama": tiny.LLAMA, "sparse": tiny.SPARSE, "windowed": WINDOWED}


@pytest.mark.parametrize("remat", ["none", "layers"])
@pytest.mark.parametrize("family", FUSED)
def test_states_and_gradients_of_right_padded_rows_equal_those_without_fusing(fused_calls, family, remat):
    config, layout = FUSED[family], Layout(single_device_mesh(), TRAIN)
    params = tiny.random_params(config, layout.mesh)
    tokens, mask = tiny.prompts(config, [12, 7, 1], 12, side="right")

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, attention):
        def loss(params):
            compute = Compute(jnp.float32, remat, attention=attention)
            states = bind(config, params)(tokens, mask, compute, layout)[0]
            return (jnp.square(states) * mask[..., None]).sum(), states

        (_, states), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return states, grads

    (fused, fused_grads), (states, grads) = run(params, "cudnn"), run(params, "xla")
    assert set(fused_calls) == {(config.num_heads, 5 if family == "windowed" else 0)}
    np.testing.assert_allclose(fused[mask], states[mask], atol=2e-5)
    for path, grad in grads.items():
        np.testing.assert_allclose(
            fused_grads[path], grad, atol=2e-5 * max(1, float(jnp.abs(grad).max())), err_msg=path
        )


@pytest.mark.parametrize("mesh_name", ["one", "data2-fsdp2-tensor2"])
@pytest.mark.parametrize("family", FUSED)
def test_a_fused_prefill_gives_the_same_logits_and_cache_as_an_unfused_one(fused_calls, family, mesh_name):
    config, mesh = FUSED[family], tiny.mesh_of(mesh_name)
    layout = Layout(mesh, GENERATE)
    params = tiny.random_params(config, mesh)
    weights = jax.jit(lambda params: inference.inference_weights(config, params, layout, jnp.float32))(params)
    tokens, mask = tiny.prompts(config, [12, 7, 1, 3], 12)

    @functools.partial(jax.jit, static_argnums=1)
    def run(weights, attention):
        return prefill(inference.Inference(config, layout, jnp.float32, attention), weights, tokens, mask, 4)

    (fused, fused_cache), (logits, cache) = run(weights, "cudnn"), run(weights, "xla")
    assert len(fused_calls) == config.num_layers
    np.testing.assert_allclose(fused, logits, atol=2e-5)
    np.testing.assert_array_equal(fused_cache.visible, cache.visible)
    for got, expected in zip(fused_cache.keys + fused_cache.values, cache.keys + cache.values, strict=True):
        real = np.asarray(cache.visible)[:, None, :, None]
        np.testing.assert_allclose(np.where(real, got, 0), np.where(real, expected, 0), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_fused_states_do_not_depend_on_the_padding_side(fused_calls, side):
    config, layout = tiny.LLAMA, Layout(single_device_mesh(), TRAIN)
    params = tiny.random_params(config, layout.mesh)
    tokens, mask = tiny.prompts(config, [12, 7, 1], 12, side=side)
    fused = pretrained._hidden(config, layout, "cudnn", params, tokens, mask)
    assert fused_calls
    states = pretrained._hidden(config, layout, "xla", params, tokens, mask)
    np.testing.assert_allclose(fused[mask], states[mask], atol=2e-5)


@pytest.mark.gpu
@in_all_cases
def test_cudnn_attention_equals_xlas_in_bfloat16(heads, window):
    q, k, v = arrays(BFLOAT16, *heads, length=192, size=64)
    mask = np.arange(192) < np.array([192, 70, 1])[:, None]

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays, implementation):
        def total(arrays):
            y = fused_attention(*arrays, scale=0.125, window=window, implementation=implementation)
            return (jnp.square(y.astype(jnp.float32)) * mask[..., None, None, None]).sum(), y

        (_, y), grads = jax.value_and_grad(total, has_aux=True)(arrays)
        return y, *grads

    assert "cudnn" in run.lower((q, k, v), "cudnn").as_text()
    for name, got, expected in zip("yqkv", run((q, k, v), "cudnn"), run((q, k, v), "xla"), strict=True):
        got, expected = (np.asarray(x, np.float32)[mask] for x in (got, expected))
        assert np.abs(got - expected).max() < 2e-2 * max(1, np.abs(expected).max()), name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_softmax_is_that_of_jax_and_keeps_its_result_alone(dtype):
    rng = np.random.default_rng(0)
    scores, gradient = (jnp.asarray(rng.normal(size=(3, 5, 16)) * 3, jnp.float32) for _ in range(2))
    got, to_scores = jax.vjp(lambda x: softmax(x, dtype), scores)
    want, reference = jax.vjp(lambda x: jax.nn.softmax(x), scores)
    np.testing.assert_array_equal(got, want.astype(dtype))
    rounding = 1e-6 if dtype == jnp.float32 else 2**-7
    gradient = gradient.astype(dtype)
    np.testing.assert_allclose(to_scores(gradient)[0], reference(gradient.astype(jnp.float32))[0], atol=rounding)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(to_scores)] == [((3, 5, 16), dtype)]
