"""What an HTTP process counts, and what Prometheus reads at `/metrics` of all processes together.

Each process counts for itself and tells the supervisor every second, and at once when it is asked; whichever of them a scrape
reaches has the supervisor ask all others and sum everything up. So it does not matter which one that is, and what a client
knows already, as that its answer has ended, is in the numbers.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily as CounterFamily
from prometheus_client.core import GaugeMetricFamily as GaugeFamily
from prometheus_client.core import HistogramMetricFamily as HistogramFamily
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from runtime.tally import BATCH_ROWS, QUEUE_SECONDS, STEP_SECONDS
from server.fleet import Engine, Sample, Status

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_WHERE = ("model", "device")

disable_created_metrics()  # type: ignore[no-untyped-call]  # When a sum over processes began to be counted, nobody can tell.


class Tally:
    """A histogram that is counted in one thread, for what happens with every token: Prometheus' own takes locks."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times over."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Tallies(Collector):
    """A Tally for each model and device."""

    def __init__(self, name: str, description: str, bounds: Sequence[float]) -> None:
        self._name, self._description, self._bounds = name, description, bounds
        self._children: dict[tuple[str, str], Tally] = {}

    def labels(self, model: str, device: str) -> Tally:
        """The one of a model on a device."""
        return self._children.setdefault((model, device), Tally(self._bounds))

    def collect(self) -> Iterable[Metric]:
        """The histograms, their buckets cumulative."""
        family = HistogramFamily(self._name, self._description, labels=_WHERE)
        for where, tally in self._children.items():
            family.add_metric(where, _buckets(tally.bounds, tally.counts), tally.sum)
        yield family


@dataclass(frozen=True)
class AnswerMetrics:
    """What is counted of a model's answers from a device."""

    first_token: Histogram
    inter_token: Tally
    prompt_tokens: Counter
    cached_tokens: Counter
    generated_tokens: Counter


class Metrics:
    """One HTTP process's own counters, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("engineshed_requests", "By route and status; 499: client gone", "route", "status")
        self._first_token = Histogram(
            "engineshed_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            _WHERE,
            buckets=FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._inter_token = Tallies("engineshed_inter_token_seconds", "Between two tokens of one answer", INTER_TOKEN_SECONDS)
        self._registry.register(self._inter_token)
        self._prompt_tokens = self._counter("engineshed_prompt_tokens", "Prompt tokens of started answers", *_WHERE)
        self._cached_tokens = self._counter("engineshed_cached_prompt_tokens", "Of these, reused from a slot", *_WHERE)
        self._generated_tokens = self._counter("engineshed_generated_tokens", "Tokens of answers", *_WHERE)
        self._answers: dict[tuple[str, str], AnswerMetrics] = {}

    def of(self, model: str, device: str) -> AnswerMetrics:
        """The counters of a model's answers from a device."""
        if (model, device) not in self._answers:
            where = (model, device)
            self._answers[where] = AnswerMetrics(
                self._first_token.labels(*where),
                self._inter_token.labels(*where),
                self._prompt_tokens.labels(*where),
                self._cached_tokens.labels(*where),
                self._generated_tokens.labels(*where),
            )
        return self._answers[model, device]

    def samples(self) -> tuple[Sample, ...]:
        """All counters as they stand."""
        return tuple(
            Sample(sample.name, tuple(sorted(sample.labels.items())), sample.value)
            for family in self._registry.collect()
            for sample in family.samples
        )

    def render(self, status: Status) -> bytes:
        """What the supervisor knows of all processes, this one among them, in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Once([*self._summed(status.samples), *_of_engines(status.engines), *_of_server(status)]))
        return generate_latest(registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(name, description, labels, registry=self._registry)

    def _summed(self, samples: Iterable[Sample]) -> Iterator[Metric]:
        """The counters' families, with `samples` instead of this process's own numbers."""
        by_name: dict[str, list[Sample]] = {}
        for sample in samples:
            by_name.setdefault(sample.name, []).append(sample)
        for family in self._registry.collect():
            summed = Metric(family.name, family.documentation, family.type)
            suffixes = ("_bucket", "_count", "_sum") if family.type == "histogram" else ("_total",)
            for name in (family.name + suffix for suffix in suffixes):
                for sample in by_name.get(name, ()):
                    summed.add_sample(name, dict(sample.labels), sample.value)
            yield summed


class _Once(Collector):
    """Families that have been collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


Kind = TypeVar("Kind", GaugeFamily, CounterFamily, HistogramFamily)


class _Families:
    """Metric families, made when their first sample comes."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.found: dict[str, GaugeFamily | CounterFamily | HistogramFamily] = {}
        self._labels = labels

    def gauge(self, name: str, description: str, labels: Sequence[str], value: float) -> None:
        self._family(GaugeFamily, name, description).add_metric(labels, value)

    def counter(self, name: str, description: str, labels: Sequence[str], value: float) -> None:
        self._family(CounterFamily, name, description).add_metric(labels, value)

    def histogram(
        self, name: str, description: str, labels: Sequence[str], bounds: Sequence[float], counts: Sequence[int], total: float
    ) -> None:
        if counts:
            self._family(HistogramFamily, name, description).add_metric(labels, _buckets(bounds, counts), total)

    def _family(self, kind: type[Kind], name: str, description: str) -> Kind:
        if name not in self.found:
            self.found[name] = kind(name, description, labels=self._labels)
        return cast(Kind, self.found[name])


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    names = [*map(floatToGoString, bounds), "+Inf"]
    return list(zip(names, itertools.accumulate(counts), strict=True))


def _of_engines(engines: Iterable[Engine]) -> Iterable[Metric]:
    """The workers' own numbers; a worker's counters start again at 0 with each new process."""
    families = _Families(_WHERE)
    for engine in engines:
        _add(families, engine)
    return families.found.values()


def _add(families: _Families, engine: Engine) -> None:
    where, beat = (engine.model, engine.device), engine.beat
    gauge, counter = families.gauge, families.counter
    gauge("engineshed_ready", "1 while the engine takes requests", where, engine.state == "ready" and not engine.draining)
    counter("engineshed_worker_restarts", "Worker processes replaced", where, engine.restarts)
    gauge("engineshed_slots", "Requests that can run at once", where, engine.slots)
    gauge("engineshed_queue_limit", "Requests that may wait", where, engine.queue)
    gauge("engineshed_requests_running", "Requests in a slot", where, beat.running if beat else 0)
    gauge("engineshed_requests_waiting", "Requests waiting for a slot", where, beat.waiting if beat else 0)
    gauge("engineshed_kv_tokens", "Tokens in the running requests' slots", where, beat.kv_tokens if beat else 0)
    if beat is None:
        return
    gauge("engineshed_tokens_waiting", "Prompt and answer tokens of the waiting requests", where, beat.waiting_tokens)
    counter("engineshed_engine_steps", "Prefill chunks and decode batches", where, beat.steps)
    counter("engineshed_engine_seconds", "Time inside the engine", where, beat.step_seconds)
    counter("engineshed_engine_decode_steps", "Of the steps, those that decode one token a row", where, beat.decode_steps)
    counter("engineshed_engine_decode_rows", "Rows of these; by steps, the mean batch", where, beat.rows)
    counter("engineshed_engine_finished", "Requests that ended with stop or length", where, beat.finished)
    counter("engineshed_timeouts", "Requests that ran out of their time", where, beat.timeouts)
    counter("engineshed_engine_prompt_tokens", "Prompt tokens computed", where, beat.prompt_tokens)
    counter("engineshed_engine_cached_tokens", "Prompt tokens reused instead", where, beat.cached_tokens)
    counter("engineshed_engine_generated_tokens", "Tokens generated", where, beat.generated_tokens)
    counter("engineshed_engine_guessed_tokens", "Tokens guessed and verified", where, beat.guessed_tokens)
    counter("engineshed_engine_accepted_tokens", "Of these, the right ones", where, beat.accepted_tokens)
    histogram = families.histogram
    waits, steps, rows = beat.queue_counts, beat.step_counts, beat.batch_counts
    histogram("engineshed_queue_seconds", "That requests waited for a slot", where, QUEUE_SECONDS, waits, beat.queue_seconds)
    histogram("engineshed_step_seconds", "That the engine's steps took", where, STEP_SECONDS, steps, beat.step_seconds)
    histogram("engineshed_batch_rows", "Rows of the decode steps", where, BATCH_ROWS, rows, beat.rows)


def _of_server(status: Status) -> Iterator[Metric]:
    models = GaugeFamily("engineshed_model_state", "1 for the state that the model is in", labels=["model", "state"])
    for model in status.models:
        models.add_metric([model.name, model.state], 1)
    resident = GaugeFamily("engineshed_process_resident_bytes", "Memory of each process", labels=["process"])
    restarts = CounterFamily("engineshed_process_restarts", "Processes replaced", labels=["process"])
    for process in status.processes:
        resident.add_metric([process.name], process.rss)
        restarts.add_metric([process.name], process.restarts)
    budget = GaugeFamily("engineshed_memory_budget_bytes", "That engines on the device may take", labels=["device"])
    reserved = GaugeFamily("engineshed_memory_reserved_bytes", "That those on it take at their fullest", labels=["device"])
    for memory in status.memory:
        budget.add_metric([memory.device], memory.budget)
        reserved.add_metric([memory.device], memory.reserved)
    yield GaugeFamily("engineshed_start_time_seconds", "When the server was started, since the epoch", value=status.started)
    yield from (models, resident, restarts, budget, reserved)
