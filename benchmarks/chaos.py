"""SIGKILL at random moments of a whole run, restarted each time: the end is that of a run that no one killed.

    python -m benchmarks.chaos [--kills 100] [--seed 0] [--folder runs/chaos] [key=value ...]

A run of a few steps through all stages on one CPU device, on built-in data. A kill comes after a random time, or at a
random moment of a save, of the completion of a checkpoint, or of an export. When a run has finished it is compared with
the uninterrupted one, bit for bit: every export, metrics.jsonl without the measured times, and every rollout. Then the
next run starts, until the number of kills is reached. Each process is a fork of this one, which has only imported the
libraries, so that a start takes a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the configuration")
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="deleted first (default: %(default)s)")
    args = parser.parse_intermixed_args(argv)
    record("chaos", run_chaos(args.folder, args.kills, args.seed, args.overrides), "processes")


def run_chaos(folder: Path, kills: int, seed: int, overrides: list[str] = ()) -> dict:
    """Kill runs until `kills` are reached and the last run has finished. AssertionError where one ends differently."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "chaos.toml"
    recipe.write_text(RECIPE)
    environ = {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | environ
    train = import_train()

    def start(run: Path) -> int:
        return fork(lambda: train(["train", str(recipe), f"run.dir={run}", "--quiet", *overrides]), folder / "log")

    started = time.monotonic()
    assert wait(start(folder / "whole")) == 0, (folder / "log").read_text()
    seconds = time.monotonic() - started
    expected, chance = fingerprint(folder / "whole"), random.Random(seed)
    moments, stages, runs = Counter(), Counter(), 0
    while sum(moments.values()) < kills:
        run, runs = folder / f"run{runs}", runs + 1
        is_finished = False
        while not is_finished:
            moment = chance.choice(list(MOMENTS)) if sum(moments.values()) < kills else None
            process = start(run)
            if moment is not None and (stage := kill(process, run, moment, chance)):
                moments[moment], stages[stage] = moments[moment] + 1, stages[stage] + 1
                continue
            assert wait(process) == 0, (folder / "log").read_text()
            is_finished = True
        found = fingerprint(run)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not different, f"{run} differs from {folder / 'whole'}: {sorted(different)}"
        print(f"{sum(moments.values())} kills, {runs} runs, all equal: {dict(moments)} {dict(stages)}", flush=True)
        shutil.rmtree(run)
    counts = {"kills": sum(moments.values()), "moments": dict(moments), "stages": dict(stages), "runs": runs}
    return {"processes": 1, **counts, "equal_files": len(expected), "seconds_uninterrupted": round(seconds, 1)}


def import_train() -> Callable[[list[str]], int]:
    """`rlhf_jax.cli.main`, with everything imported that a run needs, and no thread and no device in use."""
    import transformers  # noqa: F401

    import rlhf_jax.train  # noqa: F401
    from rlhf_jax.cli import main

    return main


def fork(run: Callable[[], int], log: Path) -> int:
    """The id of a child process that ends with the exit code of `run`, and writes to `log`."""
    if process := os.fork():
        return process
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        os._exit(run())
    except BaseException:  # the child must never return into the parent's loop
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def wait(process: int) -> int:
    """The exit code of a child process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process: int, run: Path, moment: str, chance: random.Random) -> str:
    """Kill the process at this moment. The stage in which it was; "" where it ended before."""
    deadline = time.monotonic() + chance.uniform(0.5, LONGEST)
    after = 0.0
    while time.monotonic() < deadline:
        if os.waitpid(process, os.WNOHANG)[0]:
            raise AssertionError("a run ended during the wait for a kill: its exit code is lost")
        if is_done(run):
            return ""
        if MOMENTS[moment] and any(run.glob(MOMENTS[moment])):
            after = chance.uniform(0, MOMENT)
            break
        time.sleep(0.002)
    time.sleep(after)
    if is_done(run):
        return ""
    stage = next((name for name in ("sft", "reward", "ppo") if not (run / name / "export").exists()), "end")
    os.kill(process, signal.SIGKILL)
    code = wait(process)
    return stage if code == -signal.SIGKILL else ""


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
