"""A real host in a process of its own, spoken to by HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

TIME = r"(\d+ min )?[\d.]+ s"
"""What matches a time in words, of a busy machine too."""


class HostProcess:
    """Runs `command`, with `--port` and a free one behind it, and keeps its log in `folder`."""

    def __init__(
        self, command: list[str], folder: Path, checkout: Path, environment: Optional[dict[str, str]] = None
    ) -> None:
        self.folder = folder
        self._command, self._checkout, self._environment = command, checkout, environment
        self.start()

    def start(self) -> None:
        """Once more after `stop`: another port, a new log, everything else as it was left."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._log = (self.folder / "log.txt").open("w")
        self._process = subprocess.Popen(
            [*self._command, "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            cwd=self._checkout, env=self._environment,
        )  # fmt: skip

    def wait(self, ready: Callable[[], object], seconds: float = 900) -> None:
        """Until `ready` says so; an OSError means no. Raises RuntimeError, with the end of its log, in the end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            with suppress(OSError):
                if ready():
                    return
            time.sleep(0.5)
        raise RuntimeError(f"the host did not start:\n{self.log()[-3000:]}")

    def check(self) -> None:
        """Fails the test, with the end of the log, if the host is gone."""
        assert self._process.poll() is None, self.log()[-3000:]

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def get(self, path: str, data: Optional[object] = None, seconds: float = 900) -> Any:
        """The answer to a GET, or to a POST of `data` as JSON; decoded if it is JSON."""
        request = urllib.request.Request(f"http://{self.address}{path}")
        if data is not None:
            request.data = json.dumps(data).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            body = answer.read()
        return json.loads(body) if body.lstrip()[:1] in (b"{", b"[") else body

    def workers(self) -> list[int]:
        """Its processes for other devices. Skips where nothing tells them from others."""
        tasks = Path(f"/proc/{self._process.pid}/task")
        if not tasks.exists():
            pytest.skip("this system has no /proc, by which a host's workers are found")
        children = {int(one) for task in tasks.iterdir() for one in (task / "children").read_text().split()}
        return sorted(one for one in children if "worker_script.py" in Path(f"/proc/{one}/cmdline").read_text())

    def kill(self) -> None:
        """End it so that it has no time for anything."""
        self._process.kill()

    def peak_of(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """What `work` returns, and the most bytes that the host's resident memory grew by meanwhile."""
        process = Path(f"/proc/{self._process.pid}")
        (process / "clear_refs").write_text("5")
        before = self._status("VmRSS")
        result = work()
        return result, self._status("VmHWM") - before

    @contextmanager
    def limited(self, more: int) -> Iterator[None]:
        """Within the block the host may take so many bytes of addresses more than it has now."""
        resource: Any = pytest.importorskip("resource", reason="limits of a process's memory are Unix's")
        if not hasattr(resource, "prlimit"):
            pytest.skip("limits of another process's memory are Linux's")

        def limit(size: int) -> None:
            resource.prlimit(self._process.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

        limit(self._status("VmSize") + more)
        try:
            yield
        finally:
            limit(resource.RLIM_INFINITY)

    def _status(self, field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{self._process.pid}/status").read_text(), re.M)
        assert found is not None
        return int(found[1]) * 1024


@contextmanager
def page_of(address: str, width: int, height: int) -> Iterator[Any]:
    """The host's page in a browser. CHROMIUM: the browser, by default `chromium` on the path."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it drives the browser")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium on the path: CHROMIUM names the browser to test with")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(900_000)
        page.goto(f"http://{address}")
        yield page
        browser.close()


def is_there(pid: int) -> bool:
    """Whether a process is, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def checkpoint_in(folder: Path, variable: str, name: Optional[str]) -> str:
    """Name of an SD 1.5 checkpoint in `folder`: `name`, which the environment's `variable` gives, or one that fits."""
    if name and not (folder / name).is_file():
        pytest.skip(f"{variable} is {name}, which is not in {folder}")
    found = [path.name for path in sorted(folder.glob("*.safetensors")) if re.search("sd15|v1-5", path.name)]
    if not name and not found:
        pytest.skip(f"no SD 1.5 checkpoint (*sd15*.safetensors or *v1-5*.safetensors) in {folder}")
    return name or found[0]


def assert_same_picture(one: np.ndarray, other: np.ndarray) -> None:
    """Levels `[H, W, 3]` of two pictures: at most one apart anywhere, and that in fewer than one value of 1000."""
    difference = np.abs(one.astype(int) - other.astype(int))
    print(f"largest difference {difference.max()}, values that differ {(difference > 0).mean():.2e}")
    assert one.std() > 1
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
