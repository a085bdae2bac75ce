"""Time a Llama of a given shape in PyTorch, eager and compiled, bf16: one JSON line for each on stdout.

    python torch_peer.py SHAPE.json PROMPT OUTPUT [--seconds S] [--dtype bfloat16]

Stands alone: it needs torch and nothing else, runs on the first GPU (the CPU where there is none), draws its weights at
random, and keeps the cache in place as a served model does. The compiled one captures its decode step as a graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    """One decoder layer with a cache of its own, updated in place."""

    def __init__(self, shape: dict, context: int) -> None:
        super().__init__()
        width, inner = shape["hidden_size"], shape["intermediate_size"]
        self.heads, self.kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.size = shape.get("head_dim") or width // self.heads
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, self.kv_heads, context, self.size))

    def forward(self, x: torch.Tensor, at: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return f[1,T,W]; `at` i64[T] are the positions, `turn` their rotations, `mask` bool[T,C] who sees whom."""
        length = x.shape[1]
        sizes = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        q, k, v = self.qkv(self.before(x)).split(sizes, -1)
        q, k, v = (part.view(1, length, -1, self.size).transpose(1, 2) for part in (q, k, v))
        self.keys.index_copy_(2, at, rotated(k, turn))
        self.values.index_copy_(2, at, v)
        seen = F.scaled_dot_product_attention(
            rotated(q, turn), self.keys, self.values, attn_mask=mask, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.out(seen.transpose(1, 2).reshape(1, length, -1))
        gate, up = self.gate_up(self.after(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Return x with each pair of its halves turned by the cosines and sines `turn` f[2,T,S]."""
    low, high = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-high, low), -1) * turn[1]


class Model(nn.Module):
    """The decoder, greedy: tokens i64[1,T] and positions i64[T] to the next token i64[1]."""

    def __init__(self, shape: dict, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape["vocab_size"], shape["hidden_size"])
        self.layers = nn.ModuleList(Layer(shape, context) for _ in range(shape["num_hidden_layers"]))
        self.norm = nn.RMSNorm(shape["hidden_size"])
        size = self.layers[0].size
        steps = 1.0 / (shape.get("rope_theta") or 10000.0) ** (torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(context).float(), steps).repeat(1, 2)
        self.register_buffer("turns", torch.stack((angles.cos(), angles.sin())))
        self.register_buffer("places", torch.arange(context))

    def forward(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the most likely next token."""
        x, turn = self.embedding(tokens), self.turns[:, at]
        mask = self.places[None, :] <= at[:, None]
        for layer in self.layers:
            x = layer(x, at, turn, mask)
        return (self.norm(x[:, -1]) @ self.embedding.weight.T).argmax(-1)


def timed(prefill, decode, prompt: int, output: int, vocabulary: int, seconds: float, device: str) -> dict:
    """Return medians over answers of the time to the first token and per later one, in seconds."""
    tokens = torch.randint(vocabulary, (1, prompt), device=device)
    places = torch.arange(prompt + output, device=device)

    def answer() -> tuple[float, float]:
        begin = time.perf_counter()
        token = prefill(tokens, places[:prompt])
        token.item()
        first = time.perf_counter()
        for step in range(output - 1):
            token = decode(token.view(1, 1).clone(), places[prompt + step : prompt + step + 1])
            token.item()
        return first - begin, (time.perf_counter() - first) / max(1, output - 1)

    for _ in range(3):
        answer()
    taken, end = [answer()], time.monotonic() + seconds
    while time.monotonic() < end:
        taken.append(answer())
    ttft, tpot = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"ttft_s": ttft, "tpot_s": tpot, "answers": len(taken)}


@torch.inference_mode()
def main() -> int:
    """Print a line for eager and one for compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path)
    parser.add_argument("prompt", type=int)
    parser.add_argument("output", type=int)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = json.loads(asked.shape.read_text())
    torch.manual_seed(0)
    model = Model(shape, asked.prompt + asked.output).to(device, getattr(torch, asked.dtype)).eval()
    loads = (asked.prompt, asked.output, shape["vocab_size"], asked.seconds, device)
    for name in ("eager", "compiled"):
        told = {"runtime": f"PyTorch {torch.__version__} {name} {asked.dtype} on {device}"}
        try:
            step = model if name == "eager" else torch.compile(model, mode="reduce-overhead")
            told |= timed(model, step, *loads)
        except Exception as error:  # noqa: BLE001 - whatever a backend does is this row's reason
            told["reason"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
