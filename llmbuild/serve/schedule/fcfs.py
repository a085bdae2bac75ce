"""First come, first served, with whole prompts: a sequence that is admitted runs in every step until it ends."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.serve.schedule.state import Batch, Share, State


@dataclass(frozen=True)
class Fcfs:
    """Runs everything that has a slot, and admits from the front of the queue.

    A step takes prompts until it has `prompt_tokens` of them; one prompt is always taken, however long. So others wait
    for about so many tokens between two of their own.
    """

    prompt_tokens: int = 512

    def __call__(self, state: State, now_s: float) -> Batch:
        """Return all running sequences, then those that are admitted."""
        shares = [Share(one.number, one.pending) for one in state.running]
        taken = sum(one.pending for one in state.running if not one.decoding)
        for one in state.waiting[: state.free]:
            if taken and taken + one.pending > self.prompt_tokens:
                break
            shares.append(Share(one.number, one.pending))
            taken += one.pending
        return Batch(tuple(shares))
