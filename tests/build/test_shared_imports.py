"""Imports of a build: what they share is made once, interrupted ones go on, and what is refused leaves nothing."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from llmbuild.build import imports as build_imports
from llmbuild.build.imports import Imports
from llmbuild.catalog.writer import IMPORTS, Catalog
from llmbuild.errors import InputError
from llmbuild.frontend import program as frontend
from llmbuild.frontend import writing
from llmbuild.frontend.__main__ import main
from llmbuild.frontend.check import Check
from llmbuild.frontend.source import find_model
from llmbuild.profiler.calibration import Chats, Parts
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import ModelSource
from llmbuild.spec.space import Knob, Point, Space
from llmbuild.spec.variant import Failure
from tests.support import folders, quick
from tests.support.artifact import archived

DOMAINS = {
    "weight_format": ("f32", "int8", "int4_g32"),
    "quantization": ("rtn", "gptq"),
    "scaling": ("none", "activation"),
    "mixed": ("none", "sensitive"),
    "layout": ("row_major", "packed"),
    "kernel": ("compiler", "own"),
    "kv_dtype": ("f32", "f16"),
}
SPACE = Space(tuple(Knob(name, "model", domain, domain[0], name) for name, domain in DOMAINS.items()))
DEFAULTS = {name: domain[0] for name, domain in DOMAINS.items()}
LAYERS = 3


class ImportedJob(quick.QuickJob):
    """A job the parts of whose calibration are given."""

    parts: Parts

    @property
    def calibration(self) -> Parts:  # type: ignore[override]
        """The parts of the calibration's texts."""
        return self.parts


def job_of(folder: Path, source: ModelSource, tokens: NDArray[np.int64] | None = None) -> ImportedJob:
    """Return the job of a model; `tokens` i64[W,L] are those of the calibration."""
    base = quick.job_of(quick.Asked(), folder)
    recipe = replace(base.recipe, model=source)
    job = ImportedJob(
        **{
            **vars(base),
            "recipe": recipe,
            "space": SPACE,
            "declared": SPACE,
            "model": find_model(source, recipe.context),
        }
    )
    drawn = np.random.default_rng(0).integers(0, 64, (3, 24))
    object.__setattr__(job, "parts", Parts((drawn if tokens is None else tokens,)))
    return job


@dataclass
class Frontend:
    """The frontend in this process, and what it was asked."""

    asked: list[dict[str, Any]] = field(default_factory=list)

    def run(self, name: str, arguments: Sequence[str], stage: str, limits: object, output: Path) -> Failure | None:
        """Do what a process of its own would."""
        assert (name, stage) == ("llmbuild.frontend", "import")
        self.asked.append(json.loads(Path(arguments[0]).read_text()))
        try:
            with pytest.MonkeyPatch.context() as own:
                own.setattr(tempfile, "tempdir", None)  # a job's process has its own
                main(list(arguments))
        except InterruptedError:
            return Failure("import", "killed", "", "", lasting=False)
        return None if output.is_file() else Failure("import", "nothing was written", "", "", lasting=True)

    def told(self) -> list[str]:
        """Return that there is nothing to tell."""
        return []

    def verbs(self) -> list[tuple[str, bool]]:
        """Return the verbs since the last call, and whether each was given a module."""
        found = [(each["verb"], "module" in each) for each in self.asked]
        self.asked.clear()
        return found


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Frontend:
    found = Frontend()
    monkeypatch.setattr(build_imports, "FRONTEND", found)
    return found


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog")
    yield opened
    opened.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "model", num_hidden_layers=LAYERS, tie_word_embeddings=False)


def source(folder: Path, **more: Any) -> ModelSource:
    return ModelSource("huggingface", str(folder), **more)


def imports_of(job: ImportedJob, catalog: Catalog) -> Imports:
    return Imports(job, catalog, lambda _: False)


def made(imports: Imports, **choices: str) -> Program:
    found = imports.program(Point.of({**DEFAULTS, **choices}))
    assert isinstance(found, Program), found
    return found


def under_way(catalog: Catalog) -> list[str]:
    return [path.name for path in (catalog.folder / IMPORTS).iterdir()]


def test_imports_of_a_model_share_what_the_library_says_and_what_their_formats_have_in_common(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend
) -> None:
    imports = imports_of(job_of(tmp_path, source(model)), catalog)
    nearest = made(imports, weight_format="int8")
    assert spied.verbs() == [("truth", False), ("import", False)]
    fitted = made(imports, weight_format="int8", quantization="gptq")
    assert spied.verbs() == [("import", True)]
    assert nearest.module == fitted.module
    assert (nearest.parameters != fitted.parameters, nearest.abi == fitted.abi) == (True, True)
    other = made(imports, weight_format="f32")
    assert spied.verbs() == [("import", False)]
    assert other.module != nearest.module
    assert made(imports, weight_format="int8") == nearest
    assert (spied.verbs(), under_way(catalog)) == ([], [])


def test_chats_to_calibrate_on_are_written_once(model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend) -> None:
    job, asked = job_of(tmp_path, source(model)), Chats(((1, 2), (3,)), windows=2, length=24)
    object.__setattr__(job, "parts", Parts((np.full((1, 24), 7), asked)))
    tokens, again = (imports_of(job, catalog).calibration() for _ in range(2))
    assert not isinstance(tokens, Failure) and not isinstance(again, Failure)
    assert [verb for verb, _ in spied.verbs()] == ["chats"]
    assert (tokens.shape, tokens[:, 0].tolist(), again.tolist()) == ((3, 24), [1, 7, 3], tokens.tolist())


def test_another_build_and_a_model_with_other_weights_use_the_structure_too(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend
) -> None:
    first = made(imports_of(job_of(tmp_path, source(model)), catalog), weight_format="int8")
    twin = folders.write(tmp_path / "twin", seed=1, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    spied.verbs()
    second = made(imports_of(job_of(tmp_path, source(twin)), catalog), weight_format="int8")
    assert spied.verbs() == [("truth", False), ("import", True)]
    assert (second.module, second.parameters != first.parameters) == (first.module, True)
    (tmp_path / "again").mkdir()
    again = Catalog(tmp_path / "again" / "catalog")
    assert made(imports_of(job_of(tmp_path, source(twin)), again), weight_format="int8") == second
    assert spied.verbs() == [("truth", False), ("import", False)]
    again.close()


@pytest.mark.exhaustive
def test_another_shape_another_context_and_a_lost_module_are_traced(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend
) -> None:
    job = job_of(tmp_path, source(model))
    first = made(imports_of(job, catalog))
    other = folders.write(tmp_path / "other", num_hidden_layers=LAYERS - 1, tie_word_embeddings=False)
    spied.verbs()
    made(imports_of(job_of(tmp_path, source(other)), catalog))
    assert spied.verbs() == [("truth", False), ("import", False)]
    path = catalog.blobs.path(first.module)
    path.chmod(0o600)
    path.unlink()
    assert made(imports_of(job, catalog)) == first
    assert spied.verbs() == [("import", False)]


@pytest.mark.exhaustive
def test_random_weights_have_no_score_and_give_their_structure_to_no_model_that_has(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend
) -> None:
    drawn = made(imports_of(job_of(tmp_path, source(model, random_init=True)), catalog))
    spied.verbs()
    scored = made(imports_of(job_of(tmp_path, source(model)), catalog))
    assert (drawn.abi.score, scored.abi.score) == (False, True)
    has = [b"score" in catalog.blobs.path(each.module).read_bytes() for each in (drawn, scored)]
    assert (has, spied.verbs()) == ([False, True], [("truth", False), ("import", False)])


@pytest.mark.exhaustive
def test_layers_that_a_text_finds_sensitive_are_part_of_the_structure(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend
) -> None:
    choices, programs = {"weight_format": "int4_g32", "mixed": "sensitive"}, []
    for seed in (0, 1):
        tokens = np.random.default_rng(seed).integers(0, 64, (1, 4))
        programs.append(made(imports_of(job_of(tmp_path, source(model), tokens), catalog), **choices))
        archive = tmp_path / f"{seed}.irpa"
        archive.symlink_to(catalog.blobs.path(programs[-1].parameters))
        held = {name: len(data) for name, data in archived(archive).items()}
        assert named(catalog.blobs.path(programs[-1].module)) == held, "what the module names is what the archive has"
    assert spied.verbs() == [("truth", False), ("import", False), ("import", False)]
    one, other = (named(catalog.blobs.path(program.module)) for program in programs)
    assert one.keys() == other.keys()
    assert one != other, "else both texts find the same layers sensitive, and the test says nothing"


def named(module: Path) -> dict[str, int]:
    """Return the sizes in bytes of the parameters that a module names."""
    from iree.compiler import ir

    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        text = str(ir.Module.parse(module.read_bytes()))
    found = re.findall(r'parameter\.named<"model"::"([^"]+)"> : tensor<((?:\d+x)+)(?:i|f|bf)(\d+)>', text)
    return {name: prod(map(int, shape.split("x")[:-1])) * int(bits) // 8 for name, shape, bits in found}


@pytest.mark.exhaustive
def test_an_import_of_tokens_by_another_seed_has_what_the_library_says_on_these(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend
) -> None:
    made(imports_of(job_of(tmp_path, source(model)), catalog), weight_format="int8")
    spied.verbs()
    other = made(imports_of(job_of(tmp_path, source(model, seed=5)), catalog))
    assert [verb for verb, _ in spied.verbs()] == ["truth", "import"]
    with np.load(catalog.blobs.path(other.check)) as check:
        from tests.support.eager import reference

        text = np.concatenate([check["prompt"], check["forced"]], axis=1)
        expected = reference(model, text)[0, check["prompt"].shape[1] - 1 :]
        np.testing.assert_allclose(check["logits"][:, 0], expected, rtol=1e-4, atol=1e-5)


# --- interruptions -----------------------------------------------------------------------------------------------


def test_an_interrupted_import_goes_on_in_the_next_build_and_says_so(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SAVE_S", 0.0)
    job, real = job_of(tmp_path, source(model)), Check.layer

    def killed(self: Check, index: int, weights: Any) -> None:
        if index == LAYERS - 1:
            raise InterruptedError
        real(self, index, weights)

    point = Point.of({**DEFAULTS, "weight_format": "int8"})
    with monkeypatch.context() as patched:
        patched.setattr(Check, "layer", killed)
        first = imports_of(job, catalog)
        found = first.program(point)
        assert isinstance(found, Failure) and not found.lasting
    (left,) = under_way(catalog)
    assert (catalog.folder / IMPORTS / left / "parameters.irpa").is_file()
    second = imports_of(job, catalog)
    resumed = second.program(point)
    assert second.told() == ["an import went on that was interrupted: 2 of 3 layers were there"]
    assert (second.told(), first.told(), under_way(catalog)) == ([], [], [])
    fresh = Catalog(tmp_path / "fresh")
    assert imports_of(job, fresh).program(point) == resumed
    fresh.close()


def test_a_refused_choice_leaves_no_folder_behind(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend
) -> None:
    found = imports_of(job_of(tmp_path, source(model)), catalog).program(Point.of({**DEFAULTS, "kernel": "own"}))
    assert isinstance(found, Failure)
    assert (found.lasting, "layout=packed" in found.reason, under_way(catalog)) == (True, True, [])


@pytest.mark.parametrize("name", ["model.layers.2.mlp.gate_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name_and_leave_no_folder_behind(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend, name: str
) -> None:
    weights = load_file(model / "model.safetensors")
    weights[name].reshape(-1)[3] = np.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{name} has 1 values that are NaN or infinite"):
        made(imports_of(job_of(tmp_path, source(model)), catalog), weight_format="int8")
    assert not (catalog.folder / IMPORTS).exists() or under_way(catalog) == []


@pytest.mark.exhaustive
def test_weights_that_become_no_numbers_behind_the_truth_are_refused_and_leave_no_folder(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend
) -> None:
    """The truth of a model is known, then a file is changed under the import: its stream says so by itself."""
    job = job_of(tmp_path, source(model))
    made(imports_of(job, catalog))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][5, 5] = np.inf
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    spied.verbs()
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.down_proj\.weight has 1 values"):
        made(imports_of(job, catalog), weight_format="int8")
    assert (spied.verbs(), under_way(catalog)) == ([("import", False)], [])


def test_the_printed_command_of_a_failure_runs_without_the_build(
    model: Path, tmp_path: Path, catalog: Catalog, spied: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Mapping[str, str]:
        raise InterruptedError

    monkeypatch.setattr(frontend, "apply", broken)
    found = imports_of(job_of(tmp_path, source(model)), catalog).program(Point.of(DEFAULTS))
    assert isinstance(found, Failure)
    monkeypatch.undo()
    told = json.loads(found.command.partition("echo ")[2].partition(" > ")[0].strip("'"))
    for name in ("truth",):
        assert Path(told[name]).is_file(), "what it names lies in the store"
    (tmp_path / "job.json").write_text(json.dumps({**told, "out": str(tmp_path / "out")}))
    monkeypatch.setattr(tempfile, "tempdir", None)  # which a job sets for its process, and this one is to get back
    assert main([str(tmp_path / "job.json")]) == 0
