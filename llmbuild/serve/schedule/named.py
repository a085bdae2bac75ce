"""The schedulers by their names, as the command line takes them."""

from __future__ import annotations

from llmbuild.errors import InputError
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.serve.schedule.state import Scheduler

FCFS, SARATHI = "fcfs", "sarathi"
NAMES = (FCFS, SARATHI)


def scheduler(name: str, cut: int, model: str) -> Scheduler:
    """Return a scheduler for a device that may cut prompts at multiples of `cut`; 0: not at all.

    Raises:
        InputError: no such scheduler, or one that the device cannot serve exactly.
    """
    if name == FCFS:
        return Fcfs()
    if name != SARATHI:
        raise InputError(f"no scheduler {name}: there are {', '.join(NAMES)}")
    if not cut:
        told = (
            f"scheduler {SARATHI} cuts prompts, and the variant of {model} computes other bits for a prompt in pieces"
        )
        raise InputError(f"{told}: take {FCFS}")
    return Sarathi(cut=cut)
