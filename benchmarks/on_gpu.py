"""All that is to be known of a GPU: the tests that need one, and the tables, the most valuable first.

    bash benchmarks/on_gpu.sh [FOLDER] [--device cuda|cpu] [--minutes 9] [--quick] [--tables NAMES …] [--no-tests]

Needs PyTorch and nothing else. Where diffusers is missing, Stable Diffusion's and Flux's VAE are of the same layout in
plain PyTorch, and what only diffusers has is left out, which its rows say. FOLDER (`on_gpu`) gets tests.txt, and of
each table NAME.md and NAME.json, written anew with each row. A case that fails, or for which no time is left, is a row
that says so. --quick: toys, so that a CPU has all tables in seconds. The exit code is 1 where a test fails, or a case
of ours, or any toy, does for another reason than memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from gpu.cases import ABOUT, Case, of_a_gpu, of_toys
from gpu.clock import Clock
from gpu.process import Process
from gpu.tables import Tables
from gpu.work import serve

ROOT = Path(__file__).resolve().parents[1]

TESTS_SHARE = 0.4
"""Of the time, what the tests may take."""

SECONDS_TO_END = 15.0
"""For tests that are interrupted, until they have said what failed."""


def main() -> int:
    """Run all of it; returns the exit code."""
    args = arguments()
    if args.worker:
        serve(args.device)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("on_gpu: no CUDA device is here; --device cpu --quick runs the same on a CPU.", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(args.minutes)
    passed = args.no_tests or tests(args.device, args.folder, TESTS_SHARE * clock.left)
    cases = [case for case in (of_toys() if args.quick else of_a_gpu()) if case.table in args.tables]
    print(f"on_gpu: {len(cases)} cases, {clock.left:.0f} s are left", flush=True)
    failed = measure(cases, Tables(args.folder, args.device), clock, args.device)
    for case, error in failed:
        print(f"on_gpu: {case.table}, {case.what}, {case.label}: {error}", file=sys.stderr)
    return int(not passed or any(case.ours or args.quick for case, _ in failed))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("on_gpu"), metavar="FOLDER")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toys instead of real networks")
    parser.add_argument("--tables", nargs="+", choices=list(ABOUT), default=list(ABOUT), help="default: all")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu" and not (args.quick or args.worker):
        parser.error("a CPU has toys alone: add --quick.")
    return args


def tests(device: str, folder: Path, seconds: float) -> bool:
    """Run `tests/on_cuda`; what it prints is kept in tests.txt. True where nothing failed, or pytest is not there."""
    path = folder / "tests.txt"
    if importlib.util.find_spec("pytest") is None:
        path.write_text("pytest is not installed here: no test was run.\n", encoding="utf-8")
        print(f"on_gpu: {path.read_text(encoding='utf-8')}", end="", flush=True)
        return True
    command = [sys.executable, "-m", "pytest", "tests/on_cuda", "-m", "cuda", "--device", device, "-q", "-rsfE",
               "-p", "no:cacheprovider", "--durations=10"]  # fmt: skip
    with path.open("w", encoding="utf-8") as output:
        running = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        code = _ended(running, seconds)
        if code is None:
            output.write(f"\nThe tests took longer than {seconds:.0f} s and were ended.\n")
    print(path.read_text(encoding="utf-8")[-4000:], flush=True)
    return code == 0


def _ended(running: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process; None where it took longer than so many seconds. It is interrupted then, so that it
    says what failed until then, and killed where it does not end of that."""
    try:
        return running.wait(seconds)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT) if sys.platform != "win32" else running.terminate()
    try:
        running.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
    return None


def measure(cases: list[Case], tables: Tables, clock: Clock, device: str) -> list[tuple[Case, str]]:
    """Fill the tables. Returns which cases went wrong, and how; that memory did not suffice is not wrong."""
    command = [sys.executable, __file__, "--worker", "--device", device]
    process, failed = Process(command), []
    try:
        for case in cases:
            found = one(case, process, clock)
            tables.add(case, found)
            if found.get("error", "out of memory") != "out of memory":
                failed.append((case, found["error"]))
            print(f"  {clock.left:4.0f} s  {case.table}  {tables.result(case.table).rows[-1]}", flush=True)
    finally:
        process.end()
    return failed


def one(case: Case, process: Process, clock: Clock) -> dict[str, Any]:
    """What a case gives; why it does not."""
    if not clock.fits(case.seconds):
        return {"lacking": "no time was left"}
    start = time.monotonic()
    found = process.ask(case, clock.limit(case.seconds))
    clock.took(case.seconds, time.monotonic() - start)
    return found


if __name__ == "__main__":
    sys.exit(main())
