"""Traces of requests: read, scaled with every factor stated, and given to the services of a fleet by a seed."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from llmbuild.errors import InputError
from llmbuild.spec.fleet import Fleet, RequestClass, Service

AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
STEADY = "steady"
"""In place of a file: Poisson arrivals at the rates of the fleet file, with its lengths."""

DAY = ((0, 0.3), (5, 0.2), (8, 1.0), (10, 1.7), (12.5, 1.3), (15, 1.8), (18, 1.2), (21, 0.7), (24, 0.3))
"""A made-up day: hours and relative rates, with straight lines between them; a peak in the morning and one behind noon.
"""
BLOCK = 512
"""Tokens of a prompt that each of Mooncake's `hash_ids` stands for."""


class Arrival(NamedTuple):
    """One request of a trace: seconds from its start, tokens of the prompt and of the answer."""

    at_s: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival, and what was done to them."""

    name: str
    arrivals: tuple[Arrival, ...]
    seconds: float
    told: tuple[str, ...] = ()
    """What was scaled, by how much, and what it changed."""

    @property
    def rate(self) -> float:
        """Return the mean requests a second."""
        return len(self.arrivals) / self.seconds if self.seconds else 0.0

    @property
    def variation(self) -> float:
        """Return the coefficient of variation of the times between arrivals."""
        times = [a.at_s for a in self.arrivals]
        gaps = [b - a for a, b in pairwise(times)]
        return _variation(gaps)

    def window(self, seconds: float) -> Trace:
        """Return the first seconds of the trace."""
        if seconds >= self.seconds:
            return self
        kept = tuple(a for a in self.arrivals if a.at_s < seconds)
        return replace(self, arrivals=kept, seconds=seconds, told=(*self.told, f"the first {seconds:g} s"))

    def lengths(self, factor: float, context: int | None = None) -> Trace:
        """Return the trace with its lengths scaled, and cut to a context; both at least one token."""
        if factor == 1 and context is None:
            return self
        scaled = [(max(1, round(a.prompt * factor)), max(1, round(a.output * factor))) for a in self.arrivals]
        most = context or max((p + o for p, o in scaled), default=2)
        cut = sum(p + o > most for p, o in scaled)
        kept = tuple(
            Arrival(a.at_s, min(p, most - min(o, most // 2)), min(o, most - min(p, most - min(o, most // 2))))
            for a, (p, o) in zip(self.arrivals, scaled, strict=True)
        )
        told = [f"lengths x{factor:g}"] if factor != 1 else []
        told += [f"{cut / max(1, len(scaled)):.1%} of the requests cut to {most} tokens"] if context else []
        return replace(self, arrivals=kept, told=(*self.told, *told))

    def at_rate(self, factor: float, seed: int = 0) -> Trace:
        """Return the trace at another rate: thinned, or laid over itself at other offsets.

        Both change how bursty it is; the coefficients of variation before and after are stated.
        """
        if factor == 1:
            return self
        rng = random.Random(f"rate {seed}")
        found = []
        whole, part = int(factor), factor - int(factor)
        for i in range(whole + (part > 0)):
            offset = 0.0 if i == 0 else rng.random() * self.seconds
            kept = self.arrivals if i < whole else [a for a in self.arrivals if rng.random() < part]
            found += [Arrival((a.at_s + offset) % self.seconds, a.prompt, a.output) for a in kept]
        found.sort()
        made = replace(self, arrivals=tuple(found))
        how = "thinned" if factor < 1 else "laid over itself at random offsets"
        told = f"rate x{factor:g}, {how}: CV of gaps {self.variation:.1f} before, {made.variation:.1f} after"
        return replace(made, told=(*self.told, told))

    def repeated(self, times: int) -> Trace:
        """Return the trace so many times, one after another."""
        if times == 1:
            return self
        passes = range(times)
        arrivals = tuple(a._replace(at_s=a.at_s + i * self.seconds) for i in passes for a in self.arrivals)
        told = f"{times} times, one after another"
        return replace(self, arrivals=arrivals, seconds=times * self.seconds, told=(*self.told, told))

    def day(self) -> Trace:
        """Return the trace with a made-up day in its length: all its requests in their order, closer where the day's
        rate is higher, at the same mean rate.
        """
        kept = tuple(a._replace(at_s=self.seconds * _hour(a.at_s / self.seconds) / 24) for a in self.arrivals)
        mean = _passed(24) / 24
        low, high = (pick(rate / mean for _, rate in DAY) for pick in (min, max))
        peaks = "peaks at 10 and 15 h"
        told = f"a made-up day of 24 h in {self.seconds:g} s: rate x{low:.2f} at 5 h to x{high:.2f}, {peaks}"
        return replace(self, arrivals=kept, told=(*self.told, told))

    def turned(self, share: float) -> Trace:
        """Return the trace begun at another place, its beginning put behind its end."""
        offset = share * self.seconds
        turned = sorted(Arrival((a.at_s - offset) % self.seconds, a.prompt, a.output) for a in self.arrivals)
        return replace(self, arrivals=tuple(turned))


class Asked(NamedTuple):
    """A request to a service of the fleet; numbers are in the order of arrival."""

    number: int
    at_s: float
    service: int
    kind: int
    prompt: int
    output: int


def _passed(hour: float) -> float:
    """Return the integral of a day's rate up to an hour."""
    found = 0.0
    for (begin, low), (end, high) in pairwise(DAY):
        part = min(max(hour - begin, 0.0), end - begin)
        found += part * (low + (high - low) * part / (end - begin) / 2)
    return found


def _hour(share: float) -> float:
    """Return the hour up to which a share of a day's requests has come."""
    left = share * _passed(24)
    for (begin, low), (end, high) in pairwise(DAY):
        whole = (end - begin) * (low + high) / 2
        if left <= whole:
            slope = (high - low) / (end - begin)
            return begin + 2 * left / (low + math.sqrt(max(0.0, low * low + 2 * slope * left)))
        left -= whole
    return 24.0


def read_trace(path: Path) -> Trace:
    """Return the trace of a file: Azure's CSV of 2023, or Mooncake's JSON lines.

    Raises:
        InputError: no such file, or a line that is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such trace: name a CSV of Azure, a .jsonl of Mooncake, or `{STEADY}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    lines = text.splitlines()
    if not lines:
        raise InputError(f"{path}: empty")
    rows = _azure(path, lines) if lines[0].split(",") == AZURE_HEADER else _mooncake(path, lines)
    if not rows:
        raise InputError(f"{path}: no request in it")
    rows.sort()
    start = rows[0].at_s
    arrivals = tuple(Arrival(row.at_s - start, row.prompt, row.output) for row in rows)
    seconds = arrivals[-1].at_s
    if not seconds > 0:
        raise InputError(f"{path}: all requests come at one time: a trace needs some length")
    return Trace(path.name, arrivals, math.ceil(seconds + seconds / len(arrivals)))


def _azure(path: Path, lines: Sequence[str]) -> list[Arrival]:
    found = []
    for number, cells in enumerate(csv.reader(lines[1:]), 2):
        if not cells:
            continue
        try:
            at, prompt, output = cells
            stamp, _, fraction = at.partition(".")
            seconds = datetime.fromisoformat(f"{stamp}+00:00").timestamp() + float(f"0.{fraction or 0}")
            found.append(_arrival(seconds, int(prompt), int(output)))
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}: a row is TIMESTAMP,ContextTokens,GeneratedTokens") from None
    return found


def _mooncake(path: Path, lines: Sequence[str]) -> list[Arrival]:
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_of_mooncake(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}:{number}: {told}: neither Azure's CSV nor Mooncake's JSON lines") from None
    return found


def _of_mooncake(body: object) -> Arrival:
    """Return the request of a line. Its `hash_ids` are checked and left: no replica of a simulation keeps prompts."""
    if not isinstance(body, dict):
        raise TypeError("no object")
    at_ms, prompt, output = (body[name] for name in ("timestamp", "input_length", "output_length"))
    if type(at_ms) not in (int, float) or type(prompt) is not int or type(output) is not int:
        raise TypeError(f"{at_ms!r}, {prompt!r} and {output!r} are no time in ms and two counts of tokens")
    names = body.get("hash_ids")
    if names is not None:
        if not isinstance(names, list) or not all(type(one) is int and one >= 0 for one in names):
            raise TypeError("hash_ids is no list of whole numbers")
        if len(names) != -(-prompt // BLOCK):
            raise ValueError(f"{len(names)} hash_ids for {prompt} tokens: there is one for each {BLOCK}")
    return _arrival(at_ms / 1e3, prompt, output)


def _arrival(at_s: float, prompt: int, output: int) -> Arrival:
    if prompt < 0 or output < 0 or not math.isfinite(at_s):
        raise ValueError(f"a request of {prompt} and {output} tokens at {at_s} s")
    return Arrival(at_s, max(1, prompt), max(1, output))


def steady_trace(fleet: Fleet, seconds: float, seed: int) -> list[Asked]:
    """Return Poisson arrivals at the rates of a fleet file, with log-normal lengths of its classes."""
    rng = random.Random(f"steady {seed}")
    found: list[tuple[float, int, int, int, int]] = []
    for s, service in enumerate(fleet.services):
        for c, kind in enumerate(service.classes):
            at = rng.expovariate(service.rate * kind.share)
            while at < seconds:
                found.append((at, s, c, _length(rng, kind.prompt, kind), _length(rng, kind.output, kind)))
                at += rng.expovariate(service.rate * kind.share)
    found.sort()
    return [Asked(i, *one) for i, one in enumerate(found)]


def _length(rng: random.Random, mean: float, kind: RequestClass) -> int:
    if not kind.spread:
        return max(1, round(mean))
    sigma = math.sqrt(math.log1p(kind.spread**2))
    return max(1, round(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)))


def asked(fleet: Fleet, traces: Mapping[str, Trace], seed: int) -> list[Asked]:
    """Return the requests of traces by service name; the empty name is for services without one.

    A seed turns the traces to another beginning, and draws services by their rates and classes by their shares.
    Seed 0 begins where the traces do.
    """
    rng = random.Random(f"asked {seed}")
    found: list[tuple[float, int, int, int, int]] = []
    for name in sorted(traces):
        trace = traces[name] if seed == 0 else traces[name].turned(rng.random())
        those = [s for s, one in enumerate(fleet.services) if (one.name == name if name else one.name not in traces)]
        rates = [fleet.services[s].rate for s in those]
        if not those:
            continue
        for arrival in trace.arrivals:
            s = those[0] if len(those) == 1 else rng.choices(those, rates)[0]
            found.append((arrival.at_s, s, _class(rng, fleet.services[s]), arrival.prompt, arrival.output))
    found.sort()
    return [Asked(i, *one) for i, one in enumerate(found)]


def _class(rng: random.Random, service: Service) -> int:
    if len(service.classes) == 1:
        return 0
    return rng.choices(range(len(service.classes)), [kind.share for kind in service.classes])[0]


def _variation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    square = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(square) / mean if mean else 0.0
