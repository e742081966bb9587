"""Pickles what another process could not import by its name: functions and classes made within functions, and
modules whose weights are parametrized, for which torch makes classes at run time. Both processes run the same Python.
"""

from __future__ import annotations

import importlib
import marshal
from types import CellType, FunctionType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

_NOT_OURS = ("__dict__", "__weakref__")
"""Of a class's attributes those that every class gets anew."""


def is_local(value: Any) -> bool:
    """Whether a function or class was made within a function."""
    return isinstance(value, (FunctionType, type)) and "<" in value.__qualname__


def reduced(value: Any) -> Any:
    """What `pickle` is to write for a local function or class."""
    if isinstance(value, FunctionType):
        cells = None if value.__closure__ is None else len(value.__closure__)
        state = {
            "defaults": value.__defaults__, "keywords": value.__kwdefaults__, "attributes": value.__dict__,
            "cells": [cell.cell_contents for cell in value.__closure__ or ()],
        }  # fmt: skip
        given = marshal.dumps(value.__code__, 2), value.__module__, value.__name__, value.__qualname__, cells
        return _function, given, state, None, None, _fill_function
    attributes = {name: one for name, one in vars(value).items() if name not in _NOT_OURS}
    attributes = {name: one for name, one in attributes.items() if type(one).__name__ != "getset_descriptor"}
    names = {name: attributes.pop(name) for name in ("__module__", "__qualname__", "__doc__") if name in attributes}
    return _class, (type(value), value.__name__, value.__bases__, names), attributes, None, None, _fill_class


def reduced_parametrized(module: nn.Module, state: dict[str, Any]) -> Any:
    """The same for a module that is parametrized, with what it is to have."""
    (kind,) = type(module).__bases__
    return _bare, (kind,), state, None, None, _fill_parametrized


def _function(code: bytes, module: str, name: str, qualified: str, cells: int | None) -> FunctionType:
    closure = None if cells is None else tuple(CellType() for _ in range(cells))
    made = FunctionType(marshal.loads(code), importlib.import_module(module).__dict__, name, None, closure)
    made.__module__, made.__qualname__ = module, qualified
    return made


def _fill_function(made: FunctionType, state: dict[str, Any]) -> None:
    """Only now: a function may refer to itself."""
    made.__defaults__, made.__kwdefaults__ = state["defaults"], state["keywords"]
    made.__dict__.update(state["attributes"])
    for cell, value in zip(made.__closure__ or (), state["cells"]):
        cell.cell_contents = value


def _class(meta: Any, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> type:
    return meta(name, bases, dict(names))


def _fill_class(made: type, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(made, name, value)


def _bare(kind: Any) -> nn.Module:
    return kind.__new__(kind)


def _fill_parametrized(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    inject: Any = parametrize
    inject._inject_new_class(module)
    parametrizations: Any = module.parametrizations
    for name in parametrizations:
        inject._inject_property(module, name)
