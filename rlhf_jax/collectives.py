"""The collectives of a compiled program and the bytes that they move, parsed from its HLO text.

Bytes are those that reach one device over links in a ring of n devices, where R is the size in bytes of a collective's
result on that device: (n - 1) / n R for all-gather and all-to-all, (n - 1) R for reduce-scatter, 2 (n - 1) / n R for
all-reduce, and R for an array that is sent from one device to another.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVE_KINDS = {"all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"}
COLLECTIVE_KINDS |= {"reduce-scatter", "send", "recv"}
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")


class Instruction(NamedTuple):
    """One line of HLO: its computation, its operation, the text of its result, and the whole line."""

    computation: str
    operation: str
    result: str
    line: str


class Collective(NamedTuple):
    """One array that a collective returns on each device; XLA combines many into one instruction.

    Attributes:
        kind: one of COLLECTIVE_KINDS.
        dtype, shape: as XLA writes them, for example "bf16" and (8, 32).
        group: number of devices in each group.
        runs: how often the program runs it.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    runs: int

    @property
    def received_bytes(self) -> int:
        """Bytes that reach one device over links, over all runs; those of a send are counted at its recv."""
        bits = 8 if self.dtype == "pred" else int(re.match(r"[a-z]+(\d+)", self.dtype)[1])
        result, n = self.runs * math.prod(self.shape) * bits // 8, self.group
        shares = {"all-gather": n - 1, "all-to-all": n - 1, "all-reduce": 2 * (n - 1), "reduce-scatter": n * (n - 1)}
        return result * (shares | {"send": 0}).get(self.kind, n) // n  # shares are n-ths of the result


def instructions(text: str) -> Iterator[Instruction]:
    computation = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            computation = head[1]
        elif found := _INSTRUCTION.match(line):
            yield Instruction(computation, found[2], found[1], line)


def run_counts(text: str) -> dict[str, int]:
    """{computation: how often the program runs it}.

    A loop counts by its known trip count, and once where XLA does not know it; every branch of a conditional counts as
    taken.
    """
    callers, computations = defaultdict(list), {}
    for computation, operation, _, line in instructions(text):
        body = re.search(r"body=%([\w.\-]+)", line) if operation == "while" else None
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line) if body else None
        if operation not in ("async-update", "async-done"):  # these name the computation that async-start has called
            for called in {name for names in _CALLED.findall(line) for name in re.findall(r"%([\w.\-]+)", names)}:
                callers[called].append((computation, int(trips[1]) if trips and called == body[1] else 1))
        computations[computation] = None

    @functools.cache
    def times(computation: str) -> int:
        return sum(trips * times(caller) for caller, trips in callers[computation]) if computation in callers else 1

    return {computation: times(computation) for computation in computations}


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program.

    Raises:
        ValueError: no text, or device groups in an unknown notation.
    """
    if not text:
        raise ValueError("the compiled program comes without its text")
    counts, found = run_counts(text), []
    for computation, operation, result, line in instructions(text):
        kind = operation.removesuffix("-start")
        if kind not in COLLECTIVE_KINDS:
            continue
        arrays = _arrays(result)
        if kind in ("send", "recv"):  # the array comes first, then its context
            arrays = arrays[:1]
        elif operation != kind and kind != "all-reduce":
            # A "-start" lists operands, then results, then contexts; that of an all-reduce lists its results alone.
            arrays = [array for array in arrays if kind != "collective-permute" or array != ("u32", ())]
            arrays = arrays[len(arrays) // 2 :]
        group = 2 if kind in ("collective-permute", "send", "recv") else _group_size(line, text)
        found += [Collective(kind, *array, group, counts[computation]) for array in arrays]
    return found


def _arrays(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in the text of a result, without layouts and comments."""
    plain = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", result)
    found = re.findall(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\]", plain)
    return [(dtype, tuple(map(int, dims.split(","))) if dims else ()) for dtype, dims in found]


def _group_size(line: str, text: str) -> int:
    """Devices per group: {{0,1},{2,3}}, [groups,devices]<=[...], mesh['a'=4,'b'=2] {'b','a':(1)2}, or {}: all."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"([\w.\-]+)'?=(\d+)", found[1]))
        axes = re.findall(r"([\w.\-]+)'?(?::\(\d+\)(\d+))?(?:,|$)", found[2])  # (1)2: a part of an axis
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d, ]+)\}", line):
        return len(found[1].split(","))
    if "replica_groups={}" in line:
        sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
        return math.prod(map(int, sizes))
    raise ValueError(f"a collective whose groups of devices are not understood: {line.strip()[:200]}")


def received_bytes(text: str) -> int:
    """Bytes that reach one device over links while the program runs once."""
    return sum(collective.received_bytes for collective in collectives(text))
