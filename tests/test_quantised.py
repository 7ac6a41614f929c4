"""Quantised kernels: against bitsandbytes in NumPy, on one device and eight, in training, generation and files."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file
from test_train import interrupt_stage
from tiny_recipe import run, tensors, untimed_records, write_recipe

from rlhf_jax.decode import Decoding, SampleConfig, generate
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, single_device_mesh
from rlhf_jax.models.config import Compute, Rope
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel
from rlhf_jax.models.dtypes import QUANTISED_KINDS
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.inference import Inference
from rlhf_jax.models.lora import is_adapter, is_trainable
from rlhf_jax.models.pretrained import Pretrained, apply, from_pretrained, save_pretrained
from rlhf_jax.models.quantised import (
    DYNAMIC,
    NF4,
    Quantised,
    abstract_codes,
    block_size,
    dequantise,
    is_quantisable,
    quantise,
    quantise_layers,
)
from rlhf_jax.rollout import make_generate, make_publish
from rlhf_jax.stages.models import ModelConfig, copy_frozen
from rlhf_jax.train_step import init_state, make_update
from rlhf_jax.trees import partition

FLOAT32 = jnp.dtype("float32")
HF = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40,
    "tie_word_embeddings": False,
}


def kernel(*shape: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(3).standard_t(5, shape)).astype(np.float32)


def dynamic_map() -> np.ndarray:
    """create_dynamic_map(signed=True), copied from bitsandbytes."""
    data, max_exponent_bits, non_sign_bits = [], 7, 7
    for i in range(max_exponent_bits):
        boundaries = np.linspace(0.1, 1, 2 ** (i + non_sign_bits - max_exponent_bits) + 1)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        data += ((10 ** (-(max_exponent_bits - 1) + i)) * means).tolist()
        data += (-(10 ** (-(max_exponent_bits - 1) + i)) * means).tolist()
    return np.array(sorted([*data, 0, 1.0]), np.float32)


def nearest(book: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.abs(x[..., None].astype(np.float64) - book).argmin(-1)


def reference_nf4(w: np.ndarray):
    """bitsandbytes' quantize_4bit(w, blocksize=64, compress_statistics=True) of a torch weight [out, in], flattened."""
    blocks = w.reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    codes = nearest(NF4, blocks * (1 / absmax)[:, None]).reshape(-1)
    offset = absmax.mean()
    left = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
    groups = np.abs(left).max(1)
    scales = nearest(DYNAMIC, left * (1 / groups)[:, None]).reshape(-1)[: len(absmax)]
    back = DYNAMIC[scales] * np.repeat(groups, 256)[: len(absmax)] + offset
    dense = (NF4[codes].reshape(-1, 64) * back[:, None]).reshape(w.shape)
    return codes[0::2] << 4 | codes[1::2], scales, groups, offset, dense


def test_the_codebooks_equal_those_of_bitsandbytes():
    thresholds = [
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
        *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
        *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
    ]  # from dQuantizeNF4 in the CUDA kernels of bitsandbytes
    np.testing.assert_allclose((NF4[1:] + NF4[:-1]) / 2, thresholds, atol=3e-8)
    assert len(DYNAMIC) == 256
    np.testing.assert_array_equal(DYNAMIC, dynamic_map())


@pytest.mark.parametrize("axis", [-2, -1])
def test_nf4_with_double_quantisation_equals_bitsandbytes(axis):
    torch_weight = kernel(40, 128)  # 80 maxima: one group, partially filled
    ours = torch_weight.T if axis == -2 else torch_weight
    got = quantise(jnp.asarray(ours), "nf4", axis)
    flat = [np.asarray(x.T if axis == -2 else x).reshape(-1) for x in (got.codes, got.scales)]
    codes, scales, groups, offset, dense = reference_nf4(torch_weight)
    np.testing.assert_array_equal(flat[0], codes)
    np.testing.assert_array_equal(flat[1], scales)
    np.testing.assert_allclose(got.groups, groups, rtol=1e-6)
    np.testing.assert_allclose(got.offset, offset, rtol=1e-6)
    back = dequantise(got, FLOAT32)
    np.testing.assert_allclose(back.T if axis == -2 else back, dense, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("axis", [-2, -1])
def test_int8_rounds_each_block_to_127_steps_of_its_largest_element(axis):
    w = kernel(3, 256, 256)
    got = quantise(jnp.asarray(w), "int8", axis)
    blocks = np.moveaxis(w, axis, -1).reshape(3, 256, 2, 128)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    want = np.moveaxis((np.rint(blocks / step) * step).reshape(3, 256, 256), -1, axis)
    wrong = np.abs(np.asarray(dequantise(got, FLOAT32)) - want)
    assert (wrong > 1e-6).mean() < 1e-4 and wrong.max() <= 1.01 * step.max()  # halfway cases may round either way
    assert np.abs(np.asarray(dequantise(got, FLOAT32)) - w).max() <= 0.501 * step.max()


@pytest.mark.parametrize(("kind", "bits", "error"), [("int8", 8.25, 0.008), ("nf4", 4.128, 0.1)])
def test_bits_per_weight_and_the_error_for_normal_weights(kind, bits, error):
    w = jax.random.normal(jax.random.key(0), (2, 512, 1024))
    got = quantise(w, kind, -2)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(got)) * 8 / w.size == pytest.approx(bits, abs=1e-3)
    assert (got.shape, got.kind, got.axis) == (w.shape, kind, -2)
    assert jnp.linalg.norm(dequantise(got, FLOAT32) - w) / jnp.linalg.norm(w) < error


def test_a_block_of_zeros_stays_zero():
    w = jnp.asarray(kernel(128, 8)).at[:, 2].set(0)
    for kind in QUANTISED_KINDS:
        np.testing.assert_array_equal(dequantise(quantise(w, kind, -2), FLOAT32)[:, 2], 0)


def test_block_sizes_are_the_largest_divisor_and_a_size_without_one_is_rejected():
    assert [block_size(n, "nf4") for n in (4096, 96, 4544)] == [64, 48, 64]
    assert [block_size(n, "int8") for n in (4096, 96)] == [128, 96]
    with pytest.raises(ValueError, match='hidden size of 134 has no divisor that nf4 blocks could have: use dtype "bf'):
        block_size(134, "nf4")


def quantise_params(config, params, mesh, kind):
    leaves, layout = abstract_params(config), Layout(mesh, TRAIN)
    result = dict(params)
    for path, leaf in leaves.items():
        if is_quantisable(path):
            layers = (layout.put(np.asarray(layer), *leaf.axes[1:]) for layer in np.asarray(params[path]))
            result[path] = quantise_layers(layers, leaf.shape, leaf.axes, kind, layout)
    return result


@functools.lru_cache
def models(family, kind, name="one"):
    """(config, quantised parameters with adapters, the same parameters with dense kernels)."""
    config, mesh = tiny.FAMILIES[family], tiny.mesh_of(name)
    params = quantise_params(config, tiny.random_params(tiny.with_lora(config, tiny.LORA), mesh), mesh, kind)
    dense = {path: dequantise(leaf, FLOAT32) for path, leaf in params.items()}
    return config, params, dense


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_eight_devices_hold_the_bits_of_one_with_the_shardings_of_the_abstract_tree(kind):
    for family in ("llama", "sparse"):
        (config, one, _), (_, eight, _) = models(family, kind), models(family, kind, "fsdp4-tensor2")
        layout = Layout(tiny.mesh_of("fsdp4-tensor2"), TRAIN)
        for path, leaf in abstract_params(config).items():
            if isinstance(one[path], Quantised):
                assert one[path].shape == leaf.shape
                reported = abstract_codes(leaf.shape, leaf.axes, kind, layout)
                jax.tree.map(np.testing.assert_array_equal, one[path], eight[path])
                for have, want in zip(jax.tree.leaves(eight[path]), jax.tree.leaves(reported), strict=True):
                    assert (have.shape, have.dtype) == (want.shape, want.dtype)
                    assert have.sharding.is_equivalent_to(want.sharding, have.ndim)
                assert eight[path].codes.addressable_shards[0].data.size * 8 == eight[path].codes.size
        quantised_paths = {path.split("/")[1] for path, leaf in one.items() if isinstance(leaf, Quantised)}
        assert quantised_paths == {"attention", "experts" if config.experts else "mlp"}


def loss(config, params, tokens, mask, remat="layers", layout=None):
    hidden = bind(tiny.with_lora(config, tiny.LORA), params)(tokens, mask, Compute(FLOAT32, remat), layout)[0]
    return jnp.square(hidden @ head_kernel(config, params)).mean()


@pytest.mark.parametrize("remat", ["layers", "none"])
@pytest.mark.parametrize(("family", "kind"), [("llama", "nf4"), ("sparse", "int8")])
def test_loss_and_adapter_gradients_equal_those_over_the_dense_kernels(family, kind, remat):
    config, params, dense = models(family, kind)
    tokens, mask = tiny.prompts(config, [8, 5], 8)

    @jax.jit
    def run(params):
        trainable, frozen = partition(params, lambda path: is_trainable(path, tiny.LORA))
        return jax.value_and_grad(lambda train: loss(config, {**frozen, **train}, tokens, mask, remat))(trainable)

    got, want = run(params), run(dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), got, want)
    assert all(np.abs(grad).max() > 0 for grad in got[1].values())


@pytest.mark.parametrize("remat", ["layers", "none"])
@pytest.mark.parametrize("family", ["llama", "sparse"])
def test_a_step_changes_only_adapters_and_never_holds_a_stack_of_dense_kernels(family, remat):
    config, params, _ = models(family, "nf4")
    layout, tx = Layout(single_device_mesh(), TRAIN), optax.adam(1e-2)
    before = jax.tree.map(np.asarray, params)
    leaves = abstract_params(tiny.with_lora(config, tiny.LORA))
    trainable, frozen = partition(jax.tree.map(jnp.copy, params), is_adapter)
    state = init_state(trainable, tx, leaves, layout)
    update = make_update(
        lambda params, batch: (loss(config, params, *batch, remat, layout), (1.0, {})),
        *(tx, leaves, layout, 1),
    )
    batch = layout.put_batch(tiny.prompts(config, [8], 8))
    text = update.lower(state, frozen, batch).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)}
    whole = {leaf.shape for path, leaf in params.items() if isinstance(leaf, Quantised)}
    one = max(int(np.prod(shape[1:])) for shape in whole)
    assert max(int(np.prod(shape)) for shape in shapes) <= max(one, 64 * 32)
    state, _ = update(state, frozen, batch)
    for path, leaf in state.params(frozen).items():
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), leaf, before[path])
        assert all(jax.tree.leaves(same)) == (not is_adapter(path)), path


def answers(config, params, name, lora=tiny.LORA):
    mesh = tiny.mesh_of(name)
    weights = make_publish(tiny.with_lora(config, lora), mesh, FLOAT32)(params)
    sample = SampleConfig(max_new_tokens=5)
    prompts = tiny.prompts(config, [8, 1, 5, 3, 8, 2, 7, 4], 8)
    rollout = make_generate(tiny.decoding(config, sample, (-1,), mesh, FLOAT32))(weights, *prompts, jax.random.key(1))
    return weights, jax.tree.map(np.asarray, rollout)


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        ("opt", "int8", "one"),
        ("llama", "nf4", "fsdp4-tensor2"),
        ("sparse", "nf4", "data2-fsdp2-tensor2"),
    ],
)
def test_answers_equal_those_of_the_merged_dense_model(family, kind, name):
    config, params, dense = models(family, kind, name)
    _, got = answers(config, params, name)
    _, want = answers(config, dense, name)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=2e-4)


def test_on_one_device_generation_shares_the_codes_with_training():
    config, params, _ = models("llama", "nf4")
    weights, _ = answers(config, params, "one")
    for path in ("attention/q", "mlp/down"):
        mine, theirs = params[f"layers/{path}/kernel"], weights[f"layers/{path.split('/')[1]}/kernel"]
        assert mine.codes.unsafe_buffer_pointer() == theirs.codes.unsafe_buffer_pointer()


def test_the_generation_program_never_holds_the_dense_kernels_of_all_layers():
    sizes = dict(hidden_size=256, embed_size=256, mlp_size=512, head_dim=32, num_layers=6, attention_scale=32**-0.5)
    config = dataclasses.replace(tiny.LLAMA, rope=Rope(tuple(0.5**i for i in range(16))), **sizes)
    train, mesh, dense = Layout(single_device_mesh(), TRAIN), single_device_mesh(), 0
    params = {}
    for path, leaf in abstract_params(config).items():
        params[path] = jax.ShapeDtypeStruct(leaf.shape, FLOAT32, sharding=train.sharding(leaf.axes))
        if is_quantisable(path):
            params[path] = abstract_codes(leaf.shape, leaf.axes, "nf4", train)
            dense += math.prod(params[path].shape) * 4
    weights = jax.eval_shape(make_publish(config, mesh, FLOAT32), params)

    def program(weights, prompts, mask, key):
        decoding = Decoding(Inference(config, Layout(mesh, GENERATE), FLOAT32), SampleConfig(max_new_tokens=8), (-1,))
        return generate(decoding, weights, prompts, mask, key)

    rows = [jax.ShapeDtypeStruct((2, 8), dtype) for dtype in (jnp.int32, jnp.bool)]
    compiled = jax.jit(program).lower(weights, *rows, jax.eval_shape(lambda: jax.random.key(0))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 4
    carried = [line.split(" while(")[0] for line in compiled.as_text().splitlines() if " while(" in line]
    assert not any(re.search(r"f32\[(256,256|256,512|512,256)\]", line) for line in carried)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = decoder_config(HF, scalar_head=False)
    layout = Layout(single_device_mesh(), TRAIN)
    path = tmp_path_factory.mktemp("base") / "model"
    save_pretrained(Pretrained(config, tiny.random_params(config, layout.mesh), None, HF, {}, layout), path)
    return path


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_folder_is_read_into_the_same_bits_every_time_and_on_eight_devices(folder, kind):
    one, again = from_pretrained(folder, dtype=kind), from_pretrained(folder, dtype=kind)
    eight = from_pretrained(folder, dtype=kind, mesh=tiny.mesh_of("fsdp4-tensor2"))
    for other in (again, eight):
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    for name, leaf in one.params.items():
        assert isinstance(leaf, Quantised) == is_quantisable(name)
        assert isinstance(leaf, Quantised) or leaf.dtype == jnp.bfloat16
    tokens, mask = tiny.prompts(one.config, [8, 5, 8, 7, 3, 2, 1, 8], 8)

    def logits(model):
        hidden = bind(model.config, model.params)(tokens, mask, Compute(FLOAT32, "none"))[0]
        return (hidden @ head_kernel(model.config, model.params))[mask]

    dense = {name: dequantise(leaf, FLOAT32) for name, leaf in one.params.items()}
    np.testing.assert_allclose(logits(one), logits(dataclasses.replace(one, params=dense)), atol=1e-4)
    whole = from_pretrained(folder).params
    for name in filter(is_quantisable, whole):
        error = np.linalg.norm(dense[name] - whole[name]) / np.linalg.norm(whole[name])
        assert error < {"int8": 0.008, "nf4": 0.1}[kind], name
    # Activations are bfloat16 here, and sums over shards are in a different order.
    np.testing.assert_allclose(apply(eight, tokens, mask)[mask], apply(one, tokens, mask)[mask], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["one", "fsdp4-tensor2"])
@pytest.mark.parametrize(("kind", "dtype"), [("int8", "bfloat16"), ("nf4", "float32")])
def test_an_export_is_the_dequantised_base_plus_the_adapters_rounded_once(folder, tmp_path, kind, dtype, name):
    model = from_pretrained(folder, dtype=kind, mesh=tiny.mesh_of(name))
    config = tiny.with_lora(model.config, tiny.LORA)
    arrays, leaves = tiny.random_arrays(config), abstract_params(config)
    adapters = {path: model.layout.put(arrays[path], *leaves[path].axes) for path in arrays if is_adapter(path)}
    trained = dataclasses.replace(model, config=config, params={**model.params, **adapters})
    save_pretrained(trained, tmp_path / "out", dtype=dtype)
    for prefix, theirs in (("attention/o", "self_attn.o_proj"), ("mlp/up", "mlp.up_proj")):
        base = np.asarray(dequantise(model.params[f"layers/{prefix}/kernel"], FLOAT32))
        a, b = (arrays[f"layers/{prefix}/lora_{x}"].astype(np.float64) for x in "ab")
        for i in range(3):
            want = (base[i] + tiny.LORA.scale * a[i] @ b[i]).T
            got = load_file(tmp_path / "out" / "model.safetensors")[f"model.layers.{i}.{theirs}.weight"]
            off = np.abs(got.astype(np.float64) - want)
            assert (off <= 2e-7 + np.abs(want) * {"bfloat16": 2.0**-8, "float32": 1e-6}[dtype]).all()
    save_pretrained(model, tmp_path / "base", dtype="float32")
    got = load_file(tmp_path / "base" / "model.safetensors")["model.layers.2.mlp.down_proj.weight"].T
    np.testing.assert_array_equal(got, np.asarray(dequantise(model.params["layers/mlp/down/kernel"], FLOAT32))[2])


def test_a_quantised_base_without_adapters_to_train_is_rejected_with_the_fix():
    with pytest.raises(ValueError, match='every weight of the actor trains: set lora = .*frozen_dtype = "bfloat16"'):
        ModelConfig(frozen_dtype="nf4")
    with pytest.raises(ValueError, match='dtype "nf3" is not supported; supported: .*int8, nf4'):
        from_pretrained("nowhere", dtype="nf3")


def test_a_frozen_copy_keeps_codes_and_does_not_quantise_fully_trained_weights():
    params = {"q": quantise(jnp.asarray(kernel(64, 8)), "nf4", -2), "w": jnp.ones(4)}
    copy = copy_frozen(params, "nf4")
    want = jax.tree.map(np.asarray, params["q"])
    jax.tree.map(lambda leaf: leaf.delete(), params)
    jax.tree.map(np.testing.assert_array_equal, copy["q"], want)
    assert copy["w"].dtype == jnp.bfloat16


LORA_RUN = (
    *("model.lora={ rank = 2 }", "model.reward_lora={ rank = 2 }", "model.frozen_dtype=nf4", "sft.steps=3"),
    *("reward.steps=2", "ppo.steps=3", "run.save_every=1", "ppo.rollout_batch_size=8", "model.new.num_kv_heads=2"),
)


def test_all_stages_run_on_a_quantised_base_and_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("train", recipe, *LORA_RUN, f"run.dir={whole}", devices=2) == 0
    first = untimed_records(whole / "ppo" / "metrics.jsonl")[0]
    assert first["logprob_mismatch"] < 1e-4  # generation and training see the same dequantised weights
    assert abs(first["kl"]) < 1e-4  # so does the reference, which is the actor's base
    with monkeypatch.context() as patch:
        interrupt_stage(patch, "ppo", 2)
        assert run("train", recipe, *LORA_RUN, f"run.dir={stopped}", devices=2) == 130
    assert run("train", recipe, *LORA_RUN, f"run.dir={stopped}", devices=2) == 0
    assert untimed_records(stopped / "ppo" / "metrics.jsonl") == untimed_records(whole / "ppo" / "metrics.jsonl")
    ours, theirs = (tensors(folder / "ppo" / "export") for folder in (stopped, whole))
    assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []
