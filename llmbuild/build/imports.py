"""Programs and references of a job: from its catalog, or from a child process that loads the model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.build.chats import Chats
from llmbuild.build.compiling import once
from llmbuild.build.events import Tell
from llmbuild.build.job import Job
from llmbuild.build.room import no_disk
from llmbuild.build.structures import Structures, calibration_file
from llmbuild.errors import InputError
from llmbuild.frontend.config import KINDS
from llmbuild.frontend.files import CONFIG
from llmbuild.process.child import Limits, python
from llmbuild.process.prefork import Prefork
from llmbuild.profiler import heldout
from llmbuild.profiler.calibration import Chats as Asked
from llmbuild.profiler.calibration import mixed
from llmbuild.profiler.protocol import Quality
from llmbuild.spec.model import read_facts
from llmbuild.spec.program import CHECK_FILE, MODULE_FILE, PARAMETERS_FILE, Program, abi_from
from llmbuild.spec.space import Point
from llmbuild.spec.variant import Failure
from llmbuild.system.strict_json import JsonObject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmbuild.catalog.writer import Catalog

WAITING = "OMP_WAIT_POLICY"
"""How PyTorch's threads wait for each other. Where they spin and other processes have their cores, a step of a model
takes several times the CPU: they sleep, unless the user says otherwise."""
FRONTEND = Prefork(
    (
        "llmbuild.frontend.program",
        "llmbuild.frontend.reference",
        # what these import when they are called, as far as it takes 5 ms and more
        "transformers.models.auto.modeling_auto",
        *(f"transformers.models.{kind}.modeling_{kind}" for kind in KINDS),
        "torch.export._trace",
        "sympy.tensor.tensor",
    ),
    {WAITING: os.environ.get(WAITING, "PASSIVE")},
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
        self.tell: Tell = lambda _: None
        """Is told how far an import is, where it takes long."""
        self.notes: dict[str, None] = {}
        """The library's messages about the model during imports, each once."""
        self._remarks: dict[str, bool] = {}
        """What imports have to tell, each once, and whether it was told."""

    def expect(self, point: Point) -> None:
        """Import the frontend's libraries in the background, if the program of a point is wanted next and not known."""
        known = self.catalog.find_import(digest.of(self.job.import_inputs(point)))
        if known is None or self.job.force:
            FRONTEND.start()

    def told(self) -> list[str]:
        """Return, once, what imports have to tell: which went on, and why they take longer than they should."""
        found = [text for text, told in self._remarks.items() if not told]
        self._remarks = dict.fromkeys(self._remarks, True)
        return [*found, *FRONTEND.told()]

    def _tell(self, text: str) -> None:
        self._remarks.setdefault(text, False)

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
            self.catalog, self._forced, "import", key, self.catalog.find_import, lambda: self._made(key, inputs, point)
        )

    def _made(self, key: str, inputs: Mapping[str, object], point: Point) -> Program | Failure:
        return no_disk(self.job, point, self.catalog.folder) or self._import(key, inputs)

    def _import(self, key: str, inputs: Mapping[str, object]) -> Program | Failure:
        truth = self._truth(inputs)
        if isinstance(truth, Failure):
            return truth
        structure = Structures(self.job, self.catalog)
        request = {
            **_request(self.job, "import", inputs),
            "key": key,
            "truth": str(self.catalog.blobs.path(truth).absolute()),
        }
        request |= structure.known(inputs)
        if "calibration" in inputs:
            tokens = self.calibration()
            if isinstance(tokens, Failure):
                return tokens
            request["calibration"] = str(calibration_file(tokens, self.catalog))
        folder, begin = self.catalog.importing(key), monotonic()
        try:
            result = _frontend(self.job, request, folder)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if isinstance(result, Failure):
            if result.lasting:
                shutil.rmtree(folder, ignore_errors=True)
            return result
        self.notes.update(dict.fromkeys(result["notes"]))
        if result["resumed"]:
            count = read_facts(self.job.model.folder / CONFIG).layers
            self._tell(f"an import went on that was interrupted: {result['resumed']} of {count} layers were there")
        if result["rounded_again"]:
            told = " and ".join(result["rounded_again"])
            self._tell(f"the file's weights are in blocks of {told}: formats that do not keep these round them again")
        blobs = [
            self.catalog.blobs.put_file(folder / file, moved=True, digest=result["program"][name])
            for name, file in (("module", MODULE_FILE), ("parameters", PARAMETERS_FILE), ("check", CHECK_FILE))
        ]
        seconds = monotonic() - begin
        structure.record(inputs, blobs[0], folder, seconds)
        program = Program(blobs[0], blobs[1], blobs[2], abi_from(result["program"]["abi"]))
        self.catalog.record_import(key, inputs, program, seconds)
        shutil.rmtree(folder, ignore_errors=True)
        return program

    @contextmanager
    def _folder(self, key: str) -> Iterator[Path]:
        """Give a folder of the catalog for one job; what a killed one leaves there goes with the next, or by `gc`."""
        folder = self.catalog.importing(key)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- what imports share --------------------------------------------------------------------------------------

    def calibration(self) -> NDArray[np.int64] | Failure:
        """Return the calibration tokens i64[W,L]; chats are the model's own, from the catalog or a child process."""
        chats = Chats(self.job, self.catalog, partial(_frontend, self.job), self.tell)
        found: list[NDArray[np.int64]] = []
        for part in self.job.calibration.each:
            windows = chats.tokens(part, self._forced) if isinstance(part, Asked) else part
            if isinstance(windows, Failure):
                return windows
            found.append(windows)
        return mixed(found)

    def _truth(self, inputs: Mapping[str, object]) -> str | Failure:
        """Return the blob of what the library's own model says on the check's tokens."""
        shared = {name: inputs[name] for name in ("model", "context", "batch", "importer")}
        shared |= {"seed": self.job.recipe.model.seed}  # tokens are drawn by it, whether weights are or not
        key = digest.of({"truth": shared})

        def make() -> str | Failure:
            with self._folder(key) as folder:
                request = {**_request(self.job, "truth", inputs), "choices": {}, "features": (), "subgroup": 0}
                result = _frontend(self.job, request, folder)
                if isinstance(result, Failure):
                    return result
                blob = self.catalog.blobs.put_file(folder / result["truth"])
            self.catalog.record_reference(key, {"truth": shared}, blob)
            return blob

        return once(self.catalog, self._forced, "truth", key, self.catalog.find_reference, make)

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

        with self._folder(key) as folder:
            np.save(folder / "windows.npy", windows)
            request = {
                "verb": "reference",
                "model": str(self.job.model.location.absolute()),
                "windows": str(folder / "windows.npy"),
            }
            result = _frontend(self.job, request, folder)
            if isinstance(result, Failure):
                return result
            np.savez(folder / "reference.npz", tokens=windows, logits=np.load(folder / result["logits"]))
            blob = self.catalog.blobs.put_file(folder / "reference.npz")
        self.catalog.record_reference(key, inputs, blob)
        return blob


def _frontend(
    job: Job, request: Mapping[str, object], folder: Path, limits: Limits | None = None
) -> JsonObject | Failure:
    """Run a job of the frontend in a child process, with its files in a folder; limits are else the build's."""
    job_file, result = folder / "job.json", folder / "result.json"
    result.unlink(missing_ok=True)  # of an earlier run in this folder
    job_file.write_text(json.dumps({**request, "out": str(folder)}))
    failure = FRONTEND.run("llmbuild.frontend", [str(job_file)], "import", limits or job.limits, result)
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


def _request(job: Job, verb: str, inputs: Mapping[str, object]) -> dict[str, object]:
    """Return what every job about a program is told."""
    source = job.recipe.model
    return {
        "verb": verb,
        "model": str(job.model.location.absolute()),
        "random_init": source.random_init,
        "seed": source.seed,
        "context": inputs["context"],
        "batch": inputs["batch"],
        "choices": inputs["choices"],
        "features": inputs["features"],
        "subgroup": inputs.get("subgroup", 0),
    }
