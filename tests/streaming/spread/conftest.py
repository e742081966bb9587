"""Ranks for the tests of this folder: started once, and asked to run many programs."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT, environment


class Ranks:
    """Processes that run cases together."""

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this system has no os.fork, by which processes are copied")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("serve.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip

    def run(self, case: str, *arguments: Any, ranks: int, **options: Any) -> list[dict[str, Any]]:
        """What each rank found, none of which differs from eager or from the others."""
        asked = {"case": case, "arguments": arguments, "ranks": ranks, **options}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], LIMIT)[0]:
            raise TimeoutError(f"{case} has not ended after {LIMIT:g} s")
        found = json.loads(self._process.stdout.readline())
        errors = [one["error"] for one in found]
        assert errors == [""] * ranks, "\n".join(errors)
        assert len({one["result"] for one in found}) == 1
        return found

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.stop()
