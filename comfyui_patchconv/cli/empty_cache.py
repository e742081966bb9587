"""The empty folder that torch leaves for compiled code, in runs that compile none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def no_empty_cache() -> Iterator[None]:
    """Removes `torchinductor_*` from the folder for temporary files afterwards, if it is new and empty.

    `import torch._dynamo`, which diffusers and torch's optimizers do, makes it (torch 2.13). It is made again when it
    is needed.
    """
    before = set(_folders())
    try:
        yield
    finally:
        for folder in _folders():
            if folder not in before:
                with suppress(OSError):  # not empty
                    folder.rmdir()


def _folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("torchinductor_*"))
