"""What each weight format costs in quality, and what calibration wins back: formats × methods on a recipe's held-out text.

    python scripts/bench/quality.py [RECIPE] [--tokens N] [--json]

PyTorch runs the library's model on weights that were quantized and dequantized, so that nothing is compiled. KL divergence
and top-1 agreement are against the f32 model, per token; bits per weight are those of all matrices, scales included, tied
ones counted once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.frontend import attention, huggingface
from llmbuild.frontend.calibration import Calibration
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.source import find_model
from llmbuild.profiler import heldout
from llmbuild.report.rows import table
from llmbuild.spec.formats import INTEGERS
from llmbuild.spec.reader import read_recipe
from llmbuild.transform.quantized import Quantized, dequantize

LAYERS = ("f16", "bf16", "int8", "int8_g32", "int4_g32", "int4_g64", "int4_g128", "int4a_g64", "int4a_g128")
HEAD = "int8"
"""Format of the token table where the layers have one of integers, so that rows tell layers apart."""


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Yield layers, head, method and mixed."""
    for layers in LAYERS:
        head = HEAD if layers in INTEGERS else layers
        yield layers, head, "rtn", "none"
        if layers in INTEGERS:
            yield layers, head, "gptq", "none"
    for layers in ("int4_g32", "int4_g128"):
        yield layers, HEAD, "rtn", "sensitive"
        yield layers, HEAD, "gptq", "sensitive"
        yield layers, layers, "rtn", "none"
        yield layers, layers, "gptq", "none"


def store(model: Any, formats: Formats) -> float:
    """Replace every matrix by what is stored of it; return bits per weight."""
    seen: dict[int, tuple[float, int]] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            if part.weight.data_ptr() in seen:
                continue
            kept = formats(name, part.weight.numpy())
            dense = torch.from_numpy(dequantize(kept)) if isinstance(kept, Quantized) else kept.float()
            bits = kept.bits_per_weight if isinstance(kept, Quantized) else 8.0 * kept.element_size()
            part.weight.copy_(dense)
            seen[part.weight.data_ptr()] = (bits, part.weight.numel())
    return sum(bits * count for bits, count in seen.values()) / sum(count for _, count in seen.values())


def score(log_probabilities: torch.Tensor, exact: torch.Tensor, windows: np.ndarray) -> dict[str, float]:
    """Return KL, top-1 agreement and perplexity of log-probabilities f32[W*L,V]."""
    kl = (exact.exp() * (exact - log_probabilities)).sum(-1)
    agree = log_probabilities.argmax(-1) == exact.argmax(-1)
    told = log_probabilities.view(*windows.shape, -1)[:, :-1]
    loss = -told.gather(-1, torch.from_numpy(windows[:, 1:, None])).mean()
    return {
        "quality_kl": float(kl.double().mean()),
        "quality_top1": float(agree.double().mean()),
        "quality_perplexity": float(loss.exp()),
    }


def measured(recipe_path: Path, tokens: int) -> list[dict[str, Any]]:
    """Return one row for each case."""
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
    rows = [{"layers": "f32", "head": "f32", "method": "", "mixed": "", "bits": 32.0, **score(exact, exact, windows)}]
    for layers, head, method, mixed in cases():
        model, formats = fresh(), Formats(layers, head)
        on_text = Calibration(model, calibration)
        if mixed == "sensitive":
            formats = replace(formats, kept=on_text.sensitive(formats))
        if method == "gptq":
            formats = on_text.fitted(formats)
        bits = store(model, formats)
        found_now = score(Calibration(model, windows).logits(len(windows)), exact, windows)
        rows.append(
            {"layers": layers, "head": head, "method": method, "mixed": mixed, "bits": round(bits, 3), **found_now}
        )
    return rows


def main() -> None:
    """Print one row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/pystdlib.yaml"))
    parser.add_argument("--tokens", type=int, default=4096, help="how many tokens of the held-out text are scored")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with torch.inference_mode():
        rows = measured(arguments.recipe, arguments.tokens)
    if arguments.json:
        print(json.dumps({"recipe": arguments.recipe.stem, "tokens": arguments.tokens, "rows": rows}))
        return
    shown = [[v if isinstance(v, str) else f"{v:.4g}" for v in row.values()] for row in rows]
    print(table(list(rows[0]), shown))


if __name__ == "__main__":
    main()
