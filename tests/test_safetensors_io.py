"""safetensors in and out, on eight devices: fsdp 4, tensor 2."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhf_jax.mesh import GENERATE, TRAIN, Layout, MeshConfig, make_mesh
from rlhf_jax.models import safetensors_io
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import decoder_config, hf_tensors, tolerated_surplus
from rlhf_jax.models.safetensors_io import read_params, write_params

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
CONFIG = decoder_config(LLAMA, scalar_head=False)
SCORER = decoder_config(LLAMA, scalar_head=True)


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])


def checkpoint(config=CONFIG) -> dict[str, np.ndarray]:
    """Every tensor of the model by its name in the files, all elements distinct enough to notice a mix-up."""
    rng = np.random.default_rng(0)
    tensors = {}
    for path, leaf in abstract_params(config).items():
        tensor = hf_tensors(config)[path]
        for i in range(leaf.shape[0] if "{i}" in tensor.name else 1):
            tensors[tensor.name.format(i=i)] = rng.normal(size=tensor.shape).astype(np.float32)
    return tensors


def read(folder, mesh, config=CONFIG, dtype="float32", table=TRAIN, **options):
    layout = Layout(mesh, table)
    options.setdefault("tolerated", tolerated_surplus(config))
    return read_params(folder, abstract_params(config), hf_tensors(config), layout, dtype, **options)


@pytest.mark.parametrize("table", [TRAIN, GENERATE])
def test_stacked_transposed_and_padded_tensors_arrive_in_place(tmp_path, mesh, table):
    tensors = checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    params = read(tmp_path, mesh, table=table)
    assert params.keys() == abstract_params(CONFIG).keys()
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.k_proj"
        np.testing.assert_array_equal(params["layers/attention/k/kernel"][layer], tensors[f"{name}.weight"].T)
        np.testing.assert_array_equal(params["layers/attention/k/bias"][layer], tensors[f"{name}.bias"])
    embedding = np.asarray(params["embed/tokens"])
    assert embedding.shape == (128, 32)
    np.testing.assert_array_equal(embedding[:100], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(embedding[100:], 0)
    np.testing.assert_array_equal(params["final_norm/scale"], tensors["model.norm.weight"])


def test_each_device_holds_its_shard_and_no_more_is_read_than_that(tmp_path, mesh, monkeypatch):
    save_file(checkpoint(), tmp_path / "model.safetensors")
    sizes = []

    class Watched:
        def __init__(self, name, **options):
            self.file = safe_open(name, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return WatchedSlice(name, self.file.get_slice(name))

    class WatchedSlice:
        def __init__(self, name, source):
            self.name, self.source = name, source
            self.get_shape, self.get_dtype = source.get_shape, source.get_dtype

        def __getitem__(self, index):
            part = self.source[index]
            sizes.append((self.name, part.size))
            return part

    monkeypatch.setattr(safetensors_io, "safe_open", Watched)
    params = read(tmp_path, mesh)
    for path, leaf in abstract_params(CONFIG).items():
        split = 8 if any(axis not in (None, "embed", "layers") for axis in leaf.axes) else 1
        assert len(params[path].addressable_shards) == 8
        assert {shard.data.size for shard in params[path].addressable_shards} == {params[path].size // split}, path
    per_layer = {size for name, size in sizes if name.endswith("layers.1.self_attn.q_proj.weight")}
    assert per_layer == {32 * 32 // 8}
    # Rows 96 to 111 of the embedding are 4 real ones and 12 of padding; the rows after them are padding alone.
    assert {size for name, size in sizes if "embed_tokens" in name} == {16 * 32, 4 * 32}
    assert [size for name, size in sizes if name == "model.norm.weight"] == [32]


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_files_are_cast_exactly(tmp_path, mesh, stored, dtype):
    tensors = {name: tensor.astype(stored) for name, tensor in checkpoint().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    up = read(tmp_path, mesh, dtype=dtype)["layers/mlp/up/kernel"]
    assert up.dtype == dtype
    np.testing.assert_array_equal(np.asarray(up[2]), tensors["model.layers.2.mlp.up_proj.weight"].T.astype(up.dtype))


def test_files_named_by_an_index_and_without_the_base_prefix_are_found(tmp_path, mesh):
    tensors = {name.removeprefix("model."): tensor for name, tensor in checkpoint().items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    params = read(tmp_path, mesh)
    np.testing.assert_array_equal(params["layers/mlp/gate/kernel"][1], tensors["layers.1.mlp.gate_proj.weight"].T)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="names b.safetensors, which is not there"):
        read(tmp_path, mesh)


def test_missing_surplus_misshaped_and_foreign_tensors_are_all_named_at_once(tmp_path, mesh):
    tensors = checkpoint()
    del tensors["model.layers.1.self_attn.q_proj.bias"], tensors["lm_head.weight"]
    tensors["model.layers.3.input_layernorm.weight"] = np.zeros(32, np.float32)
    tensors["v_head.weight"] = np.zeros(32, np.float32)
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        read(tmp_path, mesh)
    told = str(raised.value)
    assert "missing: lm_head.weight, model.layers.1.self_attn.q_proj.bias;" in told
    assert "surplus: model.layers.3.input_layernorm.weight, v_head.weight;" in told
    assert "model.norm.weight ([31] in place of [32])" in told
    assert "model.layers.0.mlp.up_proj.weight ([32, 48] in place of [48, 32])" in told
    assert "of an unsupported dtype: model.layers.2.mlp.up_proj.weight (I8" in told
    assert "inv_freq" not in told and "\n" not in told


def test_an_absent_scalar_head_is_left_to_the_caller_and_the_language_models_head_is_ignored(tmp_path, mesh):
    save_file(checkpoint(), tmp_path / "model.safetensors")
    params = read(tmp_path, mesh, SCORER, optional=("score/kernel",))
    assert params.keys() == abstract_params(SCORER).keys() - {"score/kernel"}
    with pytest.raises(ValueError, match="missing: score.weight$"):
        read(tmp_path, mesh, SCORER)
    save_file(checkpoint(SCORER), tmp_path / "model.safetensors")
    params = read(tmp_path, mesh, SCORER, optional=("score/kernel",))
    np.testing.assert_array_equal(params["score/kernel"], checkpoint(SCORER)["score.weight"].T)


def test_pickles_damaged_files_and_empty_folders_are_refused(tmp_path, mesh):
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        read(tmp_path, mesh)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="pytorch_model.bin but no safetensors.*python -c"):
        read(tmp_path, mesh)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        read(tmp_path, mesh)


def test_a_mesh_that_does_not_split_the_model_is_refused_with_the_dimensions(tmp_path):
    save_file(checkpoint(), tmp_path / "model.safetensors")
    mesh = make_mesh(MeshConfig(fsdp=6), jax.devices()[:6])
    with pytest.raises(ValueError, match=r"layers/attention/q/kernel \(32 over 6\)") as raised:
        read(tmp_path, mesh)
    assert "mlp" not in str(raised.value)  # 48 is 6 x 8


@pytest.mark.parametrize("max_bytes", [10**9, 40_000])
def test_what_is_written_is_read_by_the_safetensors_library_and_by_us(tmp_path, mesh, max_bytes):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir(), copy.mkdir()
    tensors = checkpoint()
    save_file(tensors, source / "model.safetensors")
    params = read(source, mesh)
    write_params(copy, params, hf_tensors(CONFIG), "float32", max_bytes=max_bytes)
    files = sorted(copy.glob("*.safetensors"))
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    if max_bytes < 10**9:
        assert len(files) > 2 and all(sum(t.nbytes for t in load_file(f).values()) <= max_bytes for f in files)
        index = json.loads((copy / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert index["weight_map"]["lm_head.weight"].endswith(f"-of-{len(files):05d}.safetensors")
    again = read(copy, mesh)
    for path, param in params.items():
        np.testing.assert_array_equal(param, again[path], err_msg=path)


def test_bfloat16_is_written_as_bfloat16(tmp_path, mesh):
    tensors = checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    params = read(tmp_path, mesh)
    write_params(tmp_path, params, hf_tensors(CONFIG), "bfloat16")
    written = load_file_bfloat16(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor.astype(ml_dtypes.bfloat16), err_msg=name)


def load_file_bfloat16(path):
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}
