"""Fair shares of tenants: whoever was served least is admitted next.

After Sheng et al., "Fairness in Serving Large Language Models" (virtual token counters), OSDI 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmbuild.serve.schedule.room import least, piece
from llmbuild.serve.schedule.state import Batch, Entry, Share, State

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""What a computed token of a prompt, and one of an answer, count as service."""


class Accounts:
    """The service of each tenant. One that comes back is lifted to the least of those that are there: none saves up."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._active: dict[str, int] = {}

    @property
    def served(self) -> Mapping[str, float]:
        """The service of each tenant."""
        return self._served

    def arrived(self, tenant: str) -> None:
        """Note a request of a tenant."""
        if not self._active.get(tenant):
            least_served = min((self._served[one] for one in self._active), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), least_served)
        self._active[tenant] = self._active.get(tenant, 0) + 1

    def ended(self, tenant: str) -> None:
        """Note that a request of a tenant has ended."""
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]

    def prompt(self, tenant: str, tokens: int) -> None:
        """Charge a prompt, when it is admitted."""
        self._served[tenant] += PROMPT_WEIGHT * tokens

    def token(self, tenant: str) -> None:
        """Charge a token of an answer."""
        self._served[tenant] += OUTPUT_WEIGHT


@dataclass(frozen=True)
class Vtc:
    """Runs all decodes and begun prompts, then admits of the tenant that was served least, each in its own order.

    Where the next request of that tenant does not fit, nobody overtakes it. A step has up to `budget` tokens, as with
    `Sarathi`.
    """

    budget: int = 96
    cut: int = 1

    def __call__(self, state: State, now_s: float) -> Batch:
        """Return the next batch."""
        shares = [Share(one.number, 1) for one in state.running if one.decoding]
        left, begun = self.budget - len(shares), False
        slots, parts = state.slots, state.room
        prompts = [one for one in state.running if not one.decoding]
        known = {one.number for one in prompts}
        for one in (*prompts, *_by_service(state.waiting, state.service)):
            waits = one.number not in known
            if waits and (slots <= 0 or one.takes > parts):
                break
            count = piece(one, left, self.cut) or (0 if begun else least(one, self.cut))
            if not count:
                break
            if waits:
                slots, parts = slots - 1, parts - one.takes
            left, begun = left - count, True
            shares.append(Share(one.number, count))
        return Batch(tuple(shares))


def _by_service(waiting: Iterable[Entry], service: Mapping[str, float]) -> list[Entry]:
    """Return those that wait in the order in which they would be admitted, each charged with its prompt, once."""
    queues: dict[tuple[int, str], list[Entry]] = {}
    for one in waiting:
        queues.setdefault((one.priority, one.tenant), []).append(one)
    served = {tenant: service.get(tenant, 0.0) for _, tenant in queues}
    found: list[Entry] = []
    while queues:
        place = min(queues, key=lambda key: (key[0], served[key[1]], queues[key][0].number))
        one = queues[place].pop(0)
        if not queues[place]:
            del queues[place]
        served[one.tenant] += 0 if one.tokens else PROMPT_WEIGHT * one.pending
        found.append(one)
    return found
