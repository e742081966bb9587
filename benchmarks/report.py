"""Runs the benchmarks, and writes what all of them have kept into docs/benchmarks.md and the tables of other pages.

    python benchmarks/report.py [NAMES …] [--nvidia PATH/models/partialconv2d.py]     all of them, or those named
    python benchmarks/report.py --page                                                run none, write the page

Each leaves docs/benchmarks/NAME.json (see `harness.publish`), so they may run on different days and machines.
`vae_decode` needs the hosts that docs/numbers.md's table has: COMFYUI_PATH and COMFYUI_PYTHON, WEBUI_PATH and
WEBUI_PYTHON, TILED_VAE_PATH, and `autoencoders` the first two; `comparison.py` draws README.md's first picture, and is
run by itself.

In README.md and the pages of docs/ the lines between `<!-- benchmark: NAME; COLUMNS -->` and `<!-- /benchmark -->` are
replaced. COLUMNS, parted by semicolons, are columns in the order wanted, all of them by default; `COLUMN=VALUE` keeps
the rows that have this value, or another that is given for the column, and does not show the column unless it is named
as well.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import charts
from harness import RESULTS, ROOT, Result, table

BENCHMARKS = {
    "single_conv": ["single_conv.py"],
    "vae_decode": ["vae_decode.py", "--sizes", "1024", "--rounds", "2"],
    "streaming": ["streaming.py"],
    "streaming_encode": ["streaming.py", "--encode"],
    "streaming_half": [
        *("streaming.py", "--name", "streaming_half", "--sizes", "512", "--dtype", "bfloat16"),
        *("--methods", "exact", "eager", "streamed", "--rounds", "1"),
    ],
    "streaming_bounded": [
        *("streaming.py", "--name", "streaming_bounded", "--sizes", "2048"),
        *("--methods", "streamed", "bounded", "--rounds", "2"),
    ],
    "streaming_4096": [
        *("streaming.py", "--name", "streaming_4096", "--sizes", "4096", "--methods", "bounded", "--rounds", "1"),
    ],
    "needs": ["needs.py"],
    "streaming_video": ["streaming_video.py"],
    "autoencoders": ["autoencoders.py"],
    "spread": ["spread.py", "measured"],
    "spread_beside": ["spread.py", "beside"],
    "spread_reckoned": ["spread.py", "reckoned"],
    "upscale": ["upscale.py"],
    "architectures": ["architectures.py"],
    "overhead_planning": ["overhead.py", "planning"],
    "overhead_calls": ["overhead.py", "calls"],
    "overhead_convolution": ["overhead.py", "convolution"],
    "partial_conv": ["partial_conv.py"],
    "patch_diffusion": ["patch_diffusion.py"],
    "patch_ddpm": ["patch_ddpm.py"],
}
"""What each is run by, in the order of the page; others that have kept something stand behind them."""

_MARKED = re.compile(r"(<!-- benchmark: ([^>]*?) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def results(folder: Path = RESULTS) -> dict[str, Result]:
    """What the benchmarks have kept, by name, in the order of the page."""
    names = sorted(path.stem for path in folder.glob("*.json"))
    order = [name for name in BENCHMARKS if name in names] + [name for name in names if name not in BENCHMARKS]
    return {name: Result(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))) for name in order}


def page(kept: dict[str, Result]) -> str:
    """docs/benchmarks.md: of each benchmark what was measured, a chart, its table, and how to repeat it."""
    parts = [
        "# Benchmarks",
        "Written by `python benchmarks/report.py` from what the benchmarks have kept in `docs/benchmarks/`: no figure "
        "is typed by hand. MB are 10⁶ bytes.",
    ]
    for name, result in kept.items():
        parts += [f"## {result.title}", result.what]
        parts += [f"![{result.title}](benchmarks/{name}.svg)"] if result.bars else []
        parts += [table(result.head, result.rows), f"{measured(result)}. To repeat it: `{result.command}`"]
    return "\n\n".join(parts) + "\n"


def measured(result: Result) -> str:
    """A sentence on where and when a benchmark was run, of which commit, and with which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    commit = f"commit {result.commit}, " if result.commit else ""
    return f"Measured on {result.date}: {commit}{result.machine}, {versions}"


def filled(text: str, kept: dict[str, Result]) -> str:
    """`text` with the tables between its marks made anew. KeyError for a benchmark, ValueError for a column or value,
    that is not there."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{_chosen(found[2], kept)}\n\n{found[3]}", text)


def _chosen(mark: str, kept: dict[str, Result]) -> str:
    name, *wanted = (part.strip() for part in mark.split(";"))
    if name not in kept:
        raise KeyError(f"<!-- benchmark: {mark} -->: there is no docs/benchmarks/{name}.json.")
    head, rows = kept[name].head, kept[name].rows
    shown = [column for column in wanted if "=" not in column] or head
    kept_values: dict[str, set[str]] = {}
    for condition in wanted:
        column, equals, value = condition.partition("=")
        if equals:
            kept_values.setdefault(column, set()).add(value)
    for column, values in kept_values.items():
        rows = [row for row in rows if row[_place(column, head, mark)] in values]
        if missing := values - {row[_place(column, head, mark)] for row in rows}:
            raise ValueError(f"<!-- benchmark: {mark} -->: no row has {sorted(missing)[0]!r} under {column}.")
    places = [_place(column, head, mark) for column in shown]
    return table(shown, [[row[place] for place in places] for row in rows])


def _place(column: str, head: list[str], mark: str) -> int:
    if column not in head:
        raise ValueError(f"<!-- benchmark: {mark} -->: no column is called {column!r}; there are {', '.join(head)}.")
    return head.index(column)


def write() -> None:
    """The page, its charts, and the tables of other pages."""
    kept = results()
    (ROOT / "docs" / "benchmarks.md").write_text(page(kept), encoding="utf-8")
    for name, result in kept.items():
        if result.bars:
            (RESULTS / f"{name}.svg").write_text(charts.svg(result), encoding="utf-8")
    for path in pages():
        path.write_text(filled(path.read_text(encoding="utf-8"), kept), encoding="utf-8")


def pages() -> list[Path]:
    """README.md and the pages of docs/ that are written by hand."""
    written = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "benchmarks.md"]
    return [ROOT / "README.md", *written]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--page", action="store_true", help="run none")
    parser.add_argument("--nvidia", help="models/partialconv2d.py of NVIDIA/partialconv, for partial_conv")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"{sorted(unknown)[0]!r} is no benchmark: choose from {', '.join(BENCHMARKS)}.")
    for name in [] if args.page else args.names or BENCHMARKS:
        script, *more = BENCHMARKS[name]
        if name == "partial_conv" and args.nvidia:
            more += ["--nvidia", args.nvidia]
        print(f"\n# {name}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *more], check=True)
    write()


if __name__ == "__main__":
    main()
