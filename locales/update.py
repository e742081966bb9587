"""Writes locales/en/nodeDefs.json from the nodes' source, and says what the other languages lack or have too much.

    python locales/update.py

Reads the schemas in nodes/ without running them, so that it needs no ComfyUI. The format is the host's: by node id and
input name, outputs by their number. The other languages are written by hand.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

LOCALES = Path(__file__).resolve().parent
NODES = LOCALES.parent / "nodes"
AFTER_GENERATE = "control_after_generate"
"""The front end's own widget behind a seed, which it looks up like an input."""

Definitions = dict[str, dict[str, Any]]


def definitions(folder: Path = NODES) -> Definitions:
    """What `nodeDefs.json` says of every node in `folder`, in English.

    ValueError, with the place, for a schema that is not written out: each text has to be a literal, each input
    `io.Kind.Input(name, …)`, `advanced(io.Kind, name, …)` or a function of its module that returns one.
    """
    found: Definitions = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        helpers = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and _named(node, "schema")):
            if "node_id" in _keywords(call):
                found[_text(path, call, "node_id") or ""] = _definition(path, call, helpers)
    return found


def _definition(path: Path, call: ast.Call, helpers: dict[str, ast.FunctionDef]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for item in _list(path, call, "inputs"):
        made = _input(path, item, helpers)
        name = ast.literal_eval(made.args[1 if _named(made, "advanced") else 0])
        inputs[name] = _given(name=_text(path, made, "display_name") or name, tooltip=_text(path, made, "tooltip"))
        if AFTER_GENERATE in _keywords(made):
            inputs[AFTER_GENERATE] = {"name": AFTER_GENERATE.replace("_", " ")}
    outputs = {}
    for number, item in enumerate(_list(path, call, "outputs")):
        if not isinstance(item, ast.Call):
            raise _unclear(path, item)
        outputs[str(number)] = _given(name=_text(path, item, "display_name"), tooltip=_text(path, item, "tooltip"))
    return _given(
        display_name=_text(path, call, "display_name"),
        description=_text(path, call, "description"),
        inputs=inputs,
        outputs=outputs,
    )


def _input(path: Path, item: ast.expr, helpers: dict[str, ast.FunctionDef]) -> ast.Call:
    """The call that makes an input, that of a helper instead of the helper's."""
    if not isinstance(item, ast.Call):
        raise _unclear(path, item)
    if isinstance(item.func, ast.Name) and item.func.id in helpers:
        returned = [node.value for node in helpers[item.func.id].body if isinstance(node, ast.Return)]
        if len(returned) != 1 or returned[0] is None:
            raise _unclear(path, item)
        return _input(path, returned[0], helpers)
    if not (_named(item, "advanced") or (isinstance(item.func, ast.Attribute) and item.func.attr == "Input")):
        raise _unclear(path, item)
    return item


def _named(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == name


def _keywords(call: ast.Call) -> dict[Optional[str], ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def _text(path: Path, call: ast.Call, name: str) -> Optional[str]:
    value = _keywords(call).get(name)
    if value is None:
        return None
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
        raise _unclear(path, value)
    return value.value


def _list(path: Path, call: ast.Call, name: str) -> list[ast.expr]:
    value = _keywords(call).get(name)
    if value is None:
        return []
    if not isinstance(value, ast.List):
        raise _unclear(path, value)
    return value.elts


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value}


def _unclear(path: Path, node: ast.expr) -> ValueError:
    return ValueError(
        f"{path.name}:{node.lineno}: {ast.unparse(node)} cannot be read without running it: write it out."
    )


def keys(found: Definitions) -> set[tuple[str, ...]]:
    """Where in `found` a text is: `("PatchConv_VAE", "inputs", "vae", "name")` and the like."""

    def walk(value: Any, way: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if not isinstance(value, dict):
            yield way
            return
        for name, inner in value.items():
            yield from walk(inner, (*way, name))

    return set(walk(found, ()))


def read(language: str, file: str = "nodeDefs.json") -> Definitions:
    path = LOCALES / language / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def languages() -> list[str]:
    """Those there are, without English."""
    return sorted(path.name for path in LOCALES.iterdir() if path.is_dir() and path.name not in ("en", "__pycache__"))


def main() -> int:
    english = definitions()
    path = LOCALES / "en" / "nodeDefs.json"
    path.write_text(json.dumps(english, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    wanted, wrong = keys(english), 0
    for language in languages():
        there = keys(read(language))
        for what, names in (("lacks", wanted - there), ("has, without a node that does,", there - wanted)):
            for name in sorted(names):
                print(f"{language}/nodeDefs.json {what} {' / '.join(name)}")
            wrong += len(names)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
