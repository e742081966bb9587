"""The pages that users read: what they link to, name and have one type is there."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfyui_patchconv.cli import parser
from comfyui_patchconv.hosts.webui.parameters import settings_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HELP_PAGES = sorted((ROOT / "web" / "docs").rglob("*.md"))
SOURCES = [path for room in ("comfyui_patchconv", "nodes", "scripts") for path in (ROOT / room).rglob("*.py")]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """The code of a page that is marked with `language`; with an empty one, what is typed in a shell."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(path), re.MULTILINE | re.DOTALL)
    return [code for marked, code in found if marked == language]


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text_of(path), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What can be linked to in a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES + HELP_PAGES, ids=names(PAGES + HELP_PAGES))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_front_page_is_short_and_the_index_lists_every_page() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 180
    index = ROOT / "docs" / "README.md"
    linked = set(re.findall(r"\]\(([a-z_]+\.md)\)", text_of(index)))
    assert linked == {path.name for path in index.parent.glob("*.md")} - {index.name}


def typed() -> Iterator[tuple[str, str]]:
    """Each line of a page that is typed in a shell, with the page's name."""
    for page in PAGES:
        for block in blocks(page, ""):
            yield from ((str(page.relative_to(ROOT)), line) for line in block.splitlines())


def test_commands_of_pages_are_commands() -> None:
    """What `patchconv` and `install.py` are called with: the command line takes it."""
    lines = [(page, shlex.split(line, comments=True)) for page, line in typed()]
    ours = [(page, words[1:]) for page, words in lines if words[:1] == ["patchconv"]]
    assert len(ours) >= 15
    for page, words in ours:
        try:
            parser().parse_args(["cpu" if word == "gpu" else word for word in words])  # a GPU is not everywhere
        except SystemExit:
            pytest.fail(f"{page}: {words}")
    jobs = {words[2] for _, words in lines if words[:2] == ["python", "install.py"]}
    assert jobs == {"demo", "test"}


OF_OTHERS = {
    "--help",
    "--medvram",
    "--lowvram",
    "--multi-user",
    "--no-half-vae",
    "--always-low-vram",
    "--always-no-vram",
    "--local-addr",
}


def options(command: argparse.ArgumentParser) -> set[str]:
    """Those of a command and of all commands below it."""
    found: set[str] = set()
    for action in command._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*map(options, action.choices.values()))
    return found


def test_options_of_pages_are_options() -> None:
    known = OF_OTHERS | options(parser())
    for page in PAGES:
        if page.name == "CONTRIBUTING.md":  # of pytest, pip and scripts
            continue
        for option in re.findall(r"`(--[a-z_-]+)", prose(page)):
            assert option in known, f"{page.name}: {option}"


def test_python_of_pages_is_python_and_imports_what_is_there() -> None:
    imported = set()
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {node.module}"
                    imported.update(alias.name for alias in node.names)
    assert {"stream", "convert_model", "restore_model", "patched", "PartialConv2d", "PConv2d"} <= imported


def test_arguments_of_the_api_are_arguments() -> None:
    found = [line for _, line in typed() if line.startswith('"alwayson_scripts"')]
    assert len(found) == 2
    for line in found:
        scripts = json.loads("{" + line + "}")["alwayson_scripts"]
        assert settings_of(scripts["Patch Conv"]["args"], {}) is not None


def test_nodes_and_settings_of_pages_have_these_names() -> None:
    """And the pages on ComfyUI name every node."""
    defined = json.loads(text_of(ROOT / "locales" / "en" / "nodeDefs.json"))
    nodes = {node["display_name"] for node in defined.values()}
    settings = {setting["name"] for setting in json.loads(text_of(ROOT / "locales" / "en" / "settings.json")).values()}
    for page in PAGES + HELP_PAGES:
        text = prose(page).replace("\n", " ")
        for name in re.findall(r"\*\*([^*]*\((?:Patch|Partial) Conv\))\*\*", text):
            assert name in nodes, f"{page.name}: {name}"
        for name in re.findall(r"\*\*Settings → Patch Conv → ([^*]+)\*\*", text):
            assert name in settings, f"{page.name}: {name}"
    assert nodes <= set(re.findall(r"\*\*([^*]+)\*\*", text_of(ROOT / "README.md")))


def test_messages_that_are_explained_are_ours_or_a_hosts() -> None:
    """Each message of the page on what goes wrong is in the code, but for the hosts' own, which it marks."""
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(map(text_of, SOURCES)))
    rows = re.findall(r"^\| (`.*?) \|", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    ours = [row for row in rows if not re.search(r"\((ComfyUI|WebUI)\)|CUDA", row) or "Patch Conv" in row]
    assert len(ours) >= 4
    for row in ours:
        (message,) = re.findall(r"`([^`]+)`", row)[:1]
        for part in re.split(r"…|'patchconv\[", message):
            part = part.strip(" :()]'").replace("Patch Conv", "").strip()
            assert part in code, f"{message}: {part}"
