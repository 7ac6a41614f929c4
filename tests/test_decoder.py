import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import erf

from rlhf_jax.mesh import TRAIN, Layout, MeshConfig, make_mesh, single_device_mesh
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel, init_params
from rlhf_jax.models.lora import NO_LORA

EIGHT = [name for name in tiny.MESHES if name != "one"]


@functools.partial(jax.jit, static_argnames=("config", "layout", "lora", "remat"))
def hidden_of(config, params, tokens, mask, layout=None, lora=NO_LORA, remat="none"):
    return bind(tiny.with_lora(config, lora), params)(tokens, mask, Compute(jnp.float32, remat), layout)[0]


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def logits_of(config, params, tokens, mask, layout=None):
    return hidden_of(config, params, tokens, mask, layout) @ head_kernel(config, params)[:, : config.vocab_size]


def by_hand(config, arrays, tokens):
    """Logits [T, V] of one unpadded row in float64, one head and one position at a time."""
    w = {path: array.astype(np.float64) for path, array in arrays.items()}
    length, size = len(tokens), config.head_dim

    def linear(x, name, i=None):
        pick = (lambda path: w[path]) if i is None else (lambda path: w[path][i])
        return x @ pick(f"{name}/kernel") + (pick(f"{name}/bias") if f"{name}/bias" in w else 0.0)

    def norm(x, name, i=None):
        scale = w[f"{name}/scale"] if i is None else w[f"{name}/scale"][i]
        if config.norm == "rms":
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale
        bias = w[f"{name}/bias"] if i is None else w[f"{name}/bias"][i]
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps) * scale + bias

    def rotate(x, position):
        if not config.rope:
            return x
        angle = position * np.array(config.rope.frequencies)
        turn = np.exp(1j * angle) * (x[: size // 2] + 1j * x[size // 2 :])
        return np.concatenate([turn.real, turn.imag])

    def attention(x, i):
        q, k, v = (linear(x, f"layers/attention/{name}", i).reshape(length, -1, size) for name in "qkv")
        out = np.zeros_like(q)
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            for t in range(length):
                query = rotate(q[t, head], t)
                scores = np.array([query @ rotate(k[s, shared], s) for s in range(t + 1)]) / size**0.5
                weights = np.exp(scores - scores.max())
                out[t, head] = weights / weights.sum() @ v[: t + 1, shared]
        return linear(out.reshape(length, -1), "layers/attention/o", i)

    def act(x):
        kinds = {
            "relu": lambda x: np.maximum(x, 0),
            "silu": lambda x: x / (1 + np.exp(-x)),
            "gelu": lambda x: x * 0.5 * (1 + erf(x / 2**0.5)),
        }
        return kinds[config.activation](x)

    def experts(x, i):
        router, out = x @ w["layers/router/kernel"][i], np.zeros_like(x)
        for t in range(length):
            probabilities = np.exp(router[t]) / np.exp(router[t]).sum()
            chosen = np.argsort(-probabilities)[: config.experts.per_token]
            for expert in chosen:
                gate, up, down = (w[f"layers/experts/{name}/kernel"][i, expert] for name in ("gate", "up", "down"))
                weight = probabilities[expert] / probabilities[chosen].sum()
                out[t] += weight * ((act(x[t] @ gate) * (x[t] @ up)) @ down)
        return out

    def mlp(x, i):
        if config.experts:
            return experts(x, i)
        up = linear(x, "layers/mlp/up", i)
        inner = act(linear(x, "layers/mlp/gate", i)) * up if config.gated_mlp else act(up)
        return linear(inner, "layers/mlp/down", i)

    x = w["embed/tokens"][tokens]
    if config.embed_size != config.hidden_size:
        x = linear(x, "project_in")
    if config.position_rows:
        x = x + w["embed/positions"][2 : 2 + length]
    for i in range(config.num_layers):
        if config.residual == "post":
            x = norm(x + attention(x, i), "layers/attention_norm", i)
            x = norm(x + mlp(x, i), "layers/mlp_norm", i)
        else:
            x = x + attention(norm(x, "layers/attention_norm", i), i)
            x = x + mlp(norm(x, "layers/mlp_norm", i), i)
    if config.final_norm:
        x = norm(x, "final_norm")
    if config.embed_size != config.hidden_size:
        x = linear(x, "project_out")
    head = w["embed/tokens" if config.tied else "head/kernel"]
    return x @ head[: config.vocab_size].T


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_of_every_row_equal_the_formula_in_numpy_with_padding_on_either_side(family):
    config, arrays = tiny.FAMILIES[family], tiny.random_arrays(tiny.FAMILIES[family])
    params = tiny.on_mesh(config, arrays, single_device_mesh())
    for side in ("right", "left"):
        tokens, mask = tiny.prompts(config, [11, 1, 6, 10], 11, side=side)
        logits = np.asarray(logits_of(config, params, tokens, mask))
        assert np.isfinite(logits).all()
        for row in range(4):
            real = tokens[row][mask[row]]
            np.testing.assert_allclose(logits[row][mask[row]], by_hand(config, arrays, real), atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_token_ids_under_the_padding_have_no_effect(family):
    config = tiny.FAMILIES[family]
    params = tiny.random_params(config, single_device_mesh())
    for side in ("right", "left"):
        tokens, mask = tiny.prompts(config, [11, 1, 6, 10], 11, side=side)
        other = np.where(mask, tokens, 17)
        one, two = (np.asarray(logits_of(config, params, x, mask))[mask] for x in (tokens, other))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_no_position_attends_to_a_later_token(family):
    config = tiny.FAMILIES[family]
    params = tiny.random_params(config, single_device_mesh())
    tokens, mask = tiny.prompts(config, [11, 11, 11, 11], 11)
    later = tokens.copy()
    later[:, 6:] = (later[:, 6:] + 1) % config.vocab_size
    one, two = (np.asarray(logits_of(config, params, x, mask)) for x in (tokens, later))
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert (np.abs(one - two)[:, 6:].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_eight_devices_give_the_logits_of_one(family, name):
    config = tiny.FAMILIES[family]
    tokens, mask = tiny.prompts(config, [11, 1, 6, 10, 2, 3, 4, 5], 11)
    results = []
    for mesh in (single_device_mesh(), tiny.mesh_of(name)):
        layout = Layout(mesh, TRAIN)
        params = tiny.random_params(config, mesh)
        results.append(np.asarray(logits_of(config, params, *layout.put_batch((tokens, mask)), layout))[mask])
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)


@pytest.mark.parametrize("again", ["layers", "dots"])
def test_recomputing_in_the_backward_pass_does_not_change_the_gradient(again):
    params = tiny.random_params(tiny.OPT, single_device_mesh())
    tokens, mask = tiny.prompts(tiny.OPT, [11, 1, 6, 10], 11)

    def loss(params, remat):
        return jnp.sum(hidden_of(tiny.OPT, params, tokens, mask, remat=remat)[mask] ** 2)

    kept, again = (jax.jit(jax.grad(functools.partial(loss, remat=remat)))(params) for remat in ("none", again))
    for path in params:
        largest = np.abs(kept[path]).max()
        np.testing.assert_allclose(again[path], kept[path], atol=1e-5 * max(1.0, largest), err_msg=path)


@pytest.mark.parametrize(
    ("name", "remat", "loops"), [("one", "none", 0), ("one", "layers", 2), ("fsdp4-tensor2", "none", 2)]
)
def test_layers_are_a_loop_and_its_gradient_another_unless_one_cpu_keeps_all_for_it(name, remat, loops):
    config, layout = tiny.FAMILIES["llama"], Layout(tiny.mesh_of(name), TRAIN)
    tokens, mask = layout.put_batch(tiny.prompts(config, [11, 1, 6, 10, 2, 3, 4, 5], 11))
    gradient = jax.jit(jax.grad(lambda params: hidden_of(config, params, tokens, mask, layout, remat=remat).sum()))
    assert gradient.lower(tiny.random_params(config, layout.mesh)).as_text().count("stablehlo.while") == loops


# Replicated arrays: one vector of the hidden size per layer, and the thin side of an adapter.
WHOLE = re.compile(r"norm/|(o|down)/bias$|(q|k|v|gate|up)/lora_a$|(o|down)/lora_b$|^score/")


@pytest.fixture(scope="module")
def initial_params():
    """({mesh: parameters and adapters of one key}, {mesh: text of the compiled program})."""
    params, text = {}, {}
    for name in tiny.MESHES:
        layout = Layout(tiny.mesh_of(name), TRAIN)
        program = jax.jit(lambda key, layout=layout: init_params(tiny.with_lora(tiny.LLAMA, tiny.LORA), key, layout))
        compiled = program.lower(jax.random.key(5)).compile()
        params[name], text[name] = compiled(jax.random.key(5)), compiled.as_text()
    return params, text


@pytest.mark.parametrize("name", EIGHT)
def test_parameters_and_adapters_are_created_in_their_shards(initial_params, name):
    params = initial_params[0][name]
    assert params.keys() == abstract_params(tiny.with_lora(tiny.LLAMA, tiny.LORA)).keys()
    for path, leaf in params.items():
        parts = 1 if WHOLE.search(path) else Layout(tiny.mesh_of(name), TRAIN).shards("mlp")
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, path


@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_vectors_and_thin_sides_of_adapters_are_replicated(family, scalar_head):
    config = tiny.scalar(tiny.FAMILIES[family]) if scalar_head else tiny.FAMILIES[family]
    layout = Layout(tiny.mesh_of("fsdp4-tensor2"), TRAIN)
    leaves = abstract_params(tiny.with_lora(config, tiny.LORA))
    whole = {path for path, leaf in leaves.items() if not any(layout.spec(leaf.axes))}
    assert whole == {path for path in leaves if WHOLE.search(path)}


def test_the_initialisation_program_never_holds_a_whole_weight(initial_params):
    leaves = abstract_params(tiny.with_lora(tiny.LLAMA, tiny.LORA))
    split = {leaf.shape for path, leaf in leaves.items() if not WHOLE.search(path)}
    split -= {leaf.shape for path, leaf in leaves.items() if WHOLE.search(path)}
    found = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\b\w\d+\[([\d,]+)\]", initial_params[1]["fsdp4-tensor2"])
    }
    assert len(split) == 11 and split & found == set(), "the compiled text has an array of a whole weight's shape"
    assert (2, 32, 8) in found, "the compiled text has the shard of a query kernel, [2, 32, 64] over eight devices"


@pytest.mark.parametrize("name", EIGHT)
def test_the_same_key_gives_the_same_parameters_on_one_device_and_eight(initial_params, name):
    for path, leaf in initial_params[0]["one"].items():
        np.testing.assert_allclose(initial_params[0][name][path], leaf, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("config", [tiny.OPT, tiny.LLAMA])
def test_initial_kernels_and_tables_preserve_variance_biases_are_zero_scales_one_and_layers_differ(config):
    params = init_params(config, jax.random.key(0), Layout(single_device_mesh(), TRAIN))
    for path, leaf in params.items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
        elif path.endswith("scale"):
            assert np.all(leaf == 1), path
        else:
            read_over = leaf.shape[-1] if path.startswith(("embed/", "head/")) else leaf.shape[-2]
            np.testing.assert_allclose(np.std(leaf), read_over**-0.5, rtol=0.1, err_msg=path)
    up = np.asarray(params["layers/mlp/up/kernel"])
    assert np.abs(up[0] - up[1]).max() > 0.01


def test_the_parameter_paths_shapes_and_axes_of_every_family_are_as_documented():
    opt, llama = abstract_params(tiny.OPT), abstract_params(tiny.LLAMA)
    assert {path: leaf.shape for path, leaf in llama.items()} == {
        "embed/tokens": (64, 32),
        "head/kernel": (64, 32),
        "final_norm/scale": (32,),
        "layers/attention_norm/scale": (2, 32),
        "layers/mlp_norm/scale": (2, 32),
        "layers/attention/q/kernel": (2, 32, 64),
        "layers/attention/k/kernel": (2, 32, 16),
        "layers/attention/v/kernel": (2, 32, 16),
        "layers/attention/o/kernel": (2, 64, 32),
        "layers/mlp/gate/kernel": (2, 32, 48),
        "layers/mlp/up/kernel": (2, 32, 48),
        "layers/mlp/down/kernel": (2, 48, 32),
    }
    assert opt["embed/positions"].shape == (42, 32) and opt["layers/attention/q/bias"].shape == (2, 32)
    assert "head/kernel" not in opt and "layers/mlp/gate/kernel" not in opt
    assert llama["layers/attention/k/kernel"].axes == ("layers", "embed", "kv_heads")
    assert llama["layers/attention/o/kernel"].axes == ("layers", "heads", "embed")
    assert llama["head/kernel"].axes == ("vocab", "embed")
    small = abstract_params(tiny.OPT_350M)
    assert small["project_in/kernel"].shape == (16, 32) and small["project_out/kernel"].shape == (32, 16)
    assert "final_norm/scale" not in small
    critic = abstract_params(tiny.scalar(tiny.LLAMA))
    assert critic["score/kernel"].shape == (32, 1) and "head/kernel" not in critic


def test_parameters_that_do_not_match_the_configuration_raise_an_assertion_with_the_paths():
    params = tiny.random_params(tiny.LLAMA, single_device_mesh())
    with pytest.raises(AssertionError, match="head/kernel"):
        bind(tiny.LLAMA_TIED, params)


def test_a_mesh_with_only_two_tensor_shards_gives_the_same_logits():
    tokens, mask = tiny.prompts(tiny.LLAMA, [11, 1], 11)
    results = []
    for mesh in (single_device_mesh(), make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])):
        params, layout = tiny.random_params(tiny.LLAMA, mesh), Layout(mesh, TRAIN)
        results.append(np.asarray(logits_of(tiny.LLAMA, params, *layout.put_batch((tokens, mask)), layout))[mask])
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
