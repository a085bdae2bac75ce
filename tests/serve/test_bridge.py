"""What readers in the event loop get of what the engine's thread says."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from llmbuild.serve.api.bridge import Answers, Numbered
from llmbuild.serve.events import Delta, Ended, Finish


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
