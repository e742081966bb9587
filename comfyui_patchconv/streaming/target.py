"""What streams within a `with` block: methods of one object, put in place on its class and taken out in any order.

Where an object has a method of its own, that is replaced on the object. Deep copies, pickles and replicas have nothing
of ours either way.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Optional

from torch import nn

_lock = threading.RLock()


class _Dispatch:
    """In the place of a method on a class: for objects that are streamed what was entered last, else the method."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name
        self.own = kind.__dict__.get(name)
        self.original: Any = inspect.getattr_static(kind, name)
        self.entered: list[Entry] = []
        dispatch = self

        @functools.wraps(self.original, updated=())
        def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
            entry = dispatch.entry_of(owner)
            original = dispatch.of(owner)
            return original(*args, **kwargs) if entry is None else entry.around(original, args, kwargs)

        self.method = method
        self.put: Any = method if isinstance(self.original, FunctionType) else _Descriptor(self)
        setattr(kind, name, self.put)

    def entry_of(self, owner: Any) -> Optional[Entry]:
        return next((entry for entry in reversed(self.entered) if entry.owner is owner), None)

    def of(self, owner: Any) -> Any:
        """The method of `owner` that there is without us."""
        try:
            return self.given(owner, type(owner))
        except AttributeError:  # as of what `torch.jit` has traced: Python asks the object then
            return type(owner).__getattr__(owner, self.name)

    def given(self, owner: Any, kind: Any) -> Any:
        """What Python gives for the attribute without us, as it is where it binds to no object."""
        bind = getattr(type(self.original), "__get__", None)
        return self.original if bind is None else bind(self.original, owner, kind)

    def leave(self, entry: Entry) -> None:
        self.entered.remove(entry)
        if self.entered:
            return
        del _dispatches[self.kind, self.name]
        if self.kind.__dict__.get(self.name) is self.put:  # else somebody has put another over it
            if self.own is None:
                delattr(self.kind, self.name)
            else:
                setattr(self.kind, self.name, self.own)


class _Descriptor:
    """In the place of what gives a method and is no function, as a `staticmethod`: the same to all but who streams."""

    def __init__(self, dispatch: _Dispatch) -> None:
        self.dispatch = dispatch

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is None or self.dispatch.entry_of(owner) is None:
            return self.dispatch.given(owner, kind)
        return MethodType(self.dispatch.method, owner)


_dispatches: dict[tuple[type, str], _Dispatch] = {}


class _Instance:
    """In the place of a method that an object has for itself, as hooks of other libraries put it there."""

    def __init__(self, entry: Entry, before: Any) -> None:
        self.entry, self.before = entry, before
        functools.update_wrapper(self, before, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, entry = self.before, self.entry
        return entry.around(before, args, kwargs) if entry.inside else before(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.before, memo)

    def __reduce__(self) -> Any:
        return _itself, (self.before,)


def _itself(value: Any) -> Any:
    return value


class Entry:
    """A method of an object that is streamed, from `enter` to `leave`. around: runs it, given the method that there is
    without us, and its arguments."""

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self.owner, self.name, self.around = owner, name, around
        self.inside = False
        self._dispatch: Optional[_Dispatch] = None
        self._instance: Optional[_Instance] = None

    def enter(self) -> None:
        with _lock:
            self.inside = True
            before = getattr(self.owner, "__dict__", {}).get(self.name)
            if before is not None:
                self._instance = _Instance(self, before)
                self.owner.__dict__[self.name] = self._instance
                return
            key = type(self.owner), self.name
            dispatch = _dispatches.get(key)
            if dispatch is None:
                dispatch = _dispatches[key] = _Dispatch(*key)
            dispatch.entered.append(self)
            self._dispatch = dispatch

    def leave(self) -> None:
        with _lock:
            self.inside = False
            if self._dispatch is not None:
                self._dispatch.leave(self)
            elif self._instance is not None:
                self._take_out(self._instance)

    def _take_out(self, instance: _Instance) -> None:
        """Put back what was there, where others that came later have not covered it."""
        current = self.owner.__dict__.get(self.name)
        if current is instance:
            self.owner.__dict__[self.name] = instance.before
            return
        while isinstance(current, _Instance):
            if current.before is instance:
                current.before = instance.before
                return
            current = current.before


def _function_of(owner: Any, name: str) -> Any:
    """The function of a method as its class or its object has it, whoever wraps it now; nothing is run to find it."""
    found = inspect.getattr_static(owner, name, None)
    found = getattr(found, "__func__", found)
    return inspect.unwrap(found) if callable(found) else found


def methods_of(target: Any) -> list[tuple[Any, str]]:
    """The methods that `stream(target)` streams: `forward` of a module, and `decode` and `encode` if it has them, which
    may be modules themselves; or the one that is given. Raises TypeError for anything else."""
    if isinstance(target, nn.Module):
        others = {name: getattr(target, name, None) for name in ("decode", "encode")}
        methods = [(target, name) for name, one in others.items() if callable(one) and not isinstance(one, nn.Module)]
        return [
            (target, "forward"),
            *methods,
            *((one, "forward") for one in others.values() if isinstance(one, nn.Module)),
        ]
    if isinstance(target, _Instance):
        return [(target.entry.owner, target.entry.name)]
    owner, function = getattr(target, "__self__", None), getattr(target, "__func__", None)
    names = [getattr(target, "__name__", ""), *getattr(owner, "__dict__", ()), *dir(type(owner))]
    own = inspect.unwrap(function) if function is not None else object()
    name = next((name for name in names if _function_of(owner, name) is own), "")
    if owner is None or isinstance(owner, type) or not hasattr(owner, "__dict__") or not name:
        raise TypeError(f"{target!r} cannot be streamed: give a module, or a method of an object such as vae.decode.")
    return [(owner, name)]
