"""Compare llmbuild's best variants with other CPU runtimes on the same shape, in interleaved rounds.

    python scripts/bench/peers.py [--recipe RECIPE] [-C CATALOG] [--peers llama.cpp openvino:int8 torch] [--json]

The peers have their own environment, `.peers/`, made on first use (llama.cpp is built from source: minutes). Every
participant is a running process; each round runs all of them in random order: the same prompt, then the same tokens
one by one behind `--context` of them, on the same number of threads. A ratio is llmbuild's time over the peer's,
paired by round, with its 95 % bootstrap interval: below 1 llmbuild is faster. `of streaming` is decoding's share of
the rate of a loop that only reads the same bytes, in the same rounds. Speed does not depend on the values of the
weights, so random ones do, and in llama.cpp's files all layers have those of the first; quality is not compared here.
With `--alone`, one participant at a time opens its model in each round, so that several large ones need not fit.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from comparison import setup, table
from comparison.rounds import Participant, Plan, compare
from comparison.script import end, say

from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from llmbuild.runtime import host, reader
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
ADDRESS_SPACE = 1 << 40
"""Bytes; runtimes reserve much more than they use, so this only stops what runs away."""


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-135m.yaml")
    add_shared(parser)
    parser.add_argument("--peers", nargs="*", default=list(setup.FORMATS), metavar="PEER[:FORMAT,...]")
    parser.add_argument(
        "--formats",
        nargs="+",
        metavar="FORMAT",
        help="our weight formats, or families such as int4; default: all",
    )
    parser.add_argument("--no-streaming", action="store_true", help="leave out who only reads the bytes")
    return checked(parser, words)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add the options of every comparison in rounds."""
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--environment", type=Path, help="one that has the peers, instead of .peers/; left as it is")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens one by one")
    parser.add_argument(
        "--context", type=int, default=0, help="tokens before the first single one; at least the prompt"
    )
    parser.add_argument("--threads", type=int, default=host.cores())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--loads", type=int, default=3, help="fresh starts of each participant")
    parser.add_argument(
        "--alone", action="store_true", help="one participant open at a time, for models that fill the memory"
    )
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one step of a participant may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")


def checked(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """Return the options, after a check of the counts."""
    found = parser.parse_args(words)
    for name in ("prompt", "decode", "threads", "rounds", "loads"):
        if getattr(found, name) < (2 if name == "prompt" else 1):
            parser.error(f"--{name} is too small")
    return found


def plan(asked: argparse.Namespace, vocabulary: int) -> Plan:
    """Return what each round does: tokens by the seed, the same for everyone."""
    drawn = random.Random(asked.seed)
    tokens = [drawn.randrange(vocabulary) for _ in range(positions(asked))]
    at = asked.prompt, max(asked.prompt, asked.context)
    limits = Limits(seconds=asked.limit, memory_bytes=ADDRESS_SPACE)
    prompt, fill, forced = tokens[: at[0]], tokens[at[0] : at[1]], tokens[at[1] :]
    steps = tuple(prompt), tuple(forced), tuple(fill)
    return Plan(*steps, asked.rounds, asked.loads, limits, asked.seed, asked.threads, asked.alone)


def positions(asked: argparse.Namespace) -> int:
    """Return how many tokens a cache must hold."""
    return int(max(asked.prompt, asked.context) + asked.decode)


def own_rows(asked: argparse.Namespace, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the rows of our variants, after a build where the catalog has none.

    Raises:
        InputError: no variant holds that many tokens, or the build made none.
    """
    need = positions(asked)
    rows = setup.usable(asked.catalog, recipe.name, need)
    if rows:
        return rows
    if recipe.context < need:
        raise InputError(
            f"{asked.recipe}: its longest context is {recipe.context}, this comparison needs {need}: "
            f"give it a workload with `context: {need}` or more"
        )
    say(f"no variant of {recipe.name} in {asked.catalog} runs here: building it")
    command = [sys.executable, "-m", "llmbuild", "build", str(asked.recipe), "-C", str(asked.catalog)]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    rows = setup.usable(asked.catalog, recipe.name, need)
    if not rows:
        raise InputError(f"`{' '.join(command[2:])}` ended with {code} and made no variant that runs here")
    return rows


def participants(asked: argparse.Namespace, recipe: Recipe, rows: list[dict[str, Any]]) -> list[Participant]:
    """Return ours and the peers; what is not there takes part with its reason."""
    peers = setup.asked_peers(asked.peers)
    folder = asked.environment or ROOT / ".peers"
    place = setup.environment(folder.absolute(), asked.environment is None, list(peers), say) if peers else None
    taking = [row for row in rows if asked.formats is None or _is_of(row["point"]["weight_format"], asked.formats)]
    if not taking:
        raise InputError(f"{asked.catalog} has no variant of {recipe.name} in {' '.join(asked.formats)} that runs here")
    ours = setup.own_participants(asked.catalog, taking, asked.threads)
    if not asked.no_streaming:
        ours += setup.streaming_participants(ROOT / ".peers" / "streaming", ours, asked.threads)
    if place is None:
        return ours
    shared = {"threads": asked.threads, "positions": positions(asked)}
    limits = Limits(seconds=max(asked.limit, 1800.0), memory_bytes=ADDRESS_SPACE)
    model = setup.model_folder(ROOT / ".peers" / "models", recipe)
    return ours + setup.peer_participants(peers, place, recipe, model, shared, limits, say)


def _is_of(weight_format: str, formats: list[str]) -> bool:
    return weight_format in formats or table.family(weight_format) in formats


def report(asked: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Run the comparison and return it as one document."""
    rows = own_rows(asked, recipe)
    entering = participants(asked, recipe, rows)
    found, noisy = compare(entering, plan(asked, min(r["abi"]["vocabulary"] for r in rows)), say)
    asked_for = {n: getattr(asked, n) for n in ("prompt", "decode", "threads", "rounds", "loads", "seed")}
    return {
        "machine": host.machine().describe(),
        "model": recipe.name,
        **asked_for,
        "context": max(asked.prompt, asked.context),
        "noise": noisy,
        "rows": table.rows(found),
    }


def main() -> int:
    """Print the table; 1 when none of ours ran through."""
    asked = options()
    made = report(asked, read_recipe(asked.recipe))
    if asked.json:
        print(json.dumps(made))
    else:
        print(
            f"{made['machine']}; {made['model']}, batch 1, {asked.threads} threads, {asked.rounds} rounds, "
            f"{asked.decode} tokens behind {made['context']}"
        )
        print(table.text(made["rows"], asked.prompt))
        print("ratios are ours over the peer's, paired by round, with their 95 % interval: below 1 ours is faster")
        print(f"noisy machine: {made['noise']}" if made["noise"] else "the machine was quiet")
    return 0 if any(r["runtime"] == table.OURS and r["status"] == "measured" for r in made["rows"]) else 1


if __name__ == "__main__":
    end(main)
