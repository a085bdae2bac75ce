"""Options that are left out of the space, and why: they waste trials or crash."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.spec.space import Value


@dataclass(frozen=True)
class Trap:
    """An option that is never searched and cannot be pinned."""

    choice: str
    backends: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Broken:
    """A value of a knob that the compiler fails on for some backends: refused before a compile."""

    knob: str
    value: Value
    backends: tuple[str, ...]
    reason: str


BROKEN: tuple[Broken, ...] = (
    Broken(
        "kv_dtype",
        "f16",
        ("vulkan-spirv", "metal-spirv"),
        "the compiler does not terminate on a decode step's product of attention and values",
    ),
)


def broken(backend: str, knob: str) -> dict[Value, str]:
    """Return the values of a knob that the compiler fails on for a backend, and why."""
    return {b.value: b.reason for b in BROKEN if b.knob == knob and backend in b.backends}


TRAPS: tuple[Trap, ...] = (
    Trap(
        "--iree-llvmcpu-enable-inner-tiled",
        ("llvm-cpu",),
        "the compiler crashes with data_tiling=dispatch and fails with global on bf16 vectors",
    ),
    Trap(
        "data_tiling dispatch and global together",
        ("llvm-cpu", "rocm"),
        "two paths to the same packing; the second would pack the packed data again",
    ),
    Trap("data_tiling", ("cuda", "vulkan-spirv"), "these backends do not pack: no effect"),
    Trap("two rows per tile in a matrix-vector product", ("llvm-cpu",), "slow: 2.5 GB/s, with 1 row 21 GB/s"),
    Trap("int4 dequantized in f16", ("llvm-cpu",), "f16 arithmetic is emulated: four times slower than in f32"),
    Trap(
        "--iree-torch-emit-async-entry-points=false",
        (),
        "entry points without fences cannot take the mutable KV cache",
    ),
    Trap("masks of minus infinity", (), "fully masked rows become NaN; llmbuild's masks are finite"),
    Trap(
        "--iree-cuda-target=sm_90",
        ("cuda",),
        "the compiler knows no sm_90: use sm_80 or sm_89, or a custom target",
    ),
    Trap(
        "shared-memory-limit, matmul-c-matrix-threshold",
        ("cuda", "rocm"),
        "no byte of a small decoder's code changed, nor with vectorize-pipeline, split-argmax-threshold, "
        "split-reduction-low-parallelism",
    ),
    Trap("--iree-rocm-llvm-global-isel", ("rocm",), "LLVM aborts in its register banks on a plain matrix product"),
    Trap("scaled_dot_product_attention", ("vulkan-spirv",), "does not compile: attention is decomposed there"),
    Trap("bf16 prompts", ("vulkan-spirv",), "cooperative matrices of bf16 do not compile: use promote_bf16"),
    Trap(
        "slice assignment into the KV cache",
        (),
        "becomes a slow copy and a read-back in every step; llmbuild uses index_put_",
    ),
    Trap(
        "--iree-opt-const-eval=false, assertions, debug symbols, source maps",
        (),
        "not choices: fixed, so that equal code has equal bytes",
    ),
    Trap(
        "--iree-execution-model other than async-external",
        (),
        "inline models cannot take functions with mutable arguments",
    ),
)
