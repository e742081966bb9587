"""Runs cases in fresh processes, in turn, and collects what each measured."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from typing import Any

import torch


def run_fresh(case: dict[str, Any], command: list[str]) -> dict[str, Any]:
    """What `command --worker CASE` prints as its last line, in a process of its own; `{"error": …}` if it fails."""
    done = subprocess.run([*command, "--worker", json.dumps(case)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"error": "out of memory" if done.returncode == -9 else lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rounds(cases: list[dict[str, Any]], commands: list[list[str]], times: int) -> list[dict[str, Any]]:
    """For each case: median `seconds` and largest `peak` over `times` fresh processes, the cases taken in turn."""
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


def machine(device: str) -> str:
    """One line that says what the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
