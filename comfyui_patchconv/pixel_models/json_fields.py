"""Objects of JSON as the fields of a dataclass, with a sentence for what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any

from ..files.words import listed, short


def parsed(text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises ValueError for anything else."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the configuration is not JSON: {error}.") from None
    if not isinstance(given, dict):
        raise ValueError("the configuration is not a JSON object.")
    return given


def checked(kind: Any, given: dict[str, Any], section: str = "") -> dict[str, Any]:
    """The values as the fields of the dataclass `kind` hold them. section: what stands before names in sentences.

    Raises ValueError for the first name that is unknown or missing, or has a value of the wrong type.
    """
    known: dict[str, Field[Any]] = {each.name: each for each in fields(kind)}
    for name in given:
        if name not in known:
            raise ValueError(f"{section}{short(name)} is not known: known are {listed(known)}.")
    for name, each in known.items():
        words, fits = _KINDS.get(str(each.type), ("an object", lambda value: isinstance(value, dict)))
        if name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{section}{name} is missing: give {words}.")
        if name in given and not fits(given[name]):
            raise ValueError(f"{section}{name} is {short(repr(given[name]))}: use {words}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


MOST = 2**20
"""Of any width, size or count of a model: more, and no machine could hold it."""

MOST_LEVELS = MOST.bit_length()
"""Of a model: with more even the largest image cannot be halved so often."""

_LARGEST = 1e38
"""What numbers stay below that float32 can hold; neither infinity nor NaN does."""


def require_within(least: int, most: int, section: str, config: object, *names: str) -> None:
    """Raises ValueError for the first of these fields of `config` that is not from `least` to `most`. section: what
    stands before names in sentences."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{section}{name} is {value}: use {least} or more.")
        if value > most:
            raise ValueError(f"{section}{name} is {value}: use {most} or less.")


def _whole(value: object) -> bool:
    return type(value) is int and abs(value) < 2**63  # not a bool, which is an int as well; what torch can hold


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # type: ignore[operator]


def _many(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("a text", lambda value: isinstance(value, str)),
    "Optional[int]": ("a whole number or null", lambda value: value is None or _whole(value)),
    "Optional[str]": ("a text or null", lambda value: value is None or isinstance(value, str)),
    "tuple[int, ...]": ("a list of whole numbers", _many(_whole)),
    "tuple[float, ...]": ("a list of numbers", _many(_number)),
    "int | tuple[int, int]": (
        "a whole number or [height, width]",
        lambda value: _whole(value) or (_many(_whole)(value) and len(value) == 2),
    ),
}
"""What the value of a field has to be in the JSON, by the annotation of the field. Fields not listed are objects."""
