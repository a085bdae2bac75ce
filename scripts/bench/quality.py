"""The quality loss of each weight format, and the gain from calibration, on a recipe's held-out text.

    python scripts/bench/quality.py [RECIPE] [--tokens N] [--formats NAME...] [--json]

PyTorch runs the library's model on weights that were quantized and dequantized, so that nothing is compiled; for
llmbuild's kernels it rounds the matrices' inputs as they do. KL divergence and top-1 agreement are against the f32
model, per token, each with the standard error of its mean over the windows; bits per weight are those of all matrices,
scales included, tied ones counted once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.frontend import attention, huggingface
from llmbuild.frontend.calibration import Calibration
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.source import find_model
from llmbuild.kernels.layouts import FORMATS as OWN_FORMATS
from llmbuild.kernels.layouts import Layout
from llmbuild.profiler import heldout
from llmbuild.report.rows import table
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.formats import BLOCKS, INTEGERS, SHARED, WEIGHT_FORMATS
from llmbuild.spec.formats import bits as bits_of
from llmbuild.transform.quantized import Quantized, dequantize
from llmbuild.transform.reference import rounded_rows
from llmbuild.transform.shared_exponent import nearest
from llmbuild.transform.weights import from_bf16, to_bf16

LEFT_OUT = ("f32", "int8_g64", "int8_g128", "int7_g32", "int7_g128")
LAYERS = tuple(name for name in WEIGHT_FORMATS if name not in LEFT_OUT)
HEAD = "int8"
"""Format of the token table where the layers have one of integers, so that rows tell layers apart."""
EIGHT_BITS = ("int8", "int7_g64")
"""Formats that serve the token table as well: those held against other runtimes' 8 bits."""


@dataclass(frozen=True)
class Case:
    """A way to store a model and, where `kernel` is `own`, to round what its matrices read."""

    layers: str
    head: str
    quantization: str = "rtn"
    scaling: str = "none"
    mixed: str = "none"
    kernel: str = "compiler"


METHODS = tuple((quantization, scaling) for scaling in ("none", "activation") for quantization in ("rtn", "gptq"))


def cases(formats: Sequence[str]) -> Iterator[Case]:
    """Yield what is scored of these formats of the layers."""
    for layers in formats:
        if layers not in INTEGERS:
            yield Case(layers, layers)
            if layers in ("bf16", SHARED):
                yield Case(layers, layers, kernel="own")
            continue
        for method in METHODS if layers not in BLOCKS else ():
            yield Case(layers, HEAD, *method)
        if layers in OWN_FORMATS:
            for head in dict.fromkeys((HEAD, layers) if layers in EIGHT_BITS else (HEAD,)):
                for method in METHODS:
                    yield Case(layers, head, *method, kernel="own")
        if layers in ("int4_g32", "int4_g128"):
            for quantization in ("rtn", "gptq"):
                yield Case(layers, HEAD, quantization, mixed="sensitive")
                yield Case(layers, layers, quantization)


def round_inputs(model: nn.Module, formats: Formats) -> None:
    """Let every linear layer read rows that are rounded as our kernels do: to bytes, or to bf16 for AVX-512 BF16."""

    def hook(layout: Layout) -> Any:
        def rounded(_: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            rows = rounded_rows(args[0].flatten(0, -2).numpy(), layout)
            return torch.from_numpy(rows.astype(np.float32)).view(args[0].shape)

        return rounded

    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(hook(Layout(formats.of(name), part.in_features, True)))


def store(model: Any, formats: Formats) -> float:
    """Replace every matrix by what is stored of it; return bits per weight."""
    seen: dict[int, tuple[float, int]] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            if part.weight.data_ptr() in seen:
                continue
            kept = formats(name, part.weight.numpy())
            dense = torch.from_numpy(dequantize(kept)) if isinstance(kept, Quantized) else kept.float()
            bits = kept.bits_per_weight if isinstance(kept, Quantized) else bits_of(formats.of(name))
            part.weight.copy_(dense)
            seen[part.weight.data_ptr()] = (bits, part.weight.numel())
    return sum(bits * count for bits, count in seen.values()) / sum(count for _, count in seen.values())


def score(log_probabilities: torch.Tensor, exact: torch.Tensor, windows: np.ndarray) -> dict[str, float]:
    """Return KL, top-1 agreement and perplexity of log-probabilities f32[W*L,V]."""
    kl = (exact.exp() * (exact - log_probabilities)).sum(-1).double().view(windows.shape).mean(1)
    agree = (log_probabilities.argmax(-1) == exact.argmax(-1)).double().view(windows.shape).mean(1)
    told = log_probabilities.view(*windows.shape, -1)[:, :-1]
    loss = -told.gather(-1, torch.from_numpy(windows[:, 1:, None])).mean()
    return {
        "quality_kl": float(kl.mean()),
        "kl_error": float(kl.std() / len(kl) ** 0.5),
        "quality_top1": float(agree.mean()),
        "top1_error": float(agree.std() / len(agree) ** 0.5),
        "quality_perplexity": float(loss.exp()),
    }


def measured(recipe_path: Path, tokens: int, formats: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one row for each case."""
    recipe = read_recipe(recipe_path)
    found = find_model(recipe.model)
    if recipe.calibration is None or found.tokenizer is None:
        raise SystemExit(f"{recipe_path}: needs calibration text and a tokenizer")
    heldout.check_apart(recipe.calibration, recipe.quality)
    windows = heldout.windows(replace(recipe.quality, tokens=tokens), found.tokenizer, recipe.context)
    calibration = heldout.windows(recipe.calibration, found.tokenizer, recipe.context)
    attention.register()

    def fresh() -> Any:
        return huggingface.load(str(found.folder), False, 0, attention.NAME)

    exact = Calibration(fresh(), windows).logits(len(windows))
    yield {**asdict(Case("f32", "f32")), "bits": 32.0, **score(exact, exact, windows)}
    for case in cases(formats):
        model = fresh()
        kept = stored(model, case, calibration)
        bits = store(model, kept)
        if case.kernel == "own":
            round_inputs(model, kept)
        told = score(Calibration(model, windows).logits(len(windows)), exact, windows)
        yield {**asdict(case), "bits": round(bits, 3), **told}


def stored(model: Any, case: Case, calibration: np.ndarray) -> Formats:
    """Return the formats of a case; calibration changes the model in place."""
    formats, on_text = Formats(case.layers, case.head), Calibration(model, calibration)
    if case.mixed == "sensitive":
        formats = replace(formats, kept=on_text.sensitive(formats))
    if case.scaling == "activation":
        formats = on_text.scaled(formats, rounded=case.kernel == "own")
    return on_text.fitted(formats) if case.quantization == "gptq" else formats


def unlike_bf16(recipe_path: Path) -> str:
    """Return how many weights of 12 bits are not those of bf16, and how far from them."""
    model = huggingface.load(str(find_model(read_recipe(recipe_path).model).folder), False, 0, "eager")
    count, unlike, furthest = 0, 0, 0.0
    for dense in {id(p): p.numpy() for p in model.parameters() if p.dim() == 2}.values():
        apart = np.abs(nearest(dense) - from_bf16(to_bf16(dense)))
        count, unlike = count + dense.size, unlike + int(np.count_nonzero(apart))
        furthest = max(furthest, float((apart.max(1) / np.maximum(np.abs(dense).max(1), 1e-30)).max()))
    apart_by = f"by at most {furthest:.1e} of their row's largest"
    return f"{SHARED}: {unlike} of {count} weights are not those of bf16, {apart_by}"


def main() -> None:
    """Print one row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/pystdlib.yaml"))
    parser.add_argument("--tokens", type=int, default=4096, help="how many tokens of the held-out text are scored")
    parser.add_argument("--formats", nargs="+", default=LAYERS, choices=LAYERS, help="of the layers; all by default")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with torch.inference_mode():
        rows = list(measured(arguments.recipe, arguments.tokens, arguments.formats))
    if arguments.json:
        print(json.dumps({"recipe": arguments.recipe.stem, "tokens": arguments.tokens, "rows": rows}))
        return
    shown = [[v if isinstance(v, str) else f"{v:.4g}" for v in row.values()] for row in rows]
    print(table(list(rows[0]), shown))
    if SHARED in arguments.formats:
        print(unlike_bf16(arguments.recipe))


if __name__ == "__main__":
    main()
