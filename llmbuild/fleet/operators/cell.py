"""A cell: devices that hold a model's operators once, and what a step of it takes with its queues and links.

Batches go round: each runs through the layers, from device to device, and begins anew. Several are in flight, so that
devices work at the same time; where two meet on a device one waits. That is a closed network of queues, solved by mean
values (Reiser 1979, first come first served with general service times). A batch that is alone never waits: a whole
model on one device takes the sum of its operators, and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

from llmbuild.fleet.capacity import MEMORY_SHARE, PROMPT_TOKENS, OperatingPoint
from llmbuild.fleet.operators.placement import Placement
from llmbuild.fleet.operators.profile import Kind, OperatorProfile
from llmbuild.fleet.profiles.published import LOAD_S
from llmbuild.spec.fleet import Line, NodeClass, Profile, RequestClass, StepPower, StepTime

Phase = Literal["both", "prompt", "decode"]
"""What a cell does: all of a request, its prompt alone, or its answer alone."""
PROMPT_PART = 0.8
"""Of the TTFT, for the prompt where phases are apart."""
IN_FLIGHT = 6
"""Batches of a cell that are in flight at most."""
_LEAST_S = 1e-12
"""Of a prompt token where there are none."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Rows at which steps are computed; between them lines are drawn."""
MOST_ROWS = 512
"""Rows for each device of a cell, at most."""
READS_W, COMPUTES_W, PROMPT_W = 0.55, 0.43, 0.98
"""Shares of a board's limit: what a call draws that only reads, what the square root of the share of the products that
it keeps busy adds, and what prompts draw. Within 11 % of six published points (H100 and A100, batch 1, 16 and 64)."""


@dataclass(frozen=True)
class Link:
    """What lies between two devices: bytes a second in each direction, and the seconds of a message."""

    name: str
    bandwidth: float
    latency_s: float


FREE = Link("free", math.inf, 0.0)
NVLINK = {
    "A100-SXM-80GB": Link("NVLink", 300e9, 10e-6),
    "H100-SXM-80GB": Link("NVLink", 450e9, 10e-6),
}
"""By data sheet; the seconds are those that aiconfigurator-core 0.12.0 gives for p2p."""
NETWORK = Link("400 Gb/s", 50e9, 20e-6)
ETHERNET = Link("25 Gb/s", 3.1e9, 50e-6)


@dataclass(frozen=True)
class Cell:
    """A placement of a profile's operators over devices that a link joins."""

    profile: OperatorProfile
    placement: Placement
    link: Link

    @property
    def devices(self) -> int:
        """Return the devices that it holds."""
        return self.placement.devices * self.profile.shape.devices

    def step_s(self, rows: float, context: float, phase: Phase = "decode") -> float:
        """Return the seconds in which each of `rows` gets a token, with as many batches in flight as are best."""
        return self.best(rows, context, phase)[0]

    def best(self, rows: float, context: float, phase: Phase = "decode") -> tuple[float, int]:
        """Return the least seconds of a step and the batches in flight that lead to it.

        With prompts in its steps a cell needs a batch for each device: else devices would wait while one computes.
        """
        least = self.placement.devices if phase == "both" else 1
        most = min(IN_FLIGHT, max(least, int(rows))) if self.placement.devices > 1 else 1
        flights = range(min(least, most), most + 1)
        return min((self.cycle_s(max(1.0, rows / count), context, count), count) for count in flights)

    def cycle_s(self, rows: float, context: float, batches: int) -> float:
        """Return the seconds of a step of one batch of `rows` among so many equal ones."""
        loads = [self._load(device, rows, context, count) for device, count in self.placement.alike]
        link_s, busy_link_s = self.link_s(rows)
        queue, used = [0.0] * len(loads), [0.0] * len(loads)
        total = 0.0
        for i in range(1, batches + 1):
            waits = [max(0.0, queue[d] - used[d]) * load.mean_s + used[d] * load.left_s for d, load in enumerate(loads)]
            total = link_s + self._pass_s(loads, waits)
            total = max(total, i * busy_link_s, *(i * load.busy_s for load in loads))
            used = [i * load.busy_s / total for load in loads]
            queue = [i * (load.busy_s + load.calls * wait) / total for load, wait in zip(loads, waits, strict=True)]
        return total

    def link_s(self, rows: float) -> tuple[float, float]:
        """Return the seconds that a batch spends on links in one step, and the part in which it keeps them busy."""
        hops, sent = self._sent
        busy = rows * sent / self.link.bandwidth
        return hops * self.link.latency_s + busy, busy

    def prompt_s(self, tokens: float, phase: Phase) -> tuple[float, float]:
        """Return the seconds that each prompt token takes of a cell, and what a prompt takes beside those of its own.

        A cell for prompts alone takes them in pieces of `PROMPT_TOKENS`: the device with most work says how fast, and
        the last piece passes all others too. Where rows decode beside, those of a prompt's batch wait for it at every
        device: then all devices' seconds count, which is more than a cell with several batches spends.
        """
        by_device = [self._prompt_s(device, tokens) for device in range(self.placement.devices)]
        _, link_s = self.link_s(1.0)
        piece = min(PROMPT_TOKENS, tokens)
        if phase == "both":
            return sum(by_device) + link_s, self.link_s(piece)[0]
        longest = max(*by_device, link_s)
        return longest, max(0.0, sum(by_device) - longest) * piece + self.link_s(piece)[0]

    def call_s(self, kind: Kind, rows: float, context: float) -> float:
        """Return the seconds of a call on its device, with the sum over the devices that share its matrix."""
        summed = self._summed_s(kind)
        return self.profile.seconds(kind, rows, context) + (rows * summed + self.link.latency_s if summed else 0.0)

    def prompt_call_s(self, kind: Kind, tokens: float) -> float:
        """Return the seconds that a call takes longer for each token of a prompt."""
        return self.profile.prompt_seconds(kind, tokens) + self._summed_s(kind)

    def watts(self, rows: float, context: float, parked_w: float, phase: Phase = "decode") -> float:
        """Return the watts of all devices while `rows` decode; a device that waits draws `parked_w`."""
        seconds, batches = self.best(rows, context, phase)
        joules = 0.0
        for device, alike in self.placement.alike:
            for kind, count in self.placement.visits[device].items():
                at = self._rows(kind, device, max(1.0, rows / batches))
                share = self.profile.compute_share(kind, at, context)
                drawn = self.profile.machine.board_w * (READS_W + COMPUTES_W * math.sqrt(share))
                joules += alike * count * self.call_s(kind, at, context) * max(0.0, drawn - parked_w)
        joules *= batches * self.profile.shape.devices
        return self.devices * parked_w + joules / seconds

    def prompt_w(self, tokens: float, parked_w: float, phase: Phase) -> float:
        """Return the watts of all devices while they take prompts one behind the other."""
        longest, _ = self.prompt_s(tokens, phase)
        busy = sum(self._prompt_s(device, tokens) for device in range(self.placement.devices))
        above = max(0.0, self.profile.machine.board_w * PROMPT_W - parked_w)
        return self.devices * parked_w + self.profile.shape.devices * busy / longest * above

    @cached_property
    def _sent(self) -> tuple[int, float]:
        return self.placement.sent(self.profile.shape)

    def _pass_s(self, loads: list[_Load], waits: list[float]) -> float:
        """Return the seconds of one pass: calls follow each other, but attention by rows runs on devices at once."""
        total, attention = 0.0, [0.0]
        for load, wait in zip(loads, waits, strict=True):
            total += load.count * (load.busy_s + load.calls * wait)
            if self.placement.rows and load.attention_s:
                own = self.profile.shape.layers * (load.attention_s + wait)
                attention.append(own)
                total -= load.count * own
        return total + max(attention)

    def _load(self, device: int, rows: float, context: float, alike: int) -> _Load:
        busy = square = attention = 0.0
        calls = 0
        for kind, count in self.placement.visits[device].items():
            seconds = self.call_s(kind, self._rows(kind, device, rows), context)
            attention = seconds if kind == "attention" else attention
            busy, square, calls = busy + count * seconds, square + count * seconds**2, calls + count
        mean, left = (busy / calls, square / (2 * busy)) if busy else (0.0, 0.0)
        return _Load(alike, busy, calls, mean, left, attention)

    def _rows(self, kind: Kind, device: int, rows: float) -> float:
        """Return the rows of a call."""
        return rows * self.placement.rows[device] if kind == "attention" and self.placement.rows else rows

    def _prompt_s(self, device: int, tokens: float) -> float:
        """Return the seconds that a device spends on each prompt token."""
        total = 0.0
        for kind, count in self.placement.visits[device].items():
            if kind == "head":
                continue  # one row of a whole prompt
            share = self.placement.share(device) if kind == "attention" and self.placement.rows else 1.0
            total += count * share * self.prompt_call_s(kind, tokens)
        return total

    def _summed_s(self, kind: Kind) -> float:
        """Return the seconds in which devices that share a matrix sum one row: a ring sends nearly all of it twice."""
        of = self.profile.shape
        if of.devices == 1 or kind not in ("out", "mlp"):
            return 0.0
        return 2 * (of.devices - 1) / of.devices * of.passed("mlp") / self.link.bandwidth


@dataclass(frozen=True)
class _Load:
    """What a batch asks of a device in one step."""

    count: int
    """Devices of which the same is asked."""
    busy_s: float
    calls: int
    mean_s: float
    """Of a call."""
    left_s: float
    """Of the call that is found running."""
    attention_s: float
    """Of a call of attention."""


@dataclass(frozen=True)
class Asked:
    """A cell in the words of `capacity`: the operating point, and the class that it is asked about there."""

    point: OperatingPoint
    kind: RequestClass


def asked(cell: Cell, node: NodeClass, kind: RequestClass, phase: Phase) -> Asked:
    """Return a cell as an operating point for one phase of requests of one class; `node` is one device.

    So a whole model and operators apart are judged by the same model of queues. Steps are those of the class's mean
    positions. Where phases are apart, an answer's first token is computed with its prompt: that cell has
    `PROMPT_PART` of the TTFT less the time in which keys and values move, and the wait for a place to decode the rest.
    """
    of = cell.profile.shape
    context = kind.prompt + kind.output * (1 + kind.spread**2) / 2
    tokens = cell.placement.kv_tokens(of, node.memory_bytes * MEMORY_SHARE)
    rows = [n for n in ROWS if n <= MOST_ROWS * cell.devices]
    most = min(rows[-1], int(tokens / (kind.prompt + kind.output)))
    found_in = kind.prompt * (1 + kind.spread**2)  # the prompt of a prompt token: long ones have more of them
    if phase == "both":
        _, lag_s = cell.prompt_s(found_in, phase)
        kind = replace(kind, ttft_s=kind.ttft_s - lag_s)
    elif phase == "prompt":
        _, lag_s = cell.prompt_s(found_in, phase)
        lag_s += moved_s(cell, kind.prompt)
        most = min(rows[-1], int(tokens / kind.prompt))
        kind = replace(kind, output=1.0, ttft_s=PROMPT_PART * kind.ttft_s - lag_s, tpot_s=math.inf)
    else:
        kind = replace(kind, prompt=1.0, ttft_s=(1 - PROMPT_PART) * kind.ttft_s)
    seen = 0.0 if phase == "decode" else found_in
    profile = _profile(cell, node, rows, (context, seen), phase)
    return Asked(OperatingPoint(profile, _together(node, cell.devices), most), kind)


def moved_s(cell: Cell, tokens: float) -> float:
    """Return the seconds in which the keys and values of a prompt move to another cell."""
    of = cell.profile.shape
    return cell.link.latency_s + tokens * of.kv_bytes * of.devices / cell.link.bandwidth


def _profile(cell: Cell, node: NodeClass, rows: list[int], seen: tuple[float, float], phase: Phase) -> Profile:
    """Return what a cell does as a profile, where rows and prompt tokens have so many positions before them."""
    context, prompt = seen
    at = tuple(float(n) for n in rows)
    parked = node.parked_w
    return Profile(
        device=node.device,
        model=cell.profile.shape.name,
        variant=f"{cell.placement.name}, {cell.link.name}",
        step=StepTime(
            Line(at, tuple(accumulate((cell.step_s(n, context, phase) for n in rows), max))),
            0.0,
            cell.prompt_s(prompt, phase)[0] if prompt else _LEAST_S,
        ),
        power=StepPower(
            Line(at, tuple(cell.watts(n, context, parked, phase) for n in rows)),
            cell.prompt_w(prompt, parked, phase) if prompt else cell.devices * parked,
        ),
        max_rows=rows[-1],
        weights_bytes=0.0,
        kv_bytes_per_token=0.0,  # the batch limit says what memory holds
        load_s=LOAD_S,
        decode_basis=cell.profile.whole,
        prompt_basis=cell.profile.whole,
        power_basis="estimated",
        source=cell.profile.source,
    )


def _together(node: NodeClass, count: int) -> NodeClass:
    """Return so many devices as one slot."""
    return replace(
        node,
        slots=1,
        memory_bytes=node.memory_bytes * count,
        host_w=node.host_w * count,
        bare_w=node.bare_w * count,
        parked_w=node.parked_w * count,
    )
