"""What Prometheus reads at `/metrics`."""

from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine_client import EngineSource

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self, engine: EngineSource) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "engineshed_requests",
            "By route and status; 499: the client went away",
            ["route", "status"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "engineshed_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "engineshed_inter_token_seconds",
            "Between two tokens of one answer",
            buckets=INTER_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("engineshed_prompt_tokens", "Prompt tokens of started answers", registry=self.registry)
        self.cached_tokens = Counter("engineshed_cached_prompt_tokens", "Of these, reused from a slot", registry=self.registry)
        self.generated_tokens = Counter("engineshed_generated_tokens", "Tokens of answers", registry=self.registry)
        self.registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The worker's own numbers, from its last heartbeat; its counters start again at 0 with each new process."""

    def __init__(self, engine: EngineSource) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        client = self._engine.client
        ready, beat = (client.ready, client.heartbeat) if client else (None, None)
        yield GaugeMetricFamily("engineshed_ready", "1 while the engine takes requests", value=ready is not None)
        yield CounterMetricFamily("engineshed_worker_restarts", "Worker processes replaced", value=self._engine.restarts)
        yield GaugeMetricFamily("engineshed_slots", "Requests that can run at once", value=ready.slots if ready else 0)
        yield GaugeMetricFamily("engineshed_queue_limit", "Requests that may wait", value=ready.queue if ready else 0)
        yield GaugeMetricFamily("engineshed_requests_running", "Requests in a slot", value=beat.running if beat else 0)
        yield GaugeMetricFamily("engineshed_requests_waiting", "Requests waiting for a slot", value=beat.waiting if beat else 0)
        yield GaugeMetricFamily("engineshed_kv_tokens", "Tokens in their slots", value=beat.kv_tokens if beat else 0)
        if beat is None:
            return
        yield CounterMetricFamily("engineshed_engine_steps", "Prefill chunks and decode batches", value=beat.steps)
        yield CounterMetricFamily("engineshed_engine_seconds", "Time inside the engine", value=beat.step_seconds)
        yield CounterMetricFamily("engineshed_engine_prompt_tokens", "Prompt tokens computed", value=beat.prompt_tokens)
        yield CounterMetricFamily("engineshed_engine_cached_tokens", "Prompt tokens reused instead", value=beat.cached_tokens)
        yield CounterMetricFamily("engineshed_engine_generated_tokens", "Tokens generated", value=beat.generated_tokens)
        yield CounterMetricFamily("engineshed_engine_guessed_tokens", "Tokens guessed and verified", value=beat.guessed_tokens)
        yield CounterMetricFamily("engineshed_engine_accepted_tokens", "Of these, the right ones", value=beat.accepted_tokens)
