"""A program of a run, with what is resident while it runs and what it computes, as every part of a plan takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_jax.models.config import DecoderConfig


class Pass(NamedTuple):
    """The forward passes of one model in a program, for the arithmetic of FLOPs and temporaries.

    Attributes:
        decoder: its architecture, without adapters.
        params: abstract parameters as the program reads them.
        rows: sequences of one micro-batch, over all devices.
        length: tokens of a sequence.
        head_tokens: tokens of a sequence whose logits are computed.
        cast: bytes on one device of the copy in the dtype of the computation.
    """

    decoder: DecoderConfig
    params: Mapping[str, Any]
    rows: int
    length: int
    head_tokens: int
    cast: int = 0


class Phase(NamedTuple):
    """One program of a stage, and what is resident while it runs.

    Attributes:
        stage, name: for example "ppo" and "generate".
        program: jitted; `program.lower(*args)` compiles it.
        args: abstract arrays with their shardings.
        live: {name: bytes on one device} of everything resident at that time, arguments included.
        cache: bytes on one device of keys and values; they are temporaries of the program.
        added: bytes on one device that the program needs in addition to `live`: the weights that it publishes, the
            cache, the sum of gradients.
        host: bytes of one device's arrays that are kept in host memory then; not in `live`, and never arguments.
        passes: the models that compute in it; () for programs that step one parameter at a time, and for a score where
            no model passes.
        micro: micro-batches of one run.
        runs: number of runs in one optimizer step (SFT, reward model) or one iteration (PPO).
    """

    stage: str
    name: str
    program: Any
    args: tuple
    live: dict[str, int]
    cache: int = 0
    added: int = 0
    host: int = 0
    passes: tuple[Pass, ...] = ()
    micro: int = 1
    runs: int = 1

    @property
    def is_update(self) -> bool:
        """Whether it computes gradients; the separate step of offloaded moments is not an update."""
        return self.name in ("update", "actor", "critic")

    @property
    def lower_bound(self) -> int:
        """A lower bound of the peak, by arithmetic alone."""
        return sum(self.live.values()) + self.added
