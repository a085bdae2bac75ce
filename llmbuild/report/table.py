"""Aligned tables that fit a terminal: text is folded first, then spare columns are dropped and named.

A pipe and a file have no width: their tables are never folded.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from llmbuild.system.terminal import cell

GAP = "  "
LEAST = 16
"""Least characters of a folded column."""


def terminal() -> int | None:
    """Return the width of the terminal that standard output is; None where it is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def table(
    header: Sequence[str],
    lines: Sequence[Sequence[object]],
    left: Sequence[int] = (0,),
    width: int | None = None,
    spare: Sequence[int] = (),
) -> str:
    """Return an aligned table of at most `width`; the columns in `left` are flush left, the rest flush right.

    A cell is one line, except text in `left` columns, which may be folded. If the table is still too wide, the `spare`
    columns are dropped in order, then others from the right; the last line names them.
    """
    rows = [[cell(c) for c in line] for line in (header, *lines)]
    natural = [max(len(row[i]) for row in rows) for i in range(len(header))]
    kept = list(range(len(header)))
    least = [min(w, LEAST) if i in left and i else w for i, w in enumerate(natural)]
    order = [*spare, *(i for i in reversed(kept) if i and i not in spare)]
    while width is not None and order and sum(least[i] for i in kept) + len(GAP) * (len(kept) - 1) > width:
        kept.remove(order.pop(0))
    widths = _shared(natural, least, kept, width)
    text = "\n".join(line for row in rows for line in _folded(row, widths, kept, left))
    gone = [rows[0][i] for i in range(len(header)) if i not in kept]
    if not gone:
        return text
    told = f"not shown: {', '.join(gone)}; a wider terminal, a pipe or --json shows all"
    return f"{text}\n{textwrap.fill(told, max(width or 0, LEAST))}"


def _shared(natural: Sequence[int], least: Sequence[int], kept: Sequence[int], width: int | None) -> dict[int, int]:
    """Return the width of each column: the widest foldable columns shrink until all fit."""
    widths = {i: natural[i] for i in kept}
    over = 0 if width is None else sum(widths.values()) + len(GAP) * (len(kept) - 1) - width
    for _ in range(max(0, over)):
        foldable = [i for i in kept if widths[i] > least[i]]
        if not foldable:
            break
        widths[max(foldable, key=lambda i: widths[i])] -= 1
    return widths


def _folded(row: Sequence[str], widths: dict[int, int], kept: Sequence[int], left: Sequence[int]) -> list[str]:
    """Return the lines of one row."""
    parts = {i: (textwrap.wrap(row[i], widths[i]) or [""]) if len(row[i]) > widths[i] else [row[i]] for i in kept}
    out = []
    for number in range(max(len(part) for part in parts.values())):
        texts = {i: part[number] if number < len(part) else "" for i, part in parts.items()}
        cells = (t.ljust(widths[i]) if i in left else t.rjust(widths[i]) for i, t in texts.items())
        out.append(GAP.join(cells).rstrip())
    return out
