"""What a service has counted, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from restuning.serve.service import Service

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Requests as they end, and the counts of a service as they stand when they are asked for.

    Args:
        service: Whose counts.

    Attributes:
        registry: Of its own: an application that this one is mounted in has another.
    """

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "restuning_requests",
            "Requests that were answered.",
            ["route", "method", "code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "restuning_request_seconds",
            "From a request's first byte to the last of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Counts(service))

    def note(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        # A stranger's own word would be a series of its own.
        known = method if method in METHODS else "other"
        self._requests.labels(route, known, status).inc()
        self._seconds.labels(route).observe(seconds)


class _Counts:
    """Read when they are asked for: what counts knows nothing of Prometheus."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        named = [*self.service.named_batchers.items()]

        def counter(name: str, what: str, of: Any) -> Metric:
            family = CounterMetricFamily(f"restuning_{name}", what, labels=["backbone"])
            for label, batcher in named:
                family.add_metric([label], of(batcher.counts))
            return family

        def gauge(name: str, what: str, of: Any) -> Metric:
            family = GaugeMetricFamily(f"restuning_{name}", what, labels=["backbone"])
            for label, batcher in named:
                family.add_metric([label], of(batcher))
            return family

        yield counter("inputs", "Inputs that were answered.", lambda c: c.inputs)
        yield counter("forwards", "Backbone forwards of a batch.", lambda c: c.forwards)
        yield counter("cache_hits", "Inputs that needed no forward.", lambda c: c.hits)
        yield counter("cache_misses", "Inputs that needed one.", lambda c: c.misses)
        yield counter("failed", "Inputs whose answer was an error.", lambda c: c.failed)
        yield counter("refused", "Inputs that found no place in the queue.", lambda c: c.refused)
        yield counter("expired", "Inputs nobody waited for any more.", lambda c: c.expired)
        yield gauge("queue", "Inputs that are decoded, wait or are answered.", lambda b: b.held)
        yield gauge("cache_bytes", "Of features that are kept.", lambda b: b.cache.bytes)
        yield gauge("cache_inputs", "Whose features are kept.", lambda b: len(b.cache))
        yield gauge("tasks", "That answer.", lambda b: len(b.live.versions))
        seconds = CounterMetricFamily(
            "restuning_spent_seconds", "By what they were spent on.", labels=["backbone", "on"]
        )
        labels = ["backbone", "task"]
        answers = CounterMetricFamily("restuning_answers", "By task.", labels=labels)
        no_number = CounterMetricFamily(
            "restuning_no_number", "Answers that were NaN or infinite.", labels=labels
        )
        engines = GaugeMetricFamily(
            "restuning_engine",
            "1 for what runs a backbone.",
            labels=["backbone", "runtime", "precision", "file"],
        )
        sizes = HistogramMetricFamily(
            "restuning_batch_size", "Inputs of a batch.", labels=["backbone"]
        )
        for label, batcher in named:
            counts = batcher.counts
            engine = batcher.live.engine
            told = [engine["runtime"], engine["precision"], engine["file"]] if engine else []
            engines.add_metric([label, *(told or ["pytorch", "", ""])], 1)
            for on, spent in dict(counts.seconds).items():
                seconds.add_metric([label, on], spent)
            # Of tasks that are here: names of those that are gone would grow without end.
            for task in batcher.live.versions:
                answers.add_metric([label, task], counts.answers[task])
                no_number.add_metric([label, task], counts.no_number[task])
            found = dict(counts.batches)
            below = [(f"{e}.0", sum(n for s, n in found.items() if s <= e)) for e in BATCHES]
            total = sum(s * n for s, n in found.items())
            sizes.add_metric([label], [*below, ("+Inf", sum(found.values()))], total)
        yield from (seconds, answers, no_number, engines, sizes)
        failed = GaugeMetricFamily("restuning_tasks_refused", "Folders that were refused.")
        refused = sum(bool(e.error) for e in self.service.entries.values())
        failed.add_metric([], refused + len(self.service.failed))
        yield failed
