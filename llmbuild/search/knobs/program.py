"""Knobs of the whole program, for every target: code generation settings that need a new front half of a compile."""

from __future__ import annotations

from llmbuild.spec.space import Condition, Knob, Level, Value

LEVELS = ("O0", "O1", "O2", "O3")
TILED = ("llvm-cpu", "rocm")
"""Backends where data tiling has an effect; on cuda and vulkan it changes nothing."""


def knob(
    name: str,
    domain: tuple[Value, ...],
    meaning: str,
    backends: tuple[str, ...] = (),
    when: tuple[Condition, ...] = (),
    level: Level = "codegen",
) -> Knob:
    """Return a knob whose default only is searched, unless a recipe names values or `all`."""
    return Knob(name, level, domain, domain[0], meaning, when, backends, searched=domain[:1])


KNOBS: tuple[Knob, ...] = (
    Knob("opt_level", "codegen", LEVELS, "O0", "--iree-opt-level"),
    Knob(
        "data_tiling",
        "codegen",
        ("off", "dispatch", "global"),
        "off",
        "let the compiler pack the weights when the module is loaded",
        when=(Condition("kernel", ("compiler",)), Condition("layout", ("row_major",))),
        backends=TILED,
    ),
    Knob("split_reduction", "codegen", (False, True), False, "split long reductions into two dispatches"),
    knob("fusion_level", ("same", *LEVELS), "optimization level of forming dispatches, where it is not opt_level"),
    knob("global_level", ("same", *LEVELS), "optimization level of whole-program rewrites, where it is not opt_level"),
    knob("split_matmul", (1, 2, 4, 8), "pieces a matrix product's reduction is split into"),
    knob("horizontal", (False, True), "products of one operand in one dispatch: QKV, gate and up"),
    knob("multi_use", (True, False), "fuse what has several users into each of them"),
    knob("early_trunc", (False, True), "fuse truncations with their consumers before forming dispatches"),
    knob("reshapes", (False, True), "move reshapes out of the way of fusion"),
    knob("collapse", (False, True), "move collapses across expansions; part of AMD's serving recipe"),
    knob("v_transpose", (True, False), "attention reads V transposed"),
    knob("demote", ("none", "f16", "bf16"), "narrow the operands of matrix products; changes the results"),
    knob(
        "reassociate_quantized",
        (False, True),
        "integer arithmetic for products with grouped scales; changes the results",
    ),
    knob("index_bits", (64, 32), "width of buffer offsets; 32 where every buffer is below 4 GiB"),
    knob("partitioning", ("min-peak-memory", "max-concurrency"), "what the schedule favours"),
    knob("memory_model", ("unified", "discrete"), "memory of host and device; discrete for GPUs of their own"),
    knob("memoization", (True, False), "keep recorded command buffers between calls"),
    knob("initialization", ("sync", "async"), "return from loading before or after parameters are ready"),
    knob(
        "preprocessing",
        ("none", "transpose", "generalize", "pad", "intrinsics"),
        "pass pipeline before all else: transpose or generalize products, pad them to 16 or to the target's intrinsics",
    ),
)
