"""One streamed call: what it may take, what it holds at the moment, and what it found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from torch import Tensor

from ..memory import anonymous
from .origins import Origins

if TYPE_CHECKING:
    from .aliases import Hold

OnProgress = Callable[[int, int], None]
"""Called after each strip with the work done and the work in all, in bytes of maps computed (0: not known)."""


@dataclass(frozen=True)
class Plan:
    """How to run, and what that is expected to take.

    budget: bytes of the device to stay within; None for no limit. unstored_from: maps of so many bytes, if they are
    cheap to have again from a smaller one, are computed anew wherever they are read. blanks: maps that are made empty
    wait for what is written to them. peak: bytes expected at once, beyond inputs and weights. stored: of these, of
    maps. moved: bytes of maps that are kept elsewhere. elsewhere: of these, at once. work: bytes of maps computed in
    all.
    """

    budget: Optional[int] = None
    unstored_from: Optional[int] = None
    blanks: bool = True
    peak: int = 0
    stored: int = 0
    moved: int = 0
    elsewhere: int = 0
    work: int = 0


class Run:
    """State of one call. `held`, `aside`: bytes of stored maps on the device and elsewhere now. The other figures are
    those of a `Plan`.

    dry: maps are counted, not computed. Then `counter` is entered around the function, and sets `plain`: bytes of
    tensors beside what `held` counts; `of_maps` tells how many maps lie in a storage that it counts, by its address.
    again: sizes of the maps that `unstored_from` could be about. origins: of plain tensors. kernels: made of a
    parameter, by its id. written: tensors of the caller that were written to, and who holds what they have to become,
    by their id.
    """

    def __init__(
        self,
        plan: Plan = Plan(),
        report: Optional[dict[str, int]] = None,
        on_progress: Optional[OnProgress] = None,
        dry: bool = False,
    ) -> None:
        self.plan, self.dry = plan, dry
        self.report = {} if report is None else report
        self.held = self.aside = self.peak = self.stored = self.moved = self.elsewhere = self.work = 0
        self.plain = 0
        self.counter: AbstractContextManager[Any] = nullcontext()
        self.of_maps: Counter[int] = Counter()
        self.again: set[int] = set()
        self.origins = Origins(dry)
        self.kernels: dict[int, list[list[Tensor]]] = {}
        self.written: dict[int, tuple[Tensor, Hold]] = {}
        self._on_progress = on_progress
        self._beside: Optional[int] = None

    def excess(self) -> int:
        """Bytes, beside what is held, that this process has more than at the first call; on the CPU."""
        beside = anonymous() - self.held
        if self._beside is None:
            self._beside = beside
        return beside - self._beside

    def spare(self) -> int:
        """Bytes of maps that the plan has at some other moment beyond what is held now."""
        return max(self.plan.stored - self.held, 0)

    def note(self, growth: int, elsewhere: int, workspace: int) -> None:
        """What is held grows by `growth` bytes now, what is kept elsewhere by `elsewhere`, and `workspace` bytes are in
        use beside both."""
        stored = self.held + max(growth, 0)
        self.stored, self.peak = max(self.stored, stored), max(self.peak, stored + self.plain + workspace)
        self.elsewhere = max(self.elsewhere, self.aside + max(elsewhere, 0))

    def leaves_unstored(self, size: int) -> bool:
        """Whether a map of `size` bytes that is cheap to have again is better not stored."""
        self.again.add(size)
        return self.plan.unstored_from is not None and size >= self.plan.unstored_from

    def progress(self, done: int) -> None:
        self.work += done
        if self._on_progress is not None:
            self._on_progress(self.work, self.plan.work)
