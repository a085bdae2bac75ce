"""How many sequences fit in memory: computed from the catalog's rows before anything is opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.errors import InputError
from llmbuild.runtime import host
from llmbuild.spec.program import Abi, cache_bytes
from llmbuild.spec.rows import Row
from llmbuild.system import resources

SHARE = 0.8
"""Part of the memory that is available at the start which a server takes where no bound is given."""
OVERHEAD_BYTES = 64_000_000
"""What a process takes beside weights and caches, where no reading of it is there."""
_LOGIT_BYTES = 4


@dataclass(frozen=True)
class Need:
    """What a model takes: once, and for each sequence."""

    name: str
    fixed_bytes: int
    sequence_bytes: int
    measured: bool
    """Whether `fixed_bytes` comes from a reading of the peak, or is estimated from sizes."""
    draft: str = ""
    """The variant that drafts, where one does: the bytes are of both."""

    def total(self, sequences: int) -> int:
        """Return what so many sequences take."""
        return self.fixed_bytes + sequences * self.sequence_bytes

    def beside(self, draft: Need) -> Need:
        """Return what the model takes together with one that drafts for it: a cache of each for each sequence."""
        return Need(
            self.name,
            self.fixed_bytes + draft.fixed_bytes,
            self.sequence_bytes + draft.sequence_bytes,
            self.measured and draft.measured,
            draft.name,
        )

    def told(self, sequences: int) -> str:
        """Return the sum in words."""
        basis = "measured" if self.measured else "estimated"
        also = f", with draft {self.draft}" if self.draft else ""
        each = f"{sequences} x {self.sequence_bytes / 1e6:.1f} MB"
        return f"{self.fixed_bytes / 1e6:.0f} MB ({basis}) + {each} for keys and values{also}"


def _slot_bytes(abi: Abi) -> int:
    """Return the bytes of a sequence's cache: whole blocks, where sequences share one."""
    page = abi.page or 1
    return cache_bytes(abi) // abi.context * (-(-abi.context // page) * page)


def need(name: str, row: Row, abi: Abi, most: int) -> Need:
    """Return what a variant takes, for each whole context and beside them. Its measured peak has one cache in it.

    Where sequences share a cache, there may be more of them than contexts, up to `most`: the logits of all are counted.
    """
    cache = cache_bytes(abi)
    stored = (row.get("parameter_bytes") or 0) + (row.get("artifact_bytes") or 0)
    peak = row.get("peak_memory_bytes")
    fixed = max(peak - cache, stored) if peak else stored + OVERHEAD_BYTES
    logits = abi.vocabulary * _LOGIT_BYTES
    if abi.page:
        return Need(name, fixed + most * logits, _slot_bytes(abi), bool(peak))
    return Need(name, fixed, cache + logits, bool(peak))


def memory(asked: int | None) -> int:
    """Return the bytes that a server may take: what is asked for, or a part of what is available.

    Raises:
        InputError: more than this host has, or nothing is known of it.
    """
    most = resources.memory_limit()
    if asked is not None:
        if most is not None and asked > most.bytes:
            raise InputError(f"--memory {asked / 1e9:.3g}GB: this host gives {most.bytes / 1e9:.3g} GB ({most.file})")
        return asked
    available = host.available_memory_bytes()
    if available is None:
        raise InputError("how much memory is available is not known here: give --memory, such as 4GB")
    return int(available * SHARE)


def sequences(needs: Sequence[Need], memory_bytes: int, most: Sequence[int]) -> list[int]:
    """Return how many sequences each model may hold at a time: up to its `most`, in equal numbers as far as they fit.

    Raises:
        InputError: the memory does not hold one sequence of each.
    """
    least = sum(one.total(1) for one in needs)
    if least > memory_bytes:
        told = "; ".join(f"{one.name}: {one.told(1)}" for one in needs)
        fits = math.ceil(least / 1e6)
        raise InputError(
            f"--memory: {memory_bytes / 1e6:.0f} MB do not hold one sequence ({told}): give {fits}MB or more"
        )
    rest, found = memory_bytes - least, [1] * len(needs)
    growing = list(range(len(needs)))
    while growing:
        for i in tuple(growing):
            if found[i] == most[i] or needs[i].sequence_bytes > rest:
                growing.remove(i)
            else:
                found[i], rest = found[i] + 1, rest - needs[i].sequence_bytes
    return found
