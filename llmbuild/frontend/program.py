"""The path of one import: take the model, apply the choices, trace its structure, and stream its weights to a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmbuild import digest
from llmbuild.errors import ChoiceRefused, InputError
from llmbuild.frontend import (
    archive,
    attention,
    huggingface,
    importer,
    modules,
    own,
    shell,
    single_row,
    splice,
    tracing,
)
from llmbuild.frontend.cache import CALLERS, head_size, layer_buffers, own_buffers
from llmbuild.frontend.calibration import Asked, Calibration, read_tokens
from llmbuild.frontend.check import Check
from llmbuild.frontend.checkpoint import Model
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.huggingface import Skeleton
from llmbuild.frontend.layerwise import Look
from llmbuild.frontend.truth import CheckTokens, cached, check_tokens, truth
from llmbuild.frontend.weights import Patch, Source
from llmbuild.frontend.writing import Patches, Unchanged, Writing
from llmbuild.kernels import matvec
from llmbuild.kernels.applies import gpu_problem
from llmbuild.kernels.choose import required_features
from llmbuild.kernels.kept import CACHES
from llmbuild.kernels.layouts import ACTIVATIONS, ALLOCATIONS, TWO_BYTES, UNIFORM
from llmbuild.kernels.shapes import PAGE
from llmbuild.spec.formats import BLOCKS, INTEGERS, SAME, WEIGHT_FORMATS
from llmbuild.spec.program import (
    ABI_FILE,
    CHECK_FILE,
    MODULE_FILE,
    PARAMETERS_FILE,
    SHELL_FILE,
    SIZES_FILE,
    TRUTH_FILE,
    Abi,
    ImportJob,
    ImportResult,
    Program,
)
from llmbuild.transform.allocation import neighbours

KNOBS: dict[str, tuple[str, ...]] = {
    "weight_format": WEIGHT_FORMATS,
    "head_format": (SAME, *WEIGHT_FORMATS),
    "quantization": ("rtn", "gptq"),
    "scaling": ("none", "activation"),
    "mixed": ("none", "sensitive"),
    "layout": ("row_major", "packed"),
    "kernel": ("compiler", "own"),
    "kv_dtype": CACHES,
    "activations": ACTIVATIONS,
    "allocation": tuple(ALLOCATIONS),
    "work_groups": ("2", "1", "4", "8", "16", "32", "64"),
    "row_tile": matvec.ROW_TILES,
    "row_reads": matvec.ROW_READS,
}
"""Model-level knobs; the first value is the default."""


def import_model(job: ImportJob, out: Path) -> ImportResult:
    """Import `job.model` into the folder `out`; the same job writes the same bytes.

    Raises:
        ChoiceRefused: a choice does not exist, or does not fit the model, the target or another choice.
        InputError: the model cannot be taken.
    """
    choices = settle(job)
    taken = take(job, choices)
    model, abi = taken.skeleton.model, taken.abi
    refuse(model, job, choices)
    calibrated = calibrate(taken, job, choices)
    formats = formats_of(choices, calibrated)
    with taken.skeleton.mode:
        kernels = apply(model, job, choices, formats)
    out.mkdir(parents=True, exist_ok=True)
    sizes = structure(job, taken, kernels, out)
    source, patches = patched(Source(taken.weights, formats), model, calibrated)
    look = archive.vectors(model, source)
    kept = cached(taken.config, choices["kv_dtype"], own_on_cpu(job, choices))
    check = Check(taken.config, kept, own.rounding(model), taken.tokens, look)
    with torch.no_grad():
        writing = Writing(out / PARAMETERS_FILE, archive.plan(model, sizes, taken.constants), source, job.key)
        parameters = writing.write(check, patches, abi.vocabulary)
    np.savez(out / CHECK_FILE, **check.data(taken.truth if is_exact(choices) else None))  # type: ignore[arg-type]
    (out / ABI_FILE).write_text(digest.canonical(abi) + "\n")
    program = Program(
        module=digest.of_file(out / MODULE_FILE), parameters=parameters, check=digest.of_file(out / CHECK_FILE), abi=abi
    )
    writing.forget()
    size, again = sum(sizes.values()), rounded_again(taken.weights, formats)
    return ImportResult(program, type(model).__name__, size, taken.notes, writing.resumed, again)


def structure(job: ImportJob, taken: Taken, kernels: dict[str, str], out: Path) -> dict[str, int]:
    """Write the module of a model that the choices were applied to; return the sizes of its tensors in bytes.

    It does not depend on the values of weights, and is traced only if no earlier import made the same.
    """
    if job.module and not taken.apart:
        shutil.copyfile(job.module, out / MODULE_FILE)
        sizes: dict[str, int] = json.loads(Path(job.sizes).read_text())
        return sizes
    model = taken.skeleton.model
    with taken.skeleton.mode:
        if isinstance(model.lm_head, own.OwnHead):
            module, sizes = around_own(job, taken, kernels, out)
        else:
            layers = model.config.num_hidden_layers
            programs = tracing.export(model, taken.abi)
            module, sizes = importer.import_programs(programs, importer.canonical(model), layers)
            splice.splice(module, kernels)
    importer.save_module(module, out / MODULE_FILE)
    if not taken.apart:
        (out / SIZES_FILE).write_text(json.dumps(sizes))
    return sizes


def around_own(job: ImportJob, taken: Taken, kernels: dict[str, str], out: Path) -> tuple[Any, dict[str, int]]:
    """Return the module of a model in which our kernels for CPUs are, and the sizes of its tensors in bytes.

    What is around the kernels is traced only if no earlier import of the model did.
    """
    model = taken.skeleton.model
    if job.shell:
        traced = Path(job.shell).read_bytes()
    else:
        traced = importer.bytecode(shell.trace(model, taken.abi, model.lm_head.shape.width))
        (out / SHELL_FILE).write_bytes(traced)
    return shell.module(model, job.context, traced, kernels)


@dataclass(frozen=True)
class Taken:
    """A model that can be imported: its structure, its weights, and what the library says on `tokens`: `truth`."""

    skeleton: Skeleton
    weights: Model
    abi: Abi
    tokens: CheckTokens
    truth: np.ndarray
    apart: bool
    """Whether head and token table differ though the configuration ties them."""
    notes: tuple[str, ...]

    @property
    def config(self) -> Any:
        """The library's configuration."""
        return self.skeleton.model.config

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """The library's tensors that are computed, not read."""
        rotary = type(self.skeleton.model.model.rotary_emb)(self.config)
        return {f"model.rotary_emb.{name}": tensor.numpy() for name, tensor in rotary.named_buffers()}


def take(job: ImportJob, choices: dict[str, str]) -> Taken:
    """Find a model and its structure, ask it as the library runs it, and see that it says the same as we run it.

    Raises:
        InputError: the model cannot be taken, or says something else.
    """
    files = huggingface.source_of(job.model, job.random_init, job.seed, job.context)
    attention.register()
    skeleton = files.skeleton(attention.NAME)
    abi = describe(skeleton.model, job, choices)
    tokens = check_tokens(abi, job.seed)
    if job.truth:
        with np.load(job.truth) as known:
            says = known["logits"]
    else:
        says = truth(skeleton.model.config, files.weights, abi, tokens)
    return Taken(skeleton, files.weights, abi, tokens, says, files.apart, (*skeleton.notes, *files.notes))


def ask(job: ImportJob, out: Path) -> None:
    """Write what the library's own model says on the check's tokens, for all imports of it.

    Raises:
        InputError: the model cannot be taken, or says something else as we run it.
    """
    taken = take(job, settle(job))
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / TRUTH_FILE, logits=taken.truth)


def settle(job: ImportJob) -> dict[str, str]:
    """Return a value for every knob."""
    settled = {knob: values[0] for knob, values in KNOBS.items()}
    for knob, value in job.choices:
        if knob not in KNOBS:
            raise ChoiceRefused(f"no model-level knob {knob!r}; there are {', '.join(KNOBS)}")
        if value not in KNOBS[knob]:
            raise ChoiceRefused(f"{knob} cannot be {value!r}; it is one of {', '.join(KNOBS[knob])}")
        settled[knob] = value
    if job.context < 2:
        raise InputError(f"context {job.context} is too short: at least 2 positions are needed")
    if job.batch < 1:
        raise InputError(f"batch {job.batch} has no sequence: at least 1 is needed")
    kept = settled["kv_dtype"]
    if kept not in CALLERS and not own_on_cpu(job, settled):
        raise ChoiceRefused(f"kv_dtype={kept} is read by kernel=own on CPUs alone; choose it too, or int8 as kv_dtype")
    return settled


def own_on_cpu(job: ImportJob, choices: dict[str, str]) -> bool:
    """Return whether our kernels for CPUs are asked for."""
    return choices["kernel"] == "own" and not job.subgroup


def refuse(model: Any, job: ImportJob, choices: dict[str, str]) -> None:
    """Refuse choices that do not go with each other or with the model, before anything is made.

    Raises:
        ChoiceRefused: what does not go.
    """
    if not own_on_cpu(job, choices) and (blocks := sorted({*stored_formats(choices)} & {*BLOCKS})):
        raise ChoiceRefused(f"{' and '.join(blocks)}: the blocks of GGUF files are read by kernel=own on CPUs alone")
    if own_on_cpu(job, choices) and job.batch == 1:
        _check_own(model, job, choices)


def apply(model: Any, job: ImportJob, choices: dict[str, str], formats: Formats) -> dict[str, str]:
    """Put the chosen matrices and kernels into the model, in place; return the MLIR of our own kernels by name."""
    if choices["kernel"] == "own" and job.batch > 1:
        raise ChoiceRefused(
            f"kernel=own answers one sequence at a time, the batch is {job.batch}: choose kernel=compiler"
        )
    if choices["kernel"] == "own" and job.subgroup:
        kernels = _apply_to_rows(model, job, choices, formats)
    elif choices["kernel"] == "own":
        units = _check_own(model, job, choices)
        cache, work_groups, wide = choices["kv_dtype"], int(choices["work_groups"]), TWO_BYTES[choices["activations"]]
        kernels = own.put_in(model, job.context, cache, work_groups, formats, units, wide)
    else:
        layout, kernels = choices["layout"], {}
        modules.swap(model, formats.of, modules.LAYOUTS[layout], fused=layout != "row_major")
    if choices["scaling"] == "activation" and formats.head in INTEGERS and model.config.tie_word_embeddings:
        table = model.model.embed_tokens
        columns = model.lm_head.shape.width if isinstance(model.lm_head, own.OwnHead) else model.config.hidden_size
        model.model.embed_tokens = modules.ScaledColumns(table, columns)
    return {**kernels, **own.look_kernel(model)}


def _apply_to_rows(model: Any, job: ImportJob, choices: dict[str, str], formats: Formats) -> dict[str, str]:
    """Put weights and our kernels for a GPU into the model, in place; return the kernels' MLIR by name.

    Raises:
        ChoiceRefused: a choice that does not go with these kernels, or no matrix that they read.
    """
    if choices["layout"] != "row_major":
        raise ChoiceRefused("kernel=own reads weights in layout=row_major on a GPU; choose it too")
    work = matvec.work(job.subgroup, choices["row_tile"], choices["row_reads"])
    if problem := gpu_problem(own.facts(model), *stored_formats(choices), work):
        raise ChoiceRefused(f"{job.model}: kernel=own: {problem}")
    modules.swap(model, formats.of, single_row.stored_for(work), fused=choices["mixed"] == "none")
    return single_row.kernels(model)


def _check_own(model: Any, job: ImportJob, choices: dict[str, str]) -> own.Units:
    """Refuse choices that our kernels do not go with; return what they are written in."""
    if choices["layout"] != "packed":
        raise ChoiceRefused("kernel=own reads weights in layout=packed; choose it too")
    if choices["mixed"] != "none":
        raise ChoiceRefused("kernel=own reads one format in all layers; choose mixed=none")
    return own.check(model, job.model, job.features, stored_formats(choices))


def stored_formats(choices: dict[str, str]) -> tuple[str, str]:
    """Return the formats of the layers and of the token tables."""
    layers, head = choices["weight_format"], choices["head_format"]
    return layers, layers if head == SAME else head


@dataclass(frozen=True)
class Calibrated:
    """Calibration, and what is asked of it."""

    calibration: Calibration
    asked: Asked
    mixed: bool
    allocation: str = UNIFORM


def calibrate(taken: Taken, job: ImportJob, choices: dict[str, str]) -> Calibrated | None:
    """Return the calibration that the choices ask for.

    Raises:
        ChoiceRefused: a choice that does not go with the format, or calibration tokens that are missing or unfit.
    """
    layers, head = stored_formats(choices)
    fitted, mixed = choices["quantization"] == "gptq", choices["mixed"] == "sensitive"
    scaled = choices["scaling"] == "activation"
    if mixed and (layers not in INTEGERS or INTEGERS[layers].bits != 4):
        raise ChoiceRefused(
            f"mixed=sensitive keeps some layers in int8 where the rest is int4; weight_format is {layers}"
        )
    if fitted and not {layers, head} & set(INTEGERS):
        raise ChoiceRefused(f"quantization=gptq rounds weights to integers; weight_format is {layers}")
    if scaled and not {layers, head} & set(INTEGERS):
        raise ChoiceRefused(f"scaling=activation is for weights rounded to integers; weight_format is {layers}")
    allocation = choices["allocation"]
    allocated = allocation != UNIFORM
    if allocated and not (own_on_cpu(job, choices) and neighbours(layers)):
        raise ChoiceRefused(
            f"allocation={allocation} is for kernel=own on CPUs and weights of 2 to 7 bits in groups; found {layers}"
        )
    if not (fitted or mixed or scaled or allocated):
        return None
    calibration = Calibration(taken.config, taken.weights, read_tokens(job.calibration))
    rounded = own.rounded_to_bytes(choices["activations"]) if own_on_cpu(job, choices) else frozenset[str]()
    return Calibrated(calibration, Asked(fitted, scaled, rounded), mixed, allocation)


@dataclass(frozen=True)
class Fitting:
    """Patches of layers by calibration."""

    calibrated: Calibrated
    look: Look

    def layers(self, source: Source, first: int, saved: Mapping[str, np.ndarray]) -> Iterator[Patch]:
        """Yield the patches of the layers from `first` on."""
        return self.calibrated.calibration.layers(source, self.look, self.calibrated.asked, first, saved)

    def state(self) -> dict[str, np.ndarray]:
        """Return what the next layer's patch is made from."""
        return self.calibrated.calibration.state()


def patched(source: Source, model: Any, calibrated: Calibrated | None) -> tuple[Source, Patches]:
    """Return the weights with the patch of the token tables, and the patches of the layers."""
    if calibrated is None or not (calibrated.asked.fitted or calibrated.asked.scaled):
        return source, Unchanged()
    with torch.no_grad():
        tables = replace(source, patch=calibrated.calibration.tables(source.formats, calibrated.asked))
    return tables, Fitting(calibrated, archive.vectors(model, tables))


def rounded_again(weights: Model, formats: Formats) -> tuple[str, ...]:
    """Return the formats of blocks in which a file keeps matrices that are stored in another one, with losses."""
    found = set()
    for name in weights.stored.shapes:
        blocks, form = weights.blocks(name), formats.of(name.removesuffix(".weight"))
        if blocks and form not in (blocks, "f32"):
            found.add(blocks)
    return tuple(sorted(found))


def formats_of(choices: dict[str, str], calibrated: Calibrated | None) -> Formats:
    """Return the formats of all layers; some keep more bits where calibration finds them sensitive."""
    formats = Formats(*stored_formats(choices))
    if calibrated is None:
        return formats
    if calibrated.allocation != UNIFORM:
        extra = ALLOCATIONS[calibrated.allocation]
        kept = calibrated.calibration.allocated(formats, own.KINDS, extra, calibrated.asked)
        return replace(formats, kept=kept)
    if not calibrated.mixed:
        return formats
    with torch.no_grad():
        return replace(formats, kept=calibrated.calibration.sensitive(formats))


def describe(model: Any, job: ImportJob, choices: dict[str, str]) -> Abi:
    """Return how the program of this model will be called."""
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and job.context > limit:
        raise InputError(f"context {job.context} is longer than the {limit} positions {job.model} was made for")
    own = own_on_cpu(job, choices)
    buffers = (own_buffers if own else layer_buffers)(
        choices["kv_dtype"], job.batch * job.context, config.num_key_value_heads, head_size(config)
    )
    return Abi(
        vocabulary=config.vocab_size,
        context=job.context,
        batch=job.batch,
        kv=buffers * config.num_hidden_layers,
        eos_tokens=huggingface.eos_tokens(model),
        parameters=sum(p.numel() for p in model.parameters()),  # tied ones once
        required_features=required_features(job.features, *stored_formats(choices)) if own else (),
        score=job.batch == 1 and not job.random_init,  # random weights have no quality to score
        page=PAGE if own and job.batch == 1 else 0,
    )


def is_exact(choices: dict[str, str]) -> bool:
    """Say whether a program computes in f32 all that the library does, so that the library's logits are its own."""
    return {*stored_formats(choices), choices["kv_dtype"]} == {"f32"}
