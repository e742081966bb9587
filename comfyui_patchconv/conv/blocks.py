"""Methods that modules have for the length of a `with` block; blocks may overlap in time and end in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_lock = threading.RLock()
_open: list[_Block] = []
"""The blocks that threads and generators are in now, in the order in which they began."""


class _Block:
    """The methods that modules had for themselves when a block began, None for none, and which modules it changed."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.found = {module: state(module, name) for module in model.modules()}
        self.changed: set[nn.Module] = set()

    def end(self) -> None:
        """Have each module be what it was before, less what other blocks that are still open have made of it."""
        later = [block for block in _open[_open.index(self) + 1 :] if block.name == self.name]
        _open.remove(self)
        for module, found in self.found.items():
            for block in later:
                if module in block.found:
                    block.found[module] = found
                    if module in block.changed:
                        break
            else:
                put(module, self.name, found)


@contextmanager
def block(model: nn.Module, name: str, change: Callable[[], object], all_of_them: bool = False) -> Iterator[None]:
    """Within the block the modules of `model` have what `change` sets as the method `name` of single ones.

    The block that began last decides, for the modules that it changes. all_of_them: it changes all, those too that
    are as it wants them already. What `change` raises is raised, and nothing is changed.
    """
    with _lock:
        entered = _Block(model, name)
        try:
            change()
        except BaseException:
            for module, found in entered.found.items():
                put(module, name, found)
            raise
        changed = (one for one, found in entered.found.items() if all_of_them or state(one, name) is not found)
        entered.changed.update(changed)
        _open.append(entered)
    try:
        yield
    finally:
        with _lock:
            entered.end()


def state(module: nn.Module, name: str) -> Any:
    """What a module has for itself in the place of a method of its class; None for nothing."""
    return module.__dict__.get(name)


def put(module: nn.Module, name: str, value: Any) -> None:
    """Set the module's own method `name`; None removes it."""
    if value is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value
