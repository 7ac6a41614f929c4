import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.mesh import GENERATE, TRAIN, Layout, single_device_mesh
from rlhf_jax.models.config import Compute, Experts
from rlhf_jax.models.decoder import bind
from rlhf_jax.models.experts import apply_experts, balance_loss, route, router_load

EXPERTS = Experts(count=4, per_token=2, renormalised=True, aux_coef=0.02)


def kernels(rng, hidden=8, width=16):
    shapes = {
        "router": (hidden, 4),
        "gate": (4, hidden, width),
        "up": (4, hidden, width),
        "down": (4, width, hidden),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def by_hand(x, experts, router, gate, up, down):
    """One token and one expert at a time, in float64."""
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        token = x[place].astype(np.float64)
        probabilities = np.exp(token @ router) / np.exp(token @ router).sum()
        chosen = np.argsort(-probabilities)[: experts.per_token]
        total = probabilities[chosen].sum() if experts.renormalised else 1.0
        for expert in chosen:
            inner = token @ gate[expert]
            inner = inner / (1 + np.exp(-inner)) * (token @ up[expert])
            out[place] += probabilities[expert] / total * (inner @ down[expert])
    return out


def sparse(x, experts, router, gate, up, down, layout=None):
    return apply_experts(x, route(experts, x, router), (gate, up, down), activation="silu", layout=layout)


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_every_token_gets_its_experts_with_their_weights_and_none_is_dropped(rng, per_token, renormalised):
    experts = dataclasses.replace(EXPERTS, per_token=per_token, renormalised=renormalised)
    x, weights = rng.standard_normal((3, 5, 8)).astype(np.float32), kernels(rng)
    np.testing.assert_allclose(sparse(x, experts, **weights), by_hand(x, experts, **weights), rtol=1e-4, atol=1e-4)


def test_a_router_that_sends_every_token_to_one_expert_drops_none(rng):
    experts = dataclasses.replace(EXPERTS, per_token=1)
    x, weights = np.abs(rng.standard_normal((3, 5, 8))).astype(np.float32), kernels(rng)
    weights["router"] = np.zeros((8, 4), np.float32)
    weights["router"][:, 2] = 5.0
    assert (np.asarray(route(experts, x, weights["router"]).chosen) == 2).all()
    np.testing.assert_allclose(sparse(x, experts, **weights), by_hand(x, experts, **weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table", [TRAIN, GENERATE], ids=["train", "generate"])
@pytest.mark.parametrize("name", [name for name in tiny.MESHES if name != "one"])
def test_eight_devices_give_the_values_and_gradients_of_one(rng, table, name):
    layout = Layout(tiny.mesh_of(name), table)
    # Small, because the sine of large outputs would be that of their rounding.
    x, weights = rng.standard_normal((8, 5, 8)).astype(np.float32) / 4, kernels(rng)
    axes = {"router": (None, None), "gate": (None, None, "mlp"), "up": (None, None, "mlp"), "down": (None, "mlp", None)}

    def loss(x, weights, layout):
        return jnp.sum(jnp.sin(sparse(x, EXPERTS, **weights, layout=layout)))

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    value, grads = program(x, weights, None)
    split = {path: layout.put(array, *axes[path]) for path, array in weights.items()}
    sharded, sharded_grads = program(layout.put(x, "batch", None, None), split, layout)
    np.testing.assert_allclose(sharded, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), sharded_grads, grads)


def test_each_of_eight_devices_holds_an_eighth_of_every_expert():
    params = tiny.random_params(tiny.SPARSE, tiny.mesh_of("fsdp4-tensor2"))
    for name in ("gate", "up", "down"):
        kernel = params[f"layers/experts/{name}/kernel"]
        assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 8}


def test_the_balance_loss_counts_only_real_tokens_and_is_minimal_for_equally_used_experts():
    even = np.full((1, 4, 4), 0.25, np.float32)
    chosen = np.array([[[0, 1], [2, 3], [0, 1], [2, 3]]], np.int32)
    routing = route(EXPERTS, np.zeros((1, 4, 8), np.float32), np.zeros((8, 4), np.float32))
    np.testing.assert_array_equal(routing.probabilities, even)
    routing = routing._replace(chosen=chosen)
    loads = router_load(EXPERTS, routing, np.ones((1, 4), bool))
    np.testing.assert_allclose(loads, [[0.5] * 4, [0.25] * 4])
    # 0.02 x 4 experts x sum of 4 x (0.5 x 0.25): the number of experts per token times the coefficient.
    np.testing.assert_allclose(balance_loss(EXPERTS, loads[None]), 0.04, rtol=1e-6)
    first = np.array([[True, False, False, False]])
    np.testing.assert_allclose(router_load(EXPERTS, routing, first), [[1, 1, 0, 0], [0.25] * 4])


@functools.partial(jax.jit, static_argnames="config")
def balance_of(config, params, tokens, mask):
    return bind(config, params)(tokens, mask, Compute(jnp.float32))[1]


def test_the_decoder_returns_the_balance_loss_and_the_router_gets_its_gradient():
    params = tiny.random_params(tiny.SPARSE, single_device_mesh())
    tokens, mask = tiny.prompts(tiny.SPARSE, [11, 3, 7], 11)
    charge, grads = jax.value_and_grad(lambda p: balance_of(tiny.SPARSE, p, tokens, mask))(params)
    assert charge > 0.02 * 2
    assert float(jnp.abs(grads["layers/router/kernel"]).max()) > 1e-4
    other = np.where(mask, tokens, 5)
    assert balance_of(tiny.SPARSE, params, other, mask) == charge
    assert balance_of(tiny.LLAMA, tiny.random_params(tiny.LLAMA, single_device_mesh()), tokens, mask) == 0.0


@pytest.mark.parity
def test_the_balance_loss_equals_that_of_transformers_over_layers_and_padding():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2, 3, 5, 4)).astype(np.float32)  # two layers
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    flat = tuple(torch.tensor(layer.reshape(-1, 4)) for layer in logits)
    theirs = load_balancing_loss_func(flat, num_experts=4, top_k=2, attention_mask=torch.tensor(mask))
    # With the identity as router, the input is the logits.
    loads = [
        router_load(EXPERTS, route(EXPERTS, jnp.asarray(layer), jnp.eye(4)), mask.astype(bool)) for layer in logits
    ]
    np.testing.assert_allclose(balance_loss(EXPERTS, jnp.stack(loads)), 0.02 * float(theirs), rtol=1e-5)
