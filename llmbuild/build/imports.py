"""Programs and references of a job: from its catalog, or from a child process that loads the model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.build.compiling import once
from llmbuild.build.job import Job
from llmbuild.errors import InputError
from llmbuild.frontend.config import KINDS
from llmbuild.process.child import python
from llmbuild.process.prefork import Prefork
from llmbuild.profiler import heldout
from llmbuild.profiler.protocol import Quality
from llmbuild.spec.program import CHECK_FILE, MODULE_FILE, PARAMETERS_FILE, Program, abi_from
from llmbuild.spec.space import Point
from llmbuild.spec.variant import Failure
from llmbuild.system.strict_json import JsonObject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmbuild.catalog.writer import Catalog

FRONTEND = Prefork(
    (
        "llmbuild.frontend.program",
        "llmbuild.frontend.reference",
        # what these import when they are called, as far as it takes 5 ms and more
        "transformers.models.auto.modeling_auto",
        *(f"transformers.models.{kind}.modeling_{kind}" for kind in KINDS),
        "torch.export._trace",
        "sympy.tensor.tensor",
    )
)
"""Starts the frontend's jobs, in all builds of this process.

Between jobs its server sleeps, and keeps about 420 MB of memory (PSS, with PyTorch 2.13): it goes when a build ends.
"""


class Imports:
    """The frontend's results for a job's model.

    `forced` returns, once per item, whether a known item is made again.
    """

    def __init__(self, job: Job, catalog: Catalog, forced: Callable[[str], bool]) -> None:
        self.job, self.catalog, self._forced = job, catalog, forced
        self.notes: dict[str, None] = {}
        """The library's messages about the model during imports, each once."""

    def expect(self, point: Point) -> None:
        """Import the frontend's libraries in the background, if the program of a point is wanted next and not known."""
        known = self.catalog.find_import(digest.of(self.job.import_inputs(point)))
        if known is None or self.job.force:
            FRONTEND.start()

    def told(self) -> list[str]:
        """Return, once, why the frontend's jobs take longer than they should."""
        return FRONTEND.told()

    def close(self) -> None:
        """Free what is kept for more jobs."""
        FRONTEND.rest()

    def program(self, point: Point) -> Program | Failure:
        """Return the program of a point, from the catalog or a child process.

        A model that this point alone cannot import is a failure.

        Raises:
            InputError: the model itself is not supported.
        """
        inputs = self.job.import_inputs(point)
        key = digest.of(inputs)
        return once(
            self.catalog, self._forced, "import", key, self.catalog.find_import, lambda: self._import(key, inputs)
        )

    def _import(self, key: str, inputs: Mapping[str, object]) -> Program | Failure:
        source = self.job.recipe.model
        request: dict[str, object] = {
            "verb": "import",
            "model": str(self.job.model.folder.absolute()),
            "random_init": source.random_init,
            "seed": source.seed,
            "context": inputs["context"],
            "batch": inputs["batch"],
            "choices": inputs["choices"],
            "features": inputs["features"],
            "subgroup": inputs.get("subgroup", 0),
        }
        if "calibration" in inputs:
            request["calibration"] = str(self._calibration_file())
        begin = monotonic()
        with TemporaryDirectory(prefix="llmbuild-") as folder:
            result = self._frontend(request, Path(folder))
            if isinstance(result, Failure):
                return result
            self.notes.update(dict.fromkeys(result["notes"]))
            files = (Path(folder) / name for name in (MODULE_FILE, PARAMETERS_FILE, CHECK_FILE))
            blobs = [self.catalog.blobs.put_file(path, moved=True) for path in files]
        program = Program(blobs[0], blobs[1], blobs[2], abi_from(result["program"]["abi"]))
        self.catalog.record_import(key, inputs, program, monotonic() - begin)
        return program

    def _calibration_file(self) -> Path:
        """Return an `.npy` of the calibration tokens in the store, so that a printed command finds it too."""
        import numpy as np

        with TemporaryDirectory(prefix="llmbuild-") as folder:
            path = Path(folder) / "calibration.npy"
            np.save(path, self.job.calibration)
            return self.catalog.blobs.path(self.catalog.blobs.put_file(path))

    def _frontend(self, request: Mapping[str, object], folder: Path) -> JsonObject | Failure:
        job_file, result = folder / "job.json", folder / "result.json"
        job_file.write_text(json.dumps({**request, "out": str(folder)}))
        failure = FRONTEND.run("llmbuild.frontend", [str(job_file)], "import", self.job.limits, result)
        if result.is_file():
            told: JsonObject = json.loads(result.read_text())
            if "error" in told:
                raise InputError(told["error"])
            if "refused" not in told:
                return told
            failure = Failure("import", told["refused"], "", "", lasting=True)
        assert failure is not None
        shown = json.dumps({**request, "out": "out"})
        again = shlex.join(python("llmbuild.frontend", "job.json"))
        pasteable = f"echo {shlex.quote(shown)} > job.json && {again}"
        return replace(failure, command=pasteable)

    def reference(self) -> Quality | Failure:
        """Return the f32 model's logits on the held-out text, from the catalog or a child process."""
        job = self.job
        absent = job.scored()
        if absent or job.model.tokenizer is None:
            return Quality(None, absent)
        windows = heldout.windows(job.recipe.quality, job.model.tokenizer, job.recipe.context)
        inputs = {
            "model": job.model.digest,
            "windows": digest.of_bytes(windows.tobytes()),
            "shape": list(windows.shape),
            "importer": job.toolchain.importer,
        }
        key = digest.of(inputs)
        made = once(
            self.catalog,
            self._forced,
            "reference",
            key,
            self.catalog.find_reference,
            lambda: self._reference(key, inputs, windows),
        )
        return made if isinstance(made, Failure) else Quality(self.catalog.blobs.path(made), "")

    def _reference(self, key: str, inputs: Mapping[str, object], windows: NDArray[np.int64]) -> str | Failure:
        import numpy as np

        with TemporaryDirectory(prefix="llmbuild-") as name:
            folder = Path(name)
            np.save(folder / "windows.npy", windows)
            request = {
                "verb": "reference",
                "model": str(self.job.model.folder.absolute()),
                "windows": str(folder / "windows.npy"),
            }
            result = self._frontend(request, folder)
            if isinstance(result, Failure):
                return result
            np.savez(folder / "reference.npz", tokens=windows, logits=np.load(folder / result["logits"]))
            blob = self.catalog.blobs.put_file(folder / "reference.npz")
        self.catalog.record_reference(key, inputs, blob)
        return blob
