"""What Prometheus reads at `/metrics`."""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence

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
from prometheus_client.core import CounterMetricFamily as CounterFamily
from prometheus_client.core import GaugeMetricFamily as GaugeFamily
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.replicas import Replica

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Tally(Collector):
    """A histogram that is counted in one thread, for what happens with every token: Prometheus' own takes locks."""

    def __init__(self, name: str, description: str, bounds: Sequence[float]) -> None:
        self._name, self._description, self._bounds = name, description, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times over."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """The histogram, its buckets cumulative."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, itertools.accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._description, buckets=buckets, sum_value=self._sum)


class Metrics:
    """One server's counters, in a registry of their own.

    With several `replicas`, each one's own numbers are samples with the label `device`.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
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
        self.inter_token = Tally("engineshed_inter_token_seconds", "Between two tokens of one answer", INTER_TOKEN_SECONDS)
        self.registry.register(self.inter_token)
        self.prompt_tokens = Counter("engineshed_prompt_tokens", "Prompt tokens of started answers", registry=self.registry)
        self.cached_tokens = Counter("engineshed_cached_prompt_tokens", "Of these, reused from a slot", registry=self.registry)
        self.generated_tokens = Counter("engineshed_generated_tokens", "Tokens of answers", registry=self.registry)
        self.registry.register(_EngineCollector(replicas))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The workers' own numbers, from their last heartbeats; a worker's counters start again at 0 with each new process."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._labels = ["device"] if len(replicas) > 1 else []  # One worker's numbers are the whole server's.

    def collect(self) -> Iterable[Metric]:
        families: dict[str, CounterFamily | GaugeFamily] = {}
        for replica in self._replicas:
            for kind, name, description, value in _numbers(replica):
                family = families.setdefault(name, kind(name, description, labels=self._labels))
                family.add_metric([replica.device for _ in self._labels], value)
        return families.values()


def _numbers(replica: Replica) -> Iterator[tuple[type[CounterFamily | GaugeFamily], str, str, float]]:
    client = replica.client
    ready, beat = (client.ready, client.heartbeat) if client else (None, None)
    yield GaugeFamily, "engineshed_ready", "1 while the engine takes requests", ready is not None
    yield CounterFamily, "engineshed_worker_restarts", "Worker processes replaced", replica.restarts
    yield GaugeFamily, "engineshed_slots", "Requests that can run at once", ready.slots if ready else 0
    yield GaugeFamily, "engineshed_queue_limit", "Requests that may wait", ready.queue if ready else 0
    yield GaugeFamily, "engineshed_requests_running", "Requests in a slot", beat.running if beat else 0
    yield GaugeFamily, "engineshed_requests_waiting", "Requests waiting for a slot", beat.waiting if beat else 0
    yield GaugeFamily, "engineshed_kv_tokens", "Tokens in their slots", beat.kv_tokens if beat else 0
    if beat is None:
        return
    yield CounterFamily, "engineshed_engine_steps", "Prefill chunks and decode batches", beat.steps
    yield CounterFamily, "engineshed_engine_seconds", "Time inside the engine", beat.step_seconds
    yield CounterFamily, "engineshed_engine_decode_steps", "Of these, steps that decode one token a row", beat.decode_steps
    yield CounterFamily, "engineshed_engine_decode_rows", "Rows of these; by steps, the mean batch", beat.rows
    yield GaugeFamily, "engineshed_tokens_waiting", "Prompt and answer tokens of the waiting requests", beat.waiting_tokens
    yield CounterFamily, "engineshed_queue_seconds", "Time that requests waited for a slot, over all", beat.queue_seconds
    yield CounterFamily, "engineshed_timeouts", "Requests that ran out of their time", beat.timeouts
    yield CounterFamily, "engineshed_engine_prompt_tokens", "Prompt tokens computed", beat.prompt_tokens
    yield CounterFamily, "engineshed_engine_cached_tokens", "Prompt tokens reused instead", beat.cached_tokens
    yield CounterFamily, "engineshed_engine_generated_tokens", "Tokens generated", beat.generated_tokens
    yield CounterFamily, "engineshed_engine_guessed_tokens", "Tokens guessed and verified", beat.guessed_tokens
    yield CounterFamily, "engineshed_engine_accepted_tokens", "Of these, the right ones", beat.accepted_tokens
