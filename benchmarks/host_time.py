"""The share of a PPO iteration in which no program executes: the time that the host takes between programs.

    python -m benchmarks.host_time [--size A] [--dtype bfloat16] [--note TEXT] [key=value ...]

Iterations of `benchmarks.ppo_iteration`, traced by JAX's profiler after its warm-up. Writes a row of
benchmarks/results/host_time.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

from benchmarks import ppo_iteration, timing
from benchmarks.provenance import record
from benchmarks.random_models import add_overrides

ITERATION = "traced iteration"


class Span(NamedTuple):
    start: float  # nanoseconds
    end: float


def main(argv: list[str] | None = None) -> dict:
    parser = add_overrides(timing.make_parser(__doc__))
    parser.add_argument("--note", default="", help="about the machine, such as that other processes shared it")
    args = parser.parse_args(argv)
    step = ppo_iteration.make_step(args)
    for _ in range(args.warm_up):
        step(lambda phase: None)
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls in Python are many, and tracing them takes time
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(args.iterations):
                with jax.profiler.TraceAnnotation(ITERATION):
                    step(lambda phase: None)
        (path,) = Path(folder).rglob("*.xplane.pb")
        iterations, busy = read_spans(ProfileData.from_file(str(path)))
    assert len(iterations) == args.iterations, "the profiler dropped events"
    seconds = sum(each.end - each.start for each in iterations) / 1e9
    idle = idle_time(iterations, busy) / 1e9
    result = {"size": args.size, "dtype": args.dtype, "iterations": args.iterations}
    result |= {"seconds": seconds / args.iterations, "idle": idle / args.iterations, "share": idle / seconds}
    record("host_time", result, "size", "dtype", note=args.note)
    return result


def read_spans(trace: ProfileData) -> tuple[list[Span], list[Span]]:
    """(the iterations, executions): of a GPU its kernels and copies, of a CPU its programs and their operations."""
    planes = {plane.name: plane for plane in trace.planes}
    host = [(line.name, event) for line in planes["/host:CPU"].lines for event in line.events]
    iterations = [span_of(event) for _, event in host if event.name == ITERATION]
    gpus = [plane for name, plane in planes.items() if name.startswith("/device:GPU")]
    if gpus:
        lines = (line for plane in gpus for line in plane.lines if line.name.startswith("Stream"))
        return iterations, [span_of(event) for line in lines for event in line.events]
    executions = (event for line, event in host if line.startswith("tf_XLA") or event.name.startswith("ThunkExecutor"))
    return iterations, list(map(span_of, executions))


def span_of(event) -> Span:
    return Span(event.start_ns, event.start_ns + event.duration_ns)


def merge(spans: Sequence[Span]) -> list[Span]:
    """Their union, as spans that do not touch, in order."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def idle_time(iterations: Sequence[Span], busy: Sequence[Span]) -> float:
    """Nanoseconds of the iterations that no busy span covers."""
    whole, covered = sum(each.end - each.start for each in iterations), 0.0
    for span in merge(busy):
        covered += sum(max(0.0, min(each.end, span.end) - max(each.start, span.start)) for each in iterations)
    return whole - covered


if __name__ == "__main__":
    print(main())
