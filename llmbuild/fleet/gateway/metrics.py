"""Metrics of a fleet for Prometheus: requests as clients see them, retries, replicas and actions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_SECONDS = tuple(step * 10.0**power for power in range(-4, 3) for step in (1, 2.5, 5))
_OF = ["service", "slo_class"]

Gauges = Callable[[], Mapping[str, Mapping[tuple[str, str], float]]]
"""Values of gauges by name, and by service and state."""


class FleetMetrics:
    """A registry of its own."""

    def __init__(self, gauges: Gauges) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, meaning: str, labels: list[str]) -> Counter:
            return Counter(f"llmbuild:{name}", meaning, labels, registry=self._registry)

        def histogram(name: str, meaning: str) -> Histogram:
            return Histogram(f"llmbuild:{name}", meaning, _OF, registry=self._registry, buckets=_SECONDS)

        self.requests = counter("fleet_requests", "Requests that ended, by how.", [*_OF, "outcome"])
        self.retries = counter("fleet_retries", "Requests that were given to another replica.", ["service"])
        self.slo = counter("fleet_slo", "Streams that were answered, by whether they met their SLO.", [*_OF, "met"])
        self.actions = counter("fleet_actions", "Actions, by their answer.", ["action", "outcome"])
        self.decisions = counter("fleet_decisions", "Decisions of the policy.", [])
        self.first = histogram("fleet_time_to_first_token_seconds", "From the arrival to the first byte of a stream.")
        self.per_token = histogram("fleet_time_per_output_token_seconds", "Mean of a stream, after its first token.")
        self.e2e = histogram("fleet_e2e_request_latency_seconds", "From the arrival to the end.")
        self._registry.register(_States(gauges))

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)


_MEANINGS = {
    "fleet_replicas": "Replicas by their state.",
    "fleet_running": "Requests at replicas.",
    "fleet_waiting": "Requests without a first token.",
    "fleet_correction": "Time between tokens over that of the profile: so many times a load counts.",
}


class _States(Collector):
    """Reads gauges when it is asked."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, values in self._gauges().items():
            family = Metric(f"llmbuild:{name}", _MEANINGS[name], "gauge")
            for (service, state), value in values.items():
                labels = {"service": service, **({"state": state} if state else {})}
                family.samples.append(Sample(f"llmbuild:{name}", labels, value))
            yield family
