"""Tune the expensive dispatches: rank them by time, try configurations, keep the winners for later builds.

A kind of dispatch is named by its operations and types, so that a winner applies to other layers, models and builds
with the same target and compiler. All kinds try their next configuration in the same compile, and each is timed
inside the whole model; gains of single dispatches are never summed: the whole model confirms them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llmbuild import digest
from llmbuild.build.compiling import Compiling
from llmbuild.build.events import Event
from llmbuild.build.steps import TOLERANCE
from llmbuild.catalog.phases import Tuned, find_tuning, record_tuning, winners_of
from llmbuild.catalog.writer import Catalog
from llmbuild.compiler import dispatches
from llmbuild.compiler.dispatches import Product
from llmbuild.errors import InputError, NothingUsable
from llmbuild.process.child import Limits
from llmbuild.profiler.bench import Bench
from llmbuild.profiler.operators import decode_operators
from llmbuild.profiler.protocol import Protocol, Quality, Subject
from llmbuild.runtime import host, reader
from llmbuild.spec.measurement import Operator, Reading
from llmbuild.spec.program import abi_from
from llmbuild.spec.rows import present
from llmbuild.spec.space import TUNING, UNTUNED, Value
from llmbuild.spec.target import target_from
from llmbuild.spec.variant import Artifact, Failure
from llmbuild.spec.workload import Workload

T = TypeVar("T")

SHARE, KINDS = 0.03, 6
"""Share of a decode step below which a kind is not tuned, and how many kinds are tuned at most, costliest first."""

GAIN = 1.03
"""Minimum gain of a configuration that is kept."""

READINGS = 3
"""Timings of each compile; the minimum counts, since disturbances only add time."""


@dataclass(frozen=True)
class Tuning:
    """The result of tuning one kind: seconds of its dispatches in a decode step, before and after."""

    dispatch: str
    calls: int
    share: float
    before_s: float
    after_s: float
    configuration: str
    tried: int
    known: bool


@dataclass(frozen=True)
class Tunings:
    """All kinds, and the whole model's result: time per token, tuned over untuned, paired, with its interval."""

    kinds: tuple[Tuning, ...]
    ratio: Reading | None
    name: str


class Tuner:
    """The program of one variant under tuning."""

    def __init__(self, folder: Path, prefix: str, tell: Callable[[Event], None]) -> None:
        self.row = reader.find_variant(folder, prefix)[0]
        if self.row["artifact"] is None or self.row["point"].get("kernel") == "own":
            raise InputError(f"variant {digest.short(self.row['variant'])} has no code of the compiler's to tune")
        self.catalog, self.tell, self.target = Catalog(folder), tell, target_from(self.row["target_body"])
        with reader.opened(folder) as connection:
            found = connection.execute(
                "SELECT module, checks FROM program WHERE digest = ?", (self.row["program"],)
            ).fetchone()
            body = connection.execute(
                "SELECT workload_body FROM measurement WHERE variant = ? AND workload = ?",
                (self.row["variant"], self.row["workload"]),
            ).fetchone()
        if body is None:
            raise InputError(f"variant {digest.short(self.row['variant'])} was never measured: build its recipe first")
        self.module, self.checks = found["module"], found["checks"]
        self.workload = Workload(**reader.decode({"workload_body": body["workload_body"]})["workload_body"])
        self.abi, self.limits = abi_from(present(self.row["abi"])), Limits()
        self.settings: dict[str, Value] = {**self.row["point"], TUNING: UNTUNED}
        self.compiler = str(self.row["runtime"])
        self.compiling = Compiling(self.catalog, self.target, self.compiler, self.limits, lambda _: False)

    def run(self) -> Tunings:
        """Tune the expensive kinds and keep the winners, if the whole model is faster.

        Raises:
            InputError: none of its products can be configured.
            NothingUsable: the program does not compile or run here.
        """
        front = _or_unusable(self.compiling.front(self.module, self.settings))
        text = self.compiling.plain_text(front)
        plain = _or_unusable(self.compiling.compile(self.module, self.settings))
        before = self._times(plain)
        products = dispatches.products(text)
        if not products:
            level = self.settings.get("opt_level")
            raise InputError(
                f"variant {digest.short(self.row['variant'])} has no product that a configuration changes: "
                f"with weight_format={self.settings.get('weight_format')} at opt_level={level} they are named "
                "operations; tune one of quantized weights, or of another opt_level"
            )
        ranked = self._ranked(products, before)
        known = {p.signature: found for p, _, _ in ranked if (found := find_tuning(self.catalog, self._key(p)))}
        tried = self._try(text, [p for p, _, _ in ranked if p.signature not in known], before)
        chosen = {s: found.configuration for s, found in known.items() if found.configuration}
        chosen |= {s: best for s, rows in tried.items() if (best := self._best(rows))}
        ratio = self._confirm(text, plain, chosen) if chosen else None
        confirmed = ratio is not None and ratio.high < 1.0
        for product, _, _ in ranked:
            if product.signature in tried:
                self._keep(product, tried[product.signature], confirmed)
        kinds = tuple(self._tuning_of(p, o, share, known, tried, confirmed) for p, o, share in ranked)
        return Tunings(kinds, ratio, winners_of(self.catalog, self._target(), self.compiler))

    # --- ranking and trying --------------------------------------------------------------------------------------

    def _times(self, artifact: Artifact) -> dict[str, Operator]:
        """Return the dispatches of a decode step by name, each with its minimum over some readings."""
        path, archive = (
            self.catalog.blobs.path(artifact.digest),
            self.catalog.blobs.path(present(self.row["parameters"])),
        )
        least: dict[str, Operator] = {}
        with self.catalog.measuring():
            for _ in range(READINGS):
                summed: dict[str, Operator] = {}
                for o in _or_unusable(decode_operators(path, archive, self.abi, self.limits)):
                    so_far = summed.get(o.name, Operator(o.name, 0, 0.0))
                    summed[o.name] = Operator(o.name, so_far.calls + o.calls, so_far.seconds + o.seconds)
                for name, o in summed.items():
                    least[name] = min(least.get(name, o), o, key=lambda x: x.seconds)
        return least

    @staticmethod
    def _ranked(found: list[Product], times: Mapping[str, Operator]) -> list[tuple[Product, Operator, float]]:
        """Return the kinds to tune, the costliest first, each with its operator and share of the step."""
        whole = sum(o.seconds for o in times.values())
        by_name = {p.name: p for p in found if p.name in times}
        ranked = sorted(by_name.values(), key=lambda p: -times[p.name].seconds)
        shares = [(p, times[p.name], times[p.name].seconds / whole) for p in ranked]
        return [row for row in shares if row[2] >= SHARE][:KINDS]

    def _try(
        self, text: str, kinds: list[Product], before: Mapping[str, Operator]
    ) -> dict[str, list[tuple[str, float]]]:
        """Return the tried configurations of each signature with their seconds; the compiler's own, "", comes first."""
        rows = {p.signature: [("", before[p.name].seconds)] for p in kinds}
        options = {p.signature: dispatches.configurations(p) for p in kinds}
        rounds = max(map(len, options.values()), default=0)
        for number in range(rounds):
            chosen = {s: of[number] for s, of in options.items() if number < len(of)}
            self.tell(Event("tune", f"{len(chosen)} kinds of dispatches", number + 1, rounds))
            made = self._with(text, chosen)
            if isinstance(made, Failure):
                continue
            times = self._times(made)
            for p in kinds:
                if p.signature in chosen and p.name in times:
                    rows[p.signature].append((chosen[p.signature], times[p.name].seconds))
        return rows

    def _with(self, text: str, chosen: Mapping[str, str]) -> Artifact | Failure:
        """Return the program with these configurations."""
        made = self.compiling.translated_text(dispatches.configure(text, chosen), self.settings)
        return made if isinstance(made, Failure) else self.compiling.emitted(made, self.settings)

    @staticmethod
    def _best(rows: list[tuple[str, float]]) -> str:
        """Return the configuration with a sufficient gain; empty for the compiler's own."""
        own, (best, seconds) = rows[0][1], min(rows, key=lambda row: row[1])
        return best if own >= GAIN * seconds else ""

    # --- confirming and keeping ----------------------------------------------------------------------------------

    def _confirm(self, text: str, plain: Artifact, chosen: Mapping[str, str]) -> Reading | None:
        """Return time per token of the whole model, tuned over untuned; None where the tuned one fails."""
        made = self._with(text, chosen)
        if isinstance(made, Failure):
            return None
        quality = Quality(None, "tuning changes no weights")
        bench = Bench([self.workload], quality, digest.of(host.machine()), self.limits, Protocol())
        with self.catalog.measuring():
            try:
                first = bench.measure(self._subject(plain, "untuned"), baseline=True)
                tuned = first if isinstance(first, Failure) else bench.measure(self._subject(made, "tuned"))
            finally:
                bench.close()
        return None if isinstance(tuned, Failure) else tuned[0].ratios["tpot_s"]

    def _subject(self, artifact: Artifact, name: str) -> Subject:
        row, point, blobs = self.row, self.row["point"], self.catalog.blobs
        return Subject(
            variant=name,
            artifact=artifact.digest,
            artifact_path=blobs.path(artifact.digest),
            parameters_path=blobs.path(present(row["parameters"])),
            check_path=blobs.path(self.checks),
            abi=present(row["abi"]),
            driver="local-sync",
            workers=0,
            tolerance=max(TOLERANCE[str(point["weight_format"])], TOLERANCE[str(point["kv_dtype"])]),
            parameter_bytes=present(row["parameter_bytes"]),
        )

    def _target(self) -> str:
        return digest.of(self.target.identity())

    def _inputs(self, product: Product) -> dict[str, object]:
        return {"signature": product.signature, "target": self._target(), "compiler": self.compiler}

    def _key(self, product: Product) -> str:
        return digest.of(self._inputs(product))

    def _keep(self, product: Product, rows: list[tuple[str, float]], confirmed: bool) -> None:
        best = self._best(rows) if confirmed else ""
        gain = rows[0][1] / dict(rows)[best]
        tried = tuple({"configuration": c, "seconds": s} for c, s in rows)
        inputs = {**self._inputs(product), "operations": list(product.operations), "bounds": list(product.bounds)}
        record_tuning(self.catalog, self._key(product), inputs, Tuned(best, gain, tried))

    def _tuning_of(
        self,
        product: Product,
        operator: Operator,
        share: float,
        known: Mapping[str, Tuned],
        tried: Mapping[str, list[tuple[str, float]]],
        confirmed: bool,
    ) -> Tuning:
        rows = tried.get(product.signature, [("", operator.seconds)])
        best = self._best(rows) if confirmed else ""
        after = dict(rows)[best]
        if product.signature in known:
            best, after = known[product.signature].configuration, operator.seconds / known[product.signature].gain
        tried_now = len(rows) - 1
        return Tuning(
            product.name, operator.calls, share, operator.seconds, after, best, tried_now, product.signature in known
        )


def _or_unusable(found: T | Failure) -> T:
    if isinstance(found, Failure):
        raise NothingUsable(f"{found.stage}: {found.reason}")
    return found
