"""Run llama.cpp's own conversion of a Hugging Face folder that has no tokenizer. Lives in the peers' environment.

    python llama_convert.py TREE FOLDER OUT.gguf TYPE

TREE holds `convert_hf_to_gguf.py` and what lies beside it. Everything is its own but the vocabulary, which is left
out: random weights have none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(tree: str, folder: str, out: str, kind: str) -> None:
    """Convert."""
    sys.path.insert(0, tree)
    import convert_hf_to_gguf
    from conversion import get_model_class

    config = json.loads((Path(folder) / "config.json").read_text())

    def no_vocabulary(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("no_vocab")
        self.gguf_writer.add_vocab_size(config["vocab_size"])

    get_model_class(config["architectures"][0]).set_vocab = no_vocabulary
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", kind]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
