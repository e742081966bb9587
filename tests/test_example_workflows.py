"""The files of the example workflows, without a host; `tests/comfyui/test_workflows.py` runs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WORKFLOWS = sorted((Path(__file__).parents[1] / "example_workflows").glob("*.json"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def empty_fields(value: Any) -> Iterator[str]:
    """Names of fields without a value, at any depth; what is not connected has none in `link` and `links`."""
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        if inner is None and name not in ("link", "links") and isinstance(name, str):
            yield name
        yield from empty_fields(inner)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_field_is_empty(path: Path) -> None:
    """Front ends up to ComfyUI 0.8 call such a workflow invalid."""
    assert [*empty_fields(read(path))] == []


def test_each_has_an_id_of_its_own() -> None:
    """By which the front end tells whose figures are whose."""
    assert len({read(path)["id"] for path in WORKFLOWS}) == len(WORKFLOWS) == 7
