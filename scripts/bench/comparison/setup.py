"""Set up the comparison: the peers' environment, the model in their formats, and llmbuild's variants of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.here import compile_here
from comparison.rounds import Participant, Worker, WorkerFailed
from comparison.table import OURS, STREAMING
from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.kernels import limits
from llmbuild.kernels.layouts import up_to
from llmbuild.process.child import Limits
from llmbuild.runtime import host, reader
from llmbuild.runtime.choose import refusal
from llmbuild.runtime.model import host_facts
from llmbuild.spec.recipe import Recipe

HERE = Path(__file__).parent.parent
REQUIREMENTS = HERE / "peers-requirements.txt"
PEER_WORKER, OWN_WORKER, STREAMING_WORKER = (HERE / f"{n}_worker.py" for n in ("peer", "own", "streaming"))

WRITERS = ("torch", "transformers", "gguf")
"""What writes the model for every peer."""

PACKAGES = {
    "llama.cpp": ("llama-cpp-python",),
    "openvino": ("openvino", "optimum-intel", "nncf"),
    "torch": (),
}
FORMATS = {"llama.cpp": ("f16", "q8_0", "q4_0"), "openvino": ("int8", "int4"), "torch": ("float32", "bfloat16")}
"""Peers and the weight formats they run in; the first ones when nothing is asked for are `USUAL`."""

USUAL = {**FORMATS, "torch": ("float32",)}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """The Python that runs the peers, and why a peer is not there (by peer; a peer that is there has no entry)."""

    python: Path
    reasons: dict[str, str]


def asked_peers(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return formats by peer from words such as `llama.cpp` or `openvino:int8,int4`.

    Raises:
        InputError: no such peer or format.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        name, _, listed = word.partition(":")
        if name not in FORMATS:
            raise InputError(f"no peer {name!r}; there are {', '.join(FORMATS)}")
        formats = tuple(listed.split(",")) if listed else USUAL[name]
        wrong = [f for f in formats if f not in FORMATS[name]]
        if wrong:
            raise InputError(f"{name} has no format {wrong[0]!r} here; there are {', '.join(FORMATS[name])}")
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), *formats)))
    return found


def pins(names: Sequence[str], text: str) -> dict[str, str]:
    """Return the requirement lines of packages, by name."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    by_name = {re.split(r"[\[=]", line)[0]: line for line in lines}
    return {name: by_name[name] for name in names}


def environment(folder: Path, own: bool, peers: Sequence[str], say: Say) -> Environment:
    """Return the environment in `folder`; one of our own is made and filled, a user's is taken as it is.

    Raises:
        InputError: there is none, and it is not ours to make or cannot be made.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        if not own:
            raise InputError(f"{folder}: no environment here: there is no {python}")
        say(f"making {folder}")
        made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=False)
        if made.returncode:
            raise InputError(f"{folder}: cannot make an environment: {made.stderr.strip() or made.stdout.strip()}")
    base = _missing(python, WRITERS, own, say)
    reasons = {peer: base or _missing(python, PACKAGES[peer], own, say) for peer in peers}
    return Environment(python, {peer: why for peer, why in reasons.items() if why})


def _missing(python: Path, names: Sequence[str], install: bool, say: Say) -> str:
    """Return why packages are not there, after an attempt to install them where that is allowed."""
    lines = pins(names, REQUIREMENTS.read_text())
    found = _versions(python, names)
    lacking = [n for n in names if found[n] is None or (install and found[n] != lines[n].split("==")[1])]
    if not lacking:
        return ""
    if not install:
        return f"{', '.join(lacking)} not installed in {python.parent.parent}"
    say(f"installing {' '.join(lines[n] for n in lacking)}")
    log = python.parent.parent / f"install-{lacking[0]}.log"
    with log.open("w") as out:
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *(lines[n] for n in names)]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code == 0:
        return ""
    errors = [line.strip() for line in log.read_text().splitlines() if line.lower().lstrip().startswith("error")]
    return f"does not install: {errors[-1] if errors else f'pip ended with {code}'} (all of it in {log})"


def _versions(python: Path, names: Sequence[str]) -> dict[str, str | None]:
    code = (
        "import json, sys\nfrom importlib import metadata\nfound = dict.fromkeys(sys.argv[1:])\n"
        "for name in found:\n"
        "    try: found[name] = metadata.version(name).partition('+')[0]\n"
        "    except metadata.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{python}: does not run: {done.stderr.strip()}")
    return dict(json.loads(done.stdout))


def model_folder(cache: Path, recipe: Recipe) -> Path:
    """Return where the recipe's model is kept for the peers: named by its configuration and seed."""
    source = Path(recipe.model.location)
    config = source / "config.json"
    body = config.read_text() if config.is_file() else recipe.model.location
    named = {"config": body, "random_init": recipe.model.random_init, "seed": recipe.model.seed}
    return cache / f"{recipe.name}-{digest.short(digest.of(named))}"


def peer_participants(
    asked: dict[str, tuple[str, ...]],
    place: Environment,
    recipe: Recipe,
    folder: Path,
    shared: dict[str, Any],
    limits: Limits,
    say: Say,
) -> list[Participant]:
    """Write the model for each peer and return the participants, those that cannot run with their reason.

    `shared` is what every peer's opening has: threads and positions.
    """
    command = (str(place.python), str(PEER_WORKER))
    say(f"writing {recipe.name} for the peers into {folder}")
    found = []
    for peer, formats in asked.items():
        for kind in formats:
            why = place.reasons.get(peer, "")
            if not why:
                say(f"preparing {peer} {kind}")
                why = _prepare(command, peer, kind, recipe, folder, limits)
            opening = {"peer": peer, "folder": str(folder), "format": kind, **shared}
            found.append(Participant(f"{peer} {kind}", peer, kind, command, opening, absent=why))
    return found


def _prepare(command: tuple[str, ...], peer: str, kind: str, recipe: Recipe, folder: Path, limits: Limits) -> str:
    worker = Worker(command, limits)
    try:
        worker.ask(
            "write",
            source=recipe.model.location,
            random_init=recipe.model.random_init,
            seed=recipe.model.seed,
            folder=str(folder),
            checkpoint=peer != "llama.cpp",
            gguf=[kind] if peer == "llama.cpp" else [],
        )
        if peer == "openvino":
            worker.ask("export", folder=str(folder), format=kind)
    except WorkerFailed as failed:
        return f"its model cannot be made: {failed}"
    finally:
        worker.close()
    return ""


def usable(catalog: Path, model: str, positions: int) -> list[dict[str, Any]]:
    """Return the measured rows of a model that open on this host and hold `positions`; none without a catalog."""
    if not (catalog / reader.FILE).is_file():
        return []
    facts = host_facts()
    rows = [
        row
        for row in reader.variants(catalog, model, everything=True)
        if row["tpot_s"] and row["ttft_s"] and row["abi"]["context"] >= positions and not refusal(row, facts)
    ]
    here = [row for row in rows if row["machine_digest"] == facts.machine]
    return here or rows


def best(rows: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, row) of the fastest variant of each weight format at decoding, and of that at the prompt."""
    found: list[tuple[str, dict[str, Any]]] = []
    for kind in sorted({str(row["point"]["weight_format"]) for row in rows}):
        of_kind = [row for row in rows if row["point"]["weight_format"] == kind]
        decode = min(of_kind, key=lambda row: (row["tpot_s"], row["variant"]))
        prompt = min(of_kind, key=lambda row: (row["ttft_s"], row["variant"]))
        if decode["variant"] == prompt["variant"]:
            found.append((f"{OURS} {kind}", decode))
        else:
            found += [(f"{OURS} {kind} tpot", decode), (f"{OURS} {kind} ttft", prompt)]
    return found


def own_participants(
    catalog: Path, rows: Sequence[dict[str, Any]], threads: int, everyone: bool = False
) -> list[Participant]:
    """Return our participants, with as many workers as the peers have threads: the best variants, or all of them."""
    from llmbuild.report.rows import differences

    found = []
    named = [(f"{OURS} {row['point']['weight_format']} {digest.short(row['variant'])}", row) for row in rows]
    for name, row in named if everyone else best(rows):
        point = row["point"]
        workers = int(point["workers"]) if threads == host.cores() else threads
        opening = {
            "artifact": str(reader.blob_path(catalog, row["artifact"])),
            "parameters": str(reader.blob_path(catalog, row["parameters"])),
            "abi": row["abi"],
            "driver": point["driver"],
            "workers": workers,
        }
        command = (sys.executable, str(OWN_WORKER))
        kind = str(point["weight_format"])
        found.append(Participant(name, OURS, kind, command, opening, row["variant"], differences(row)))
    return found


def streaming_participants(folder: Path, ours: Sequence[Participant], threads: int) -> list[Participant]:
    """Return, for each weight format of ours, who reads as many bytes as its parameters have.

    Raises:
        InputError: the kernel that reads does not compile.
    """
    sizes = {p.format: Path(p.opening["parameters"]).stat().st_size for p in ours}
    return [_streaming(folder, kind, up_to(size, 512 * threads), threads) for kind, size in sizes.items()]


def _streaming(folder: Path, kind: str, size: int, threads: int) -> Participant:
    folder.mkdir(parents=True, exist_ok=True)
    source, artifact = (folder / f"read-{size}-{threads}.{ending}" for ending in ("mlir", "vmfb"))
    source.write_text(limits.module(host.features(), [threads], size))
    failure = compile_here(source, artifact)
    if failure is not None:
        raise InputError(f"the kernel that reads {size} bytes does not compile: {failure.reason}")
    opening = {"artifact": str(artifact), "read_bytes": size, "threads": threads}
    command = (sys.executable, str(STREAMING_WORKER))
    return Participant(f"{STREAMING} {kind}", STREAMING, kind, command, opening)
