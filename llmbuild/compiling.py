"""A compile in phases wired to a catalog: points that agree in a phase share it, whatever build asked first."""

from __future__ import annotations

import gzip
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from time import monotonic
from typing import Any

from llmbuild import digest
from llmbuild.catalog.writer import Catalog, Front
from llmbuild.compiler import dispatches, iree, phases
from llmbuild.compiler.flags import compile_flags
from llmbuild.process import Limits
from llmbuild.spec.space import TUNING, UNTUNED, Value
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Artifact, Failure

Settings = Mapping[str, Value]


def untuned(settings: Settings) -> bool:
    """Say whether the compiler configures every dispatch itself."""
    return settings.get(TUNING, UNTUNED) == UNTUNED


class Compiling:
    """The compiles of one target with one compiler.

    `forced` says once for each thing whether it is to be made again though it is known.
    """

    def __init__(
        self, catalog: Catalog, target: Target, compiler: str, limits: Limits, forced: Callable[[str], bool]
    ) -> None:
        self.catalog, self.target, self.compiler, self.limits, self.forced = catalog, target, compiler, limits, forced
        self._locks: defaultdict[str, Lock] = defaultdict(Lock)

    def inputs(self, module: str, settings: Settings) -> dict[str, Any]:
        """Return everything that goes into a compile of a module (its digest), by name."""
        inputs = {"module": module, "flags": compile_flags(self.target, settings), "compiler": self.compiler}
        return inputs if untuned(settings) else {**inputs, TUNING: settings[TUNING]}

    def compile(self, module: str, settings: Settings) -> Artifact | Failure:
        """Return the artifact of a module, from the catalog or the compiler."""
        inputs = self.inputs(module, settings)
        key = digest.of(inputs)
        found = self.catalog.find_compile(key)
        if found and not self.forced("compile " + key):
            return found
        begin = monotonic()
        made = self._compile(module, settings)
        if isinstance(made, Failure):
            command = iree.compile_command(self.catalog.blobs.path(module), Path("out.vmfb"), self.target, settings)
            return replace(made, command=shlex.join(command))
        self.catalog.record_compile(key, inputs, made, monotonic() - begin)
        return made

    def _compile(self, module: str, settings: Settings) -> Artifact | Failure:
        front = self.front(module, settings)
        if isinstance(front, Failure):
            return front
        with TemporaryDirectory(prefix="llmbuild-") as name:
            folder = Path(name)
            configured = self.configure(front, settings, folder)
            return configured if isinstance(configured, Failure) else self.finish(configured, settings, folder)

    def front(self, module: str, settings: Settings) -> Front | Failure:
        """Return the front half of a module; two threads that want the same one make it once."""
        inputs = {"module": module, "flags": phases.front_flags(self.target, settings), "compiler": self.compiler}
        key = digest.of(inputs)
        with self._locks[key]:
            found = self.catalog.find_front(key)
            if found and not self.forced("front " + key):
                return found
            begin = monotonic()
            with TemporaryDirectory(prefix="llmbuild-") as name:
                source, told = Path(name) / "sources.mlir", Path(name) / "statistics.json"
                path = self.catalog.blobs.path(module)
                failure = phases.front(path, source, told, self.target, settings, self.limits)
                if failure:
                    return failure
                blob = self.catalog.blobs.put_bytes(gzip.compress(source.read_bytes(), 6, mtime=0))
                front = Front(blob, phases.features(told), monotonic() - begin)
            self.catalog.record_front(key, inputs, front)
            return front

    def text(self, front: Front, settings: Settings) -> str:
        """Return a front half as text, with what the settings change in its executable target and its products."""
        text = phases.retarget(self.plain_text(front), settings)
        return text if untuned(settings) else dispatches.configure(text, self.catalog.winners(str(settings[TUNING])))

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
        with self._locks[key]:
            found = self.catalog.find_compile(key)
            if found and not self.forced("finish " + key):
                return found
            begin, output = monotonic(), folder / "module.vmfb"
            failure = phases.finish(configured, output, self.target, settings, self.limits)
            if failure:
                return failure
            artifact = Artifact(self.catalog.blobs.put_file(output), output.stat().st_size, self.compiler)
            self.catalog.record_compile(key, inputs, artifact, monotonic() - begin)
            return artifact
