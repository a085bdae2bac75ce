"""Reference pages from the code: knobs, metrics, recipe and target keys, the catalog's views. Writes Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel


def write(folder: Path) -> None:
    """Write every generated page into `folder`; a page that did not change keeps its time."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"knobs": knobs(), "formats": formats(), "metrics": metrics(), "recipe": recipe(), "target": target()}
    pages["fleet"] = fleet()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def knobs() -> str:
    """Return the page of all knobs, and of what is left out of the search space on purpose."""
    from llmbuild.report.knobs import knob_rows

    rows = knob_rows(None)
    columns = ("knob", "level", "backends", "default", "domain", "when", "meaning")
    kept = [row for row in rows if row["level"] != "excluded"]
    left = [row for row in rows if row["level"] == "excluded"]
    return "\n".join(
        [
            "# Knobs\n",
            "`llmbuild targets --knobs` prints this table; `-t TARGET` prints the knobs of one target.\n",
            table(columns, ([row[c] for c in columns] for row in kept)),
            "\n## Left out of the search space\n",
            table(("choice", "backends", "reason"), ([r["knob"], r["backends"], r["meaning"]] for r in left)),
            "",
        ]
    )


def formats() -> str:
    """Return the page of all weight formats: their size, and which code reads them on which targets."""
    from llmbuild.kernels.choose import needs
    from llmbuild.kernels.layouts import FORMATS as OWN
    from llmbuild.kernels.matvec import FORMATS as GPU
    from llmbuild.spec.formats import BLOCKS, WEIGHT_FORMATS, bits

    rows = (
        [
            f"`{form}`",
            f"{bits(form):g}" if form in OWN else "",
            "" if form in BLOCKS else f"{bits(form, panels=False):g}",
            "" if form in BLOCKS else "every target",
            f"CPUs with {needs(form)}" if form in OWN else "",
            "GPUs" if form in GPU else "",
        ]
        for form in WEIGHT_FORMATS
    )
    bits_of = "bits, packed for `kernel=own`", "bits elsewhere"
    columns = ("format", *bits_of, "`kernel=compiler`", "`kernel=own`, packed", "`kernel=own`, row-major")
    return "\n".join(
        [
            "# Weight formats\n",
            "Values of the knobs `weight_format` and `head_format`, and what reads them. Bits are those of a weight,",
            "scales of groups included. Packed for `kernel=own`, codes of any length lie together; elsewhere only",
            "codes of 4 bits share a byte, and scales of groups take 16 bits.\n",
            table(columns, rows),
            "",
        ]
    )


def metrics() -> str:
    """Return the page of all metrics: their units, which way is better, and what they mean."""
    from llmbuild.spec.slo import METRICS

    better = {"min": "lower", "max": "higher"}
    rows = ([f"`{m.name}`", m.unit, better[m.direction], m.meaning] for m in METRICS.values())
    return f"# Metrics\n\n{table(('metric', 'unit', 'better', 'meaning'), rows)}\n"


def recipe() -> str:
    """Return the page of a recipe's keys, read from the models that parse it."""
    from llmbuild.spec.files.reader import _Recipe

    return f"# Keys of a recipe\n\n{keys(_Recipe)}\n"


def target() -> str:
    """Return the page of a target file's keys, read from the model that parses it."""
    from llmbuild.spec.files.reader import _Target

    return f"# Keys of a target file\n\n{keys(_Target)}\n"


def fleet() -> str:
    """Return the page of a fleet file's keys, read from the model that parses it."""
    from llmbuild.spec.files.fleet import _Fleet

    return f"# Keys of a fleet file\n\n{keys(_Fleet)}\n"


def keys(model: type[BaseModel]) -> str:
    """Return a table of a model's keys with their types and defaults; keys of nested models are dotted."""
    return table(("key", "type", "default"), _rows(model, ""))


def _rows(model: type[BaseModel], prefix: str) -> Iterable[list[str]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        nested = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
        if nested:
            yield [f"`{key}`", "mapping", default if default == "required" else ""]
            for inner in nested:
                yield from _rows(inner, f"{key}.")
        else:
            yield [f"`{key}`", _name(field.annotation) + _range(field.metadata), default]


def _types(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(t for arg in inner for t in _types(arg))]


_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping"}


def _name(annotation: Any) -> str:
    """Return a type in words."""
    inner = [arg for arg in get_args(annotation) if arg not in (type(None), ...)]
    if get_origin(annotation) is Annotated:
        return f"{_name(inner[0])}{_range(inner[1:])}"
    if get_origin(annotation) is tuple:
        return f"list of {_name(inner[0])}"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{arg}`" for arg in inner)
    if get_origin(annotation) is dict:
        return f"mapping to {_name(inner[1])}" if len(inner) > 1 else "mapping"
    if inner:
        return " or ".join(dict.fromkeys(map(_name, inner)))
    return _WORDS.get(annotation, str(getattr(annotation, "__name__", annotation)).lower())


def _range(about: Sequence[Any]) -> str:
    """Return the bounds of a number that are written beside its type."""
    facts = [fact for one in about for fact in getattr(one, "metadata", [one])]
    told = [f"{sign} {getattr(fact, name)}" for fact in facts for name, sign in _SIGNS.items() if hasattr(fact, name)]
    return f", {', '.join(told)}" if told else ""


_SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; bars, line breaks and tags in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text if "`" in text else text.replace("<", "&lt;")
