"""What a server takes besides its device, from what its clients saw: the figures come back that it was made of."""

from __future__ import annotations

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
            "step_s": KNOWN.fit.seconds(Work(decodes=count, context=int(count * context))) + own.seconds(count),
        }
        for count in (1, 2, 4, 8, 16)
    ]
    step_s = KNOWN.fit.seconds(Work.of([(0, prompt)])) + own.seconds(1)
    cpu_s = own.request_s + step_s + own.end_s
    requests = {
        "prompt": prompt,
        "ttft_s": own.request_s + own.wake_s + step_s,
        "end_s": own.end_s,
        "server_cpu_s": 0.75 * cpu_s,
        "client_cpu_s": 0.25 * cpu_s,
    }
    return {"decodes": steps, "requests": requests}


def close(found: OwnTime, own: OwnTime) -> bool:
    both = zip(
        (found.step_s, found.row_s, found.request_s, found.end_s, found.wake_s),
        (own.step_s, own.row_s, own.request_s, own.end_s, own.wake_s),
        strict=True,
    )
    return all(one == pytest.approx(other, rel=1e-6, abs=1e-12) for one, other in both)


def test_steps_rows_and_requests_come_back() -> None:
    for own in (OwnTime(3e-4, 1e-4, 2e-3, 1e-3), OwnTime(3e-4, 1e-4, 2e-3, 1e-3, wake_s=5e-4)):
        assert close(own_time(KNOWN, seen(own)), own)


def test_a_server_takes_no_less_than_its_engine() -> None:
    found = own_time(KNOWN, seen(OwnTime(-1e-3, -1e-4, -1.0, 0.0)))
    assert close(found, ENGINE)


def test_where_rows_seem_to_take_nothing_steps_take_the_rest() -> None:
    found = own_time(KNOWN, seen(OwnTime(1e-3, 0.0, 0.0, 0.0)))
    assert found.row_s == KNOWN.row_s
    assert 0.5e-3 < found.step_s < 1e-3
