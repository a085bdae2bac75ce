"""A job: one recipe on one target with one toolchain, and its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.build.compiling import compile_inputs
from llmbuild.catalog.names import Registered
from llmbuild.compiler.calls import Runner, here
from llmbuild.compiler.resolved import Answers, resolve
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.frontend.source import FoundModel, find_model
from llmbuild.kernels.choose import FEATURES
from llmbuild.process.child import Limits
from llmbuild.profiler import calibration, heldout
from llmbuild.profiler.protocol import Protocol
from llmbuild.search.knobs.refusals import CALIBRATED, Refusal, refusals
from llmbuild.search.knobs.space import OF_OWN, space_for
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import PROTOCOL
from llmbuild.spec.model import ModelFacts, read_facts
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import Recipe
from llmbuild.spec.space import TUNING, UNTUNED, Point, Space
from llmbuild.spec.target import Target
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Toolchain, Variant

if TYPE_CHECKING:
    from llmbuild.profiler.remote import Remote


@dataclass(frozen=True)
class Job:
    """One recipe on one resolved target: all inputs of its results, resolved once."""

    recipe: Recipe
    target: Target
    space: Space
    model: FoundModel
    machine: Machine
    toolchain: Toolchain
    limits: Limits
    protocol: Protocol = field(default_factory=Protocol)
    force: bool = False
    remote: Remote | None = None
    """The machine that measures; this host if left out."""
    run: Runner = here
    """Who runs the compiler."""
    declared: Space | None = None
    """The recipe's space without `--set` pins; the searched space if left out."""
    known_as: str = ""
    """The machine's digest in the catalog, where it is not the fingerprint."""
    refused: tuple[Refusal, ...] = ()
    """Values of knobs that the model does not support on this target: they are not in the space."""
    facts: ModelFacts | None = None
    """The model's sizes."""

    @property
    def registered(self) -> Registered:
        """The records that every row of its build refers to."""
        return Registered(self.target, self.machine, self.toolchain, self.known_as)

    @cached_property
    def lineage(self) -> str:
        """Digest of all inputs of an artifact except the point."""
        return digest.of(
            {
                "model": self.model.digest,
                "context": self.recipe.context,
                "batch": self.recipe.batch,
                "target": self.target.identity(),
                "toolchain": self.toolchain,
                **self._calibration_inputs(),
            }
        )

    @cached_property
    def scope_inputs(self) -> dict[str, object]:
        """All inputs of a trial's outcome except the point, by name, so that a change is reported by name."""
        tokenizer = digest.of_file(self.model.tokenizer) if self.model.tokenizer else None
        quality = self.recipe.quality
        return {
            "model": self.model.digest,
            "tokenizer": tokenizer,
            "context": self.recipe.context,
            "batch": self.recipe.batch,
            "target": plain(self.target.identity()),
            "toolchain": plain(self.toolchain),
            "machine": self.registered.machine_digest,
            "workloads": plain(self.recipe.workloads),
            "quality text": digest.of({"text": self._text_digest(), "tokens": quality.tokens}),
            "protocol": PROTOCOL,
            **self._calibration_inputs(),
        }

    @cached_property
    def scope(self) -> str:
        """Digest of all inputs of a trial's outcome except the point."""
        return digest.of(self.scope_inputs)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes before a build: on the model, on bounds that are not checked, on pins that the recipe does not have."""
        bounds = ", ".join(map(str, self.recipe.quality.bounds))
        quality = self.recipe.quality
        absent = self._unscored if bounds or quality.stdlib or quality.files else ""
        judged = f"{bounds} will not be judged: " if bounds else ""
        return (*self.model.notes, *((f"{judged}quality is {absent}",) if absent else ()), *self._foreign_pins())

    def _foreign_pins(self) -> tuple[str, ...]:
        """Return a note on values that `--set` pins and the recipe's own space does not have."""
        own = {knob.name: knob.domain for knob in (self.declared or self.space).knobs}
        foreign = [f"{k.name}={v}" for k in self.space.knobs for v in k.domain if v not in own.get(k.name, (v,))]
        if not foreign:
            return ()
        told = "only builds that pin them rank these variants, unless the recipe lists the values under knobs"
        return (f"the recipe does not search {', '.join(foreign)}: {told}",)

    @cached_property
    def source(self) -> str:
        """Digest of the recipe's sources: the weights and the tokenizer."""
        return digest.of({name: self.scope_inputs[name] for name in ("model", "tokenizer")})

    @cached_property
    def ranking(self) -> str:
        """Digest of the inputs of the ranking, except the trials.

        A chat template ranks nothing: it is here so that standings with an earlier one are made current.
        """
        recipe, chat = self.recipe, self.model.chat
        return digest.of(
            {
                "scope": self.scope,
                "objectives": recipe.objectives,
                "bounds": (*recipe.constraints, *recipe.quality.bounds),
                "spaces": (self.space, self.declared or self.space),
                **({} if chat is None else {"chat": digest.of_bytes(chat)}),
            }
        )

    def ranks(self, trial: Trial) -> bool:
        """Return whether a trial is ranked for this job: a default, or a point of its space.

        A build with pins adds to the recipe's trials. Configurations of a tuning have no name there.
        """
        if trial.is_default:
            return True
        values = trial.point.as_dict()
        plainly = Point.of({**values, TUNING: UNTUNED}) if TUNING in values else trial.point
        spaces = (self.space, self.declared or self.space)
        return any(space.contains(point) for space in spaces for point in (trial.point, plainly))

    def scored(self) -> str:
        """Return why quality is not scored, and which bounds are not checked for it; empty where it is scored."""
        absent, bounds = self._unscored, ", ".join(map(str, self.recipe.quality.bounds))
        return f"{absent}; not judged: {bounds}" if absent and bounds else absent

    @cached_property
    def _unscored(self) -> str:
        if self.recipe.model.random_init:
            return "absent: random-init weights, speed only"
        text = self.recipe.quality
        if not (text.stdlib or text.files):
            return "absent: the recipe names no held-out text"
        vocabulary = read_facts(self.model.folder / "config.json").decoder.vocabulary
        why = heldout.unfit(text, self.model.tokenizer, self.recipe.context, vocabulary)
        return f"absent: {why}" if why else ""

    @cached_property
    def calibration(self) -> calibration.Parts:
        """The parts of the calibration's texts.

        Raises:
            InputError: the model has no tokenizer, or a text is too short.
        """
        asked = self.recipe.calibration
        if asked is None or self.model.tokenizer is None:
            raise InputError("calibration: the model has no tokenizer.json to read the text with")
        return calibration.parts(asked, self.model.tokenizer, self.recipe.context, self.model.chat)

    def _calibration_inputs(self) -> dict[str, str]:
        asked = self.recipe.calibration
        if asked is None:
            return {}
        texts = [{"text": heldout.read_text(t), "chats": bool(t.chats), "share": t.share} for t in asked.texts]
        chat = self.model.chat if any(text.chats for text in asked.texts) else None
        template = "" if chat is None else digest.of_bytes(chat)
        return {"calibration text": digest.of({"texts": texts, "tokens": asked.tokens, "template": template})}

    def _text_digest(self) -> str:
        return "" if self.scored() else digest.of_bytes(heldout.read_text(self.recipe.quality).encode())

    def import_inputs(self, point: Point) -> dict[str, object]:
        """Return all inputs of a point's import, by name."""
        choices = {name: str(value) for name, value in self.space.level(point, "model").items()}
        own = choices.get("kernel") == "own"
        if not own:
            for name in OF_OWN:
                choices.pop(name, None)  # targets without the knob share the import
        features = [f for f in FEATURES if f in self.target.requires] if own else []
        subgroup = self.target.subgroup if own else 0
        return {
            "model": self.model.digest,
            "context": self.recipe.context,
            "batch": self.recipe.batch,
            "choices": choices,
            "features": features,
            "importer": self.toolchain.importer,
            **({"subgroup": subgroup} if subgroup else {}),
            **({"calibration": self.calibration.identity()} if _calibrated(choices) else {}),
        }

    def compile_inputs(self, program: Program, point: Point) -> dict[str, object]:
        """Return all inputs of the compile of a program at a point, by name."""
        return compile_inputs(program.module, self.target, self.space.level(point, "codegen"), self.toolchain.compiler)

    def variant(self, program: Program, point: Point) -> Variant:
        """Return the variant of a program at a point."""
        return Variant(program, self.target, point, self.toolchain)


def make_job(
    recipe: Recipe,
    target: Target,
    pinned: dict[str, str],
    machine: Machine,
    toolchain: Toolchain,
    force: bool,
    answers: Answers | None = None,
    remote: Remote | None = None,
    run: Runner = here,
) -> Job:
    """Return the job of a recipe on a target; the target may be `host`.

    Raises:
        InputError: the model, the target, a knob or the calibration text is invalid.
    """
    if recipe.calibration:
        heldout.check_apart(recipe.calibration, recipe.quality)
    model = find_model(recipe.model, recipe.context)
    resolved = resolve(target, answers)
    facts = read_facts(model.folder / "config.json")
    refused = refusals(resolved, facts, _uncalibrated(recipe, model, facts))
    space = space_for(resolved, recipe, pinned, machine.cores, refused)
    declared = space_for(resolved, recipe, {}, machine.cores, refused) if pinned else space
    limits = Limits()
    return Job(
        recipe,
        resolved,
        space,
        model,
        machine,
        toolchain,
        limits,
        force=force,
        remote=remote,
        run=run,
        declared=declared,
        refused=refused,
        facts=facts,
    )


def _uncalibrated(recipe: Recipe, model: FoundModel, facts: ModelFacts) -> str:
    """Return why a model cannot be calibrated on the recipe's texts; '' where it can."""
    return calibration.uncalibrated(recipe, model.tokenizer, facts.decoder.vocabulary, model.chat)


def _calibrated(choices: Mapping[str, str]) -> bool:
    """Return whether an import needs calibration text."""
    return any(choices.get(knob) == value for knob, value in CALIBRATED)
