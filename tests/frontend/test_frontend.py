"""Imports of tiny models, compiled with IREE and held against PyTorch on the same weights."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from llmbuild.frontend import importer, nibbles
from llmbuild.frontend.program import import_model
from llmbuild.frontend.reference import reference_greedy, reference_logits
from llmbuild.kernels.choose import KNOWN
from llmbuild.spec.program import ImportJob
from tests.support import tiny
from tests.support.artifact import Loaded, compile_file, relative_error

CONTEXT = 64
PROMPT = [7, 300, 12, 99, 5, 41]
OWN = {"weight_format": "int8", "layout": "packed", "kernel": "own"}

HOST = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
FEATURES = next(unit for unit in KNOWN if unit.name == "avx512").kernels["int8"].features
needs_vnni = pytest.mark.skipif("avx512_vnni" not in HOST, reason="this CPU has no AVX-512 VNNI")


@dataclass(frozen=True)
class Built:
    """An imported program; `at` compiles it at an optimization level and loads it."""

    folder: Path

    def at(self, level: str, driver: str = "local-task") -> Loaded:
        artifact = self.folder / f"{level}.vmfb"
        if not artifact.exists():
            compile_file(self.folder / "module.mlirbc", artifact, f"--iree-opt-level={level}")
        return Loaded(self.folder, artifact, driver)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def build(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    done: dict[tuple[tuple[str, str], ...], Built] = {}

    def get(**choices: str) -> Built:
        key = tuple(sorted(choices.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("import")
            import_model(ImportJob(str(model), CONTEXT, choices=key, features=FEATURES), folder)
            done[key] = Built(folder)
        return done[key]

    return get


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_greedy_tokens_equal_the_library(build: Callable[..., Built], model: Path, level: str) -> None:
    expected = reference_greedy(str(model), False, 0, np.array(PROMPT), 32)
    assert build().at(level).greedy(PROMPT, 32) == expected.tolist()


def test_logits_equal_the_library(build: Callable[..., Built], model: Path) -> None:
    tokens = [*PROMPT, 17, 200, 3]
    expected = reference_logits(str(model), False, 0, np.array([tokens]))[0]
    actual = build().at("O2").forced(tokens[: len(PROMPT)], tokens[len(PROMPT) :])
    assert relative_error(actual, expected[len(PROMPT) - 1 :]) < 1e-5


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"weight_format": "f16", "kv_dtype": "f16"},
        {"weight_format": "int8"},
        {"weight_format": "int8", "layout": "packed", "kv_dtype": "f16"},
        pytest.param(OWN, marks=needs_vnni),
        pytest.param({**OWN, "kv_dtype": "f16", "work_groups": "4"}, marks=needs_vnni),
        pytest.param({**OWN, "weight_format": "int4_g64", "head_format": "int8"}, marks=needs_vnni),
        pytest.param({**OWN, "weight_format": "int7_g64", "head_format": "f12_e4m7"}, marks=needs_vnni),
        pytest.param({**OWN, "weight_format": "f12_e4m7", "head_format": "int7_g32"}, marks=needs_vnni),
        pytest.param({**OWN, "weight_format": "bf16", "head_format": "f16"}, marks=needs_vnni),
    ],
    ids=lambda choices: "-".join(choices.values()) or "default",
)
def test_artifact_agrees_with_its_check_data(build: Callable[..., Built], choices: dict[str, str]) -> None:
    built = build(**choices)
    with np.load(built.folder / "check.npz") as check:
        prompt, forced, expected, noise = (check[name] for name in ("prompt", "forced", "logits", "noise"))
    assert expected.shape == (1 + forced.shape[1], 1, 320)
    actual = built.at("O2").forced(prompt[0], forced[0])[:, None]
    half = choices.get("kv_dtype") == "f16"
    assert relative_error(actual, expected) < max(1e-5, 10 * float(noise), 1e-3 if half else 0.0)


@pytest.mark.skipif("avx512_bf16" not in HOST, reason="this CPU has no AVX-512 BF16")
@pytest.mark.parametrize("form", ["bf16", "f12_e4m7"])
def test_activations_are_rounded_to_bf16_where_the_cpu_multiplies_pairs_of_them(
    model: Path, tmp_path: Path, form: str
) -> None:
    choices = tuple({**OWN, "weight_format": form}.items())
    features = (*FEATURES, "avx512bf16")
    result = import_model(ImportJob(str(model), CONTEXT, choices=choices, features=features), tmp_path)
    assert "avx512bf16" in result.program.abi.required_features
    with np.load(tmp_path / "check.npz") as check:
        actual = Built(tmp_path).at("O2").forced(check["prompt"][0], check["forced"][0])[:, None]
        errors = [relative_error(row, expected) for row, expected in zip(actual, check["logits"], strict=True)]
        assert min(errors) < 1e-6  # rounded alike
        assert max(errors) < 1e-2  # a rounding that falls the other way is kept in the cache


@needs_vnni
def test_own_kernels_agree_on_one_thread(build: Callable[..., Built]) -> None:
    built = build(**OWN)
    one, two = (built.at("O2", driver).forced(PROMPT, [1, 2, 3]) for driver in ("local-sync", "local-task"))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("choices", [{}, pytest.param(OWN, marks=needs_vnni)], ids=["compiler", "own"])
def test_prompt_in_parts_equals_the_prompt_at_once(build: Callable[..., Built], choices: dict[str, str]) -> None:
    loaded = build(**choices).at("O2")
    _, whole = loaded.prefill(PROMPT)
    loaded.prefill(PROMPT[:1])
    _, parts = loaded.prefill(PROMPT[1:], start=1)
    assert relative_error(parts, whole) < 1e-5


@pytest.mark.parametrize("choices", [{}, pytest.param(OWN, marks=needs_vnni)], ids=["compiler", "own"])
def test_context_can_be_filled_to_its_last_position(build: Callable[..., Built], choices: dict[str, str]) -> None:
    loaded = build(**choices).at("O2")
    tokens = [(5 * i) % 320 for i in range(CONTEXT)]
    _, whole = loaded.prefill(tokens)
    loaded.prefill(tokens[:-1])
    _, last = loaded.decode(tokens[-1], CONTEXT - 1)
    assert relative_error(last, whole) < 1e-5


@pytest.mark.parametrize("choices", [{}, pytest.param(OWN, marks=needs_vnni)], ids=["compiler", "own"])
def test_cache_is_written_in_place_and_nowhere_else(build: Callable[..., Built], choices: dict[str, str]) -> None:
    loaded = build(**choices).at("O2")
    loaded.prefill(PROMPT)
    loaded.decode(1, len(PROMPT))
    for buffer in loaded.kv:
        written = np.abs(buffer.to_host()).sum(axis=(1, 2)) > 0
        assert written.tolist() == [i <= len(PROMPT) for i in range(CONTEXT)]


@pytest.mark.parametrize("choices", [{}, pytest.param(OWN, marks=needs_vnni)], ids=["compiler", "own"])
def test_cache_is_never_copied(build: Callable[..., Built], choices: dict[str, str], tmp_path: Path) -> None:
    source = build(**choices).folder / "module.mlirbc"
    text = compile_file(source, tmp_path / "stream.mlir", "--iree-opt-level=O2", "--compile-to=stream").read_text()
    bytes_per_buffer = CONTEXT * 2 * 32 * 4
    assert "stream.cmd.execute" in text
    assert [line for line in text.splitlines() if "stream.cmd.copy" in line and f"%c{bytes_per_buffer}" in line] == []


def test_positions_stretched_as_in_llama_3_equal_the_library(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    changes = {"num_hidden_layers": 1, "rope_parameters": {**rope, "rope_theta": 500000.0}}
    changes["rope_parameters"]["original_max_position_embeddings"] = 16
    model, plain = (
        tiny.write(tmp_path / name, **shape) for name, shape in (("a", changes), ("b", {"num_hidden_layers": 1}))
    )
    import_model(ImportJob(str(model), CONTEXT), tmp_path / "out")
    tokens = np.array([[*PROMPT, *range(40)]])
    expected, other = (reference_logits(str(folder), False, 0, tokens)[0][-1:] for folder in (model, plain))
    actual = Built(tmp_path / "out").at("O2").forced(tokens[0], [])
    assert relative_error(actual, expected) < 1e-5 < relative_error(other, expected)


def test_tied_weights_are_stored_once(build: Callable[..., Built]) -> None:
    stored = (build().folder / "parameters.irpa").stat().st_size
    assert stored < 4 * 287360 + 8192


def test_biases_and_untied_heads_are_taken(tmp_path: Path) -> None:
    folder = tiny.write(
        tmp_path / "model", num_hidden_layers=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    )
    import_model(
        ImportJob(str(folder), CONTEXT, choices=(("weight_format", "int8"), ("layout", "packed"))), tmp_path / "a"
    )
    with np.load(tmp_path / "a" / "check.npz") as check:
        actual = Built(tmp_path / "a").at("O2").forced(check["prompt"][0], check["forced"][0])[:, None]
        assert relative_error(actual, check["logits"]) < 1e-5


def test_random_init_depends_on_the_seed_alone(model: Path) -> None:
    window = np.array([[1, 2, 3]])
    one, same, other = (reference_logits(str(model), True, seed, window) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")
def test_own_kernels_run_without_avx512(model: Path, tmp_path: Path) -> None:
    features = ("avx2", "fma", "f16c")
    result = import_model(ImportJob(str(model), CONTEXT, choices=tuple(OWN.items()), features=features), tmp_path)
    assert result.program.abi.required_features == features
    flags = ["--iree-opt-level=O2", f"--iree-hal-dump-executable-binaries-to={tmp_path / 'code'}"]
    compile_file(tmp_path / "module.mlirbc", tmp_path / "O2.vmfb", *flags, cpu="x86-64-v3")
    with np.load(tmp_path / "check.npz") as check:
        actual = Built(tmp_path).at("O2").forced(check["prompt"][0], check["forced"][0])[:, None]
        assert relative_error(actual, check["logits"]) < max(1e-5, 10 * float(check["noise"]))
    if objdump := shutil.which("objdump"):
        (code,) = (tmp_path / "code").glob("*.so")
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
    module, _ = importer.import_programs({"pick": torch.export.export(Pick(), (data, places))})
    importer.save_module(module, tmp_path / "pick.mlirbc")
    artifact = compile_file(tmp_path / "pick.mlirbc", tmp_path / "pick.vmfb")
    loaded = rt.load_vm_module(rt.VmModule.mmap(rt.VmInstance(), str(artifact)), rt.Config("local-sync"))
    actual = loaded.pick(data.numpy(), places.numpy()).to_host()
    assert Pick()(data, places).tolist() == actual.tolist()
