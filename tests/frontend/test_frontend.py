"""Imports of tiny models, compiled with IREE and held against PyTorch on the same weights."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmbuild.frontend import importer, nibbles
from llmbuild.frontend.reference import reference_greedy
from llmbuild.kernels.choose import KNOWN
from tests.frontend.conftest import AVX2, ONE, TWO, Imported, Imports
from tests.support.artifact import compile_file, relative_error
from tests.support.eager import reference

CONTEXT = 64
PROMPT = [7, 300, 12, 99, 5, 41]
OWN = {"weight_format": "int8", "layout": "packed", "kernel": "own"}
SCALED = {**OWN, "scaling": "activation"}
"""As in `test_scaling`, which reads the same artifact."""

HOST = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
FEATURES = next(unit for unit in KNOWN if unit.name == "avx512").kernels["int8"].features
needs_vnni = pytest.mark.skipif("avx512_vnni" not in HOST, reason="this CPU has no AVX-512 VNNI")


@pytest.fixture(scope="module")
def model(imports: Imports) -> Path:
    return imports.model(**TWO)


@pytest.fixture(scope="module")
def build(imports: Imports, model: Path) -> Callable[..., Imported]:
    return lambda **choices: imports(model, choices, context=CONTEXT, features=FEATURES)


@pytest.mark.parametrize("level", [pytest.param("O0", marks=pytest.mark.exhaustive), "O2"])
def test_greedy_tokens_equal_the_library(build: Callable[..., Imported], model: Path, level: str) -> None:
    expected = reference_greedy(str(model), False, 0, np.array(PROMPT), 32)
    assert build().at(level).greedy(PROMPT, 32) == expected.tolist()


def test_logits_equal_the_library(build: Callable[..., Imported], model: Path) -> None:
    tokens = [*PROMPT, 17, 200, 3]
    expected = reference(model, np.array([tokens]))[0]
    actual = build().at("O2").forced(tokens[: len(PROMPT)], tokens[len(PROMPT) :])
    assert relative_error(actual, expected[len(PROMPT) - 1 :]) < 1e-5


@pytest.mark.parametrize(
    ("shape", "choices"),
    [
        (TWO, {}),
        (ONE, {"weight_format": "f16", "head_format": "bf16", "layout": "packed", "kv_dtype": "f16"}),
        pytest.param(TWO, OWN, marks=needs_vnni),
        pytest.param(ONE, {**OWN, "weight_format": "bf16", "head_format": "f16"}, marks=needs_vnni),
        pytest.param(ONE, {**OWN, "kv_dtype": "f16", "work_groups": "4"}, marks=needs_vnni),
        pytest.param(TWO, {**OWN, "head_format": "int6_g32", "activations": "int16"}, marks=needs_vnni),
    ],
    ids=["default", "halves", "own", "own-halves", "own-half-cache", "own-two-bytes"],
)
def test_artifact_agrees_with_its_check_data(imports: Imports, shape: dict[str, Any], choices: dict[str, str]) -> None:
    """The other formats are in `test_formats`, `test_shapes`, `test_scaling` and `test_batch`, as pairs."""
    made = imports(imports.model(**shape), choices, context=CONTEXT, features=FEATURES)
    actual, expected, noise = made.checked(made.at("O2"))
    assert expected.shape == (9, 1, shape.get("vocab_size", 320))
    half = choices.get("kv_dtype") == "f16"
    assert relative_error(actual, expected) < max(1e-5, 10 * noise, 1e-3 if half else 0.0)


@pytest.mark.skipif("avx512_bf16" not in HOST, reason="this CPU has no AVX-512 BF16")
def test_activations_are_rounded_to_bf16_where_the_cpu_multiplies_pairs_of_them(imports: Imports) -> None:
    choices = {**OWN, "weight_format": "f12_e4m7", "head_format": "bf16"}
    made = imports(imports.model(**ONE), choices, context=CONTEXT, features=(*FEATURES, "avx512bf16"))
    loaded = made.at("O2")
    assert "avx512bf16" in loaded.abi["required_features"]
    actual, expected, _ = made.checked(loaded)
    errors = [relative_error(row, wanted) for row, wanted in zip(actual, expected, strict=True)]
    assert min(errors) < 1e-6  # rounded alike
    assert max(errors) < 1e-2  # a rounding that falls the other way is kept in the cache


@needs_vnni
def test_own_kernels_agree_on_one_thread(build: Callable[..., Imported]) -> None:
    built = build(**OWN)
    one, two = (built.at("O2", driver).forced(PROMPT, [1, 2, 3]) for driver in ("local-sync", "local-task"))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("choices", [{}, pytest.param(OWN, marks=needs_vnni)], ids=["compiler", "own"])
def test_prompt_in_parts_equals_the_prompt_at_once(build: Callable[..., Imported], choices: dict[str, str]) -> None:
    loaded = build(**choices).at("O2")
    _, whole = loaded.prefill(PROMPT)
    loaded.prefill(PROMPT[:1])
    _, parts = loaded.prefill(PROMPT[1:], start=1)
    assert relative_error(parts, whole) < 1e-5


@pytest.mark.parametrize("choices", [{}, pytest.param(OWN, marks=needs_vnni)], ids=["compiler", "own"])
def test_context_can_be_filled_to_its_last_position(build: Callable[..., Imported], choices: dict[str, str]) -> None:
    loaded = build(**choices).at("O2")
    tokens = [(5 * i) % 320 for i in range(CONTEXT)]
    _, whole = loaded.prefill(tokens)
    loaded.prefill(tokens[:-1])
    _, last = loaded.decode(tokens[-1], CONTEXT - 1)
    assert relative_error(last, whole) < 1e-5


@pytest.mark.parametrize("choices", [{}, pytest.param(OWN, marks=needs_vnni)], ids=["compiler", "own"])
def test_cache_is_written_in_place_and_nowhere_else(build: Callable[..., Imported], choices: dict[str, str]) -> None:
    loaded = build(**choices).at("O2")
    loaded.prefill(PROMPT)
    loaded.decode(1, len(PROMPT))
    for buffer in loaded.kv:
        written = np.abs(buffer.to_host()).sum(axis=(1, 2)) > 0
        assert written.tolist() == [i <= len(PROMPT) for i in range(CONTEXT)]


@pytest.mark.parametrize("choices", [{}, pytest.param(OWN, marks=needs_vnni)], ids=["compiler", "own"])
def test_cache_is_never_copied(build: Callable[..., Imported], choices: dict[str, str], tmp_path: Path) -> None:
    source = build(**choices).folder / "module.mlirbc"
    text = compile_file(source, tmp_path / "stream.mlir", "--iree-opt-level=O2", "--compile-to=stream").read_text()
    bytes_per_buffer = CONTEXT * 2 * 32 * 4
    assert "stream.cmd.execute" in text
    assert [line for line in text.splitlines() if "stream.cmd.copy" in line and f"%c{bytes_per_buffer}" in line] == []


def test_positions_stretched_as_in_llama_3_equal_the_library(
    build: Callable[..., Imported], model: Path, imports: Imports
) -> None:
    tokens = np.array([[*PROMPT, *range(40)]])
    expected, other = (reference(folder, tokens)[0][-1:] for folder in (model, imports.model()))
    actual = build().at("O2").forced(tokens[0], [])
    assert relative_error(actual, expected) < 1e-5 < relative_error(other, expected)


def test_tied_weights_are_stored_once(build: Callable[..., Imported]) -> None:
    stored = (build().folder / "parameters.irpa").stat().st_size
    assert stored < 4 * 287360 + 8192


def test_random_init_depends_on_the_seed_alone(model: Path) -> None:
    window = np.array([[1, 2, 3]])
    one, same, other = (reference(model, window, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")
def test_own_kernels_run_without_avx512(imports: Imports) -> None:
    made = imports(imports.model(**ONE), SCALED, features=AVX2)
    loaded = made.at("O2", cpu="x86-64-v3")
    assert loaded.abi["required_features"] == list(AVX2)
    actual, expected, noise = made.checked(loaded)
    assert relative_error(actual, expected) < max(1e-5, 10 * noise)
    if objdump := shutil.which("objdump"):
        (code,) = (made.compiled("O2", "x86-64-v3") / "code").glob("*.so")
        listed = subprocess.run([objdump, "-d", str(code)], capture_output=True, text=True, check=True).stdout
        assert "vpmaddubsw" in listed
        assert re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|[23]\d)|vpdpbusd", listed) is None


class Pick(torch.nn.Module):
    def forward(self, data: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return nibbles.picked(data, place)


def test_codes_far_into_a_table_are_found(tmp_path: Path) -> None:
    """The compiler divides integers in f32, which cannot tell neighbours beyond 2^24 apart."""
    import iree.runtime as rt

    far = (1 << 24) + 16
    data = torch.arange(far // 2, dtype=torch.int64).remainder(251).to(torch.int8)
    places = torch.arange(far - 8, far)
    module, _ = importer.import_programs({"pick": torch.export.export(Pick(), (data, places))}, {}, 0)
    importer.save_module(module, tmp_path / "pick.mlirbc")
    artifact = compile_file(tmp_path / "pick.mlirbc", tmp_path / "pick.vmfb")
    loaded = rt.load_vm_module(rt.VmModule.mmap(rt.VmInstance(), str(artifact)), rt.Config("local-sync"))
    actual = loaded.pick(data.numpy(), places.numpy()).to_host()
    assert Pick()(data, places).tolist() == actual.tolist()
