"""What a server allows its clients, each limit with the status code of who exceeds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of a server, for each model where models have them.

    Attributes:
        rows: answers that are decoded at once; more wait.
        context: positions of a prompt and its answer (400); 0: those of the model, at most 4096.
        queue: answers that wait for a row, or requests for scores that wait for their turn (429).
        inputs: texts that one request has scored (400).
        body: bytes of a request (413).
        seconds: until the last byte of a request (408), and from then until its last token or score (504).
    """

    rows: int = 32
    context: int = 0
    queue: int = 256
    inputs: int = 1024
    body: int = 4_000_000
    seconds: float = 600.0

    def __post_init__(self) -> None:
        if min(self.rows, self.inputs, self.body) < 1 or min(self.queue, self.context) < 0 or not self.seconds > 0:
            raise ValueError(f"{self}: rows, inputs, body and seconds are above 0, queue and context at least 0")
