"""The names in other languages, as the host hands them to its front end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Server

LOCALES = Path(__file__).parents[2] / "locales"


@pytest.mark.parametrize(
    "language", sorted(path.name for path in LOCALES.iterdir() if (path / "nodeDefs.json").exists())
)
def test_the_host_serves_them(server: Server, language: str) -> None:
    served = server.get("/i18n")[language]["nodeDefs"]
    ours = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert ours
    assert {node: served[node] for node in ours} == ours


def test_english_names_what_the_host_lists(server: Server) -> None:
    english = json.loads((LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    listed = {name: node for name, node in server.get("/object_info").items() if name.startswith("PatchConv_")}
    assert set(english) == set(listed)
    for name, node in listed.items():
        text = english[name]
        assert (text["display_name"], text["description"]) == (node["display_name"], node["description"])
        seen = [group for kind, group in node["input"].items() if kind != "hidden"]
        inputs = {key: entry for group in seen for key, entry in group.items()}
        assert set(text["inputs"]) - {"control_after_generate"} == set(inputs)
        for key, entry in inputs.items():
            assert text["inputs"][key]["tooltip"] == entry[1]["tooltip"]
            assert text["inputs"][key]["name"] == entry[1].get("display_name", key)
        assert [text["outputs"][str(i)]["tooltip"] for i in range(len(node["output"]))] == node["output_tooltips"]
