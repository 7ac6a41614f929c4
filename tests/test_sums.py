"""Checksums next to exported weights: written as `sha256sum -c` reads them, and compared when a folder is loaded."""

import subprocess

import pytest
import tiny_processes
from test_import_export import SETTINGS, model, trained_state

from rlhf_jax.models.pretrained import from_pretrained, reward_from_pretrained, save_pretrained
from rlhf_jax.models.safetensors_io import writing
from rlhf_jax.stages.models import export_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An export of several files."""
    monkeypatch.setattr(writing, "MAX_FILE_BYTES", 10_000)
    save_pretrained(model(), tmp_path / "export")
    return tmp_path / "export"


def flip_bit(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def sha256sum(folder):
    return subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )


def test_every_file_of_weights_is_listed_as_sha256sum_checks_it(folder):
    checked = sha256sum(folder)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert checked.returncode == 0 and len(names) > 2
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in names]
    assert from_pretrained(folder).config == model().config


@pytest.mark.parametrize("number", [0, -1])
def test_a_bit_that_flips_in_a_tensor_is_found_in_any_file(folder, number):
    path = sorted(folder.glob("*.safetensors"))[number]
    flip_bit(path)
    assert sha256sum(folder).returncode == 1
    with pytest.raises(ValueError, match=f"{path.name} has changed: copy the folder again, .* delete {folder}/SHA256"):
        from_pretrained(folder)
    (folder / "SHA256SUMS").unlink()
    from_pretrained(folder)


def test_a_lost_file_and_an_empty_list_are_found_and_lists_of_other_tools_are_read(folder):
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    listed = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(f"# of another tool\n{listed.replace('  ', ' *./')}{'0' * 64}  README.md\n")
    from_pretrained(folder)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ./README.md\n{'0' * 64}  part/{names[0]}\n")
    from_pretrained(folder)
    (folder / "SHA256SUMS").write_text("")
    with pytest.raises(ValueError, match="SHA256SUMS: it lists no file"):
        from_pretrained(folder)
    (folder / "SHA256SUMS").write_text(listed)
    (folder / names[1]).unlink()
    with pytest.raises(ValueError, match=f"{names[1]} cannot be read"):
        from_pretrained(folder)


def test_an_adapter_and_a_scalar_head_have_theirs(tmp_path):
    base, scorer = model(), model(scalar_head=True)
    base.hf_config["pad_token_id"] = 0
    save_pretrained(base, tmp_path / "base")
    export_model(scorer, trained_state(scorer), SETTINGS, tmp_path / "scorer")
    adapter = tmp_path / "scorer_adapter"
    loaded = reward_from_pretrained(tmp_path / "base", adapter)
    assert loaded.config.lora.rank == 3
    flip_bit(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_model.safetensors has changed"):
        reward_from_pretrained(tmp_path / "base", adapter)


CHECK = """
import sys
from pathlib import Path
from rlhf_jax import checkpoint_files, hosts
from rlhf_jax.models.safetensors_io import check_sums, sums
hosts.start()
read, checksums = [], sums.checksums
sums.checksums = lambda folder, names: checksums(folder, read.extend(names) or names)
try:
    check_sums(Path(sys.argv[1]))
except ValueError as error:
    print(error)
print(*read)
"""


def test_two_processes_read_each_file_once_and_both_hear_of_the_damage(folder):
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    flip_bit(folder / names[1])
    ended = tiny_processes.finish(tiny_processes.start(2, 1, "-c", CHECK, str(folder)), 300)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for index, (_, out, _) in enumerate(ended):
        error, read = out.splitlines()
        assert f"{names[1]} has changed" in error and read.split() == names[index::2]
