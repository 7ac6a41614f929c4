"""Checkpoints of torch.save, read without torch: the same numbers, and nothing but tensors."""

import json
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from checkpoints import assert_close, build, padded_rows, torch, torch_logits

from rlhf_jax.models.pretrained import apply, from_pretrained
from rlhf_jax.models.safetensors_io import open_file

pytestmark = pytest.mark.parity

SIZES = dict(vocab_size=150, hidden_size=64, num_hidden_layers=3, max_position_embeddings=40, num_attention_heads=8)
OPT = dict(SIZES, model_type="opt", ffn_dim=96, word_embed_proj_dim=64)
BLOOM = dict(vocab_size=150, hidden_size=64, n_layer=3, n_head=8, model_type="bloom")
FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
REFUSED = r"which is no part of a tensor: a pickle can run any code, so nothing but tensors is read"


def save_pickle(content, path, is_zip=True):
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)


class Call:
    """Pickled, it asks for a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def tensors():
    """Tensors of every dtype and layout that checkpoints have."""
    table, annotated = torch.arange(24.0).reshape(4, 6).half(), torch.nn.Parameter(torch.randn(2, 2))
    annotated.note = "torch calls another function for a parameter with attributes"
    return {
        "table": table,
        "transposed": table.t(),
        "slice": table[1:3, 2:],
        "parameter": torch.nn.Parameter(torch.randn(2, 2).bfloat16()),
        "annotated": annotated,
        "annotated tensor": annotated.data.clone(),
        "one row for all": torch.randn(1, 3).expand(4, 3),
        "unsigned": torch.ones(2, dtype=torch.uint16),
        "eight bits": torch.ones(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(5),
        "mask": torch.ones(1, 1, 3, 3, dtype=torch.bool),
        "double": torch.ones(2, dtype=torch.float64),
    }


@FORMATS
def test_tensors_of_every_layout_have_the_numbers_of_torch(tmp_path, is_zip):
    content = OrderedDict(tensors())
    content["annotated tensor"].note = "likewise"
    content._metadata = {"": {"version": 1}}  # as a module's
    save_pickle(content, tmp_path / "x.bin", is_zip)
    entries = open_file(tmp_path / "x.bin")
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in content.items()}
    others = {"ids": "I64", "mask": "BOOL", "double": "F64", "unsigned": "U16", "eight bits": "F8_E4M3"}
    assert {name: entries[name].dtype for name in others} == others
    for name in content.keys() - others.keys():
        array = entries[name].array().astype(np.float32)
        np.testing.assert_array_equal(array, content[name].detach().float().numpy(), err_msg=name)


@FORMATS
@pytest.mark.parametrize("settings", [OPT, BLOOM], ids=["opt", "bloom"])
@pytest.mark.parametrize("is_base", [False, True], ids=["language model", "base model"])
def test_a_folder_of_pickles_gives_the_logits_of_torch(tmp_path, settings, is_base, is_zip):
    theirs = build(settings)
    theirs.config.save_pretrained(tmp_path)
    # Old repositories hold what the base model has, without its prefix, and BLOOM's no head.
    content = theirs.base_model.state_dict() if is_base else theirs.state_dict()
    names = sorted(content)
    parts = {f"pytorch_model-{i}.bin": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_pickle(OrderedDict((name, content[name]) for name in part), tmp_path / file, is_zip)
    places = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    ids, mask = padded_rows("left", 150)
    assert_close(np.asarray(apply(from_pretrained(tmp_path), ids, mask))[mask], torch_logits(theirs, ids, mask)[mask])


@FORMATS
def test_a_pickle_that_would_print_is_refused_and_prints_nothing(tmp_path, capfd, is_zip):
    save_pickle({"a": torch.ones(2), "b": Call(print, "printed")}, tmp_path / "x.bin", is_zip)
    with pytest.raises(ValueError, match=rf"x.bin names __builtin__.print, {REFUSED}"):
        open_file(tmp_path / "x.bin")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "module, name", [("os", "getcwd"), ("builtins", "getattr"), ("torch", "load"), ("torch.nn", "Linear")]
)
def test_names_of_other_modules_are_refused_by_name(tmp_path, module, name):
    (tmp_path / "x.bin").write_bytes(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b".")
    with pytest.raises(ValueError, match=rf"x.bin names {module}.{name}, {REFUSED}"):
        open_file(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "content, what",
    [
        ({"model": {"a": 1}, "epoch": 3}, "holds model, epoch and not the tensors of a model by their names"),
        ({"a": torch._neg_view(torch.ones(2))}, "has a conjugated or negated view"),
        ([1, 2], "holds list and not the tensors of a model"),
        ({"a": np.ones(2)}, r"names numpy\S*_reconstruct, which is no part of a tensor"),
    ],
    ids=["trainer", "negated view", "list", "numpy"],
)
@FORMATS
def test_a_pickle_of_something_else_is_refused_with_what_it_holds(tmp_path, content, what, is_zip):
    save_pickle(content, tmp_path / "x.bin", is_zip)
    with pytest.raises(ValueError, match=f"x.bin {what}"):
        open_file(tmp_path / "x.bin")


@FORMATS
def test_a_file_that_is_cut_short_anywhere_is_damaged(tmp_path, is_zip):
    save_pickle(tensors(), tmp_path / "x.bin", is_zip)
    whole = (tmp_path / "x.bin").read_bytes()
    for length in (0, 1, 10, 200, len(whole) // 2, len(whole) - 5):
        (tmp_path / "x.bin").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x.bin is damaged .*: download it again"):
            open_file(tmp_path / "x.bin")


def test_a_tensor_beyond_its_storage_is_damaged(tmp_path):
    save_pickle({"a": torch.ones(2, 3)}, tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    assert whole.count(b"K\x02K\x03\x86") == 1  # the shape (2, 3) in the pickle
    (tmp_path / "x.bin").write_bytes(whole.replace(b"K\x02K\x03\x86", b"K\x09K\x03\x86"))
    with pytest.raises(ValueError, match="x.bin is damaged"):
        open_file(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@FORMATS
def test_a_file_of_which_any_bytes_are_changed_or_lost_is_refused_or_has_the_right_numbers(tmp_path, is_zip):
    path, rng, kinds = tmp_path / "x.bin", np.random.default_rng(0), []
    content = {"w": torch.arange(24.0).reshape(4, 6).t(), "half": torch.ones(3).half(), "empty": torch.zeros(0, 2)}
    save_pickle(content, path, is_zip)
    whole = path.read_bytes()
    numbers = {i for entry in open_file(path).values() for i in range(entry.start, entry.stop)}
    places = sorted(set(range(len(whole))) - numbers)
    for n in range(100):
        changed = bytearray(whole)
        changed[rng.choice(places)] ^= 1 << rng.integers(8)
        path.write_bytes(changed[: rng.integers(len(whole))] if n % 4 == 0 else changed)
        try:
            found = {name: entry.array() for name, entry in open_file(path).items()}
        except ValueError as error:
            assert str(path) in str(error)
            kinds.append("refused")
            continue
        theirs = content if is_zip else torch.load(path, weights_only=True)  # the earlier format has no checksums
        assert found.keys() == theirs.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, theirs[name].numpy(), strict=True)
        kinds.append("read")
    assert min(kinds.count("refused"), kinds.count("read")) >= 5


VIEW = b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
VIEW += b"U\x010U\x03cpuK\x01tQK\x00%b%b\x89}tRs."  # with places for the shape and the strides
UNFIT = {
    "a tuple as a key": b"\x80\x02}K\x01\x85K\x02s.",
    "tuples as keys": b"\x80\x02}(K\x01\x85K\x02u.",
    "a tuple as a key of an ordered dictionary": b"\x80\x02ccollections\nOrderedDict\n](]K\x01\x85aK\x02aea\x85R.",
    "a storage called by a tuple": b"\x80\x02(U\x07storagectorch\nFloatStorage\n)NNtQ.",
    "a state of a number": b"\x80\x02K\x01}U\x01aK\x01sb.",
    "a changed name": b"\x80\x02ctorch\nSize\n}U\x04callK\x01sb.",
    "an object of a class": b"\x80\x02ctorch\nSize\n)\x81.",
    "more dimensions than torch has": VIEW % ((b"(" + b"K\x01" * 65 + b"t",) * 2),
    "a list as a shape": VIEW % (b"]K\x01a", b"K\x01\x85"),
}


@pytest.mark.parametrize("pickled", UNFIT.values(), ids=UNFIT)
def test_pickles_of_what_no_tensor_needs_are_refused(tmp_path, pickled):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", pickled)
    with pytest.raises(ValueError, match="x.bin is damaged"):
        open_file(tmp_path / "x.bin")
