"""Which extra of the installation has a missing library."""

from __future__ import annotations

EXTRAS = {
    "build": "alembic archspec gguf iree optuna pydantic ruamel safetensors sqlalchemy torch transformers".split(),
    "serve": "llguidance prometheus_client starlette uvicorn".split(),
    "fleet": "h11 highspy numpy pydantic ruamel".split(),
    "kubernetes": ["kubernetes"],
    "publish": "cryptography fsspec gcsfs oras requests s3fs".split(),
    "postgres": ["psycopg"],
}
"""Modules that the loader's installation lacks, by the extra of pyproject.toml that has them.

`iree` is there without its compiler.
"""


def advice(error: ImportError, otherwise: str = "") -> str:
    """Return the command that installs what could not be imported.

    For a module of no extra, such as a library's own dependency, it names the extra `otherwise`; empty without one.
    """
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, names in EXTRAS.items() if module in names), otherwise)
    return f"pip install 'llmbuild[{extra}]'" if extra else ""
