"""Products in bfloat16: their values and gradients, and what is compiled for each platform."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.products import einsum, matmul

BF16, F32 = jnp.bfloat16, jnp.float32
SPECS = ["ab,bc->ac", "abc,cd->abd", "btd,dkgh->btkgh", "btd,dnf->btnf", "btkgd,bksd->bkgts", "bkgts,bksd->btkgd"]
ORDERS = ["ba,bc->ac", "ab,cb->ac", "xba,xbc->xac", "xab,xcb->xac", "axb,xbc->axc"]


def operands(spec: str, sizes: dict[str, int]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    parts = spec.split("->")[0].split(",")
    return [jnp.asarray(rng.normal(size=[sizes[letter] for letter in part]), BF16) for part in parts]


def close(got: jax.Array, spec: str, *factors: jax.Array) -> bool:
    """Within one rounding to the dtype of `got` of the product in float64."""
    want = np.einsum(spec, *(np.asarray(factor, np.float64) for factor in factors))
    scale = np.einsum(spec, *(np.abs(np.asarray(factor, np.float64)) for factor in factors))
    error = np.abs(np.asarray(got, np.float64) - want)
    return bool((error <= 2.0**-8 * np.abs(want) + 1e-6 * scale).all())


@pytest.mark.parametrize("spec", SPECS + ORDERS)
def test_a_product_and_both_gradients_are_those_of_float64_rounded_once(spec):
    of_x, of_y, of_result = re.split(",|->", spec)
    letters = sorted(set(of_x + of_y))
    both = jax.jit(lambda x, y, g: (einsum(spec, x, y), *jax.vjp(lambda x, y: einsum(spec, x, y), x, y)[1](g)))
    for small, large in itertools.product((1, 2, 3), (9, 32)):
        sizes = {letter: small if i % 2 else large for i, letter in enumerate(letters)}
        x, y = operands(spec, sizes)
        gradient = operands(f"{of_result}->", sizes)[0]
        product, to_x, to_y = both(x, y, gradient)
        assert {product.dtype, to_x.dtype, to_y.dtype} == {jnp.dtype(BF16)}
        assert close(product, spec, x, y)
        assert close(to_x, f"{of_result},{of_y}->{of_x}", gradient, y)
        assert close(to_y, f"{of_x},{of_result}->{of_y}", x, gradient)


@pytest.mark.parametrize(("rows", "outputs"), [(1, 6), (2, 6), (16, 6), (16, 7), (17, 6)])
def test_few_activations_by_a_row_for_each_output_are_the_right_operand_of_an_equal_product(rows, outputs):
    x, y = operands("ab,cb->", {"a": rows, "b": 32, "c": outputs})
    product = jax.jit(lambda x, y: einsum("ab,cb->ac", x, y))
    assert close(product(x, y), "ab,cb->ac", x, y)
    text = product.trace(x, y).lower(lowering_platforms=("cpu",)).as_text()
    (operand,) = re.findall(r"stablehlo\.dot_general.*: \(tensor<(\S+)xbf16>,", text)
    assert operand == ("2x3x32" if (rows, outputs) in ((1, 6), (2, 6), (16, 6)) else f"{rows}x32")


def test_a_float32_result_is_not_rounded_and_its_gradients_are_of_the_gradient_in_bfloat16():
    x, y = operands("ab,bc->", {"a": 16, "b": 32, "c": 24})
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=(16, 24)), F32)
    product, vjp = jax.vjp(lambda x, y: matmul(x, y, F32), x, y)
    want = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    np.testing.assert_allclose(np.asarray(product), want, rtol=1e-5, atol=1e-5)
    to_x, to_y = vjp(gradient)
    assert close(to_x, "ac,bc->ab", gradient.astype(BF16), y)
    assert close(to_y, "ab,ac->bc", x, gradient.astype(BF16))


def test_float32_is_jnp_einsum_bit_for_bit():
    x, y = (each.astype(F32) for each in operands("abc,cd->", {"a": 2, "b": 8, "c": 16, "d": 12}))
    got, want = (
        jax.jit(jax.value_and_grad(lambda x, f=f: f("abc,cd->abd", x, y).sum()))(x) for f in (einsum, jnp.einsum)
    )
    assert got[0] == want[0] and (got[1] == want[1]).all()


def programs(x: jax.Array, y: jax.Array, platform: str) -> str:
    """The products of a forward and backward pass in what JAX hands to the compiler of a platform."""
    step = jax.value_and_grad(lambda x, y: matmul(x, y).astype(F32).sum(), (0, 1))
    text = jax.jit(step).trace(x, y).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"stablehlo\.dot_general.*-> tensor<\d+x\d+x(\w+)>", text)


def test_for_gpus_no_product_is_written_in_float32_and_for_cpus_every_one_is():
    x, y = operands("ab,bc->", {"a": 64, "b": 32, "c": 128})
    assert programs(x, y, "cuda") == ["bf16"] * 3
    assert programs(x, y, "cpu") == ["f32"] * 3


def test_every_product_of_a_large_step_keeps_its_operands_in_bfloat16_on_cpus():
    """XLA converts operands to float32 for orders of dimensions that have no product of bfloat16."""
    for spec in ("abc,cd->abd", "btkgd,bksd->bkgts", "bkgts,bksd->btkgd"):
        x, y = operands(spec, dict.fromkeys("abcdbtkgsd", 16))
        step = jax.grad(lambda x, y, spec=spec: einsum(spec, jnp.sin(x), y).astype(F32).sum(), (0, 1))
        text = jax.jit(step).lower(x, y).compile().as_text()
        called = [body for body in re.split(r"\n\n", text) if re.search(r"\bdot\(", body)]
        assert len(called) == 2, spec
        for body in called:
            assert len(re.findall(r"= bf16\S+ parameter", body)) >= 2, body
