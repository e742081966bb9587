"""Has the upscalers streamed while a host's tab Extras, or what its API has of it, is at work."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, Optional

from ..streamed import Switch
from .stand_ins import StandIn
from .toggle import Toggle


class Extras(StandIn):
    """Stands in for the function of a host that runs Extras, until `leave`.

    begin: puts a toggle on for the length of a run, or says why not and gives None. end: is told the toggle, off again,
    behind a run in which something was streamed.
    """

    def __init__(
        self, owner: Any, name: str, begin: Callable[[], Optional[Toggle]], end: Callable[[Toggle], None]
    ) -> None:
        self._switch = Switch(True)
        super().__init__(self._switch, owner, name)
        self._begin, self._end = begin, end

    def leave(self) -> bool:
        self._switch.on = False  # somebody may still hold this
        return super().leave()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        toggle = self._begin() if self._switch.on else None
        if toggle is None:
            return self.original(*args, **kwargs)
        try:
            result = self.original(*args, **kwargs)
        finally:
            toggle.off()
            if toggle.has_run:
                self._end(toggle)
        return _with_report(result, toggle.report()) if toggle.has_run else result


def _with_report(result: Any, report: str) -> Any:
    """What Extras returns, pictures, their parameters and what else there is to say, with a report said too."""
    *others, said = result
    return (*others, f"{said}<p>{escape(report)}</p>")
