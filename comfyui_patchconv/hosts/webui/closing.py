"""Takes everything off the models when the WebUI closes a run, which it does after an error too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional
from weakref import ref

from .toggle import Toggle


class _Close:
    """Stands in for the `close` of one run until that is called. It does not keep the run: a latent is in there.

    below: another extension's, that was on the run before; None for the run's own. stop: called first. toggles: what is
    to be taken off.
    """

    stop: Callable[[], object]

    def __init__(self, p: Any) -> None:
        leave_copied(p)
        self.toggles: list[Toggle] = []
        self._p: Any = ref(p)
        self._below: Optional[Callable[[], object]] = vars(p).get("close")
        p.close = self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Close:
        return self  # as a function: of a copied run no model is to be copied

    def is_of(self, p: Any) -> bool:
        return self._p() is p

    def leave(self, p: Any) -> None:
        """Put back on `p`, the run or a copy of it, what was there before."""
        if self._below is not None:
            p.close = self._below
        elif vars(p).get("close") is self:
            del p.close

    def __call__(self) -> None:
        self.stop()
        while self.toggles:
            self.toggles.pop().off()
        p = self._p()
        if p is None:
            return
        if vars(p).get("close") is self:
            self.leave(p)
        close = type(p).close.__get__(p) if self._below is None else self._below
        close()


def before_close(p: Any, toggle: Toggle, stop: Callable[[], object] = lambda: None) -> None:
    """Have `toggle` go off before the run `p` is closed, and `stop` be called before that.

    p: the WebUI's object; a batch of many pictures has one, and asks this again for each.
    """
    found = vars(p).get("close")
    close = found if isinstance(found, _Close) and found.is_of(p) else _Close(p)
    close.stop = stop
    close.toggles[:] = [one for one in close.toggles if not one.is_gone]
    close.toggles.append(toggle)


def leave_copied(p: Any) -> None:
    """Take from a run what it has only because it is a copy of one: that would close the other."""
    found = vars(p).get("close")
    if isinstance(found, _Close) and not found.is_of(p):
        found.leave(p)
