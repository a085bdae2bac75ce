"""Targets: what their files may say, what is cross-compiled for them here, and what a decode step moves."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.build.compiling import Compiling
from llmbuild.catalog.writer import Catalog
from llmbuild.compiler import iree, matvec
from llmbuild.compiler.flags import compile_flags, target_flags
from llmbuild.compiler.resolved import Answers, resolve
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.frontend import importer
from llmbuild.frontend.fusion_barrier import fusion_barrier
from llmbuild.frontend.modules import RowMajor
from llmbuild.frontend.program import import_model
from llmbuild.process.child import Limits
from llmbuild.report.targets import rows, runs_here
from llmbuild.runtime.choose import HostFacts, refusal
from llmbuild.runtime.devices import read
from llmbuild.search.knobs.space import for_cpus, space_for, target_knobs
from llmbuild.search.warm_start import initial_points
from llmbuild.spec.files.reader import read_target
from llmbuild.spec.program import Abi, ImportJob
from llmbuild.spec.space import MATVEC, Value
from llmbuild.spec.target import BACKENDS, Target, target_from
from llmbuild.spec.variant import Artifact, Failure
from tests.conftest import Project, llmbuild, make_project, project_in, shared
from tests.search.test_space import recipe
from tests.support import tiny
from tests.support.eager import filled

FILES = {path.stem: path for path in (Path(__file__).parents[2] / "targets").glob("*.yaml")}
ALL = {name: read_target(path) for name, path in FILES.items()}
GPUS = sorted(name for name, target in ALL.items() if not target.is_cpu)
ONE_OF_EACH = ("h200", "rocm-gfx942", "vulkan-rdna3", "metal")
POINT = {"opt_level": "O2"}


# --- files -------------------------------------------------------------------------------------------------------


def test_every_backend_has_a_target_and_every_target_its_device() -> None:
    assert {t.backend for t in ALL.values()} == set(BACKENDS)
    assert {t.device for t in ALL.values()} == {kind.device for kind in BACKENDS.values()}
    assert all(set(t.meters) <= set(BACKENDS[t.backend].meters) for t in ALL.values())


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_target_is_what_its_json_says(name: str) -> None:
    assert target_from(json.loads(json.dumps(plain(ALL[name])))) == ALL[name]


def test_what_runs_a_target_and_what_is_searched_for_it_is_no_part_of_its_identity() -> None:
    target = ALL["x86-64-v3"]
    told = replace(target, device="local-sync", meters=(), knobs=(("opt_level", ("O2",)),), description="another")
    assert told.identity() == target.identity()
    assert set(target.identity()) == {"backend", "arch", "cpu", "features", "requires"}
    assert replace(ALL["h200"], attribute="").identity() != ALL["h200"].identity()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("backend: opencl\ncpu: x", "unknown backend 'opencl'; there are llvm-cpu, cuda, rocm"),
        ("backend: llvm-cpu\ncpu: generic", "arch of a llvm-cpu target is x86_64 or aarch64"),
        ("backend: cuda\ncpu: sm_80\narch: x86_64", "arch of a cuda target is nvptx64"),
        ("backend: cuda\ncpu: sm_80\ndevice: hip", "device 'hip' runs no cuda code: name cuda"),
        ("backend: rocm\ncpu: gfx942\nmeters: [nvml_counter]", "meters nvml_counter do not read what runs this"),
        ("backend: llvm-cpu\narch: aarch64\ncpu: generic\nmeters: [rapl]", "those that do: none"),
        ("backend: cuda\ncpu: sm_80\nfeatures: [+ptx80]", "features of a cuda target are the knob `ptx`"),
        ("backend: llvm-cpu\narch: x86_64\ncpu: generic\nfeatures: [avx2]", "should match pattern"),
        ("backend: rocm\ncpu: gfx942\nattribute: '#x'", "attribute is for cuda and vulkan-spirv targets"),
        ("backend: cuda\ncpu: sm_90\nattribute: 'sm_90'", "must be a #hal.device.target of one cuda"),
        ("backend: vulkan-spirv\ncpu: x\nattribute: '#x'", "must be a #hal.device.target of one vulkan-spirv"),
        ("backend: cuda\ncpu: sm_90\nknobs: {ptx: 1.5}", "give one value or a list of values"),
        ("backend: cuda\ncpu: sm_90\nsm: 90", "$.sm: unknown key"),
    ],
)
def test_a_bad_target_is_refused_by_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(told)) as refused:
        read_target(path)
    assert str(refused.value).startswith(f"{path}:")


def test_an_attribute_that_names_another_chip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"
    path.write_text(FILES["h200"].read_text().replace("cpu: sm_90", "cpu: sm_100"))
    with pytest.raises(InputError, match='attribute must name the cpu: arch = "sm_100"'):
        read_target(path)


# --- flags and the compiler --------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(ALL)))
def test_flags_name_the_chip_and_nothing_of_another_backend(name: str) -> None:
    target = ALL[name]
    flags = " ".join(target_flags(target))
    assert target.cpu in flags
    assert ("llvmcpu" in flags) == target.is_cpu
    assert [flag for flag in compile_flags(target, {}) if flag.count("target-device=") > 1] == []


def test_a_chip_without_a_name_is_refused_before_the_compiler_is_asked() -> None:
    with pytest.raises(InputError, match=r"has no name for sm_90; it knows sm_60, .* as targets/h200\.yaml has"):
        resolve(Target("hopper", "cuda", "nvptx64", "sm_90"))
    with pytest.raises(InputError, match="has no quantum backend; it has cuda"):
        resolve(Target("q", "quantum", "q", "q"))


def test_a_chip_that_the_compiler_does_not_take_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the compiler does not take it"):
        resolve(Target("old", "rocm", "amdgcn", "gfx9999"), Answers(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", GPUS)
def test_code_is_generated_for_every_gpu_here(name: str) -> None:
    assert iree.probe(ALL[name], POINT) is None


def test_the_h200_is_compiled_for_as_such(tmp_path: Path) -> None:
    source, output = tmp_path / "matvec.mlir", tmp_path / "matvec.vmfb"
    source.write_text(iree.MATVEC)
    command = [*iree.compile_command(source, output, ALL["h200"], POINT)]
    dump = f"--iree-hal-dump-executable-binaries-to={tmp_path / 'code'}"
    subprocess.run([*command, dump], check=True, capture_output=True)
    (ptx,) = (tmp_path / "code").glob("*.ptx")
    assert re.search(r"^\.target sm_90", ptx.read_text(), re.MULTILINE)


# --- a decoder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Abi]]:
    """Import a tiny decoder in f16 for a number of sequences, once for each."""

    @cache
    def imported(batch: int) -> tuple[Path, Abi]:
        folder = tmp_path_factory.mktemp("decoder")
        model = tiny.write(folder / "model", num_hidden_layers=1)
        job = ImportJob(str(model), 64, batch, choices=(("weight_format", "f16"),))
        return folder / "module.mlirbc", import_model(job, folder).program.abi

    return imported


LEFT = [pytest.param(8, name, marks=pytest.mark.exhaustive) for name in ONE_OF_EACH[1::2]]
"""What a batch needs of LLVM and of SPIR-V, one target of each shows."""


@pytest.mark.parametrize(("batch", "name"), [*product((1,), ONE_OF_EACH), *product((8,), ONE_OF_EACH[::2]), *LEFT])
def test_a_decoder_is_cross_compiled(
    decoders: Callable[[int], tuple[Path, Abi]], tmp_path: Path, batch: int, name: str
) -> None:
    """For SPIR-V its one layer says more: computed inside the softmax, the mask would need memory that is not there."""
    (module, _), output = decoders(batch), tmp_path / "module.vmfb"
    assert iree.compile_module(module, output, ALL[name], POINT, Limits(120)) is None
    assert output.stat().st_size > 10_000


class Int8Head(torch.nn.Module):
    """An int8 output matrix for many tokens, and the choice of one."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        rows = np.random.default_rng(0).standard_normal((tokens, 32), dtype=np.float32)
        self.matrix = filled(RowMajor, rows, "int8")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.matrix.multiply(x)[0, -1]
        return fusion_barrier(logits).argmax(-1, keepdim=True), logits


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_scales_of_a_large_int8_head_go_with_its_product(tmp_path: Path, name: str) -> None:
    """Fused with the choice of a token instead, they are unrolled over the vocabulary, and the compiler crashes."""
    program = torch.export.export(Int8Head(49152), (torch.zeros(1, 1, 32),))
    module, _ = importer.import_programs({"head": program}, {}, 0)
    importer.save_module(module, tmp_path / "head.mlirbc")
    assert iree.compile_module(tmp_path / "head.mlirbc", tmp_path / "o.vmfb", ALL[name], POINT, Limits(60)) is None


@pytest.mark.parametrize("name", ["h200", "rocm-gfx942"])
def test_how_rows_of_a_matrix_vector_product_are_shared_out_changes_the_code(tmp_path: Path, name: str) -> None:
    compiling = Compiling(Catalog(tmp_path / "catalog"), ALL[name], "test", Limits(120), lambda _: False)
    module = compiling.catalog.blobs.put_bytes(iree.MATVEC.encode())
    made = {choice: compiling.compile(module, {**POINT, MATVEC: choice}) for choice in ("auto", "8x1", "16x4")}
    assert {choice: each for choice, each in made.items() if isinstance(each, Failure)} == {}
    assert len({each.digest for each in made.values() if isinstance(each, Artifact)}) == 3
    compiling.catalog.close()


KNOBS = ({"indirect_commands": False}, {"buffer_instructions": False}, {"denormals": "preserve-sign"})


@pytest.mark.parametrize("said", KNOBS, ids=lambda said: " ".join(said))
def test_a_knob_of_a_gpu_changes_the_code(tmp_path: Path, said: dict[str, Value]) -> None:
    source = tmp_path / "matvec.mlir"
    source.write_text(iree.MATVEC)
    outputs = [tmp_path / "plain.vmfb", tmp_path / "other.vmfb"]
    for output, point in zip(outputs, (POINT, {**POINT, **said}), strict=True):
        assert iree.compile_module(source, output, ALL["rocm-gfx942"], point, Limits(60)) is None
    assert outputs[0].read_bytes() != outputs[1].read_bytes()


def front_half(rows: int, columns: int) -> str:
    """A front half of one product for a GPU with subgroups of 32."""
    return (
        "subgroup_size_choices = [32]\nhal.executable.export public @decode$async_dispatch_1_matvec x\n"
        "%1 = linalg.generic {indexing_maps = [affine_map<(d0, d1) -> (d1)>, affine_map<(d0, d1) -> (d0, d1)>, "
        'affine_map<(d0, d1) -> (d0)>], iterator_types = ["parallel", "reduction"]} '
        f"ins(%a, %b : tensor<{columns}xf32>, tensor<{rows}x{columns}xf32>) outs(%c : tensor<{rows}xf32>) {{\n"
    )


@given(st.integers(1, 300), st.integers(1, 600), st.sampled_from(("8x1", "8x4", "16x4", "32x1", "32x4")))
def test_rows_and_columns_are_shared_out_evenly_or_left_to_the_compiler(rows: int, columns: int, choice: str) -> None:
    text = front_half(rows, columns)
    told = matvec.configure(text, choice)
    numbers = re.search(r"workgroup = \[(\d+), 0\], partial_reduction = \[0, (\d+)\], thread = \[0, (\d+)\]", told)
    lanes, groups = map(int, choice.split("x"))
    assert (numbers is None) == bool(rows % (32 // lanes * groups) or columns % lanes)
    if numbers is None:
        assert told == text
    else:
        shared, step, each = map(int, numbers.groups())
        assert (rows % shared, columns % step, step, shared) == (0, 0, lanes * each, 32 // lanes * groups)


def test_no_gpu_has_nothing_to_share_out_to() -> None:
    with pytest.raises(ValueError, match="no executable target with subgroups"):
        matvec.configure("module {}", "8x4")


MOVES = re.compile(
    r"stream\.(?:async\.(?:load|store|transfer)|(?:tensor|resource)\.(?:load|store)|cmd\.(?:flush|invalidate))"
)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_decode_step_is_one_submission_that_moves_token_and_position_only(
    decoders: Callable[[int], tuple[Path, Abi]], tmp_path: Path, batch: int, name: str
) -> None:
    module, abi = decoders(batch)
    output = tmp_path / "stream.mlir"
    command = [*iree.compile_command(module, output, ALL[name], POINT), "--compile-to=stream"]
    subprocess.run(command, check=True, capture_output=True)
    step = re.search(r"@decode\$async\(.*?\n  }\n", output.read_text(), re.DOTALL)
    assert step is not None
    body = step[0]
    assert (body.count("stream.cmd.execute"), MOVES.findall(body)) == (1, [])
    assert not re.search("slow_memcpy|hal.buffer.load|assert_scalar|stream.timepoint.await", body)
    assert [int(n) for n in re.findall(r"stream\.tensor\.import.*?tensor<(\d+)xi64>", body)] == [abi.batch] * 2
    logits = f"{abi.vocabulary}xf32" if abi.batch == 1 else f"{abi.batch}x{abi.vocabulary}xf32"
    exported = re.findall(r"stream\.tensor\.export.*?tensor<(\w+)>", body)
    assert sorted(exported) == sorted([f"{abi.batch}xi64", logits])
    sizes = {n: int(v) for n, v in re.findall(r"%(c\d+\w*) = arith\.constant (\d+) : index", body)}
    copies = [sizes[n] for n in re.findall(r"stream\.cmd\.copy [^,]+, [^,]+, %(\w+) :", body)]
    assert max(copies, default=0) < 4 * abi.vocabulary * abi.batch  # rows of the rotary embedding; no cache, no logits


# --- the space ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPUS)
def test_our_kernels_for_gpus_are_a_choice_there_and_the_knobs_of_cpus_are_not(name: str) -> None:
    space = space_for(ALL[name], recipe(), {})
    domains = {knob.name: knob.domain for knob in space.knobs}
    assert domains["kernel"] == ("compiler", "own")
    assert not {"work_groups", "distribution_size", "vector_width", "ukernels"} & set(domains)
    own = space.complete({"weight_format": "f16", "kernel": "own", "row_tile": domains["row_tile"][0]})
    assert (own["kernel"], own["layout"]) == ("own", "row_major")
    assert any(point["kernel"] == "own" for point in initial_points(space))
    assert space.complete({"weight_format": "f32", "kernel": "own"})["kernel"] == "compiler"


def test_knobs_of_our_gpu_kernels_are_no_choice_on_a_cpu() -> None:
    assert not {"row_tile", "row_reads"} & {knob.name for knob in space_for(ALL["x86-64-v4"], recipe(), {}).knobs}


@pytest.mark.parametrize("name", GPUS)
def test_what_a_recipe_says_for_our_kernels_a_gpu_does_not_hear(name: str) -> None:
    said = {"layout": ("packed",), "weight_format": ("f12_e4m7",), "kv_dtype": ("f16",), "opt_level": ("O2",)}
    ours, plain = recipe(kernel=("own",), **said), recipe(opt_level=("O2",))
    assert space_for(ALL[name], ours, {}) == space_for(ALL[name], plain, {})
    assert set(for_cpus(ours, ALL[name])) == {"kernel", "layout", "weight_format", "kv_dtype"}
    mine = recipe(kernel=("own",), layout=("row_major",))
    assert {k.name: k.domain for k in space_for(ALL[name], mine, {}).knobs}["kernel"] == ("own",)
    either = recipe(layout=("packed",))
    assert {k.name: k.domain for k in space_for(ALL[name], either, {}).knobs}["layout"] == ("packed",)
    assert (for_cpus(either, ALL[name]), for_cpus(ours, ALL["x86-64-v4"])) == ({}, {})


@pytest.mark.parametrize("name", GPUS)
def test_the_points_tried_first_are_inside_the_space_and_begin_with_the_compilers_defaults(name: str) -> None:
    target = ALL[name]
    space = space_for(target, recipe(), {})
    first = initial_points(space)
    assert first[0] == space.default()
    assert all(space.contains(point) for point in first[1:])
    assert {point["driver"] for point in first} == {target.device}
    assert {point["weight_format"] for point in first} >= {"f32", "f16", "int8"}


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("nth", [1, -1])
def test_the_compiler_takes_every_knob_of_a_gpu(name: str, nth: int) -> None:
    knobs = [k for k in target_knobs(ALL[name]) if k.level == "codegen" and k.name != "data_tiling"]
    assert iree.probe(ALL[name], {k.name: k.domain[nth % len(k.domain)] for k in knobs}) is None


def test_a_described_chip_has_no_knob_that_the_compiler_would_not_read() -> None:
    assert {k.name for k in target_knobs(ALL["cuda-sm80"])} - {k.name for k in target_knobs(ALL["h200"])} == {"ptx"}


def test_a_recipe_may_speak_of_knobs_of_other_backends_but_the_command_line_may_not() -> None:
    both = recipe(vector_width=("all",), ptx=("+ptx80",), driver=("local-sync", "cuda"))
    cuda = {k.name: k.domain for k in space_for(ALL["cuda-sm80"], both, {}).knobs}
    cpu = {k.name: k.domain for k in space_for(ALL["x86-64-v3"], both, {}).knobs}
    assert (cuda["ptx"], cuda["driver"], cpu["driver"]) == (("+ptx80",), ("cuda",), ("local-sync",))
    assert "ptx" not in cpu and cpu["vector_width"] == (0, 16, 32, 64)
    with pytest.raises(InputError, match="knob ptx is for cuda; target x86-64-v3 is llvm-cpu"):
        space_for(ALL["x86-64-v3"], recipe(), {"ptx": "+ptx80"})
    with pytest.raises(InputError, match="unknown knob 'vectorwidth'"):
        space_for(ALL["x86-64-v3"], recipe(vectorwidth=("all",)), {})


def test_what_the_compiler_does_not_get_through_is_refused_before() -> None:
    with pytest.raises(InputError, match="kv_dtype=f16: not on vulkan-spirv, where the compiler does not terminate"):
        space_for(ALL["vulkan-rdna3"], recipe(), {"kv_dtype": "f16"})
    assert next(space_for(ALL["h200"], recipe(kv_dtype=("f16",)), {}).points())["kv_dtype"] == "f16"


def test_a_target_narrows_knobs_that_exist_to_values_that_exist() -> None:
    target = ALL["cuda-sm80"]
    assert dict(target.knobs)["memory_model"] == ("unified", "discrete")
    with pytest.raises(InputError, match="unknown knob 'warps'"):
        space_for(replace(target, knobs=(("warps", (4,)),)), recipe(), {})
    with pytest.raises(InputError, match="index_bits=16: choose from 64, 32"):
        space_for(replace(target, knobs=(("index_bits", (16,)),)), recipe(), {})


# --- what runs here ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "code", "stdout", "stderr", "told"),
    [
        ("cuda", 1, "", "cuda_dynamic_symbols.c:66: UNAVAILABLE; CUDA driver library", "no NVIDIA driver (libcuda)"),
        ("metal", 1, "", "NOT_FOUND; no driver 'metal' registered", "the installed IREE runtime has no metal driver"),
        ("cuda", 0, "", "", "IREE's cuda driver finds no device"),
        ("cuda", 0, "# Enumerated\n  cuda://GPU-1 NVIDIA H200\n", "", ""),
    ],
)
def test_what_a_driver_tells_of_its_devices(driver: str, code: int, stdout: str, stderr: str, told: str) -> None:
    found = read(driver, code, stdout, stderr)
    assert (found.reason, bool(found.found)) == (told, not told)


def test_why_a_target_does_not_run_here_is_said() -> None:
    target = Target("t", "llvm-cpu", "riscv64", "generic")
    assert runs_here(target).startswith("no: this host is ")
    assert "installed IREE runtime has no metal driver" in runs_here(ALL["metal"]) or "macOS" in runs_here(ALL["metal"])
    lacking = replace(ALL["x86-64-v3"], arch="x86_64", requires=("no-such-feature",))
    assert runs_here(lacking).startswith("no: this host ")


def test_a_row_for_each_target_with_a_reason_for_each_no(tmp_path: Path) -> None:
    bad = Target("hopper", "cuda", "nvptx64", "sm_90", device="cuda")
    found = rows([bad, ALL["metal"]], Answers(tmp_path), probed=True)
    assert [r["target"] for r in found] == ["hopper", "metal"]
    assert found[0]["compiles"].startswith("no: the compiler has no name for sm_90")
    assert (found[1]["compiles"], found[1]["runs"].partition(":")[0]) == ("yes", "no")


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of one layer, compiled for two kinds of GPU on the command line; `rows.json` is what that told."""

    def make(folder: Path) -> None:
        made = make_project(folder)
        tiny.write(made.model, num_hidden_layers=1)
        targets = ("-t", "vulkan-rdna3", "-t", "cuda-sm80")
        done = llmbuild("compile", made.recipe, *targets, "--trials", "1", "--json", "-C", made.catalog)
        assert done.returncode == 0, done.stderr
        (folder / "rows.json").write_text(done.stdout)

    return project_in(shared(tmp_path_factory, "crossed", make))


def test_compile_takes_gpus_on_the_command_line_and_build_refuses_them(crossed: Project) -> None:
    made = json.loads((crossed.folder / "rows.json").read_text())
    assert all(row["artifact"] for row in made)
    assert {row["target"] for row in made} == {"vulkan-rdna3", "cuda-sm80"}
    told = llmbuild("build", crossed.recipe, "-t", "metal", "-C", crossed.catalog)
    assert (told.returncode, "cannot run on this host: the installed IREE runtime" in told.stderr) == (2, True)


@pytest.mark.parametrize(("name", "told"), [("vulkan-rdna3", {"subgroups": "said"}), ("cuda-sm80", {})])
def test_explain_says_what_its_command_leaves_out(crossed: Project, name: str, told: dict[str, str]) -> None:
    found = json.loads(llmbuild("query", "--all", "--json", "-C", crossed.catalog).stdout)
    (variant,) = (row["variant"] for row in found if row["target"] == name)
    as_data = llmbuild("explain", variant, "--json", "-C", crossed.catalog)
    assert json.loads(as_data.stdout)[0]["written"] == told
    as_text = llmbuild("explain", variant, "-C", crossed.catalog)
    less = [line for line in as_text.stdout.splitlines() if line.startswith("less ")]
    assert [line.split()[1].rstrip(":") for line in less] == ["subgroups=said"] * len(told)


def test_a_loader_refuses_a_gpu_row_for_want_of_a_device_and_looks_for_none_where_no_row_needs_it() -> None:
    asked: list[str] = []

    def absent(driver: str, _: Collection[str]) -> str:
        asked.append(driver)
        return "no NVIDIA driver (libcuda)"

    facts = HostFacts("x86_64", frozenset(), "3.13.0", None, "here", absent)
    row = {"artifact": "a", "runtime": "3.13.0", "target_body": plain(ALL["h200"])}
    assert refusal({**row, "target_body": plain(ALL["aarch64-generic"])}, facts).startswith("is for aarch64")
    assert asked == []
    assert refusal(row, facts).startswith("is for cuda, and this host has none that runs it: no NVIDIA driver")
    assert (asked, refusal(row, replace(facts, device_lacks=lambda *_: ""))) == (["cuda"], "")
