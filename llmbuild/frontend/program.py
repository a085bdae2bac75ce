"""The path of one import: load, apply the choices, export, import, write files and their check data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild import digest
from llmbuild.errors import ChoiceRefused, InputError
from llmbuild.frontend import attention, huggingface, importer, modules, own, single_row, splice
from llmbuild.frontend.cache import layer_buffers, new_cache
from llmbuild.frontend.calibration import Calibration, read_tokens
from llmbuild.frontend.entry import Decode, Prefill
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.reference import LIBRARY_ATTENTION
from llmbuild.frontend.truth import CheckTokens, check_import, check_tokens, distance, library_says, run_eagerly
from llmbuild.kernels import matvec
from llmbuild.kernels.applies import gpu_problem
from llmbuild.kernels.choose import required_features
from llmbuild.spec.formats import INTEGERS, SAME, WEIGHT_FORMATS
from llmbuild.spec.program import (
    ABI_FILE,
    CHECK_FILE,
    DECODE,
    MODULE_FILE,
    PARAMETERS_FILE,
    PREFILL,
    Abi,
    ImportJob,
    ImportResult,
    Program,
)

KNOBS: dict[str, tuple[str, ...]] = {
    "weight_format": WEIGHT_FORMATS,
    "head_format": (SAME, *WEIGHT_FORMATS),
    "quantization": ("rtn", "gptq"),
    "scaling": ("none", "activation"),
    "mixed": ("none", "sensitive"),
    "layout": ("row_major", "packed"),
    "kernel": ("compiler", "own"),
    "kv_dtype": ("f32", "f16", "int8"),
    "work_groups": ("2", "1", "4", "8", "16", "32", "64"),
    "row_tile": matvec.ROW_TILES,
    "row_reads": matvec.ROW_READS,
}
"""Model-level knobs; the first value is the default."""

NUDGE = 1e-6


def import_model(job: ImportJob, out: Path) -> ImportResult:
    """Import `job.model` into the folder `out`; the same job writes the same bytes.

    Raises:
        ChoiceRefused: a choice does not exist, or does not fit the model, the target or another choice.
        InputError: the model cannot be taken.
    """
    choices = settle(job)
    taken = take(job, choices)
    model, abi = taken.model, taken.abi
    kernels = apply(model, job, choices)
    out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        data = check_data(model, abi, taken.tokens, taken.truth if is_exact(choices) else None)
        np.savez(out / CHECK_FILE, **data)  # type: ignore[arg-type]
    module, parameters = importer.import_programs(export(model, abi))
    splice.splice(module, kernels)
    importer.save_module(module, out / MODULE_FILE)
    parameters.save(out / PARAMETERS_FILE)
    (out / ABI_FILE).write_text(digest.canonical(abi) + "\n")
    program = Program(
        module=digest.of_file(out / MODULE_FILE),
        parameters=digest.of_file(out / PARAMETERS_FILE),
        check=digest.of_file(out / CHECK_FILE),
        abi=abi,
    )
    return ImportResult(program, type(model).__name__, parameters.size_bytes(), taken.notes)


@dataclass(frozen=True)
class Taken:
    """A model with our attention and its own weights, and what the library said on `tokens` before: `truth`."""

    model: Any
    abi: Abi
    tokens: CheckTokens
    truth: np.ndarray
    notes: tuple[str, ...]


def take(job: ImportJob, choices: dict[str, str]) -> Taken:
    """Load a model, ask it as the library runs it, and see that it says the same as we run it.

    Raises:
        InputError: the model cannot be taken, or says something else.
    """
    loaded = huggingface.load_told(job.model, job.random_init, job.seed, LIBRARY_ATTENTION, job.context)
    abi = describe(loaded.model, job, choices)
    tokens = check_tokens(abi, job.seed)
    truth = library_says(loaded.model, tokens)
    attention.register()
    loaded.model.set_attn_implementation(attention.NAME)
    check_import(loaded.model, job.model, abi, tokens, truth)
    return Taken(loaded.model, abi, tokens, truth, loaded.notes)


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
    return settled


def apply(model: Any, job: ImportJob, choices: dict[str, str]) -> dict[str, str]:
    """Put the chosen weights and kernels into the model, in place; return the MLIR of our own kernels by name."""
    if choices["kernel"] == "own" and job.batch > 1:
        raise ChoiceRefused(
            f"kernel=own answers one sequence at a time, the batch is {job.batch}: choose kernel=compiler"
        )
    if choices["kernel"] == "own" and job.subgroup:
        return _apply_to_rows(model, job, choices)
    units = None if choices["kernel"] == "compiler" else _check_own(model, job, choices)
    formats, kernels = formats_of(model, job, choices), {}
    if units is None:
        layout = choices["layout"]
        modules.swap(model, formats, modules.LAYOUTS[layout], fused=layout != "row_major")
        _scale_table(model, formats)
    else:
        half_cache, work_groups = choices["kv_dtype"] == "f16", int(choices["work_groups"])
        kernels = own.put_in(model, job.context, half_cache, work_groups, formats, units)
    return kernels


def _scale_table(model: Any, formats: Formats) -> None:
    if formats.looked_up is not None:
        model.model.embed_tokens = modules.ScaledColumns(model.model.embed_tokens, formats.looked_up)


def _apply_to_rows(model: Any, job: ImportJob, choices: dict[str, str]) -> dict[str, str]:
    """Put weights and our kernels for a GPU into the model, in place; return the kernels' MLIR by name.

    Raises:
        ChoiceRefused: a choice that does not go with these kernels, or no matrix that they read.
    """
    if choices["layout"] != "row_major":
        raise ChoiceRefused("kernel=own reads weights in layout=row_major on a GPU; choose it too")
    work = matvec.work(job.subgroup, choices["row_tile"], choices["row_reads"])
    if problem := gpu_problem(own.facts(model), *stored_formats(choices), work):
        raise ChoiceRefused(f"{job.model}: kernel=own: {problem}")
    formats = formats_of(model, job, choices)
    modules.swap(model, formats, single_row.stored_for(work), fused=choices["mixed"] == "none")
    _scale_table(model, formats)
    return single_row.kernels(model)


def _check_own(model: Any, job: ImportJob, choices: dict[str, str]) -> own.Units:
    """Refuse choices that our kernels do not go with; return what they are written in."""
    if choices["layout"] != "packed":
        raise ChoiceRefused("kernel=own reads weights in layout=packed; choose it too")
    if choices["kv_dtype"] == "int8":
        raise ChoiceRefused("kernel=own keeps its cache in f32 or f16; choose one of these as kv_dtype")
    if choices["mixed"] != "none":
        raise ChoiceRefused("kernel=own reads one format in all layers; choose mixed=none")
    return own.check(model, job.model, job.features, stored_formats(choices))


def stored_formats(choices: dict[str, str]) -> tuple[str, str]:
    """Return the formats of the layers and of the token tables."""
    layers, head = choices["weight_format"], choices["head_format"]
    return layers, layers if head == SAME else head


def formats_of(model: Any, job: ImportJob, choices: dict[str, str]) -> Formats:
    """Return the stored weights that the choices ask for; calibration replaces the model's by what is stored of them.

    Raises:
        ChoiceRefused: a choice that does not go with the format, or calibration tokens that are missing or unfit.
    """
    layers, head = stored_formats(choices)
    formats = Formats(layers, head)
    fitted, mixed = choices["quantization"] == "gptq", choices["mixed"] == "sensitive"
    scaled = choices["scaling"] == "activation"
    if mixed and (layers not in INTEGERS or INTEGERS[layers].bits != 4):
        raise ChoiceRefused(
            f"mixed=sensitive keeps some layers in int8 where the rest is int4; weight_format is {layers}"
        )
    if fitted and not {layers, formats.head} & set(INTEGERS):
        raise ChoiceRefused(f"quantization=gptq rounds weights to integers; weight_format is {layers}")
    if scaled and not {layers, formats.head} & set(INTEGERS):
        raise ChoiceRefused(f"scaling=activation is for weights rounded to integers; weight_format is {layers}")
    if not (fitted or mixed or scaled):
        return formats
    with torch.no_grad():
        calibration = Calibration(model, read_tokens(job.calibration))
        if mixed:
            formats = replace(formats, kept=calibration.sensitive(formats))
        if scaled:
            formats = calibration.scaled(
                formats, rounded=choices["kernel"] == "own" and not job.subgroup, clipped=not fitted
            )
        return calibration.fitted(formats) if fitted else formats


def describe(model: Any, job: ImportJob, choices: dict[str, str]) -> Abi:
    """Return how the program of this model will be called."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and job.context > limit:
        raise InputError(f"context {job.context} is longer than the {limit} positions {job.model} was made for")
    return Abi(
        vocabulary=config.vocab_size,
        context=job.context,
        batch=job.batch,
        kv=layer_buffers(choices["kv_dtype"], job.batch * job.context, config.num_key_value_heads, head_dim)
        * config.num_hidden_layers,
        eos_tokens=huggingface.eos_tokens(model),
        parameters=sum(p.numel() for p in model.parameters()),
        required_features=required_features(job.features, *stored_formats(choices))
        if choices["kernel"] == "own" and not job.subgroup
        else (),
    )


def export(model: Any, abi: Abi) -> dict[str, torch.export.ExportedProgram]:
    """Trace both entry points; the prompt length stays dynamic."""
    length = torch.export.Dim("T", min=2, max=abi.context)
    kv = new_cache(abi.kv)
    fixed = [None] * len(kv)
    long = torch.zeros(abi.batch, min(8, abi.context), dtype=torch.int64)
    one, start = torch.zeros(abi.batch, dtype=torch.int64), torch.zeros(abi.batch, dtype=torch.int64)
    calls: dict[str, tuple[nn.Module, tuple[object, ...], tuple[object, ...]]] = {
        PREFILL: (Prefill(model, abi.context), (long, start, kv), ({1: length}, None, fixed)),
        DECODE: (Decode(model, abi.context), (one, start, kv), (None, None, fixed)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own use of its own tree specs
        return {
            name: torch.export.export(entry, args, dynamic_shapes=shapes, strict=False).run_decompositions({})
            for name, (entry, args, shapes) in calls.items()
        }


def is_exact(choices: dict[str, str]) -> bool:
    """Say whether a program computes in f32 all that the library does, so that the library's logits are its own."""
    return {*stored_formats(choices), choices["kv_dtype"]} == {"f32"}


def check_data(model: Any, abi: Abi, tokens: CheckTokens, truth: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return prompts, forced tokens and logits: see `Program.check`.

    The logits are the library's own where there is `truth`, else what PyTorch computes on the weights as they are
    stored. `noise` is how far the logits move, root mean square over their own, when every token vector moves by a
    millionth: rounding to integers inside the model can make much of little, and no artifact can be nearer than that.
    """
    logits = run_eagerly(model, abi, tokens, tokens.forced.shape[1] if truth is None else 2)
    hook = model.get_input_embeddings().register_forward_hook(_nudge)
    moved = run_eagerly(model, abi, tokens, 2)
    hook.remove()
    noise = distance(moved, logits[: len(moved)])
    found = {"prompt": tokens.prompt, "forced": tokens.forced, "start": tokens.start}
    return {**found, "logits": logits if truth is None else truth, "noise": np.asarray(noise, np.float32)}


def _nudge(_: nn.Module, __: object, vectors: torch.Tensor) -> torch.Tensor:
    signs = torch.arange(vectors.numel()).remainder(2).mul(2).sub(1).view(vectors.shape)
    return vectors * (1 + NUDGE * signs)
