"""A rank that fails, is gone or hangs: the others say which one it was, in the same sentence, and leave nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from processes import ended

SAID = {
    "raises": "rank 1 raised KeyError: 'no such key'",
    "fails_in_its_code": "rank 1 raised LookupError: nothing is there",
    "runs_out_of_room": "rank 1 raised OSError: no room for",
    "is_killed": "rank 1 has ended or cannot be reached from rank",
    "has_left": "rank 1 has ended or cannot be reached from rank",
    "is_stopped": "rank 1 has not been heard of for 9 s: see what it said last",
    "stays_away": "rank 1 did not come to this call for 9 s: see what it said last",
    "has_another_input": "rank 1 has another input than rank 0",
    "does_something_else": "rank 1 is to compute something else than rank 0",
    "asks_for_less": "rank 1 has ended a call in which rank 0 waits for it",
}
BY_TIME = ("is_stopped", "stays_away", "asks_for_less")
"""What nobody sees but by waiting; the rest is told at once, whatever the limit."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork, by which processes are copied")
@pytest.mark.parametrize("how", SAID)
def test_the_others_end(how: str, tmp_path: Path) -> None:
    seconds = 9 if how in BY_TIME else 10_000
    done = ended([Path(__file__).with_name("fail.py"), how, seconds], TMPDIR=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {one["rank"]: one for one in map(json.loads, done.stdout.splitlines())}
    others = [found[0], found[2]]
    assert all(one["raised"].startswith(f"SpreadError: {SAID[how]}") for one in others), others
    assert others[0]["raised"] == others[1]["raised"]
    assert all(one["again"].startswith("SpreadError: the ranks of this group cannot go on: rank 1") for one in others)
    assert not any(one["threads"] for one in others), "a thread that waits as Python ends aborts the process"
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")]
