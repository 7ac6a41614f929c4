"""Reading and writing safetensors: every way in which a file can store a parameter, on one device and on eight."""

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhf_jax.mesh import GENERATE, TRAIN, Layout, MeshConfig, make_mesh
from rlhf_jax.models.decoder import Leaf
from rlhf_jax.models.families.tensors import Checkpoint, HfTensor, Stripe
from rlhf_jax.models.lora import NO_LORA
from rlhf_jax.models.safetensors_io import different_twin, read_params, reading, write_params, writing

LAYERS, EXPERTS, HEADS, KV_HEADS, HEAD, HIDDEN, WIDTH, VOCAB, PADDED = 3, 2, 8, 4, 4, 16, 24, 50, 64
KV = KV_HEADS * HEAD
Q_OF_GROUP = Stripe(0, HEADS // KV_HEADS * HEAD, (HEADS // KV_HEADS + 2) * HEAD)  # of each key-value head: q, q, k, v
K_OF_GROUP, V_OF_GROUP = (Stripe(Q_OF_GROUP.length + i * HEAD, HEAD, Q_OF_GROUP.period) for i in range(2))
QKV = (HEADS + 2 * KV_HEADS) * HEAD

# No model has all of these at once; each occurs in some model.
LEAVES = {
    "embed/tokens": Leaf((PADDED, HIDDEN), ("vocab", "embed")),
    "embed/positions": Leaf((32, HIDDEN), (None, "positions")),
    "final_norm/scale": Leaf((HIDDEN,), ("embed",)),
    "head/bias": Leaf((PADDED,), ("vocab",)),
    "score/kernel": Leaf((HIDDEN, 1), ("embed", None)),
    "layers/attention/q/kernel": Leaf((LAYERS, HIDDEN, HEADS * HEAD), ("layers", "embed", "heads")),
    "layers/attention/k/kernel": Leaf((LAYERS, HIDDEN, KV), ("layers", "embed", "kv_heads")),
    "layers/attention/v/kernel": Leaf((LAYERS, HIDDEN, KV), ("layers", "embed", "kv_heads")),
    "layers/attention/q/bias": Leaf((LAYERS, HEADS * HEAD), ("layers", "heads")),
    "layers/attention/k/bias": Leaf((LAYERS, KV), ("layers", "kv_heads")),
    "layers/attention/v/bias": Leaf((LAYERS, KV), ("layers", "kv_heads")),
    "layers/attention/o/kernel": Leaf((LAYERS, HEADS * HEAD, HIDDEN), ("layers", "heads", "embed")),
    "layers/attention/q_norm/scale": Leaf((LAYERS, HEADS, HEAD), ("layers", "heads", None)),
    "layers/mlp/gate/kernel": Leaf((LAYERS, HIDDEN, WIDTH), ("layers", "embed", "mlp")),
    "layers/mlp/up/kernel": Leaf((LAYERS, HIDDEN, WIDTH), ("layers", "embed", "mlp")),
    "layers/mlp/down/kernel": Leaf((LAYERS, WIDTH, HIDDEN), ("layers", "mlp", "embed")),
    "layers/experts/gate/kernel": Leaf((LAYERS, EXPERTS, HIDDEN, WIDTH), ("layers", None, "embed", "mlp")),
    "layers/experts/up/kernel": Leaf((LAYERS, EXPERTS, HIDDEN, WIDTH), ("layers", None, "embed", "mlp")),
    "layers/experts/down/kernel": Leaf((LAYERS, EXPERTS, WIDTH, HIDDEN), ("layers", None, "mlp", "embed")),
}
TENSORS = {
    "embed/tokens": HfTensor("model.tokens.weight", (VOCAB, HIDDEN)),
    "embed/positions": HfTensor("model.positions.weight", (32, HIDDEN)),
    "final_norm/scale": HfTensor("model.norm.weight", (HIDDEN,)),
    "head/bias": HfTensor("head.bias", (VOCAB,)),
    "score/kernel": HfTensor("score.weight", (1, HIDDEN), True),
    # Fused in several groups, transposed, with biases.
    "layers/attention/q/kernel": HfTensor("model.{i}.qkv.weight", (QKV, HIDDEN), True, Q_OF_GROUP),
    "layers/attention/k/kernel": HfTensor("model.{i}.qkv.weight", (QKV, HIDDEN), True, K_OF_GROUP),
    "layers/attention/v/kernel": HfTensor("model.{i}.qkv.weight", (QKV, HIDDEN), True, V_OF_GROUP),
    "layers/attention/q/bias": HfTensor("model.{i}.qkv.bias", (QKV,), strip=Q_OF_GROUP),
    "layers/attention/k/bias": HfTensor("model.{i}.qkv.bias", (QKV,), strip=K_OF_GROUP),
    "layers/attention/v/bias": HfTensor("model.{i}.qkv.bias", (QKV,), strip=V_OF_GROUP),
    "layers/attention/o/kernel": HfTensor("model.{i}.o.weight", (HIDDEN, HEADS * HEAD), True),
    "layers/attention/q_norm/scale": HfTensor("model.{i}.q_norm.{j}.weight", (HEAD,)),
    # Fused side by side, as in GPT-2's Conv1D: [in, out].
    "layers/mlp/gate/kernel": HfTensor("model.{i}.gate_up", (HIDDEN, 2 * WIDTH), strip=Stripe(0, WIDTH, 2 * WIDTH)),
    "layers/mlp/up/kernel": HfTensor("model.{i}.gate_up", (HIDDEN, 2 * WIDTH), strip=Stripe(WIDTH, WIDTH, 2 * WIDTH)),
    "layers/mlp/down/kernel": HfTensor("model.{i}.down", (WIDTH, HIDDEN)),
    "layers/experts/gate/kernel": HfTensor("model.{i}.experts.{j}.gate.weight", (WIDTH, HIDDEN), True),
    "layers/experts/up/kernel": HfTensor("model.{i}.experts.{j}.up.weight", (WIDTH, HIDDEN), True),
    "layers/experts/down/kernel": HfTensor("model.{i}.experts.{j}.down.weight", (HIDDEN, WIDTH), True),
}
GATE_UP = (EXPERTS, 2 * WIDTH, HIDDEN)
FUSED_EXPERTS = {
    "layers/experts/gate/kernel": HfTensor("model.{i}.gate_up_proj", GATE_UP, True, Stripe(0, WIDTH, 2 * WIDTH)),
    "layers/experts/up/kernel": HfTensor("model.{i}.gate_up_proj", GATE_UP, True, Stripe(WIDTH, WIDTH, 2 * WIDTH)),
    "layers/experts/down/kernel": HfTensor("model.{i}.down_proj", (EXPERTS, HIDDEN, WIDTH), True),
}
FUSED = {**TENSORS, **FUSED_EXPERTS}
OUTPUTS = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("tensor",))
BOTH_WAYS = dataclasses.replace(TRAIN, embed=("fsdp",), **OUTPUTS)


def on(table=TRAIN, **sizes) -> Layout:
    count = int(np.prod(list(sizes.values())))
    return Layout(make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[:count]), table)


LAYOUTS = {
    "one device": lambda: on(),
    "fsdp 8": lambda: on(fsdp=8),
    "fsdp 4, tensor 2": lambda: on(fsdp=4, tensor=2),
    "data 2, tensor 4": lambda: on(data=2, tensor=4),
    "generation": lambda: on(GENERATE, fsdp=2, tensor=4),
    "inputs over fsdp 4, outputs over tensor 2": lambda: on(BOTH_WAYS, fsdp=4, tensor=2),
    "inputs over fsdp 2, outputs over tensor 4": lambda: on(BOTH_WAYS, fsdp=2, tensor=4),
}


@pytest.fixture
def layout() -> Layout:
    return on(fsdp=4, tensor=2)


def checkpoint(tensors=TENSORS) -> dict[str, np.ndarray]:
    """{name in the files: tensor}, with random elements, so that a mix-up is noticed."""
    rng = np.random.default_rng(0)
    named = {}
    for tensor in tensors.values():
        for i in range(LAYERS if "{i}" in tensor.name else 1):
            for j in range((HEADS if "norm" in tensor.name else EXPERTS) if "{j}" in tensor.name else 1):
                named[tensor.name.format(i=i, j=j)] = rng.normal(size=tensor.shape).astype(np.float32)
    return named


def read(folder, layout, *, layouts=(TENSORS,), leaves=LEAVES, dtype="float32", **files):
    return read_params(folder, leaves, Checkpoint(layouts, "model.", **files), layout, dtype)


def files_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_transform_reads_the_right_values_and_writes_them_back_unchanged(tmp_path, name):
    layout, tensors = LAYOUTS[name](), checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    params = read(tmp_path, layout)
    assert params.keys() == LEAVES.keys()
    for path, leaf in LEAVES.items():
        assert params[path].shape == leaf.shape
        assert params[path].sharding.is_equivalent_to(layout.sharding(leaf.axes), len(leaf.shape)), path
    for path, expected in by_hand(tensors).items():
        np.testing.assert_array_equal(params[path], expected, err_msg=path)
    out = tmp_path / "out"
    out.mkdir()
    write_params(out, params, TENSORS, "float32")
    again = files_of(out)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].tobytes() == tensor.tobytes() and again[name].shape == tensor.shape, name


def by_hand(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The expected parameters, written in NumPy without stripes."""

    def each(name: str) -> np.ndarray:
        return np.stack([tensors[name.format(i=i)] for i in range(LAYERS)])

    def experts(kind: str) -> np.ndarray:
        return np.stack([each(f"model.{{i}}.experts.{j}.{kind}.weight") for j in range(EXPERTS)], 1).swapaxes(-1, -2)

    kernel = each("model.{i}.qkv.weight").reshape(LAYERS, KV_HEADS, HEADS // KV_HEADS + 2, HEAD, HIDDEN)
    bias = each("model.{i}.qkv.bias").reshape(LAYERS, KV_HEADS, HEADS // KV_HEADS + 2, HEAD)
    parts = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}
    gate, up = np.split(each("model.{i}.gate_up"), 2, -1)
    return {
        "embed/tokens": np.pad(tensors["model.tokens.weight"], ((0, PADDED - VOCAB), (0, 0))),
        "embed/positions": tensors["model.positions.weight"],
        "final_norm/scale": tensors["model.norm.weight"],
        "head/bias": np.pad(tensors["head.bias"], (0, PADDED - VOCAB)),
        "score/kernel": tensors["score.weight"].T,
        **{
            f"layers/attention/{name}/kernel": kernel[:, :, part].reshape(LAYERS, -1, HIDDEN).swapaxes(1, 2)
            for name, part in parts.items()
        },
        **{f"layers/attention/{name}/bias": bias[:, :, part].reshape(LAYERS, -1) for name, part in parts.items()},
        "layers/attention/o/kernel": each("model.{i}.o.weight").swapaxes(1, 2),
        "layers/attention/q_norm/scale": np.stack([each(f"model.{{i}}.q_norm.{j}.weight") for j in range(HEADS)], 1),
        "layers/mlp/gate/kernel": gate,
        "layers/mlp/up/kernel": up,
        "layers/mlp/down/kernel": each("model.{i}.down"),
        **{f"layers/experts/{name}/kernel": experts(name) for name in ("gate", "up", "down")},
    }


@pytest.mark.parametrize("name", ["one device", "fsdp 8", "inputs over fsdp 4, outputs over tensor 2"])
def test_the_layout_whose_names_are_in_the_files_is_used(tmp_path, name):
    layout, tensors = LAYOUTS[name](), checkpoint(FUSED)
    save_file(tensors, tmp_path / "model.safetensors")
    params = read(tmp_path, layout, layouts=(TENSORS, FUSED_EXPERTS))
    for i in range(LAYERS):
        gate, up = np.split(tensors[f"model.{i}.gate_up_proj"].swapaxes(1, 2), 2, -1)
        np.testing.assert_array_equal(params["layers/experts/gate/kernel"][i], gate)
        np.testing.assert_array_equal(params["layers/experts/up/kernel"][i], up)
        down = tensors[f"model.{i}.down_proj"].swapaxes(1, 2)
        np.testing.assert_array_equal(params["layers/experts/down/kernel"][i], down)
    write_params(tmp_path, params, FUSED, "float32")
    for name, tensor in files_of(tmp_path).items():
        assert tensor.tobytes() == tensors[name].tobytes(), name
    write_params(tmp_path, params, TENSORS, "float32")
    assert files_of(tmp_path).keys() == checkpoint().keys()


def test_faults_are_reported_against_the_layout_that_fits_best(tmp_path, layout):
    tensors = checkpoint(FUSED)
    del tensors["model.1.down_proj"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"; missing: model\.1\.down_proj$"):
        read(tmp_path, layout, layouts=(TENSORS, FUSED_EXPERTS))


def test_each_device_holds_only_its_shard_and_every_element_is_read_once(tmp_path, monkeypatch):
    save_file(checkpoint(), tmp_path / "model.safetensors")
    copied = []

    def count_and_copy(to, source):
        copied.append(to.size)
        to[...] = source

    monkeypatch.setattr(reading, "copy", count_and_copy)
    params = read(tmp_path, on(fsdp=4, tensor=2))
    assert sum(copied) == sum(tensor.size for tensor in checkpoint().values())
    for path, leaf in LEAVES.items():
        split = 8 if any(axis not in (None, "embed", "layers") for axis in leaf.axes) else 1
        assert {shard.data.size for shard in params[path].addressable_shards} == {params[path].size // split}, path
    copied.clear()
    read(tmp_path, on(GENERATE, fsdp=4, tensor=2))
    assert sum(copied) == sum(tensor.size for tensor in checkpoint().values())


def test_replicas_that_share_host_memory_can_be_donated(tmp_path):
    tensors = checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    scale = read(tmp_path, on(fsdp=8))["final_norm/scale"]
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(scale)
    for shard in after.addressable_shards:
        np.testing.assert_array_equal(shard.data, tensors["model.norm.weight"] + 1)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_casts_on_reading_and_writing_equal_those_of_numpy(tmp_path, layout, stored, dtype):
    rng = np.random.default_rng(0)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 65504, 65519.99, 1e-7, 6e-8, 3e-8, 1e-40, 3.4e38, 1 + 2**-8])
    tensors = {}
    for name, tensor in checkpoint().items():
        values = tensor * 10.0 ** rng.integers(-9, 9, tensor.shape)
        values.reshape(-1)[: special.size] = special[: tensor.size]
        if np.float16 in (stored, dtype):
            values = np.where(np.isfinite(values), np.clip(values, -65280, 65280), values)  # the range of bfloat16 too
        tensors[name] = values.astype(stored)
    save_file(tensors, tmp_path / "model.safetensors")
    params = read(tmp_path, layout, dtype=np.dtype(dtype).name)
    for path, expected in by_hand(tensors).items():
        assert params[path].dtype == dtype
        assert np.asarray(params[path]).tobytes() == expected.astype(dtype).tobytes(), path
    exact = {path: jax.device_put(array) for path, array in by_hand(tensors).items()}
    write_params(tmp_path, exact, TENSORS, np.dtype(dtype).name)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        for name, tensor in tensors.items():
            written = file.get_tensor(name)
            assert written.dtype == dtype and written.tobytes() == tensor.astype(dtype).tobytes(), name


def test_an_index_that_points_outside_the_folder_and_a_tensor_in_two_files_are_rejected(tmp_path, layout):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(checkpoint(), tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "."):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ValueError, match="is damaged .* is no name of a file in this folder"):
            read(folder, layout)
    first = dict(list(checkpoint().items())[:2])
    save_file(checkpoint(), folder / "a.safetensors")
    save_file(first, folder / "b.safetensors")
    weight_map = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    with pytest.raises(ValueError, match=f"two files of .* have {', '.join(sorted(first))}: remove"):
        read(folder, layout)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_a_number_beyond_float16_is_rejected_on_reading_and_on_writing(tmp_path, layout, stored):
    tensors = checkpoint()
    tensors["model.norm.weight"][-1] = 1e5
    save_file({name: tensor.astype(stored) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="beyond the largest float16, 65504: use bfloat16 or float32"):
        read(tmp_path, layout, dtype="float16")
    with pytest.raises(ValueError, match="beyond the largest float16, 65504: use bfloat16 or float32"):
        write_params(tmp_path, read(tmp_path, layout), TENSORS, "float16")


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_found(tmp_path, layout):
    tensors, embedding = checkpoint(), TENSORS["embed/tokens"].name
    tied = Checkpoint([TENSORS], "model.", twins={"lm_head.weight": embedding})
    for change, expected in ((0, None), (1, ("lm_head.weight", embedding))):
        head = tensors[embedding].copy()
        head[-1, -1] += change
        save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        assert different_twin(tmp_path, tied) == expected
    save_file(tensors, tmp_path / "model.safetensors")
    assert different_twin(tmp_path, tied) is None


def test_files_named_by_an_index_and_tensors_without_the_base_prefix_are_found(tmp_path, layout):
    tensors = {name.removeprefix("model."): tensor for name, tensor in checkpoint().items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[:17], "b.safetensors": names[17:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    params = read(tmp_path, layout)
    for path, expected in by_hand(checkpoint()).items():
        np.testing.assert_array_equal(params[path], expected, err_msg=path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="index.json names b.safetensors, which is not there: download it again"):
        read(tmp_path, layout)


def test_missing_surplus_wrongly_shaped_and_foreign_tensors_are_all_reported_at_once(tmp_path, layout):
    tensors = checkpoint()
    del tensors["model.1.qkv.bias"], tensors["model.2.experts.1.up.weight"], tensors["head.bias"]
    tensors["model.3.qkv.weight"] = np.zeros(32, np.float32)
    tensors["v_head.weight"] = np.zeros(32, np.float32)
    tensors["model.norm.weight"] = np.zeros(HIDDEN - 1, np.float32)
    tensors["model.0.qkv.weight"] = np.zeros((HIDDEN, QKV), np.float32)
    tensors["model.2.q_norm.7.weight"] = np.zeros(HEAD, np.int8)
    tensors["model.0.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        read(tmp_path, layout, tolerated=re.compile(r"model\.\d+\.rotary_emb\.inv_freq"))
    reported = str(raised.value)
    assert "missing: head.bias, model.1.qkv.bias, model.2.experts.1.up.weight;" in reported
    assert "surplus: model.3.qkv.weight, v_head.weight;" in reported
    assert "model.norm.weight ([15] in place of [16])" in reported
    assert reported.count(f"model.0.qkv.weight ([16, {QKV}] in place of [{QKV}, 16])") == 1
    assert reported.endswith("of an unsupported dtype: model.2.q_norm.7.weight (I8 in place of F32, F16, BF16)")
    assert "inv_freq" not in reported and "\n" not in reported


def test_an_optional_parameter_is_left_out_when_the_files_lack_it(tmp_path, layout):
    tensors = checkpoint()
    score = tensors.pop("score.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert read(tmp_path, layout, optional=("score/kernel",)).keys() == LEAVES.keys() - {"score/kernel"}
    with pytest.raises(ValueError, match="missing: score.weight$"):
        read(tmp_path, layout)
    save_file({**tensors, "score.weight": score}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(read(tmp_path, layout, optional=("score/kernel",))["score/kernel"], score.T)


def test_folders_without_weights_are_rejected(tmp_path, layout):
    with pytest.raises(ValueError, match=r"neither model.safetensors nor pytorch_model.bin.*model folder\?$"):
        read(tmp_path, layout)
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(ValueError, match="model folder\\?; of consolidated.00.pth the names say nothing"):
        read(tmp_path, layout)


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype="F32", shape=(2,), ends=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


DAMAGED = {
    "is empty": b"",
    "is too short for the size of its header": b"\x01\0\0",
    "has a header beyond its end": b"\xff" * 100,
    "has a header that is not JSON": struct.pack("<Q", 8) + b"{{{{{{{{",
    "has a header that is not UTF-8": struct.pack("<Q", 8) + b'{"\xff\xfe": ',
    "has a list for a header": struct.pack("<Q", 2) + b"[]",
    "has brackets for a header": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "describes a tensor by a number": header(a=1),
    "has no dtype": header(a={"shape": [2], "data_offsets": [0, 8]}) + bytes(8),
    "has a list for a dtype": header(a=entry(dtype=["F32"])) + bytes(8),
    "has one offset": header(a=entry(ends=(8,))) + bytes(8),
    "has a shape of another size": header(a=entry(shape=(3,))) + bytes(8),
    "has a negative shape": header(a=entry(shape=(-1, -2))) + bytes(8),
    "has offsets that are not integers": header(a=entry(ends=(0.0, 8.0))) + bytes(8),
    "has negative offsets": header(a=entry(ends=(-8, 0))) + bytes(8),
    "has decreasing offsets": header(a=entry("I8", (8,), (8, 0))) + bytes(8),
    "has tensors that overlap": header(a=entry(), b=entry(ends=(4, 12))) + bytes(12),
    "is truncated": header(a=entry()) + bytes(7),
    "has trailing bytes": header(a=entry()) + bytes(9),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_rejected_by_name(tmp_path, layout, damage):
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged \(.+\): download it again"):
        read(tmp_path, layout)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_rejected_by_name(tmp_path, layout, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged \(.+\): download it again"):
        read(tmp_path, layout)


def test_a_mesh_that_does_not_divide_the_model_is_rejected_with_the_dimensions(tmp_path):
    save_file(checkpoint(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers/attention/q/kernel \(32 over 6\)") as raised:
        read(tmp_path, on(fsdp=6))
    assert "mlp" not in str(raised.value)  # 24 is 6 x 4


def test_files_hold_at_most_the_maximum_bytes_and_the_index_lists_them(tmp_path, layout, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    tensors = checkpoint()
    save_file(tensors, source / "model.safetensors")
    params = read(source, layout)
    monkeypatch.setattr(writing, "MAX_FILE_BYTES", 12_000)
    write_params(out, params, TENSORS, "float32")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and all(sum(t.nbytes for t in load_file(f).values()) <= 12_000 for f in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    numbers = [int(re.search(r"\d+", index["weight_map"][f"model.{i}.o.weight"])[0]) for i in range(LAYERS)]
    assert index["weight_map"]["model.tokens.weight"] == f"model-00001-of-{len(files):05d}.safetensors"
    assert numbers == sorted(numbers) and numbers[0] < numbers[-1]
    with safe_open(files[0], framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    again = read(out, layout)
    for path, param in params.items():
        np.testing.assert_array_equal(param, again[path], err_msg=path)


def test_a_tensor_with_a_missing_part_is_not_written(tmp_path):
    params = {"layers/attention/q/bias": jax.numpy.zeros((LAYERS, HEADS * HEAD))}
    with pytest.raises(AssertionError, match=f"fills {HEADS * HEAD} of the {QKV} elements of model.0.qkv.bias"):
        write_params(tmp_path, params, TENSORS, "float32")


def test_a_layer_is_fetched_equally_from_host_and_accelerator():
    data = jax.numpy.arange(24.0).reshape(2, 3, 4)
    for index in ([], [1], [1, 2]):
        fetched = np.asarray(writing._matrix([data], index, NO_LORA))  # the path for accelerators
        np.testing.assert_array_equal(fetched, writing._fetch([data], index, NO_LORA))
        assert not np.shares_memory(fetched, np.asarray(data))


MEMORY = """
import threading, sys, time
import jax, numpy as np
from pathlib import Path
from rlhf_jax.mesh import TRAIN, Layout, MeshConfig, make_mesh
from rlhf_jax.models.decoder import Leaf
from rlhf_jax.models.safetensors_io import different_twin, read_params, write_params
from rlhf_jax.models.families.tensors import Checkpoint, HfTensor

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

folder, devices = Path(sys.argv[1]), int(sys.argv[2])
layout = Layout(make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices]), TRAIN)
leaf, tensor = Leaf((2, 2048, 6144), ("layers", "embed", "mlp")), HfTensor("{i}.%s", (6144, 2048), True)
leaves = {name: leaf for name in "ab"}
tensors = {name: tensor._replace(name=tensor.name % name) for name in leaves}
jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(3)))  # the compiler's own memory comes before
start, peak, ended = resident(), 0, False

def watch():
    global peak
    while not ended:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
params = read_params(folder, leaves, Checkpoint([tensors], ""), layout, "float32")
held = sum(param.nbytes for param in params.values())
read_peak, peak = peak - start - held, 0
(folder / "out").mkdir()
write_params(folder / "out", params, tensors, "float32")
ended = True
thread.join()
print(read_peak, peak - start - held)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("devices", [1, 8])
def test_the_host_holds_about_one_shard_in_addition_to_the_devices(tmp_path, devices):
    rng = np.random.default_rng(0)
    for name in "ab":  # 200 MB in all; tensors this large are returned to the system when freed
        tensors = {f"{i}.{name}": rng.random((6144, 2048), np.float32) for i in range(2)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    weight_map = {f"{i}.{name}": f"{name}.safetensors" for name in "ab" for i in range(2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(devices)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    reading_peak, writing_peak = map(int, ran.stdout.split())
    tensor = 6144 * 2048 * 4
    # In addition to the shard, the mapped pages of the file's tensor; 20 MB are for Python and JAX themselves.
    assert reading_peak < 2 * tensor // devices + tensor + 20e6
    assert writing_peak < tensor + tensor // devices + 20e6  # a tensor, and a copy of a shard of it
    for name, array in files_of(tmp_path / "out").items():
        assert array.tobytes() == load_file(tmp_path / f"{name[-1]}.safetensors")[name].tobytes()
