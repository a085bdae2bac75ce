"""Imports of tiny models, and what is compiled of them: each is made once, for every test that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmbuild import digest
from tests.conftest import shared
from tests.support import tiny
from tests.support.artifact import Loaded, compile_file

Make = Callable[[str, Callable[[Path], object]], Path]
AVX2 = ("avx2", "fma", "f16c")

TWO = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
"""A model of two layers, whose positions are stretched as in Llama 3."""

ONE = {"num_hidden_layers": 1, "vocab_size": 323, "intermediate_size": 200}
"""A model of one layer and of odd sizes."""

BIASED = {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
"""A model of one layer with biases and an output matrix of its own."""


@dataclass(frozen=True)
class Imported:
    """What an import wrote, and the model it read; not to be written to."""

    model: Path
    folder: Path
    make: Make

    @property
    def result(self) -> Any:
        """What the import returned, as plain data."""
        return json.loads((self.folder / "result.json").read_text())

    def compiled(self, level: str = "O2", cpu: str = "host", flags: tuple[str, ...] = ()) -> Path:
        """Return a folder with the artifact `m.vmfb` and, in `code`, the machine code in it."""

        def make(folder: Path) -> None:
            (folder / "code").mkdir(parents=True)
            dump = f"--iree-hal-dump-executable-binaries-to={folder / 'code'}"
            source = self.folder / "module.mlirbc"
            compile_file(source, folder / "m.vmfb", f"--iree-opt-level={level}", *flags, dump, cpu=cpu)

        return self.make(f"{self.folder.name}-{digest.of([level, cpu, flags])[:8]}", make)

    def at(self, level: str = "O2", driver: str = "local-task", cpu: str = "host", *flags: str) -> Loaded:
        """Compile at an optimization level, and load."""
        return Loaded(self.folder, self.compiled(level, cpu, flags) / "m.vmfb", driver)

    def checked(self, loaded: Loaded) -> tuple[Any, Any, float]:
        """Return logits f32[1+D,1,V] on the check data: those of the artifact, those wanted, and the noise."""
        with np.load(self.folder / "check.npz") as check:
            actual = loaded.forced(check["prompt"][0], check["forced"][0])[:, None]
            return actual, check["logits"], float(check["noise"])


@dataclass(frozen=True)
class Imports:
    """Makes models and imports."""

    make: Make

    def model(self, kind: str = "Llama", **shape: Any) -> Path:
        """Return a folder with a tiny model."""
        return self.make(f"model-{digest.of([kind, shape])[:8]}", lambda folder: tiny.write(folder, kind=kind, **shape))

    def tokens(self) -> Path:
        """Return a file of tokens to calibrate with."""

        def make(folder: Path) -> None:
            folder.mkdir()
            np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 320, (4, 32)))

        return self.make("calibration", make) / "tokens.npy"

    def job(self, model: Path, choices: dict[str, str], **more: Any) -> Any:
        """Return the job of an import; choices that need calibration get its tokens."""
        from llmbuild.spec.program import ImportJob

        calibrated = {"quantization", "scaling", "mixed", "allocation"} & set(choices)
        calibration = str(self.tokens()) if calibrated else ""
        settled: dict[str, Any] = {"context": 64, "calibration": calibration, **more}
        return ImportJob(str(model), choices=tuple(sorted(choices.items())), **settled)

    def __call__(self, model: Path, choices: dict[str, str] | None = None, **more: Any) -> Imported:
        """Return the import of a model; `more` are fields of its job."""
        job = self.job(model, choices or {}, **more)

        def make(folder: Path) -> None:
            from llmbuild.frontend.program import import_model

            result = import_model(job, folder)
            (folder / "result.json").write_text(json.dumps(digest.plain(result)))

        return Imported(model, self.make(f"import-{digest.of(job)[:8]}", make), self.make)


@pytest.fixture(scope="session")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Imports:
    """Imports that all modules of all workers share."""
    return Imports(lambda name, make: shared(tmp_path_factory, name, make))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, for what is made from GGUF files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
