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
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.digest import plain as as_data
from llmbuild.frontend import chats, huggingface
from llmbuild.frontend.archive import LOOKED_UP
from llmbuild.frontend.calibration import Asked, Calibration
from llmbuild.frontend.checkpoint import Floats, Model
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION
from llmbuild.frontend.layerwise import Layers, embedded
from llmbuild.frontend.source import FoundModel, find_model
from llmbuild.frontend.tensors import EMBEDDING, HEAD
from llmbuild.frontend.weights import Patch, Source
from llmbuild.kernels.layouts import FORMATS as OWN_FORMATS
from llmbuild.kernels.layouts import Layout
from llmbuild.profiler import calibration as texts
from llmbuild.profiler import heldout
from llmbuild.report.rows import table
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.formats import BLOCKS, INTEGERS, SHARED, WEIGHT_FORMATS
from llmbuild.spec.formats import bits as bits_of
from llmbuild.spec.recipe import Recipe
from llmbuild.transform.quantized import Quantized
from llmbuild.transform.reference import rounded_rows
from llmbuild.transform.shared_exponent import nearest
from llmbuild.transform.stored import plain
from llmbuild.transform.weights import from_bf16, to_bf16

LEFT_OUT = ("f32", "int8_g64", "int8_g128", "int7_g32", "int7_g128")
LAYERS = tuple(name for name in WEIGHT_FORMATS if name not in LEFT_OUT)
TABLES = "int8"
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
            yield Case(layers, TABLES, *method)
        if layers in OWN_FORMATS:
            for head in dict.fromkeys((TABLES, layers) if layers in EIGHT_BITS else (TABLES,)):
                for method in METHODS:
                    yield Case(layers, head, *method, kernel="own")
        if layers in ("int4_g32", "int4_g128"):
            for quantization in ("rtn", "gptq"):
                yield Case(layers, TABLES, quantization, mixed="sensitive")
                yield Case(layers, layers, quantization)


@dataclass
class AsStored:
    """The tensors of a model as they are stored, in f32; `sizes` are the bits and number of weights by matrix."""

    source: Source
    sizes: dict[str, tuple[float, int]]

    def __call__(self, name: str) -> Floats:
        """Return a tensor."""
        layer, shape = name.removesuffix(".weight"), self.source.model.shape(name)
        if len(shape) == 1:
            return self.source.whole(name)
        kept = self.source.padded(layer, shape[1], 0, shape[0])
        bits = kept.bits_per_weight if isinstance(kept, Quantized) else bits_of(self.source.formats.of(layer))
        self.sizes[name] = bits, shape[0] * shape[1]
        return plain(kept, shape[1])

    def bits_per_weight(self) -> float:
        """Return bits per weight of all matrices that were asked for."""
        return sum(bits * count for bits, count in self.sizes.values()) / sum(n for _, n in self.sizes.values())


def rounded(rows: torch.Tensor, form: str) -> torch.Tensor:
    """Return f32[...,K] rounded as our kernels do: to bytes, or to bf16 for AVX-512 BF16."""
    flat = rounded_rows(rows.flatten(0, -2).numpy(), Layout(form, rows.shape[-1], True))
    return torch.from_numpy(flat.astype(np.float32)).view(rows.shape)


def log_probabilities(
    config: Any, model: Model, case: Case, calibration: np.ndarray, windows: np.ndarray
) -> tuple[torch.Tensor, float]:
    """Return log-probabilities f32[W*L,V] of a model that is stored in a way, and its bits per weight."""
    on_text, formats = Calibration(config, model, calibration), Formats(case.layers, case.head)
    own = case.kernel == "own"
    asked = Asked(case.quantization == "gptq", case.scaling == "activation", own)
    if case.mixed == "sensitive":
        formats = replace(formats, kept=on_text.sensitive(formats))
    source = Source(model, formats, on_text.tables(formats, asked))
    tables = AsStored(source, {})
    vectors, factor = tables(HEAD if model.tied else EMBEDDING), source.patch.dense.get(LOOKED_UP)
    vectors = vectors if factor is None else vectors * factor

    def look(token: int) -> Floats:
        return vectors[token : token + 1]

    layers = Layers(config, LIBRARY_ATTENTION)
    if own:
        for part in layers.module.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(lambda _, read: (rounded(read[0], case.layers),))
    states = embedded(look, windows)
    changed = on_text.layers(source, look, asked, 0, {}) if asked.fitted or asked.scaled else repeat(Patch())
    for index, patch in zip(range(config.num_hidden_layers), changed, strict=False):
        layers.layer(index, replace(tables, source=replace(source, patch=patch)))
        states = layers.run(states)
    states = layers.normalized(states, source.whole("model.norm.weight"))
    head = torch.from_numpy(tables(HEAD))
    logits = (rounded(states, case.head) if own else states).flatten(0, 1) @ head.T
    return torch.log_softmax(logits, -1), tables.bits_per_weight()


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


def tokens_of(recipe: Recipe, found: FoundModel) -> np.ndarray:
    """Return the calibration tokens i64[W,L] of a recipe; chats are written here, by the model.

    Raises:
        SystemExit: the recipe has no calibration text, or the model no tokenizer.
    """
    if recipe.calibration is None or found.tokenizer is None:
        raise SystemExit(f"{recipe.name}: needs calibration text and a tokenizer")
    each = texts.parts(recipe.calibration, found.tokenizer, recipe.context, found.chat).each
    model = str(found.location)
    return texts.mixed([chats.written(model, **as_data(p)) if isinstance(p, texts.Chats) else p for p in each])


def measured(recipe_path: Path, tokens: int, formats: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one row for each case."""
    recipe = read_recipe(recipe_path)
    found = find_model(recipe.model)
    calibration = tokens_of(recipe, found)
    assert recipe.calibration is not None and found.tokenizer is not None
    heldout.check_apart(recipe.calibration, recipe.quality)
    windows = heldout.windows(replace(recipe.quality, tokens=tokens), found.tokenizer, recipe.context)
    model = huggingface.source_of(str(found.location), False, 0)
    config, weights = model.skeleton(LIBRARY_ATTENTION).model.config, model.weights
    exact, _ = log_probabilities(config, weights, Case("f32", "f32"), calibration, windows)
    yield {**asdict(Case("f32", "f32")), "bits": 32.0, **score(exact, exact, windows)}
    for case in cases(formats):
        told, bits = log_probabilities(config, weights, case, calibration, windows)
        yield {**asdict(case), "bits": round(bits, 3), **score(told, exact, windows)}


def unlike_bf16(recipe_path: Path) -> str:
    """Return how many weights of 12 bits are not those of bf16, and how far from them."""
    model = huggingface.source_of(str(find_model(read_recipe(recipe_path).model).location), False, 0).weights
    count, unlike, furthest = 0, 0, 0.0
    for dense in (model.whole(name) for name, shape in model.stored.shapes.items() if len(shape) == 2):
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
