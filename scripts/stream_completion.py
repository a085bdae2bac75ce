"""Stream a completion from a server of OpenAI's API, such as `llmbuild serve`, by OpenAI's own client."""

from __future__ import annotations

import argparse

import openai


def main() -> None:
    """Print the prompt and its continuation as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="address of the server, such as http://127.0.0.1:8000")
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--key", default="none", help="an API key, where the server asks for one")
    asked = parser.parse_args()
    print(asked.prompt, end="", flush=True)
    with openai.OpenAI(base_url=f"{asked.url}/v1", api_key=asked.key) as client:
        chunks = client.completions.create(
            model=asked.model,
            prompt=asked.prompt,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            seed=asked.seed,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in chunks:
            if chunk.choices:
                print(chunk.choices[0].text, end="", flush=True)
            elif chunk.usage is not None:
                print(
                    f"\n{chunk.usage.prompt_tokens} tokens of the prompt, {chunk.usage.completion_tokens} of the answer"
                )


if __name__ == "__main__":
    main()
