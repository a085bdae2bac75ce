"""Knobs of cuda, rocm, vulkan and metal: the values that compile for them; their speed is not known in advance."""

from __future__ import annotations

from llmbuild.search.knobs.program import knob
from llmbuild.spec.space import AUTO, MATVEC, Condition, Knob, Value

CUDA, ROCM, VULKAN, METAL = ("cuda",), ("rocm",), ("vulkan-spirv",), ("metal-spirv",)
LLVMGPU, SPIRV = (*CUDA, *ROCM), (*VULKAN, *METAL)
GPUS = (*LLVMGPU, *SPIRV)
TILED = Condition("data_tiling", ("dispatch",))

GPU_DRIVERS = ("cuda", "hip", "vulkan", "metal")

_HALF: dict[str, Value] = {"opt_level": "O2", "kv_dtype": "f16", "memory_model": "discrete"}

FIRST: tuple[dict[str, Value], ...] = (
    {**_HALF, "weight_format": "f16"},
    {**_HALF, "weight_format": "f16", "opt_level": "O3", "demote": "f16", "default_specs": True},
    {**_HALF, "weight_format": "f16", "matvec": "8x4"},
    {**_HALF, "weight_format": "bf16"},
    {**_HALF, "weight_format": "int8"},
    {**_HALF, "weight_format": "int8", "matvec": "8x4"},
    {**_HALF, "weight_format": "int4_g64", "head_format": "int8"},
    {**_HALF, "weight_format": "f16", "kernel": "own"},
    {**_HALF, "weight_format": "int8", "kernel": "own"},
    {**_HALF, "weight_format": "int8", "kernel": "own", "row_reads": "wide"},
    {**_HALF, "weight_format": "int4_g64", "head_format": "int8", "kernel": "own"},
    {**_HALF, "weight_format": "int4_g64", "head_format": "int8", "kernel": "own", "row_reads": "wide"},
)
"""Points tried right after point 0, one for each weight format. None is measured on a GPU yet: they compile, and are
what vendors start from. A value that a target lacks keeps its default.
"""

KNOBS: tuple[Knob, ...] = (
    knob("tile_and_fuse", (True, False), "matrix products through the TileAndFuse pipeline", LLVMGPU),
    knob("vector_distribution", (True, False), "matrix products and attention through VectorDistribute", LLVMGPU),
    knob("reduction_distribution", (True, False), "reductions and matrix-vector products through it too", LLVMGPU),
    knob(
        MATVEC,
        (AUTO, "8x1", "8x4", "16x4", "32x1", "32x4"),
        "lanes for a row of a matrix-vector product, and subgroups of its work-group; auto is most often 1 row for all",
        LLVMGPU,
    ),
    knob("prefetch_stages", ("auto", 0, 2, 3), "stages of loading into shared memory ahead of use", LLVMGPU),
    knob("shared_memory_reuse", (False, True), "buffers of shared memory take turns in one place", LLVMGPU),
    knob("direct_load", ("auto", "true", "false"), "load into shared memory past the registers", ROCM),
    knob("workgroup_order", ("auto", "none", "transpose"), "order of work-groups, for the caches", LLVMGPU),
    knob("default_specs", (False, True), "tuning specs that ship with the compiler; there are some for gfx942", ROCM),
    knob("indirect_commands", (True, False), "record commands once, with buffers named at each call", GPUS),
    knob("alias_bindings", (False, True), "buffers that are written and lie in one allocation as one binding", GPUS),
    knob("ptx", ("+ptx76", "+ptx78", "+ptx80"), "PTX version; the driver translates it when loading", CUDA),
    knob("encoding_layout", ("data-tiling", "pad", "none"), "what data tiling packs for", ROCM, when=(TILED,)),
    knob("tensor_ukernels", (False, True), "microkernels written in MLIR; part of AMD's serving recipe", ROCM),
    knob("specialize", (False, True), "variants of a dispatch for ranges of its shapes", ROCM),
    knob("waves_per_eu", (0, 1, 2, 4), "waves an execution unit should hold at least; 0 leaves it open", ROCM),
    knob("rocm_slp", (True, False), "LLVM joins scalar operations into vectors", ROCM),
    knob("buffer_instructions", (True, False), "reads by buffer descriptors, which check bounds themselves", ROCM),
    knob("denormals", ("kept", "preserve-sign", "positive-zero"), "what f32 below the normal range becomes", ROCM),
    knob("dispatch_abi", ("descriptors", "bda", "all"), "how shaders find their buffers", VULKAN),
    knob("spirv_index_bits", (32, 64), "width of indices in shaders", SPIRV),
    knob("promote_bf16", (False, True), "f32 in place of bf16, which several drivers fail on", SPIRV),
    Knob("driver", "runtime", ("cuda",), "cuda", "IREE's driver", backends=CUDA),
    Knob("driver", "runtime", ("hip",), "hip", "IREE's driver", backends=ROCM),
    Knob("driver", "runtime", ("vulkan",), "vulkan", "IREE's driver", backends=VULKAN),
    Knob("driver", "runtime", ("metal",), "metal", "IREE's driver", backends=METAL),
    Knob("workers", "runtime", (0,), 0, "a GPU has none", backends=(*LLVMGPU, *SPIRV)),
)
