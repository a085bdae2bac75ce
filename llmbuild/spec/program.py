"""What the frontend makes: imported MLIR, its parameters, and what a caller must know to run them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmbuild.digest import OMITTED

PREFILL = "prefill"
"""`prefill(tokens i64[B,T], start i64[B], *kv) -> (next_tokens i64[B], logits f32[B,V])`, T dynamic, last logits.

B sequences are answered together, each in its part of the cache. With one sequence the logits are f32[V]."""

DECODE = "decode"
"""`decode(tokens i64[B], positions i64[B], *kv) -> (next_tokens i64[B], logits f32[B,V])`; f32[V] of one sequence."""

SCORE = "score"
"""`score(tokens i64[1,T], start i64[1], *kv) -> logits f32[T,V]`, T dynamic: the logits after every token, of one
sequence. Where `Abi.score` says so; the cache is then as after `prefill`."""

STEP = "step"
"""`step(tokens i64[T], positions i64[T], where i64[W], read i64[R], *kv) -> (next_tokens i64[R], logits f32[R,P])`: T
rows of any mix of sequences, one call for all. Where `Abi.page` is not 0.

The buffers `kv` are those of `Abi.kv` with any number of places in their first axis, in blocks of `page`, which the
caller shares out. `where` begins with `positions` again; then for each row, at which item of `where` its sequence's
table begins: the numbers of the blocks in which its positions are. Rows write their keys and values first; each then
sees the positions of its sequence up to its own. `read` names the rows that give logits; P is V or more, rounded up.
What a row gives depends on its own sequence alone, bit for bit, and is what `prefill` and `decode` give."""

PARAMETER_SCOPE = "model"
"""The scope under which a module names its parameters and a loader provides them."""


@dataclass(frozen=True)
class TensorType:
    """Shape and element type, as NumPy names it (`float32`, `float16`, `int8`)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Abi:
    """How to call a program: `kv` are the caller's cache buffers, updated in place, in the order of the arguments."""

    vocabulary: int
    context: int
    kv: tuple[TensorType, ...]
    eos_tokens: tuple[int, ...]
    parameters: int
    """Number of the model's weights, tied ones counted once."""
    batch: int = 1
    """Sequences that one call goes on with."""
    required_features: tuple[str, ...] = ()
    """CPU features that kernels inside the module need (`avx512vnni`), by LLVM's names."""
    score: bool = field(default=False, metadata=OMITTED)
    """Whether the module has `score`; programs of one sequence alone have it."""
    page: int = field(default=0, metadata=OMITTED)
    """Positions of a block of the cache of `step`; 0: the module has none."""


def cache_bytes(abi: Abi) -> int:
    """Return the bytes of the keys and values of one sequence: those of its whole context."""
    size = {"float32": 4, "float16": 2, "int8": 1}
    return sum(math.prod(kind.shape) * size[kind.dtype] for kind in abi.kv)


def abi_from(body: Mapping[str, Any]) -> Abi:
    """Return the call contract from its JSON form."""
    kv = tuple(TensorType(tuple(k["shape"]), k["dtype"]) for k in body["kv"])
    listed = {name: tuple(body.get(name, ())) for name in ("eos_tokens", "required_features")}
    return Abi(**{**body, **listed, "kv": kv})


@dataclass(frozen=True)
class Program:
    """Imported MLIR (bytecode), its parameter archive and its check data, each named by digest."""

    module: str
    parameters: str
    check: str
    """Digest of an `.npz` with what an artifact is held against: `prompt` i64[B,P], `forced` i64[B,D] tokens from the
    positions `start` i64[B] on, `logits` f32[1+D,B,V] after the prompts and after each forced token, and `noise` f32:
    how far these move, relative, when the token vectors move by a millionth. Where all is f32, the logits are those of
    the library's own untouched model; else what PyTorch says on the weights as they are stored."""
    abi: Abi


MODULE_FILE, PARAMETERS_FILE, CHECK_FILE, ABI_FILE = "module.mlirbc", "parameters.irpa", "check.npz", "abi.json"
"""What an import writes into its folder: MLIR bytecode, the weights, the check data and the `Abi` as canonical JSON."""

SIZES_FILE, TRUTH_FILE, SHELL_FILE = "sizes.json", "truth.npz", "shell.mlirbc"
"""What imports may share: the sizes of a module's tensors in bytes, what the library's own model says, and what is
around our own kernels."""


@dataclass(frozen=True)
class ImportJob:
    """What to import and how; the same job gives the same bytes.

    `choices` are model-level knobs and their values; a knob left out has its default:
    `weight_format` one of `formats.WEIGHT_FORMATS`, `head_format` same | one of these, `quantization` rtn | gptq,
    `scaling` none | activation, `mixed` none | sensitive, `layout` row_major | packed, `kernel` compiler | own,
    `kv_dtype` f32 | f16 | int8; of `own` kernels on a CPU `kv_dtype` k8v4 | int4 too, `activations` int8 | int16 |
    mixed: what vectors are rounded to that integers are multiplied by, `allocation` uniform | sensitive |
    sensitive+half: bits of each matrix, `work_groups` 2 | 1 | 4 ... 64: how many threads at most share the work;
    `row_tile` and `row_reads` how rows are shared out on a GPU.
    """

    model: str
    """A Hugging Face folder, or the id of a model on the hub."""
    context: int
    """Number of positions the cache buffers hold."""
    batch: int = 1
    """Sequences that are answered together."""
    random_init: bool = False
    """Take only the shape from the model's configuration; weights are drawn from `seed`."""
    seed: int = 0
    choices: tuple[tuple[str, str], ...] = ()
    features: tuple[str, ...] = ()
    """CPU features of the target by LLVM's names: a choice that needs one that is missing is refused."""
    subgroup: int = 0
    """Lanes of a subgroup of the target, a GPU, for `own` kernels; 0 for a CPU."""
    calibration: str = ""
    """An `.npy` of tokens i64[W,L], for `gptq`, `activation` and `sensitive`; it is read, never named, in what is
    written."""
    key: str = ""
    """The name of all that the import is made from, by content. With it, an import that was interrupted goes on in the
    same folder."""
    truth: str = ""
    """The `TRUTH_FILE` of an earlier import of this model, context and batch: it is not computed again."""
    module: str = ""
    """The `MODULE_FILE` of an earlier import whose structure is the same, with `sizes`: it is not traced again."""
    sizes: str = ""
    """The `SIZES_FILE` beside `module`."""
    shell: str = ""
    """The `SHELL_FILE` of an earlier import of this shape with our kernels for CPUs, in any format with hidden states
    of the same width."""


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote: its files by digest, and what they hold."""

    program: Program
    architecture: str
    parameter_bytes: int
    """Size of the weights as stored."""
    notes: tuple[str, ...] = ()
    """What the library said of the model while loading it."""
    resumed: int = 0
    """Layers that an earlier run of this import had finished."""
    rounded_again: tuple[str, ...] = ()
    """Formats of the file's blocks whose values were rounded again, into another format."""
