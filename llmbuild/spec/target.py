"""Targets of the compiler."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.spec.space import Value

HOST = "host"

LLVM_CPU, CUDA, ROCM, VULKAN, METAL = "llvm-cpu", "cuda", "rocm", "vulkan-spirv", "metal-spirv"


@dataclass(frozen=True)
class Backend:
    """Common properties of all targets of one compiler backend.

    `device` is the device URI in IREE's runtime; `meters` are the energy sources for such devices, the best first.
    """

    device: str
    arches: tuple[str, ...]
    meters: tuple[str, ...] = ()


_NVML = ("nvml_counter", "nvml_polled")

BACKENDS: dict[str, Backend] = {
    LLVM_CPU: Backend("local-task", ("x86_64", "aarch64"), ("rapl",)),
    CUDA: Backend("cuda", ("nvptx64",), _NVML),
    ROCM: Backend("hip", ("amdgcn",)),
    VULKAN: Backend("vulkan", ("spirv",), _NVML),
    METAL: Backend("metal", ("spirv",)),
}
"""With the compiler's names."""


@dataclass(frozen=True)
class Target:
    """A named kind of hardware. `arch`, `cpu` and `features` are LLVM's names; a resolved target never contains
    `host`.

    `requires` are the CPU features that a host must have before an artifact of this target may be opened. `device` is
    its device URI and `meters` its energy sources. `attribute` is the whole device attribute where the compiler has no
    name for the chip. `knobs` narrows the search for this target. `subgroup` is the compiler's subgroup size in lanes:
    0 for a CPU.
    """

    name: str
    backend: str
    arch: str
    cpu: str
    features: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    description: str = ""
    device: str = ""
    meters: tuple[str, ...] = ()
    attribute: str = ""
    knobs: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    subgroup: int = 0

    @property
    def is_cpu(self) -> bool:
        """Whether the host's own processor runs its artifacts."""
        return self.backend == LLVM_CPU

    def identity(self) -> dict[str, object]:
        """Return the inputs of code generation; names, descriptions and the device are not among them."""
        named: dict[str, object] = {
            "backend": self.backend,
            "arch": self.arch,
            "cpu": self.cpu,
            "features": sorted(self.features),
            "requires": sorted(self.requires),
        }
        return {**named, "attribute": self.attribute} if self.attribute else named


def target_from(body: dict[str, object]) -> Target:
    """Return a target from its JSON form."""
    lists: dict[str, object] = {k: tuple(v) for k, v in body.items() if isinstance(v, list) and k != "knobs"}
    narrowed = body.get("knobs") or ()
    assert isinstance(narrowed, list | tuple)
    knobs = tuple((str(name), tuple(values)) for name, values in narrowed)
    return Target(**{**body, **lists, "knobs": knobs})  # type: ignore[arg-type]
