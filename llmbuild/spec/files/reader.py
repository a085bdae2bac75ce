"""Strict YAML into Recipe and Target: unknown and duplicate keys refused, every error with file, line and key path.

Only `build` and `cli` reach this folder, the one of `spec` that reads files, so that the loader needs neither YAML
(ruamel.yaml: keeps line numbers, refuses duplicate keys) nor validation (pydantic: every error at once).
"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmbuild.errors import InputError
from llmbuild.spec import recipe as nouns
from llmbuild.spec.files.strict import Strict, line_of, read, validate
from llmbuild.spec.slo import METRICS, Bound, parse_bound
from llmbuild.spec.space import Value
from llmbuild.spec.target import BACKENDS, CUDA, LLVM_CPU, VULKAN, Backend, Target
from llmbuild.spec.workload import Workload
from llmbuild.system.paths import real

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h)?")
_UNIT = {"s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}
_PACKAGE_FILE = re.compile(rf"{nouns.PACKAGE}[A-Za-z_]\w*(/(?!\.\.?(/|$))[^/\0]+)+", re.ASCII)
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

MAX_BATCH = 256
"""Maximum batch size."""


def seconds(text: object) -> float:
    """Return the seconds in `90`, `90s`, `20m` or `1h`.

    Raises:
        ValueError: anything else.
    """
    match = _DURATION.fullmatch(str(text).strip())
    if not match or isinstance(text, bool):
        raise ValueError(f"{text!r} is not a duration: write 90s, 20m or 1h")
    found = float(match[1]) * _UNIT[match[2]]
    if not math.isfinite(found):
        raise ValueError("a duration of so many digits is not finite")
    return found


def _bound(text: object) -> Bound:
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not a bound: write METRIC<=NUMBER")
    try:
        return parse_bound(text)
    except InputError as error:
        raise ValueError(str(error)) from error


def _metric(name: object) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; there are {', '.join(METRICS)}")
    return str(name)


def _listed(text: object) -> object:
    return [text] if isinstance(text, dict) else text


def _backend(name: object) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return str(name)


_ALSO = {**dict.fromkeys(BACKENDS, ()), LLVM_CPU: ("local-sync",)}
"""Additional devices of a backend, after its default one."""

_Bound = Annotated[Bound, BeforeValidator(_bound)]
_Seconds = Annotated[float, BeforeValidator(seconds)]
_MetricName = Annotated[str, BeforeValidator(_metric)]
_BackendName = Annotated[str, BeforeValidator(_backend)]
_Feature = Annotated[str, Field(pattern=r"^[+-][A-Za-z0-9._-]+$")]
_Positive = Annotated[int, Field(ge=1, le=1 << 24, strict=True)]


class _Model(Strict):
    huggingface: str = ""
    gguf: str = ""
    random_init: Annotated[bool, Field(strict=True)] = False
    seed: Annotated[int, Field(ge=0, lt=1 << 31, strict=True)] = 0

    @field_validator("gguf")
    @classmethod
    def _in_package(cls, place: str) -> str:
        if place.startswith(nouns.PACKAGE) and not _PACKAGE_FILE.fullmatch(place):
            raise ValueError(f"{place!r} names no file of a Python package: write {nouns.PACKAGE}NAME/FILE")
        return place

    @model_validator(mode="after")
    def _one(self) -> _Model:
        if bool(self.huggingface) == bool(self.gguf):
            raise ValueError("name either `huggingface`, a folder or hub id, or `gguf`, a file")
        return self


class _Workload(Strict):
    name: str = Field(pattern=f"^{_NAME}$")
    prompt: _Positive
    output: _Positive
    context: _Positive | None = None
    batch: Annotated[int, Field(ge=1, le=MAX_BATCH, strict=True)] = 1
    seed: Annotated[int, Field(ge=0, lt=1 << 31, strict=True)] = 0

    @model_validator(mode="after")
    def _fits(self) -> _Workload:
        if self.context is not None and self.context < self.prompt + self.output:
            raise ValueError(f"context {self.context} is smaller than prompt + output = {self.prompt + self.output}")
        return self


class _Text(Strict):
    stdlib: tuple[str, ...] = ()
    file: Annotated[str, Field(min_length=1)] | tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @model_validator(mode="after")
    def _one(self) -> _Text:
        if bool(self.stdlib) == bool(self.file):
            raise ValueError("name either `stdlib` modules or a `file`, or a list of files")
        return self

    def files(self, path: Path) -> tuple[str, ...]:
        """Return the files of a recipe, resolved against its folder."""
        named = (self.file,) if isinstance(self.file, str) else self.file
        return tuple(str(real(path.parent / name)) for name in named)


class _Calibrated(_Text):
    chats: str = ""
    share: Annotated[float, Field(gt=0, le=1000)] = 1.0

    @model_validator(mode="after")
    def _one(self) -> _Calibrated:
        if sum(map(bool, (self.stdlib, self.file, self.chats))) != 1:
            raise ValueError("name either `stdlib` modules, a `file` or a list of files, or `chats`, a file of prompts")
        return self

    def noun(self, path: Path) -> nouns.Text:
        """Return the text of a recipe, its files resolved against the recipe's folder."""
        chats = str(real(path.parent / self.chats)) if self.chats else ""
        return nouns.Text(self.stdlib, self.files(path), chats, self.share)


class _Quality(Strict):
    text: _Text | None = None
    tokens: Annotated[int, Field(ge=32, le=1 << 20, strict=True)] = 512
    bounds: tuple[_Bound, ...] | None = None


class _Calibration(Strict):
    text: Annotated[tuple[_Calibrated, ...], BeforeValidator(_listed), Field(min_length=1)]
    tokens: Annotated[int, Field(ge=32, le=1 << 20, strict=True)] = 4096


class _Budget(Strict):
    trials: _Positive = 12
    time: _Seconds = 1200.0


class _Recipe(Strict):
    name: str | None = Field(default=None, pattern=f"^{_NAME}$")
    model: _Model
    workloads: tuple[_Workload, ...] = Field(min_length=1)
    objectives: tuple[_MetricName, ...] = Field(default=("tpot_s", "ttft_s", "quality_kl"), min_length=1)
    constraints: tuple[_Bound, ...] = ()
    quality: _Quality = _Quality()
    calibration: _Calibration | None = None
    budget: _Budget = _Budget()
    sampler: nouns.Sampler = "auto"
    knobs: dict[str, object] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> _Recipe:
        names = [w.name for w in self.workloads]
        if len(set(names)) != len(names):
            raise ValueError(f"workloads share a name: {names}")
        batches = sorted({w.batch for w in self.workloads})
        if len(batches) > 1:
            raise ValueError(f"workloads ask for batches of {batches}: an artifact has one; write a recipe for each")
        return self


class _Target(Strict):
    name: str | None = Field(default=None, pattern=f"^{_NAME}$")
    backend: _BackendName
    arch: str | None = None
    cpu: str = Field(pattern=f"^{_NAME}$")
    features: tuple[_Feature, ...] = ()
    requires: tuple[str, ...] = ()
    description: str = ""
    device: str | None = None
    meters: tuple[str, ...] | None = None
    attribute: str = ""
    knobs: dict[str, object] = Field(default_factory=dict)

    @property
    def kind(self) -> Backend:
        return BACKENDS[self.backend]

    @property
    def own_meters(self) -> tuple[str, ...]:
        return () if self.arch == "aarch64" else self.kind.meters  # only x86 processors have RAPL

    @field_validator("attribute")
    @classmethod
    def _one_line(cls, text: str) -> str:
        return " ".join(text.split())

    @model_validator(mode="after")
    def _fits(self) -> _Target:
        if (self.arch or self.kind.arches[0]) not in self.kind.arches or (self.backend == LLVM_CPU and not self.arch):
            raise ValueError(f"arch of a {self.backend} target is {' or '.join(self.kind.arches)}")
        if self.device is not None and self.device.partition("://")[0] not in (self.kind.device, *_ALSO[self.backend]):
            raise ValueError(f"device {self.device!r} runs no {self.backend} code: name {self.kind.device}")
        foreign = [m for m in self.meters or () if m not in self.own_meters]
        if foreign:
            there = ", ".join(self.own_meters) or "none"
            raise ValueError(f"meters {', '.join(foreign)} do not read what runs this; those that do: {there}")
        if self.features and self.backend == CUDA:
            raise ValueError("features of a cuda target are the knob `ptx`")
        self._check_attribute()
        return self

    def _check_attribute(self) -> None:
        if not self.attribute:
            return
        if self.backend not in (CUDA, VULKAN):
            raise ValueError("attribute is for cuda and vulkan-spirv targets: the compiler names all other chips")
        start = f'#hal.device.target<"{self.kind.device}", [#hal.executable.target<"{self.backend}", '
        if not self.attribute.startswith(start):
            raise ValueError(f"attribute must be a #hal.device.target of one {self.backend} #hal.executable.target")
        if f'arch = "{self.cpu}"' not in self.attribute:
            raise ValueError(f'attribute must name the cpu: arch = "{self.cpu}"')


def read_recipe(path: Path, random_init: bool = False) -> nouns.Recipe:
    """Return the recipe in a YAML file; a relative model path is resolved against the recipe's folder.

    Raises:
        InputError: all errors of the file at once, each with line and key path.
    """
    raw = read(path, RECIPE_HINT, _about_folder)
    if "backend" in raw and "model" not in raw:
        raise InputError(f"{path}: a target, not a recipe: name it with -t")
    parsed = validate(_Recipe, raw, path)
    if parsed.name is None and not path.stem.isprintable():
        raise InputError(f"{str(path)!a}: its name is no text to call a model by: add `name: NAME` to the recipe")
    text = parsed.quality.text
    return nouns.Recipe(
        name=parsed.name or path.stem,
        model=nouns.ModelSource(
            nouns.GGUF if parsed.model.gguf else nouns.HUGGINGFACE,
            _location(parsed.model, raw, path),
            parsed.model.random_init or random_init,
            parsed.model.seed,
        ),
        workloads=tuple(_workload(w) for w in parsed.workloads),
        objectives=tuple(parsed.objectives),
        constraints=tuple(parsed.constraints),
        quality=nouns.Quality(
            stdlib=text.stdlib if text else (),
            files=text.files(path) if text else (),
            tokens=parsed.quality.tokens,
            bounds=_gate(parsed.quality, parsed.model.random_init or random_init),
        ),
        budget=nouns.Budget(parsed.budget.trials, parsed.budget.time),
        knobs=tuple(sorted(_knob_values(name, value, raw, path) for name, value in parsed.knobs.items())),
        calibration=_calibration(parsed.calibration, path),
        sampler=parsed.sampler,
    )


def _gate(quality: _Quality, random_init: bool) -> tuple[Bound, ...]:
    """Return the bounds on quality; a text that is scored has those of `nouns.GATE` without a word on bounds."""
    if quality.bounds is not None:
        return tuple(quality.bounds)
    return nouns.GATE if quality.text and not random_init else ()


def _location(model: _Model, raw: object, path: Path) -> str:
    """Return where a model is: a path of the recipe's folder, else a hub id or a file of a package."""
    if model.gguf:
        if model.gguf.startswith(nouns.PACKAGE):
            return model.gguf
        return str((path.parent / model.gguf).absolute())  # links stay: their names say what they are
    folder = real(path.parent / model.huggingface)
    if folder.suffix.lower() == ".gguf" and folder.is_file():
        line = line_of(raw, ("model", "huggingface"))
        raise InputError(f"{path}:{line} $.model.huggingface: {folder} is a GGUF file: name it with `gguf`")
    local = folder.exists() or model.huggingface.startswith((".", "/")) or "/" not in model.huggingface
    return str(folder) if local else model.huggingface


def _calibration(parsed: _Calibration | None, path: Path) -> nouns.Calibration | None:
    if parsed is None:
        return None
    return nouns.Calibration(tuple(text.noun(path) for text in parsed.text), parsed.tokens)


def read_target(path: Path) -> Target:
    """Return the target in a YAML file, not yet resolved.

    Raises:
        InputError: all errors of the file at once.
    """
    raw = read(path, "", _about_folder)
    if "model" in raw and "backend" not in raw:
        raise InputError(f"{path}: a recipe, not a target: it is built for the target that -t names")
    parsed = validate(_Target, raw, path)
    return Target(
        name=parsed.name or path.stem,
        backend=parsed.backend,
        arch=parsed.arch or parsed.kind.arches[0],
        cpu=parsed.cpu,
        features=tuple(sorted(parsed.features)),
        requires=tuple(sorted(parsed.requires)),
        description=parsed.description,
        device=parsed.device or parsed.kind.device,
        meters=parsed.own_meters if parsed.meters is None else parsed.meters,
        attribute=parsed.attribute,
        knobs=tuple(sorted(_knob_values(name, value, raw, path) for name, value in parsed.knobs.items())),
    )


def _workload(w: _Workload) -> Workload:
    return Workload(w.name, w.prompt, w.output, w.context or w.prompt + w.output, w.batch, w.seed)


def _knob_values(name: str, value: object, raw: object, path: Path) -> tuple[str, tuple[Value, ...]]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values or any(not isinstance(v, (str, int, bool)) for v in values):
        raise InputError(f"{path}:{line_of(raw, ('knobs', name))} $.knobs.{name}: give one value or a list of values")
    return name, values


EXAMPLE = "{model: {huggingface: FOLDER}, workloads: [{name: chat, prompt: 32, output: 64}]}"
"""The shortest recipe."""
RECIPE_HINT = f"a recipe is a YAML file, at least {EXAMPLE}"


def _about_folder(path: Path) -> str:
    if (path / "config.json").is_file():
        named = EXAMPLE.replace("FOLDER", json.dumps(str(real(path))))
        return f"a model's folder, not a recipe: write one that names it, at least {named}"
    return f"a folder, not a file: `llmbuild recipes {shlex.quote(str(path))}` lists its recipes"
