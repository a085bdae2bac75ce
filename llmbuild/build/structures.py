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
from llmbuild.kernels.layouts import UNIFORM, up_to
from llmbuild.kernels.shapes import multiple
from llmbuild.spec.formats import SAME
from llmbuild.spec.model import facts_of
from llmbuild.spec.program import SHELL_FILE, SIZES_FILE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmbuild.catalog.writer import Catalog


class Structures:
    """The modules of a job's imports: the values of weights are not among their inputs, nor how they are rounded."""

    def __init__(self, job: Job, catalog: Catalog) -> None:
        self.job, self.catalog = job, catalog

    def known(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return the module and its tensors' sizes of an import with the same structure, if there was one."""
        from llmbuild.catalog.phases import find_front

        if self.job.force:
            return {}
        found, blobs = find_front(self.catalog, digest.of(self._of(inputs))), self.catalog.blobs
        module = str(found.features["module"]) if found else ""
        if found is not None and blobs.intact(module):
            return {"module": str(blobs.path(module).absolute()), "sizes": str(blobs.path(found.blob).absolute())}
        shell = find_front(self.catalog, digest.of(self._shell(inputs)))
        return {} if shell is None else {"shell": str(blobs.path(shell.blob).absolute())}

    def record(self, inputs: Mapping[str, object], module: str, folder: Path, seconds: float) -> None:
        """Record the module of an import, and what is around our kernels, as far as they lie in its folder."""
        from llmbuild.catalog.phases import Front, record_front

        for name, of in ((SIZES_FILE, self._of(inputs)), (SHELL_FILE, self._shell(inputs))):
            if (path := folder / name).is_file():
                features: dict[str, object] = {"module": module} if name == SIZES_FILE else {}
                blob = self.catalog.blobs.put_file(path)
                record_front(self.catalog, digest.of(of), of, Front(blob, features, seconds))

    def _shell(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return all inputs of what is around our own kernels: of formats, the width that hidden states have."""
        choices = inputs["choices"]
        assert isinstance(choices, Mapping)
        layers, head = str(choices.get("weight_format", "f32")), str(choices.get("head_format", SAME))
        config = self._config()
        width = up_to(facts_of(config).decoder.hidden, multiple(layers, layers if head == SAME else head))
        shared = {name: inputs[name] for name in ("context", "batch", "importer")}
        more = {"random_init": self.job.recipe.model.random_init, "width": width}
        return {"shell": {**shared, **more, "config": config, "kv_dtype": choices.get("kv_dtype")}}

    def _config(self) -> dict[str, object]:
        config: dict[str, object] = json.loads((self.job.model.folder / CONFIG).read_text())
        return config

    def _of(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Return all inputs of an import's module."""
        choices = inputs["choices"]
        assert isinstance(choices, Mapping)
        settled = {name: value for name, value in choices.items() if name != "quantization"}
        shared = {name: inputs[name] for name in ("context", "batch", "features", "importer")}
        by_value = {}
        shared_out = settled.get("allocation", UNIFORM) != UNIFORM
        if shared_out or settled.get("mixed") == "sensitive":  # weights and text decide on formats
            by_value = {name: inputs[name] for name in ("model", "calibration")}
        more = {"random_init": self.job.recipe.model.random_init, "subgroup": inputs.get("subgroup", 0)}
        return {"structure": {**shared, **by_value, **more, "config": self._config(), "choices": settled}}


def calibration_file(tokens: NDArray[np.int64], catalog: Catalog) -> Path:
    """Return an `.npy` of calibration tokens i64[W,L] in the store, so that a printed command finds it too."""
    import numpy as np

    with TemporaryDirectory(prefix="llmbuild-") as folder:
        path = Path(folder) / "calibration.npy"
        np.save(path, tokens)
        return catalog.blobs.path(catalog.blobs.put_file(path)).absolute()
