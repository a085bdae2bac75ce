"""Knobs of the model level: a change costs an import."""

from __future__ import annotations

from llmbuild.kernels.kept import CACHES
from llmbuild.kernels.layouts import ACTIVATIONS, ALLOCATIONS, UNIFORM
from llmbuild.kernels.layouts import FORMATS as OWN_FORMATS
from llmbuild.kernels.matvec import FORMATS as GPU_FORMATS
from llmbuild.kernels.matvec import ROW_READS, ROW_TILES
from llmbuild.spec.formats import INTEGERS, SAME, WEIGHT_FORMATS
from llmbuild.spec.space import Condition, Knob
from llmbuild.spec.target import BACKENDS, LLVM_CPU

GPUS = tuple(backend for backend in BACKENDS if backend != LLVM_CPU)

KNOBS: tuple[Knob, ...] = (
    Knob(
        "weight_format",
        "model",
        WEIGHT_FORMATS,
        "f32",
        "type of the weight matrices; _gN: a scale for each N inputs of a row, else for the row; s8: scales of a byte, "
        "times a power of two for each row; int4a: with zeros; "
        "f12_e4m7: bf16 with 4 bits of exponent below that of the row's largest; q8_0, q4_0, q4_1: blocks as in GGUF",
        searched=("f32", "f16", "int8", "int4_g128", "int4a_g64"),
    ),
    Knob(
        "head_format",
        "model",
        (SAME, *WEIGHT_FORMATS),
        SAME,
        "type of the output matrix and the token table",
        searched=(SAME, "int8"),
    ),
    Knob(
        "quantization",
        "model",
        ("rtn", "gptq"),
        "rtn",
        "how weights become integers: each to the nearest, or for the calibration text",
        when=(Condition("weight_format", tuple(INTEGERS)),),
    ),
    Knob(
        "scaling",
        "model",
        ("none", "activation"),
        "none",
        "scale channels between layers so that rounding them costs less on the calibration text",
        when=(Condition("weight_format", tuple(INTEGERS)),),
    ),
    Knob(
        "mixed",
        "model",
        ("none", "sensitive"),
        "none",
        "keep the quarter of the weights in int8 whose rounding the calibration text shows most",
        when=(
            Condition(
                "weight_format", tuple(name for name, form in INTEGERS.items() if form.bits == 4 and not form.is_block)
            ),
        ),
    ),
    Knob(
        "kv_dtype",
        "model",
        CACHES,
        "f32",
        "element type of the KV cache; int8 and int4 have scales for each position and head; k8v4: keys as int8, "
        "values as int4; k8v4 and int4 are for our kernels alone",
        backends=(LLVM_CPU,),
        searched=("f32", "f16", "int8"),
    ),
    Knob(
        "kv_dtype",
        "model",
        ("f32", "f16", "int8"),
        "f32",
        "element type of the KV cache; int8 has a scale for each position and head",
        backends=GPUS,
    ),
    Knob("layout", "model", ("row_major", "packed"), "row_major", "order of the weights in the parameter archive"),
    Knob(
        "kernel",
        "model",
        ("compiler", "own"),
        "compiler",
        "who generates the matrix products: IREE, or our MLIR kernels",
        when=(
            Condition("weight_format", OWN_FORMATS),
            Condition("head_format", (SAME, *OWN_FORMATS)),
            Condition("mixed", ("none",)),
            Condition("kv_dtype", CACHES),
            Condition("layout", ("packed",)),
        ),
        backends=(LLVM_CPU,),
    ),
    Knob(
        "kernel",
        "model",
        ("compiler", "own"),
        "compiler",
        "who generates the matrix products of a decode step: IREE, or our MLIR kernels",
        when=(Condition("weight_format", GPU_FORMATS), Condition("layout", ("row_major",))),
        backends=GPUS,
    ),
    Knob(
        "row_tile",
        "model",
        ROW_TILES,
        ROW_TILES[0],
        "rows that lanes of our kernels sum at a time, and subgroups of a work-group",
        when=(Condition("kernel", ("own",)),),
        backends=GPUS,
        searched=ROW_TILES[:1],
    ),
    Knob(
        "row_reads",
        "model",
        ROW_READS,
        ROW_READS[0],
        "bytes that lanes of our kernels read at a time: narrow is 4 of int4 and 8 of int8, wide 16 of each, for which "
        "another dispatch arranges what they are multiplied by",
        when=(Condition("kernel", ("own",)),),
        backends=GPUS,
        searched=ROW_READS[:1],
    ),
    Knob(
        "activations",
        "model",
        ACTIVATIONS,
        ACTIVATIONS[0],
        "what our kernels round the vectors to that integer weights are multiplied by, in blocks of 32 or 64 numbers; "
        "int16: two bytes, of which 15 bits are used; mixed: two bytes for q, k, v and the output matrix, where "
        "rounding does most harm for its time",
        when=(
            Condition("kernel", ("own",)),
            Condition("weight_format", tuple(f for f in OWN_FORMATS if f in INTEGERS)),
        ),
        backends=(LLVM_CPU,),
    ),
    Knob(
        "allocation",
        "model",
        tuple(ALLOCATIONS),
        UNIFORM,
        "bits of each matrix of each layer: all alike, or shared out by what the calibration text shows that rounding "
        "each does; as many in the mean as the format has, or half a bit more",
        when=(
            Condition("kernel", ("own",)),
            Condition("weight_format", tuple(f for f in OWN_FORMATS if f in INTEGERS and INTEGERS[f].has_sides)),
        ),
        backends=(LLVM_CPU,),
        searched=(UNIFORM,),
    ),
    Knob(
        "work_groups",
        "model",
        (1, 2, 4, 8, 16, 32, 64),
        1,
        "pieces our kernels cut a layer into; one for each worker is enough",
        when=(Condition("kernel", ("own",)),),
        backends=(LLVM_CPU,),
    ),
)
