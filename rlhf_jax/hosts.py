"""The processes of a run: the only module that knows how many there are.

All processes run the same program (multi-controller JAX), so each has to take the same decisions and start the same
collectives in the same order. A value that only one of them can know (a file that exists, a signal, the time) is
therefore decided by `broadcast`, `gather` or `on_main`. Process 0 is the main one: it alone writes metrics,
configuration, rollouts and small files. With one process every function here is trivial.

Values pass through JAX's coordination service, not through devices. It also ends all processes when one is lost;
`fail` ends them when one has an error.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax._src.distributed import global_state  # the coordination service; jax has no public name for its client
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")
LOGGER = logging.getLogger(__name__)
COORDINATOR, PROCESSES, PROCESS_ID = "RLHF_JAX_COORDINATOR", "RLHF_JAX_PROCESSES", "RLHF_JAX_PROCESS_ID"
# Rank, number of processes and rank within the node, as launchers name them; the first that is there counts.
LAUNCHERS = (
    (PROCESS_ID, PROCESSES, ""),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
HEARTBEAT_SECONDS = 20  # without a sign of life, after which a process counts as lost
WAIT_MS = 7 * 24 * 3600 * 1000  # for the others; one that is lost ends the wait
_FAILURE = "rlhf_jax/failure"
_numbers = itertools.count()


class Launch(NamedTuple):
    """The arguments of `jax.distributed.initialize`."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    index: int
    devices: list[int] | None  # ids of the node's GPUs that this process uses; None: all that it sees


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """How the launcher has started this process; None: as the only one.

    Raises:
        ValueError: the environment names no address of process 0, or only a part of what is needed.
    """
    own = [name for name in (COORDINATOR, PROCESSES, PROCESS_ID) if environ.get(name)]
    if own and own != [COORDINATOR] and len(own) < 3:
        raise ValueError(f"{' and '.join(own)} set alone: set {COORDINATOR}, {PROCESSES} and {PROCESS_ID}, or none")
    for rank, size, local in LAUNCHERS:
        if rank not in environ or size not in environ or (rank == "SLURM_PROCID" and not _in_slurm_step(environ)):
            continue
        try:
            index, processes = int(environ[rank]), int(environ[size])
        except ValueError as error:
            raise ValueError(f"{rank}={environ[rank]}, {size}={environ[size]}: both are numbers") from error
        if not 0 <= index < processes:
            raise ValueError(f"{rank}={index}, {size}={processes}: from 0 to one less than the number of processes")
        if processes == 1:
            return None
        return Launch(_coordinator(environ), processes, index, _own_devices(environ, local))
    return None


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process: a batch script has a rank too, and is alone."""
    return "SLURM_STEP_NODELIST" in environ


def _coordinator(environ: Mapping[str, str]) -> str:
    if environ.get(COORDINATOR):
        return environ[COORDINATOR]
    if _in_slurm_step(environ):
        # The first of "node[003-007,9],other": its brackets hold numbers and ranges.
        first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", environ["SLURM_STEP_NODELIST"]).group()
        host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
        return f"{host}:{61440 + int(environ.get('SLURM_JOB_ID', '0')) % 4096}"
    if uri := re.search(r"tcp6?://\[?([^,\]:]+)", environ.get("OMPI_MCA_orte_hnp_uri", "")):
        return f"{uri.group(1)}:{61440 + int(environ['OMPI_MCA_orte_hnp_uri'].partition('.')[0]) // 4096 % 4096}"
    raise ValueError(f"this launcher does not say where process 0 runs: set {COORDINATOR}=HOST:PORT for all processes")


def _own_devices(environ: Mapping[str, str], local: str) -> list[int] | None:
    """One GPU for each of several processes of a node, unless the launcher has already shown each only its own."""
    on_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
    alone = on_node.partition("(")[0].partition(",")[0] in ("", "1")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if alone or local not in environ or (visible is not None and "," not in visible):
        return None
    return [int(environ[local])]


def start(environ: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of the launcher, if there are any; to be called before JAX is used.

    Raises:
        ValueError: as `read_launch`.
    """
    launch = read_launch(environ)
    if launch is None or jax.distributed.is_initialized():
        return
    jax.distributed.initialize(
        launch.coordinator,
        launch.processes,
        launch.index,
        launch.devices,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    threading.Thread(target=_watch_failures, name="failures", daemon=True).start()
    LOGGER.info(f"{count()} processes; this is number {index()}, on {socket.gethostname()}")


def count() -> int:
    """Number of processes."""
    return global_state.num_processes or 1


def index() -> int:
    """The number of this process, from 0."""
    return global_state.process_id or 0


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON `value` of every process, in their order. All processes have to call it."""
    if count() == 1:
        return [value]
    client, number = global_state.client, next(_numbers)
    place = f"rlhf_jax/{number}/"
    client.key_value_set(f"{place}{index():06d}", json.dumps(value))
    client.wait_at_barrier(f"rlhf_jax/{number}", WAIT_MS)
    found = [json.loads(text) for _, text in sorted(client.key_value_dir_get(place))]
    # A process that is here has read all values of the call before, so every one has read those before that.
    if number > 1:
        client.key_value_delete(f"rlhf_jax/{number - 2}/{index():06d}")
    return found


def barrier() -> None:
    """Wait until all processes are here."""
    gather(None)


def broadcast(value: T) -> T:
    """The main process's JSON `value`. All processes have to call it."""
    return gather(value if is_main() else None)[0]


def on_main(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What `function` returns on the main process, which alone calls it, as JSON data.

    Raises:
        ValueError: on every process, where the main one raises it.
    """
    outcome = {}
    if is_main():
        try:
            outcome["result"] = function(*args, **kwargs)
        except (ValueError, OSError) as error:
            if count() == 1:
                raise
            outcome["error"] = str(error)
    if count() == 1:
        return outcome["result"]
    outcome = broadcast(outcome)
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["result"]


def main_first(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What `function` returns; the others call it when the main process has done, as it may write what they read.

    Raises:
        ValueError: on every process, where the main one raises it.
    """
    if count() == 1:
        return function(*args, **kwargs)
    found = []
    on_main(lambda: found.append(function(*args, **kwargs)))
    return found[0] if found else function(*args, **kwargs)


def fetch(tree: Any, *, only: int | None = None) -> Any:
    """The arrays of a tree as whole numpy arrays, sharded ones gathered on the devices first. All have to call it.

    only: the process that needs them; the others get None.
    """

    def whole(leaf: Any) -> Any:
        is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        return leaf if is_here else _replicate(leaf.sharding.mesh)(leaf)

    here = jax.tree.map(whole, tree)
    return jax.device_get(here) if only in (None, index()) else None


@functools.lru_cache
def _replicate(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def nodes() -> list[int]:
    """[processes]: the number of the machine that each process runs on."""
    names = gather(socket.gethostname())
    return [names.index(name) for name in names]


def fail(message: str, code: int) -> None:
    """End this process with an exit code, and all others within seconds: they say which process failed first, and why.

    With one process it does nothing: the caller returns the code.
    """
    if count() == 1:
        return
    try:
        global_state.client.key_value_set(_FAILURE, json.dumps([index(), message, code]))
    except jax.errors.JaxRuntimeError:  # another one was first
        pass
    exit_now(code)


def lose(error: Exception) -> None:
    """End this process after an error of a collective, which another process may have caused by its end.

    The coordination service ends the processes that are left, and names the lost one, when its heartbeats are missing.
    """
    LOGGER.error(f"rlhf-jax: process {index()} of {count()}: {' '.join(str(error).split())[:300]}")
    LOGGER.error("rlhf-jax: another process has probably ended; its own messages say why")
    time.sleep(HEARTBEAT_SECONDS + 10)
    exit_now(1)


def exit_now(code: int) -> None:
    """End this process without waiting for the others, as an orderly exit would; the main one last."""
    if is_main():  # with it the coordination service ends, and then all others do before they could say why
        time.sleep(3)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch_failures() -> None:
    """End this process when another one has failed."""
    while global_state.client is not None:
        try:
            number, message, code = json.loads(global_state.client.key_value_try_get(_FAILURE))
        except (jax.errors.JaxRuntimeError, AttributeError):  # none has
            time.sleep(1)
            continue
        if number != index():
            LOGGER.error(f"rlhf-jax: process {index()} ends: process {number} of {count()} failed first: {message}")
            exit_now(code)
        return
