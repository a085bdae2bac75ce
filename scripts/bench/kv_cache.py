"""What a KV cache of fewer bits costs and gives at a long context: quality, time per token and memory per sequence.

    python scripts/bench/kv_cache.py [-C CATALOG] [--recipe RECIPE] [--caches KIND...] [--tokens N] [--windows W]
        [--rounds R] [--text FILE...] [--json]

The recipe's first point with llmbuild's kernels is compiled for each kind of cache, once; artifacts are kept in the
catalog. Quality is KL divergence and top-1 agreement per token against the same weights with a cache of f32, in windows
of N tokens of the text, over the second half of each: every token has at least N / 2 behind it. The error is that of
the mean over blocks of 64 tokens. Time per token is that of single tokens behind N, of running processes in interleaved
rounds; the ratio to f16 is paired by round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison.conversion import ROOT
from comparison.rounds import Entrant, Participant, Plan, compare
from comparison.script import end, say
from comparison.setup import OWN_WORKER
from comparison.table import ratio
from numpy.typing import NDArray

from llmbuild.build.job import Job
from llmbuild.build.jobs import job_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.catalog.writer import Catalog
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.kernels.kept import CACHES
from llmbuild.process.child import Limits
from llmbuild.profiler import statistics
from llmbuild.report.rows import quantity, table
from llmbuild.runtime import host, reader
from llmbuild.runtime.session import Session, Settings
from llmbuild.runtime.tokenizer import Tokenizer
from llmbuild.serve.budget import cache_bytes
from llmbuild.spec.program import abi_from
from llmbuild.spec.variant import Failure

EXACT, USUAL = "f32", "f16"
"""The cache that quality is measured against, and the one that time is compared with."""
UNKNOWN = dict.fromkeys(("quality_kl", "kl_error", "quality_top1"))
BLOCK = 64
"""Tokens whose mean is one sample of the error: neighbours are alike."""
LIMITS = Limits(seconds=300.0, memory_bytes=1 << 40)


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--recipe", type=Path, default=ROOT / "scripts" / "bench" / "studies" / "long-context.yaml")
    parser.add_argument("--caches", nargs="+", default=CACHES, choices=CACHES, help="all by default")
    parser.add_argument("--tokens", type=int, default=1792, help="of a window, and of the prompt of a round")
    parser.add_argument(
        "--windows", type=int, default=2, help="windows of the text that quality is measured on; 0: of none"
    )
    parser.add_argument("--decode", type=int, default=48, help="tokens one by one in a round")
    parser.add_argument("--rounds", type=int, default=8, help="0: no time is measured")
    parser.add_argument("--text", type=Path, nargs="+", help="prose; docs/explanation and docs/decisions by default")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def made(asked: argparse.Namespace, job: Job) -> list[Participant]:
    """Return a variant for each kind of cache, compiled if it is not in the catalog.

    Raises:
        InputError: one cannot be made.
    """
    catalog = Catalog(asked.catalog)
    steps = Steps(job, catalog)
    try:
        catalog.register(steps.registered)
        return [_made(asked, job, steps, kind) for kind in dict.fromkeys((EXACT, *asked.caches))]
    finally:
        steps.close()
        catalog.close()


def _made(asked: argparse.Namespace, job: Job, steps: Steps, kind: str) -> Participant:
    say(f"making {kind}")
    settled = {knob.name: knob.domain[0] for knob in job.space.knobs}
    point = job.space.complete({**settled, "kv_dtype": kind})
    program = steps.import_(point)
    artifact = program if isinstance(program, Failure) else steps.compile(program, point)
    if isinstance(program, Failure) or isinstance(artifact, Failure):
        assert isinstance(artifact, Failure)
        raise InputError(f"kv_dtype={kind}: {artifact.stage}: {artifact.reason}")
    opening = {
        "artifact": str(reader.blob_path(asked.catalog, artifact.digest)),
        "parameters": str(reader.blob_path(asked.catalog, program.parameters)),
        "abi": plain(program.abi),
        "driver": "local-task",
        "workers": host.cores(),
    }
    variant = job.variant(program, point).digest
    return Participant(kind, "", kind, (sys.executable, str(OWN_WORKER)), opening, variant)


def windows(asked: argparse.Namespace, tokenizer: Path) -> NDArray[np.int64]:
    """Return i64[W,N] tokens, spread evenly over the text.

    Raises:
        InputError: the text is too short.
    """
    usual = [path for folder in ("explanation", "decisions") for path in sorted((ROOT / "docs" / folder).glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in asked.text or usual)
    ids = np.asarray(Tokenizer(tokenizer).encode(text).tokens, np.int64)
    if len(ids) < asked.tokens:
        raise InputError(f"the text has {len(ids)} tokens: a window has {asked.tokens}")
    starts = np.linspace(0, len(ids) - asked.tokens, max(1, asked.windows)).astype(np.int64)
    return ids[starts[:, None] + np.arange(asked.tokens)]


class Scored:
    """Log-probabilities of a variant on windows, over the second half of each."""

    def __init__(self, who: Participant) -> None:
        abi = abi_from(who.opening["abi"])
        settings = Settings(who.opening["driver"], who.opening["workers"])
        self._session = Session(Path(who.opening["artifact"]), Path(who.opening["parameters"]), abi, settings)

    def __call__(self, window: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return f32[N/2,V]."""
        logits = np.array(self._session.score(window)[len(window) // 2 :])
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def close(self) -> None:
        """Close the variant."""
        self._session.close()


def qualities(participants: Sequence[Participant], texts: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Return KL divergence, its error and top-1 agreement of each kind of cache."""
    found: dict[str, list[NDArray[np.float64]]] = {who.name: [] for who in participants}
    for number, window in enumerate(texts):
        exact: NDArray[np.float32] | None = None
        for who in participants:
            say(f"window {number + 1}/{len(texts)}: {who.name}")
            scored = Scored(who)
            own = scored(window)
            scored.close()
            exact = own if exact is None else exact
            kl = (np.exp(exact) * (exact - own)).sum(axis=1, dtype=np.float64)
            found[who.name].append(np.stack([kl, own.argmax(1) == exact.argmax(1)]))
    return {name: _quality(np.concatenate(parts, axis=1)) for name, parts in found.items()}


def _quality(each: NDArray[np.float64]) -> dict[str, float]:
    blocks = each[0, : each.shape[1] // BLOCK * BLOCK].reshape(-1, BLOCK).mean(axis=1)
    error = float(blocks.std(ddof=1) / len(blocks) ** 0.5) if len(blocks) > 1 else 0.0
    return {"quality_kl": float(each[0].mean()), "kl_error": error, "quality_top1": float(each[1].mean())}


def report(asked: argparse.Namespace) -> dict[str, Any]:
    """Make, score and time all kinds of cache; return one document.

    Raises:
        InputError: a variant cannot be made, or the recipe's context is too short.
    """
    job = job_of(asked.recipe, "host", BuildRequest(recipes=(asked.recipe,), catalog=asked.catalog))
    if job.recipe.context < asked.tokens + asked.decode:
        raise InputError(f"{asked.recipe}: a context of {asked.tokens + asked.decode} is needed")
    if job.model.tokenizer is None:
        raise InputError(f"{asked.recipe}: the model has no tokenizer")
    participants = made(asked, job)
    texts = windows(asked, job.model.tokenizer)
    quality = qualities(participants, texts[: asked.windows]) if asked.windows else {}
    forced = tuple(texts[-1, : asked.decode].tolist())
    plan = Plan(tuple(texts[0].tolist()), forced, (), asked.rounds, 0, LIMITS, 0, host.cores())
    timed, noisy = compare(participants, plan, say) if asked.rounds else ([Entrant(who) for who in participants], "")
    usual = next((entrant for entrant in timed if entrant.participant.name == USUAL), None)
    return {
        "machine": host.machine().describe(),
        "model": job.recipe.name,
        **{name: getattr(asked, name) for name in ("tokens", "windows", "decode", "rounds")},
        "noise": noisy,
        "rows": [_row(entrant, usual, quality.get(entrant.participant.name, UNKNOWN)) for entrant in timed],
    }


def _row(entrant: Entrant, usual: Entrant | None, quality: Mapping[str, float | None]) -> dict[str, Any]:
    abi = abi_from(entrant.participant.opening["abi"])
    read = {name: list(entrant.samples.get(name, {}).values()) for name in ("prefill_s", "decode_s")}
    of_usual = ratio(usual, entrant, "decode_s") if usual and usual is not entrant else None
    return {
        "cache": entrant.participant.name,
        "variant": entrant.participant.variant,
        "reason": entrant.reason or None,
        **quality,
        **{name: statistics.median_of(values).median if values else None for name, values in read.items()},
        "decode_of_f16": {"median": of_usual.median, "low": of_usual.low, "high": of_usual.high} if of_usual else None,
        "position_bytes": cache_bytes(abi) // abi.context,
        "sequence_bytes": cache_bytes(abi),
        "context": abi.context,
    }


def text(found: dict[str, Any]) -> str:
    """Return the table of what was measured."""
    rows = found["rows"]
    columns = {"cache": [row["cache"] for row in rows]}
    if found["windows"]:
        columns |= {
            "KL": [f"{row['quality_kl']:.5f}" for row in rows],
            "+-": [f"{row['kl_error']:.5f}" for row in rows],
        }
        columns["top-1"] = [f"{row['quality_top1']:.2%}" for row in rows]
    if found["rounds"]:
        columns[f"decode behind {found['tokens']}"] = [quantity(row["decode_s"], "s") for row in rows]
        columns["f16 over it"] = [_factor(row["decode_of_f16"]) for row in rows]
        columns["prompt"] = [quantity(row["prefill_s"], "s") for row in rows]
    columns["a position"] = [f"{row['position_bytes']:,} B" for row in rows]
    columns[f"{rows[0]['context']} of them"] = [quantity(row["sequence_bytes"], "B") for row in rows]
    reasons = [f"{row['cache']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([table(list(columns), [list(line) for line in zip(*columns.values(), strict=True)]), *reasons])


def _factor(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""


def main() -> None:
    """Print one row for each kind of cache."""
    asked = options()
    found = report(asked)
    if asked.json:
        print(json.dumps(found))
        return
    scored = found["windows"] * (found["tokens"] - found["tokens"] // 2)
    print(f"{found['machine']}; {found['model']}, batch 1, {host.cores()} workers")
    print(
        f"{scored} tokens scored behind {found['tokens'] // 2} or more; {found['rounds']} rounds of {found['decode']}"
    )
    print(text(found))
    if found["rounds"]:
        print(f"{found['rounds']} rounds of {found['decode']} tokens")
        print(f"noisy machine: {found['noise']}" if found["noise"] else "the machine was quiet")


if __name__ == "__main__":
    end(main)
