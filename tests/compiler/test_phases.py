from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.build.compiling import Compiling
from llmbuild.build.targets import find_target
from llmbuild.catalog.writer import Catalog
from llmbuild.compiler import iree, phases
from llmbuild.compiler.flags import FLAGS, UNVERIFIED, compile_flags, point_flags
from llmbuild.process.child import Limits
from llmbuild.search.knobs.space import ALL, KNOBS
from llmbuild.spec.space import WRITTEN, Value
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Artifact, Failure

LIMITS = Limits(seconds=120)
DEFAULTS: dict[str, Value] = {k.name: k.default for k in KNOBS if k.level == "codegen"}

MODULE = """\
func.func @step(%a: tensor<5x96xf32>, %b: tensor<96x70xf32>, %c: tensor<5x70xf32>) -> tensor<5xf32> {
  %zero = arith.constant 0.0 : f32
  %0 = linalg.matmul ins(%a, %b : tensor<5x96xf32>, tensor<96x70xf32>) outs(%c : tensor<5x70xf32>) -> tensor<5x70xf32>
  %1 = tensor.empty() : tensor<5xf32>
  %2 = linalg.fill ins(%zero : f32) outs(%1 : tensor<5xf32>) -> tensor<5xf32>
  %3 = linalg.reduce ins(%0 : tensor<5x70xf32>) outs(%2 : tensor<5xf32>) dimensions = [1]
    (%in: f32, %out: f32) { %4 = arith.addf %in, %out : f32  linalg.yield %4 : f32 }
  return %3 : tensor<5xf32>
}
"""


@pytest.fixture(scope="module")
def target() -> Target:
    return iree.resolve(find_target("host"))


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "module.mlir"
    path.write_text(MODULE)
    return path


def compiling(catalog: Catalog, target: Target) -> Compiling:
    return Compiling(catalog, target, "test", LIMITS, forced=lambda _: False)


LATE = (
    {"opt_level": "O2"},
    {"opt_level": "O3", "vector_width": 32, "slp_vectorize": True, "loop_unroll": True, "stack_limit": 65536},
    {"opt_level": "O2", "distribution_size": 16, "codegen_threads": 2, "tails": "mask", "reassociate": "true"},
    {"data_tiling": "dispatch", "vector_width": 16, "ukernels": "none", "loop_vectorize": True},
    {"slp_vectorize": True, "loop_interleave": True},
)


@pytest.mark.parametrize("changed", LATE, ids=lambda c: " ".join(c))
def test_a_compile_in_phases_gives_the_bytes_of_one_call(
    module: Path, target: Target, tmp_path: Path, changed: dict[str, Value]
) -> None:
    settings = {**DEFAULTS, **changed}
    whole, catalog = tmp_path / "whole.vmfb", Catalog(tmp_path / "catalog")
    blob = catalog.blobs.put_file(module)
    assert iree.compile_module(catalog.blobs.path(blob), whole, target, settings, LIMITS) is None
    made = compiling(catalog, target).compile(blob, settings)
    assert isinstance(made, Artifact)
    assert catalog.blobs.path(made.digest).read_bytes() == whole.read_bytes()


def test_points_that_differ_late_share_each_phase_that_comes_out_equal(
    module: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("front", "configure", "translate", "emit"):
        real = getattr(phases, name)
        monkeypatch.setattr(
            phases, name, lambda *a, _name=name, _real=real, **k: (calls.append(_name), _real(*a, **k))[1]
        )
    catalog = Catalog(tmp_path / "catalog")
    blob, compiler = catalog.blobs.put_file(module), compiling(catalog, target)

    def made(**changed: Value) -> tuple[Artifact | Failure, list[str]]:
        calls.clear()
        return compiler.compile(blob, {**DEFAULTS, **changed}), list(calls)

    first, steps = made()
    assert steps == ["front", "configure", "translate", "emit"]
    assert made(matmul_tile_bytes=65536) == (first, ["configure"]), "configured alike"
    assert made(softmax_fuse=False) == (first, ["configure", "translate"]), "translated alike"
    unrolled, steps = made(loop_unroll=True)
    assert steps == ["emit"], "what LLVM alone reads"
    assert unrolled != first
    other, steps = made(distribution_size=16, vector_width=16)
    assert (other != first, steps) == (True, ["configure", "translate", "emit"])


def test_a_front_half_says_what_it_schedules(module: Path, target: Target, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog")
    front = compiling(catalog, target).front(catalog.blobs.put_file(module), DEFAULTS)
    assert not isinstance(front, Failure)
    assert front.features["dispatches"] >= 2
    assert set(front.features) == {"dispatches", "executables", "transient_bytes"}


def test_a_failure_names_the_whole_compile_to_paste(target: Target, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mlir"
    broken.write_text("func.func @f() { return 1 }")
    catalog = Catalog(tmp_path / "catalog")
    blob = catalog.blobs.put_file(broken)
    made = compiling(catalog, target).compile(blob, DEFAULTS)
    assert isinstance(made, Failure)
    assert str(catalog.blobs.path(blob)) in made.command
    assert made.lasting


def test_what_no_executable_target_can_take_is_told() -> None:
    with pytest.raises(ValueError, match="native_vector_size"):
        phases.retarget("module {}", {"vector_width": 32})


# --- flags -------------------------------------------------------------------------------------------------------


def test_every_codegen_knob_has_one_flag_and_the_same_default() -> None:
    knobs = {k.name: k for k in ALL if k.level == "codegen" and k.name not in WRITTEN}
    assert [f.knob for f in FLAGS] == list(dict.fromkeys(f.knob for f in FLAGS))
    assert {f.knob: f.default for f in FLAGS} == {name: k.default for name, k in knobs.items()}


def test_the_compiler_knows_every_flag() -> None:
    told = subprocess.run([iree.binary(), "--help-hidden"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"^ +(--[a-z0-9-]+)", told, re.MULTILINE))
    said = {text.split("=")[0] for f in FLAGS for text in (f.text, *dict(f.said).values()) if text}
    assert said - known == set()


def test_defaults_say_nothing_and_every_other_value_says_something() -> None:
    assert point_flags(DEFAULTS) == []
    for knob in ALL:
        if knob.level == "codegen" and knob.name not in WRITTEN:
            others = [v for v in knob.domain if v != knob.default or type(v) is not type(knob.default)]
            assert all(len(point_flags({knob.name: v})) == 1 for v in others), knob.name


CPU_KNOBS = [k for k in KNOBS if k.level == "codegen" and k.name != "scalable"]


@pytest.mark.parametrize("last", [False, True])
def test_the_compiler_takes_every_knob_of_the_cpu_at_its_first_and_last_choice(
    module: Path, target: Target, tmp_path: Path, last: bool
) -> None:
    chosen = {k.name: k.domain[-1] if last else k.domain[min(1, len(k.domain) - 1)] for k in CPU_KNOBS}
    assert iree.compile_module(module, tmp_path / "out.vmfb", target, chosen, LIMITS) is None


GPUS = {
    "cuda": ["--iree-hal-target-device=cuda", "--iree-cuda-target=sm_80"],
    "rocm": ["--iree-hal-target-device=hip", "--iree-rocm-target=gfx942"],
    "vulkan-spirv": ["--iree-hal-target-device=vulkan", "--iree-vulkan-target=ampere"],
}


@pytest.mark.parametrize("backend", list(GPUS))
def test_the_compiler_takes_every_knob_of_a_gpu(module: Path, tmp_path: Path, backend: str) -> None:
    knobs = [k for k in ALL if k.level == "codegen" and backend in k.backends]
    assert knobs
    output = tmp_path / "out.vmfb"
    flags = point_flags({k.name: k.domain[-1] for k in knobs if k.name != "data_tiling"})
    done = subprocess.run(
        [iree.binary(), str(module), *GPUS[backend], *flags, "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_compilers_checks_of_itself_are_left_out_on_cpus_and_change_no_byte(
    target: Target, module: Path, tmp_path: Path
) -> None:
    assert UNVERIFIED in compile_flags(target, DEFAULTS)
    assert UNVERIFIED not in compile_flags(Target("gpu", "cuda", "nvptx64", "sm_80"), DEFAULTS)
    made = []
    for name in ("unverified", "verified"):
        command = iree.compile_command(module, tmp_path / name, target, DEFAULTS)
        kept = [word for word in command if name == "unverified" or word != UNVERIFIED]
        subprocess.run(kept, check=True)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


def test_hygiene_and_target_are_always_said(target: Target) -> None:
    flags = compile_flags(replace(target, cpu="znver4", features=()), DEFAULTS)
    assert "--iree-llvmcpu-target-cpu=znver4" in flags
    assert "--iree-vm-bytecode-module-strip-source-map=true" in flags
