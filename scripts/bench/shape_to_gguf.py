"""Write a shape with random weights as a GGUF file in Q4_1 or Q8_0, with the tokenizer of another file.

    python scripts/bench/shape_to_gguf.py SHAPE TOKENIZER.gguf OUT.gguf [--blocks q4_1]

For comparisons of speed with llama.cpp's server, which needs a tokenizer: SHAPE is a folder with the `config.json` of a
plain Llama, such as `recipes/smollm2-360m`, and the vocabulary of the other file is its own. The embedding, which is
also the output matrix, is in Q8_0, as llama.cpp leaves it in files of four bits. Needs the package `gguf` alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from comparison import checkpoint, gguf_file
from comparison.checkpoint import EMBEDDING, Config, Shape
from numpy.typing import NDArray

BLOCKS = ("q4_1", "q8_0")
_TOKENIZER = "tokenizer."


def write(config: Config, tokenizer: Path, out: Path, blocks: str, seed: int = 0) -> None:
    """Write the file; it is not there until it is whole.

    Raises:
        ValueError: not a plain model, or a tokenizer of another size.
    """
    keys = _keys(tokenizer)
    count = len(keys["tokenizer.ggml.tokens"].contents())
    if count != config["vocab_size"]:
        raise ValueError(f"{tokenizer} has {count} tokens, the shape has {config['vocab_size']}")
    values = partial(_drawn, seed)
    gguf_file.write(config, values, out, blocks, alike=True, kinds={EMBEDDING: "q8_0"}, tokenizer=keys)


def _keys(file: Path) -> dict[str, Any]:
    import gguf

    found = gguf.GGUFReader(str(file)).fields
    return {name: field for name, field in found.items() if name.startswith(_TOKENIZER)}


def _drawn(seed: int, name: str, shape: Shape) -> Iterator[NDArray[np.float32]]:
    return checkpoint.drawn(name, shape, seed)


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", choices=BLOCKS, default=BLOCKS[0])
    asked = parser.parse_args()
    try:
        config = json.loads((asked.shape / "config.json").read_text())
        write(config, asked.tokenizer, asked.out, asked.blocks)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
