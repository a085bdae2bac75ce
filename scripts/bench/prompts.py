"""Write prompts of many kinds, as JSON Lines: what a predictor of the lengths of answers is trained and judged on.

    python scripts/bench/prompts.py [--count 480] [--seed 0] > prompts.jsonl

Prompts are made of templates and subjects that are listed here, and of paragraphs of this repository's documentation:
short facts, choices, lists, explanations, code, summaries and others. Each line has the messages of a chat, its `group`
(the template), and its `tenant` (the kind).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
THINGS = (
    "a bicycle|a compiler|a database index|a glacier|a heat pump|a lighthouse|a microscope|a river delta|"
    "a solar panel|a steam engine|a suspension bridge|a telescope|a vaccine|an electric motor|an elevator|"
    "photosynthesis|the moon's phases|the tides|a printing press|a refrigerator|a wind turbine|a public library|"
    "an earthquake|a rainbow|a sailing boat|a beehive"
).split("|")
PLACES = (
    "Japan|Brazil|Norway|Egypt|Canada|India|Kenya|Peru|Greece|Australia|Italy|Mexico|Finland|Vietnam|Morocco"
).split("|")
FOODS = (
    "bread|tomato soup|pancakes|rice pudding|lentil stew|apple pie|potato salad|an omelette|fried rice|hummus"
).split("|")
TASKS = (
    "reverses a string|sums a list of numbers|counts words in a text|finds the largest number in a list|checks "
    "whether a word is a palindrome|removes duplicates from a list|merges two sorted lists|reads a CSV file|computes "
    "a factorial|converts Celsius to Fahrenheit|flattens a nested list|sorts a dictionary by value"
).split("|")
WORDS = "brave cold quick honest narrow fragile gentle ancient bright silent heavy clever".split()
SENTENCES = (
    "Good morning, how are you?|Where is the station?|I would like a cup of tea.|The weather is lovely today.|"
    "My sister lives in a small house near the sea.|We will meet on Friday at noon.|"
    "The book on the table is mine.|Please close the window."
).split("|")
REVIEWS = (
    "The room was clean and the staff were kind.|It broke after two days.|"
    "The food was cold, but the view was nice.|I would buy it again at once.|Nobody answered my calls for a week.|"
    "Fast delivery, good price.|The sound is thin and the cable is short."
).split("|")
COUNTS = "two|three|four|five|six|eight|ten|twelve".split("|")
TEMPLATES: Mapping[str, Sequence[str]] = {
    "fact": (
        "What is the capital of {place}?",
        "In one word: which continent is {place} in?",
        "What is {a} plus {b}? Answer with the number only.",
        "What does the word '{word}' mean? Answer in one short sentence.",
        "Which language do most people in {place} speak?",
        "Give one synonym of '{word}'.",
        "What is the opposite of '{word}'?",
    ),
    "choice": (
        "Is {a} an even number? Answer yes or no.",
        "Is this review positive or negative? Answer with one word. Review: {review}",
        "Rate this review from 1 to 5, with the number only: {review}",
        "Which is larger, {a} or {b}?",
        "Is {place} north of the equator? Answer true or false.",
    ),
    "list": (
        "List {count} facts about {thing}.",
        "Name {count} cities in {place}.",
        "List {count} words that rhyme with or are close to '{word}'.",
        "Give me {count} tips for a trip to {place}.",
        "Which ingredients do I need for {food}? Only the list.",
        "Give {count} names for a shop that sells {food}.",
    ),
    "explain": (
        "Explain how {thing} works.",
        "Explain {thing} to a child of five.",
        "Explain {thing} in one sentence.",
        "Explain in detail, step by step, how {thing} works.",
        "What is the history of {thing}?",
        "Why is {thing} useful?",
        "Compare {thing} and {other}.",
    ),
    "code": (
        "Write a Python function that {task}.",
        "Write a Python function that {task}, with tests and comments.",
        "Write a C program that {task}.",
        "Write one line of Python that {task}. No explanation.",
        "Explain how one writes a function that {task}.",
    ),
    "summarise": (
        "Summarise this text in one sentence:\n\n{text}",
        "Give a title of at most six words to this text:\n\n{text}",
        "List the key points of this text:\n\n{text}",
        "Rewrite this text in simpler words:\n\n{text}",
        "Write three questions about this text:\n\n{text}",
    ),
    "write": (
        "Write a short poem about {thing}.",
        "Write a story about {thing} in {place}.",
        "Write an e-mail to a colleague about a visit to {place}.",
        "Write a haiku about {thing}.",
        "Write an essay on {thing}.",
        "Write one sentence with the word '{word}'.",
        "Write a slogan for {food}.",
    ),
    "how to": (
        "How do I make {food}?",
        "Give me a recipe for {food} with {count} steps.",
        "Plan a week in {place}, day by day.",
        "How do I get from the airport to the city in {place}?",
    ),
    "translate": (
        "Translate to French: {sentence}",
        "Translate to Spanish: {sentence}",
        "Write this sentence in the past tense: {sentence}",
        "Make this sentence more polite: {sentence}",
        "How many words does this sentence have? {sentence}",
    ),
}
"""Asks by their kind; names in braces are drawn."""


def paragraphs() -> list[str]:
    """Return paragraphs of the documentation that are plain text, of 150 to 900 characters."""
    texts = [path.read_text() for path in sorted(DOCS.glob("explanation/*.md"))]
    found = [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)]
    return [one for one in found if 150 <= len(one) <= 900 and one[0].isalpha()]


def prompts(count: int, seed: int) -> Iterator[dict[str, object]]:
    """Return so many asks, none twice, of each kind about as many."""
    draw, texts = random.Random(seed), paragraphs()
    kinds, seen = list(TEMPLATES), set[str]()
    while len(seen) < count:
        kind = draw.choice(kinds)
        template = draw.choice(TEMPLATES[kind])
        made = template.format(
            place=draw.choice(PLACES),
            thing=draw.choice(THINGS),
            other=draw.choice(THINGS),
            food=draw.choice(FOODS),
            task=draw.choice(TASKS),
            word=draw.choice(WORDS),
            sentence=draw.choice(SENTENCES),
            review=draw.choice(REVIEWS),
            count=draw.choice(COUNTS),
            text=draw.choice(texts),
            a=draw.randrange(2, 500),
            b=draw.randrange(2, 500),
        )
        if made not in seen:
            seen.add(made)
            yield {"messages": [{"role": "user", "content": made}], "group": template, "tenant": kind}


def main(words: list[str] | None = None) -> None:
    """Print the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(words)
    for one in prompts(asked.count, asked.seed):
        sys.stdout.write(json.dumps(one, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
