"""Our matrix-vector kernels for GPUs: how products are shared out, what each backend makes of them, and whether they
are right on a Vulkan device.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.compiler import iree
from llmbuild.compiler.resolved import resolve
from llmbuild.errors import ChoiceRefused, InputError
from llmbuild.frontend import single_row
from llmbuild.frontend.modules import Matrix, RowMajor
from llmbuild.frontend.program import import_model, refuse, settle
from llmbuild.frontend.single_row import SingleRow, stored_for
from llmbuild.kernels.applies import gpu_problem
from llmbuild.kernels.matvec import (
    BITS,
    LEAST_COALESCED,
    MOST_WORK_GROUPS,
    ROW_READS,
    ROW_TILES,
    Plan,
    Stored,
    Work,
    kernel,
    plan,
    stored_as,
    work,
)
from llmbuild.process.child import Limits
from llmbuild.runtime.session import Session, Settings
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.files.reader import read_target
from llmbuild.spec.formats import BLOCKS, INTEGERS, WEIGHT_FORMATS
from llmbuild.spec.program import ImportJob
from llmbuild.spec.target import VULKAN, Target
from llmbuild.transform.quantized import pack_nibbles, quantize
from llmbuild.transform.stored import Rows
from tests.support import tiny
from tests.support.artifact import answers, relative_error
from tests.support.eager import filled

TARGETS = Path(__file__).parents[2] / "targets"
BACKENDS = {"h200": 32, "rocm-gfx942": 64, "rocm-gfx1100": 32, "vulkan-rdna3": 32, "metal": 32}
"""And how many lanes a subgroup has."""
POINT = {"opt_level": "O2"}
ATTRIBUTE = (
    '#hal.device.target<"vulkan", [#hal.executable.target<"vulkan-spirv", "vulkan-spirv-fb", '
    '{iree_codegen.target_info = #iree_gpu.target<arch = "software", features = "spirv:v1.6,cap:Shader", '
    "wgp = <compute = fp64|fp32|fp16|int64|int32|int16|int8, storage = b64|b32|b16|b8, subgroup = shuffle|arithmetic, "
    "subgroup_size_choices = [8], max_workgroup_sizes = [1024, 1024, 1024], max_thread_count_per_workgroup = 1024, "
    "max_workgroup_memory_bytes = 32768, max_workgroup_counts = [65535, 65535, 65535]>>}>]> : !hal.device"
)
SOFTWARE = Target("software", VULKAN, "spirv", "software", attribute=ATTRIBUTE, subgroup=8)
"""Mesa's llvmpipe."""


def no_software() -> str:
    """Return why `SOFTWARE` does not run here; empty where it does."""
    tool = Path(sys.executable).parent / "iree-run-module"
    told = subprocess.run([str(tool), "--dump_devices=vulkan"], capture_output=True, text=True, check=False)
    return "" if "llvmpipe" in told.stdout else "no llvmpipe, Vulkan in software with subgroups of 8 lanes"


on_vulkan = pytest.mark.skipif(bool(no_software()), reason=no_software())

FORMATS = {
    "f16": Stored(40, 256, "f16"),
    "bf16": Stored(40, 256, "bf16"),
    "int8": Stored(40, 256, "i8"),
    "int8_g64": Stored(40, 256, "i8", 64),
    "int4_g64": Stored(40, 256, "i4", 64),
    "int4a_g32": Stored(40, 256, "i4", 32, True),
}


# --- how a product is shared out -----------------------------------------------------------------------------------

stored = st.builds(
    Stored,
    st.integers(1, 200_000),
    st.one_of(st.integers(1, 300), st.integers(1, 500).map(lambda n: 32 * n)),
    st.sampled_from(sorted(BITS)),
)
works = st.builds(work, st.sampled_from((8, 16, 32, 64)), st.sampled_from(ROW_TILES), st.sampled_from(ROW_READS))


@given(stored, works)
def test_every_column_is_read_once_and_every_row_has_a_place(matrix: Stored, wanted: Work) -> None:
    found = plan(matrix, wanted)
    if found is None:
        return
    assert found.steps * found.lanes * found.each == matrix.columns
    assert np.prod(found.x_shape) == matrix.columns
    assert found.lanes * found.beside == wanted.subgroup
    assert found.lanes * found.read >= LEAST_COALESCED
    assert found.work_groups <= MOST_WORK_GROUPS
    assert (found.work_groups - 1) * found.tile < matrix.rows <= found.work_groups * found.tile


@given(stored, works)
def test_rows_are_left_to_the_compiler_only_where_lanes_would_not_read_side_by_side(
    matrix: Stored, wanted: Work
) -> None:
    # 32 bytes are 8 lanes of 4, 4 of 8 or 2 of 16: rows of a multiple of that fit every subgroup
    if matrix.row_bits % (8 * LEAST_COALESCED) == 0:
        assert plan(matrix, wanted) is not None


def test_a_small_matrix_is_cut_into_more_subgroups_and_a_large_one_is_not() -> None:
    tile = work(32, "4x4", "narrow")
    small, large = plan(Stored(1024, 4096, "f16"), tile), plan(Stored(14336, 4096, "f16"), tile)
    assert small is not None and large is not None
    assert (small.work.rows, large.work.rows, large.read, large.lanes) == (1, 4, 16, 32)


# --- code ----------------------------------------------------------------------------------------------------------


def text(each: dict[str, Plan]) -> str:
    """Return a module with a public function for each product."""
    written = (kernel(name, one) for name, one in each.items())
    return "\n".join(written).replace("util.func private", "util.func public")


def planned(matrix: Stored, wanted: Work) -> Plan:
    """Return a plan that keeps the rows that were asked for, however small the matrix is."""
    found = plan(matrix, wanted)
    assert found is not None
    return replace(found, work=wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_format_is_compiled_for_every_backend(tmp_path: Path, name: str) -> None:
    target = read_target(TARGETS / f"{name}.yaml")
    wanted = work(BACKENDS[name], "4x2", "wide" if name == "h200" else "narrow")
    (tmp_path / "m.mlir").write_text(text({f: planned(matrix, wanted) for f, matrix in FORMATS.items()}))
    assert iree.compile_module(tmp_path / "m.mlir", tmp_path / "m.vmfb", target, POINT, Limits(120)) is None


def test_subgroups_are_as_large_as_the_compiler_makes_them() -> None:
    assert {name: resolve(read_target(TARGETS / f"{name}.yaml")).subgroup for name in BACKENDS} == BACKENDS


@pytest.mark.parametrize(("form", "each"), [("f16", 2), ("bf16", 2), ("int8", 3.5), ("int4_g64", 3.375)])
def test_cuda_reads_sixteen_bytes_a_lane_and_spends_few_instructions_on_a_weight(
    tmp_path: Path, form: str, each: float
) -> None:
    source, target = tmp_path / "m.mlir", read_target(TARGETS / "h200.yaml")
    matrix = replace(FORMATS[form], rows=16, columns=4096)
    source.write_text(text({"product": planned(matrix, work(32, "4x4", "wide"))}))
    command = iree.compile_command(source, tmp_path / "m.vmfb", target, POINT)
    subprocess.run([*command, f"--iree-hal-dump-executable-binaries-to={tmp_path}"], check=True, capture_output=True)
    (ptx,) = tmp_path.glob("*.ptx")
    loop = re.search(r"^\$L__BB0_1:\n(.*?) bra ", ptx.read_text(), re.MULTILINE | re.DOTALL)
    assert loop is not None
    words = [line.split()[0] for line in loop[1].splitlines() if line.strip()]
    weights = 4 * 16 * 8 // BITS[matrix.element]
    activations = weights // 4 // 4  # sixteen bytes each, for four rows together
    assert words.count("ld.global.nc.v4.b32") == 4 + activations
    # `and` and `or` become one instruction, `mov` none
    counted = [word for word in words if word.split(".")[0] in ("fma", "add", "sub", "or", "xor", "shr", "shl", "cvt")]
    counted += ["and.b32"] * words.count("and.b32") if form == "bf16" else []
    assert len(counted) / weights < each * 1.1
    assert ptx.read_text().count("shfl.sync.bfly.b32") == 4 * 5


# --- right ---------------------------------------------------------------------------------------------------------


def drawn(form: str, rows: int, columns: int) -> tuple[Stored, list[Any], Any]:
    """Return a random matrix: how it is stored, its arrays, and what it stands for in f64; bf16 are u16."""
    dense = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    if form == "f16":
        half = dense.astype(np.float16)
        return Stored(rows, columns, "f16"), [half], half.astype(np.float64)
    if form == "bf16":
        return Stored(rows, columns, "bf16"), [_bf16(dense)], _wide(_bf16(dense))
    q = quantize(dense, INTEGERS[form])
    data, element = (pack_nibbles(q.codes).view(np.int8), "i4") if q.bits == 4 else (q.codes, "i8")
    groups = columns // q.group
    if groups == 1 and q.zero is None:
        return Stored(rows, columns, element), [data, q.scale[:, 0].copy()], q.codes * q.scale.astype(np.float64)
    zero = np.zeros((rows, groups), np.int8) if q.zero is None else q.zero.astype(np.int8)
    codes = q.codes.reshape(rows, groups, -1) - zero[..., None].astype(np.float64)
    arrays = [data, _bf16(q.scale), *([] if q.zero is None else [zero])]
    matrix = Stored(rows, columns, element, q.group, q.zero is not None)
    return matrix, arrays, (codes * _wide(_bf16(q.scale))[..., None]).reshape(rows, columns)


def _bf16(values: Any) -> Any:
    return ((np.asarray(values, np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def _wide(stored: Any) -> Any:
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def run(artifact: Path, name: str, arrays: list[Any]) -> Any:
    """Return the result of a function on the Vulkan device."""
    folder, tool = artifact.parent, Path(sys.executable).parent / "iree-run-module"
    command = [str(tool), f"--module={artifact}", "--device=vulkan", f"--function={name}"]
    for i, array in enumerate(arrays):
        if array.dtype == np.uint16:
            array.tofile(folder / f"{name}{i}.bin")
            command.append(f"--input={'x'.join(map(str, array.shape))}xbf16=@{folder / f'{name}{i}.bin'}")
        else:
            np.save(folder / f"{name}{i}.npy", array)
            command.append(f"--input=@{folder / f'{name}{i}.npy'}")
    done = subprocess.run([*command, f"--output=@{folder / 'y.npy'}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "y.npy")


CASES = {
    "whole": (48, 256, "4x2", "wide"),
    "ragged": (37, 576, "4x4", "narrow"),
    "one row, one step": (1, 64, "1x4", "wide"),
    "loop with an end": (19, 1216, "2x4", "narrow"),
}


@on_vulkan
@pytest.mark.parametrize("form", ["f16", "bf16", "int8", "int8_g32", "int7_g64", "int4_g64", "int4_g32", "int4a_g64"])
def test_products_agree_with_numpy(tmp_path: Path, form: str) -> None:
    plans, matrices = {}, {}
    for number, (rows, columns, tile, reads) in enumerate(CASES.values()):
        name, found = f"product_{number}", drawn(form, rows, columns)
        matrices[name], plans[name] = found, planned(found[0], work(8, tile, reads))
    (tmp_path / "m.mlir").write_text(text(plans))
    assert iree.compile_module(tmp_path / "m.mlir", tmp_path / "m.vmfb", SOFTWARE, POINT, Limits(120)) is None
    for name, (matrix, arrays, dense) in matrices.items():
        x = np.random.default_rng(1).standard_normal(matrix.columns).astype(np.float32)
        steps, a, b, four = plans[name].x_shape
        read = (
            x.reshape(steps, b, a, four).transpose(0, 2, 1, 3) if plans[name].arranged else x.reshape(steps, a, b, four)
        )
        actual = run(tmp_path / "m.vmfb", name, [np.ascontiguousarray(read), *arrays])
        assert relative_error(actual, dense @ x) < 2e-6


@on_vulkan
@pytest.mark.parametrize(
    "choices",
    [
        pytest.param({"weight_format": "f16"}, marks=pytest.mark.exhaustive),
        {"weight_format": "int8", "row_reads": "wide"},
    ],
    ids=lambda choices: "-".join(choices.values()),
)
def test_a_decoder_with_our_kernels_agrees_with_torch(tmp_path: Path, choices: dict[str, str]) -> None:
    model = tiny.write(tmp_path / "model", num_hidden_layers=1)
    told = tuple({**choices, "kernel": "own", "row_tile": "2x4"}.items())
    job = ImportJob(str(model), 64, choices=told, subgroup=SOFTWARE.subgroup)
    abi = import_model(job, tmp_path).program.abi
    artifact = tmp_path / "m.vmfb"
    assert iree.compile_module(tmp_path / "module.mlirbc", artifact, SOFTWARE, POINT, Limits(120)) is None
    assert b"llmbuild_matvec" in artifact.read_bytes()
    with np.load(tmp_path / "check.npz") as check:
        prompt, forced, expected = check["prompt"][0], check["forced"][0], check["logits"][:, 0]
        noise = float(check["noise"])
    session = Session(artifact, tmp_path / "parameters.irpa", abi, Settings("vulkan", 0))
    actual = answers(session, prompt, forced)
    session.close()  # the threads of an open Vulkan device never sleep
    assert relative_error(actual, expected) < max(1e-5, 10 * noise)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "changes", "told"),
    [
        ({"weight_format": "f16", "layout": "packed"}, {}, "kernel=own reads weights in layout=row_major on a GPU"),
        ({"weight_format": "f32"}, {}, "kernel=own: it finds no matrix to read in f32"),
        ({"weight_format": "f16"}, {"batch": 2}, "answers one sequence at a time, the batch is 2"),
    ],
)
def test_what_our_kernels_do_not_do_is_refused(
    tmp_path: Path, choices: dict[str, str], changes: dict[str, Any], told: str
) -> None:
    model = tiny.write(tmp_path / "model")
    job = ImportJob(str(model), 64, choices=tuple({**choices, "kernel": "own"}.items()), subgroup=32)
    with pytest.raises(InputError, match=told):
        import_model(replace(job, **changes), tmp_path)


def test_a_matrix_that_does_not_fit_is_left_to_the_compiler() -> None:
    dense, x = np.random.default_rng(0).standard_normal((8, 150), dtype=np.float32), torch.ones(1, 1, 150)
    ours = filled(stored_for(work(32, "4x4", "narrow")), dense, "int8")
    assert isinstance(ours, SingleRow) and ours.plan is None
    assert torch.equal(ours.multiply(x), filled(RowMajor, dense, "int8").multiply(x))


@given(
    st.sampled_from([form for form in WEIGHT_FORMATS if form not in BLOCKS]), st.integers(1, 40).map(lambda n: 4 * n)
)
def test_a_format_says_how_a_matrix_is_stored_before_it_is(form: str, columns: int) -> None:
    assert stored_as(3, columns, form) == single_row.stored_as(RowMajor(Rows((("any", 3),)), columns, form))


@pytest.mark.parametrize("form", BLOCKS)
def test_blocks_of_gguf_are_not_for_gpus(form: str) -> None:
    assert stored_as(64, 64, form) is None
    assert "finds no matrix to read in" in gpu_problem(
        Decoder(64, 64, 2, 2, 32, 64), form, form, work(32, "4x4", "narrow")
    )
    job = ImportJob("any", 64, choices=(("weight_format", form),), subgroup=32)
    with pytest.raises(ChoiceRefused, match="read by kernel=own on CPUs alone"):
        refuse(None, job, settle(job))


def test_no_matrix_for_the_kernels_is_told_from_the_facts_of_a_model() -> None:
    fitting, odd = Decoder(128, 192, 4, 2, 32, 320), Decoder(44, 172, 4, 2, 11, 320)
    on = work(32, "4x4", "narrow")
    assert gpu_problem(fitting, "int8", "int8", on) == ""
    assert gpu_problem(odd, "int8", "int4_g32", on) == (
        "it finds no matrix to read in int4_g32 and int8: on a GPU it takes 16, 8 or 4 bits, "
        "and rows of a multiple of 32 bytes"
    )


def test_rows_of_a_prompt_are_left_to_the_compiler() -> None:
    dense = np.random.default_rng(0).standard_normal((8, 128), dtype=np.float32)
    ours = filled(stored_for(work(32, "4x4", "narrow")), dense, "f16")
    one, three = (torch.export.export(_Product(ours), (torch.ones(1, n, 128),)) for n in (1, 3))
    assert ("llmbuild.matvec" in str(one.graph), "llmbuild.matvec" in str(three.graph)) == (True, False)


class _Product(torch.nn.Module):
    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix.multiply(x)
