"""Compare the greedy tokens of a recipe's f32 variants with PyTorch's own, on the same prompts; exit 1 on a difference.

The catalog's best variant with f32 weights and an f32 cache is opened through the loader; PyTorch runs the
untouched library model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from llmbuild.errors import LlmbuildError
from llmbuild.frontend.reference import reference_greedy
from llmbuild.runtime import load, reader
from llmbuild.spec.files.reader import read_recipe

PROMPTS = ("def main(", "import os", "class Stack:\n    def __init__(self")


def main() -> int:
    """Print one line for each prompt; return how the comparison ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    rows = reader.variants(arguments.catalog, recipe.name, everything=True)
    exact = [r for r in rows if r["tpot_s"] and r["point"]["weight_format"] == r["point"]["kv_dtype"] == "f32"]
    if not exact:
        print(f"no f32 variant of {recipe.name} in {arguments.catalog}", file=sys.stderr)
        return 1
    best = min(exact, key=lambda r: r["tpot_s"])
    model = load(arguments.catalog, variant=best["variant"])
    failed = 0
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt).ids
        expected = reference_greedy(recipe.model.location, False, 0, np.asarray(ids, np.int64), arguments.tokens)
        actual = list(model.tokens(ids, arguments.tokens))
        wanted = [int(t) for t in expected][: len(actual)]
        equal = sum(a == b for a, b in zip(actual, wanted, strict=True))
        failed += actual != wanted
        print(f"variant {best['variant'][:12]}, prompt {prompt!r}: {equal} of {len(wanted)} tokens equal PyTorch's")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlmbuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
