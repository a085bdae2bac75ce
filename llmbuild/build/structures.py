"""What several imports of a catalog read: modules whose inputs are equal, and the calibration tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.build.job import Job
from llmbuild.frontend.files import CONFIG

if TYPE_CHECKING:
    from llmbuild.catalog.writer import Catalog


class Structures:
    """The modules of a job's imports: the values of weights are not among their inputs, nor how they are rounded."""

    def __init__(self, job: Job, catalog: Catalog) -> None:
        self.job, self.catalog = job, catalog

    def known(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return the module and its tensors' sizes of an import with the same structure, if there was one."""
        from llmbuild.catalog.phases import find_front

        found, blobs = find_front(self.catalog, digest.of(self._of(inputs))), self.catalog.blobs
        module = str(found.features["module"]) if found else ""
        if found is None or not blobs.intact(module) or self.job.force:
            return {}
        return {"module": str(blobs.path(module).absolute()), "sizes": str(blobs.path(found.blob).absolute())}

    def record(self, inputs: Mapping[str, object], module: str, sizes: str, seconds: float) -> None:
        """Record the module of an import."""
        from llmbuild.catalog.phases import Front, record_front

        blob, of = self.catalog.blobs.put_bytes(sizes.encode()), self._of(inputs)
        record_front(self.catalog, digest.of(of), of, Front(blob, {"module": module}, seconds))

    def _of(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return all inputs of an import's module."""
        choices = inputs["choices"]
        assert isinstance(choices, Mapping)
        settled = {name: value for name, value in choices.items() if name != "quantization"}
        shared = {name: inputs[name] for name in ("context", "batch", "features", "importer")}
        by_value = {}
        if settled.get("mixed", "none") != "none":  # weights and text decide which layers keep more bits
            by_value = {name: inputs[name] for name in ("model", "calibration")}
        config = json.loads((self.job.model.folder / CONFIG).read_text())
        more = {"random_init": self.job.recipe.model.random_init, "subgroup": inputs.get("subgroup", 0)}
        return {"structure": {**shared, **by_value, **more, "config": config, "choices": settled}}


def calibration_file(job: Job, catalog: Catalog) -> Path:
    """Return an `.npy` of the calibration tokens in the store, so that a printed command finds it too."""
    import numpy as np

    with TemporaryDirectory(prefix="llmbuild-") as folder:
        path = Path(folder) / "calibration.npy"
        np.save(path, job.calibration)
        return catalog.blobs.path(catalog.blobs.put_file(path)).absolute()
