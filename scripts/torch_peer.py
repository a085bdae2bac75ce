"""Time a Llama of a given shape in PyTorch, eager and compiled, bf16: one JSON line for each batch and mode on stdout.

    python torch_peer.py SHAPE.json PROMPT OUTPUT [--batch B]... [--seconds S] [--dtype bfloat16] [--turns]

It needs only torch, runs on the first GPU (the CPU where there is none), draws its weights at random, and keeps the
cache in place as a served model does. The compiled one captures its decode step as a graph. Positions are not
stretched (`rope_scaling`): that changes no product and no size.

With --turns the lines report the ready modes, and each line `NUMBER SECONDS` on stdin, with the number of a ready
line, is answered with a line of that mode's times in that many seconds: so it takes turns with the caller.
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

    def __init__(self, shape: dict, context: int, batch: int) -> None:
        super().__init__()
        width, inner = shape["hidden_size"], shape["intermediate_size"]
        self.heads, self.kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.size = shape.get("head_dim") or width // self.heads
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(batch, self.kv_heads, context, self.size))

    def forward(self, x: torch.Tensor, at: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return f[B,T,W]; `at` i64[T] are the positions, `turn` their rotations, `mask` bool[T,C] who sees whom."""
        batch, length = x.shape[:2]
        sizes = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        q, k, v = self.qkv(self.before(x)).split(sizes, -1)
        q, k, v = (part.view(batch, length, -1, self.size).transpose(1, 2) for part in (q, k, v))
        self.keys.index_copy_(2, at, rotated(k, turn))
        self.values.index_copy_(2, at, v)
        seen = F.scaled_dot_product_attention(
            rotated(q, turn), self.keys, self.values, attn_mask=mask, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.after(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Return x with each pair of its halves turned by the cosines and sines `turn` f[2,T,S]."""
    low, high = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-high, low), -1) * turn[1]


class Model(nn.Module):
    """The decoder, greedy: tokens i64[B,T] and positions i64[T] to the next tokens i64[B]."""

    def __init__(self, shape: dict, context: int, batch: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape["vocab_size"], shape["hidden_size"])
        self.layers = nn.ModuleList(Layer(shape, context, batch) for _ in range(shape["num_hidden_layers"]))
        self.norm = nn.RMSNorm(shape["hidden_size"])
        size = self.layers[0].size
        steps = 1.0 / (shape.get("rope_theta") or 10000.0) ** (torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(context).float(), steps).repeat(1, 2)
        self.register_buffer("turns", torch.stack((angles.cos(), angles.sin())))
        self.register_buffer("places", torch.arange(context))

    def forward(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the most likely next token of each sequence."""
        x, turn = self.embedding(tokens), self.turns[:, at]
        mask = self.places[None, :] <= at[:, None]
        for layer in self.layers:
            x = layer(x, at, turn, mask)
        return (self.norm(x[:, -1]) @ self.embedding.weight.T).argmax(-1)


class Contender:
    """One mode at one batch, warmed up, that answers for as long as it is asked to."""

    def __init__(self, model: Model, compiled: bool, batch: int, prompt: int, output: int) -> None:
        self.model, self.batch, self.prompt, self.output = model, batch, prompt, output
        self.step = torch.compile(model, mode="reduce-overhead") if compiled else model
        device = model.places.device
        drawn = torch.Generator().manual_seed(0)
        # sequences are drawn one after another: the first is the same in every batch
        self.tokens = torch.randint(len(model.embedding.weight), (batch, prompt), generator=drawn).to(device)
        self.places = torch.arange(prompt + output, device=device)
        for _ in range(3):
            self.answer()

    def answer(self, kept: list | None = None) -> tuple[float, float]:
        """Return the seconds to the first tokens and per later step; put the tokens of each step into `kept`."""
        begin = time.perf_counter()
        token = self.model(self.tokens, self.places[: self.prompt])
        told = [token.tolist()]
        first = time.perf_counter()
        for at in range(self.prompt, self.prompt + self.output - 1):
            token = self.step(token.view(-1, 1).clone(), self.places[at : at + 1])
            told.append(token.tolist())
        taken = first - begin, (time.perf_counter() - first) / max(1, self.output - 1)
        if kept is not None:
            kept += told
        return taken

    def turn(self, seconds: float) -> dict:
        """Return medians over answers of both times, in seconds, and the tokens that all of them came to."""
        end, taken = time.monotonic() + seconds, [self.answer()]
        while time.monotonic() < end:
            taken.append(self.answer())
        ttft, tpot = (statistics.median(column) for column in zip(*taken, strict=True))
        return {"ttft_s": ttft, "tpot_s": tpot, "answers": len(taken), "tokens": len(taken) * self.output * self.batch}


def ready(shape: dict, asked: argparse.Namespace, device: str):
    """Yield what is told of each batch and mode, and who answers for it; None for one that fails."""
    for batch in asked.batch or [1]:
        torch.manual_seed(0)
        model = Model(shape, asked.prompt + asked.output, batch).to(device, getattr(torch, asked.dtype)).eval()
        for mode in ("eager", "compiled"):
            told = {"runtime": f"PyTorch {torch.__version__} {mode} {asked.dtype} on {device}", "batch": batch}
            try:
                yield told, Contender(model, mode == "compiled", batch, asked.prompt, asked.output)
            except Exception as error:  # noqa: BLE001 - whatever a backend does is this row's reason
                lines = str(error).strip().splitlines() or [""]
                yield {**told, "reason": f"{type(error).__name__}: {lines[0][:200]}"}, None


@torch.inference_mode()
def main() -> int:
    """Print a line for each batch, eager and compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path)
    parser.add_argument("prompt", type=int)
    parser.add_argument("output", type=int)
    parser.add_argument("--batch", type=int, action="append", help="sequences side by side; may be given again")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", action="store_true", help="answer when asked on stdin")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for told, contender in ready(json.loads(asked.shape.read_text()), asked, device):
        found.append(contender)
        print(json.dumps(told if asked.turns or not contender else told | contender.turn(asked.seconds)), flush=True)
    if not asked.turns:
        return 0
    print(json.dumps({"ready": len(found)}), flush=True)
    for line in sys.stdin:
        number, seconds = line.split()
        print(json.dumps(found[int(number)].turn(float(seconds))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
