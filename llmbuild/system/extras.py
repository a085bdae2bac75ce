"""Which extra of the installation has a missing library."""

from __future__ import annotations

EXTRAS = {
    "build": "alembic archspec iree optuna pydantic ruamel safetensors sqlalchemy torch transformers".split(),
    "publish": "cryptography fsspec gcsfs oras requests s3fs".split(),
    "postgres": ["psycopg"],
}
"""Modules that the loader's installation lacks, by the extra of pyproject.toml that has them.

`iree` is there without its compiler.
"""


def advice(error: ImportError) -> str:
    """Return the command that installs a module that failed to import; empty where no extra has it."""
    module = (error.name or "").partition(".")[0]
    return next((f"pip install 'llmbuild[{extra}]'" for extra, names in EXTRAS.items() if module in names), "")
