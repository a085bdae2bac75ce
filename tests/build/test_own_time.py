"""What a server takes besides its device, from what its clients saw: the figures come back that it was made of."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import pytest

from llmbuild.build.loads import own_time
from llmbuild.spec.load_curve import OwnTime, Work
from tests.support.curves import curve

KNOWN = curve()
ENGINE = OwnTime(KNOWN.turn_s, KNOWN.row_s, 0.0, 0.0)


def seen(own: OwnTime, context: float = 24.0, prompt: int = 8) -> dict[str, Any]:
    """Return what clients would see of a server with so much time of its own."""
    steps = [
        {
            "sequences": count,
            "context": context,
            "step_s": device_s(own, Work(decodes=count, context=int(count * context))) + own.seconds(count),
            "device_s": device_s(own, Work(decodes=count, context=int(count * context))),
        }
        for count in (1, 2, 4, 8, 16)
    ]
    first_s = device_s(own, Work.of([(0, prompt)]))
    step_s = first_s + own.seconds(1)
    cpu_s = own.request_s + step_s + own.end_s
    requests = {
        "prompt": prompt,
        "ttft_s": own.cold_factor * (own.request_s + own.wake_s + step_s),
        "end_s": own.cold_factor * own.end_s,
        "device_s": own.cold_factor * first_s,
        "server_cpu_s": own.cold_factor * 0.75 * cpu_s,
        "client_cpu_s": own.cold_factor * 0.25 * cpu_s,
    }
    cold = {"factor": own.cold_factor, "seconds": own.cold_s}
    return {"cold": cold, "decodes": steps, "requests": requests}


def device_s(own: OwnTime, work: Work) -> float:
    return own.device_factor * KNOWN.fit.seconds(work)


def close(found: OwnTime, own: OwnTime) -> bool:
    both = zip(astuple(found), astuple(own), strict=True)
    return all(one == pytest.approx(other, rel=1e-6, abs=1e-12) for one, other in both)


def test_steps_rows_and_requests_come_back() -> None:
    known = OwnTime(3e-4, 1e-4, 2e-3, 1e-3)
    slow = replace(known, device_factor=1.3, cold_factor=1.8, cold_s=0.2)
    for own in (known, replace(known, wake_s=5e-4), slow, replace(slow, wake_s=5e-4)):
        assert close(own_time(KNOWN, seen(own)), own)


def test_a_server_takes_no_less_than_its_engine() -> None:
    found = own_time(KNOWN, seen(OwnTime(-1e-3, -1e-4, -1.0, 0.0)))
    assert close(found, ENGINE)


def test_where_rows_seem_to_take_nothing_steps_take_the_rest() -> None:
    found = own_time(KNOWN, seen(OwnTime(1e-3, 0.0, 0.0, 0.0)))
    assert found.row_s == KNOWN.row_s
    assert 0.5e-3 < found.step_s < 1e-3
