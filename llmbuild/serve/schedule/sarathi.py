"""Chunked prefill: prompts are computed in pieces, so that no step is much longer than another.

After Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.serve.schedule.state import Batch, Entry, Share, State


@dataclass(frozen=True)
class Sarathi:
    """Fills each step up to `budget` tokens: all decodes, then begun prompts, then new ones, in their order.

    A prompt is cut at multiples of `cut` alone, of which the device says that they change no bit. Where the budget has
    no room for one piece beside the decodes, the first prompt gets one piece all the same: prompts do not starve.
    """

    budget: int = 96
    cut: int = 1

    def __call__(self, state: State, now_s: float) -> Batch:
        """Return the decodes, and pieces of prompts as far as the budget goes."""
        shares = [Share(one.number, one.pending) for one in state.running if one.decoding]
        room, none_yet = self.budget - len(shares), True
        prompts = [*(one for one in state.running if not one.decoding), *state.waiting[: state.free]]
        for one in prompts:
            count = self._piece(one, room)
            if not count and none_yet:
                count = min(one.pending, self.cut)
            if not count:
                break
            shares.append(Share(one.number, count))
            room, none_yet = room - count, False
        return Batch(tuple(shares))

    def _piece(self, one: Entry, room: int) -> int:
        """Return how many tokens of a prompt fit: all of the rest, or a multiple of `cut`."""
        return one.pending if one.pending <= room else max(0, room) // self.cut * self.cut
