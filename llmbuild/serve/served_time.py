"""What a server takes besides its device, seen by a client over HTTP.

    python -m llmbuild.serve.served_time OUTPUT MODEL SEQUENCES CONTEXT BUDGET WORD...

The words start a server that prints its address. Written as JSON: `decodes`, for some numbers of sequences what one
step of all of them took, each at a mean position, and `requests`, what short requests one after another took: seconds
to the first token and from the last one to the end, and CPU seconds of the server and of the client.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic

from llmbuild.serve.drive import Driven, Heard, Sending, drive

PROMPT = 8
"""Tokens of each prompt: a load curve has a step of just so many."""
SHORT, LONG = 8, 40
"""Tokens of answers; what the long ones take more is steps of all sequences."""
LEAST, MOST = 3, 30
"""Rounds."""
ALONE = 40
"""Requests one after another."""
END_S = 30.0


def counts(sequences: int) -> list[int]:
    """Return how many sequences decode at a time."""
    return sorted({1, *(count for count in (2, 4, 8, 16, 32, 64) if count < sequences), sequences})


def lengths(context: int) -> tuple[int, int]:
    """Return the tokens of short and long answers that fit into a context."""
    most = min(LONG, context - PROMPT)
    return max(1, most * SHORT // LONG), most


def measured(
    url: str, model: str, sequences: int, context: int, budget_s: float, cpu_s: Callable[[], float]
) -> dict[str, object]:
    """Return what steps and requests took, by the medians of rounds in random order."""
    short, long = lengths(context)
    asked = [(count, output) for count in counts(sequences) for output in (short, long)]
    order, taken = random.Random(0), {one: list[float]() for one in asked}
    begun, rounds = monotonic(), 0
    for count, output in asked:
        _together(url, model, count, output, 0)
    while rounds < LEAST or (rounds < MOST and monotonic() - begun < budget_s):
        rounds += 1
        for count, output in order.sample(asked, len(asked)):
            taken[count, output].append(_together(url, model, count, output, order.randrange(1 << 30)))
    before = cpu_s()
    alone = [_alone(url, model, seed) for seed in range(ALONE)]
    server_s = (cpu_s() - before) / ALONE
    ones = [driven.heard[0] for driven in alone]
    decodes = [
        {
            "sequences": count,
            "context": PROMPT + (short + long) / 2,
            "step_s": (median(taken[count, long]) - median(taken[count, short])) / (long - short),
        }
        for count in counts(sequences)
    ]
    return {
        "decodes": decodes,
        "requests": {
            "prompt": PROMPT,
            "ttft_s": median(one.ttft_s for one in ones),
            "end_s": median(one.closed_s - one.last_s for one in ones),
            "server_cpu_s": server_s,
            "client_cpu_s": median(driven.cpu_s for driven in alone),
        },
        "rounds": rounds,
    }


def _together(url: str, model: str, count: int, output: int, seed: int) -> float:
    """Return the seconds in which so many requests at once are answered."""
    found = drive(url, model, [Sending(0.0, PROMPT, output)] * count, 600.0, seed).heard
    _whole(found, output)
    return max(one.sent_s + one.last_s for one in found)


def _alone(url: str, model: str, seed: int) -> Driven:
    found = drive(url, model, [Sending(0.0, PROMPT, 1)], 600.0, seed)
    _whole(found.heard, 1)
    return found


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
        found = measured(url, model, int(sequences), int(context), float(budget_s), partial(cpu_s, process))
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
