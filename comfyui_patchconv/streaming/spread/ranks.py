"""Sends to the other ranks of a process group, and receives from them."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import SpreadError
from .own_group import OwnGroup
from .watch import Watch

_FOREVER = timedelta(days=365)
"""For a wait that `Watch` ends: Gloo closes a connection on which a wait ran out."""

_LOOK = 0.25
"""Seconds between two looks at who is there, while one waits."""

_NEVER = 3628800
"""A tag that nothing is sent with. Gloo has connections for each network, and takes those of its remainder: 0 by any
number up to ten."""

_ASK = 5e-4
"""Seconds between two looks at whether it is done, of a device's message."""


class _Past:
    """Of a group: how many calls its ranks have made together, and why they can make no more."""

    def __init__(self) -> None:
        self.calls, self.failed = 0, ""


_pasts: WeakKeyDictionary[Any, _Past] = WeakKeyDictionary()


class Peers:
    """This process among others that it sends to and receives from. rank, count: which one it is, of how many. device:
    where bytes have to lie that are sent."""

    rank: int
    count: int
    device: torch.device

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send each rank the bytes for it, and fill those that come from each: flat uint8 tensors on `device`.

        Others have to expect the same. Raises SpreadError where that cannot be.
        """
        raise NotImplementedError

    def of_all(self, mine: Tensor) -> list[Tensor]:
        """What each rank gave: flat uint8 tensors on `device`, of one size."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        found = {rank: torch.empty_like(mine) for rank in others}
        self.exchange(dict.fromkeys(others, mine), found)
        return [found.get(rank, mine) for rank in range(self.count)]

    def room(self, size: int) -> Tensor:
        """Room for so many bytes that come from another rank."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)


class _Some(Peers):
    """Some of the ranks of a group, this process among them."""

    def __init__(self, ranks: Peers, numbers: Sequence[int]) -> None:
        self._ranks, self._numbers = ranks, numbers
        self.rank, self.count, self.device = numbers.index(ranks.rank), len(numbers), ranks.device

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        self._ranks.exchange(
            *({self._numbers[rank]: one for rank, one in each.items()} for each in (outgoing, incoming))
        )


class Ranks(Peers):
    """This process among those of `group`, which is one of `torch.distributed` or an `OwnGroup`.

    rank, count: which one it is, of how many. sent, messages: bytes sent to others so far, and in how many pieces.
    seconds: how long another one may be silent. Raises ValueError where this process is none of the group, and for no
    seconds.
    """

    def __init__(self, group: Any, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"silent_seconds is {seconds:g}: give a number of seconds above 0.")
        self._group: Any = group
        self._own = group if isinstance(group, OwnGroup) else None
        if self._own is not None:
            self.rank, self._ranks = self._own.rank, [*range(self._own.count)]
        elif not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                f"group is {group!r} and there are no process groups: call torch.distributed.init_process_group first, "
                "or leave group out."
            )
        else:
            self.rank = dist.get_rank(self._group)
            if self.rank < 0:
                raise ValueError(
                    "group is a process group that this process is not in: call it on its own ranks alone."
                )
            self._ranks = dist.get_process_group_ranks(self._group)
        self._seconds = seconds
        self.count = len(self._ranks)
        nccl = self._own is None and dist.get_backend(self._group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self._asks = nccl  # its works say when they are done
        self._past = _pasts.setdefault(group, _Past())
        self._watch: Optional[Watch] = None
        self._before: list[Watch] = []
        self.sent = self.messages = 0

    # One call

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within the block the ranks make one call together: what one raises there ends it for all of them."""
        if self._past.failed:
            raise SpreadError(f"the ranks of this group cannot go on: {self._past.failed}")
        self._past.calls += 1
        name = f"patchconv {' '.join(map(str, self._ranks))} {self._past.calls}"
        c10d: Any = dist.distributed_c10d
        below = c10d._get_default_store() if self._own is None else self._own.store
        store = c10d.PrefixStore(name, below)
        self._watch = watch = Watch(store, self.rank, self.count, self._seconds)
        try:
            yield
        except SpreadError as error:
            self._past.failed = str(error)
            raise
        except BaseException as error:
            self._past.failed = self._fail(error)
            raise
        finally:
            watch.end()
            self._watch = None
        self._before.append(watch)
        for old in self._before[:-2]:  # all ranks have ended that, for they have begun the next
            old.forget()
        del self._before[:-2]

    def _fail(self, error: BaseException) -> str:
        """Tell the others what this rank raised; what all of them say, which another one may have said first."""
        assert self._watch is not None
        said = " ".join(str(error).split())[:500]
        text = f"rank {self.rank} raised {type(error).__name__}{f': {said}' if said else '.'}"
        return str(self._watch.fail(text))

    # Bytes

    def some(self, numbers: Sequence[int]) -> Peers:
        """Those of these numbers, of which this process is one."""
        return self if len(numbers) == self.count else _Some(self, numbers)

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        assert self._watch is not None
        if not incoming and not outgoing:
            return
        self.sent += sum(tensor.nbytes for tensor in outgoing.values())
        self.messages += len(outgoing)
        messages = [(peer, tensor, True) for peer, tensor in incoming.items()]
        messages += [(peer, tensor, False) for peer, tensor in outgoing.items()]
        with _disable_current_modes():
            if self._asks:
                works = dist.batch_isend_irecv([self._operation(*message) for message in messages])
                self._wait_for_device(works, {peer for peer, _, _ in messages})
            else:
                self._wait([(message[0], self._begun(*message)) for message in messages])

    def _operation(self, peer: int, tensor: Tensor, comes: bool, tag: int = 0) -> Any:
        return dist.P2POp(dist.irecv if comes else dist.isend, tensor, self._ranks[peer], self._group, tag)

    def _begun(self, peer: int, tensor: Tensor, comes: bool, tag: int = 0) -> Any:
        """One message on its way: each by itself, to know whose could not be."""
        try:
            if self._own is not None:
                return self._own.receive(tensor, peer, tag) if comes else self._own.send(tensor, peer)
            return dist.batch_isend_irecv([self._operation(peer, tensor, comes, tag)])[0]
        except RuntimeError as error:
            raise self._lost(peer) from error

    def _wait(self, works: Sequence[tuple[int, Any]]) -> None:
        assert self._watch is not None
        failed: list[tuple[int, Exception]] = []
        thread = threading.Thread(target=_wait_for_all, args=(works, failed), daemon=True)
        thread.start()
        thread.join(_LOOK)
        peers = {peer for peer, _ in works}
        try:
            while thread.is_alive():
                self._watch.look(peers)
                if self._own is not None and self._own.on_wait is not None:
                    self._own.on_wait()
                thread.join(_LOOK)
        except BaseException as error:
            if not isinstance(error, SpreadError):  # the others are to hear why, not that a connection is closed
                self._fail(error)
            self._hang_up(peers, thread)
            raise
        if failed:
            peer, error = failed[0]
            raise self._lost(peer) from error

    def _hang_up(self, peers: Iterable[int], waiting: threading.Thread) -> None:
        """Close the connections, on one of which a thread waits: as Python ends, one that does aborts the process."""
        for peer in peers:
            with suppress(Exception):  # as that wait, too, which runs out
                self._begun(peer, self.room(1), True, _NEVER).wait(timedelta(milliseconds=1))
        waiting.join(_LOOK * 20)

    def _wait_for_device(self, works: Sequence[Any], peers: Collection[int]) -> None:
        assert self._watch is not None
        looked = time.monotonic()
        while not all(work.is_completed() for work in works):
            time.sleep(_ASK)
            if time.monotonic() - looked > _LOOK:
                self._watch.look(peers)
                looked = time.monotonic()
        for work in works:  # what is computed next waits for it, too
            work.wait()

    def _lost(self, peer: int) -> SpreadError:
        """What to raise where nothing goes to a rank or comes from it: what a rank has said, if one has."""
        assert self._watch is not None
        return self._watch.fail(
            f"rank {peer} has ended or cannot be reached from rank {self.rank}: see what it said last, and start all "
            "ranks again."
        )

    # Objects

    def to_first(self, value: Any) -> list[Any]:
        """Rank 0 gets what each rank gives; the others get nothing."""
        if self.rank:
            self._send([0], value)
            return []
        others = range(1, self.count)
        sizes = {rank: self.room(8) for rank in others}
        self.exchange({}, sizes)
        found = {rank: self.room(int(size.view(torch.int64))) for rank, size in sizes.items()}
        self.exchange({}, found)
        return [value, *(_loaded(found[rank]) for rank in others)]

    def from_first(self, value: Any) -> Any:
        """What rank 0 gives."""
        if not self.rank:
            self._send(range(1, self.count), value)
            return value
        size = self.room(8)
        self.exchange({}, {0: size})
        found = self.room(int(size.view(torch.int64)))
        self.exchange({}, {0: found})
        return _loaded(found)

    def _send(self, to: Iterable[int], value: Any) -> None:
        to = list(to)
        written = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self.device)
        size = torch.tensor([written.numel()], dtype=torch.int64).view(torch.uint8).to(self.device)
        self.exchange(dict.fromkeys(to, size), {})
        self.exchange(dict.fromkeys(to, written), {})


def _wait_for_all(works: Sequence[tuple[int, Any]], failed: list[tuple[int, Exception]]) -> None:
    for peer, work in works:
        try:
            work.wait(_FOREVER)
        except Exception as error:
            failed.append((peer, error))
            return


def _loaded(written: Tensor) -> Any:
    """A value that another rank has written: they trust each other, as the ranks of torch's own collectives do."""
    return pickle.loads(bytes(written.tolist()))


def bytes_of(values: Tensor, device: torch.device) -> Tensor:
    """The bytes of a tensor on `device`, flat, in the order of its dimensions: a view where they lie so."""
    dense = values.detach().to(device).contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)  # a single value may have had any stride
