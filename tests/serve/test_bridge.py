"""What readers in the event loop get of what the engine's thread says."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from llmbuild.cli import serve as cli
from llmbuild.serve.api.bridge import Answers, Bridge, Numbered
from llmbuild.serve.events import Delta, Ended, Event, Finish
from llmbuild.serve.served import STREAM_INTERVAL_S


def test_a_reader_gets_what_came_together_and_nothing_where_it_takes_too_long() -> None:
    asked: Any = SimpleNamespace(requests=[SimpleNamespace(id="a", params=SimpleNamespace(n=2))])
    first, second = Delta("a", 0, 7, "x", cached=4), Delta("a", 1, 8, "y", cached=4)
    last = [Delta("a", 0, 9, "", finish=Finish("stop")), Ended("a", 1, "deadline", "late")]

    async def read() -> list[list[Numbered]]:
        answers, loop = Answers(asked), asyncio.get_running_loop()
        seen = [await answers.some(0.001)]
        answers.put(first)
        answers.put(second)
        seen.append(await answers.some(0.001))
        assert answers.open and (answers.completion_tokens, answers.cached_tokens) == (2, 4)
        for one in last:
            loop.call_later(0.01, answers.put, one)
        while answers.open:
            seen.append(await answers.some())
        assert answers.completion_tokens == 3
        return seen

    found = asyncio.run(read())
    assert found[:2] == [[], [(0, first), (1, second)]]
    assert [one for events in found[2:] for one in events] == [(0, last[0]), (1, last[1])]


def of_a_client() -> Any:
    """Return a request to an engine that does nothing."""
    engine = SimpleNamespace(submit=lambda request: None, cancel=lambda name: None)
    requests = [SimpleNamespace(id="a", params=SimpleNamespace(n=1))]
    return SimpleNamespace(requests=requests, served=SimpleNamespace(engine=engine))


def test_tokens_that_come_soon_after_others_are_handed_on_together_and_first_ones_and_ends_at_once() -> None:
    tokens = [Delta("a", 0, number, "x") for number in range(6)]
    end = Delta("a", 0, 6, "x", finish=Finish("length"))

    async def read() -> list[list[Event]]:
        bridge = Bridge(asyncio.get_running_loop().call_soon_threadsafe, interval_s=0.1)
        seen = list[list[Event]]()

        async def some(most_s: float) -> None:
            seen.append([event for _, event in await answers.some(most_s)])

        with bridge.submitted(of_a_client()) as answers:
            bridge.outlet(tokens[:1])
            await some(0.05)
            for one in tokens[1:3]:
                bridge.outlet([one])
            await some(0.02)
            await some(2)
            bridge.outlet(tokens[3:4])
            bridge.outlet([end])
            await some(0.05)
        return seen

    assert asyncio.run(read()) == [tokens[:1], [], tokens[1:3], [tokens[3], end]]


def test_nothing_that_was_held_is_left_behind_and_its_timer_ends() -> None:
    posted = list[Any]()

    async def read() -> tuple[list[int], int]:
        loop = asyncio.get_running_loop()

        def post(call: Any) -> None:
            posted.append(call)
            loop.call_soon(call)

        bridge, seen = Bridge(post, interval_s=0.005), list[int]()
        with bridge.submitted(of_a_client()) as answers:
            for number in range(40):
                bridge.outlet([Delta("a", 0, number, "x")])
                seen += [event.token for _, event in await answers.some(0.0005) if isinstance(event, Delta)]
            while len(seen) < 40:
                seen += [event.token for _, event in await answers.some(1) if isinstance(event, Delta)]
            await asyncio.sleep(0.1)
            before = len(posted)
            bridge.outlet([Delta("a", 0, 40, "x")])
            await asyncio.sleep(0.001)
            seen += [event.token for _, event in await answers.some(0.0005) if isinstance(event, Delta)]
        return seen, len(posted) - before

    assert asyncio.run(read()) == (list(range(41)), 1)
    assert len(posted) < 40


def test_the_command_holds_tokens_as_long_as_a_server_does() -> None:
    assert cli.STREAM_INTERVAL_S == STREAM_INTERVAL_S
