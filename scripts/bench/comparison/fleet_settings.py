"""What the study of policies simulates: fleets, traces and their scaling, each with a made-up day in its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from llmbuild.fleet.simulate.trace import Asked, Trace, asked, read_trace
from llmbuild.spec.fleet import Fleet

CONV, CODE, MOONCAKE = "AzureLLMInferenceTrace_conv.csv", "AzureLLMInferenceTrace_code.csv", "mooncake_*.jsonl"
"""The files by name, or by pattern, in the folder of traces."""


@dataclass(frozen=True)
class Source:
    """A trace of a service: the file, and by how much its rate and its lengths are scaled."""

    service: str
    """Empty: of all services without one of their own."""
    file: str
    rate: float
    lengths: float


@dataclass(frozen=True)
class Study:
    """A fleet under traces: each is repeated to the length of the day, thinned or laid over itself, and bent to it."""

    name: str
    fleet: str
    """The recipe."""
    repeat: int
    """How many times each trace's hour comes: the length of the day in hours."""
    context: int
    """Tokens to which requests are cut."""
    sources: tuple[Source, ...]

    def traces(self, folder: Path, seed: int) -> dict[str, Trace]:
        """Return the traces by service; another seed keeps other requests where a rate is thinned.

        Raises:
            InputError: no such file.
        """
        return {one.service: self._trace(folder, one, seed) for one in self.sources}

    def _trace(self, folder: Path, one: Source, seed: int) -> Trace:
        found = sorted(folder.glob(one.file))
        whole = read_trace(found[0] if found else folder / one.file)
        scaled = whole.lengths(one.lengths, self.context).repeated(self.repeat)
        return scaled.at_rate(one.rate, seed).day()

    def requests(self, fleet: Fleet, folder: Path, seed: int) -> list[Asked]:
        """Return the requests of a seed, which begins at another hour of the day."""
        return asked(fleet, self.traces(folder, seed), seed)

    def fleet_with(self, fleet: Fleet, requests: Sequence[Asked]) -> Fleet:
        """Return a fleet whose file says the mean lengths of the requests, as one who knows his service writes it."""
        services = []
        for s, service in enumerate(fleet.services):
            kinds = []
            for c, kind in enumerate(service.classes):
                those = [one for one in requests if (one.service, one.kind) == (s, c)]
                prompt, output = mean(one.prompt for one in those), mean(one.output for one in those)
                kinds.append(replace(kind, prompt=round(prompt), output=max(1, round(output))))
            services.append(replace(service, classes=tuple(kinds)))
        return replace(fleet, services=tuple(services))


STUDIES = (
    Study("cpus-azure", "cpus", 1, 4096, (Source("chat", CONV, 0.5, 1.0), Source("code", CODE, 0.15, 0.25))),
    Study("cpus-mooncake", "cpus", 1, 4096, (Source("", MOONCAKE, 0.8, 0.05),)),
    Study("gpus-azure", "gpus", 4, 8192, (Source("chat", CONV, 0.4, 4.0), Source("code", CODE, 0.3, 0.75))),
    Study("gpus-mooncake", "gpus", 4, 6144, (Source("", MOONCAKE, 1.2, 0.5),)),
    Study("mig-azure", "mig", 4, 8192, (Source("", CONV, 0.25, 4.0), Source("code", CODE, 0.15, 1.0))),
    Study("mig-mooncake", "mig", 4, 8192, (Source("", MOONCAKE, 0.6, 0.5),)),
)
"""Lengths are such that each class can meet its SLO on some node; rates, such that peaks take several replicas."""
