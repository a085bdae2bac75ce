"""What a server takes besides its device, seen by a client over HTTP, and how fast its cores are after a rest.

    python -m llmbuild.serve.served_time OUTPUT MODEL SEQUENCES CONTEXT BUDGET WORD...

The words start a server that prints its address. Written as JSON:

- `cold`: by which `factor` tokens take longer after a rest, and for how many `seconds` of work.
- `decodes`: for some numbers of sequences, what one step of all of them took at full speed, and the device in it, each
  at a mean position. The device's seconds are the server's own sums.
- `requests`: what short requests took that found the server idle: seconds to the first token and from the last one to
  the end, the device's, and CPU seconds of the server and of the client.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from time import monotonic

from llmbuild.serve.cores import Cores
from llmbuild.serve.drive import Driven, Heard, Sending, drive
from llmbuild.spec.load_curve import OwnTime

PROMPT = 8
"""Tokens of each prompt: a load curve has a step of just so many."""
MOST_TOKENS, LEAST_TOKENS = 160, 8
"""Tokens of answers."""
RUN_S = 0.8
"""Seconds that answers shall last: longer than cores are slow after a rest."""
REST_S = 0.25
"""Seconds before requests, in which nothing is done."""
LEAST, MOST = 3, 30
"""Rounds."""
ALONE = 16
"""Requests one after another."""
END_S = 30.0
SLOWER = 1.05
"""Factor from which on cores count as slow after a rest."""
_STEPS = re.compile(rb"^llmbuild:step_seconds_sum\{.*\} (\S+)$", re.MULTILINE)

Seconds = Callable[[], float]


@dataclass(frozen=True)
class Together:
    """What requests took that came at once."""

    ttft_s: float
    """To the last of the first tokens."""
    last_s: float
    device_s: float
    came_s: tuple[float, ...]
    """When the tokens of one of them came."""


class Client:
    """Asks one server, each time after a rest."""

    def __init__(self, url: str, model: str, device_s: Seconds) -> None:
        """Take where the server is, and what tells the sum of its device's seconds."""
        self._url, self._model, self._device_s = url, model, device_s

    def ask(self, count: int, output: int, seed: int) -> tuple[Driven, float]:
        """Return what came of so many requests at once, and the seconds of the device for them."""
        time.sleep(REST_S)
        before = self._device_s()
        driven = drive(self._url, self._model, [Sending(0.0, PROMPT, output)] * count, 600.0, seed, each=True)
        _whole(driven.heard, output)
        return driven, self._device_s() - before

    def together(self, count: int, output: int, seed: int) -> Together:
        """Return what so many requests at once took."""
        driven, device_s = self.ask(count, output, seed)
        first, last = (max(one.sent_s + each for one, each in _of(driven, name)) for name in ("ttft_s", "last_s"))
        return Together(first, last, device_s, driven.heard[0].came_s)


def _of(driven: Driven, name: str) -> Iterator[tuple[Heard, float]]:
    return ((one, getattr(one, name)) for one in driven.heard)


def counts(sequences: int) -> list[int]:
    """Return how many sequences decode at a time."""
    return sorted({1, *(count for count in (2, 4, 8, 16, 32, 64) if count < sequences), sequences})


def measured(
    url: str, model: str, sequences: int, context: int, budget_s: float, cpu_s: Seconds, device_s: Seconds
) -> dict[str, object]:
    """Return what steps and requests took, by the medians of rounds in random order."""
    client, order, most = Client(url, model, device_s), random.Random(0), max(1, min(MOST_TOKENS, context - PROMPT))
    lengths = {count: _length(client.together(count, most, 0), most) for count in counts(sequences)}
    long, short = {count: list[Together]() for count in lengths}, {count: list[Together]() for count in lengths}
    begun, rounds = monotonic(), 0
    while rounds < LEAST or (rounds < MOST and monotonic() - begun < budget_s):
        rounds += 1
        for count in order.sample(list(lengths), len(lengths)):
            long[count].append(client.together(count, lengths[count], order.randrange(1 << 30)))
            short[count].append(client.together(count, 1, order.randrange(1 << 30)))
    longest = max(lengths, key=lambda count: median(one.last_s for one in long[count]))
    factor, seconds = cold([one.came_s for one in long[longest]])
    cores = Cores(OwnTime(0.0, 0.0, 0.0, 0.0, cold_factor=factor, cold_s=seconds))
    decodes = [_decode(count, lengths[count], long[count], short[count], cores) for count in lengths]
    told = {"factor": factor, "seconds": seconds}
    return {"cold": told, "decodes": decodes, "requests": _requests(client, cpu_s), "rounds": rounds}


def _length(tried: Together, tokens: int) -> int:
    """Return how many tokens answers have that last long enough, if there can be so many."""
    each_s = (tried.last_s - tried.ttft_s) / max(1, tokens - 1)
    return max(min(tokens, LEAST_TOKENS), min(tokens, int(RUN_S / each_s))) if each_s > 0 else tokens


def cold(came_s: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return by which factor tokens take longer at first, and for how many seconds from the request on.

    `came_s` has the times of tokens in several rounds, as many as the shortest has: tokens that came in one piece count
    once. Two levels are fitted to the gaps by least squares; where the first is hardly longer, there is only one.
    """
    times = [median(one) for one in zip(*came_s, strict=False)]
    gaps = [median(one) for one in zip(*([b - a for a, b in pairwise(each)] for each in came_s), strict=False)]
    least, found = float("inf"), (1.0, 0.0)
    for at in range(2, len(gaps) - max(2, len(gaps) // 5)):
        before, after = fmean(gaps[:at]), fmean(gaps[at:])
        error = sum((one - before) ** 2 for one in gaps[:at]) + sum((one - after) ** 2 for one in gaps[at:])
        if error < least and after > 0:
            least, found = error, (before / after, times[at])
    return found if found[0] >= SLOWER else (1.0, 0.0)


def _decode(
    count: int, tokens: int, long: Sequence[Together], short: Sequence[Together], cores: Cores
) -> dict[str, float]:
    """Return what a step of so many sequences took at full speed, and the device in it."""
    steps = max(1, tokens - 1)
    fast = median(cores.work_s(one.last_s) - cores.work_s(one.ttft_s) for one in long) / steps
    wall = median(one.last_s - one.ttft_s for one in long) / steps
    device = (median(one.device_s for one in long) - median(one.device_s for one in short)) / steps
    share = min(1.0, device / wall) if wall > 0 else 0.0
    return {"sequences": count, "context": PROMPT + (1 + tokens) / 2, "step_s": fast, "device_s": fast * share}


def _requests(client: Client, cpu_s: Seconds) -> dict[str, float]:
    before = cpu_s()
    alone = [client.ask(1, 1, seed) for seed in range(ALONE)]
    server_s, ones = (cpu_s() - before) / ALONE, [driven.heard[0] for driven, _ in alone]
    return {
        "prompt": PROMPT,
        "ttft_s": median(one.ttft_s for one in ones),
        "end_s": median(one.closed_s - one.last_s for one in ones),
        "device_s": median(device_s for _, device_s in alone),
        "server_cpu_s": server_s,
        "client_cpu_s": median(driven.cpu_s for driven, _ in alone),
    }


def device_s(url: str) -> float:
    """Return the sum of the seconds of a server's device, which it tells among its metrics.

    Raises:
        RuntimeError: it does not tell it.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics", timeout=END_S) as answer:
        found = _STEPS.search(answer.read())
    if found is None:
        raise RuntimeError(f"{url}/metrics tells no seconds of steps")
    return float(found[1])


def cpu_s(process: int) -> float:
    """Return the CPU seconds that the living threads of a process have taken so far."""
    taken = 0
    for file in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread has ended
            taken += int(file.read_text().split()[0])
    return taken / 1e9


def _whole(found: Sequence[Heard], output: int) -> None:
    """Refuse answers that are not those that were asked for."""
    wrong = [one for one in found if one.end != "answered" or one.tokens != output]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(found)} requests were not answered: {wrong[0]}")


@contextmanager
def served(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Start a server, and yield its address and its process."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the server did not start")
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def main(words: Sequence[str]) -> None:
    """Measure, and write it."""
    output, model, sequences, context, budget_s, *command = words
    with served(command) as (url, process):
        told = partial(cpu_s, process), partial(device_s, url)
        found = measured(url, model, int(sequences), int(context), float(budget_s), *told)
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
