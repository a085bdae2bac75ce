"""A compile in phases with a catalog: points that agree in a phase share its result, across builds."""

from __future__ import annotations

import gzip
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from llmbuild import digest
from llmbuild.compiler import dispatches, iree, matvec, phases, subgroups
from llmbuild.compiler.calls import Runner, here
from llmbuild.compiler.flags import attributes, compile_flags
from llmbuild.process.child import Limits
from llmbuild.spec.space import AUTO, MATVEC, TUNING, UNTUNED, WRITTEN, Value
from llmbuild.spec.target import VULKAN, Target
from llmbuild.spec.variant import Artifact, Failure

if TYPE_CHECKING:
    from llmbuild.catalog.phases import Front
    from llmbuild.catalog.writer import Catalog

Settings = Mapping[str, Value]
T = TypeVar("T")


def untuned(settings: Settings) -> bool:
    """Return whether the compiler configures every dispatch itself."""
    return settings.get(TUNING, UNTUNED) == UNTUNED


def compile_inputs(module: str, target: Target, settings: Settings, compiler: str) -> dict[str, object]:
    """Return all inputs of a module's compile, by name; the module is given by its digest."""
    flags = compile_flags(target, settings)
    return {"module": module, "flags": flags, "compiler": compiler, **written(target, settings)}


def written(target: Target, settings: Settings) -> dict[str, Value]:
    """Return the inputs without a flag: settings that differ from their defaults, and a backend's written text."""
    chosen = {name: settings[name] for name, default in WRITTEN.items() if settings.get(name, default) != default}
    return {**chosen, "subgroups": "said"} if target.backend == VULKAN else chosen


class Compiling:
    """The compiles of one target with one compiler.

    `forced` returns, once per item, whether a known item is made again; `run` runs the compiler, here or elsewhere.
    """

    def __init__(
        self,
        catalog: Catalog,
        target: Target,
        compiler: str,
        limits: Limits,
        forced: Callable[[str], bool],
        run: Runner = here,
    ) -> None:
        self.run = run
        self.catalog, self.target, self.compiler, self.limits, self.forced = catalog, target, compiler, limits, forced

    def compile(self, module: str, settings: Settings) -> Artifact | Failure:
        """Return the artifact of a module, from the catalog or the compiler."""
        inputs = compile_inputs(module, self.target, settings, self.compiler)
        key = digest.of(inputs)
        return self._once(
            "compile", key, self.catalog.find_compile, lambda: self._recorded(key, inputs, module, settings)
        )

    def _recorded(self, key: str, inputs: Mapping[str, object], module: str, settings: Settings) -> Artifact | Failure:
        begin = monotonic()
        made = self._compile(module, settings)
        if isinstance(made, Failure):
            command = iree.compile_command(self.catalog.blobs.path(module), Path("out.vmfb"), self.target, settings)
            return replace(made, command=shlex.join(command))
        self.catalog.record_compile(key, inputs, made, monotonic() - begin)
        return made

    def _once(
        self, step: str, key: str, find: Callable[[str], T | None], make: Callable[[], T | Failure]
    ) -> T | Failure:
        return once(self.catalog, self.forced, step, key, find, make)

    def _compile(self, module: str, settings: Settings) -> Artifact | Failure:
        front = self.front(module, settings)
        if isinstance(front, Failure):
            return front
        translated = self.translated(front, settings)
        return translated if isinstance(translated, Failure) else self.emitted(translated, settings)

    def front(self, module: str, settings: Settings) -> Front | Failure:
        """Return the front half of a module; concurrent requests for the same one share it."""
        inputs = {"module": module, "flags": phases.front_flags(self.target, settings), "compiler": self.compiler}
        key = digest.of(inputs)
        return self._once("front", key, self._find_half, lambda: self._front(key, inputs, module, settings))

    def _front(self, key: str, inputs: Mapping[str, object], module: str, settings: Settings) -> Front | Failure:
        from llmbuild.catalog.phases import Front

        begin = monotonic()
        with TemporaryDirectory(prefix="llmbuild-") as name:
            source, told = Path(name) / "sources.mlir", Path(name) / "statistics.json"
            path = self.catalog.blobs.path(module)
            failure = phases.front(path, source, told, self.target, settings, self.limits, self.run)
            if failure:
                return failure
            blob = self.catalog.blobs.put_bytes(gzip.compress(source.read_bytes(), 6, mtime=0))
            front = Front(blob, phases.features(told), monotonic() - begin)
        self._record_half(key, inputs, front)
        return front

    def text(self, front: Front, settings: Settings) -> str:
        """Return a front half as text, with the settings' changes of its executable target and its products."""
        from llmbuild.catalog.phases import winners

        text = phases.retarget(self.plain_text(front), settings)
        if settings.get(MATVEC, AUTO) != AUTO:
            text = matvec.configure(text, str(settings[MATVEC]))
        return text if untuned(settings) else dispatches.configure(text, winners(self.catalog, str(settings[TUNING])))

    def plain_text(self, front: Front) -> str:
        """Return a front half as text."""
        return gzip.decompress(self.catalog.blobs.path(front.blob).read_bytes()).decode()

    def translated(self, front: Front, settings: Settings) -> Front | Failure:
        """Return the translated dispatches of a front half, looked up by the request or by their configuration."""
        flags = phases.configure_flags(self.target, settings)
        inputs = {"front": front.blob, "flags": flags, "compiler": self.compiler, **written(self.target, settings)}

        def make() -> Front | Failure:
            made = self.translated_text(self.text(front, settings), settings)
            if not isinstance(made, Failure):
                self._record_half(digest.of(inputs), inputs, made)
            return made

        return self._once("translate", digest.of(inputs), self._find_half, make)

    def translated_text(self, text: str, settings: Settings) -> Front | Failure:
        """Return the translated dispatches of a front half's text; equal configurations are reused."""
        with TemporaryDirectory(prefix="llmbuild-") as name:
            folder = Path(name)
            source, configured = folder / "sources.mlir", folder / "configured.mlirbc"
            source.write_text(text)
            edited = self.target.backend == VULKAN
            failure = phases.configure(source, configured, self.target, settings, self.limits, edited, self.run)
            if failure:
                return failure
            if edited:
                configured.write_text(subgroups.said(configured.read_text()))
            flags = phases.translate_flags(self.target, settings)
            plain = _nameless(configured.read_bytes(), folder)
            inputs = {"configured": digest.of_bytes(plain), "flags": flags, "compiler": self.compiler}
            key = digest.of(inputs)
            return self._once(
                "translate", key, self._find_half, lambda: self._translate(key, inputs, configured, settings, folder)
            )

    def _translate(
        self, key: str, inputs: Mapping[str, object], configured: Path, settings: Settings, folder: Path
    ) -> Front | Failure:
        from llmbuild.catalog.phases import Front

        begin, output = monotonic(), folder / "translated.mlirbc"
        failure = phases.translate(configured, output, self.target, settings, self.limits, self.run)
        if failure:
            return failure
        packed = gzip.compress(_nameless(output.read_bytes(), folder), 6, mtime=0)
        made = Front(self.catalog.blobs.put_bytes(packed), {}, monotonic() - begin)
        self._record_half(key, inputs, made)
        return made

    def _find_half(self, key: str) -> Front | None:
        from llmbuild.catalog.phases import find_front

        return find_front(self.catalog, key)

    def _record_half(self, key: str, inputs: Mapping[str, object], made: Front) -> None:
        from llmbuild.catalog.phases import record_front

        record_front(self.catalog, key, inputs, made)

    def emitted(self, translated: Front, settings: Settings) -> Artifact | Failure:
        """Return the artifact of translated dispatches; equal ones are reused, whatever flags led to them."""
        flags, edits = phases.emit_flags(self.target, settings), attributes(settings, "emit")
        inputs = {"translated": translated.blob, "flags": flags, "attributes": edits, "compiler": self.compiler}
        key = digest.of(inputs)
        return self._once("emit", key, self.catalog.find_compile, lambda: self._emit(key, inputs, translated, settings))

    def _emit(
        self, key: str, inputs: Mapping[str, object], translated: Front, settings: Settings
    ) -> Artifact | Failure:
        begin = monotonic()
        with TemporaryDirectory(prefix="llmbuild-") as name:
            source, output = Path(name) / "translated.mlirbc", Path(name) / "module.vmfb"
            source.write_bytes(gzip.decompress(self.catalog.blobs.path(translated.blob).read_bytes()))
            failure = phases.emit(source, output, self.target, settings, self.limits, self.run)
            if failure:
                return failure
            artifact = Artifact(self.catalog.blobs.put_file(output), output.stat().st_size, self.compiler)
        self.catalog.record_compile(key, inputs, artifact, monotonic() - begin)
        return artifact


def _nameless(bytecode: bytes, folder: Path) -> bytes:
    """Return bytecode, which embeds its file name, with the folder's name replaced and the length kept."""
    return bytecode.replace(str(folder).encode(), b"_" * len(str(folder).encode()))


def once(
    catalog: Catalog,
    forced: Callable[[str], bool],
    step: str,
    key: str,
    find: Callable[[str], T | None],
    make: Callable[[], T | Failure],
) -> T | Failure:
    """Return a known item, or make it; of concurrent requests for one item, one makes it and the others wait."""
    found = find(key)
    if found and not forced(f"{step} {key}"):
        return found
    with catalog.making(f"{step}-{key}"):  # a compile and its front half may have the same key
        other = None if found else find(key)
        return other or make()
