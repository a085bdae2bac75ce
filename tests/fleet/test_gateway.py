"""The gateway before replicas that break: retried before the first byte, told behind it, refused where none is."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time

import httpx
import pytest

from llmbuild.fleet.actuators.interface import Live, Slot
from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.gateway import correct, table
from llmbuild.fleet.gateway.seen import Watch
from llmbuild.fleet.gateway.table import Job, Place
from llmbuild.fleet.gateway.upstream import Broken, ask
from llmbuild.fleet.policies.routing import by_slack
from llmbuild.fleet.simulate.trace import Asked
from llmbuild.serve.api.keys import Keys
from tests.support.fleets import fleet, profile, service
from tests.support.live_fleets import (
    DONE,
    USAGE,
    Fronted,
    Script,
    dies_at_once,
    dies_in_the_body,
    dies_in_the_stream,
    event,
    fronted,
    refuses,
    streams,
    whole,
)

ASK = {"model": "s", "prompt": "x"}


def post(found: Fronted, **more: object) -> httpx.Response:
    with found.client() as client:
        return client.post("/v1/completions", json={**ASK, **more})


def counted(found: Fronted, name: str, label: str = "outcome") -> dict[str, float]:
    """Return a counter of the gateway by one of its labels."""
    with found.client() as client:
        text = client.get("/metrics").text
    lines = re.finditer(rf'llmbuild:{name}_total{{[^}}]*{label}="([^"]*)"[^}}]*}} (\S+)', text)
    return {line[1]: float(line[2]) for line in lines}


def test_a_stream_passes_through_without_the_usage_that_nobody_asked_for() -> None:
    with fronted(fleet(), streams) as found:
        plain, asked = post(found, stream=True), post(found, stream=True, stream_options={"include_usage": True})
        assert plain.content == event("a") + event("b") + DONE
        assert asked.content == event("a") + event("b") + USAGE + DONE
        assert plain.headers["content-type"].startswith("text/event-stream")
        sent = json.loads(found.replicas[0].bodies[0])
        assert (sent["model"], sent["stream_options"]) == ("m", {"include_usage": True})
        assert counted(found, "fleet_requests") == {"answered": 2}
        assert found.state.open == found.state.watch.waiting[0] == 0


@pytest.mark.parametrize("broken", [dies_at_once, dies_in_the_body, refuses(503), refuses(429), refuses(500)])
@pytest.mark.parametrize("stream", [True, False])
def test_what_was_not_begun_is_answered_by_another_replica_once(broken: Script, stream: bool) -> None:
    with fronted(fleet(), broken, streams if stream else whole) as found:
        answer = post(found, stream=stream)
        assert answer.status_code == 200
        assert answer.content == event("a") + event("b") + DONE if stream else answer.json()["choices"]
        assert [len(one.bodies) for one in found.replicas] == [1, 1]
        assert counted(found, "fleet_retries", "service") == {"s": 1}
        assert counted(found, "fleet_requests") == {"answered": 1}


def test_a_stream_that_breaks_ends_with_an_error_and_is_not_begun_anew() -> None:
    with fronted(fleet(), dies_in_the_stream, streams) as found:
        events = post(found, stream=True).text.strip().split("\n\n")
        assert events[0] == event("a").decode().strip()
        error = json.loads(events[1].removeprefix("data: "))["error"]
        assert (error["code"], len(events)) == ("replica_lost", 2)
        assert "in the middle of the answer" in error["message"]
        assert [len(one.bodies) for one in found.replicas] == [1, 0]
        assert counted(found, "fleet_requests") == {"failed": 1}
        assert found.state.open == found.state.watch.waiting[0] == 0


def test_a_client_s_own_error_is_passed_on_and_tried_nowhere_else() -> None:
    with fronted(fleet(), refuses(400), streams) as found:
        answer = post(found)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no")
        assert [len(one.bodies) for one in found.replicas] == [1, 0]
        assert counted(found, "fleet_requests") == {"refused": 1}


def test_where_every_replica_is_full_the_client_is_told_so() -> None:
    with fronted(fleet(), refuses(429), refuses(429)) as found:
        assert post(found).status_code == 429
        assert [len(one.bodies) for one in found.replicas] == [1, 1]
        assert counted(found, "fleet_requests") == {"rejected": 1}


def test_a_key_is_asked_for_and_the_replica_gets_it() -> None:
    digest = hashlib.sha256(b"a-key-of-16-signs").digest()
    with fronted(fleet(), streams, keys=Keys((digest,))) as found, found.client() as client:
        ask = {**ASK, "stream": True}
        asked = [
            client.post("/v1/completions", json=ask, headers=headers).status_code
            for headers in ({}, {"authorization": "Bearer another-key-of-16"})
        ]
        assert (asked, found.replicas[0].heads) == ([401, 401], [])
        told = client.post("/v1/completions", json=ask, headers={"authorization": "Bearer a-key-of-16-signs"})
        assert told.status_code == 200
        (head,) = found.replicas[0].heads
        assert b"\r\nauthorization: Bearer a-key-of-16-signs\r\n" in head
        paths = ("/health", "/ready", "/v1/models", "/metrics")
        assert [client.get(path).status_code for path in paths] == [200, 200, 401, 401]
        assert any(f"key={digest.hex()[:8]}" in line for line in found.lines)


def test_a_key_that_nobody_asked_for_goes_no_further() -> None:
    with fronted(fleet(), streams) as found, found.client() as client:
        headers = {"authorization": "Bearer secret-of-somebody"}
        assert client.post("/v1/completions", json={**ASK, "stream": True}, headers=headers).status_code == 200
        assert b"secret" not in found.replicas[0].heads[0]


def test_without_a_replica_a_client_is_told_when_to_come_again() -> None:
    with fronted(fleet(), streams) as found:
        found.update()
        answer = post(found)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "no_replica"
        with found.client() as client:
            assert (client.get("/ready").status_code, client.get("/health").status_code) == (503, 200)
        assert counted(found, "fleet_requests") == {"rejected": 1}


def test_a_request_waits_for_a_replica_that_starts() -> None:
    with fronted(fleet(), streams) as found:
        found.update("starting")
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(post(found, stream=True)))
        asking.start()
        until = time.monotonic() + 5
        while not found.state.table.held and time.monotonic() < until:
            time.sleep(0.01)
        assert found.state.table.held == 1
        found.update("ready")
        asking.join(10)
        assert [one.content for one in answers] == [event("a") + event("b") + DONE]


def test_a_request_waits_for_a_replica_that_is_wanted_and_not_started_yet() -> None:
    with fronted(fleet(), streams) as found:
        found.call(lambda: found.state.table.update([], {0}))
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(post(found, stream=True)))
        asking.start()
        time.sleep(0.1)
        found.update("ready")
        asking.join(10)
        assert [one.status_code for one in answers] == [200]


def test_a_request_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "HELD_S", 0.1)
    with fronted(fleet(), streams) as found:
        found.update("starting")
        assert post(found).status_code == 503


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        ({"model": "none"}, 404, "is not served here: s"),
        ({"slo_class": "other"}, 400, "s has only"),
        ({"slo_class": "only"}, 200, ""),
        ({"model": "m"}, 200, ""),
    ],
)
def test_a_request_names_its_service_and_its_class(more: dict[str, object], status: int, told: str) -> None:
    with fronted(fleet(), whole) as found:
        answer = post(found, **more)
        assert answer.status_code == status
        assert told in answer.text
        if status == 200:
            assert "slo_class" not in json.loads(found.replicas[0].bodies[0])


def test_requests_go_to_the_replica_with_the_least_to_do() -> None:
    held = threading.Event()

    async def slow(body: bytes, writer: object) -> None:
        import asyncio

        while not held.is_set():
            await asyncio.sleep(0.01)
        await whole(body, writer)  # type: ignore[arg-type]

    with fronted(fleet(service()), slow, slow) as found:
        asking = [threading.Thread(target=post, args=(found,)) for _ in range(4)]
        for one in asking:
            one.start()
        until = time.monotonic() + 5
        while sum(len(one.bodies) for one in found.replicas) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        held.set()
        for one in asking:
            one.join(10)
        assert [len(one.bodies) for one in found.replicas] == [2, 2]


def test_what_the_policy_is_told_of_are_arrivals_and_lengths() -> None:
    with fronted(fleet(), streams) as found:
        for _ in range(3):
            post(found, stream=True)
        first, second = (found.state.watch.traffic(time.monotonic(), decides=True) for _ in range(2))
        assert [one.arrivals for one in first.seen] == [3]
        assert [one.arrivals for one in second.seen] == [0]
        assert first.rates[0, 0] == pytest.approx(0.3)
        assert first.seen[0].prompt < 100 and first.seen[0].output < 50  # the file's, drawn towards what came


def test_the_router_of_the_simulator_fills_live_replicas_while_they_are_in_time() -> None:
    made = fleet(service(ttft_s=0.2))
    kind, choose = made.nodes[0], by_slack(made)
    at = OperatingPoint(profile(kind.device), kind, 4)
    many = (60.0,)  # at so many requests a second all four rows are taken
    places = [Place(Live(f"r{i}", 0, at, Slot(kind.name, kind.nodes[i], 0), "ready"), at, many) for i in range(2)]

    def chosen(prompt: int) -> int:
        job = Job(Asked(0, 0.0, 0, 0, prompt, 50))
        place = choose(places, job, 0.0)
        place.jobs.add(job)
        return places.index(place)

    assert places[0].expected_ttft_s(100, 0.0) == pytest.approx(0.01 + 2 * 0.010)  # 100 us a token, 10 ms a step
    assert [chosen(100) for _ in range(3)] == [0, 0, 0]  # within half of the deadline: the busiest one
    assert places[0].expected_ttft_s(100, 0.0) > 0.06
    assert [chosen(500), chosen(100)] == [1, 0]  # a long prompt behind three others would be late; 80 % of 4 are 3
    assert places[0].load == 4


def test_the_router_puts_no_more_on_a_replica_than_it_holds_at_the_rate_that_it_takes() -> None:
    made = fleet(service())
    kind, choose = made.nodes[0], by_slack(made)
    at = OperatingPoint(profile(kind.device), kind, 16)
    rate = 5.0  # answers of 50 tokens: some three at a time
    places = [Place(Live(f"r{i}", 0, at, Slot(kind.name, kind.nodes[i], 0), "ready"), at, (rate,)) for i in range(2)]
    chosen = []
    for number in range(8):
        job = Job(Asked(number, 0.0, 0, 0, 100, 50))
        place = choose(places, job, 0.0)
        place.jobs.add(job)
        chosen.append(places.index(place))
    assert chosen == [0, 0, 0, 0, 1, 1, 1, 1]


def test_tokens_that_take_longer_than_their_profile_make_the_load_larger() -> None:
    made = fleet()
    kind = made.nodes[0]
    at = OperatingPoint(profile(kind.device), kind, 16)
    watch = Watch(made, 0.0)
    for _ in range(5):
        watch.arrived((0, 0), 99.0)
    correction = watch.corrections[0]
    for i in range(correct.ENOUGH):
        assert correction.factor == 1.0, i
        correction.seen(at, 16, 100.0, 50, 2 * at.step.seconds(16, 16 * 100.0, 0))
    correction.seen(at, 1, 100.0, 2, 1e9)  # too short to say anything
    found = watch.traffic(100.0, decides=True)
    assert [one.arrivals for one in found.seen] == pytest.approx([10.0])
    assert found.rates[0, 0] == pytest.approx(1.0)
    for _ in range(300):
        correction.seen(at, 1, 100.0, 50, 100 * at.step.seconds(1, 100.0, 0))
    assert correction.factor == correct.MOST


def test_a_replica_at_an_ipv6_address_is_connected_to_without_its_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    async def refuses_all(host: str, port: int) -> None:
        asked.append((host, port))
        raise ConnectionRefusedError("nobody is here")

    monkeypatch.setattr(asyncio, "open_connection", refuses_all)
    with pytest.raises(Broken, match=r"http://\[fd00::1\]:8000 takes no connection: nobody is here"):
        asyncio.run(ask("http://[fd00::1]:8000", "/", b"", {}, 1.0))
    assert asked == [("fd00::1", 8000)]
