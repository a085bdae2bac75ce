"""The schedulers by their names, as the command line takes them."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.errors import InputError
from llmbuild.serve.schedule.fair_batching import FairBatching
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.isrtf import Isrtf
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.serve.schedule.state import Scheduler
from llmbuild.serve.schedule.vtc import Vtc
from llmbuild.spec.load_curve import LoadCurve

FCFS, SARATHI, FAIR_BATCHING, ISRTF, VTC = "fcfs", "sarathi", "fairbatching", "isrtf", "vtc"
NAMES = (FCFS, SARATHI, FAIR_BATCHING, ISRTF, VTC)


@dataclass(frozen=True)
class Targets:
    """Seconds to the first token and for each later one, that are asked for of requests without their own."""

    ttft_s: float
    tpot_s: float


def scheduler(
    name: str, cut: int, model: str, curve: LoadCurve | None = None, targets: Targets | None = None
) -> Scheduler:
    """Return a scheduler for a device that may cut prompts at multiples of `cut`; 0: not at all.

    Raises:
        InputError: no such scheduler, one that the device cannot serve exactly, or one that needs a load curve and
            targets.
    """
    if name not in NAMES:
        raise InputError(f"no scheduler {name}: there are {', '.join(NAMES)}")
    if name == SARATHI:
        if not cut:
            told = f"scheduler {SARATHI} cuts prompts, and the variant of {model} computes other bits for a prompt"
            raise InputError(f"{told} in pieces: take {FCFS}")
        return Sarathi(cut=cut)
    if name == FAIR_BATCHING:
        if curve is None:
            told = f"scheduler {FAIR_BATCHING} needs the load curve of the variant of {model} on this machine"
            raise InputError(f"{told}: `llmbuild profile VARIANT --load` measures it")
        if targets is None:
            told = f"scheduler {FAIR_BATCHING} needs deadlines"
            raise InputError(f"{told}: give --slo 'ttft_s_p99<=SECONDS' and --slo 'tpot_s_p99<=SECONDS'")
        return FairBatching(curve.step_s, targets.ttft_s, targets.tpot_s, cut)
    return Fcfs() if name == FCFS else Isrtf(cut=cut) if name == ISRTF else Vtc(cut=cut)
