"""The frontend as a process of its own, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from iree.compiler import ir

from llmbuild.errors import InputError
from llmbuild.frontend import attention, huggingface
from llmbuild.frontend.__main__ import main
from llmbuild.frontend.importer import canonical, import_programs
from llmbuild.frontend.program import describe, import_model, settle
from llmbuild.frontend.tracing import export
from llmbuild.kernels.choose import KNOWN
from llmbuild.spec.program import ImportJob
from tests.frontend.conftest import ONE, TWO, Imports
from tests.support import tiny

AVX512 = next(unit for unit in KNOWN if unit.name == "avx512").kernels["int8"].features


@pytest.fixture(scope="module")
def model(imports: Imports) -> Path:
    return imports.model(**ONE)


def run_job(folder: Path, hash_seed: str = "0", **job: Any) -> tuple[int, dict[str, Any]]:
    """Run one job in a process and return its exit code and result."""
    file = folder / "job.json"
    file.write_text(json.dumps({"out": str(folder / "out"), **job}))
    done = subprocess.run(
        [sys.executable, "-m", "llmbuild.frontend", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "HF_HUB_OFFLINE": "1"},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads((folder / "out" / "result.json").read_text())


def test_same_job_gives_the_same_bytes_in_every_process(imports: Imports, tmp_path: Path) -> None:
    """A process of its own, whose sets are ordered otherwise, against one that has imported other models before."""
    model, choices = imports.model(**TWO), {"weight_format": "int8", "layout": "packed", "kernel": "own"}
    here = imports(model, choices, context=64, features=AVX512)
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    job = {"verb": "import", "model": str(model), "context": 64, "features": AVX512, "choices": choices}
    code, result = run_job(tmp_path, seed, **job)
    assert (code, result) == (0, here.result)
    for folder in (tmp_path / "out", here.folder):
        assert str(folder.parent).encode() not in (folder / "module.mlirbc").read_bytes()


def test_bad_job_is_one_message_and_exit_2(tmp_path: Path) -> None:
    code, result = run_job(tmp_path, verb="import", model="nobody/no-such-model", context=32)
    assert (code, list(result)) == (2, ["error"])
    assert result["error"].startswith("model 'nobody/no-such-model': neither a folder here nor to be had from the hub")


def job_here(folder: Path, **job: Any) -> tuple[int, dict[str, Any]]:
    """Run one job in this process and return its exit code and result."""
    (folder / "job.json").write_text(json.dumps({"out": str(folder / "out"), **job}))
    code = main([str(folder / "job.json")])
    return code, json.loads((folder / "out" / "result.json").read_text())


def test_reference_job_writes_what_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "windows.npy", np.array([[1, 2, 3, 4], [5, 6, 7, 8]]))
    windows = str(tmp_path / "windows.npy")
    done = job_here(tmp_path, verb="reference", model=str(model), windows=windows, prompt=[1, 2], count=5)
    assert done == (0, {"logits": "logits.npy", "greedy": "greedy.npy"})
    assert np.load(tmp_path / "out" / "logits.npy").shape == (2, 4, 323)
    assert np.load(tmp_path / "out" / "greedy.npy").shape == (5,)


def test_a_folder_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    done = job_here(tmp_path, verb="import", model=str(tmp_path / "nothing"), context=32)
    assert done == (2, {"error": f"{tmp_path / 'nothing'}: no such model folder"})


def refused(job: ImportJob, folder: Path) -> str:
    """Return why an import is refused."""
    with pytest.raises(InputError) as caught:
        import_model(job, folder)
    return str(caught.value)


def test_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refused(ImportJob(str(tmp_path), 32), tmp_path / "out")


def test_other_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    message = refused(ImportJob(str(tmp_path), 32), tmp_path / "out")
    assert "GPT2LMHeadModel is not supported" in message
    assert "LlamaForCausalLM" in message


def test_positions_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert "rope type dynamic" in refused(ImportJob(str(folder), 32), tmp_path / "out")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "weights are truncated or corrupt" in refused(ImportJob(str(folder), 32), tmp_path / "out")


def test_absent_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "no weights in this model folder" in refused(ImportJob(str(folder), 32), tmp_path / "out")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "weights do not fit config.json: missing tensors: model.layers.2.input_layernorm.weight" in refused(
        ImportJob(str(folder), 32), tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"context": 1}, "too short"),
        ({"context": 4096}, "longer than the 256 positions"),
        ({"choices": (("weights", "f32"),)}, "no model-level knob 'weights'"),
        ({"choices": (("weight_format", "int3"),)}, "weight_format cannot be 'int3'"),
        ({"choices": (("kernel", "own"),)}, "reads weights in layout=packed"),
        ({"choices": (("kv_dtype", "int4"),)}, "kv_dtype=int4 is read by kernel=own on CPUs alone"),
        ({"choices": (("kv_dtype", "k8v4"), ("kernel", "own")), "subgroup": 32}, "kv_dtype=k8v4 is read by kernel=own"),
        ({"choices": (("kernel", "own"), ("layout", "packed"))}, "found f32"),
        ({"choices": (("kernel", "own"), ("layout", "packed"), ("weight_format", "int4a_g32"))}, "found int4a_g32"),
        (
            {
                "choices": (
                    ("kernel", "own"),
                    ("layout", "packed"),
                    ("weight_format", "int4_g32"),
                    ("mixed", "sensitive"),
                )
            },
            "choose mixed=none",
        ),
        (
            {"choices": (("kernel", "own"), ("weight_format", "f16"), ("layout", "packed")), "features": ("avx2",)},
            "avx512f avx512bw avx512vl or avx2 fma f16c or dotprod for f16; found avx2",
        ),
        (
            {"choices": (("kernel", "own"), ("weight_format", "int8"), ("layout", "packed")), "features": ("sse4.2",)},
            "or i8mm or dotprod for int8; found none of these",
        ),
    ],
)
def test_bad_choice_is_refused_with_its_reason(model: Path, tmp_path: Path, job: dict[str, Any], reason: str) -> None:
    assert reason in refused(ImportJob(**{"model": str(model), "context": 32, **job}), tmp_path)


def test_second_importer_sees_the_same_operations(model: Path) -> None:
    from torch_mlir.extras.fx_importer import FxImporter
    from torch_mlir import ir as other_ir  # isort: skip

    job = ImportJob(str(model), 32)
    attention.register()
    loaded = huggingface.load(str(model), False, 0, attention.NAME)
    programs = export(loaded, describe(loaded, job, settle(job)))
    ours, _ = import_programs(programs, canonical(loaded), 1)
    theirs = FxImporter(context=_torch_context(other_ir))
    for name, program in programs.items():
        theirs.import_program(program, func_name=name)
    assert _operations(ours.operation, ir) == _operations(theirs.module.operation, other_ir)


def _torch_context(other_ir: Any) -> Any:
    from torch_mlir.dialects import torch as torch_dialect

    context = other_ir.Context()
    torch_dialect.register_dialect(context)
    return context


def _operations(root: Any, dialects: Any) -> dict[str, int]:
    counts: dict[str, int] = {}

    def visit(operation: Any) -> Any:
        if operation.name.startswith("torch.aten"):
            counts[operation.name] = counts.get(operation.name, 0) + 1
        return dialects.WalkResult.ADVANCE

    root.walk(visit)
    assert counts, "nothing was imported"
    return counts


def test_export_leaves_torch_as_it_was() -> None:
    assert torch.get_default_dtype() == torch.float32
