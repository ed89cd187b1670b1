"""Prometheus metrics of one server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """What `/metrics` shows. No label holds a name or a text."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("gru_memory_requests", "Requests answered", ["route", "status"], **own)
        self.seconds = Histogram(
            "gru_memory_request_seconds", "Seconds until an answer began", ["route"], buckets=_SECONDS, **own
        )
        self.first_token = Histogram(
            "gru_memory_first_token_seconds", "Seconds from request to first text", buckets=_SECONDS, **own
        )
        self.tokens = Counter("gru_memory_tokens", "Tokens taken in and generated", ["kind"], **own)
        self.turns = Counter("gru_memory_turns", "Turns kept", ["kept"], **own)
        self.steps = Counter("gru_memory_forward_passes", "Forward passes of the model", **own)
        self.batch = Histogram(
            "gru_memory_batch_rows", "Conversations in a forward pass", buckets=(1, 2, 4, 8, 16, 32, 64), **own
        )
        self.waiting = Gauge("gru_memory_waiting_requests", "Requests that wait for a place", **own)
        self.active = Gauge("gru_memory_active_requests", "Requests in the batch", **own)

    def on_step(self, rows: int, tokens: int) -> None:
        self.steps.inc()
        self.batch.observe(rows)

    def render(self) -> bytes:
        return generate_latest(self.registry)
