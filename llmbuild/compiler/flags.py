"""From a target and a point to the flags of iree-compile; only this module names flags.

A flag is data: its knob, the text of a value, and the phase in which the compiler reads it. The phase decides the cost
of a change: a flag of the front half requires a whole new compile; the others share the front half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmbuild.spec.space import Value
from llmbuild.spec.target import CUDA, HOST, METAL, ROCM, VULKAN, Target

Phase = Literal["front", "target", "configure", "translate", "emit"]
"""When a flag is read: in the front half (and perhaps later too); when the executable target is written, as an
attribute of the front half's result that can be edited; when dispatches are configured; when they are translated to
LLVM; `emit`: an attribute as those of `target`, but not read before LLVM makes machine code.
"""

TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}

HYGIENE = (
    "--iree-llvmcpu-debug-symbols=false",
    "--iree-hal-executable-debug-level=0",
    "--iree-vm-bytecode-module-strip-source-map=true",
    "--iree-vm-emit-polyglot-zip=false",
)
"""Flags that keep file names and debug data out of the artifact, so that equal code has equal bytes."""

UNVERIFIED = "--verify=false"
"""Leaves out that the compiler checks its own text after each pass: a quarter of a compile for a CPU, the same bytes.

What runs on a CPU here is held against check data when it is measured. Code for other devices may never be run here, so
the compiler's own checks stay.
"""


@dataclass(frozen=True)
class Flag:
    """The flag of a knob.

    `text` holds `{}` for the value; `said` maps some values to other texts, an empty text to no flag. `default` is the
    value at which the flag is left out. `key` is the attribute of the executable target that a flag of the phase
    `target` or `emit` sets.
    """

    knob: str
    text: str
    default: Value
    phase: Phase
    key: str = ""
    said: tuple[tuple[Value, str], ...] = ()

    def of(self, value: Value) -> str:
        """Return the flag for a value, empty at the default."""
        told = dict(self.said)
        if value == self.default and isinstance(value, bool) == isinstance(self.default, bool):
            return ""
        if value in told:
            return told[value]
        return self.text.format(str(value).lower() if isinstance(value, bool) else value)


_PIPELINES: tuple[tuple[Value, str], ...] = tuple(
    (name, f"--iree-preprocessing-pass-pipeline=builtin.module(util.func({passes}))")
    for name, passes in (
        ("transpose", "iree-preprocessing-transpose-matmul-pass{input=lhs}"),
        ("generalize", "iree-preprocessing-generalize-linalg-matmul-experimental"),
        ("pad", "iree-preprocessing-pad-linalg-ops{pad-size=16}"),
        ("intrinsics", "iree-preprocessing-pad-to-intrinsics"),
    )
)

FLAGS: tuple[Flag, ...] = (
    # the whole program
    Flag("opt_level", "--iree-opt-level={}", "O0", "front"),
    Flag("fusion_level", "--iree-dispatch-creation-opt-level={}", "same", "front"),
    Flag("global_level", "--iree-global-optimization-opt-level={}", "same", "front"),
    Flag(
        "data_tiling",
        "",
        "off",
        "front",
        said=(("dispatch", "--iree-opt-data-tiling=true"), ("global", "--iree-global-opt-data-tiling=true")),
    ),
    Flag("split_reduction", "--iree-dispatch-creation-enable-split-reduction={}", False, "front"),
    Flag("split_matmul", "--iree-dispatch-creation-split-matmul-reduction={}", 1, "front"),
    Flag("horizontal", "--iree-dispatch-creation-enable-fuse-horizontal-contractions={}", False, "front"),
    Flag("multi_use", "--iree-dispatch-creation-fuse-multi-use={}", True, "front"),
    Flag("early_trunc", "--iree-dispatch-creation-enable-early-trunc-fusion={}", False, "front"),
    Flag("reshapes", "--iree-dispatch-creation-enable-aggressive-reshape-movement={}", False, "front"),
    Flag("collapse", "--iree-dispatch-creation-propagate-collapse-across-expands={}", False, "front"),
    Flag("v_transpose", "--iree-global-opt-enable-attention-v-transpose={}", True, "front"),
    Flag("demote", "--iree-global-opt-demote-contraction-inputs-type={}", "none", "front"),
    Flag("reassociate_quantized", "--iree-global-opt-enable-quantized-matmul-reassociation={}", False, "front"),
    Flag("index_bits", "--iree-stream-resource-index-bits={}", 64, "front"),
    Flag("partitioning", "--iree-stream-partitioning-favor={}", "min-peak-memory", "front"),
    Flag("memory_model", "--iree-stream-resource-memory-model={}", "unified", "front"),
    Flag("memoization", "--iree-hal-memoization={}", True, "front"),
    Flag("initialization", "--iree-scheduling-initialization-mode={}", "sync", "front"),
    Flag("preprocessing", "", "none", "front", said=_PIPELINES),
    # llvm-cpu
    Flag("ukernels", "--iree-llvmcpu-enable-ukernels={}", "default", "target", "ukernels"),
    Flag("vector_width", "--iree-llvmcpu-target-vector-width-in-bytes={}", 0, "target", "native_vector_size"),
    Flag("slp_vectorize", "--iree-llvmcpu-slp-vectorization={}", False, "emit", "slp_vectorization"),
    Flag("loop_vectorize", "--iree-llvmcpu-loop-vectorization={}", False, "emit", "loop_vectorization"),
    Flag("loop_unroll", "--iree-llvmcpu-loop-unrolling={}", False, "emit", "loop_unrolling"),
    Flag("loop_interleave", "--iree-llvmcpu-loop-interleaving={}", False, "emit", "loop_interleaving"),
    Flag("stack_limit", "--iree-llvmcpu-stack-allocation-limit={}", 32768, "target", "max_stack_allocation_size"),
    Flag("distribution_size", "--iree-llvmcpu-distribution-size={}", 64, "configure"),
    Flag("codegen_threads", "--iree-llvmcpu-number-of-threads={}", 8, "configure"),
    Flag("matmul_tile_bytes", "--iree-llvmcpu-matmul-tile-bytes={}", 262144, "configure"),
    Flag("native_vectors", "--iree-llvmcpu-max-allowed-number-of-native-vectors={}", 512, "translate"),
    Flag("tails", "--iree-llvmcpu-vector-pproc-strategy={}", "auto", "translate"),
    Flag("reassociate", "--iree-llvmcpu-reassociate-fp-reductions={}", "level", "translate"),
    Flag("codegen_level", "--iree-llvmcpu-mlir-opt-level={}", "same", "translate"),
    Flag("fast_min_max", "--iree-llvmcpu-use-fast-min-max-ops={}", False, "translate"),
    Flag("softmax_fuse", "--iree-llvmcpu-use-decompose-softmax-fuse={}", True, "translate"),
    Flag("skip_roundings", "--iree-llvmcpu-skip-intermediate-roundings={}", True, "translate"),
    Flag("block_dynamic", "--iree-codegen-block-dynamic-dimensions-of-contractions={}", True, "translate"),
    Flag("scalable", "--iree-llvmcpu-enable-scalable-vectorization={}", False, "translate"),
    # GPUs
    Flag("default_specs", "--iree-codegen-enable-default-tuning-specs={}", False, "translate"),
    Flag("tile_and_fuse", "--iree-codegen-llvmgpu-use-tile-and-fuse-matmul={}", True, "translate"),
    Flag("vector_distribution", "--iree-codegen-llvmgpu-use-vector-distribution={}", True, "translate"),
    Flag("reduction_distribution", "--iree-codegen-llvmgpu-use-reduction-vector-distribution={}", True, "translate"),
    Flag("prefetch_stages", "--iree-llvmgpu-prefetch-num-stages={}", "auto", "translate"),
    Flag("shared_memory_reuse", "--iree-llvmgpu-enable-shared-memory-reuse={}", False, "translate"),
    Flag("direct_load", "--iree-llvmgpu-use-direct-load={}", "auto", "translate"),
    Flag("workgroup_order", "--iree-codegen-reorder-workgroups-strategy={}", "auto", "translate"),
    Flag("indirect_commands", "--iree-hal-indirect-command-buffers={}", True, "front"),
    Flag("alias_bindings", "--iree-stream-resource-alias-mutable-bindings={}", False, "front"),
    Flag("ptx", "--iree-cuda-target-features={}", "+ptx76", "front"),
    Flag("encoding_layout", "--iree-rocm-encoding-layout-resolver={}", "data-tiling", "front"),
    Flag("tensor_ukernels", "--iree-rocm-enable-tensor-ukernels={}", False, "front"),
    Flag("specialize", "--iree-rocm-specialize-dispatches={}", False, "front"),
    Flag("waves_per_eu", "--iree-rocm-waves-per-eu={}", 0, "front"),
    Flag("rocm_slp", "--iree-rocm-llvm-slp-vec={}", True, "front"),
    Flag("buffer_instructions", "--iree-rocdl-enable-buffer-instructions={}", True, "translate"),
    Flag("denormals", "--iree-rocm-denormal-fp-math-f32={}", "kept", "front"),
    Flag("dispatch_abi", "--iree-vulkan-dispatch-abi={}", "descriptors", "front"),
    Flag("spirv_index_bits", "--iree-spirv-index-bits={}", 32, "translate"),
    Flag("promote_bf16", "--iree-input-promote-bf16-to-f32={}", False, "front"),
)
"""In command-line order; a knob of the code generation level has exactly one."""


_CHIP = {
    CUDA: ("--iree-hal-target-device=cuda", "--iree-cuda-target={}"),
    ROCM: ("--iree-hal-target-device=hip", "--iree-rocm-target={}"),
    VULKAN: ("--iree-hal-target-device=vulkan", "--iree-vulkan-target={}"),
    METAL: (
        "--iree-hal-target-device=metal",
        "--iree-metal-target-platform={}",
        "--iree-metal-compile-to-metallib=false",  # the driver translates the source when loading: no SDK is needed
    ),
}
"""The flag that names a GPU; `{}` is the target's `cpu`."""

_FEATURES = {ROCM: "--iree-rocm-target-features={}", VULKAN: "--iree-vulkan-target-features={}"}


def target_flags(target: Target) -> list[str]:
    """Return the flags that name the hardware."""
    if target.attribute:
        return [f"--iree-hal-target-device={target.attribute}"]
    if not target.is_cpu:
        told = [_FEATURES[target.backend].format(",".join(target.features))] if target.features else []
        return [*(flag.format(target.cpu) for flag in _CHIP[target.backend]), *told]
    flags = [
        "--iree-hal-target-device=local",
        f"--iree-hal-local-target-device-backends={target.backend}",
        f"--iree-llvmcpu-target-cpu={target.cpu}",
    ]
    if target.cpu != HOST:
        flags.append(f"--iree-llvmcpu-target-triple={TRIPLES[target.arch]}")
    if target.features:
        flags.append(f"--iree-llvmcpu-target-cpu-features={','.join(target.features)}")
    return flags


def point_flags(point: Mapping[str, Value], *phases: Phase) -> list[str]:
    """Return the flags of the code generation level of a point, of these phases; by default of all.

    Only differences from the compiler's own defaults are included, so that point 0 is a plain call. A knob that the
    point does not have is left at the default.
    """
    return [
        text
        for flag in FLAGS
        if flag.knob in point and (not phases or flag.phase in phases) and (text := flag.of(point[flag.knob]))
    ]


def attributes(point: Mapping[str, Value], phase: Phase = "target") -> dict[str, Value]:
    """Return the attributes of the executable target, with values, that the flags of phase `target` or `emit` set."""
    return {
        flag.key: point[flag.knob]
        for flag in FLAGS
        if flag.phase == phase and flag.knob in point and flag.of(point[flag.knob])
    }


def shared_flags(target: Target) -> list[str]:
    """Return the flags of every phase of every compile."""
    return [*HYGIENE, UNVERIFIED] if target.is_cpu else [*HYGIENE]


def compile_flags(target: Target, point: Mapping[str, Value]) -> list[str]:
    """Return every flag but the file names."""
    return [*target_flags(target), *point_flags(point), *shared_flags(target)]
