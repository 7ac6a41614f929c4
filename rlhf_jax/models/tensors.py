"""How a parameter lies in a checkpoint's files: the two-way contract between families and the reader and writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Strip:
    """What is ours of a fused projection: in every group of `period` outputs, `length` of them from `offset`."""

    offset: int
    length: int
    period: int


class HfTensor(NamedTuple):
    """A parameter as it lies in a checkpoint.

    Ours, without its layer dimension where the name has {i}, and without its expert dimension where it has {j}, equals
    the file's tensor, transposed where asked, of which the strip is taken along the last dimension. Where ours has more
    rows than the file (the padding of the vocabulary) the rest are zeros.
    """

    name: str  # "{i}" stands for the layer, "{j}" for the expert (or head): ours are stacked, the file's are not
    shape: tuple[int, ...]  # in the file, of one tensor, all of a fused one
    transpose: bool = False  # the file has [..., out, in], ours is [..., in, out]
    strip: Strip | None = None  # along the last dimension of ours; None: all of it
