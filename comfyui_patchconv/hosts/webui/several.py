"""Has what is streamed in a run computed on several devices, in worker processes beside the WebUI's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Optional

from ..clones import Wrapper
from ..devices.spread import ONE, Outcome, Spread
from ..figures import Figures
from .host import Host
from .stopping import Stops


class Replaced(NamedTuple):
    """What a host has put in the place of something that models call, of a class or of a module. own: what was there,
    and is there in a process that imports it."""

    owner: Any
    name: str
    own: Any


@contextmanager
def as_imported(places: Iterable[Replaced]) -> Iterator[None]:
    """Within the block these are as they are imported."""
    found = [(place, getattr(place.owner, place.name)) for place in places]
    try:
        for place, _ in found:
            setattr(place.owner, place.name, place.own)
        yield
    finally:
        for place, replacement in found:
            if getattr(place.owner, place.name) is place.own:  # else it was chosen anew meanwhile
                setattr(place.owner, place.name, replacement)


class AsImported(Wrapper):
    """Stands in for `forward`, and runs it as another process would, which is sent `forward` itself: the ranks of a
    call have to do the same, and what a host puts in the place of a model's functions is not in its workers.

    imported: makes a context in which they are as they are imported.
    """

    def __init__(self, forward: Callable[..., Any], imported: Callable[[], AbstractContextManager[Any]]) -> None:
        self.forward, self._imported = forward, imported

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._imported():
            return self.forward(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _itself, (self.forward,)


def _itself(value: Any) -> Any:
    return value


class Several:
    """The devices of one part of a run. wanted: see `CHOICES`. figures: told on what each call ran."""

    def __init__(self, wanted: str, stops: Stops, host: Optional[Host], figures: Figures) -> None:
        self._figures, self._host = figures, host
        calls = () if host is None else host.calls
        self.spread = None if wanted == ONE else Spread(wanted, calls, stops.check, self._note)

    def runs(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What is to be streamed for `forward`."""
        if self.spread is None or self._host is None:
            return forward
        return AsImported(forward, self._host.imported)

    def forget(self) -> None:
        """Hold nothing any more of what was run."""
        if self.spread is not None:
            self.spread.start()

    def _note(self, outcome: Outcome) -> None:
        """What spoke against several stays for the whole run."""
        self._figures.over = outcome.over
        self._figures.alone = outcome.alone or self._figures.alone
