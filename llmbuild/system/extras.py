"""Which part of an installation brings a library that is not here."""

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
    """Return the command that installs what could not be imported; empty where no extra brings it."""
    module = (error.name or "").partition(".")[0]
    return next((f"pip install 'llmbuild[{extra}]'" for extra, names in EXTRAS.items() if module in names), "")
