"""Counters of the server in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Counters:
    """All of a server's counters, apart from those of other servers in the process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def make(kind: type, name: str, text: str, *labels: str, **options):
            return kind(f"rlhf_jax_{name}", text, labels, registry=registry, **options)

        self.requests = make(Counter, "requests", "HTTP requests by path and status", "path", "status")
        self.seconds = make(Histogram, "request_seconds", "until the last byte was sent", "path", buckets=SECONDS)
        self.first = make(
            Histogram, "time_to_first_token_seconds", "from arrival to first token", "model", buckets=SECONDS
        )
        self.prompt_tokens = make(Counter, "prompt_tokens", "of answered requests", "model")
        self.answer_tokens = make(Counter, "generated_tokens", "of answered requests", "model")
        self.running = make(Gauge, "running", "answers that have a row", "model")
        self.waiting = make(Gauge, "waiting", "answers that wait for a row", "model")

    def set_load(self, model: str, running: int, waiting: int) -> None:
        self.running.labels(model).set(running)
        self.waiting.labels(model).set(waiting)

    def observe_first_token(self, model: str, seconds: float) -> None:
        self.first.labels(model).observe(seconds)

    def count_answer(self, model: str, prompt: int, answer: int) -> None:
        self.prompt_tokens.labels(model).inc(prompt)
        self.answer_tokens.labels(model).inc(answer)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
