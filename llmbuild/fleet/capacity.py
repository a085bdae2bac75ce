"""How many requests a second a replica takes while its class's SLO holds, and what it draws then.

The steady state of a batch: with a rate r of requests with P prompt and O output tokens, a step takes
t = decode(rows) + prompt_s * r * P * t, and rows = r * O * t. From it come the shares of requests that miss:

- TPOT of an answer of o tokens: the prompts of others that fall into it are Poisson with mean r * o * t; one of them
  may be long enough alone.
- TTFT: a wait for a slot (Erlang's C over what a full batch answers), a wait for other prompts (M/G/1, a step takes
  whole prompts up to its budget), the step that runs, and the own prompt.

Rates are found by bisection. The simulator judges these figures: a plan made of them must attain there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

from llmbuild.spec.fleet import UNSET, Clock, NodeClass, Profile, RequestClass, StepPower, StepTime
from llmbuild.spec.partitions import Slice

PROMPT_TOKENS = 512
"""Prompt tokens that the scheduler `fcfs` puts into one step."""
EDGES = (0.0, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 0.98, 0.99, 0.995, 1.0)
"""Quantiles between which lengths are taken as one: narrow at the ends, where requests miss."""
FULL = 0.92
"""Share of what a full replica answers that a plan asks of it: above it, queues last too long to be called steady."""
_NORMAL = NormalDist()
_WEIGHTS = tuple(b - a for a, b in pairwise(EDGES))
_NORMALS = tuple(_NORMAL.inv_cdf((a + b) / 2) for a, b in pairwise(EDGES))
_HALVINGS = 24
_CLOSE = 0.005
"""Relative width at which a rate is found."""


@dataclass(frozen=True)
class OperatingPoint:
    """A variant on a class of nodes, with a batch limit and a clock."""

    profile: Profile
    node: NodeClass
    batch: int
    clock: Clock = UNSET
    part: Slice | None = None
    """The slice that it runs on; None: a whole slot."""

    @property
    def memory_bytes(self) -> float:
        """Return the memory of its slot."""
        return self.node.memory_bytes if self.part is None else self.part.memory_bytes

    @property
    def bare_w(self) -> float:
        """Return the watts of its slot without a replica: of a slice, its share of the board's."""
        return self.node.bare_w * (1.0 if self.part is None else self.part.memory_share)

    @property
    def parked_w(self) -> float:
        """Return the watts of its slot with a replica that has no requests."""
        return self.node.parked_w * (1.0 if self.part is None else self.part.memory_share)

    @property
    def place(self) -> str:
        """Return the class of nodes, and the slice, in words."""
        return self.node.name if self.part is None else f"{self.node.name} {self.part.name}"

    @property
    def step(self) -> StepTime:
        """Return the seconds of its steps."""
        return self.profile.step if self.clock is UNSET else self.profile.step.at_clock(self.clock)

    @property
    def power(self) -> StepPower | None:
        """Return the watts of its steps; None where they are not known."""
        power = self.profile.power
        return power if power is None or self.clock is UNSET else power.at_clock(self.clock)

    @property
    def kv_tokens(self) -> float:
        """Return how many positions of keys and values a slot holds beside the weights."""
        room = self.memory_bytes * MEMORY_SHARE - self.profile.weights_bytes
        kept = self.profile.kv_bytes_per_token
        return math.inf if not kept and room >= 0 else max(0.0, room) / kept if kept else 0.0

    @property
    def name(self) -> str:
        """Return it in words."""
        clock = "" if self.clock is UNSET else f" {self.clock.mhz} MHz"
        return f"{self.profile.variant} on {self.place}, batch {self.batch}{clock}"


MEMORY_SHARE = 0.9
"""Of a slot's memory that weights and keys and values may take; vLLM's default."""


@dataclass(frozen=True)
class Steady:
    """A replica at a steady rate: mean rows and seconds of a step, watts, and shares of requests that miss."""

    rate: float
    rows: float
    step_s: float
    watts: float
    ttft_miss: float
    tpot_miss: float

    @property
    def miss(self) -> float:
        """Return the share of requests that miss, at most."""
        return min(1.0, self.ttft_miss + self.tpot_miss)


@dataclass(frozen=True)
class Capacity:
    """The rate up to which a class's SLO holds on a replica, and watts as a line over the upper half of rates."""

    rate: float
    base_w: float
    """Of a replica in use, from the line's end at no load."""
    joules: float
    """Of each request, above it."""


NONE = Capacity(0.0, 0.0, 0.0)


@lru_cache(1 << 16)
def capacity(point: OperatingPoint, kind: RequestClass, attainment: float) -> Capacity:
    """Return what a replica takes of one class: nothing where a full batch decodes too slowly for it."""
    high = _most(point, kind)
    full = point.step.seconds(point.batch, point.batch * _context(kind), 0)
    if high <= 0 or full > kind.tpot_s or steady(point, kind, high * 1e-3).miss > 1 - attainment:
        return NONE
    low = high * 1e-3
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if steady(point, kind, middle).miss <= 1 - attainment:
            low = middle
        else:
            high = middle
        if high - low < _CLOSE * low:
            break
    full, half = steady(point, kind, low).watts, steady(point, kind, low / 2).watts
    joules = max(0.0, (full - half) / (low / 2))
    return Capacity(low, max(point.parked_w, full - joules * low), joules)


def floor(point: OperatingPoint, kind: RequestClass) -> tuple[float, float]:
    """Return the TTFT and TPOT of a mean request on an idle replica, in seconds."""
    step = point.step
    return step.seconds(0, 0, kind.prompt) + step.request_s, step.seconds(1, kind.prompt + kind.output / 2, 0)


def _most(point: OperatingPoint, kind: RequestClass) -> float:
    """Return the requests a second that a replica with all its slots taken answers."""
    slots = _slots(point, kind)
    if slots < 1:
        return 0.0
    step_s = point.step.seconds(slots, slots * _context(kind), 0)
    return slots / (kind.output * step_s + slots * (point.step.prompt_s * kind.prompt + point.step.request_s))


def _slots(point: OperatingPoint, kind: RequestClass) -> float:
    """Return how many requests run at a time at most: the batch limit, or what the memory holds."""
    return min(float(point.batch), point.kv_tokens / (kind.prompt + kind.output))


def _context(kind: RequestClass) -> float:
    """Return the positions that a decoding row sees on average: long answers are there for longer."""
    return kind.prompt + kind.output * (1 + kind.spread**2) / 2


def steady(point: OperatingPoint, kind: RequestClass, rate: float) -> Steady:
    """Return the steady state of a replica at a rate of requests of one class."""
    step, context = point.step, _context(kind)
    prompts = rate * (step.prompt_s * kind.prompt + step.request_s)
    slots, most = _slots(point, kind), _most(point, kind)
    rows, t = _rows(step, context, kind.output * rate, prompts, slots)
    if rate > FULL * most or prompts >= 1:
        return Steady(rate, rows, t, 0.0, 1.0, 1.0)
    watts = _watts(point, rows, prompts)
    high = min(slots, rows + 2.33 * math.sqrt(rows))
    peak = step.seconds(high, high * context, 0) / (1 - prompts)
    return Steady(
        rate,
        rows,
        t,
        watts,
        _ttft_miss(step, kind, rate, t, slots, most),
        _tpot_miss(step, kind, rate, step.seconds(high, high * context, 0), peak),
    )


def _rows(step: StepTime, context: float, tokens: float, prompts: float, most: float) -> tuple[float, float]:
    """Return mean rows and mean seconds of a step, with `tokens` a second and a share `prompts` of prompt work."""
    if prompts >= 1:
        return most, math.inf
    low, high = 0.0, most
    for _ in range(30):  # rows that a step makes room for grow with rows, so the balance is found by halving
        rows = (low + high) / 2
        made = tokens * step.seconds(max(rows, 1.0), rows * context, 0) / (1 - prompts)
        low, high = (rows, high) if made > rows else (low, rows)
        if high - low < 1e-3:
            break
    return high, step.seconds(max(high, 1.0), high * context, 0) / (1 - prompts)


def _watts(point: OperatingPoint, rows: float, prompts: float) -> float:
    """Return the mean watts of a replica's slot."""
    power, parked = point.power, point.parked_w
    if power is None:
        return parked
    busy = 1 - math.exp(-rows)
    decode = max(parked, power.rows_w(max(rows / busy, 1.0))) if busy > 0 else parked
    prompts = min(prompts, busy)
    return parked * (1 - busy) + decode * (busy - prompts) + max(parked, power.prompt_w) * prompts


@lru_cache(1 << 12)
def _lengths(mean: float, spread: float) -> tuple[tuple[float, float], ...]:
    """Return log-normal lengths, each with its share."""
    if not spread:
        return ((mean, 1.0),)
    sigma = math.sqrt(math.log1p(spread**2))
    lengths = (max(1.0, mean * math.exp(sigma * z - sigma * sigma / 2)) for z in _NORMALS)
    return tuple(zip(lengths, _WEIGHTS, strict=True))


def _tpot_miss(step: StepTime, kind: RequestClass, rate: float, decode_s: float, peak_s: float) -> float:
    """Return the share of answers whose tokens come too slowly."""
    if math.isinf(kind.tpot_s):
        return 0.0
    if decode_s > kind.tpot_s:
        return 1.0
    prompt_s = step.request_s + step.prompt_s * kind.prompt * (
        1 + kind.spread**2
    )  # a prompt that falls into an answer, by its length
    own_s = (
        peak_s + step.request_s + step.prompt_s * kind.prompt
    )  # what comes while the own prompt is computed falls into the answer
    missed = 0.0
    for output, share in _lengths(kind.output, kind.spread):
        if output < 1.5:
            continue  # one token: there is no time between tokens
        room = (kind.tpot_s - decode_s) * (output - 1)
        fallen = rate * ((output - 1) * peak_s + own_s)
        several = _poisson_above(fallen, room / prompt_s)
        one = 1 - math.exp(-fallen * _longer((room - step.request_s) / step.prompt_s, kind.prompt, kind.spread))
        missed += share * min(1.0, several + one)
    return missed


def _longer(tokens: float, mean: float, spread: float) -> float:
    """Return the share of log-normal lengths above so many tokens."""
    if not spread:
        return float(mean > tokens)
    if tokens <= 0:
        return 1.0
    sigma = math.sqrt(math.log1p(spread**2))
    return 1 - _NORMAL.cdf((math.log(tokens / mean) + sigma * sigma / 2) / sigma)


def _poisson_above(mean: float, limit: float) -> float:
    """Return the probability of more than `limit` events."""
    if mean > 30:
        return 1 - NormalDist(mean, math.sqrt(mean)).cdf(limit + 0.5)
    term = total = math.exp(-mean)
    for i in range(1, int(limit) + 1):
        term *= mean / i
        total += term
        if term < 1e-12 and i > mean:
            break
    return max(0.0, 1 - total)


def _ttft_miss(step: StepTime, kind: RequestClass, rate: float, t: float, slots: float, most: float) -> float:
    """Return the share of requests whose first token comes too late."""
    if math.isinf(kind.ttft_s):
        return 0.0
    lengths = _lengths(kind.prompt, kind.spread)
    more_s = step.request_s
    served = [(more_s + step.prompt_s * p + t * min(1.0, p / PROMPT_TOKENS), share) for p, share in lengths]
    mean, square = sum(s * share for s, share in served), sum(s * s * share for s, share in served)
    used = rate * mean
    if used >= 1:
        return 1.0
    wait = rate * square / (2 * (1 - used))
    queued = _erlang_c(slots, slots * rate / most)
    missed = 0.0
    for prompt, share in lengths:
        left = kind.ttft_s - more_s - step.prompt_s * prompt - 2 * t  # the step that runs, and the own one
        if left <= 0:
            missed += share
            continue
        prompts = used * math.exp(-used * left / (2 * wait)) if wait > 0 else 0.0
        missed += share * min(1.0, prompts + queued * math.exp(-(most - rate) * left))
    return missed


def _erlang_c(servers: float, load: float) -> float:
    """Return the probability that a request finds all servers taken."""
    whole = max(1, int(servers))
    if load >= whole:
        return 1.0
    blocked = 1.0
    for i in range(1, whole + 1):
        blocked = load * blocked / (i + load * blocked)
    return blocked / (1 - load / whole * (1 - blocked))
