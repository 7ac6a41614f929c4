"""SIGKILL at random moments of a whole run, restarted each time: the end is that of a run that no one killed.

    python -m benchmarks.chaos [--processes 1] [--kills 100] [--minutes M] [--seed 0] [--folder FOLDER] [key=value ...]

A run of a few steps through all stages, on one CPU device for each process, on built-in data. A kill comes after a
random time, or at a random moment of a save, of the completion of a checkpoint, or of an export. Of several processes a
random one is killed, and the others have to end by themselves within a minute. When a run has finished it is compared
with the uninterrupted one, bit for bit: every export, metrics.jsonl without the measured times, and every rollout. Then
the next run starts, until the number of kills is reached. Each process is a fork of this one, which has only imported
the libraries, so that a start takes a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

from benchmarks.provenance import record

RECIPE = """
[run]
save_every = 2
[model]
actor = "new"
dtype = "float32"
remat = "none"
logprob_chunk = 0
new = { vocab_size = 300, hidden_size = 32, num_layers = 2, num_heads = 2, num_kv_heads = 2, mlp_size = 64 }
[data]
sources = [{ path = "builtin:assistant", answer = "answer" }]
builtin_rows = 260
held_out = 0.15
max_prompt_length = 120
max_length = 144
[sft]
steps = 12
batch_size = 8
eval_every = 4
eval_batches = 1
optim = { learning_rate = 3e-3 }
[reward]
steps = 12
batch_size = 8
eval_batches = 1
[ppo]
steps = 8
rollout_batch_size = 8
ema_decay = 0.9
kl_target = 0.1
sample = { max_new_tokens = 12 }
actor = { learning_rate = 1e-3 }
critic = { learning_rate = 1e-3 }
"""
TIMES = ("seconds_", "tokens_per_second")  # metrics that differ from run to run
# Moments of a kill: patterns in the run folder, at whose first match it comes within MOMENT seconds; "": at any time.
MOMENTS = {
    "any time": "",
    "save": "*/checkpoints/*.orbax-checkpoint-tmp",
    "completion": "*/checkpoints/*.manifest.json.unfinished",
    "export": "*/.export*.unfinished",
}
MOMENT = 0.15
LONGEST = 30.0  # seconds after which a kill at any time comes at the latest, and one at a moment is given up
HEARTBEAT = 5  # seconds without a sign of life after which a process counts as lost, in place of `hosts`' own
SURVIVAL = 60.0  # seconds in which the others have to end


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the configuration")
    parser.add_argument("--processes", type=int, default=1, help="processes of each run (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="kill no more after this time")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="deleted first (default: %(default)s)")
    args = parser.parse_intermixed_args(argv)
    limits = dict(kills=args.kills, minutes=args.minutes)
    found = run_chaos(args.folder, seed=args.seed, overrides=args.overrides, processes=args.processes, **limits)
    record("chaos", found, "processes")


def run_chaos(
    folder: Path,
    *,
    kills: int,
    seed: int,
    overrides: list[str] = (),
    processes: int = 1,
    minutes: float = math.inf,
) -> dict:
    """Kill runs until `kills` or `minutes` are reached and the last run has finished.

    Raises AssertionError where a run ends differently than one that no one killed, or where one of its processes
    outlives another.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "chaos.toml"
    recipe.write_text(RECIPE)
    environ = {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environ |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # most of the time would be compiling
    os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | environ
    train, log = import_train(), folder / "log"

    def start(run: Path) -> list[int]:
        return fork(lambda: train(["train", str(recipe), f"run.dir={run}", "--quiet", *overrides]), log, processes)

    started = time.monotonic()
    assert not any(wait(start(folder / "whole")).values()), read_logs(log)
    seconds = time.monotonic() - started
    expected, chance = fingerprint(folder / "whole"), random.Random(seed)
    moments, stages, killed, ends, runs = Counter(), Counter(), Counter(), [], 0

    def is_over() -> bool:
        return sum(moments.values()) >= kills or time.monotonic() - started > 60 * minutes

    while not is_over():
        run, runs = folder / f"run{runs}", runs + 1
        is_finished = False
        while not is_finished:
            moment = None if is_over() else chance.choice(list(MOMENTS))
            running = start(run)
            victim = chance.randrange(processes)
            if moment is not None and (stage := kill(running, victim, run, moment, chance)):
                moments[moment], stages[stage] = moments[moment] + 1, stages[stage] + 1
                killed[victim] += 1
                ends.append(end_others(running, victim, run, log))
                continue
            assert not any(wait(running).values()), read_logs(log)
            is_finished = True
        found = fingerprint(run)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not different, f"{run} differs from {folder / 'whole'}: {sorted(different)}"
        print(f"{sum(moments.values())} kills, {runs} runs, all equal: {dict(moments)} {dict(stages)}", flush=True)
        shutil.rmtree(run)
    counts = {"kills": sum(moments.values()), "moments": dict(moments), "stages": dict(stages), "runs": runs}
    counts |= {"killed": dict(sorted(killed.items())), "seconds_until_others_end": round(max(ends, default=0.0), 1)}
    return {"processes": processes, **counts, "equal_files": len(expected), "seconds_uninterrupted": round(seconds, 1)}


def import_train() -> Callable[[list[str]], int]:
    """`rlhf_jax.cli.main`, with everything imported that a run needs, and no thread and no device in use."""
    from transformers import AutoTokenizer, LlamaConfig  # noqa: F401

    import rlhf_jax.train  # noqa: F401
    from rlhf_jax.cli import main
    from rlhf_jax.stages.table import STAGES

    for stage in STAGES.values():
        resolve_name(stage.run)
    return main


def fork(run: Callable[[], int], log: Path, processes: int) -> list[int]:
    """The ids of child processes, each of which ends with the exit code of `run` and writes to `log`.N."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(run, log.with_name(f"{log.name}.{index}"), index, processes, port) for index in range(processes)]


def _fork(run: Callable[[], int], log: Path, index: int, processes: int, port: int) -> int:
    if process := os.fork():
        return process
    from rlhf_jax import hosts

    hosts.HEARTBEAT_SECONDS = HEARTBEAT
    values = {hosts.COORDINATOR: f"127.0.0.1:{port}", hosts.PROCESSES: str(processes), hosts.PROCESS_ID: str(index)}
    os.environ |= values
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        os._exit(run())
    except BaseException:  # the child must never return into the parent's loop
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def read_logs(log: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*")))


def wait(running: list[int]) -> dict[int, int]:
    """{process: its exit code, negative for a signal} when all have ended."""
    return {process: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in running}


def kill(running: list[int], victim: int, run: Path, moment: str, chance: random.Random) -> str:
    """Kill one of the processes at this moment. The stage in which it was; "" where the run ended before."""
    deadline = time.monotonic() + chance.uniform(0.5, LONGEST)
    after = 0.0
    while time.monotonic() < deadline:
        if is_done(run):
            return ""
        # Left for `wait` to collect: a process that ends before the run is done has failed, and `wait` shows its code.
        if any(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) for process in running):
            return ""
        if MOMENTS[moment] and any(run.glob(MOMENTS[moment])):
            after = chance.uniform(0, MOMENT)
            break
        time.sleep(0.002)
    time.sleep(after)
    if is_done(run):
        return ""
    stage = next((name for name in ("sft", "reward", "ppo") if not (run / name / "export").exists()), "end")
    os.kill(running[victim], signal.SIGKILL)
    ended = os.waitid(os.P_PID, running[victim], os.WEXITED | os.WNOWAIT)
    return stage if ended.si_code == os.CLD_KILLED and ended.si_status == signal.SIGKILL else ""


def end_others(running: list[int], victim: int, run: Path, log: Path) -> float:
    """The seconds in which the others have ended after one was killed, which has to be less than SURVIVAL."""
    started = time.monotonic()
    left = {process for index, process in enumerate(running) if index != victim}
    wait([running[victim]])
    while left and time.monotonic() - started < SURVIVAL:
        for process in list(left):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                left.remove(process)
                assert os.waitstatus_to_exitcode(status) or is_done(run), f"one process goes on alone: {read_logs(log)}"
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left, f"a process has outlived another by {SURVIVAL:g} s: {read_logs(log)}"
    return time.monotonic() - started


def is_done(run: Path) -> bool:
    """Whether the last stage has its export, so that the process is about to end by itself."""
    return (run / "ppo/export").exists()


def fingerprint(run: Path) -> dict[str, str]:
    """{file: digest} of everything that a killed run must reproduce."""
    files = [path for pattern in ("*/export*/*", "*/rollouts/*") for path in run.glob(pattern)]
    found = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    for path in run.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]
        found[str(path.relative_to(run))] = json.dumps(kept)
    return found


if __name__ == "__main__":
    main()
