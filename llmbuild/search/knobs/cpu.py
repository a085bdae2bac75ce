"""Knobs of llvm-cpu: code generation after the front half, and run time."""

from __future__ import annotations

from llmbuild.search.knobs.program import LEVELS, knob
from llmbuild.spec.space import TUNING, UNTUNED, Condition, Knob

CPU = ("llvm-cpu",)

KNOBS: tuple[Knob, ...] = (
    Knob("distribution_size", "codegen", (64, 16, 32, 128), 64, "rows a work-group takes", backends=CPU),
    knob("vector_width", (0, 16, 32, 64), "bytes of a vector register the code is made for; 0: the widest", CPU),
    knob("tails", ("auto", "peel", "mask", "none"), "what becomes of a loop's end that fills no vector", CPU),
    knob(
        "reassociate", ("level", "true", "false"), "sum in any order, so that sums fill vectors; level: from O2 on", CPU
    ),
    knob("slp_vectorize", (False, True), "LLVM joins scalar operations into vectors", CPU),
    knob("loop_vectorize", (False, True), "LLVM vectorizes the loops MLIR left", CPU),
    knob("loop_unroll", (False, True), "LLVM unrolls loops", CPU),
    knob("loop_interleave", (False, True), "LLVM interleaves iterations", CPU),
    knob("codegen_threads", (8, 1, 2, 4, 16, 32), "workers the code is cut for", CPU),
    knob("matmul_tile_bytes", (262144, 65536, 131072, 524288), "bytes of a packed operand a work-group takes", CPU),
    knob("native_vectors", (512, 128, 256, 1024), "vector registers one vector may span", CPU),
    knob("stack_limit", (32768, 65536, 131072), "bytes of stack a dispatch may use", CPU),
    knob("codegen_level", ("same", *LEVELS), "optimization level of code generation, where it is not opt_level", CPU),
    knob("fast_min_max", (False, True), "minimum and maximum that ignore NaN", CPU),
    knob("softmax_fuse", (True, False), "fuse the parts of a softmax", CPU),
    knob("skip_roundings", (True, False), "keep f32 between operations of a narrower type", CPU),
    knob("block_dynamic", (True, False), "cut dynamic dimensions of products into blocks", CPU),
    knob(
        "ukernels",
        ("default", "none", "all"),
        "hand-written microkernels; default: where data is tiled",
        CPU,
        when=(Condition("kernel", ("compiler",)),),
    ),
    Knob(
        "scalable",
        "codegen",
        (False, True),
        False,
        "vectors of a length the CPU decides (SVE)",
        backends=CPU,
        features=((True, ("sve",)),),
        searched=(False,),
    ),
    Knob(
        TUNING,
        "codegen",
        (UNTUNED,),
        UNTUNED,
        "configurations of single dispatches: none, or what `llmbuild tune` found in this catalog, by digest",
        when=(Condition("kernel", ("compiler",)), Condition("data_tiling", ("off",))),
        backends=CPU,
    ),
    Knob(
        "driver",
        "runtime",
        ("local-task", "local-sync"),
        "local-task",
        "IREE's CPU driver: threads, or the caller's",
        backends=CPU,
    ),
    Knob(
        "workers",
        "runtime",
        (0, 1, 2, 4, 8, 16),
        0,
        "worker threads; 0 is one for each physical core",
        when=(Condition("driver", ("local-task",)),),
        backends=CPU,
        searched=(0, 1),
    ),
)
