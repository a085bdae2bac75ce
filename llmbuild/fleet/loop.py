"""The live loop: `observe` load and replicas, `decide` a target, `act` through a backend, `explain` on the way.

A policy decides once in a period, as in the simulator. Between its decisions the loop beats: it sees what has become
ready or has died, and comes nearer to the target. It knows no clock and no process: both are given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import (
    NAMES,
    Action,
    Actuator,
    Answer,
    Live,
    Route,
    SetClock,
    SetPartition,
    SetPower,
    Slot,
    Start,
    Stop,
    perform,
    slots_of,
)
from llmbuild.fleet.divide import Divided
from llmbuild.fleet.policy import Counted, Given, Observation, Policy, Seen, Target
from llmbuild.fleet.transition import Rates, Scene, steps
from llmbuild.spec.fleet import Fleet, Profile
from llmbuild.spec.partitions import GPUS, Layout, layout_of

SOUND_S = 10.0
"""A replica that dies within so many seconds of its start has failed to start."""
AGAIN_S, LONGEST_S = 1.0, 60.0
"""Seconds until a failed start is tried again, doubled each time, and the most of them."""
FAILED = 3
"""Failed starts in a row after which a node counts as failed."""


@dataclass(frozen=True)
class Traffic:
    """What the gateway has seen: since the last decision, and of the last moments."""

    seen: tuple[Seen, ...]
    queued: Mapping[int, int]
    """Requests without a first token, by service."""
    rates: Rates


@dataclass
class _Trouble:
    """Starts that failed in a row on a slot, and until when it is left alone."""

    count: int = 0
    until_s: float = 0.0


def given_live(fleet: Fleet, profiles: Sequence[Profile]) -> Given:
    """Return what a policy may know before a live fleet begins: the rates and lengths of the fleet file."""
    kinds = {(s, c): kind for s, one in enumerate(fleet.services) for c, kind in enumerate(one.classes)}
    bins = tuple(
        Counted(10.0 * i, {(s, c): 10.0 * fleet.services[s].rate * kind.share for (s, c), kind in kinds.items()})
        for i in range(6)
    )
    return Given(fleet, tuple(profiles), {key: (kind.prompt, kind.output) for key, kind in kinds.items()}, bins)


def permitted(fleet: Fleet) -> Fleet:
    """Return the fleet as it may be run: without clocks where the file does not allow to set them."""
    if "set_clock" in fleet.actuators:
        return fleet
    return replace(fleet, nodes=tuple(replace(node, clocks=()) for node in fleet.nodes))


def unseen(fleet: Fleet) -> Traffic:
    """Return the traffic before anything came: what the file says of lengths."""
    seen = tuple(
        Seen(s, c, 0, kind.prompt, kind.output)
        for s, service in enumerate(fleet.services)
        for c, kind in enumerate(service.classes)
    )
    return Traffic(seen, {}, {})


class Loop:
    """Holds the target, and what is under way. One class: target, closings and troubles change together."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        backend: Actuator,
        tell: Callable[[str], None],
        done: Callable[[Action, Answer], None] = lambda action, answer: None,
        out: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        """Take a fleet and who decides and acts; `out` says which nodes are out of service, at each beat."""
        self._fleet, self._policy, self._backend, self._tell, self._done = fleet, policy, backend, tell, done
        self._read_out, self._out, self._unread = out, frozenset[str](), ""
        self.target: Target = {}
        self._closed: set[str] = set()
        self._troubles: dict[Slot, _Trouble] = {}
        self._started: dict[Slot, float] = {}
        self._begun: dict[str, float] = {}
        self._ready: set[str] = set()
        self._clocks: dict[str, int] = {}
        self._layouts: dict[str, Layout] = {}
        self._changes: dict[str, float] = {}
        """Until when a node takes another layout; for ever where it could not be asked to."""
        self._next_s = self._last_s = 0.0

    def due(self, now: float) -> bool:
        """Return whether the policy decides in the next beat."""
        return now >= self._next_s - 1e-9

    def beat(self, now: float, traffic: Traffic) -> Sequence[Live]:
        """Come nearer to the target; return the replicas that take requests or will.

        `traffic.seen` is of the time since the last beat at which a decision was `due`.
        """
        live = list(self._backend.live())
        self._notice(live, now)
        live = [one for one in live if one.state != "dead"]
        if self.due(now):
            self._decide(now, traffic, live)
        self._notice_out()
        avoided = [slot for slot, trouble in self._troubles.items() if trouble.until_s > now]
        divided = self._divided(now)
        scene = Scene(live, frozenset(self._closed), traffic.rates, avoided, divided, self._out)
        for action in steps(self._fleet, self.target, scene):
            self._act(action, now)
        return self._kept(live)

    def _divided(self, now: float) -> Divided:
        changing = [node for node, until_s in self._changes.items() if now < until_s < inf]
        refused = [node for node, until_s in self._changes.items() if until_s == inf]
        return Divided(self._layouts, changing, refused)

    def _kept(self, live: Sequence[Live]) -> list[Live]:
        """Return the replicas that take requests or will."""
        return [one for one in live if one.state in ("starting", "ready") and one.name not in self._closed]

    # --- observe -----------------------------------------------------------------------------------------------------

    def _notice(self, live: Sequence[Live], now: float) -> None:
        """Tell what has changed, and remember where starts fail."""
        for one in live:
            began = self._begun.setdefault(one.name, self._started.pop(one.slot, now))
            if one.state == "ready" and one.name not in self._ready:
                self._ready.add(one.name)
                self._tell(f"ready    {one.name} at {one.url}, {now - began:.1f} s after its start")
            if one.state == "ready" and now - began >= SOUND_S:
                self._troubles.pop(one.slot, None)
            if one.state == "dead":
                self._died(one, now, began)

    def _notice_out(self) -> None:
        """Tell which nodes have been taken out of service, or given back; the policy then decides in the next beat."""
        try:
            named = frozenset(self._read_out())
        except InputError as error:  # whoever wrote it so is told, and those that were out stay out
            if str(error) != self._unread:
                self._unread = str(error)
                self._tell(f"error    {error}")
            return
        self._unread = ""
        out = named & {node for kind in self._fleet.nodes for node in kind.nodes}
        for node in sorted(out ^ self._out):
            self._tell(f"node     {node} is {'out of' if node in out else 'in'} service")
        if out != self._out:
            self._out, self._next_s = out, 0.0

    def _died(self, one: Live, now: float, began: float) -> None:
        asked = one.name in self._closed or one.told == ""
        self._tell(f"{'ended   ' if asked else 'died    '} {one.name}{': ' + one.told if one.told else ''}")
        if not asked and (one.name not in self._ready or now - began < SOUND_S):
            trouble = self._troubles.setdefault(one.slot, _Trouble())
            trouble.count += 1
            served = one.name in self._ready and trouble.count == 1  # it may have been killed: no reason to wait
            wait_s = 0.0 if served else min(LONGEST_S, AGAIN_S * 2 ** (trouble.count - 1))
            trouble.until_s = now + wait_s
            self._tell(f"waits    {one.slot.name}: {trouble.count} starts failed in a row, the next in {wait_s:.0f} s")
        self._closed.discard(one.name)
        self._ready.discard(one.name)
        self._begun.pop(one.name, None)

    def _observed(self, now: float, traffic: Traffic, live: Sequence[Live]) -> Observation:
        failed: Counter[str] = Counter()
        bad = {slot.node: slot.kind for slot, trouble in self._troubles.items() if trouble.count >= FAILED}
        bad |= {node: kind.name for kind in self._fleet.nodes for node in kind.nodes if node in self._out}
        failed.update(bad.values())
        taken = {one.slot for one in live}
        slots = slots_of(self._fleet, self._layouts)
        free = Counter(s.kind for s in slots if s not in taken and s.node not in bad)
        running = Counter(one.key for one in self._kept(live))
        period = now - self._last_s if now > 0 else self._fleet.period_s
        return Observation(now, period, traffic.seen, running, free, failed, traffic.queued)

    # --- decide ------------------------------------------------------------------------------------------------------

    def _decide(self, now: float, traffic: Traffic, live: Sequence[Live]) -> None:
        self._policy.observe(self._observed(now, traffic, live))
        target = {key: count for key, count in self._policy.decide().items() if count}
        if target != self.target:
            told = [f"{n} x {self._fleet.services[s].name} {point.name}" for (s, point), n in target.items()]
            self._tell(f"decides  {'; '.join(told) or 'nothing'}: {self._policy.explain()}")
        self.target, self._last_s = target, now
        while self._next_s <= now + 1e-9:
            self._next_s += self._fleet.period_s

    # --- act ---------------------------------------------------------------------------------------------------------

    def _act(self, action: Action, now: float) -> None:
        if isinstance(action, Start) and self._clocks.get(action.slot.node, 0) != action.point.clock.mhz:
            clock = SetClock(action.slot.node, action.point.clock.mhz, f"the point of {action.slot.name}")
            self._clocks[action.slot.node] = action.point.clock.mhz
            self._act(clock, now)
        answer = perform(self._fleet, self._backend, action)
        self._done(action, answer)
        if isinstance(action, Stop) or (isinstance(action, Route) and not action.open):
            self._closed.add(action.replica)
        if isinstance(action, SetPartition):
            self._partitioned(action, answer, now)
        if isinstance(action, Start):
            self._started[action.slot] = now
        if isinstance(action, Start) and answer.outcome != "applied":
            self._troubles.setdefault(action.slot, _Trouble()).until_s = now + AGAIN_S
        outcome = "" if answer.outcome == "applied" else f" -> {answer.outcome}"
        reason = f" ({answer.reason})" if answer.reason else ""
        self._tell(f"{told_of(self._fleet, action)}: {action.why}{outcome}{reason}")

    def _partitioned(self, action: SetPartition, answer: Answer, now: float) -> None:
        """Remember a node's other layout, or that it stays as it is."""
        kind = next(each for each in self._fleet.nodes if action.node in each.nodes)
        assert kind.partitions is not None
        if answer.outcome != "applied":
            self._changes |= dict.fromkeys(kind.nodes, inf)  # what cannot be done to one node cannot be to its like
            return
        self._changes[action.node] = now + kind.partitions.change.seconds
        gpu = GPUS[kind.partitions.gpu]
        self._layouts[action.node] = layout_of(
            each for name in action.layout if (each := gpu.slice_of(name.partition("@")[0])) is not None
        )


def told_of(fleet: Fleet, action: Action) -> str:
    """Return an action in words."""
    name = f"{NAMES[type(action)]:<8}"
    if isinstance(action, Start):
        return f"{name} {fleet.services[action.service].name} on {action.slot.name}: {action.point.name}"
    if isinstance(action, Route):
        return f"{name} {action.replica} {'open' if action.open else 'closed'}"
    if isinstance(action, SetClock):
        return f"{name} {action.node} {action.mhz} MHz"
    if isinstance(action, SetPower):
        return f"{name} {action.node} {action.watts:g} W"
    if isinstance(action, SetPartition):
        return f"{name} {action.node} {' '.join(action.layout)}"
    return f"{name} {action.replica}"
