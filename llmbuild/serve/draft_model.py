"""The variant that drafts for another: found by its name, and held against the one that it drafts for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmbuild.errors import InputError
from llmbuild.runtime import load, reader
from llmbuild.runtime.model import Model
from llmbuild.spec.program import abi_from
from llmbuild.spec.rows import present


def draft_model(catalog: str | Path, name: str, **trust: Any) -> Model:
    """Return the variant of this digest, or the pick of the model of this name; `trust` is as `llmbuild.load` has it.

    Raises:
        LlmbuildError: there is none, or it cannot be opened here.
    """
    named = name in reader.models(Path(catalog))
    return load(catalog, name, **trust) if named else load(catalog, variant=name, **trust)


def check_draft(name: str, model: Model, draft: Model) -> None:
    """Refuse a variant that cannot draft for a model.

    Raises:
        InputError: its tokens are others, or it computes one row at a time.
    """
    told = f"{name}: variant {draft.row['variant'][:12]} of {draft.row['model']} cannot draft for it"
    ours, theirs = abi_from(present(model.row["abi"])), abi_from(present(draft.row["abi"]))
    if model.row["tokenizer"] != draft.row["tokenizer"] or ours.vocabulary != theirs.vocabulary:
        raise InputError(f"{told}: it has another tokenizer; take a variant of the same one")
    if not theirs.page:
        raise InputError(f"{told}: it computes one row at a time; take one with kernel=own")
