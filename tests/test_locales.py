"""Names and tooltips in other languages: for every text of every node, and for nothing else."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

LOCALES = Path(__file__).parents[1] / "locales"
UPDATE: dict[str, Any] = runpy.run_path(str(LOCALES / "update.py"))
LETTERS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]", "ko": r"[\uac00-\ud7a3]"}


def texts(found: Any) -> list[str]:
    return [found] if isinstance(found, str) else [text for inner in found.values() for text in texts(inner)]


def test_english_is_what_the_nodes_say() -> None:
    assert UPDATE["read"]("en") == UPDATE["definitions"](), "run python locales/update.py"


def test_every_node_is_read_whole() -> None:
    for node, definition in UPDATE["definitions"]().items():
        assert {"display_name", "description", "inputs", "outputs"} <= set(definition), node
        for name, given in definition["inputs"].items():
            assert "tooltip" in given or name == UPDATE["AFTER_GENERATE"], (node, name)
        assert all("tooltip" in given for given in definition["outputs"].values()), node


def test_there_are_the_languages_that_are_said_to_be() -> None:
    assert set(UPDATE["languages"]()) == set(LETTERS)


@pytest.mark.parametrize("language", sorted(LETTERS))
def test_translation_is_complete(language: str) -> None:
    wanted, there = UPDATE["keys"](UPDATE["definitions"]()), UPDATE["keys"](UPDATE["read"](language))
    assert there - wanted == set()
    assert wanted - there == set()
    for text in texts(UPDATE["read"](language)):
        assert re.search(LETTERS[language], text) or text == "VAE", text


@pytest.mark.parametrize("path", sorted(LOCALES.rglob("*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_text_means_something_to_the_front_ends_formatter(path: Path) -> None:
    """In its messages braces are placeholders, @ is a link to another message, and | parts singular and plural."""
    for text in texts(UPDATE["read"](path.parent.name, path.name)):
        assert text == text.strip() != ""
        assert not set("{}@|") & set(text), text


@pytest.mark.parametrize(
    "source",
    [
        'schema(node_id="A", inputs=[io.Int.Input("a", tooltip=f"{1}")])',
        'schema(node_id="A", inputs=[*others])',
        'schema(node_id="A", inputs=[made_elsewhere()])',
        'schema(node_id="A", inputs=some)',
    ],
)
def test_what_has_to_be_run_to_be_known_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "node.py").write_text(source)
    with pytest.raises(ValueError, match=r"node\.py:1: .* write it out"):
        UPDATE["definitions"](tmp_path)


@pytest.mark.parametrize("language", ["en", *sorted(LETTERS)])
def test_every_setting_has_its_words(language: str) -> None:
    """The front end's settings by id, with _ for its dots."""
    scripts = [path.read_text(encoding="utf-8") for path in (LOCALES.parent / "web").rglob("*.js")]
    ids = {found.replace(".", "_") for script in scripts for found in re.findall(r'"(PatchConv(?:\.\w+)+)"', script)}
    assert set(UPDATE["read"](language, "settings.json")) == ids
