"""How a parameter lies in a checkpoint's files: the two-way contract between families and the reader and writer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a folder hold.

    Attributes:
        layouts: {path: where it lies in the files}; those after the first are alternatives to it, which may leave out
            what they have in common with it. Of them the one is used that the files lack the fewest tensors of.
        prefix: of the base model's names, which the files may leave out.
        optional: paths that the files may lack.
        tolerated: names that the files may have and nothing reads.
        twins: {such a name: one that is read}, which have to be the same where the files have both.
    """

    layouts: Sequence[Mapping[str, HfTensor]]
    prefix: str
    optional: Collection[str] = ()
    tolerated: re.Pattern[str] | None = None
    twins: Mapping[str, str] = field(default_factory=dict)
