"""A compile in phases wired to a catalog: points that agree in a phase share it, whatever build asked first."""

from __future__ import annotations

import gzip
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from llmbuild import digest
from llmbuild.compiler import dispatches, iree, matvec, phases
from llmbuild.compiler.flags import compile_flags
from llmbuild.process import Limits
from llmbuild.spec.space import AUTO, MATVEC, TUNING, UNTUNED, WRITTEN, Value
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Artifact, Failure

if TYPE_CHECKING:
    from llmbuild.catalog.phases import Front
    from llmbuild.catalog.writer import Catalog

Settings = Mapping[str, Value]
T = TypeVar("T")


def untuned(settings: Settings) -> bool:
    """Say whether the compiler configures every dispatch itself."""
    return settings.get(TUNING, UNTUNED) == UNTUNED


def compile_inputs(module: str, target: Target, settings: Settings, compiler: str) -> dict[str, Any]:
    """Return everything that goes into a compile of a module (its digest), by name."""
    inputs = {"module": module, "flags": compile_flags(target, settings), "compiler": compiler}
    written = {name: settings[name] for name, default in WRITTEN.items() if settings.get(name, default) != default}
    return {**inputs, **written}


class Compiling:
    """The compiles of one target with one compiler.

    `forced` says once for each thing whether it is to be made again though it is known.
    """

    def __init__(
        self, catalog: Catalog, target: Target, compiler: str, limits: Limits, forced: Callable[[str], bool]
    ) -> None:
        self.catalog, self.target, self.compiler, self.limits, self.forced = catalog, target, compiler, limits, forced

    def compile(self, module: str, settings: Settings) -> Artifact | Failure:
        """Return the artifact of a module, from the catalog or the compiler."""
        inputs = compile_inputs(module, self.target, settings, self.compiler)
        key = digest.of(inputs)
        return self._once(
            "compile", key, self.catalog.find_compile, lambda: self._recorded(key, inputs, module, settings)
        )

    def _recorded(self, key: str, inputs: dict[str, Any], module: str, settings: Settings) -> Artifact | Failure:
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
        with TemporaryDirectory(prefix="llmbuild-") as name:
            folder = Path(name)
            configured = self.configure(front, settings, folder)
            return configured if isinstance(configured, Failure) else self.finish(configured, settings, folder)

    def front(self, module: str, settings: Settings) -> Front | Failure:
        """Return the front half of a module; two that want the same one make it once."""
        inputs = {"module": module, "flags": phases.front_flags(self.target, settings), "compiler": self.compiler}
        key = digest.of(inputs)

        from llmbuild.catalog.phases import find_front

        def find(key: str) -> Front | None:
            return find_front(self.catalog, key)

        return self._once("front", key, find, lambda: self._front(key, inputs, module, settings))

    def _front(self, key: str, inputs: dict[str, Any], module: str, settings: Settings) -> Front | Failure:
        from llmbuild.catalog.phases import Front, record_front

        begin = monotonic()
        with TemporaryDirectory(prefix="llmbuild-") as name:
            source, told = Path(name) / "sources.mlir", Path(name) / "statistics.json"
            path = self.catalog.blobs.path(module)
            failure = phases.front(path, source, told, self.target, settings, self.limits)
            if failure:
                return failure
            blob = self.catalog.blobs.put_bytes(gzip.compress(source.read_bytes(), 6, mtime=0))
            front = Front(blob, phases.features(told), monotonic() - begin)
        record_front(self.catalog, key, inputs, front)
        return front

    def text(self, front: Front, settings: Settings) -> str:
        """Return a front half as text, with what the settings change in its executable target and its products."""
        from llmbuild.catalog.phases import winners

        text = phases.retarget(self.plain_text(front), settings)
        if settings.get(MATVEC, AUTO) != AUTO:
            text = matvec.configure(text, str(settings[MATVEC]))
        return text if untuned(settings) else dispatches.configure(text, winners(self.catalog, str(settings[TUNING])))

    def plain_text(self, front: Front) -> str:
        """Return a front half as text."""
        return gzip.decompress(self.catalog.blobs.path(front.blob).read_bytes()).decode()

    def configure(self, front: Front, settings: Settings, folder: Path) -> Path | Failure:
        """Return a file with the dispatches configured."""
        return self.configure_text(self.text(front, settings), settings, folder)

    def configure_text(self, text: str, settings: Settings, folder: Path) -> Path | Failure:
        """Return a file with the dispatches of a front half's text configured."""
        source, configured = folder / "sources.mlir", folder / "configured.mlirbc"
        source.write_text(text)
        return phases.configure(source, configured, self.target, settings, self.limits) or configured

    def finish(self, configured: Path, settings: Settings, folder: Path) -> Artifact | Failure:
        """Return the artifact of configured dispatches; equal ones were compiled before, whatever flags led to them."""
        flags = phases.late_flags(self.target, settings)
        plain = configured.read_bytes().replace(str(folder).encode(), b"")  # bytecode names the file it came from
        inputs = {"configured": digest.of_bytes(plain), "flags": flags, "compiler": self.compiler}
        key = digest.of(inputs)
        return self._once(
            "finish", key, self.catalog.find_compile, lambda: self._finish(key, inputs, configured, settings, folder)
        )

    def _finish(
        self, key: str, inputs: dict[str, Any], configured: Path, settings: Settings, folder: Path
    ) -> Artifact | Failure:
        begin, output = monotonic(), folder / "module.vmfb"
        failure = phases.finish(configured, output, self.target, settings, self.limits)
        if failure:
            return failure
        artifact = Artifact(self.catalog.blobs.put_file(output), output.stat().st_size, self.compiler)
        self.catalog.record_compile(key, inputs, artifact, monotonic() - begin)
        return artifact


def once(
    catalog: Catalog,
    forced: Callable[[str], bool],
    step: str,
    key: str,
    find: Callable[[str], T | None],
    make: Callable[[], T | Failure],
) -> T | Failure:
    """Return what was made before, or make it; of two who need the same thing, one makes it and the other waits."""
    found = find(key)
    if found and not forced(f"{step} {key}"):
        return found
    with catalog.making(f"{step}-{key}"):  # a compile and its front half may have the same key
        other = None if found else find(key)
        return other or make()
