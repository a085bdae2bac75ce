"""Write a model as OpenVINO GenAI serves it, in the peers' environment: IR with compressed weights, and its tokenizer.

    PYTHON scripts/bench/openvino_model.py FOLDER TARGET [--format int8|int4]

FOLDER is a Hugging Face folder. The weights are compressed by optimum's defaults for the format: int8 for each row with
a zero point; int4 in groups of 64 without.
"""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = {"int8": {"bits": 8}, "int4": {"bits": 4, "group_size": 64, "ratio": 1.0}}


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--format", choices=list(FORMATS), default="int8")
    asked = parser.parse_args()
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    compressed = OVWeightQuantizationConfig(**FORMATS[asked.format])
    made = OVModelForCausalLM.from_pretrained(asked.folder, export=True, quantization_config=compressed, compile=False)
    made.save_pretrained(asked.target)
    AutoTokenizer.from_pretrained(asked.folder).save_pretrained(asked.target)


if __name__ == "__main__":
    main()
