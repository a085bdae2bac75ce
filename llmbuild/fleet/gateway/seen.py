"""What the gateway sees of requests, as policies are told it: arrivals, lengths, queues, rates of the last moments."""

from __future__ import annotations

from collections import Counter, deque

from llmbuild.fleet.gateway.correct import Correction
from llmbuild.fleet.loop import Traffic
from llmbuild.fleet.policy import Seen
from llmbuild.spec.fleet import Fleet

MOMENT_S = 10.0
"""Seconds over which the load of the moment is taken."""
_LEAST_S = 2.0
"""Fewer seconds say nothing of a rate."""
_LEARN = 0.01
"""Weight of a request in the running means of lengths."""
_CHARACTERS = 3.0
"""Characters of a token of a prompt, before any was counted."""

Key = tuple[int, int]


class Watch:
    """Counts requests by service and class; only the event loop's thread calls it."""

    def __init__(self, fleet: Fleet, now: float) -> None:
        self._kinds = {(s, c): kind for s, one in enumerate(fleet.services) for c, kind in enumerate(one.classes)}
        self._began = now
        self._arrived: Counter[Key] = Counter()
        self._lengths = {key: [kind.prompt, kind.output] for key, kind in self._kinds.items()}
        self._recent: deque[tuple[float, Key]] = deque()
        self._characters = [_CHARACTERS for _ in fleet.services]
        self.corrections = [Correction() for _ in fleet.services]
        self.waiting: Counter[int] = Counter()
        """Requests without a first token, by service."""

    def tokens_of(self, service: int, characters: int) -> int:
        """Return an estimate of the tokens of a prompt."""
        return max(1, round(characters / self._characters[service]))

    def arrived(self, key: Key, now: float) -> None:
        """Count a request."""
        self._arrived[key] += 1
        self._recent.append((now, key))

    def ended(self, key: Key, characters: int, prompt: int, output: int) -> None:
        """Learn the lengths of a request that was answered, in tokens."""
        lengths = self._lengths[key]
        lengths[0] += _LEARN * (prompt - lengths[0])
        lengths[1] += _LEARN * (output - lengths[1])
        if characters and prompt:
            ratio = self._characters[key[0]]
            self._characters[key[0]] = ratio + 0.1 * (characters / prompt - ratio)

    def output(self, key: Key) -> float:
        """Return the mean tokens of an answer."""
        return self._lengths[key][1]

    def traffic(self, now: float, decides: bool) -> Traffic:
        """Return what was seen; for a decision the arrivals since the last one, which are counted anew then."""
        while self._recent and self._recent[0][0] < now - MOMENT_S:
            self._recent.popleft()
        window = min(MOMENT_S, max(_LEAST_S, now - self._began))
        counts = Counter(key for _, key in self._recent)
        factors = [one.factor for one in self.corrections]
        seen = tuple(Seen(*key, self._arrived[key] * factors[key[0]], *self._lengths[key]) for key in self._kinds)
        if decides:
            self._arrived.clear()
        rates = {key: counts[key] / window * factors[key[0]] for key in self._kinds}
        return Traffic(seen, dict(self.waiting), rates)
