"""Several processes: how they find each other, agree, fail together, and compute the same as one."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_processes
from tiny_recipe import records, tensors, untimed_records, write_recipe

from rlhf_jax import hosts
from rlhf_jax.hosts import Launch, read_launch
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, by_node, check_within_nodes

SLURM = {"SLURM_JOB_ID": "4100", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
STEP = {"SLURM_STEP_NODELIST": "gpu[003-007,9],other1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
OWN = {hosts.COORDINATOR: "10.0.0.1:1234", hosts.PROCESSES: "2", hosts.PROCESS_ID: "1"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, None),
        (OWN, Launch("10.0.0.1:1234", 2, 1, None)),
        (OWN | SLURM | STEP, Launch("10.0.0.1:1234", 2, 1, None)),
        (SLURM, None),  # a batch script: srun has not started it
        (SLURM | STEP, Launch("gpu003:61444", 8, 3, [1])),
        (SLURM | STEP | {"CUDA_VISIBLE_DEVICES": "0"}, Launch("gpu003:61444", 8, 3, None)),
        (SLURM | STEP | {"CUDA_VISIBLE_DEVICES": "0,1"}, Launch("gpu003:61444", 8, 3, [1])),
        (SLURM | STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Launch("gpu003:61444", 8, 3, None)),
        (SLURM | STEP | {"SLURM_STEP_NODELIST": "a-1,a-2"}, Launch("a-1:61444", 8, 3, [1])),
        (SLURM | STEP | {"SLURM_STEP_NODELIST": "r[1-2]n[03,04]"}, Launch("r1n03:61444", 8, 3, [1])),
        (SLURM | STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
            Launch("10.96.0.1:62624", 4, 1, [1]),
        ),
        (OPEN_MPI | {hosts.COORDINATOR: "n1:9"}, Launch("n1:9", 4, 1, [1])),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", hosts.COORDINATOR: "n1:9"}, Launch("n1:9", 2, 0, None)),
    ],
)
def test_the_environment_of_a_launcher_gives_the_coordinator_the_rank_and_its_devices(environ, launch):
    assert read_launch(environ) == launch


@pytest.mark.parametrize(
    ("environ", "reported"),
    [
        ({hosts.PROCESSES: "2"}, "RLHF_JAX_PROCESSES set alone"),
        ({hosts.PROCESSES: "2", hosts.PROCESS_ID: "0"}, "RLHF_JAX_PROCESSES and RLHF_JAX_PROCESS_ID set alone"),
        (OWN | {hosts.PROCESS_ID: "2"}, "RLHF_JAX_PROCESS_ID=2, RLHF_JAX_PROCESSES=2: from 0 to one less"),
        (OWN | {hosts.PROCESS_ID: "one"}, "both are numbers"),
        (OPEN_MPI, "does not say where process 0 runs: set RLHF_JAX_COORDINATOR=HOST:PORT"),
    ],
)
def test_an_incomplete_environment_is_refused_with_what_to_set(environ, reported):
    with pytest.raises(ValueError, match=reported):
        read_launch(environ)


def fake_devices(processes: int, each: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(process_index=p, id=i) for i in range(each) for p in range(processes)]


def test_devices_of_a_machine_are_next_to_each_other_whatever_the_order_of_processes():
    devices = by_node(fake_devices(4, 2), nodes=[0, 1, 0, 1])
    assert [device.process_index for device in devices] == [0, 0, 2, 2, 1, 1, 3, 3]
    assert [device.id for device in devices] == [0, 1] * 4


@pytest.mark.parametrize(("tensor", "fits"), [(1, True), (2, True), (4, True), (8, False)])
def test_tensor_stays_within_a_machine_of_four_devices(tensor, fits):
    nodes = [0, 1, 0, 1]
    found = [nodes[device.process_index] for device in by_node(fake_devices(4, 2), nodes)]
    numbers = np.array(found).reshape(1, -1, tensor)
    if fits:
        check_within_nodes(numbers)
    else:
        with pytest.raises(ValueError, match=r"mesh.tensor=8 .* machines of 4 devices.*\[1, 2, 4\]"):
            check_within_nodes(numbers)


@pytest.mark.parametrize("mesh", tiny.MESHES)
@pytest.mark.parametrize("table", [TRAIN, GENERATE])
def test_rows_put_by_their_owner_are_the_rows_put_by_all(mesh, table):
    layout = Layout(tiny.mesh_of(mesh), table)
    batch = {"tokens": np.arange(48).reshape(16, 3), "mask": np.arange(16) % 3 == 0}
    own = layout.own_rows(16)
    assert own.tolist() == list(range(16))  # one process has all of them
    put = layout.put_own_rows({name: leaf[own] for name, leaf in batch.items()}, 16)
    for name, leaf in layout.put_batch(batch).items():
        assert np.array_equal(put[name], leaf) and put[name].sharding == leaf.sharding


PROGRAM = """
import json, sys, time
import jax, numpy as np
from rlhf_jax import hosts
from rlhf_jax.mesh import TRAIN, Layout, MeshConfig, make_mesh
hosts.start()
index, found = hosts.index(), {}
found["count"] = [hosts.count(), jax.device_count(), hosts.is_main()]
found["gather"] = [hosts.gather({"index": index, "n": n}) for n in range(4)]
found["broadcast"] = hosts.broadcast(f"from {index}")
calls = []
found["on_main"] = hosts.on_main(lambda: calls.append(index) or index)
found["calls"] = calls
def read_clock():
    if hosts.is_main():
        time.sleep(0.3)
    return time.time()
found["called"] = hosts.main_first(read_clock)
def refuse():
    raise ValueError("the main process refuses this")
try:
    hosts.on_main(refuse)
except ValueError as error:
    found["refused"] = str(error)
layout = Layout(make_mesh(MeshConfig()), TRAIN)
own = layout.own_rows(12)
found["own"] = own.tolist()
whole = np.arange(24).reshape(12, 2)
put = layout.put_own_rows(whole[own], 12)
found["fetched"] = bool(np.array_equal(hosts.fetch(put), whole))
only = hosts.fetch({"put": put, "number": 3}, only=1)
found["only"] = only is not None and only["put"].tolist() == whole.tolist() and only["number"] == 3
print(json.dumps(found))
"""


def test_three_processes_agree_and_each_holds_its_rows_of_a_batch():
    ended = tiny_processes.finish(tiny_processes.start(3, 2, "-c", PROGRAM), 120)
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in ended]
    for index, each in enumerate(found):
        assert each["count"] == [3, 6, index == 0]
        assert each["gather"] == [[{"index": p, "n": n} for p in range(3)] for n in range(4)]
        assert each["broadcast"] == "from 0" and each["on_main"] == 0
        assert each["calls"] == ([0] if index == 0 else [])
        assert each["called"] >= found[0]["called"] and each["refused"] == "the main process refuses this"
        assert each["own"] == list(range(4 * index, 4 * index + 4))
        assert each["fetched"] and each["only"] == (index == 1)


FAILING = """
import sys, time
from rlhf_jax import hosts
from rlhf_jax.cli import main
import rlhf_jax.config
def fail(*args):
    if hosts.index() == int(sys.argv[1]):
        raise {error}("no such thing here")
    time.sleep(300)
rlhf_jax.config.load_config = fail
sys.exit(main(["train", "any.toml"]))
"""


@pytest.mark.parametrize(("failing", "error", "code"), [(0, "ValueError", 2), (1, "ValueError", 2), (1, "KeyError", 1)])
def test_an_error_of_one_process_ends_both_and_the_other_says_which_failed_first(failing, error, code):
    program = FAILING.replace("{error}", error)
    running = tiny_processes.start(2, 1, "-c", program, str(failing))
    running[failing].wait(timeout=300)
    started = time.monotonic()
    ended = tiny_processes.finish(running, 60)
    assert time.monotonic() - started < 30
    assert [each[0] for each in ended] == [code, code], ended
    assert "no such thing here" in ended[failing][2]
    other = ended[1 - failing][2]
    assert f"process {1 - failing} ends: process {failing} of 2 failed first: " in other and "no such" in other


def train(folder: Path, processes: int, devices: int, *overrides: str) -> Path:
    """A finished run of the tiny recipe by `processes` processes of `devices` devices each."""
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder)
    argv = ("-m", "rlhf_jax", "train", str(recipe), f"run.dir={folder / 'run'}", *overrides)
    ended = tiny_processes.finish(tiny_processes.start(processes, devices, *argv))
    assert [code for code, _, _ in ended] == [0] * processes, ended
    return folder / "run"


def assert_equal_runs(run: Path, other: Path) -> None:
    """Equal to rounding in every export, metric and rollout."""
    exports = sorted(path.parent.relative_to(run) for path in run.glob("*/export*/model.safetensors"))
    assert exports and exports == sorted(p.parent.relative_to(other) for p in other.glob("*/export*/model.safetensors"))
    for export in exports:
        one, two = tensors(run / export), tensors(other / export)
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=2e-5, err_msg=f"{export} {name}")
    for path in sorted(run.glob("*/metrics.jsonl")):
        for one, two in zip(*(untimed_records(folder / path.relative_to(run)) for folder in (run, other)), strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                # Moved bytes depend on where the devices are.
                if isinstance(value, float) and not name.startswith("publish_bytes"):
                    assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (path, name)
    for path in sorted(run.glob("*/rollouts/*.jsonl")):
        one, two = records(path), records(other / path.relative_to(run))
        assert [(r["prompt"], r["response"]) for r in one] == [(r["prompt"], r["response"]) for r in two]


GRPO = ("grpo.steps=3", "grpo.rollout_batch_size=4", "grpo.sample={num_samples=4, max_new_tokens=12}")
GRPO += ("grpo.kl_coef=0.1", "grpo.actor.learning_rate=1e-3", "grpo.batch_size=8")
# Stages and settings of the runs that have to be equal on any number of processes.
RECIPES = {
    "all stages": (),
    "tensor axis": ("mesh.tensor=2",),
    "LoRA": ("model.lora={rank=2}", "model.reward_lora={rank=2}"),
    "zero 1": ("mesh.zero=1",),
    "ppo, texts": (
        "ppo.texts.coef=1",
        "ppo.texts.batch_size=8",
        "ppo.kl_target=1",
        'ppo.score_scale="demonstrations"',
        "ppo.ppo_epochs=2",
    ),
    "grpo": ('run.stages=["sft", "reward", "grpo"]', *GRPO),
    "dpo": ('run.stages=["sft", "dpo"]', "dpo.steps=4", "dpo.batch_size=16", "dpo.micro_batch_size=8"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_four_devices_train_the_same_models_in_one_two_and_four_processes(tmp_path_factory, name):
    one, *others = (
        train(tmp_path_factory.mktemp(f"{n}x{4 // n}"), n, 4 // n, *RECIPES[name], "run.save_every=100")
        for n in ((1, 2, 4) if name == "all stages" else (1, 2))
    )
    for other in others:
        assert_equal_runs(one, other)


def wait_for_records(path: Path, count: int, running: list[subprocess.Popen]) -> None:
    while not path.exists() or len(records(path)) < count:
        assert all(process.poll() is None for process in running)
        time.sleep(0.05)


def test_a_signal_to_one_of_two_processes_saves_both_and_one_process_finishes_what_they_began(tmp_path):
    options = ("sft.steps=40", "sft.eval_every=0", "run.save_every=1000", 'run.stages=["sft"]')
    uninterrupted = train(tmp_path / "one", 1, 4, *options)
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    argv = ("-m", "rlhf_jax", "train", str(recipe), f"run.dir={run}", *options)
    running = tiny_processes.start(2, 2, *argv)
    wait_for_records(run / "sft/metrics.jsonl", 6, running)
    running[1].send_signal(signal.SIGTERM)
    ended = tiny_processes.finish(running, 120)
    assert [code for code, _, _ in ended] == [75, 75], ended
    (saved,) = [int(path.name) for path in (run / "sft/checkpoints").iterdir() if path.name.isdecimal()]
    assert 5 <= saved < 40
    ended = tiny_processes.finish(tiny_processes.start(1, 4, *argv))
    assert ended[0][0] == 0 and f"resumed at step {saved} of 40" in ended[0][2], ended
    assert_equal_runs(uninterrupted, run)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_within_a_minute_and_the_run_then_ends_bit_equal(tmp_path, killed):
    options = ("sft.steps=60", "sft.eval_every=0", "run.save_every=5", 'run.stages=["sft"]')
    uninterrupted = train(tmp_path / "whole", 2, 1, *options)
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    argv = ("-m", "rlhf_jax", "train", str(recipe), f"run.dir={run}", *options)
    running = tiny_processes.start(2, 1, *argv)
    while not any((run / "sft/checkpoints").glob("*/manifest.json")):  # which completes a checkpoint
        assert all(process.poll() is None for process in running)
        time.sleep(0.02)
    running[killed].send_signal(signal.SIGKILL)
    started = time.monotonic()
    ended = tiny_processes.finish(running, 90)
    assert time.monotonic() - started < 60
    assert ended[killed][0] == -signal.SIGKILL and ended[1 - killed][0] != 0
    ended = tiny_processes.finish(tiny_processes.start(2, 1, *argv))
    assert [code for code, _, _ in ended] == [0, 0] and "resumed at step" in ended[0][2], ended
    assert untimed_records(run / "sft/metrics.jsonl") == untimed_records(uninterrupted / "sft/metrics.jsonl")
    expected = tensors(uninterrupted / "sft/export")
    assert all(np.array_equal(array, expected[name]) for name, array in tensors(run / "sft/export").items())


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_job_of_slurm_passes_its_arguments_to_every_process_and_queues_again_after_75(tmp_path, code):
    """With scripts in place of srun, which starts two tasks, and of scontrol."""
    tools = {
        "srun": "while [[ $1 == --* ]]; do shift; done\n"
        'for i in 0 1; do SLURM_PROCID=$i "$@" || code=$?; done\nexit $code',
        "scontrol": f'echo "$*" > {tmp_path}/queued',
        "rlhf-jax": f'echo "$SLURM_PROCID $*" >> {tmp_path}/started\nexit {code}',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    environ |= {"RLHF_JAX_COMMAND": str(tmp_path / "rlhf-jax")}
    (tmp_path / "my.toml").touch()
    job = ["bash", str(tiny_processes.ROOT / "scripts/slurm_train.sbatch"), "my.toml", "run.dir=a b"]
    ended = subprocess.run(job, env=environ, cwd=tmp_path, text=True, capture_output=True)
    assert ended.returncode == code, ended
    assert (tmp_path / "started").read_text().splitlines() == [f"{i} train my.toml run.dir=a b" for i in (0, 1)]
    assert (tmp_path / "queued").exists() == (code == 75)


def test_local_processes_end_with_the_code_of_the_one_that_failed_first(tmp_path):
    program = "if [[ $RLHF_JAX_PROCESS_ID == 1 ]]; then echo lost >&2; exit 7; fi; sleep 1; exit 3"
    script = str(tiny_processes.ROOT / "scripts/launch_local.sh")
    ended = subprocess.run([script, "3", "bash", "-c", program], text=True, capture_output=True)
    assert ended.returncode == 7
    assert "[1] lost" in ended.stderr and "process 1 of 3 ended first, with exit code 7" in ended.stderr
    done = subprocess.run([script, "2", "bash", "-c", "echo $RLHF_JAX_PROCESSES"], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "2\n2\n")


EXPORT = """
import dataclasses, sys
import jax
import rlhf_jax
from rlhf_jax import hosts
from rlhf_jax.mesh import TRAIN, Layout, MeshConfig, make_mesh
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.pretrained import Pretrained, save_adapter
from rlhf_jax.models.safetensors_io import writing
from rlhf_jax.stages.from_scratch import make_hf_config
from rlhf_jax.stages.models import NewModelConfig
hosts.start()
out, writing.MAX_FILE_BYTES = sys.argv[1], 60_000
layout = Layout(make_mesh(MeshConfig(1, 2, 2)), TRAIN)
hf = make_hf_config(NewModelConfig(hidden_size=32, num_heads=4, mlp_size=64), 64) | {"eos_token_id": 2}
config = dataclasses.replace(decoder_config(hf, scalar_head=False), lora=LoraConfig(rank=2))
params = init_params(config, jax.random.key(0), layout)
params = {path: jax.jit(lambda x: x + 0.1)(x) if "lora_b" in path else x for path, x in params.items()}
model = Pretrained(config, params, None, hf, {}, layout)
rlhf_jax.save_pretrained(model, f"{out}/merged")
save_adapter(model, f"{out}/adapter", base="base")
for name, options in {"int8": {"dtype": "int8"}, "one_copy": {"one_copy": True}}.items():
    model = rlhf_jax.from_pretrained(f"{out}/merged", f"{out}/adapter", mesh=layout.mesh, **options)
    rlhf_jax.save_pretrained(model, f"{out}/{name}", dtype="float32")
"""


def test_two_processes_export_the_files_that_one_exports(tmp_path):
    """Merged adapters, an adapter alone, quantised kernels, and kernels in one array per layer; in several files."""
    for processes in (1, 2):
        argv = ("-c", EXPORT, str(tmp_path / str(processes)))
        ended = tiny_processes.finish(tiny_processes.start(processes, 4 // processes, *argv), 300)
        assert [code for code, _, _ in ended] == [0] * processes, ended
    one, two = ({path.relative_to(tmp_path / n): path for path in (tmp_path / n).rglob("*.*")} for n in "12")
    assert one.keys() == two.keys()
    files = [path for path in one if path.suffix == ".safetensors"]
    assert len([path for path in files if path.parent.name == "merged"]) > 2
    for path in one:
        assert one[path].read_bytes() == two[path].read_bytes(), path
