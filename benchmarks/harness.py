"""Runs cases in fresh processes, in turn, collects what each measured, and keeps it for `report.py`."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True)
class Result:
    """What one benchmark found, as `docs/benchmarks/NAME.json` keeps it. Cells are text, as they are shown.

    commit: of this repository, short; empty where it is not known. bars: columns of `head` that are drawn.
    """

    title: str
    what: str
    head: list[str]
    rows: list[list[str]]
    machine: str
    versions: dict[str, str]
    date: str
    command: str
    bars: list[str] = field(default_factory=list)
    commit: str = ""


def publish(
    name: str,
    title: str,
    what: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    device: str,
    bars: Sequence[str] = (),
    packages: Sequence[str] = (),
    versions: dict[str, str] | None = None,
    environment: Sequence[str] = (),
    folder: Path = RESULTS,
) -> Path:
    """Print a table and keep it, with machine, versions, date and this process's command, in `folder`/NAME.json.

    what: one or two sentences on what was measured and how. packages: distributions whose versions matter, beside
    torch; `versions` names others. environment: variables that the command needs. ValueError where a row has another
    length than `head`, two columns have one name, or `bars` names one that is not there.
    """
    result = result_of(
        name, title, what, head, rows, device=device, bars=bars, packages=packages, versions=versions,
        environment=environment,
    )  # fmt: skip
    path = keep(name, result, folder)
    print(f"{what}\n{machine(device)}\n\n{table(result.head, result.rows)}\n\nKept in {path}", flush=True)
    return path


def keep(name: str, result: Result, folder: Path = RESULTS) -> Path:
    """Write a table to `folder`/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def kept_rows(name: str, title: str, folder: Path = RESULTS) -> list[list[str]]:
    """The rows of the table that was kept as `name`, if it has this title; none otherwise."""
    path = folder / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found["rows"] if found.get("title") == title else []


def result_of(
    name: str, title: str, what: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, device: str,
    bars: Sequence[str] = (), packages: Sequence[str] = (), versions: dict[str, str] | None = None,
    environment: Sequence[str] = (),
) -> Result:  # fmt: skip
    """What `publish` keeps, by the same arguments; it raises what that raises."""
    _check(name, head, rows, bars)
    return Result(
        title=title,
        what=what,
        head=[*head],
        rows=[[*row] for row in rows],
        machine=_place(device),
        versions={
            "torch": torch.__version__,
            "Python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
            **(versions or {}),
        },
        date=date.today().isoformat(),
        command=command(sys.argv, environment),
        bars=[*bars],
        commit=_commit(),
    )


def _check(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], bars: Sequence[str]) -> None:
    """Raises ValueError for what `publish` refuses."""
    if wrong := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"{name}: a row of {len(wrong[0])} cells under {len(head)} headings: {wrong[0]}.")
    if twice := {column for column in head if head.count(column) > 1}:
        raise ValueError(
            f"{name}: two columns are called {sorted(twice)[0]!r}: a table of another page could not tell them."
        )
    if unknown := set(bars) - set(head):
        raise ValueError(f"{name}: no column is called {sorted(unknown)[0]!r}; there are {', '.join(head)}.")


def command(argv: Sequence[str], environment: Sequence[str] = ()) -> str:
    """The command that repeats this process: the script as seen from the repository, and no path of this machine."""
    words = [f"{name}=…" for name in environment if os.environ.get(name)]
    words += ["python", f"{Path(__file__).parent.name}/{Path(argv[0]).name}"]
    for word in argv[1:]:
        option, equals, value = word.rpartition("=")
        if Path(value).is_absolute():
            words.append(f"{option}{equals}…/{Path(value).name}")
        else:
            words.append(shlex.quote(word))
    return " ".join(words)


def run_fresh(case: dict[str, Any], command: list[str]) -> dict[str, Any]:
    """What `command --worker CASE` prints as its last line, in a process of its own; `{"error": …}` if it fails."""
    done = subprocess.run([*command, "--worker", json.dumps(case)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"error": "out of memory" if done.returncode == -9 else lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rounds(cases: list[dict[str, Any]], commands: list[list[str]], times: int) -> list[dict[str, Any]]:
    """Median `seconds` and largest `peak` of each case over `times` fresh processes, the cases taken in turn."""
    results: list[list[dict[str, Any]]] = [[] for _ in cases]
    for number in range(times):
        for case, command, found in zip(cases, commands, results):
            if number == 0 or "error" not in found[0]:
                found.append(run_fresh(case, command))
                print(f"  {number + 1}/{times} {case} -> {found[-1]}", file=sys.stderr, flush=True)
    merged = []
    for found in results:
        bad = next((one for one in found if "error" in one), None)
        if bad is not None:
            merged.append(bad)
            continue
        seconds = [second for one in found for second in one["seconds"]]
        merged.append(found[0] | {"seconds": statistics.median(seconds), "peak": max(one["peak"] for one in found)})
    return merged


def latent_of(case: dict[str, Any]) -> torch.Tensor:
    """The latent `[1, 4, H, W]` in the file that `case` names, or noise for an image of its size."""
    if "latent" in case:
        return torch.load(case["latent"], weights_only=True)
    side = case["size"] // 8
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))


def _commit() -> str:
    """The short hash of this checkout's commit, with a `+` where files differ from it; empty without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip() + "+" * bool(changed)


def machine(device: str) -> str:
    """One line that says what the figures were measured on."""
    return f"{_place(device)}, torch {torch.__version__}, Python {platform.python_version()}"


def _place(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    """The processor's name, and the widest instructions that torch uses of it: ratios differ by them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} with {torch.backends.cpu.get_cpu_capability()}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
