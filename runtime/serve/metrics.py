"""What the server counts and times, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..usage import Usage

# Seconds. A token on a phone takes a tenth of one, a prompt on a CPU minutes.
TO_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """`running` and `waiting` tell how many answers do so now."""

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "osscompile_requests",
            "Requests, by path and status (499: the client went away)",
            ["path", "status"],
            registry=registry,
        )
        tokens = {
            "prompt": "Tokens of prompts",
            "cached": "Tokens of prompts that the KV cache had",
            "completion": "Tokens of answers",
            "reasoning": "Tokens of answers that told reasoning",
        }
        self._tokens = {
            name: Counter(f"osscompile_{name}_tokens", about, registry=registry)
            for name, about in tokens.items()
        }
        self._to_first = Histogram(
            "osscompile_time_to_first_token_seconds",
            "From a request to the first token that is told",
            buckets=TO_FIRST,
            registry=registry,
        )
        self._between = Histogram(
            "osscompile_time_between_tokens_seconds",
            "From a token that is told to the next of the same answer",
            buckets=BETWEEN,
            registry=registry,
        )
        for name, about, count in (
            ("running", "Answers that are computed", running),
            ("waiting", "Answers that wait for their turn", waiting),
        ):
            gauge = Gauge(f"osscompile_answers_{name}", about, registry=registry)
            gauge.set_function(count)

    def count_request(self, path: str, status: int) -> None:
        self._requests.labels(path, status).inc()

    def time_first(self, seconds: float) -> None:
        self._to_first.observe(seconds)

    def time_next(self, seconds: float) -> None:
        self._between.observe(seconds)

    def count_tokens(self, usage: Usage) -> None:
        """An answer has ended."""
        for name, counter in self._tokens.items():
            counter.inc(getattr(usage, f"{name}_tokens"))

    def text(self) -> bytes:
        return generate_latest(self._registry)
