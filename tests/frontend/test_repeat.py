"""Layers that are traced once and repeated: the module is the one of all layers traced, and it computes the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from iree.compiler.passmanager import PassManager

from llmbuild.frontend import attention, huggingface, repeat
from llmbuild.frontend.cache import new_cache
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.importer import canonical, import_programs
from llmbuild.frontend.program import apply, describe, settle, stored_formats
from llmbuild.frontend.tracing import entries, export
from llmbuild.profiler.worker import Worker
from llmbuild.runtime.session import Session, Settings
from llmbuild.spec.program import MODULE_FILE, PARAMETERS_FILE, ImportJob, abi_from
from tests.frontend.conftest import AVX2, Imported, Imports
from tests.support import folders
from tests.support.artifact import archived
from tests.support.sweeps import sweep

CONTEXT = 32
SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 99, "num_attention_heads": 2, "head_dim": 32}
BATCHED = {"weight_format": "int4_g32", "kv_dtype": "int8"}
PACKED = {"weight_format": "int8", "head_format": "f16", "layout": "packed", "kv_dtype": "f16"}


@dataclass(frozen=True)
class Case:
    """A model, and what its import is asked for."""

    layers: int
    choices: dict[str, str]
    batch: int = 1
    kind: str = "llama"
    shape: tuple[tuple[str, Any], ...] = ()


CASES = {
    "f32": Case(4, {}),
    "int4-batch": Case(3, BATCHED, 2, "qwen2"),
    "packed": Case(3, PACKED, 1, "qwen3", (("tie_word_embeddings", False),)),
    "three": Case(3, {"kv_dtype": "f16"}, 3, "llama", (("attention_bias", True), ("mlp_bias", True))),
}


def imported(folder: Path, case: Case, whole: bool, kept: dict[str, str] | None = None) -> tuple[Any, dict[str, int]]:
    """Return the module of a model folder and its tensors' sizes, traced whole or as an import does it."""
    attention.register()
    job = ImportJob(str(folder), CONTEXT, case.batch, choices=tuple(case.choices.items()))
    choices = settle(job)
    skeleton = huggingface.source_of(str(folder), False, 0).skeleton(attention.NAME)
    abi = describe(skeleton.model, job, choices)
    with skeleton.mode:
        apply(skeleton.model, job, choices, Formats(*stored_formats(choices), kept or {}))
        make = (lambda m, a: entries(m, a, new_cache(a.kv))) if whole else export
        programs = make(skeleton.model, abi)
    return import_programs(programs, canonical(skeleton.model), case.layers)


def simplified(module: Any) -> tuple[list[str], list[str]]:
    """Return a module's globals in the order of their names, and its functions without what is there twice."""
    with module.context:
        PassManager.parse("builtin.module(func.func(canonicalize,cse))").run(module.operation)
    lines = str(module).splitlines()
    declared = [line for line in lines if "util.global private" in line]
    return sorted(declared), [line for line in lines if line not in declared]


@pytest.mark.parametrize("name", sweep(CASES, ("packed",)))
def test_a_module_of_repeated_layers_is_that_of_all_layers_traced(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    shape = {"num_hidden_layers": case.layers, **dict(case.shape)}
    folder = folders.write(tmp_path / "model", case.kind, **shape)
    (ours, sizes), (whole, whole_sizes) = (imported(folder, case, each) for each in (False, True))
    assert sizes == whole_sizes
    declared, functions = simplified(ours)
    assert (declared, functions) == simplified(whole)
    names = {line.split('"')[-2] for line in declared}
    assert names == {*sizes}
    assert {number for number in range(9) if any(f"layers.{number}." in name for name in names)} == {
        *range(case.layers)
    }
    text = "\n".join(functions)
    assert repeat._MARK not in text
    assert text.count("func.func @") == (3 if case.batch == 1 else 2)


@pytest.mark.exhaustive
def test_layers_that_store_different_things_are_traced_one_by_one(tmp_path: Path) -> None:
    folder, case = folders.write(tmp_path / "model", num_hidden_layers=3), Case(3, {"weight_format": "int4_g32"})
    kept = "model.layers.2.mlp.down_proj"
    (ours, sizes), (_, alike) = (imported(folder, case, False, each) for each in ({kept: "int8"}, None))
    changed = {name for name in {*sizes, *alike} if sizes.get(name) != alike.get(name)}
    assert changed == {f"{kept}.matrix.data"}  # rows of this width have one scale in both formats
    assert simplified(ours) == simplified(imported(folder, case, True, {kept: "int8"})[0])


def test_a_decoder_is_whole_again_after_the_trace(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "model", num_hidden_layers=4)
    built = huggingface.source_of(str(folder), False, 0).skeleton(attention.NAME).model
    before = list(built.model.layers)

    def traced() -> None:
        with repeat.shortened(built.model) as count:
            assert (count, len(built.model.layers)) == (4, repeat.TRACED)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        traced()
    assert list(built.model.layers) == before
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in before)


COMPILED = {
    "f32": (Case(4, {}), 1e-5),
    "int4-batch": (Case(3, BATCHED, 2), 1e-2),  # a code of the cache may round the other way
    "packed": (Case(3, PACKED, 1, "Qwen3"), 1e-3),
}


@pytest.mark.parametrize("name", sweep(COMPILED, ("packed",)))
def test_compiled_repeated_layers_agree_with_the_check_data(imports: Imports, name: str) -> None:
    case, limit = COMPILED[name]
    kind = "Qwen3" if case.kind == "Qwen3" else "Llama"
    model = imports.model(kind, **SMALL, num_hidden_layers=case.layers)
    made = imports(model, case.choices, context=CONTEXT, batch=case.batch)
    abi, worker = abi_from(json.loads((made.folder / "abi.json").read_text())), Worker()
    assert len(abi.kv) % case.layers == 0
    worker._session = Session(made.compiled() / "m.vmfb", made.folder / PARAMETERS_FILE, abi, Settings("local-task", 2))
    found = worker.check({"data": str(made.folder / "check.npz")})
    assert found["error"] < max(limit, 10 * found["noise"])
    assert found["top1"] == 1.0
    with np.load(made.folder / "check.npz") as check:
        assert check["logits"].shape == (9, case.batch, 99)


# --- what a module depends on -------------------------------------------------------------------------------------


def module(made: Imported) -> bytes:
    return (made.folder / MODULE_FILE).read_bytes()


def parameters(made: Imported) -> dict[str, bytes]:
    return archived(made.folder / PARAMETERS_FILE)


ROUNDED = {
    "compiler": {"weight_format": "int4_g32", "head_format": "int8"},
    "own": {"weight_format": "int8", "layout": "packed", "kernel": "own", "scaling": "activation"},
}
THREE = {**SMALL, "num_hidden_layers": 3, "vocab_size": 320}  # as many as the calibration tokens are of


@pytest.mark.parametrize(
    "kernel",
    sweep(ROUNDED, ("own",)),
)
def test_a_module_does_not_depend_on_weights_and_how_they_are_rounded(imports: Imports, kernel: str) -> None:
    choices = ROUNDED[kernel]
    one, other = (imports.model(**THREE, seed=seed) for seed in (0, 1))
    nearest, foreign, fitted = (
        imports(model, {**choices, **more}, context=CONTEXT, features=AVX2 if "kernel" in choices else ())
        for model, more in ((one, {}), (other, {}), (one, {"quantization": "gptq"}))
    )
    assert module(nearest) == module(foreign) == module(fitted)
    sizes = [{name: len(data) for name, data in parameters(made).items()} for made in (nearest, foreign, fitted)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert parameters(nearest) != parameters(foreign)
    assert parameters(nearest) != parameters(fitted)


def test_a_module_and_a_truth_that_are_given_are_used_and_give_the_same_import(
    imports: Imports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmbuild.frontend import program, tracing

    model, choices = imports.model(**THREE), {"weight_format": "int4_g32", "head_format": "int8"}
    made, job = imports(model, choices, context=CONTEXT), imports.job(model, choices, context=CONTEXT)
    program.ask(job, tmp_path / "truth")

    def never(*_: object) -> None:
        raise AssertionError("this was there")

    monkeypatch.setattr(tracing, "export", never)
    monkeypatch.setattr(program, "truth", never)
    known = {"module": made.folder / MODULE_FILE, "sizes": made.folder / "sizes.json"}
    known |= {"truth": tmp_path / "truth" / "truth.npz"}
    given = replace(job, **{name: str(path) for name, path in known.items()})
    again = program.import_model(given, tmp_path / "again")
    assert json.loads(json.dumps(made.result["program"])) == {
        **made.result["program"],
        "module": again.program.module,
        "parameters": again.program.parameters,
        "check": again.program.check,
    }
