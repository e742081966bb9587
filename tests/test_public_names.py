"""Public names are where users import them from, whichever room they are in."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from processes import Ready

NAMES = {
    "comfyui_patchconv": [
        "PConv2d",
        "PartialConv2d",
        "PartialConv3d",
        "PatchConv2d",
        "TiledForward",
        "Tiling",
        "convert_model",
        "convolutions",
        "patched",
        "restore_model",
    ],
    "comfyui_patchconv.cli": ["main"],
    "comfyui_patchconv.files": ["load_image", "load_latent", "load_vae", "random_vae", "save_image", "save_latent"],
    "comfyui_patchconv.fill": ["fill"],
    "comfyui_patchconv.holes": ["with_holes"],
    "comfyui_patchconv.planner": ["strip_rows", "working_set"],
    "comfyui_patchconv.streaming": ["stream"],
}

ENTRY_POINT = "patchconv", "comfyui_patchconv.cli:main"
"""What `pyproject.toml` installs: a command's name, and what it calls."""


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_a_name_is_imported_from_where_users_do(module: str, name: str) -> None:
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("module", ["comfyui_patchconv", "comfyui_patchconv.streaming"])
def test_all_that_a_module_offers_is_there(module: str) -> None:
    """Errors are raised to users, who catch them by these names."""
    found = importlib.import_module(module)
    assert set(NAMES[module]) <= set(found.__all__)
    assert not [name for name in found.__all__ if not hasattr(found, name)]


def test_a_star_import_gives_the_public_names_of_the_package_alone() -> None:
    package = importlib.import_module("comfyui_patchconv")
    assert sorted(package.__all__) == sorted(NAMES["comfyui_patchconv"])


def test_every_way_to_start_the_command_line_prints_the_same_help(ready: Ready) -> None:
    name, value = ENTRY_POINT
    load = f"from {EntryPoint.__module__} import EntryPoint; main = EntryPoint({name!r}, {value!r}, '').load()"
    as_m = "import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    ways = [
        as_m.format(module="comfyui_patchconv"),
        as_m.format(module="comfyui_patchconv.cli"),
        f"import sys; {load}; sys.exit(main())",
    ]
    printed = [ready.ended(["--help"], way).stdout for way in ways]
    assert printed[0].startswith("usage: patchconv [-h]")
    assert len(set(printed)) == 1


def test_the_entry_point_is_the_one_that_is_installed() -> None:
    name, value = ENTRY_POINT
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'[project.scripts]\n{name} = "{value}"\n' in text
