"""What a server counts, in the form that Prometheus reads."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class Held:
    """Requests at hand, and bytes of their caches: of their tokens, with the room that is free, and at 16 bits per
    number."""

    running: int
    waiting: int
    cache_bytes: int
    allocated_bytes: int
    bf16_bytes: int


class Metrics:
    """Counters of one server; ``text`` is what a scrape gets."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "qjl_requests", "Requests by path and status; 499: the client went away.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self.tokens_read = Counter("qjl_prompt_tokens", "Tokens of prompts that were read.", registry=registry)
        self.tokens_written = Counter("qjl_generated_tokens", "Tokens that were written.", registry=registry)
        self.paused = Counter(
            "qjl_answers_paused", "Answers that gave their pages back and read their tokens again.", registry=registry
        )
        self.shared = Counter(
            "qjl_prompt_tokens_shared", "Tokens of prompts that an earlier request of the same client had read.",
            registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "qjl_time_to_first_token_seconds", "From arrival, waiting included.", buckets=_SECONDS, registry=registry
        )
        self.next_token = Histogram(
            "qjl_time_per_token_seconds", "From one token to the next.", buckets=_SECONDS, registry=registry
        )
        self._running = self._gauge("qjl_requests_running", "Answers being read or written.")
        self._waiting = self._gauge("qjl_requests_waiting", "Requests that wait for a slot.")
        self._bytes = self._gauge(
            "qjl_cache_bytes", "Of running requests and of conversations that may go on, without codecs."
        )
        self._allocated = self._gauge(
            "qjl_cache_allocated_bytes", "The same with the room that is free; --cache-memory bounds them."
        )
        self._full = self._gauge("qjl_cache_full_bytes", "The tokens of running requests at 16 bits per number.")
        self._ratio = self._gauge("qjl_cache_compression_ratio", "The latter over the former; NaN without requests.")

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, registry=self._registry)

    def text(self, held: Held) -> bytes:
        """All of it, with what is at hand now."""
        self._running.set(held.running)
        self._waiting.set(held.waiting)
        self._bytes.set(held.cache_bytes)
        self._allocated.set(held.allocated_bytes)
        self._full.set(held.bf16_bytes)
        self._ratio.set(held.bf16_bytes / held.cache_bytes if held.cache_bytes else float("nan"))
        return generate_latest(self._registry)
