"""Profiles of slices of a GPU: those that are given or published, else estimates from the undivided device's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from llmbuild.spec.fleet import Line, NodeClass, Profile, StepPower, StepTime
from llmbuild.spec.partitions import Slice


def device_of(node: NodeClass, part: Slice | None) -> str:
    """Return what profiles name: a slice is a device of its own."""
    return node.device if part is None else f"{node.device}/{part.name}"


def parts_of(node: NodeClass) -> tuple[Slice, ...]:
    """Return the kinds of slices that nodes of a class may have, the largest first."""
    if node.partitions is None:
        return ()
    found = {each for layout in (*node.partitions.layouts, node.partitions.now) for each in layout.slices}
    return tuple(sorted(found, key=lambda each: (-each.compute, -each.size)))


def divided(nodes: Iterable[NodeClass], profiles: Sequence[Profile]) -> list[Profile]:
    """Return an estimate for each slice and each profile of its device, where the slice has none of its own."""
    known = {(p.device, p.model, p.variant) for p in profiles}
    found: dict[tuple[str, str, str], Profile] = {}
    for node in nodes:
        for part in parts_of(node):
            device = device_of(node, part)
            for whole in profiles:
                key = device, whole.model, whole.variant
                if whole.device == node.device and key not in known:
                    found[key] = of_slice(whole, device, part)
    return list(found.values())


def of_slice(whole: Profile, device: str, part: Slice) -> Profile:
    """Return what a slice does by its shares of the undivided device: an estimate, which nobody has measured.

    Reading weights and what was said takes longer by the share of the memory's bandwidth, prompts by that of the
    multiprocessors, further rows by the smaller one: they read and compute. Watts have the same shares.
    """
    memory, compute = part.memory_share, part.compute_share
    rows, first = whole.step.rows_s, whole.step.rows_s.values[0]
    more = min(memory, compute)
    line = Line(rows.at, tuple(first / memory + (seconds - first) / more for seconds in rows.values))
    power = whole.power and StepPower(whole.power.rows_w.times(memory), whole.power.prompt_w * compute)
    shares = f"{part.name} by {memory:.4g} of the bandwidth and {compute:.3f} of the multiprocessors"
    return replace(
        whole,
        device=device,
        step=StepTime(line, whole.step.context_s / memory, whole.step.prompt_s / compute),
        power=power,
        decode_basis="estimated",
        prompt_basis="estimated",
        power_basis="estimated",
        source=f"estimated, {shares}, from: {whole.source}",
    )
