"""`llmbuild serve` beside llama.cpp's own server on the same GGUF file: real HTTP, the same client, interleaved rounds.

    python scripts/bench/serve_http.py -C CATALOG [--variant DIGEST ...] [--trace FILE.csv --scale P:O] [--json]
    python scripts/bench/serve_http.py -C CATALOG --alone        one stream beside the loader without a server
    python scripts/bench/serve_http.py -C CATALOG --prefix 960   first tokens where a prompt's beginning is known
    python scripts/bench/serve_http.py -C CATALOG --openvino FOLDER --python PYTHON     beside OpenVINO GenAI
    python scripts/bench/serve_http.py -C CATALOG --vllm FOLDER --python PYTHON         beside vLLM

llama-server is built from the source package that llama-cpp-python is built from, in `.peers/` on first use (some ten
minutes), or is in the folder that `--environment` names, or is the file of `--server`. It runs the file as it is; ours
is the variant of the very same blocks, and what `--variant` names beside it.

With --openvino the peer is OpenVINO GenAI's continuous batching, by `openvino_server.py` on what `openvino_model.py`
wrote, with the Python that has it: `pip install openvino-genai optimum-intel[openvino] starlette uvicorn`.

With --vllm it is vLLM's own server on a Hugging Face folder, in bf16: its weights on CPUs have 16 bits.

All servers are up all the time, on the same cores, with memory in f16 for as many sequences of the variant's context;
only one has requests at a time. In each round every server gets the same requests, in random order: completions of
token ids, streamed, greedy, with forced lengths. Lengths are those of a trace of Azure's public form (columns
ContextTokens, GeneratedTokens), divided by `--scale`, or drawn. Prompts are pieces of `--text`, no two of which begin
alike, and caches of prompts are off where they can be: no answer may take tokens of one. Each of the streams sends its
next request when its last one has ended. One client drives all of them and shares the cores that servers do not have
alone (`--threads`); the CPU time that it takes is told, as a share of one core.

Ratios are ours over llama-server's, paired by round, with their 95 % interval. A percentile is one over the requests of
all rounds; its ratio is paired by the percentiles of each round, where a p99 of few requests is their worst one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

import real_model
from comparison import asks, http_servers, llama_server, serve_table, setup
from comparison.asks import Ask, Cutter
from comparison.conversion import ROOT
from comparison.http_servers import Entrant, Run, Server
from comparison.rounds import Worker
from comparison.script import end, say

import llmbuild
from llmbuild.digest import short
from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from llmbuild.profiler import noise
from llmbuild.report.rows import differences, quantity, table
from llmbuild.runtime import host, reader
from llmbuild.spec.files.reader import read_recipe

PEER, OPENVINO, VLLM = llama_server.NAME, "openvino-genai", "vllm"
EXACT = {
    "q4_1": {"weight_format": ("q4_1",), "head_format": ("q8_0",)},
    "q8_0": {"weight_format": ("q8_0",), "head_format": ("same", "q8_0")},
}
"""The choices of a variant that has the very blocks of a file, by the format of the file's matrices."""
UNCACHED, CACHED = {"cache_prompt": False}, {"cache_prompt": True}
"""What requests to llama-server say of its cache of prompts."""
HERE = Path(__file__).parent
TAIL = 16
"""Tokens of a prompt behind those that it shares."""
OFF = 64
"""Candidates among which prompts with long answers are looked for, for each one that is needed."""


@dataclass(frozen=True)
class Cores:
    """Which cores the servers have, and which the client: its own ones where there are more than the servers use."""

    servers: tuple[int, ...]
    client: tuple[int, ...]

    @staticmethod
    def of(threads: int) -> Cores:
        """Return the cores of servers with so many threads."""
        here = sorted(os.sched_getaffinity(0))
        return Cores(tuple(here[:threads]), tuple(here[threads:] or here))

    def told(self) -> str:
        """Return who runs where."""
        shared = "shares these cores" if set(self.client) & set(self.servers) else f"has {len(self.client)} of its own"
        return f"servers on {len(self.servers)} cores, the client {shared}"


# --- who takes part --------------------------------------------------------------------------------------------------


def own_rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the variants that take part: the fastest of the file's own blocks, and those that are named.

    Raises:
        InputError: there is none, or a name is none of a variant that runs here.
    """
    name = read_recipe(asked.recipe).name
    usable = [row for row in setup.usable(asked.catalog, name, 2) if row["abi"].get("page")]
    wanted = EXACT[asked.blocks]
    exact = [row for row in usable if all(row["point"].get(knob) in values for knob, values in wanted.items())]
    if not exact:
        told = " and ".join(f"{knob}={' or '.join(values)}" for knob, values in wanted.items())
        raise InputError(f"{asked.catalog}: no variant of {name} with {told} runs here: llmbuild build {asked.recipe}")
    found = [min(exact, key=lambda row: (row["tpot_s"], row["variant"]))]
    for digest in asked.variant:
        named = [row for row in usable if row["variant"].startswith(digest)]
        if len({row["variant"] for row in named}) != 1:
            raise InputError(f"--variant {digest}: {len(named)} variants of {name} in {asked.catalog} are named so")
        found.append(named[0])
    return list({row["variant"]: row for row in found}.values())


def ours(asked: argparse.Namespace, row: dict[str, Any], sequences: int) -> Entrant:
    """Return our server of a variant."""
    command = [sys.executable, "-m", "llmbuild", "serve", row["model"], "-C", str(asked.catalog.absolute())]
    command += ["--variant", row["variant"], "--max-sequences", str(sequences), "--port", "0"]
    name = f"llmbuild {row['point']['weight_format']} {short(row['variant'])}"
    return Entrant(name, tuple(command), row["model"], {}, row["variant"], differences(row))


def theirs(asked: argparse.Namespace, context: int, sequences: int) -> Entrant:
    """Return the peer: another's server on a folder, or llama-server on the file, built first where that is ours to do.

    Raises:
        InputError: it is not there.
    """
    if asked.openvino:
        script = [str(asked.python.absolute()), str(HERE / "openvino_server.py"), str(asked.openvino.absolute())]
        bounds = {"sequences": sequences, "context": context, "threads": asked.threads}
        words = [word for name, value in bounds.items() for word in (f"--{name}", str(value))]
        return Entrant(OPENVINO, (*script, *words), asked.openvino.name)
    if asked.vllm:
        return vllm(asked, context, sequences)
    gguf = real_model.gguf_of(asked)
    made = asked.server
    if made is None:
        folder = (asked.environment or ROOT / ".peers").absolute()
        made = llama_server.server(folder, Path(sys.executable), not asked.environment, say)
    if not made.is_file():
        raise InputError(f"--server {made}: no such file")
    command = llama_server.command(made.absolute(), gguf, sequences, context, asked.threads)
    return Entrant(PEER, tuple(command), gguf.stem, CACHED if asked.prefix else UNCACHED)


def vllm(asked: argparse.Namespace, context: int, sequences: int) -> Entrant:
    """Return vLLM's server on a free port, with caches for at least so many sequences and no cache of prompts."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(asked.vllm.absolute())
    words = [
        "--model",
        folder,
        "--dtype",
        "bfloat16",
        "--max-num-seqs",
        str(sequences),
        "--max-model-len",
        str(context),
    ]
    words += ["--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port)]
    told = ["VLLM_CPU_KVCACHE_SPACE=1", f"OMP_NUM_THREADS={asked.threads}", "VLLM_CPU_OMP_THREADS_BIND=nobind"]
    offline = ["HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1"]
    command = ["env", *told, *offline, str(asked.python.absolute()), "-m", "vllm.entrypoints.openai.api_server", *words]
    return Entrant(VLLM, tuple(command), folder)


@contextmanager
def client(asked: argparse.Namespace, cores: Cores) -> Iterator[Worker]:
    """Start the client on its cores, and end it with the block."""
    made = Worker([sys.executable, str(HERE / "http_client.py")], Limits(seconds=asked.limit))
    try:
        os.sched_setaffinity(made.process_id, cores.client)
        yield made
    finally:
        made.close()


def cutter(asked: argparse.Namespace, row: dict[str, Any]) -> Cutter:
    """Return what cuts prompts out of the text.

    Raises:
        InputError: it cannot be read.
    """
    files = [asked.text] if asked.text else sorted((ROOT / "docs").rglob("*.md"))
    try:
        whole = "\n".join(file.read_text() for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {asked.text}: {error}") from None
    with llmbuild.load(asked.catalog, row["model"], variant=row["variant"]) as model:
        return Cutter(model.tokenizer.encode(whole, False).tokens, random.Random(asked.seed))


# --- what is measured ------------------------------------------------------------------------------------------------


def under_load(
    asked: argparse.Namespace, servers: Sequence[Server], worker: Worker, cut: Cutter, context: int
) -> tuple[dict[int, dict[str, dict[int, Run]]], list[str]]:
    """Return what each server answered at each number of streams, by round, and where that is not what was asked for.

    Round 0 warms up and is not kept.
    """
    lengths = asks.of_trace(asked.trace, asks.scale_of(asked.scale)) if asked.trace else asks.drawn
    order, wrong = random.Random(asked.seed), list[str]()
    found: dict[int, dict[str, dict[int, Run]]] = {
        streams: {one.entrant.name: {} for one in servers} for streams in asked.streams
    }
    for number in range(asked.rounds + 1):
        for streams in asked.streams:
            drawn = cut.asks(lengths, streams * asked.requests, context)
            for server in order.sample(list(servers), len(servers)):
                made = http_servers.run(worker, server, drawn, streams)
                wrong += http_servers.unlike(server.entrant.name, made.answers)
                if number:
                    found[streams][server.entrant.name][number] = made
        say(f"[{number}/{asked.rounds}] rounds of {', '.join(map(str, asked.streams))} streams")
    return found, wrong


def beside_the_loader(
    asked: argparse.Namespace, server: Server, worker: Worker, cut: Cutter, cores: Cores
) -> tuple[dict[str, Any], list[str]]:
    """Return seconds per token of one stream, and of the loader alone on the same prompts, and where answers differ."""
    loader = Worker([sys.executable, str(HERE / "loader_worker.py")], Limits(seconds=asked.limit))
    order, wrong, taken = random.Random(asked.seed), list[str](), dict[str, list[float]](server=[], loader=[])
    shares, spent = [], 0
    try:
        os.sched_setaffinity(loader.process_id, cores.servers)
        where = {"catalog": str(asked.catalog.absolute()), "model": server.entrant.model}
        loader.ask("open", **where, variant=server.entrant.variant)
        for number, ask in enumerate(_long(asked, loader, cut)):
            told: dict[str, Any] = {}
            for who in order.sample(["server", "loader"], 2):
                if who == "loader":
                    told[who] = loader.ask("answer", prompt=ask.prompt, count=ask.output)
                else:
                    made = http_servers.run(worker, server, [ask], 1, ignore_eos=False)
                    told[who] = made.answers[0]
                    shares.append(made.client_cpu_s / made.wall_s)
            if told["loader"]["text"] != told["server"].text:
                wrong.append(f"the loader answers {told['loader']['text']!r}, the server {told['server'].text!r}")
            if number:
                taken["server"].append(told["server"].tpot_s)
                taken["loader"].append(told["loader"]["tpot_s"])
            say(f"[{number}/{asked.rounds}] rounds of the server and the loader")
        spent = noise.cpu_ticks([loader.process_id])
    finally:
        loader.close()
    ratio = serve_table.paired(taken["server"], taken["loader"])
    middle = {f"{name}_tpot_s": sorted(values)[len(values) // 2] for name, values in taken.items()}
    told = {"ratio": ratio, "client_cpu_share": sum(shares) / len(shares), "loader_ticks": spent, "samples": taken}
    return {**middle, **told}, wrong


def _long(asked: argparse.Namespace, loader: Worker, cut: Cutter) -> list[Ask]:
    """Return prompts whose answers do not end by themselves: the loader cannot go on behind an end token.

    Raises:
        InputError: too few are found.
    """
    found: list[Ask] = []
    for _ in range(OFF * (asked.rounds + 1)):
        ask = Ask(cut.cut(asks.PROMPT), asked.output)
        if loader.ask("answer", prompt=ask.prompt, count=ask.output)["output_tokens"] == ask.output:
            found.append(ask)
        if len(found) == asked.rounds + 1:
            return found
    raise InputError(f"only {len(found)} answers have {asked.output} tokens: take fewer by --output")


def of_prefixes(
    asked: argparse.Namespace, servers: Sequence[Server], worker: Worker, cut: Cutter
) -> tuple[dict[str, Any], list[str]]:
    """Return, for each server, seconds to the first token where a prompt's beginning is new and where it is known."""
    order, wrong = random.Random(asked.seed), list[str]()
    taken: dict[str, dict[str, list[float]]] = {one.entrant.name: {"new": [], "known": []} for one in servers}
    counts: dict[str, int] = {}
    for number in range(asked.rounds + 1):
        begin, first, second = cut.cut(asked.prefix), cut.cut(TAIL), cut.cut(TAIL)
        for server in order.sample(list(servers), len(servers)):
            name = server.entrant.name
            for kind, rest in (("new", first), ("known", second)):
                made = http_servers.run(worker, server, [Ask((*begin, *rest), asks.LEAST_OUTPUT)], 1).answers[0]
                wrong += http_servers.unlike(name, [made], kind == "known")
                counts[name] = made.cached_tokens or 0
                if number:
                    taken[name][kind].append(made.ttft_s)
        say(f"[{number}/{asked.rounds}] rounds of prompts with {asked.prefix} shared tokens")
    rows = {
        name: {
            **{f"{kind}_ttft_s": sorted(values)[len(values) // 2] for kind, values in kinds.items()},
            "ratio": serve_table.paired(kinds["known"], kinds["new"]),
            "cached_tokens": counts[name],
            "samples": kinds,
        }
        for name, kinds in taken.items()
    }
    return rows, wrong


# --- the document and its text ---------------------------------------------------------------------------------------


def document(asked: argparse.Namespace) -> dict[str, Any]:
    """Run what is asked for and return it as one document.

    Raises:
        InputError: a server, the file, the trace or a variant is not there.
    """
    variants = own_rows(asked)
    context, sequences = min(int(row["abi"]["context"]) for row in variants), max(asked.streams)
    if asked.prefix and asked.prefix + TAIL + asks.LEAST_OUTPUT > context:
        raise InputError(f"--prefix {asked.prefix}: the context has {context} tokens")
    cores, cut = Cores.of(asked.threads), cutter(asked, variants[0])
    entering = [ours(asked, row, sequences) for row in (variants[:1] if asked.alone else variants)]
    if not asked.alone:
        entering = [theirs(asked, context, sequences), *entering]
    made: dict[str, Any] = {
        "machine": host.machine().describe(),
        "file": (asked.openvino or asked.vllm or real_model.gguf_of(asked)).name,
        "peer": entering[0].name,
        **{name: getattr(asked, name) for name in ("threads", "rounds", "requests", "output", "prefix", "seed")},
        "lengths": f"{asked.trace.name} / {asked.scale}" if asked.trace else "drawn",
        "context": context,
        "sequences": sequences,
        "cores": cores.told(),
        "choices": {one.name: one.choices for one in entering if one.variant},
    }
    with http_servers.started(entering, cores.servers) as servers, client(asked, cores) as worker:
        processes = [os.getpid(), worker.process_id, *(one.process for one in servers)]
        before, own = noise.snapshot(), noise.cpu_ticks(processes)
        if asked.alone:
            made["alone"], wrong = beside_the_loader(asked, servers[0], worker, cut, cores)
        elif asked.prefix:
            made["prefixes"], wrong = of_prefixes(asked, servers, worker, cut)
        else:
            found, wrong = under_load(asked, servers, worker, cut, context)
            made["rows"] = serve_table.rows(found, made["peer"])
        spent = max(0, noise.cpu_ticks(processes) - own) + made.get("alone", {}).get("loader_ticks", 0)
        made["noise"] = noise.verdict(before, noise.snapshot(), asked.threads, spent)
    made["wrong"] = wrong
    return made


def text(made: dict[str, Any]) -> str:
    """Return the table of a document, and what was checked."""
    lines = [f"{made['machine']}; {made['cores']}; {made['file']}, context {made['context']}"]
    if "alone" in made:
        lines += _alone_text(made)
    elif "prefixes" in made:
        lines += _prefix_text(made)
    else:
        told = f"{made['rounds']} rounds, {made['requests']} requests for each stream, lengths: {made['lengths']}"
        lines += [f"{told}; memory for {made['sequences']} sequences", serve_table.text(made["rows"], made["peer"])]
        lines += [
            f"{row['server']}, {row['streams']} streams: {row['requests']} requests, "
            f"{row['same_text']:.0%} answered with the same text"
            for row in made["rows"]
            if "same_text" in row
        ]
    lines += [f"{name}: {choices}" for name, choices in made["choices"].items()]
    lines += [f"wrong: {one}" for one in made["wrong"]] or ["all answers have the tokens that were asked for"]
    lines += [f"noisy machine: {made['noise']}" if made["noise"] else "the machine was quiet"]
    return "\n".join(lines)


def _alone_text(made: dict[str, Any]) -> list[str]:
    found, ratio = made["alone"], made["alone"]["ratio"]
    low, middle, high = (f"{(ratio[name] - 1):+.1%}" for name in ("low", "median", "high"))
    return [
        f"one stream, {made['output']} tokens behind {asks.PROMPT}, {made['rounds']} rounds: "
        f"server {quantity(found['server_tpot_s'], 's')} a token, loader {quantity(found['loader_tpot_s'], 's')}; "
        f"the server costs {middle} [{low}, {high}]; the client takes {found['client_cpu_share']:.1%} of a core"
    ]


def _prefix_text(made: dict[str, Any]) -> list[str]:
    lines = [
        [
            name,
            quantity(row["new_ttft_s"], "s"),
            quantity(row["known_ttft_s"], "s"),
            serve_table.interval(row["ratio"]),
            row["cached_tokens"],
        ]
        for name, row in made["prefixes"].items()
    ]
    told = f"first tokens of prompts of {made['prefix']} tokens and {TAIL} more, {made['rounds']} rounds:"
    return [told, table(["server", "new", "known", "ratio", "taken over"], lines)]


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    add("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-135m-instruct.yaml")
    add("--gguf", type=Path, help=f"the recipe's file; default: that of the package {real_model.PACKAGE}")
    add("--blocks", choices=list(EXACT), default="q4_1", help="the format of the file's matrices")
    add("--environment", type=Path, help="a folder with llama-server/bin/llama-server, instead of .peers/")
    add("--server", type=Path, help="llama-server itself, instead of one in a folder")
    add("--openvino", type=Path, metavar="FOLDER", help="the peer is OpenVINO GenAI on this folder, not llama-server")
    add("--vllm", type=Path, metavar="FOLDER", help="the peer is vLLM on this folder, not llama-server")
    add("--python", type=Path, default=Path(sys.executable), help="the Python that has openvino-genai or vLLM")
    add("--variant", nargs="+", default=[], metavar="DIGEST", help="variants beside the one of the file's blocks")
    add("--streams", type=int, nargs="+", default=[1, 4, 8, 16], help="requests at a time")
    add("--requests", type=int, default=3, help="requests of each stream in a round")
    add("--rounds", type=int, default=8)
    add("--threads", type=int, default=host.cores(), help="cores of each server; the client has those that are left")
    add("--trace", type=Path, help="a CSV file of Azure's form; else lengths are drawn")
    add("--scale", default="8:4", metavar="PROMPT:OUTPUT", help="by what a trace's lengths are divided")
    add("--text", type=Path, help="what prompts are cut out of; default: the pages of docs/")
    add("--alone", action="store_true", help="one stream beside the loader without a server")
    add("--output", type=int, default=64, help="tokens of an answer beside the loader")
    add("--prefix", type=int, default=0, metavar="N", help="first tokens behind N tokens that are known, and are not")
    add("--limit", type=float, default=600.0, help="seconds that the requests of one server in a round may take")
    add("--seed", type=int, default=0)
    add("--json", action="store_true")
    found = parser.parse_args(words)
    for name in ("requests", "rounds", "threads", "output"):
        if getattr(found, name) < 1:
            parser.error(f"--{name} is too small")
    if min(found.streams) < 1 or found.prefix < 0 or (found.alone and found.prefix):
        parser.error("--streams are 1 or more, --prefix is positive, and --alone goes without --prefix")
    if (found.openvino or found.vllm) and (found.alone or found.prefix or (found.openvino and found.vllm)):
        parser.error("--openvino and --vllm are for streams, one at a time, without --alone and --prefix")
    if found.threads > len(os.sched_getaffinity(0)):
        parser.error(f"--threads {found.threads}: there are {len(os.sched_getaffinity(0))} cores")
    return found


def main() -> int:
    """Print the table; 1 where an answer is not what was asked for."""
    asked = options()
    asks.scale_of(asked.scale)
    made = document(asked)
    print(json.dumps(made) if asked.json else text(made))
    return 1 if made["wrong"] else 0


if __name__ == "__main__":
    end(main)
