"""Bars of a benchmark's results as an SVG that looks right on a light and on a dark page.

Charts of the package are pictures, drawn by `comfyui_patchconv/hosts/chart.py`. These are text instead: they
take the page's colours and fonts, are sharp at any size, and where one number changes, one line does.
"""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import Optional

from harness import Result

LABEL, BAR, ROW, GAP = 330, 330, 24, 40
"""Width of a row's label and of a column of bars, height of a row, space between columns, in pixels."""

OURS = ("ours", "Patch Conv")
"""What a label has in it whose bars are in colour."""

_STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
  .head, .group { font-weight: 600 } .bar { fill: #8ba6c9 } .ours { fill: #1668c7 }
  @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #56677f } .ours { fill: #4c9bf5 } }
"""


def number(cell: str) -> Optional[float]:
    """The number in a cell; None where it holds none."""
    try:
        return float(cell)
    except ValueError:
        return None


def svg(result: Result) -> str:
    """A bar for each row and each column of `result.bars`, from zero. A row is called by the cell before the first of
    them, and stands under what the cells before that say."""
    first = min(result.head.index(name) for name in result.bars)
    groups = [(" · ".join(key), [*rows]) for key, rows in groupby(result.rows, lambda row: row[: first - 1])]
    shown = [result.head.index(name) for name in result.bars]
    longest = {column: max((number(row[column]) or 0 for row in result.rows), default=0) or 1 for column in shown}
    width = LABEL + len(shown) * (BAR + GAP)
    parts, y = [], 34
    for place, column in enumerate(shown):
        parts.append(_text(LABEL + place * (BAR + GAP), 18, result.head[column], "head"))
    for name, rows in groups:
        if name:
            parts.append(_text(0, y + 16, name, "group"))
            y += ROW
        for row in rows:
            label = row[first - 1]
            parts.append(_text(12, y + 16, label))
            kind = "ours" if any(word in label for word in OURS) else "bar"
            for place, column in enumerate(shown):
                x, value = LABEL + place * (BAR + GAP), number(row[column])
                length = 0 if value is None else max(1.0, value / longest[column] * (BAR - 70))
                if value is not None:
                    parts.append(f'<rect class="{kind}" x="{x}" y="{y + 4}" width="{length:.1f}" height="15" rx="2"/>')
                parts.append(_text(x + length + 6, y + 16, row[column]))
            y += ROW
        y += 8
    title = f"<title>{escape(result.title)}: {escape(', '.join(result.bars))}</title>"
    size = f'viewBox="0 0 {width} {y}" width="{width}" height="{y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([head, title, f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    what = f' class="{kind}"' if kind else ""
    return f'<text{what} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
