"""Listings of a folder of recipes, and messages for empty listings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import llmbuild
from llmbuild.errors import InputError
from llmbuild.runtime import reader


def nothing_found(folder: Path, asked: Mapping[str, str | None], everything: bool) -> str:
    """Return why a query of these columns found nothing, and how to find something."""
    rows = reader.variants(folder, everything=True)
    if not rows:
        return f"{folder} has no variant yet: `llmbuild build RECIPE -C {folder}` makes some"
    for column in ("model", "target", "workload"):
        there = sorted({row[column] for row in rows})
        if asked[column] is not None and asked[column] not in there:
            return f"no {column} {asked[column]!r} in {folder}: it has {', '.join(there)}"
    more = "" if everything else "`llmbuild query --all` lists those of no front too, "
    return f"none of {len(rows)} variants is listed: {more}`llmbuild pick` says how near each comes to the SLO"


def recipe_folder() -> Path:
    """Return the default folder of recipes: the current folder's, or the shapes of the package."""
    shipped = Path(llmbuild.__file__).parent / "recipes"
    here = Path("recipes")
    return shipped if shipped.is_dir() and not here.exists() else here


def recipes(folder: Path) -> list[dict[str, object]]:
    """Return a summary of each recipe of a folder; an unreadable one has its error."""
    if folder.is_file():
        raise InputError(
            f"{folder}: a file, not a folder of recipes: `llmbuild build {folder} -n` says what it asks for"
        )
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: name one that holds recipes, `llmbuild recipes FOLDER`")
    return [_recipe_row(path) for path in sorted(folder.glob("*.yaml"))]


def no_recipes(folder: Path) -> str:
    """Return the message for a folder without recipes."""
    from llmbuild.spec.files.reader import RECIPE_HINT

    return f"no *.yaml in {folder}: {RECIPE_HINT}"


def _recipe_row(path: Path) -> dict[str, object]:
    from llmbuild.frontend.source import at_hand, examine
    from llmbuild.report.knobs import left_out_here
    from llmbuild.spec.files.reader import read_recipe

    row = {"recipe": str(path), "model": "", "workloads": "", "objectives": "", "trials": "", "state": "ok"}
    row["left_out"] = ""
    try:
        recipe = read_recipe(path)
        model = recipe.model
        if (place := at_hand(model.location, model.random_init)) is not None:
            found = examine(place, model.random_init, recipe.context)
            row["left_out"] = "; ".join(map(str, left_out_here(recipe, found.files.folder)))
    except InputError as error:
        return {**row, "state": "; ".join(line.strip() for line in str(error).splitlines())}
    loads = " ".join(f"{w.name}:{w.prompt}+{w.output}" for w in recipe.workloads)
    return {
        **row,
        "model": recipe.name,
        "workloads": loads,
        "objectives": " ".join(recipe.objectives),
        "trials": recipe.budget.trials,
    }
