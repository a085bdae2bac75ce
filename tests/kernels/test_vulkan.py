"""A decoder on a Vulkan device, for real: the path of every GPU, on whatever has a driver, software included.

Where there is no device that part is skipped with the reason; Debian's `mesa-vulkan-drivers` and `libvulkan1` are one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.build.compiling import Compiling
from llmbuild.catalog.writer import Catalog
from llmbuild.compiler import iree, phases, subgroups
from llmbuild.compiler.resolved import resolve
from llmbuild.digest import plain
from llmbuild.errors import LoadRefused
from llmbuild.frontend.program import import_model
from llmbuild.process.child import Limits
from llmbuild.report.targets import runs_here
from llmbuild.runtime import devices
from llmbuild.runtime.choose import HostFacts, refusal
from llmbuild.runtime.devices import Devices, read
from llmbuild.runtime.session import Session, Settings
from llmbuild.spec.files.reader import read_target
from llmbuild.spec.program import ImportJob
from llmbuild.spec.target import VULKAN, Target
from llmbuild.spec.variant import Artifact
from tests.support import tiny
from tests.support.artifact import answers

TARGETS = {path.stem: read_target(path) for path in (Path(__file__).parents[2] / "targets").glob("*.yaml")}
POINT = {"opt_level": "O2"}
ABSENT = devices.lacks("vulkan")
on_a_device = pytest.mark.skipif(bool(ABSENT), reason=f"nothing runs Vulkan here: {ABSENT}")


# --- what is made and refused, wherever this runs ----------------------------------------------------------------

DUMP = """\
# --device=vulkan://GPU-1
#   llvmpipe (LLVM 15.0.6, 256 bits) (llvmpipe Mesa 22.3.6)
name: llvmpipe (LLVM 15.0.6, 256 bits)
features: subgroupSizeControl={control} cooperativeMatrix=no
subgroup: size={size} minSubgroupSize={least} maxSubgroupSize={most} requiredSubgroupSizeStages=0x000000{stages}
"""


@pytest.mark.parametrize(
    ("size", "least", "most", "stages", "control", "sizes"),
    [
        (8, 8, 8, "30", "yes", {8}),
        (64, 32, 64, "30", "yes", {32, 64}),
        (64, 32, 64, "10", "yes", {64}),
        (64, 32, 64, "30", "no", {64}),
    ],
)
def test_a_device_has_the_subgroups_that_its_driver_can_be_told_to_make(
    size: int, least: int, most: int, stages: str, control: str, sizes: set[int]
) -> None:
    told = DUMP.format(size=size, least=least, most=most, stages=stages, control=control)
    expected = Devices(("llvmpipe (LLVM 15.0.6, 256 bits)",), "", frozenset(f"subgroup-size-{n}" for n in sizes))
    assert expected == read("vulkan", 0, told, "")
    assert read("vulkan", 0, DUMP.replace("subgroup:", "groups:"), "").features is None


def test_a_loader_refuses_code_for_subgroups_that_no_device_here_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere, software = resolve(TARGETS["vulkan-ampere"]), resolve(TARGETS["vulkan-llvmpipe"])
    assert (ampere.requires, software.requires) == (("subgroup-size-32",), ("subgroup-size-8",))
    there = read("vulkan", 0, DUMP.format(size=8, least=8, most=8, stages="30", control="yes"), "")
    monkeypatch.setattr(devices, "find", lambda _: there)
    facts = HostFacts("x86_64", frozenset(), "3.13.0", None, "here", devices.lacks)
    row = {"artifact": "a", "runtime": "3.13.0"}
    assert refusal({**row, "target_body": plain(software)}, facts) == ""
    told = refusal({**row, "target_body": plain(ampere)}, facts)
    assert "none that runs it: llvmpipe (LLVM 15.0.6, 256 bits) lacks subgroup-size-32, it has subgroup-size-8" in told
    assert runs_here(ampere).startswith("no: llvmpipe")
    assert runs_here(software) == "not checked: llvmpipe (LLVM 15.0.6, 256 bits)"


def test_dispatches_say_for_which_subgroups_they_are(tmp_path: Path) -> None:
    source, configured = tmp_path / "front.mlir", tmp_path / "configured.mlir"
    (tmp_path / "m.mlir").write_text(iree.MATVEC)
    target, limits = TARGETS["vulkan-ampere"], Limits(60)
    assert phases.front(tmp_path / "m.mlir", source, tmp_path / "told.json", target, POINT, limits) is None
    assert phases.configure(source, configured, target, POINT, limits, text=True) is None
    text = configured.read_text()
    assert "SubgroupReduce" in text and "subgroup_size = 32" not in text  # else `subgroups.said` is needed no more
    assert "subgroup_size = 32" in subgroups.said(text)


@given(st.sampled_from((8, 16, 32, 64)), st.lists(st.sampled_from(("SubgroupReduce", "BaseVectorize")), max_size=5))
def test_only_sums_over_subgroups_depend_on_their_size_and_say_it_once(size: int, pipelines: list[str]) -> None:
    lines = [f"<pipeline = #iree_gpu.spirv_pipeline<{p}> workgroup_size = [64, 1, 1]>" for p in pipelines]
    text = "\n".join([f"subgroup_size_choices = [{size}, 128]", *lines])
    once = subgroups.said(text)
    assert once.count(f"subgroup_size = {size}>") == pipelines.count("SubgroupReduce")
    assert subgroups.said(once) == once


# --- on a device -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target() -> Target:
    """A target whose code the device here runs."""
    there = [resolve(t) for t in TARGETS.values() if t.backend == VULKAN]
    able = [t for t in there if not devices.lacks("vulkan", t.requires)]
    if not able:
        pytest.skip(f"no target is for this Vulkan device: {devices.find('vulkan')}")
    return able[0]


def compiled(module: bytes, target: Target, catalog: Catalog) -> Path:
    """Compile a module and return its artifact."""
    compiling = Compiling(catalog, target, "test", Limits(120), lambda _: False)
    made = compiling.compile(catalog.blobs.put_bytes(module), POINT)
    assert isinstance(made, Artifact), made
    return catalog.blobs.path(made.digest)


def greedy(session: Session, prompt: list[int], count: int) -> list[int]:
    """Return the tokens after the prompt."""
    found = [session.prefill(prompt)]
    while len(found) < count:
        found.append(session.decode(found[-1], len(prompt) + len(found) - 1))
    return found


@on_a_device
@pytest.mark.parametrize("form", [pytest.param("f32", marks=pytest.mark.exhaustive), "int4_g64"])
def test_a_decoder_on_a_vulkan_device_agrees_with_torch_and_with_the_cpu(
    tmp_path: Path, target: Target, form: str
) -> None:
    model = tiny.write(tmp_path / "model", num_hidden_layers=1, intermediate_size=128)
    abi = import_model(ImportJob(str(model), 64, choices=(("weight_format", form),)), tmp_path).program.abi
    module, parameters = (tmp_path / "module.mlirbc").read_bytes(), tmp_path / "parameters.irpa"
    catalog = Catalog(tmp_path / "catalog")
    session = Session(compiled(module, target, catalog), parameters, abi, Settings("vulkan", 0))
    with np.load(tmp_path / "check.npz") as data:
        prompt, forced = (list(map(int, data[name].ravel())) for name in ("prompt", "forced"))
        expected = data["logits"].reshape(len(forced) + 1, -1)
    np.testing.assert_allclose(answers(session, prompt, forced), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    kept = session.logits()
    tokens = greedy(session, prompt, 8)
    assert not np.array_equal(kept, session.logits())
    session.close()
    if form == "f32":
        cpu = Session(compiled(module, resolve(TARGETS["x86-64-v2"]), catalog), parameters, abi, Settings("local-sync"))
        assert greedy(cpu, prompt, 8) == tokens
    catalog.close()


@on_a_device
def test_the_runtime_refuses_code_for_subgroups_that_the_device_does_not_make(tmp_path: Path) -> None:
    had = devices.find("vulkan").features or frozenset()
    foreign = next(n for n in (32, 64, 16) if f"subgroup-size-{n}" not in had)
    body = plain(TARGETS["vulkan-llvmpipe"])
    told = json.dumps(body["attribute"]).replace("subgroup_size_choices = [8]", f"subgroup_size_choices = [{foreign}]")
    other = replace(TARGETS["vulkan-llvmpipe"], attribute=json.loads(told))
    catalog = Catalog(tmp_path / "catalog")
    model = tiny.write(tmp_path / "model", num_hidden_layers=1)
    abi = import_model(ImportJob(str(model), 32), tmp_path).program.abi
    artifact = compiled((tmp_path / "module.mlirbc").read_bytes(), other, catalog)
    with pytest.raises(LoadRefused, match=f"requires subgroup size {foreign} outside device range"):
        Session(artifact, tmp_path / "parameters.irpa", abi, Settings("vulkan", 0))
    catalog.close()
