"""What is coming: a level, its rise until a new replica serves, and a head-room, all from recent windows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import replace

from llmbuild.fleet.plan.load import Demand, Load
from llmbuild.fleet.policy import WINDOW_S, Observation
from llmbuild.spec.fleet import Fleet

BIN_S = WINDOW_S
"""Seconds of the windows that rates are taken over: a shorter one takes the chance of arrivals for a change."""
KEPT = 20
"""Windows whose errors make the head-room."""
GUESS, GUESSES = 0.25, 5
"""Relative error that is taken for granted before errors are seen, and how many windows it stands for."""
ABOVE, MOST_KEPT = 1.3, 60
"""No forecast is more than this times the largest rate of so many windows: an hour."""
Z = 1.64
"""Standard deviations of the errors that are head-room: normal errors are below it in 95 % of the windows."""
FEWEST = 6
"""Windows without which no line is drawn through them."""
_LEVEL = 0.4
_GRID = 0.1
"""Steps of the logarithm at which lengths are taken, so that equal plans are not made again."""


class Forecast:
    """The rate of each class that is not exceeded with a stated quantile, if errors go on as they were."""

    def __init__(self, fleet: Fleet, z: float = Z, ahead_s: float = 0.0) -> None:
        """Begin with no rates. `ahead_s` are the seconds for which a rise is taken to go on."""
        self._fleet, self._z, self._ahead_s = fleet, z, ahead_s
        self._lately: deque[tuple[float, dict[tuple[int, int], float]]] = deque()
        self.last: dict[tuple[int, int], float] = {}
        """Rates of the window that ended last."""
        self._keys = [(s, c) for s, service in enumerate(fleet.services) for c in range(len(service.classes))]
        self._level: dict[tuple[int, int], float] = {}
        self._errors: dict[tuple[int, int], deque[float]] = {key: deque(maxlen=KEPT) for key in self._keys}
        self._most: dict[tuple[int, int], deque[float]] = {key: deque(maxlen=MOST_KEPT) for key in self._keys}
        self._rates: dict[tuple[int, int], deque[float]] = {key: deque(maxlen=KEPT) for key in self._keys}
        self._rise = dict.fromkeys(self._keys, 0.0)
        self._open = dict.fromkeys(self._keys, 0.0)
        self._passed_s = 0.0
        self.kinds = {(s, c): fleet.services[s].classes[c] for s, c in self._keys}
        self.covered = self.windows = 0

    def begin(self, rates: dict[tuple[int, int], float]) -> None:
        """Take the rates that time begins with, and a guess of how far off they are."""
        self._level = {key: rates.get(key, 0.0) for key in self._keys}
        for key, rate in self._level.items():
            self._errors[key] += [GUESS * rate] * GUESSES
            self._most[key].append(rate)

    def observe(self, seen: Observation) -> bool:
        """Take the arrivals of a period; return whether a window has ended with it."""
        for one in seen.seen:
            key = one.service, one.kind
            self._open[key] += one.arrivals
            kind = self._fleet.services[one.service].classes[one.kind]
            self.kinds[key] = replace(kind, prompt=_near(one.prompt), output=max(1.0, _near(one.output)))
        if seen.now_s > 0:
            self._passed_s += seen.period_s
            self._lately.append((seen.period_s, {(one.service, one.kind): one.arrivals for one in seen.seen}))
        while len(self._lately) > 1 and sum(s for s, _ in self._lately) - self._lately[0][0] >= BIN_S - 1e-9:
            self._lately.popleft()
        if self._passed_s < BIN_S - 1e-9:
            return False
        self._close()
        return True

    def _close(self) -> None:
        """End a window: the level follows it, and its error is kept."""
        for key in self._keys:
            rate = self.last[key] = self._open[key] / self._passed_s
            self.windows += 1
            self.covered += rate <= self._rate(key)
            level = self._level.get(key, rate)
            self._errors[key].append(rate - level)
            self._most[key].append(rate)
            self._rates[key].append(rate)
            self._rise[key] = rise(self._rates[key]) * self._ahead_s / BIN_S if self._ahead_s else 0.0
            self._level[key] = level + _LEVEL * (rate - level)
            self._open[key] = 0.0
        self._passed_s = 0.0

    def _rate(self, key: tuple[int, int]) -> float:
        errors = self._errors[key]
        spread = math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else 0.0
        level = self._level.get(key, 0.0)
        most = max(self._most[key], default=level)
        return max(0.0, min(level + self._rise[key] + self._z * spread, max(level, most) * ABOVE))

    def rates(self) -> dict[tuple[int, int], float]:
        """Return the rates that are forecast."""
        return {key: self._rate(key) for key in self._keys}

    def now(self) -> dict[tuple[int, int], float]:
        """Return the rates of the last `BIN_S` seconds, wherever a window began."""
        seconds = max(BIN_S, sum(s for s, _ in self._lately))
        return {key: sum(counts.get(key, 0.0) for _, counts in self._lately) / seconds for key in self._keys}

    def load(self, rates: dict[tuple[int, int], float]) -> Load:
        """Return a load of these rates, with the lengths that were seen."""
        services = self._fleet.services
        return Load(tuple(Demand(services[s].name, self.kinds[s, c], rates[s, c]) for s, c in self._keys))


def rise(rates: Collection[float]) -> float:
    """Return by how much rates rise from one window to the next: the slope of a line through them, less its standard
    error; 0 where that is not above 0, or where few are known.
    """
    n = len(rates)
    if n < FEWEST:
        return 0.0
    middle, mean = (n - 1) / 2, sum(rates) / n
    square = n * (n * n - 1) / 12
    slope = sum((i - middle) * rate for i, rate in enumerate(rates)) / square
    off = sum((rate - mean - slope * (i - middle)) ** 2 for i, rate in enumerate(rates))
    return max(0.0, slope - math.sqrt(off / (n - 2) / square))


def _near(length: float) -> float:
    return math.exp(round(math.log(max(1.0, length)) / _GRID) * _GRID)
