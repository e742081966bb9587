"""Which folder is for which host: none loads what is another's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).parents[1]
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


def _imports(path: Path) -> list[str]:
    """Absolute module names that a file imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", sorted((PACK / "nodes").glob("*.py")), ids=lambda path: path.name)
def test_nodes_name_the_pack_relatively(path: Path) -> None:
    """The pack's own modules by relative imports only: under ComfyUI its folder has another name."""
    assert not [name for name in _imports(path) if name.split(".")[0] == "comfyui_patchconv"]


@pytest.mark.parametrize("path", sorted((PACK / "comfyui_patchconv").rglob("*.py")), ids=lambda path: path.name)
def test_core_knows_no_host(path: Path) -> None:
    hosts = {"comfy", "comfy_api", "modules", "nodes", "folder_paths"}
    assert not hosts & {name.split(".")[0] for name in _imports(path)}


def test_the_webui_finds_one_script() -> None:
    """It loads every file there, and nothing but that: with its own modules, Gradio, and the core by its name."""
    (script,) = (PACK / "scripts").rglob("*.py")
    foreign = {name.split(".")[0] for name in _imports(script)} - sys.stdlib_module_names
    assert foreign == {"gradio", "modules", "comfyui_patchconv"}
    assert not [name for name in ("javascript", "localizations", "style.css") if (PACK / name).exists()]


def test_every_node_has_a_help_page() -> None:
    pages = {path.parent.name for path in (PACK / "web" / "docs").glob("*/en.md")}
    ids = {
        keyword.value.value
        for path in (PACK / "nodes").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
    }
    assert ids
    assert pages == ids
