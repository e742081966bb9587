"""The tables of `on_gpu.py`, each in files of its own that are written anew with every row."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Result, result_of, table

from .cases import ABOUT, Case

Found = dict[str, Any]

FIGURES = [
    "peak MB", "expected MB", "memory / eager", "all MB", "reserved MB", "ms", "time / eager", "launches", "rows",
    "largest error", "mean error",
]  # fmt: skip
WHAT = (
    "{dtype}. Peak is memory beyond the weights and the input, expected what the plan said of it; all and reserved are "
    "what torch's tensors and its allocator had at once; rows are those of a strip of the pass that computes most. "
    "{clock} Errors are differences to float64, of its range, where they were measured."
)
CLOCKS = {
    "cuda": "Time is between two events: the median of up to seven runs behind a first one, or that of a first one of "
    "more than ten seconds. Launches are kernels, by torch's profiler. By PyTorch's operators alone is "
    "PATCHCONV_KERNELS=torch.",
    "cpu": "Of toys on a CPU, to see that it runs: no figure here says anything. Launches are operators.",
}


class Tables:
    """Rows in the order of the cases, by table, and the folder that they are written to."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.found: dict[str, list[tuple[Case, Found]]] = {}

    def add(self, case: Case, found: Found) -> None:
        """One more row; its table is written."""
        self.found.setdefault(case.table, []).append((case, found))
        self.write(case.table)

    def write(self, name: str) -> None:
        """NAME.json, as `harness.Result` has it, and NAME.md."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.result(name)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(asdict(kept), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        versions = ", ".join(f"{package} {version}" for package, version in kept.versions.items())
        text = f"# {kept.title}\n\n{kept.what}\n\n{kept.machine}, {versions}, {kept.date}\n\n"
        text += table(kept.head, kept.rows) + "\n"
        path.with_suffix(".md").write_text(text, encoding="utf-8")

    def result(self, name: str) -> Result:
        """A table as it stands."""
        about, cases = ABOUT[name], self.found[name]
        dtypes = " and ".join(dict.fromkeys(case.dtype for case, _ in cases))
        profile = name == "profile"
        head = ["method", "kernel", "launches", "ms", "share"] if profile else [about.unit, "method", *FIGURES]
        rows = [row for case, found in cases for row in (_kernels if profile else self._row)(case, found)]
        what = about.what + WHAT.format(dtype=dtypes, clock=CLOCKS.get(self.device, CLOCKS["cpu"]))
        if profile:
            what = f"{about.what}{dtypes}, {cases[0][0].what}. Time is that of the kernels, as torch's profiler has it."
        return result_of(
            f"gpu_{name}", about.title, what, head, rows, device=self.device,
            bars=[] if profile else ["peak MB", "ms"],
        )  # fmt: skip

    def _row(self, case: Case, found: Found) -> list[list[str]]:
        first = [case.what, case.label]
        if "seconds" not in found:
            return [[*first, _why(found), *[""] * (len(FIGURES) - 1)]]
        base = next(
            (one for other, one in self.found[case.table] if (other.what, other.method) == (case.what, "eager")), {}
        )
        ratios = [
            f"{found[key] / base[key]:.2f}" if found.get(key) and base.get(key) else "" for key in ("peak", "seconds")
        ]
        peak, expected, everything, reserved = (_megabytes(found.get(key)) for key in KEYS)
        errors = [f"{value:.2e}" for value in found.get("errors", ())] or ["", ""]
        milliseconds = f"{found['seconds'] * 1000:.1f}"
        launches, rows = (str(found.get(key) or "") for key in ("launches", "rows"))
        return [
            [*first, peak, expected, ratios[0], everything, reserved, milliseconds, ratios[1], launches, rows, *errors]
        ]  # fmt: skip


KEYS = ("peak", "expected", "all", "reserved")


def _why(found: Found) -> str:
    """Why a row has no figures."""
    return found.get("error") or f"left out: {found.get('lacking', 'no reason was given')}"


def _megabytes(size: Any) -> str:
    return f"{size / 1e6:.1f}" if size else ""


def _kernels(case: Case, found: Found) -> list[list[str]]:
    """The rows of a profile: all kernels together, then each."""
    if "seconds" not in found:
        return [[case.label, _why(found), "", "", ""]]
    count, total = found["all"]
    wall = found["seconds"] * 1000
    rows = [[case.label, "all, of the time of the call", str(count), f"{total:.2f}", f"{total / wall:.0%}"]]
    for name, (times, milliseconds) in found["kernels"]:
        share = f"{milliseconds / max(total, 1e-9):.1%}"
        rows.append([case.label, name[:100].replace("|", "/"), str(times), f"{milliseconds:.2f}", share])
    return rows
