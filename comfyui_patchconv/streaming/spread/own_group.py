"""A process group of our own, beside any that the program or another library has."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, Union

import torch.distributed as dist


class OwnGroup:
    """Processes of one machine that find each other by a file, and that `torch.distributed` does not list: its default
    group, and whoever makes that, are left alone. They send through the machine's memory (Gloo, by the loopback
    device), whatever devices they compute on.

    path: a file that is not there yet, the same for all, in a folder that others cannot write to; it is there as long
    as the group. rank, count: which process this is, of how many. seconds: how long all may take to come. on_wait:
    called again and again while this rank waits for another; what it raises ends the call of all. Waits for the others.
    Raises RuntimeError where they do not come, and ValueError where this PyTorch has no Gloo.
    """

    def __init__(
        self, path: Union[str, Path], rank: int, count: int, seconds: float = 60.0,
        on_wait: Optional[Callable[[], None]] = None,
    ) -> None:  # fmt: skip
        if not dist.is_available() or not dist.is_gloo_available():
            raise ValueError("this PyTorch is built without Gloo, by which processes send to each other.")
        c10d: Any = dist
        self.rank, self.count, self.on_wait = rank, count, on_wait
        self.store = c10d.FileStore(str(path), -1)
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=seconds)
        self._gloo = c10d.ProcessGroupGloo(c10d.PrefixStore("gloo", self.store), rank, count, options)

    def send(self, tensor: Any, peer: int) -> Any:
        """Begin to send a tensor in the machine's memory to a rank; the work, to wait for."""
        return self._gloo.send([tensor], peer, 0)

    def receive(self, tensor: Any, peer: int, tag: int = 0) -> Any:
        """Begin to fill a tensor in the machine's memory with what a rank sends; the work, to wait for."""
        return self._gloo.recv([tensor], peer, tag)
