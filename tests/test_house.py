"""The house: which room imports from which, none in a circle, and no host in the core."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACK = Path(__file__).parents[1]
CORE = "comfyui_patchconv"
HOSTS = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "modules",
    "nodes",
    "gradio",
    "server",
}

ARROWS: dict[str, set[str]] = {
    "units": set(),
    "terminal": set(),
    "memory": {"units"},
    "conv": {"memory", "units"},
    "files": {"memory", "units"},
    "streaming": {"conv", "memory", "units"},
    "hosts": {"streaming", "conv", "memory", "units"},
    "pixel_models": {"files", "streaming", "conv", "memory", "terminal", "units"},
    "cli": {"hosts", "files", "pixel_models", "streaming", "conv", "memory", "terminal", "units"},
}
"""The rooms that each room of the core may import from."""

PUBLIC = {
    "__init__": {"conv"},
    "__main__": {"cli"},
    "fill": {"conv"},
    "holes": {"conv"},
    "planner": {"conv", "memory", "units"},
}
"""The same of the modules that only give names to users."""

STREAMING: dict[str, set[str]] = {
    "errors": set(),
    "graph": set(),
    "plan": {"graph"},
    "record": {"graph", "errors"},
    "execute": {"graph", "plan", "errors"},
    "spread": {"graph", "plan", "execute", "errors"},
}
"""The same inside of `streaming`; modules beside these rooms join them."""

WAYS_IN = {"nodes": {"hosts", "files", "pixel_models", "streaming", "conv", "memory", "units"}, "scripts": {"hosts"}}
"""The rooms that a host's folder may import from."""


def module_of(path: Path) -> str:
    """The dotted name of a file of the pack."""
    parts = path.relative_to(PACK).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> list[str]:
    """The modules that a file imports, those of the pack by their dotted names in it; within functions too, and for
    types alone. `from room import module` is an import of that module."""
    here = module_of(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{whole}.{alias.name}" if _is_module(f"{whole}.{alias.name}") else whole for alias in node.names]
    return names


def _is_module(name: str) -> bool:
    path = PACK.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path.is_dir() and any(path.glob("*.py")))


FILES = sorted((PACK / CORE).rglob("*.py"))
ABOUT = pytest.mark.parametrize("path", FILES, ids=[module_of(path) for path in FILES])


def rooms_of(path: Path, within: str) -> set[str]:
    """The rooms directly inside of the package `within` that a file imports from, its own left out."""
    found = {name[len(within) + 1 :].split(".")[0] for name in imports(path) if name.startswith(f"{within}.")}
    own = module_of(path)[len(within) + 1 :].split(".")[0]
    return found - {own, ""}


@ABOUT
def test_a_room_imports_from_those_below_it_alone(path: Path) -> None:
    room = path.relative_to(PACK / CORE).with_suffix("").parts[0]
    allowed = PUBLIC.get(room, ARROWS.get(room))
    assert allowed is not None, f"{room} is no room that the house knows: say here what it may import from"
    assert rooms_of(path, CORE) <= allowed


@pytest.mark.parametrize("path", [path for path in FILES if "streaming" in path.parts], ids=module_of)
def test_streaming_goes_from_record_to_plan_to_execute(path: Path) -> None:
    within = f"{CORE}.streaming"
    room = module_of(path)[len(within) + 1 :].split(".")[0]
    if room in STREAMING:
        assert rooms_of(path, within) <= STREAMING[room]


@pytest.mark.parametrize("path", sorted((PACK / CORE / "streaming" / "plan").glob("*.py")), ids=module_of)
def test_a_plan_is_made_of_integers(path: Path) -> None:
    """Neither it nor what it imports knows tensors."""
    found, ahead = set(), [path]
    while ahead:
        for name in imports(ahead.pop()):
            file = PACK.joinpath(*name.split(".")).with_suffix(".py")
            if name not in found and file.is_file():
                ahead.append(file)
            found.add(name)
    assert not [name for name in found if name.split(".")[0] == "torch"]


def test_no_module_imports_itself_in_a_circle() -> None:
    arrows = {module_of(path): set(imports(path)) for path in FILES}
    ends = {""}
    while ends:  # what imports nothing of the rest, or is imported by nothing of it, is in no circle
        targets = set().union(*arrows.values())
        ends = {name for name, found in arrows.items() if not (found - {name}) & set(arrows) or name not in targets}
        arrows = {name: found for name, found in arrows.items() if name not in ends}
    assert not arrows, f"a circle goes through {sorted(arrows)}"


@ABOUT
def test_the_core_knows_no_host(path: Path) -> None:
    assert not HOSTS & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("folder", WAYS_IN)
def test_hosts_come_in_by_their_rooms(folder: str) -> None:
    for path in (PACK / folder).rglob("*.py"):
        assert rooms_of(path, CORE) <= WAYS_IN[folder], path.name


@pytest.mark.parametrize("path", sorted((PACK / "nodes").glob("*.py")), ids=lambda path: path.name)
def test_nodes_name_the_pack_relatively(path: Path) -> None:
    """The pack's own modules by relative imports only: under ComfyUI its folder has another name."""
    tree = ast.walk(ast.parse(path.read_text()))
    absolute = [node.module or "" for node in tree if isinstance(node, ast.ImportFrom) and not node.level]
    assert not [name for name in absolute if name.split(".")[0] == CORE]


def test_the_webui_finds_one_script() -> None:
    """It loads every file there, and nothing but that: with its own modules, Gradio, and the core by its name."""
    (script,) = (PACK / "scripts").rglob("*.py")
    foreign = {name.split(".")[0] for name in imports(script)} - sys.stdlib_module_names
    assert foreign == {"gradio", "modules", CORE}
    assert not [name for name in ("javascript", "localizations") if (PACK / name).exists()]


SHIPPED = [
    path for folder in (CORE, "nodes", "scripts", "locales", "benchmarks") for path in (PACK / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", [*SHIPPED, PACK / "install.py"], ids=module_of)
def test_texts_are_utf8_whatever_the_system_writes(path: Path) -> None:
    """Windows has another encoding for each language."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [ast.unparse(call) for call in calls if _is_text_of_a_file(call) and not _names(call, "encoding")]


def _is_text_of_a_file(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and "b" not in _mode(call.args[1:], call)
    if not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) in ("os", "av", "Image", "tarfile"):
        return False
    of_path = {
        "read_text": len(call.args) < 1,
        "write_text": len(call.args) < 2,
        "open": "b" not in _mode(call.args, call),
    }
    return of_path.get(call.func.attr, False)


def _mode(places: list[ast.expr], call: ast.Call) -> str:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return next((str(one.value) for one in [*named, *places[:1]] if isinstance(one, ast.Constant)), "r")


def _names(call: ast.Call, argument: str) -> bool:
    return any(keyword.arg == argument for keyword in call.keywords)


def test_contributing_finds_things_where_they_are() -> None:
    table = (PACK / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("## ")[0]
    named = re.findall(r"`((?:comfyui_patchconv|nodes|tests)/[\w/.]+)`", table)
    assert len(named) > 8
    assert not [name for name in named if not (PACK / name).exists()]
    rooms = set(re.findall(r"^\| `(\w+)(?:/|\.py)` \|", table, re.MULTILINE))
    assert rooms == set(ARROWS)


def test_contributing_names_each_module_of_streaming_in_its_room() -> None:
    rooms = (PACK / "CONTRIBUTING.md").read_text().split("## The rooms of `streaming/`")[1].split("The words, which")[0]
    streaming = PACK / "comfyui_patchconv" / "streaming"
    for room in ("graph", "record", "plan", "execute", "spread"):
        (text,) = re.findall(rf"^- `{room}/`:(.*?)(?=^- |^$)", rooms, re.MULTILINE | re.DOTALL)
        there = {path.name for path in (streaming / room).rglob("*.py")} - {"__init__.py"}
        named = set(re.findall(r"`(\w+\.py)`", text))
        assert named <= there, room
        listed = {path.name for path in (streaming / room).glob("*.py")} - {"__init__.py", "tensors.py"}  # helpers
        assert listed <= named, room
    around = set(re.findall(r"`(\w+\.py)`", rooms.split("Around them:")[1]))
    assert around == {path.name for path in streaming.glob("*.py")} - {"__init__.py", "errors.py"}


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("some_pack", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["some_pack"] = module
before = set(sys.modules)
spec.loader.exec_module(module)
print(sorted(set(sys.modules) - before), hasattr(module, "comfy_entrypoint"), module.WEB_DIRECTORY)
"""


def test_entry_point_without_comfyui() -> None:
    command = [sys.executable, "-c", LOAD, str(PACK / "__init__.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False ./web"
