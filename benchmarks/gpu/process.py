"""The other end of `work.serve`: a process that a crash ends, and not us."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Optional

from .cases import Case


class Process:
    """Runs cases by `command`, in one process as long as that lives; the next case begins another."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._running: Optional[subprocess.Popen[str]] = None
        self._answers: queue.Queue[str] = queue.Queue()

    def ask(self, case: Case, seconds: float) -> dict[str, Any]:
        """What a case gives, or `{"error": …}` where the process ends over it or takes longer than so many seconds."""
        running = self._running or self._start()
        assert running.stdin is not None
        with suppress(OSError):  # it has ended already, which its answer says
            running.stdin.write(json.dumps(asdict(case)) + "\n")
            running.stdin.flush()
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            if hasattr(signal, "SIGUSR1"):
                running.send_signal(signal.SIGUSR1)  # it prints where it is
                time.sleep(1)
            self.end()
            return {"error": f"took longer than {seconds:.0f} s"}
        if not answer:
            code = running.wait()
            self.end()
            return {"error": f"the process ended with {code}"}
        found = json.loads(answer)
        if found.pop("ends", False):
            self.end()
        return found

    def end(self) -> None:
        """End the process, if there is one."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None

    def _start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"KINETO_LOG_LEVEL": "99"}  # torch's profiler tells of each of its runs
        pipe = subprocess.PIPE
        running = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._running, self._answers = running, queue.Queue()
        threading.Thread(target=_read, args=(running, self._answers), daemon=True).start()
        return running


def _read(running: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    """Hand on what is a line of JSON, and an empty text at the end."""
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("{"):
            answers.put(line)
    answers.put("")
