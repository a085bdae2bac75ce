#!/usr/bin/env python3
"""Train the small model of recipes/pystdlib on the source text of the running interpreter's standard library.

    python scripts/train_pystdlib.py --minutes 45               train (or resume), then write recipes/pystdlib
    python scripts/train_pystdlib.py --evaluate                 perplexity of a saved folder and of a bigram model
    python scripts/train_pystdlib.py --export                   write the last checkpoint as a model folder, no training
    python scripts/train_pystdlib.py --sample "import os"       continue a prompt with a saved folder

Needs torch, transformers, tokenizers, safetensors and numpy; no network and no accelerator.  The budget is computing
time, not wall time: a run that is stopped, or that shares its processor, still does the work that was asked for,
unless --deadline makes it anneal sooner.  A killed run goes on from its last checkpoint when started again.  On a
processor that others use too, OMP_WAIT_POLICY=passive in the environment keeps threads from burning time in waiting.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pystdlib_text import (
    END,
    END_ID,
    VOCAB,
    Library,
    Score,
    Tokens,
    encode,
    heldout_modules,
    pack,
    split_library,
    train_tokenizer,
    tuned_bigram,
    write_json,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "pystdlib"
CONTEXT = 512
PEAK_RATE = 3e-3
WARM_STEPS = 100
TOKENS_PER_STEP = 4096
LONG_WINDOWS_FROM = 0.6  # share of the budget after which windows have CONTEXT tokens; half of that before
EXTRA_SHARE = 0.4  # share of windows drawn from the test suite, until LONG_WINDOWS_FROM
SAVE_SECONDS = 120  # wall time between checkpoints


def say(text: str) -> None:
    """Print a progress line on stderr."""
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- the model


def model_config() -> LlamaConfig:
    """A Llama of about 4.7 million parameters."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=704,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=None,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained model; matrices that write to the residual stream start smaller, as is usual."""
    torch.manual_seed(seed)
    config = model_config()
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = 0.02 if "embed" in name else 0.6 / math.sqrt(weight.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale /= math.sqrt(2 * int(config.num_hidden_layers or 1))
            torch.nn.init.normal_(weight, std=scale)
    return model


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats per token, of a batch of windows [rows, length + 1]."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    gains = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)


def rate_at(step: int, progress: float) -> float:
    """Learning rate: a short linear warm-up, then a cosine over the budget (progress from 0 to 1) down to 1 %."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_STEPS) * cosine


def draw(rows: tuple[Tokens, Tokens], seed: int, step: int, progress: float) -> torch.Tensor:
    """Windows at random offsets for one step: a function of seed and step, so that resuming needs no generator.

    The first row is the library, the second its test suite, which is left alone towards the end of the budget: it
    is there so that the model does not read the same library too often, not so that it learns to write tests.
    """
    late = progress >= LONG_WINDOWS_FROM
    length = CONTEXT if late else CONTEXT // 2
    count = TOKENS_PER_STEP // length
    extra = 0 if late else round(EXTRA_SHARE * count)
    generator = np.random.default_rng((seed, step))
    windows = []
    for row, wanted in zip(rows, (count - extra, extra), strict=True):
        starts = generator.integers(0, len(row) - length - 1, wanted)
        windows += [row[start : start + length + 1] for start in starts]
    return torch.from_numpy(np.stack(windows))


# ------------------------------------------------------------------------------------------------------- the training


@dataclass
class Clock:
    """Where a run stands in its budget."""

    budget: float  # seconds of computing, on all threads together
    deadline: float  # time.time() at which the run must end, or infinity
    progress: float = 0.0  # from 0 to 1
    used: float = 0.0  # seconds of computing so far, earlier runs included
    began: float = 0.0  # time.time() at which this run began
    used_before: float = 0.0  # of used, what earlier runs took
    last: float = 0.0  # time.process_time() at the last call of advance

    def start(self) -> None:
        """Begin to count."""
        self.began, self.last, self.used_before = time.time(), time.process_time(), self.used

    def advance(self) -> None:
        """Count the computing since the last call; go faster where the deadline is nearer than the budget's end."""
        now = time.process_time()
        spent, self.last = now - self.last, now
        self.used += spent
        pace = max((self.used - self.used_before) / max(time.time() - self.began, 1e-3), 0.2)
        left = max(min(self.budget * (1 - self.progress), (self.deadline - time.time()) * pace), 1e-3)
        self.progress = min(1.0, self.progress + (1 - self.progress) * spent / left)
        if time.time() >= self.deadline:
            self.progress = 1.0

    def left(self) -> float:
        """Expected seconds of wall time until the end."""
        pace = max((self.used - self.used_before) / max(time.time() - self.began, 1e-3), 0.2)
        return max(0.0, min(self.budget * (1 - self.progress) / pace, self.deadline - time.time()))


class Run:
    """A training run: model, optimizer and clock, saved and restored together."""

    def __init__(self, args: argparse.Namespace) -> None:
        deadline = deadline_of(args.deadline) if args.deadline else math.inf
        self.seed = int(args.seed)
        self.file = Path(args.work) / "checkpoint.pt"
        self.model = new_model(self.seed)
        self.optimizer = optimizer_of(self.model)
        self.clock = Clock(args.minutes * 60.0 * args.threads, deadline)
        self.step = 0
        self.tokens = 0
        self.wall = 0.0

    def save(self) -> None:
        """Write the checkpoint so that a kill at any moment leaves a whole one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "numbers": [self.seed, self.step, self.tokens, self.clock.progress, self.clock.used, self.wall],
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)

    def restore(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        seed, self.step, self.tokens, self.clock.progress, self.clock.used, self.wall = state["numbers"]
        if seed != self.seed:
            raise SystemExit(f"{self.file} is of a run with seed {seed}; give that seed, or --fresh")
        say(f"resumed at step {self.step}, {self.clock.progress:.1%} of the budget")

    def learn(self, compute: Any, rows: tuple[Tokens, Tokens], half: bool) -> torch.Tensor:
        """One optimizer step; the loss in nats per token."""
        batch = draw(rows, self.seed, self.step, self.clock.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, self.clock.progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss: torch.Tensor = compute(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch[:, 1:].numel()
        return loss.detach()


def deadline_of(text: str) -> float:
    """time.time() of the next HH:MM, local time."""
    hour, minute = (int(part) for part in text.split(":"))
    now = time.localtime()
    ahead = ((hour - now.tm_hour) * 60 + minute - now.tm_min) * 60 - now.tm_sec
    return time.time() + (ahead if ahead > 0 else ahead + 86400)


def train_loop(run: Run, rows: tuple[Tokens, Tokens], check: list[Tokens], args: argparse.Namespace) -> None:
    """Learn until the budget is spent, with a progress line every ten seconds or so."""
    compute = loss_of if args.plain else torch.compile(loss_of, dynamic=False)
    run.clock.start()
    wall, shown, saved = time.time(), time.time(), time.time()
    losses: list[torch.Tensor] = []
    while run.clock.progress < 1:
        losses.append(run.learn(compute, rows, args.precision == "bfloat16"))
        run.clock.advance()
        now = time.time()
        run.wall, wall = run.wall + now - wall, now
        if now - shown >= 10:
            pace = len(losses) * TOKENS_PER_STEP / (now - shown)
            loss = torch.stack(losses).mean().item()
            say(
                f"{run.clock.progress:6.1%}  step {run.step}  loss {loss:.3f}  {pace:,.0f} tokens/s  "
                f"eta {run.clock.left() / 60:.1f} min"
            )
            losses, shown = [], now
        if now - saved >= SAVE_SECONDS:
            run.save()
            say(f"checkpoint; held-out loss about {measure(run.model, check).loss:.3f}")
            saved = now


# ----------------------------------------------------------------------------------------------------- the measurement


def measure(model: Any, documents: list[Tokens]) -> Score:
    """Score of every token after a document's first, each with at least half a context of what precedes it."""
    nats, count, half = 0.0, 0, CONTEXT // 2
    with torch.inference_mode():
        for document in documents:
            for start in range(0, max(len(document) - 1 - half, 1), half):
                window = torch.from_numpy(document[start : start + CONTEXT + 1])
                skip = half if start else 0
                logits = model(input_ids=window[None, :-1], use_cache=False).logits[0, skip:]
                nats += torch.nn.functional.cross_entropy(logits.float(), window[1 + skip :], reduction="sum").item()
                count += len(window) - 1 - skip
    return Score(nats, count)


# ---------------------------------------------------------------------------------------------------------- the folder


def save_folder(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write a model folder as AutoModelForCausalLM and AutoTokenizer read it, the weights as float16."""
    out.mkdir(parents=True, exist_ok=True)
    half: Any = LlamaForCausalLM(model_config())
    half.load_state_dict(model.state_dict())
    half.half()
    half.generation_config = GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID)  # type: ignore[no-untyped-call]
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    write_json(out / "tokenizer_config.json", settings)


def left_out(library: Library) -> str:
    """What is neither learnt from nor measured on, in words."""
    twins = [path for path in library.twins if not path.startswith("test/")]
    tests = len(library.twins) - len(twins)
    return f"left out as their relatives: {', '.join([*twins, f'{tests} test files'])}"


def evaluate(folder: Path) -> None:
    """Print what README.md quotes: how well the saved folder foretells the held-out modules, and a bigram model."""
    library = split_library(heldout_modules(folder if (folder / "heldout.json").exists() else RECIPE))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    held, train = encode(tokenizer, library.held), encode(tokenizer, library.train)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    size = sum(len(text.encode()) for text in library.held.values())
    print(f"held out: {len(held)} modules, {size:,} bytes; {left_out(library)}")
    print(
        f"training text: {len(train)} modules of {sum(map(len, train)):,} tokens, "
        f"and {len(library.extra)} files of the test suite"
    )
    bigram = tuned_bigram(train, VOCAB)
    learnt, pairs = measure(model, held), bigram.measure(held)
    for name, score in (("the model", learnt), (f"bigram, discount {bigram.discount:.2f}", pairs)):
        bits = score.nats / math.log(2) / size
        print(f"{name}: perplexity {score.perplexity:.2f} of {score.tokens:,} tokens, {bits:.3f} bits per byte")
    for path, document in zip(library.held, held, strict=True):
        print(
            f"  {path}: {measure(model, [document]).perplexity:.2f} "
            f"(bigram {bigram.measure([document]).perplexity:.2f})"
        )


def sample(folder: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation; temperature 0 always takes the likeliest token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids or [END_ID]
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids[-CONTEXT:]]), use_cache=False).logits[0, -1]
            if temperature > 0:
                ids.append(int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)))
            else:
                ids.append(int(logits.argmax()))
            if ids[-1] == END_ID:
                break
    return tokenizer.decode(ids)


def train(args: argparse.Namespace) -> None:
    """Train or resume, then write the model folder."""
    work, out = Path(args.work), Path(args.out)
    work.mkdir(parents=True, exist_ok=True)
    library = split_library(heldout_modules(RECIPE))
    file = work / "tokenizer.json"
    if args.fresh or not file.exists():
        train_tokenizer(library.train).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    documents, held = encode(tokenizer, library.train), encode(tokenizer, library.held)
    rows = (pack(documents, args.seed), pack(encode(tokenizer, library.extra), args.seed))
    run = Run(args)
    if run.file.exists() and not args.fresh:
        run.restore()
    count = sum(weight.numel() for weight in run.model.parameters())
    say(
        f"{count:,} parameters; {len(rows[0]):,} tokens of {len(documents)} modules, "
        f"{len(rows[1]):,} of {len(library.extra)} files of the test suite; {left_out(library)}"
    )
    train_loop(run, rows, [document[: CONTEXT + 1] for document in held], args)
    run.save()
    save_folder(run.model, tokenizer, out)
    say(
        f"{run.step} steps, {run.tokens:,} tokens, {run.clock.used / args.threads / 60:.1f} min of computing on "
        f"{args.threads} threads, {run.wall / 60:.1f} min of wall time; Python {sys.version.split()[0]}"
    )
    say(f"held-out perplexity before rounding to float16: {measure(run.model, held).perplexity:.4f}")
    evaluate(out)


def export(args: argparse.Namespace) -> None:
    """Write the last checkpoint as a model folder."""
    model = LlamaForCausalLM(model_config())
    state = torch.load(Path(args.work) / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    save_folder(model, Tokenizer.from_file(str(Path(args.work) / "tokenizer.json")), Path(args.out))


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45, help="computing time, as if all threads ran freely")
    parser.add_argument("--deadline", metavar="HH:MM", help="local time at which training has to be done")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    parser.add_argument("--plain", action="store_true", help="do without torch.compile, which needs a C++ compiler")
    parser.add_argument("--fresh", action="store_true", help="start anew even where there is a checkpoint")
    parser.add_argument("--work", default=str(ROOT / "build" / "pystdlib"), help="folder for checkpoints")
    parser.add_argument("--out", default=str(RECIPE), help="model folder")
    parser.add_argument("--evaluate", action="store_true", help="measure the model folder and a bigram model")
    parser.add_argument("--export", action="store_true", help="write the last checkpoint as the model folder")
    parser.add_argument("--sample", metavar="PROMPT", help="continue a prompt with the model folder")
    parser.add_argument("--tokens", type=int, default=120, help="how many tokens --sample writes")
    parser.add_argument("--temperature", type=float, default=0.0, help="of --sample")
    return parser.parse_args()


def main() -> None:
    """Do what the command line asks."""
    args = options()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(Path(args.out))
    elif args.export:
        export(args)
    elif args.sample is not None:
        print(sample(Path(args.out), args.sample, args.tokens, args.temperature, args.seed))
    else:
        train(args)


if __name__ == "__main__":
    main()
