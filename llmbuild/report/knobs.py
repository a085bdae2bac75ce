"""The search space as rows: every knob, and the options that are left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmbuild.build.plan import left_out
from llmbuild.frontend.chat import chat_of
from llmbuild.profiler.calibration import uncalibrated
from llmbuild.runtime import host
from llmbuild.search.knobs.refusals import ASKED_OF_MODELS, Refusal, refusals
from llmbuild.search.knobs.space import ALL, target_knobs
from llmbuild.search.knobs.traps import BROKEN, TRAPS, Trap
from llmbuild.spec.model import read_facts
from llmbuild.spec.recipe import Recipe
from llmbuild.spec.space import Knob
from llmbuild.spec.target import HOST, LLVM_CPU, Target


def knob_rows(target: Target | None) -> list[dict[str, object]]:
    """Return the knobs, of one target if it is named, then the options that are left out of the space."""
    traps = (*TRAPS, *(Trap(f"{b.knob}={b.value}", b.backends, b.reason) for b in BROKEN))
    if target is None:
        return [*map(_knob_row, ALL), *map(_trap_row, traps)]
    mine = [t for t in traps if not t.backends or target.backend in t.backends]
    return [*map(_knob_row, target_knobs(target)), *map(_trap_row, mine)]


_LEVELS = {"model": "A model", "codegen": "B code generation", "runtime": "C run time"}


def _knob_row(k: Knob) -> dict[str, object]:
    searched = f" (searched: {_words(k.searched)})" if k.searched and k.searched != k.domain else ""
    return {
        "knob": k.name,
        "level": _LEVELS[k.level],
        "backends": " ".join(k.backends) or "all",
        "default": k.default,
        "domain": _words(k.domain) + searched,
        "when": "; ".join([*(f"{c.knob} in {_words(c.values)}" for c in k.when), *_asked_of_models(k)]),
        "meaning": k.meaning,
    }


def left_out_here(recipe: Recipe, folder: Path) -> list[Refusal]:
    """Return the values that a recipe's model, read from its folder, does not support on this host."""
    here = Target(HOST, LLVM_CPU, host.architecture(), HOST, requires=tuple(sorted(host.features())))
    facts, tokenizer = read_facts(folder / "config.json"), folder / "tokenizer.json"
    there, chat = tokenizer if tokenizer.is_file() else None, chat_of(folder)
    why = uncalibrated(recipe, there, facts.decoder.vocabulary, None if chat is None else chat.blob())
    return left_out(recipe, refusals(here, facts, why))


def _asked_of_models(k: Knob) -> list[str]:
    asked = ((v, ASKED_OF_MODELS.get((k.name, v))) for v in k.domain)
    return [f"{value} asks of a model {what}" for value, what in asked if what]


def _trap_row(trap: Trap) -> dict[str, object]:
    excluded = {"knob": trap.choice, "level": "excluded", "backends": " ".join(trap.backends) or "all"}
    return {**excluded, "default": "", "domain": "", "when": "", "meaning": trap.reason}


def _words(values: Sequence[object]) -> str:
    return " ".join(str(v) for v in values)
