"""One copy of a frozen base, used by both training and generation, against the stacked base and its merged copy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from tiny_recipe import run, tensors, untimed_records, write_recipe

from rlhf_jax.mesh import GENERATE, TRAIN, Layout
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, bind, head_kernel
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.inference import shared_paths
from rlhf_jax.models.lora import is_adapter, is_trainable, merge_adapters
from rlhf_jax.models.pretrained import Pretrained, from_pretrained, save_pretrained
from rlhf_jax.models.quantised import is_quantisable
from rlhf_jax.models.unstacked import Unstacked, is_shareable, scan_layers
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.rollout import make_generate, make_publish
from rlhf_jax.sampling import SampleConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.train_step import init_state, make_update
from rlhf_jax.trees import partition

FLOAT32 = jnp.dtype("float32")
# "few": one KV head, which two tensor shards need both.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 61,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 32,
}
SPARSE = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
HF = {"llama": LLAMA, "few": LLAMA | {"num_key_value_heads": 1, "hidden_size": 64}, "opt": OPT, "sparse": SPARSE}
CASES = [("llama", "one"), ("few", "fsdp4-tensor2"), ("opt", "data2-fsdp2-tensor2"), ("sparse", "fsdp4-tensor2")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder of a random model}."""
    made, mesh = {}, tiny.mesh_of("one")
    for name, hf in HF.items():
        config = decoder_config(hf, scalar_head=False)
        made[name] = tmp_path_factory.mktemp(name) / "model"
        save_pretrained(
            Pretrained(config, tiny.random_params(config, mesh), None, hf, {}, Layout(mesh, TRAIN)), made[name]
        )
    return made


def load_with_adapters(folder, mesh_name: str, *, one_copy: bool, dtype: str = "float32") -> Pretrained:
    """The model in `folder` with random adapters."""
    model = from_pretrained(folder, mesh=tiny.mesh_of(mesh_name), dtype=dtype, one_copy=one_copy)
    config = tiny.with_lora(model.config, tiny.LORA)
    leaves, arrays = abstract_params(config), tiny.random_arrays(config)
    adapters = {path: model.layout.put(arrays[path], *leaves[path].axes) for path in leaves if is_adapter(path)}
    return dataclasses.replace(model, config=config, params={**model.params, **adapters})


def stack(leaf) -> np.ndarray:
    return np.stack([np.asarray(layer) for layer in leaf.layers]) if isinstance(leaf, Unstacked) else np.asarray(leaf)


@pytest.mark.parametrize(("name", "mesh_name"), CASES)
def test_one_copy_equals_the_stacked_base_and_has_the_shardings_of_generation(folders, name, mesh_name):
    one, other = (load_with_adapters(folders[name], mesh_name, one_copy=one_copy) for one_copy in (True, False))
    serving = Layout(one.layout.mesh, GENERATE)
    assert shared_paths(other.params) == set()
    assert shared_paths(one.params) == set(filter(is_shareable, abstract_params(one.config)))
    for path, leaf in one.params.items():
        np.testing.assert_array_equal(stack(leaf), stack(other.params[path]), err_msg=path)
        assert isinstance(leaf, Unstacked) == is_quantisable(path)
    where = one.params["embed/tokens"].sharding
    assert where.is_equivalent_to(serving.sharding(("vocab", "embed")), 2)


def loss(config, params, tokens, mask, remat, layout):
    hidden = bind(tiny.with_lora(config, tiny.LORA), params)(tokens, mask, Compute(FLOAT32, remat), layout)[0]
    return jnp.square(hidden @ head_kernel(config, params)).mean()


@pytest.mark.parametrize(
    ("name", "mesh_name", "remat"),
    [
        (*CASES[0], "layers"),
        (*CASES[1], "layers"),
        (*CASES[2], "none"),
        (*CASES[3], "dots"),
    ],
)
def test_loss_and_gradients_equal_those_over_the_stacked_base(folders, name, mesh_name, remat):
    tokens, mask = tiny.prompts(decoder_config(HF[name], scalar_head=False), [8, 5, 7, 1, 2, 8, 8, 3], 8)

    def run(one_copy):
        model = load_with_adapters(folders[name], mesh_name, one_copy=one_copy)
        trainable, frozen = partition(model.params, lambda path: is_trainable(path, tiny.LORA))

        @jax.jit
        def of(trainable, frozen):
            return loss(model.config, {**frozen, **trainable}, tokens, mask, remat, model.layout)

        return jax.value_and_grad(of)(trainable, frozen)

    (value, grads), (want, want_grads) = run(True), run(False)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for path, grad in grads.items():
        largest = np.abs(want_grads[path]).max()
        assert largest > 0
        np.testing.assert_allclose(grad, want_grads[path], atol=1e-5 * max(1.0, largest), err_msg=path)


@pytest.mark.parametrize(("name", "mesh_name"), CASES)
def test_answers_equal_those_of_the_merged_copy(folders, name, mesh_name):
    def answers(one_copy):
        model = load_with_adapters(folders[name], mesh_name, one_copy=one_copy)
        mesh = model.layout.mesh
        weights = make_publish(model.config, mesh, FLOAT32)(model.params)
        prompts = tiny.prompts(model.config, [8, 1, 5, 3, 8, 2, 7, 4], 8)
        generate = make_generate(tiny.decoding(model.config, SampleConfig(max_new_tokens=5), (-1,), mesh, FLOAT32))
        return jax.tree.map(np.asarray, generate(weights, *prompts, jax.random.key(1)))

    got, want = answers(True), answers(False)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "nf4"])
@pytest.mark.parametrize("mesh_name", ["one", "data2-fsdp2-tensor2"])
def test_generation_uses_the_arrays_of_training_on_every_mesh(folders, mesh_name, dtype):
    model = load_with_adapters(folders["llama"], mesh_name, one_copy=True, dtype=dtype)
    weights = make_publish(model.config, model.layout.mesh, FLOAT32)(model.params)

    def places(tree) -> set[int]:
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return {shard.data.unsafe_buffer_pointer() for shard in shards}

    mine = places([model.params[path] for path in shared_paths(model.params)])
    assert mine <= places(weights)
    # In addition generation has the adapters, vectors and scales.
    added = [leaf for leaf in jax.tree.leaves(weights) if not places(leaf) <= mine]
    assert sum(leaf.size for leaf in added) < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(weights))


@pytest.mark.parametrize(("name", "mesh_name"), [CASES[1], ("sparse", "one")])
def test_an_export_equals_that_of_the_stacked_base(folders, tmp_path, name, mesh_name):
    for one_copy in (True, False):
        model = load_with_adapters(folders[name], mesh_name, one_copy=one_copy)
        save_pretrained(model, tmp_path / f"merged-{one_copy}")
        base = {path: leaf for path, leaf in model.params.items() if not is_adapter(path)}
        base = dataclasses.replace(model, config=model.config.without_lora(), params=base)
        save_pretrained(base, tmp_path / f"base-{one_copy}")
    got, want = (load_file(tmp_path / f"base-{one_copy}" / "model.safetensors") for one_copy in (True, False))
    assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)
    got, want = (load_file(tmp_path / f"merged-{one_copy}" / "model.safetensors") for one_copy in (True, False))
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-6, atol=1e-6, err_msg=path)


def test_a_step_changes_only_the_adapters(folders):
    model = load_with_adapters(folders["llama"], "fsdp4-tensor2", one_copy=True)
    tx, layout = make_optimizer(OptimConfig(1e-2), 10), model.layout
    trainable, frozen = partition(model.params, lambda path: is_trainable(path, tiny.LORA))
    leaves = abstract_params(model.config)
    state = init_state(trainable, tx, leaves, layout)
    before = {path: stack(leaf) for path, leaf in state.params(frozen).items()}
    batch = layout.put_batch(tiny.prompts(model.config, [8, 5, 7, 1, 2, 8, 8, 3], 8))
    update = make_update(
        lambda params, batch: (loss(model.config, params, *batch, "layers", layout), (1.0, {})), tx, leaves, layout, 1
    )
    state, _ = update(state, frozen, batch)
    for path, leaf in state.params(frozen).items():
        assert np.array_equal(stack(leaf), before[path]) == (not is_adapter(path)), path


def test_the_loop_over_separate_layers_equals_the_scan_over_their_stack():
    stacks = {"w": jnp.arange(12.0).reshape(3, 4), "v": jnp.arange(3.0), "none": None}

    def step(carry, layer):
        carry = carry * layer["v"] + layer["w"].sum()
        return carry, {"after": carry, "w": layer["w"]}

    apart = stacks | {"w": Unstacked(tuple(stacks["w"]))}
    (got, each), (want, wanted) = (scan_layers(step, jnp.float32(1), tree) for tree in (apart, stacks))
    assert float(got) == float(want) == ((1 * 0 + 6) * 1 + 22) * 2 + 38
    jax.tree.map(np.testing.assert_array_equal, each, wanted)
    assert apart["w"].shape == (3, 4)


def test_merging_layer_by_layer_equals_merging_the_stack(folders):
    model = load_with_adapters(folders["opt"], "one", one_copy=False)
    merged = jax.jit(functools.partial(merge_adapters, lora=tiny.LORA))(model.params)["layers/mlp/up/kernel"]
    parts = (model.params[f"layers/mlp/up/{name}"] for name in ("kernel", "lora_a", "lora_b"))
    kernel, a, b = (np.asarray(part, np.float64) for part in parts)
    np.testing.assert_allclose(merged, kernel + tiny.LORA.scale * a @ b, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"lora": tiny.LORA, "frozen_dtype": "float32", "dtype": "bfloat16"}, {"frozen_dtype": "bfloat16"}]
)
def test_a_base_that_is_trained_or_cast_for_generation_cannot_be_shared(settings):
    with pytest.raises(ValueError, match=r"one_copy=true shares a base .* lora = { rank = 16 } and frozen_dtype="):
        ModelConfig(one_copy=True, **settings)


LORA_RUN = (
    *("model.lora={ rank = 2 }", "sft.steps=3", "reward.steps=2", "ppo.steps=3", "ppo.rollout_batch_size=8"),
    "mesh.tensor=2",
)


def test_a_run_with_one_copy_equals_the_run_with_two(tmp_path):
    recipe = write_recipe(tmp_path)
    for one_copy in ("true", "false"):
        folder = tmp_path / one_copy
        assert run("train", recipe, *LORA_RUN, f"model.one_copy={one_copy}", f"run.dir={folder}", devices=4) == 0
    got, want = (untimed_records(tmp_path / one_copy / "ppo" / "metrics.jsonl") for one_copy in ("true", "false"))
    assert len(got) == len(want) > 0
    for mine, theirs in zip(got, want, strict=True):
        for name in ("score_mean", "response_length", "actor_grad_norm", "critic_loss", "kl"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=2e-3, atol=1e-5, err_msg=name)
        assert mine["logprob_mismatch"] < 1e-4
    ours, theirs = (tensors(tmp_path / one_copy / "ppo" / "export") for one_copy in ("true", "false"))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)
