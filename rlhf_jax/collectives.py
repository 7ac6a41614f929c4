"""What a compiled program moves between devices, read from the text that XLA gives of it.

Bytes are those that reach one device over links in a ring of n, R being the bytes of a collective's result there:
all-gather and all-to-all (n - 1) / n R, reduce-scatter (n - 1) R, all-reduce 2 (n - 1) / n R, and R of what is sent
from one device to another.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
COLLECTIVE_KINDS += ("send", "recv")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")


class Instruction(NamedTuple):
    """A line of a program: the computation that it stands in, what it does, the text of its result, all of it."""

    computation: str
    operation: str
    result: str
    line: str


class Collective(NamedTuple):
    """One array that a collective gives on each device; XLA combines many into one instruction.

    Attributes:
        kind: one of KINDS.
        dtype, shape: as XLA writes them, for example "bf16" and (8, 32).
        group: devices among which it is.
        runs: how often the program runs it.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    runs: int

    @property
    def received_bytes(self) -> int:
        """Bytes that reach one device over links, over all runs."""
        bits = 8 if self.dtype == "pred" else int(re.match(r"[a-z]+(\d+)", self.dtype)[1])
        result, n = self.runs * math.prod(self.shape) * bits // 8, self.group
        match self.kind:
            case "all-gather" | "all-to-all":
                return result * (n - 1) // n
            case "all-reduce":
                return 2 * result * (n - 1) // n
            case "reduce-scatter":
                return result * (n - 1)
            case "send":  # its bytes are those of the recv
                return 0
        return result


def instructions(text: str) -> Iterator[Instruction]:
    computation = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            computation = head[1]
        elif found := _INSTRUCTION.match(line):
            yield Instruction(computation, found[2], found[1], line)


def run_counts(text: str) -> dict[str, int]:
    """{computation: how often the program runs it}.

    A loop counts as often as XLA says that it turns, and once where it does not say; every branch of a condition counts
    as taken.
    """
    callers, entry = defaultdict(list), []
    for computation, operation, _, line in instructions(text):
        body = re.search(r"body=%([\w.\-]+)", line) if operation == "while" else None
        turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line) if body else None
        if operation not in ("async-update", "async-done"):  # which name what has been started
            for called in {name for names in _CALLED.findall(line) for name in re.findall(r"%([\w.\-]+)", names)}:
                callers[called].append((computation, int(turns[1]) if turns and called == body[1] else 1))
        entry.append(computation)

    @functools.cache
    def times(computation: str) -> int:
        return sum(turns * times(caller) for caller, turns in callers[computation]) if computation in callers else 1

    return {computation: times(computation) for computation in dict.fromkeys(entry)}


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program.

    Raises:
        ValueError: no text, or devices grouped in a notation that is not known here.
    """
    if not text:
        raise ValueError("the compiled program comes without its text")
    often, found = run_counts(text), []
    for computation, operation, result, line in instructions(text):
        kind = operation.removesuffix("-start")
        if kind not in COLLECTIVE_KINDS:
            continue
        arrays = _arrays(result)
        if kind in ("send", "recv"):  # beside the array there is a context
            arrays = arrays[:1]
        elif operation != kind and kind != "all-reduce":
            # What starts names its operands before its results, and contexts behind; an all-reduce its results alone.
            arrays = [array for array in arrays if kind != "collective-permute" or array != ("u32", ())]
            arrays = arrays[len(arrays) // 2 :]
        group = 2 if kind in ("collective-permute", "send", "recv") else _group(line, text)
        found += [Collective(kind, *array, group, often[computation]) for array in arrays]
    return found


def _arrays(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in the text of a result, layouts and remarks left out."""
    plain = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", result)
    found = re.findall(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\]", plain)
    return [(dtype, tuple(map(int, dims.split(","))) if dims else ()) for dtype, dims in found]


def _group(line: str, text: str) -> int:
    """Devices in each group: {{0,1},{2,3}}, [groups,devices]<=[...], mesh['a'=4,'b'=2] {'b','a':(1)2}, or {}: all."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"([\w.\-]+)'?=(\d+)", found[1]))
        axes = re.findall(r"([\w.\-]+)'?(?::\(\d+\)(\d+))?(?:,|$)", found[2])  # of an axis perhaps a part alone
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d, ]+)\}", line):
        return len(found[1].split(","))
    if "replica_groups={}" in line:
        sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
        return math.prod(map(int, sizes))
    raise ValueError(f"a collective whose groups of devices are not understood: {line.strip()[:200]}")


def collective_kinds(text: str) -> set[str]:
    """The kinds of collectives that a program has."""
    return {collective.kind for collective in collectives(text)}


def collective_shapes(text: str, kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array that collectives of a kind give, however often each runs."""
    return [(collective.dtype, collective.shape) for collective in collectives(text) if collective.kind == kind]


def received_bytes(text: str) -> int:
    """Bytes that reach one device over links while the program runs once."""
    return sum(collective.received_bytes for collective in collectives(text))
