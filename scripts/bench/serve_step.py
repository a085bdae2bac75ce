"""Measure how many tokens a second one engine answers with, at several numbers of streams, in this process.

    python scripts/bench/serve_step.py MODEL [-C CATALOG] [--variant DIGEST] [--streams N ...] [--prompt N] [--output N]

Streams begin together with prompts of random tokens; tokens are counted from when every stream has its first one. One
call for the rows of all streams is compared with a call for each, on the same artifact, in turns.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from statistics import median
from threading import Event as Flag
from time import perf_counter

import numpy as np

from llmbuild.runtime import host, load, reader
from llmbuild.runtime.answers import Text
from llmbuild.runtime.detokenize import Decoder, stages
from llmbuild.runtime.model import Model
from llmbuild.serve.engine import Engine
from llmbuild.serve.events import Delta, Event
from llmbuild.serve.per_sequence import PerSequenceStep
from llmbuild.serve.ragged import RaggedStep
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.step import Step

Make = Callable[[Model, int], Step]
STEPS: dict[str, Make] = {
    "one call": lambda model, slots: RaggedStep(model.session, slots),
    "a call each": lambda model, slots: PerSequenceStep(model.session, slots),
}
"""How the rows of all streams are run, by name."""


class Counted:
    """Counts the tokens of streams from when each has one."""

    def __init__(self, streams: int) -> None:
        self._left, self._began, self._streams = streams, set[str](), streams
        self.tokens, self.begin_s, self.end_s, self.done = 0, 0.0, 0.0, Flag()

    def __call__(self, events: Sequence[Event]) -> None:
        """Take what an engine emits after a step."""
        now = perf_counter()
        for event in events:
            if not isinstance(event, Delta):
                raise RuntimeError(f"a stream ended: {event.why}")
            if len(self._began) == self._streams:
                self.tokens += 1
            self._left -= event.finish is not None
        self._began |= {event.request for event in events}
        if len(self._began) == self._streams and not self.begin_s:
            self.begin_s = now
        if not self._left:
            self.end_s = now
            self.done.set()

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / (self.end_s - self.begin_s)


def rate(model: Model, make: Make, streams: int, prompt: int, output: int) -> float:
    """Return how many tokens a second so many streams get together."""
    counted, drawn = Counted(streams), np.random.default_rng(streams)
    step = make(model, streams)
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)

    def text(request: Request, ends: frozenset[int]) -> Text:
        letters = Decoder(stages({"type": "ByteFallback"}), lambda token: "a")  # random weights have no tokenizer
        return Text(letters, tuple(ends), ())

    engine = Engine(step, Fcfs(), text, counted)
    for number in range(streams):
        tokens = tuple(drawn.integers(0, step.vocabulary, prompt).tolist())
        engine.submit(Request(str(number), tokens, params, 0))
    engine.start()
    try:
        if not counted.done.wait(600):
            raise RuntimeError("the streams did not end in 600 s")
    finally:
        engine.close()
        step.close()
    return counted.rate


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-C", "--catalog", default=reader.default_location())
    parser.add_argument("--variant", help="digest of the variant; the pick if left out")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(words)


def main() -> None:
    """Print a line for each number of streams: medians of the rounds."""
    asked = options()
    with load(asked.catalog, asked.model, variant=asked.variant) as model:
        told = {knob: model.row["point"][knob] for knob in ("weight_format", "kv_dtype", "driver", "workers")}
        print(f"{asked.model} {model.row['variant']} {told} on {platform.node()}, {host.cores()} cores")
        print(f"prompt {asked.prompt}, output {asked.output} tokens, {asked.rounds} rounds; tokens/s of all streams")
        for streams in asked.streams:
            found: dict[str, list[float]] = {name: [] for name in STEPS}
            for _ in range(asked.rounds):
                for name, make in STEPS.items():
                    found[name].append(rate(model, make, streams, asked.prompt, asked.output))
            rates = {name: median(values) for name, values in found.items()}
            shown = ", ".join(f"{name} {value:.1f}" for name, value in rates.items())
            print(f"{streams} streams: {shown}; ratio {rates['one call'] / rates['a call each']:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
