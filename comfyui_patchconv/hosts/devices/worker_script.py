"""The script that a worker process begins as: makes our package importable by the name that it has in the host.

The first line that comes in is JSON: `path` and `argv`, the host's; `package`, our name there, and `folder`, where it
lies; `calls`, functions as `module:name`, by which the host prepares what the worker will import. No module of ours is
imported before: hosts load packs by names that no search path has, or from folders that are on it for a moment.
"""

import importlib
import importlib.util
import json
import os
import signal
import sys
from types import ModuleType


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the host: the worker ends with that
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print is not for the host to read
    given = json.loads(sys.stdin.buffer.readline())
    sys.path[:], sys.argv[:] = given["path"], given["argv"]
    _make_known(given["package"], given["folder"])
    worker = importlib.import_module(f"{given['package']}.hosts.devices.worker")
    worker.serve(sys.stdin.buffer, answers, given["calls"])


def _make_known(package: str, folder: str) -> None:
    """Have `package`, which lies in `folder`, imported from there, and nothing else that lies there."""
    parent, _, name = package.rpartition(".")
    if parent:
        module = sys.modules[parent] = ModuleType(parent)
        module.__path__ = [folder]
        return
    place = os.path.join(folder, name)
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(place, "__init__.py"), submodule_search_locations=[place]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if __name__ == "__main__":
    main()
