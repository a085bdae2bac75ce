"""Forty short questions, answered greedily by every usable variant of a catalog and by llama.cpp's ladder of formats.

    python scripts/bench/answers.py -C CATALOG [--recipe RECIPE] [--gguf FILE] [--ladder Q4_0 ... Q8_0] [--importance]
        [--json]

Each question goes through the model's own chat template. An answer counts as equal if all its tokens, up to the end of
the turn or `--count` of them, are those of the f32 model: PyTorch on the dequantized weights of the same file. `KL of
answers` is that of the next token along the f32 model's answers, which tells more than forty yes or no.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import real_model
from comparison import setup
from comparison.rounds import Participant, Worker, WorkerFailed
from comparison.script import end, say
from rate_distortion import add_ladder, rungs

from llmbuild.report import rows as shown
from llmbuild.report.rows import quantity
from llmbuild.runtime import host

QUESTIONS = (
    "What is the capital of France?", "What is the capital of Japan?", "How many legs does a spider have?",
    "What color is the sky on a clear day?", "Who wrote Romeo and Juliet?", "What is 7 plus 5?",
    "What is the largest planet in the solar system?", "What do bees make?", "How many days are in a week?",
    "What is the opposite of hot?", "Name a fruit that is yellow.", "What language is spoken in Brazil?",
    "What is the boiling point of water in Celsius?", "Who painted the Mona Lisa?", "What is H2O?",
    "Which animal says moo?", "What is the square root of 81?", "Name the first month of the year.",
    "What is the freezing point of water?", "Which ocean is the largest?", "What is the capital of Italy?",
    "How many continents are there?", "What gas do plants take in?", "What is the past tense of go?",
    "Who was the first person on the Moon?", "What is 9 times 6?", "Which planet is closest to the Sun?",
    "What is the currency of the United Kingdom?", "Name a programming language.", "What is the plural of mouse?",
    "How many minutes are in an hour?", "What do you call a baby cat?", "What is the capital of Germany?",
    "Which metal is liquid at room temperature?", "What is the color of grass?", "What is the tallest animal?",
    "Who discovered gravity?", "What is the main ingredient of bread?", "How many sides does a triangle have?",
    "What is the chemical symbol of gold?",
)  # fmt: skip


LONGEST = 1.0
"""Seconds that a prompt of a variant may take: the slowest ones would answer for minutes."""

CONTEXT = 256
"""Positions that questions and answers take at most."""


def asked_of(gguf: Path, count: int, reference: Path) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Return the questions as tokens, the tokens that end an answer, and the answers of the f32 model.

    What `comparison.scoring.along` reads is written to `reference`.
    """
    import torch
    from transformers import AutoTokenizer

    from llmbuild.frontend import huggingface

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = huggingface.load(str(gguf), False, 0, huggingface.LIBRARY_ATTENTION, CONTEXT)
    prompts, answers, logits = [], [], []
    stops = [tokenizer.eos_token_id]
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            tokens = torch.tensor([prompt])
            found = model.generate(
                tokens, max_new_tokens=count, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
            )
        prompts.append(prompt)
        answers.append([token for token in found[0, len(prompt) :].tolist() if token not in stops])
        with torch.inference_mode():
            told = model(torch.tensor([prompt + answers[-1]])).logits[0]
        logits.append(told[len(prompt) - 1 : -1].numpy())
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    np.savez(
        reference,
        tokens=np.concatenate(texts),
        ends=np.cumsum([len(text) for text in texts]),
        asked=np.array([len(prompt) for prompt in prompts]),
        logits=np.concatenate(logits),
    )
    return prompts, stops, answers


def answered(
    who: Participant, prompts: list[list[int]], stops: list[int], count: int, reference: Path
) -> dict[str, Any]:
    """Return a participant's answers and how near it is along those of the f32 model, or why it has none."""
    worker = Worker(who.command, real_model.SCORING)
    try:
        opening = {**who.opening, "positions": max(map(len, prompts)) + count}
        if who.runtime == real_model.PEER:
            opening["threads"] = 1  # its threads spin while they wait for each other, and others may run meanwhile
        near = worker.ask("along", **opening, reference=str(reference))
        return {**near, **worker.ask("greedy", **opening, prompts=prompts, stops=stops, count=count)}
    except WorkerFailed as failed:
        return {"refused": str(failed)}
    finally:
        worker.close()


def document(asked: argparse.Namespace) -> dict[str, Any]:
    """Ask everyone and return it as one document.

    Raises:
        InputError: llama.cpp is not there, or the catalog has no variant that runs here.
    """
    place = real_model.ready(asked)
    ours = [row for row in real_model.own_rows(asked) if row["ttft_s"] <= LONGEST]
    quality = {row["variant"]: row["quality_kl"] for row in ours}
    everyone = [*setup.own_participants(asked.catalog, ours, asked.threads, everyone=True), *rungs(asked, place.python)]
    say("the f32 model answers")
    asked.work.mkdir(parents=True, exist_ok=True)
    reference = asked.work / f"answers-{asked.count}.npz"
    prompts, stops, wanted = asked_of(real_model.gguf_of(asked), asked.count, reference)
    rows = []
    for who in everyone:
        say(f"{who.name} answers")
        told = answered(who, prompts, stops, asked.count, reference)
        got = told.get("answers")
        rows.append(
            {
                "participant": who.name,
                "choices": who.choices,
                "size_bytes": real_model.size_bytes(who),
                "quality_kl": quality.get(who.variant),
                "answers_kl": told.get("answers_kl"),
                "answers_kl_error": told.get("answers_kl_error"),
                "equal": None if got is None else sum(a == b for a, b in zip(got, wanted, strict=True)),
                "refused": told.get("refused"),
                "answers": got,
            }
        )
    rows.sort(key=lambda row: (-(row["equal"] or 0), row["size_bytes"]))
    return {"machine": host.machine().describe(), "questions": QUESTIONS, "count": asked.count, "rows": rows}


def text(made: dict[str, Any]) -> str:
    """Return the table, and what the names stand for."""
    header, of = ["participant", "bytes", "KL", "KL of answers", "equal answers"], len(made["questions"])
    lines = [
        [
            row["participant"],
            quantity(row["size_bytes"], "B"),
            "-" if row["quality_kl"] is None else f"{row['quality_kl']:.5f}",
            "-" if row["answers_kl"] is None else f"{row['answers_kl']:.5f} ±{row['answers_kl_error']:.5f}",
            row["refused"] or f"{row['equal']} of {of}",
        ]
        for row in made["rows"]
    ]
    ours = [f"{row['participant']}: {row['choices']}" for row in made["rows"] if row["choices"]]
    return "\n".join([shown.table(header, lines), "", *ours])


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real_model.add_files(parser)
    parser.add_argument("-C", "--catalog", type=Path, default=Path("catalog"))
    parser.add_argument("--environment", type=Path, help="llama.cpp's environment; default: one of our own, .peers")
    add_ladder(parser)
    parser.add_argument("--threads", type=int, default=host.machine().cores, help="threads of our variants")
    parser.add_argument("--count", type=int, default=24, help="tokens of an answer at most")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    found = parser.parse_args()
    found.prompt, found.context, found.decode, found.work = 128, 0, found.count, found.work.absolute()
    return found


def main() -> None:
    """Print the table."""
    asked = options()
    made = document(asked)
    print(json.dumps(made) if asked.json else f"{made['machine']}; up to {asked.count} tokens\n{text(made)}")


if __name__ == "__main__":
    end(main)
