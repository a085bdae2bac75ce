"""Build models of many shapes with defaults, and check that every build has a front with correct variants.

python scripts/bench/shapes.py [--shapes N] [--seed N] [--only NAME]... [--trials N] [--budget TIME] [--json]

The shapes are that of a small trained Llama, with a tokenizer and without one, and N drawn by seed from all supported
shapes. Their weights are drawn so that the next tokens are not equally likely. Each is built three times through the
command line into one catalog: by a recipe that names no knob, then llmbuild's kernels in int8 and in int4. Read from
the catalog: the variants on the front, points that failed, and the error of int8 and int4 logits against PyTorch on
the same weights, as the profiler measured it, with its bound. `f32` says whether the variant of f32 generates the same
tokens as the library's own model, untouched.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

import llmbuild
from llmbuild.build.steps import TOLERANCE
from llmbuild.frontend.tensors import HEAD, places
from llmbuild.kernels.applies import cpu_problem
from llmbuild.report.rows import table
from llmbuild.runtime import reader
from llmbuild.spec.formats import SAME
from llmbuild.spec.model import facts_of
from llmbuild.spec.trial import FRONT

MAIN = [sys.executable, "-m", "llmbuild"]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEW = 32
RECIPE = """\
name: {name}
model: {{huggingface: ./model}}
workloads:
  - {{name: short, prompt: 8, output: 32, context: 64}}
objectives: [tpot_s, ttft_s, parameter_bytes]
"""
TEXTS = """\
quality: {text: {stdlib: [heapq, bisect]}, tokens: 256}
calibration: {text: {stdlib: [argparse, ast]}, tokens: 1024}
"""
BUILDS: tuple[tuple[str, ...], ...] = (
    (),
    ("--set", "kernel=own", "--set", "weight_format=int8"),
    ("--set", "kernel=own", "--set", "weight_format=int4_g64"),
)
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
"""A small trained Llama's shape: 260 K parameters, heads of 8."""

ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
)
BYTES = 256
"""Words of a tokenizer that reads any text."""


@dataclass(frozen=True)
class Shape:
    """What is built: a configuration, and whether a tokenizer lies beside it."""

    name: str
    config: dict[str, Any]
    tokenizer: bool
    seed: int = 0

    @property
    def parameters(self) -> int:
        """How many weights it has, a tied table counted once."""
        return sum(int(np.prod(size)) for _, size in stored(self.config))

    def __str__(self) -> str:
        said = {**self.config, "facts": facts_of(self.config)}
        facts = said["facts"]
        parts = ["tied"] * facts.tied + ["biases"] * facts.projection_biases + ["mlp biases"] * facts.mlp_biases
        parts += ["norms"] * facts.decoder.head_norms + ["tokenizer"] * self.tokenizer
        d = facts.decoder
        sizes = f"{d.hidden}x{d.inner} {d.heads}/{d.kv_heads}x{d.head_dim} V{d.vocabulary} L{facts.layers}"
        return " ".join([facts.kind, sizes, d.activation, *parts])


def drawn(seed: int) -> Shape:
    """Return a shape drawn from everything that is taken."""
    draw = random.Random(seed)
    kind = draw.choice(["llama", "mistral", "qwen2", "qwen3"])
    kv_heads = draw.choice([1, 1, 2, 3, 4])
    heads = kv_heads * draw.choice([1, 2, 3])
    size = draw.choice([8, 8, 16, 24, 32, 40, 64, 80, 96, 128, 160, 2 * draw.randrange(4, 81)])
    explicit = kind == "qwen3" or draw.random() < 0.5
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": heads * (draw.randrange(8, 40) if explicit else size),
        "intermediate_size": draw.choice([draw.randrange(20, 400), 8 * draw.randrange(4, 60)]),
        "num_hidden_layers": draw.choice([1, 1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw.choice([draw.randrange(16, 700), 512, 333, 4096, draw.randrange(30_000, 200_001)]),
        "max_position_embeddings": draw.choice([64, 256, 4096]),
        "hidden_act": draw.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh"]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_theta": draw.choice([10000.0, 1000000.0]),
    }
    if draw.random() < 0.3:
        config["rope_scaling"] = draw.choice(ROPES)
    if explicit:
        config["head_dim"] = size
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = draw.random() < 0.5
    if kind == "llama":
        config["mlp_bias"] = draw.random() < 0.4
    if kind == "mistral":
        config["sliding_window"] = draw.choice([None, 64, 4096])
    return Shape(f"drawn-{seed}", config, draw.random() < 0.5 and config["vocab_size"] >= BYTES, seed)


def stored(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of each tensor of a model's file."""
    for name, size in places(facts_of(config), config["num_hidden_layers"]).items():
        if name != HEAD or not config["tie_word_embeddings"]:
            yield name, tuple(size)


def write(folder: Path, shape: Shape) -> None:
    """Write a model folder: rows of uneven size, norms and biases that are not those of a new model."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    draw, weights = np.random.default_rng(shape.seed), {}
    for name, size in stored(shape.config):
        if len(size) == 2:
            spread = np.exp(0.3 * draw.standard_normal((size[0], 1))) * _gain(name) / size[1] ** 0.5
            weights[name] = (spread * draw.standard_normal(size)).astype(np.float32)
        else:
            weights[name] = (0.2 * draw.standard_normal(size) + ("norm" in name)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {**shape.config, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if shape.tokenizer:
        _write_tokenizer(folder / "tokenizer.json")


def _gain(name: str) -> float:
    """Return how much larger than its input a matrix's output is.

    What layers add outweighs what the table puts in, or a tied head would only tell the latest token again.
    """
    if name == HEAD or "embed" in name:
        return 3.0
    return 5.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.2


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {word: number for number, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(path))


def library_tokens(folder: Path) -> list[int]:
    """Return the tokens that the library's own model generates greedily, in f32, each step on the whole text."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = prompt(model.config.vocab_size)
    begin = len(tokens)
    with torch.inference_mode():
        for _ in range(NEW):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[begin:]


def prompt(vocabulary: int) -> list[int]:
    """Return a prompt of tokens that a vocabulary has."""
    return [token % vocabulary for token in PROMPT]


def examine(shape: Shape, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build a shape and return its row."""
    write(folder / "model", shape)
    (folder / "shape.yaml").write_text(RECIPE.format(name=shape.name) + (TEXTS if shape.tokenizer else ""))
    codes, said, begin = [], [], perf_counter()
    for number, pins in enumerate(BUILDS):
        trials = options.trials if not number else 2
        limits = ["--trials", str(trials), "--budget", options.budget]
        command = [*MAIN, "build", "shape.yaml", "-C", "catalog", *limits, *pins]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        (folder / f"build-{number}.log").write_text(done.stdout + done.stderr)
        codes.append(done.returncode)
        said += [done.stderr.strip().splitlines()[-1]] if done.returncode and done.stderr.strip() else []
    rows = reader.variants(folder / "catalog", everything=True) if (folder / "catalog").is_dir() else []
    row = {"name": shape.name, "shape": str(shape), "parameters": shape.parameters, "exit": codes}
    row |= judged(rows, shape, folder)
    return {**row, "said": said, "seconds": round(perf_counter() - begin)}


def judged(rows: list[dict[str, Any]], shape: Shape, folder: Path) -> dict[str, Any]:
    """Return what the rows of a catalog say of a shape."""
    front = [r for r in rows if r["status"] in FRONT]
    own = [r for r in front if r["point"]["kernel"] == "own"]
    why = cpu_problem(facts_of(shape.config).decoder, "int8", "int8")
    tried = [r for r in rows if r["point"]["kernel"] == "own" and r["status"] != "failed"]
    return {
        "front": len(front),
        "f32": _same_tokens(rows, folder),
        "int8": errors(rows, "int8"),
        "int4": errors(rows, "int4_g64"),
        "own": len(own),
        "why_no_own": "" if own else why or ("beaten" if tried else "never made"),
        "failed": [f"{_choices(r)}: {r['reason']}" for r in rows if r["status"] == "failed"],
    }


def _choices(row: dict[str, Any]) -> str:
    named = ("kernel", "weight_format", "head_format", "kv_dtype", "quantization", "scaling", "opt_level")
    return " ".join(str(row["point"].get(name)) for name in named)


def _same_tokens(rows: list[dict[str, Any]], folder: Path) -> bool | None:
    """Say whether the variant of f32 generates the library's tokens; None where there is none."""
    exact = {"weight_format": "f32", "head_format": SAME, "kv_dtype": "f32", "kernel": "compiler"}
    made = [r for r in rows if r["status"] != "failed" and exact.items() <= r["point"].items()]
    if not made:
        return None
    with llmbuild.load(folder / "catalog", variant=made[0]["variant"]) as model:
        found = list(model.tokens(prompt(model.session.abi.vocabulary), NEW))
    return found == library_tokens(folder / "model")


def errors(rows: list[dict[str, Any]], form: str) -> dict[str, tuple[float, float]]:
    """Return by kernel the largest error of logits among variants of a format, and what is allowed of it."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        told = re.search(r"logits within (\S+) of", (row["notes"] or {}).get("check", ""))
        if row["point"]["weight_format"] != form or not told:
            continue
        names = [row["point"][knob] for knob in ("weight_format", "head_format", "kv_dtype")]
        allowed = max(TOLERANCE[name] for name in names if name != SAME)
        kernel = row["point"]["kernel"]
        found[kernel] = max(found.get(kernel, (0.0, 0.0)), (float(told[1]), allowed))
    return found


def wrong(row: dict[str, Any]) -> bool:
    """Say whether a row has what no build may have."""
    beyond = any(error > allowed for form in ("int8", "int4") for error, allowed in row[form].values())
    return any(row["exit"]) or not row["front"] or row["f32"] is not True or beyond


def shown(rows: list[dict[str, Any]]) -> str:
    """Return the table, and below it every failed point."""
    header = ["name", "shape", "weights", "exit", "front", "own", "f32 tokens", "int8 error", "int4 error", "failed"]
    lines = [
        [
            *(row["name"], row["shape"], f"{row['parameters']:,}", " ".join(map(str, row["exit"])), row["front"]),
            row["own"] or row["why_no_own"],
            {True: "same", False: "DIFFER", None: "absent"}[row["f32"]],
            *(_text(row[form]) for form in ("int8", "int4")),
            len(row["failed"]),
        ]
        for row in rows
    ]
    below = [f"{row['name']}: {text}" for row in rows for text in (*row["said"], *row["failed"])]
    return "\n".join([table(header, lines, left=(0, 1)), *below])


def _text(found: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{kernel} {error:.2g}/{allowed:.2g}" for kernel, (error, allowed) in found.items()) or "-"


def main() -> int:
    """Build every shape, the drawn ones smallest first, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=12, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the first that is drawn")
    parser.add_argument("--trials", type=int, default=6, help="of each default build")
    parser.add_argument("--budget", default="90s", help="time of each search")
    parser.add_argument("--only", action="append", help="only this shape; may be given again")
    parser.add_argument("--keep", type=Path, help="folder that models, logs and catalogs stay in")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    some = [drawn(options.seed + n) for n in range(options.shapes)]
    shapes = [Shape("small", SMALL, True), Shape("small-mute", SMALL, False)]
    shapes += sorted(some, key=lambda shape: shape.parameters)
    rows = []
    for shape in [s for s in shapes if not options.only or s.name in options.only]:
        with TemporaryDirectory(prefix="llmbuild-shape-") as folder:
            rows.append(examine(shape, (options.keep or Path(folder)) / shape.name, options))
        print(f"{'WRONG ' * wrong(rows[-1])}{json.dumps(rows[-1])}", file=sys.stderr, flush=True)
    counted = {"shapes": len(rows), "wrong": sum(map(wrong, rows))}
    print(json.dumps({**counted, "rows": rows}, indent=1) if options.json else shown(rows))
    return 1 if counted["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
