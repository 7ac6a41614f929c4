import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, bind, init_params
from rlhf_jax.models.lora import NO_LORA, LoraConfig, is_adapter, is_trainable, merge_adapters
from rlhf_jax.trees import partition

LINEARS = {
    "opt": {"attention/q", "attention/k", "attention/v", "attention/o", "mlp/up", "mlp/down"},
    "llama": {"attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down"},
    "mixtral": {"attention/q", "attention/k", "attention/v", "attention/o"},  # experts have no adapters
}


def hidden(config, params, lora=NO_LORA):
    tokens, mask = tiny.prompts(config, [9, 4, 7], 9, side="right")
    config, compute = tiny.with_lora(config, lora), Compute(jnp.float32, "none")
    states = jax.jit(lambda p: bind(config, p)(tokens, mask, compute)[0])(params)
    return np.asarray(states)[mask]


def test_merging_adds_twice_the_product_when_alpha_is_twice_the_rank():
    kernel, a, b = jnp.ones((1, 2, 2)), jnp.array([[[1.0], [2.0]]]), jnp.array([[[3.0, 4.0]]])
    params = {"layers/mlp/up/kernel": kernel, "layers/mlp/up/lora_a": a, "layers/mlp/up/lora_b": b, "score/kernel": a}
    merged = merge_adapters(params, LoraConfig(rank=1, alpha=2.0))
    assert merged.keys() == {"layers/mlp/up/kernel", "score/kernel"}
    np.testing.assert_array_equal(merged["layers/mlp/up/kernel"], [[[7.0, 9.0], [13.0, 17.0]]])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_adapters_equal_separate_adapters(family):
    config = tiny.FAMILIES[family]
    params = tiny.random_params(tiny.with_lora(config, tiny.LORA), single_device_mesh())
    extra, merged = hidden(config, params, tiny.LORA), hidden(config, merge_adapters(params, tiny.LORA))
    base = hidden(config, {path: leaf for path, leaf in params.items() if not is_adapter(path)})
    assert np.abs(extra - base).max() > 0.1, "adapters without effect test nothing"
    np.testing.assert_allclose(merged, extra, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_new_adapters_are_the_identity_and_merging_them_changes_no_bit(family):
    config, layout = tiny.FAMILIES[family], Layout(single_device_mesh(), TRAIN)
    base = tiny.random_params(config, layout.mesh)
    adapters = init_params(tiny.with_lora(config, tiny.LORA), jax.random.key(3), layout, only=is_adapter)
    assert {path.split("/")[-1] for path in adapters} == {"lora_a", "lora_b"}
    np.testing.assert_allclose(hidden(config, base | adapters, tiny.LORA), hidden(config, base), atol=1e-5)
    merged = merge_adapters(base | adapters, tiny.LORA)
    for path in base:
        np.testing.assert_array_equal(merged[path], base[path], err_msg=path)


def test_a_new_a_is_uniform_within_one_over_the_root_of_its_inputs_and_differs_by_layer():
    config, layout = (
        dataclasses.replace(tiny.LLAMA, hidden_size=256, embed_size=256),
        Layout(single_device_mesh(), TRAIN),
    )
    a = np.asarray(
        init_params(tiny.with_lora(config, LoraConfig(rank=8)), jax.random.key(0), layout, only=is_adapter)[
            "layers/mlp/up/lora_a"
        ]
    )
    assert a.shape == (2, 256, 8) and np.abs(a).max() <= 1 / 16
    np.testing.assert_allclose(a.std(), 1 / 16 / 3**0.5, rtol=0.03)
    assert np.abs(a[0] - a[1]).max() > 0.01


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_linear_of_the_layers_is_adapted_and_nothing_else(family):
    config = tiny.FAMILIES[family]
    adapted = {
        p.removeprefix("layers/").removesuffix("/lora_a") for p in abstract_params(tiny.with_lora(config, tiny.LORA))
    }
    assert adapted & LINEARS["llama"] == LINEARS[config.family]
    paths = abstract_params(tiny.with_lora(config, tiny.LORA)).keys() - abstract_params(config).keys()
    assert {path.rpartition("/")[0].removeprefix("layers/") for path in paths} == LINEARS[config.family]


def test_two_targets_get_adapters_and_merging_does_not_change_the_others():
    lora = LoraConfig(rank=2, alpha=2.0, targets=("q", "v"))
    params = tiny.random_params(tiny.with_lora(tiny.LLAMA, lora), single_device_mesh())
    assert {p for p in params if is_adapter(p)} == {
        f"layers/attention/{name}/lora_{side}" for name in "qv" for side in "ab"
    }
    merged = merge_adapters(params, lora)
    changed = {path for path in merged if np.any(np.asarray(merged[path]) != np.asarray(params[path]))}
    assert changed == {"layers/attention/q/kernel", "layers/attention/v/kernel"}


def test_a_bfloat16_base_stays_bfloat16_and_is_rounded_once():
    lora = LoraConfig(rank=4, alpha=8.0)
    arrays = tiny.random_arrays(tiny.with_lora(tiny.LLAMA, lora))
    kernel = arrays["layers/mlp/up/kernel"].astype(jnp.bfloat16)
    params = {path: jnp.asarray(array) for path, array in arrays.items()} | {"layers/mlp/up/kernel": kernel}
    merged = merge_adapters(params, lora)["layers/mlp/up/kernel"]
    product = arrays["layers/mlp/up/lora_a"].astype(np.float64) @ arrays["layers/mlp/up/lora_b"]
    exact = kernel.astype(np.float64) + 2.0 * product
    assert merged.dtype == jnp.bfloat16
    assert np.all(np.abs(np.asarray(merged, np.float64) - exact) <= np.abs(exact) * 2**-8 + 1e-6)


def test_with_adapters_only_they_and_the_scalar_head_are_trainable_and_without_them_everything():
    config = tiny.scalar(tiny.LLAMA)
    leaves = abstract_params(tiny.with_lora(config, tiny.LORA))
    trainable, frozen = partition(leaves, lambda path: is_trainable(path, tiny.LORA))
    assert {path for path in trainable if not is_adapter(path)} == {"score/kernel"}
    assert len(trainable) == 2 * 7 + 1 and "embed/tokens" in frozen
    assert all(is_trainable(path, NO_LORA) for path in abstract_params(config))


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"rank": 2, "targets": ("q_proj",)}, "no linear is called q_proj; choose among q, k, v, o, gate, up, down"),
        ({"rank": 2, "targets": ()}, "empty, so nothing would train"),
        ({"rank": -1}, "rank=-1: at least 0"),
    ],
)
def test_settings_without_trainable_adapters_are_rejected(settings, reported):
    with pytest.raises(ValueError, match=reported):
        LoraConfig(**settings)
