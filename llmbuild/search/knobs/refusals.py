"""Values of knobs that a model does not support, from its facts alone, so that no impossible point is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmbuild.kernels.layouts import ALLOCATIONS, UNIFORM
from llmbuild.spec.model import ModelFacts
from llmbuild.spec.space import Value
from llmbuild.spec.target import Target

CALIBRATED: tuple[tuple[str, Value], ...] = (
    ("quantization", "gptq"),
    ("scaling", "activation"),
    ("mixed", "sensitive"),
    *(("allocation", value) for value in ALLOCATIONS if value != UNIFORM),
)
"""Values of knobs that need calibration text."""

OWN = "own"

ASKED_OF_MODELS: Mapping[tuple[str, Value], str] = {
    ("kernel", OWN): "sizes, activation and norms that llmbuild's kernels support",
    **dict.fromkeys(CALIBRATED, "a tokenizer.json that makes enough tokens of the calibration text"),
}
"""Requirements of values on a model, in words; `refusals` checks them."""


@dataclass(frozen=True)
class Refusal:
    """A value of a knob that a model does not support, and why; of a pair of knobs where `beside` names the other."""

    knob: str
    value: Value
    reason: str
    beside: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        others = " ".join(f"{knob}={value}" for knob, value in self.beside)
        return f"{self.knob}={self.value}{f' with {others}' if others else ''}: {self.reason}"


def refusals(target: Target, facts: ModelFacts, uncalibrated: str = "") -> tuple[Refusal, ...]:
    """Return the values that a model does not support on a target; `uncalibrated` is why calibration is impossible."""
    told = _own_kernels(target, facts)
    if uncalibrated:
        told += [Refusal(knob, value, uncalibrated) for knob, value in CALIBRATED]
    return tuple(told)


def _own_kernels(target: Target, facts: ModelFacts) -> list[Refusal]:
    """Return the formats of layers and of the head in which llmbuild's kernels do not support this model."""
    from llmbuild.kernels.matvec import FORMATS as GPU_FORMATS

    formats = _readable(target) if target.is_cpu else GPU_FORMATS
    layers = {form: _problem(target, facts, form, form) for form in formats}
    taken = [form for form, problem in layers.items() if not problem]
    if layers and not taken:
        return [Refusal("kernel", OWN, "; ".join(dict.fromkeys(layers.values())))]
    told = [_of_own_kernels("weight_format", form, problem) for form, problem in layers.items() if problem]
    for head in formats:
        problems = [problem for form in taken if (problem := _problem(target, facts, form, head))]
        told += [_of_own_kernels("head_format", head, problems[0])] if problems else []
    return told


def _of_own_kernels(knob: str, form: str, problem: str) -> Refusal:
    return Refusal("kernel", OWN, problem, ((knob, form),))


def _readable(target: Target) -> Sequence[str]:
    from llmbuild.kernels.choose import readable  # the kernels themselves, which a listing does not import

    return readable(target.requires)


def _problem(target: Target, facts: ModelFacts, layers: str, head: str) -> str:
    """Return why llmbuild's kernels for a target do not support the formats of layers and head; '' if they do."""
    from llmbuild.kernels.applies import cpu_problem, gpu_problem
    from llmbuild.kernels.matvec import ROW_READS, ROW_TILES, work

    if target.is_cpu:
        return cpu_problem(facts.decoder, layers, head)
    if not target.subgroup:
        return ""  # the compiler was not run: an import will find out
    return gpu_problem(facts.decoder, layers, head, work(target.subgroup, ROW_TILES[0], ROW_READS[0]))
