"""GPU specifications by name, and compile-only devices for GPUs that are not attached."""

import re

import pytest

from rlhf_jax import hardware
from rlhf_jax.hardware import GPUS, compile_only_devices, parse_machine
from rlhf_jax.mesh import MeshConfig, make_mesh

CARDS = ["A100-40GB", "A100-80GB", "A6000-48GB", "H100-80GB", "H200", "L40S", "T4", "V100-32GB"]


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name"),
    [("A100-80GB", 1, 1, "A100-80GB"), ("8xH200", 1, 8, "H200"), ("8x4xV100-32GB", 8, 4, "V100-32GB")],
)
def test_a_machine_is_parsed_into_nodes_and_cards(text, nodes, per_node, name):
    found = parse_machine(text)
    assert (found.nodes, found.per_node, found.gpu.name) == (nodes, per_node, name)
    assert found.count == nodes * per_node


@pytest.mark.parametrize("text", ["", "8x", "8xA100", "0xH200", "8x8x8xH200", "8 H200", "-1xH200"])
def test_an_unknown_machine_is_rejected_with_the_known_gpus(text):
    with pytest.raises(ValueError, match="names no GPUs: write for example 8xA100-80GB") as error:
        parse_machine(text)
    assert ", ".join(CARDS) in str(error.value)


def test_every_card_has_the_memory_in_its_name():
    assert list(GPUS) == CARDS
    for name, gpu in GPUS.items():
        reported = re.search(r"-(\d+)GB", name)
        size = int(reported[1]) if reported else {"H200": 141, "L40S": 48, "T4": 16}[name]
        # Names count 2**30 bytes, or 10**9 (H200), and the driver reserves some.
        assert 0.9 * size * 2**30 <= gpu.memory <= 1.08 * size * 10**9
        assert gpu.bandwidth > gpu.link > gpu.network > 0
        assert f"device_memory_size: {gpu.memory}" in gpu.target_config


def test_without_the_plugin_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hardware, "PLUGINS", ("no_such_plugin",))
    with pytest.raises(ValueError, match=re.escape('not a GPU: pip install "rlhf_jax[cuda13]"')):
        compile_only_devices("8xA100-80GB")


def test_cards_dropped_by_cuda_13_need_cuda_12(monkeypatch):
    monkeypatch.setattr(hardware, "cuda_plugin", lambda: "jax_cuda13_plugin")
    with pytest.raises(ValueError, match=re.escape('V100-32GB: pip install "rlhf_jax[cuda12]"')):
        compile_only_devices("V100-32GB")


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in CARDS if name != "V100-32GB"])
def test_compile_only_devices_form_a_mesh(name):
    devices = compile_only_devices(f"2x4x{name}")
    assert [device.platform for device in devices] == ["gpu"] * 8
    assert {device.compute_capability for device in devices} == {GPUS[name].capability}
    assert [device.process_index for device in devices] == [0] * 4 + [1] * 4
    assert dict(make_mesh(MeshConfig(1, 4, 2), devices).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
