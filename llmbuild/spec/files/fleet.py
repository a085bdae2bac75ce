"""Strict YAML into a Fleet: every error at once, each with file, line and key path."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmbuild.errors import InputError
from llmbuild.spec import fleet as nouns
from llmbuild.spec import partitions as mig
from llmbuild.spec.files.reader import seconds
from llmbuild.spec.files.strict import Strict, line_of, read, validate
from llmbuild.spec.files.tariff import Electricity
from llmbuild.spec.slo import Bound, is_quality, parse_bound

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB)")
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_LIMIT = re.compile(r"\s*(ttft_s|tpot_s)(?:_p(\d{2}(?:\.\d+)?))?\s*<=\s*([0-9.eE+-]+)\s*")

EXAMPLE = "{nodes: [{class: a, count: 2, device: H100-SXM-80GB, ...}], services: [{model: llama-3-8b, rate: 5, ...}]}"
FLEET_HINT = f"a fleet is a YAML file with nodes and services, such as {EXAMPLE}; recipes/fleets has some"


def _bytes(text: object) -> float:
    match = _SIZE.fullmatch(str(text).strip())
    if not match:
        raise ValueError(f"{text!r} is no size: write 640kB, 16GB")
    return float(match[1]) * _UNITS[match[2]]


def _limit(text: object) -> tuple[str, float | None, float]:
    match = _LIMIT.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ValueError(f"{text!r} is no SLO of a request: write ttft_s<=SECONDS or tpot_s<=SECONDS")
    try:
        limit = float(match[3])
    except ValueError:
        raise ValueError(f"{match[3]!r} is not a number") from None
    if not limit > 0 or not math.isfinite(limit):
        raise ValueError(f"{text!r}: the limit must be above 0 s")
    return match[1], float(match[2]) if match[2] else None, limit


def _quality(text: object) -> Bound:
    try:
        bound = parse_bound(str(text))
    except InputError as error:
        raise ValueError(str(error)) from None
    if not is_quality(bound.metric):
        raise ValueError(f"{bound.metric} is no metric of quality: it belongs to the `slo` of a class")
    return bound


_Bytes = Annotated[float, BeforeValidator(_bytes)]
_Seconds = Annotated[float, BeforeValidator(seconds), Field(ge=0, le=1e6)]
_Watts = Annotated[float, Field(ge=0, le=1e6)]
_Ratio = Annotated[float, Field(gt=0, le=100)]
_Positive = Annotated[float, Field(gt=0, le=1e9)]
_Count = Annotated[int, Field(ge=1, le=100_000, strict=True)]
_Cores = Annotated[tuple[Annotated[int, Field(ge=0, le=4095, strict=True)], ...], Field(min_length=1)]
_Digits = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{4,64}$")]
_Slices = tuple[Annotated[str, Field(min_length=1)], ...]
_Places = Annotated[dict[Annotated[int, Field(ge=0, le=4096)], _Positive], Field(min_length=1)]


class _Clock(Strict):
    mhz: _Count
    decode_time: _Ratio
    prompt_time: _Ratio
    power: _Ratio
    basis: nouns.Basis
    source: str = Field(min_length=1)


class _Levels(Strict):
    bare: _Watts
    parked: _Watts
    host: _Watts = 0.0
    active: _Watts = 0.0
    basis: nouns.Basis
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _rise(self) -> _Levels:
        if 0 < self.active < self.parked:
            raise ValueError(f"active, {self.active:g} W, is below parked, {self.parked:g} W: a step draws no less")
        if self.parked < self.bare:
            raise ValueError(f"parked, {self.parked:g} W, is below bare, {self.bare:g} W: a loaded slot draws no less")
        return self


class _Partitions(Strict):
    gpu: Literal["A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB"]
    layouts: Literal["all"] | Annotated[tuple[_Slices, ...], Field(min_length=1)] = "all"
    now: _Slices = ()
    change: mig.ChangeBy

    @model_validator(mode="after")
    def _possible(self) -> _Partitions:
        named = () if self.layouts == "all" else self.layouts
        for names in (*named, *([self.now] if self.now else [])):
            told = mig.refusal(mig.GPUS[self.gpu], names)
            if told:
                raise ValueError(told)
        return self


class _Node(Strict):
    class_: str = Field(alias="class", pattern=f"^{_NAME}$")
    count: _Count
    device: str = Field(default="", pattern=f"^({_NAME})?$")
    machine: str = Field(default="", pattern=r"^([0-9a-f]{4,64}|host)?$")
    slots: Annotated[int, Field(ge=1, le=256, strict=True)] = 1
    memory: _Bytes
    watts: _Levels
    boot: _Seconds = 0.0
    price_per_h: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    clocks: tuple[_Clock, ...] = ()
    cores: tuple[_Cores, ...] = ()
    variants: tuple[_Digits, ...] = ()
    partitions: _Partitions | None = None

    @model_validator(mode="after")
    def _divided(self) -> _Node:
        if self.partitions is None:
            return self
        if self.cores:
            raise ValueError("partitions divide a GPU, and cores are parts of a CPU: give one of them")
        if self.clocks:
            raise ValueError(
                "the slices of a GPU share one clock, so a class has clocks or partitions: give one of them"
            )
        gpu = mig.GPUS[self.partitions.gpu]
        most = gpu.slices[0].memory_bytes
        if not 0.8 * most <= self.memory <= 1.2 * most:
            told = f"memory is {self.memory / 1e9:g}GB, and {gpu.name} has {most / 1e9:.4g}GB"
            raise ValueError(f"{told}: give the memory of an undivided device, or the GPU that it is")
        return self

    @model_validator(mode="after")
    def _pinned(self) -> _Node:
        if not self.cores:
            return self
        if len(self.cores) != self.count * self.slots:
            told = f"cores has {len(self.cores)} lists, and there are {self.count} nodes with slots: {self.slots}"
            raise ValueError(f"{told}: give one list of CPUs for each slot, such as [[0], [1]]")
        if len({len(set(each)) for each in self.cores}) > 1:
            raise ValueError("the slots of a class are equal: give each as many cores, or make two classes")
        return self

    @model_validator(mode="after")
    def _one(self) -> _Node:
        if bool(self.device) == bool(self.machine):
            raise ValueError("name either `device`, whose profiles are published or given, or `machine`, a catalog's")
        return self


class _Class(Strict):
    name: str = Field(pattern=f"^{_NAME}$")
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    prompt: _Positive
    output: Annotated[float, Field(ge=1, le=1e6)]
    spread: Annotated[float, Field(ge=0, le=10)] = 1.0
    slo: tuple[Annotated[tuple[str, float | None, float], BeforeValidator(_limit)], ...] = Field(min_length=1)

    @field_validator("slo")
    @classmethod
    def _once(cls, limits: tuple[tuple[str, float | None, float], ...]) -> tuple[tuple[str, float | None, float], ...]:
        names = [name for name, _, _ in limits]
        if len(set(names)) < len(names):
            raise ValueError("a metric has two limits: keep one")
        return limits


class _Service(Strict):
    name: str | None = Field(default=None, pattern=f"^{_NAME}$")
    model: str = Field(min_length=1)
    rate: _Positive
    classes: tuple[_Class, ...] = Field(min_length=1)
    attainment: Annotated[float, Field(ge=0.5, le=0.9999)] = 0.99
    priority: Annotated[float, Field(gt=0, le=1000)] = 1.0
    quality: tuple[Annotated[Bound, BeforeValidator(_quality)], ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> _Service:
        names = [each.name for each in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"classes share a name: {names}")
        total = sum(each.share for each in self.classes)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of its classes are {total:g} together: they must be 1")
        for each in self.classes:
            for metric, percent, _ in each.slo:
                if percent is not None and abs(percent / 100 - self.attainment) > 1e-9:
                    told = f"class {each.name}: {metric}_p{percent:g} asks for {percent:g} % of the requests"
                    raise ValueError(f"{told}, attainment for {self.attainment:.4g}: they must agree")
        return self


class _Profile(Strict):
    device: str = Field(pattern=f"^{_NAME}(/{_NAME})?$")
    model: str = Field(min_length=1)
    variant: str = Field(min_length=1)
    basis: nouns.Basis
    source: str = Field(min_length=1)
    decode_s: _Places
    context_s: Annotated[float, Field(ge=0, le=1)] = 0.0
    prompt_s: Annotated[float, Field(gt=0, le=100)]
    decode_w: _Places | None = None
    prompt_w: _Watts | None = None
    power_basis: nouns.Basis | None = None
    max_rows: Annotated[int, Field(ge=1, le=4096, strict=True)] | None = None
    weights: _Bytes
    kv_per_token: _Bytes
    load: _Seconds
    quality_kl: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> _Profile:
        if (self.decode_w is None) != (self.prompt_w is None):
            raise ValueError("decode_w and prompt_w belong together: give both or none")
        known = max(self.decode_s)
        if self.max_rows is not None and self.max_rows > known:
            raise ValueError(f"max_rows is {self.max_rows}, and decode_s ends at {known} rows: nothing is known beyond")
        return self


class _Fleet(Strict):
    name: str | None = Field(default=None, pattern=f"^{_NAME}$")
    nodes: tuple[_Node, ...] = Field(min_length=1)
    services: tuple[_Service, ...] = Field(min_length=1)
    profiles: tuple[_Profile, ...] = ()
    objective: nouns.FleetObjective = "energy"
    policy: str = "adaptive"
    period: Annotated[float, BeforeValidator(seconds), Field(gt=0, le=3600)] = 10.0
    actuators: tuple[nouns.Guarded, ...] = ()
    electricity: Electricity | None = None

    @model_validator(mode="after")
    def _distinct(self) -> _Fleet:
        for what, names in (
            ("classes of nodes", [each.class_ for each in self.nodes]),
            ("services", [each.name or each.model for each in self.services]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two {what} are called {twice[0]}: each has a name of its own")
        cores = [core for node in self.nodes for each in node.cores for core in set(each)]
        shared = sorted({core for core in cores if cores.count(core) > 1})
        if shared:
            raise ValueError(f"core {shared[0]} is in two slots: what runs on one would slow down the other")
        if self.objective == "cost" and not all(node.price_per_h for node in self.nodes):
            raise ValueError("objective cost needs the price_per_h of every class of nodes")
        return self


def read_fleet(path: Path, policies: tuple[str, ...]) -> nouns.Fleet:
    """Return the fleet in a YAML file, whose policy is one of `policies`.

    Raises:
        InputError: all errors of the file at once, each with line and key path.
    """
    raw = read(path, FLEET_HINT, homes=("recipes/fleets",))
    if "workloads" in raw:
        raise InputError(f"{path}: a recipe, not a fleet: {FLEET_HINT}")
    parsed = validate(_Fleet, raw, path)
    if parsed.policy not in policies:
        line = line_of(raw, ("policy",))
        raise InputError(f"{path}:{line} $.policy: no policy {parsed.policy!r}: there are {', '.join(policies)}")
    return nouns.Fleet(
        name=parsed.name or path.stem,
        nodes=tuple(_node(each) for each in parsed.nodes),
        services=tuple(_service(each) for each in parsed.services),
        profiles=tuple(_profile(each) for each in parsed.profiles),
        objective=parsed.objective,
        policy=parsed.policy,
        period_s=parsed.period,
        actuators=tuple(dict.fromkeys(parsed.actuators)),
        tariff=None if parsed.electricity is None else parsed.electricity.made(),
    )


def _device(one: _Node) -> str:
    """Return what profiles name: slots of other numbers of cores of a machine have profiles of their own."""
    name = one.device or one.machine
    return f"{name}/{len(set(one.cores[0]))}" if one.cores and one.machine else name


def _partitions(one: _Partitions | None) -> mig.Partitions | None:
    if one is None:
        return None
    gpu = mig.GPUS[one.gpu]

    def layout(names: tuple[str, ...]) -> mig.Layout:
        return mig.layout_of(each for name in names if (each := gpu.slice_of(name)) is not None)

    some = mig.fullest(gpu.name) if one.layouts == "all" else tuple(dict.fromkeys(map(layout, one.layouts)))
    now = layout(one.now) if one.now else gpu.undivided
    return mig.Partitions(gpu.name, some, now, mig.CHANGES[one.change])


def _node(one: _Node) -> nouns.NodeClass:
    watts = one.watts
    clocks = tuple(
        nouns.Clock(c.mhz, c.decode_time, c.prompt_time, c.power, c.basis, c.source)
        for c in sorted(one.clocks, key=lambda clock: clock.mhz)
    )
    return nouns.NodeClass(
        name=one.class_,
        count=one.count,
        device=_device(one),
        machine=bool(one.machine),
        slots=one.slots,
        memory_bytes=one.memory,
        host_w=watts.host,
        bare_w=watts.bare,
        parked_w=watts.parked,
        active_w=watts.active,
        boot_s=one.boot,
        watts_basis=watts.basis,
        source=watts.source,
        price_per_h=one.price_per_h,
        clocks=clocks,
        cores=tuple(tuple(sorted(set(each))) for each in one.cores),
        variants=one.variants,
        partitions=_partitions(one.partitions),
    )


def _service(one: _Service) -> nouns.Service:
    classes = []
    for each in one.classes:
        limits = {metric: limit for metric, _, limit in each.slo}
        ttft_s, tpot_s = (limits.get(metric, math.inf) for metric in ("ttft_s", "tpot_s"))
        made = nouns.RequestClass(each.name, each.share, each.prompt, each.output, each.spread, ttft_s, tpot_s)
        classes.append(made)
    name = one.name or one.model
    return nouns.Service(name, one.model, one.rate, tuple(classes), one.attainment, one.priority, one.quality)


def _profile(one: _Profile) -> nouns.Profile:
    power = None
    if one.decode_w is not None and one.prompt_w is not None:
        power = nouns.StepPower(_line(one.decode_w), one.prompt_w)
    return nouns.Profile(
        device=one.device,
        model=one.model,
        variant=one.variant,
        step=nouns.StepTime(_line(one.decode_s), one.context_s, one.prompt_s),
        power=power,
        max_rows=one.max_rows or max(one.decode_s),
        weights_bytes=one.weights,
        kv_bytes_per_token=one.kv_per_token,
        load_s=one.load,
        decode_basis=one.basis,
        prompt_basis=one.basis,
        power_basis=one.power_basis or one.basis,
        source=one.source,
        quality_kl=one.quality_kl,
    )


def _line(places: dict[int, float]) -> nouns.Line:
    at = tuple(sorted(places))
    return nouns.Line(tuple(map(float, at)), tuple(places[x] for x in at))
