"""What a user meets, from adding the node to the chart of a run; SCREENSHOTS: a folder to keep pictures of it in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from comfyui.conftest import Graph, Server
from comfyui.test_server import ALWAYS, decoding, node
from host_process import TIME, page_of

TEMPLATES = sorted((Path(__file__).parents[2] / "example_workflows").glob("*.json"))
VAE = "PatchConv_VAE"
READY = f'() => !!window.app?.canvas?.graph && !!window.LiteGraph?.registered_node_types["{VAE}"]'
GRAPH = "(app.rootGraph ?? app.graph)"
EAGER = r"without Patch Conv: (at least \d+ MiB, counted|not measured)"
LINE = rf"VAE decoder in up to 5 strips, peak \d+ MiB \({EAGER}\), {TIME}"
OPEN_AGAIN = (
    f"async () => await app.loadGraphData({GRAPH}.serialize(), false, false, "
    "app.extensionManager.workflow.activeWorkflow)"
)


class Front(NamedTuple):
    """The page; addresses that it asked; errors in it."""

    page: Any
    requests: list[str]
    errors: list[str]

    def set(self, name: str, value: object) -> None:
        """One of the host's settings."""
        self.page.evaluate("([id, value]) => app.extensionManager.setting.set(id, value)", [name, value])

    def open(self, graph: Graph) -> None:
        """A workflow, in the API's form, as it is laid out by the front end, at its size."""
        self.page.keyboard.press("Escape")  # whatever may still be open
        self.page.evaluate("async graph => { await app.loadApiJson(graph, 'tests'); }", graph)
        self.page.wait_for_function(f"count => {GRAPH}.nodes.length === count", arg=len(graph))
        self.page.evaluate(OPEN_AGAIN)  # which gives it an id, as a saved one has
        self.page.evaluate(
            f"() => {{ {GRAPH}.nodes.forEach((node, i) => (node.pos = [380 * (i % 3), 300 * Math.floor(i / 3)])); "
            "Object.assign(app.canvas.ds, { scale: 0.9 }); app.canvas.ds.offset = [120, 90]; "
            "app.canvas.setDirty(true, true); }"
        )

    def saved(self) -> dict[str, Any]:
        """Of the Patch Conv node, what a saved workflow has."""
        nodes = self.page.evaluate(f"() => {GRAPH}.serialize().nodes")
        (found,) = [one for one in nodes if one["type"] == VAE]
        return {name: value for name, value in found.items() if name not in ("order", "outputs", "inputs")}

    def picture(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))

    def count(self, kind: str) -> int:
        return self.page.evaluate(f"kind => {GRAPH}.nodes.filter(node => node.type === kind).length", kind)


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Front]:
    for name, value in (("Comfy.TutorialCompleted", True), ("Comfy.Graph.CanvasInfo", False)):
        server.get(f"/settings/{name}", value)
    with page_of(server.address, 1500, 900) as page:
        front = Front(page, [], [])
        page.on("request", lambda request: front.requests.append(request.url))
        page.on("pageerror", lambda error: front.errors.append(f"{error.message} {error.stack}"))
        page.on("console", lambda message: message.type == "error" and front.errors.append(
            f"{message.text} {message.location.get('url', '')}"
        ))  # fmt: skip
        page.set_default_timeout(900_000)
        page.reload()
        page.wait_for_function(READY)
        page.wait_for_load_state("networkidle")
        yield front


def wait_until(front: Front, condition: Callable[[], bool], seconds: float = 900) -> None:
    for _ in range(round(seconds * 5)):
        if condition():
            return
        front.page.wait_for_timeout(200)
    raise TimeoutError


def test_added_from_search_and_from_the_library(front: Front) -> None:
    page = front.page
    page.evaluate(f"() => {GRAPH}.clear()")
    typing = "() => document.activeElement?.tagName === 'INPUT'"
    for _ in range(10):  # the page may not listen yet
        page.mouse.dblclick(800, 450)
        page.wait_for_timeout(5000)
        if page.evaluate(typing):
            break
    page.keyboard.type("patch conv (vae)")
    page.wait_for_timeout(1500)
    front.picture("search")
    page.keyboard.press("Enter")
    wait_until(front, lambda: front.count(VAE) == 1)
    page.keyboard.press("Escape")
    page.mouse.click(1100, 800)

    search = page.get_by_placeholder(re.compile("^Search")).first
    for _ in range(4):  # a key that is pressed while a node is put down is lost
        if search.is_visible():
            break
        page.keyboard.press("n")
        page.wait_for_timeout(3000)
    search.fill("Patch Conv")
    page.get_by_text("Patch Conv Report", exact=True).first.click()
    page.wait_for_timeout(1000)
    front.picture("library")
    if not front.count("PatchConv_Report"):  # this front end lets the user choose where to put it
        page.mouse.click(1000, 600)
    wait_until(front, lambda: front.count("PatchConv_Report") == 1)
    page.keyboard.press("Escape")
    page.mouse.click(1100, 800)
    page.keyboard.press("n")


@pytest.mark.parametrize(
    ("mode", "ignored"), [("auto", []), ("patch", ["budget"]), ("stream", ["splits", "threshold"])]
)
def test_inputs_that_the_mode_ignores_look_inactive(front: Front, mode: str, ignored: list[str]) -> None:
    """Chosen by hand, and in a node that is copied. What they hold stays.

    The graph is not cleared: a node that gets the id of one before it may get what its inputs held, too.
    """
    inactive = "node => node.widgets.filter(widget => widget.disabled).map(widget => widget.name)"
    found = front.page.evaluate(
        f"""([mode]) => {{
            const inactive = {inactive};
            const node = window.LiteGraph.createNode('{VAE}');
            node.pos = [600, 200];
            {GRAPH}.add(node);
            const values = () => node.widgets.map(widget => widget.value);
            const before = values();
            const widget = node.widgets.find(widget => widget.name === 'mode');
            const place = node.widgets.indexOf(widget);
            widget.value = mode;
            widget.callback(mode);
            const copied = node.clone();
            {GRAPH}.add(copied);
            const kept = values().every((value, i) => i === place || value === before[i]);
            return [inactive(node), inactive(copied), kept];
        }}""",
        [mode],
    )
    front.picture(f"ignored in {mode}")
    assert found == [ignored, ignored, True]


def test_what_dims_inputs_goes_with_the_nodes(front: Front) -> None:
    """One style, however many nodes there were."""
    found = front.page.evaluate(
        f"""() => {{
            const ours = () => [...document.querySelectorAll("style")].filter(
                one => /lg-node.*:disabled/.test(one.textContent)
            );
            const ids = () => ours().map(one => one.textContent).join().split("data-node-id").length - 1;
            const before = ids();
            const nodes = [1, 2, 3].map(() => window.LiteGraph.createNode('{VAE}'));
            for (const node of nodes) {GRAPH}.add(node);
            const there = [ids() - before, ours().length];
            for (const node of nodes) {GRAPH}.remove(node);
            return [...there, ids() - before];
        }}"""
    )  # fmt: skip
    assert found == [3, 1, 0]


def test_connected_by_hand(front: Front) -> None:
    page = front.page
    page.keyboard.press("Escape")
    places = page.evaluate(
        f"""() => {{
            {GRAPH}.clear();
            Object.assign(app.canvas.ds, {{ scale: 1 }}).offset = [0, 0];
            const [loader, ours] = [['CheckpointLoaderSimple', 200], ['{VAE}', 700]].map(([type, x]) => {{
                const node = window.LiteGraph.createNode(type);
                node.pos = [x, 300];
                {GRAPH}.add(node);
                return node;
            }});
            app.canvas.draw(true, true);
            const slots = [loader.getConnectionPos(false, 2), ours.getConnectionPos(true, 0)];
            const box = app.canvas.canvas.getBoundingClientRect();
            return slots.map(([x, y]) => [x + box.left, y + box.top]);
        }}"""
    )
    page.wait_for_timeout(500)
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=8)
    page.mouse.up()
    linked = f"() => {GRAPH}.nodes.find(node => node.type === '{VAE}').inputs[0].link != null"
    wait_until(front, lambda: page.evaluate(linked))
    front.picture("connected")


def queue(front: Front) -> None:
    front.page.get_by_role("button", name=re.compile("^(Run|Queue)")).first.click()


@pytest.fixture(scope="module")
def ran(front: Front, server: Server, checkpoint: str) -> tuple[Graph, dict[str, Any]]:
    """A workflow that has run, by the button: it, and the node as it would have been saved before."""
    graph = decoding(checkpoint, server.latent("browser", 64), patched=ALWAYS | {"mode": "patch"})
    graph["report"] = node("PatchConv_Report", after=["patched_decode", 0], vae=["patch", 0])
    names = {name: str(number) for number, name in enumerate(graph, 1)}
    numbered: Graph = {}
    for name, step in graph.items():
        inputs = {
            key: [names[value[0]], value[1]] if isinstance(value, list) else value
            for key, value in step["inputs"].items()
        }
        numbered[names[name]] = step | {"inputs": inputs}
    front.open(numbered)
    front.page.wait_for_timeout(1000)
    before = front.saved()
    queue(front)
    front.page.wait_for_selector(".patchconv-text")
    front.page.wait_for_selector(".patchconv-row")
    front.page.wait_for_timeout(1000)
    front.picture("run")
    return numbered, before


def test_a_run_stands_on_the_node_and_in_no_saved_workflow(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    row = front.page.locator(".patchconv-row")
    assert row.count() == 1
    assert re.fullmatch(rf"{LINE}\. Open the chart of memory over time\.", row.get_attribute("aria-label"))
    words = rf"peak \d+ MiB, {TIME}\s+decoder in up to 5 strips(\s+≥ \d+ MiB without Patch Conv)?"
    assert re.fullmatch(words, row.inner_text().strip())
    assert re.fullmatch(f"Patch Conv: {LINE}", front.page.locator(".patchconv-text").inner_text())
    assert front.saved() == ran[1]
    prompt = front.page.evaluate("async () => (await app.graphToPrompt()).output")
    (sent,) = [step["inputs"] for step in prompt.values() if step["class_type"] == VAE]
    assert set(sent) == {"vae", *ALWAYS, "half", "mode", "budget", "padding", "devices"}


def test_chart_by_keyboard(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    page = front.page
    page.locator(".patchconv-row").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Patch Conv (VAE)")
    dialog.wait_for()
    chart = dialog.get_by_role("img", name=re.compile("^Memory over time: VAE decoder"))
    assert chart.count() == 1
    assert re.search(
        r"Memory \(MiB\).*Time \(s\).*(without Patch Conv: at least \d+ MiB, counted.*)?peak \d+ MiB",
        chart.text_content(),
    )
    front.picture("chart")
    assert page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "Close"
    nodes = page.evaluate(f"() => {GRAPH}.nodes.length")
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert page.evaluate(f"() => {GRAPH}.nodes.length") == nodes


def test_chart_in_a_light_theme_and_a_narrow_window(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    page = front.page
    color = "() => getComputedStyle(document.querySelector('.patchconv-dialog')).backgroundColor"
    try:
        colors = []
        for theme in ("dark", "light"):
            front.set("Comfy.ColorPalette", theme)
            page.wait_for_timeout(1500)
            page.locator(".patchconv-row").click()
            page.get_by_role("dialog", name="Patch Conv (VAE)").wait_for()
            colors.append(page.evaluate(color))
            front.picture(theme)
            page.get_by_role("button", name="Close").last.click()
        assert colors[0] != colors[1]
        page.locator(".patchconv-row").focus()
        page.keyboard.press("Enter")
        page.set_viewport_size({"width": 420, "height": 500})
        page.wait_for_timeout(500)
        front.picture("narrow")
        box = page.get_by_role("dialog", name="Patch Conv (VAE)").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 420
        assert box["y"] + box["height"] <= 500
        page.keyboard.press("Escape")
    finally:
        page.set_viewport_size({"width": 1500, "height": 900})
        front.set("Comfy.ColorPalette", "dark")


def test_setting(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    size = f"() => [...{GRAPH}.nodes.find(node => node.type === '{VAE}').size]"
    large = front.page.evaluate(size)
    front.set("PatchConv.Report.ShowOnNodes", False)
    wait_until(front, lambda: front.page.locator(".patchconv-row").count() == 0)
    assert front.page.evaluate(size) == ran[1]["size"]
    front.set("PatchConv.Report.ShowOnNodes", True)
    wait_until(front, lambda: front.page.locator(".patchconv-row").count() == 1)
    assert front.page.evaluate(size) == large


def test_with_the_other_renderer(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    """Nodes 2.0, where this front end has them."""
    page = front.page
    if page.evaluate("() => !('Comfy.VueNodes.Enabled' in app.extensionManager.setting.settings)"):
        pytest.skip("this front end has no Nodes 2.0 to turn on")
    before = page.evaluate("() => app.extensionManager.setting.get('Comfy.VueNodes.Enabled')")
    try:
        front.set("Comfy.VueNodes.Enabled", not before)
        page.wait_for_timeout(2000)
        front.picture("other_renderer")
        assert page.locator(".patchconv-row").count() == 1
        if not before:
            number = page.evaluate(f"() => {GRAPH}.nodes.find(node => node.type === '{VAE}').id")
            inactive = page.locator(f'.lg-node[data-node-id="{number}"] input:disabled')
            assert inactive.count() == 1  # the budget
            assert float(inactive.evaluate("input => getComputedStyle(input).opacity")) < 0.5
        page.locator(".patchconv-row").click()
        page.get_by_role("dialog", name="Patch Conv (VAE)").wait_for()
        page.keyboard.press("Escape")
    finally:
        front.set("Comfy.VueNodes.Enabled", before)
        page.wait_for_timeout(1000)


def test_kept_when_the_workflow_is_opened_again(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    """As undo and the tabs of workflows do it."""
    page, before = front.page, front.saved()  # after a change of renderers, which lays nodes out anew
    page.evaluate(OPEN_AGAIN)
    wait_until(front, lambda: page.locator(".patchconv-row").count() == 1)
    assert front.saved()["size"] == before["size"]


def test_a_report_leaves_the_focus(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    """Of who works by keyboard while a run reports, and the button that a click began on."""
    front.page.locator(".patchconv-row").focus()
    again = (
        "async () => { const { api } = await import('/scripts/api.js'); const before = document.activeElement; "
        f"const [report] = {GRAPH}.nodes.find(node => node.type === '{VAE}').patchConvReports(); "
        "api.dispatchEvent(new CustomEvent('patchconv.report', { detail: { ...report, line: 'told again' } })); "
        "return [before === document.activeElement, before.title]; }"
    )
    assert front.page.evaluate(again) == [True, "told again"]
    front.page.evaluate("() => document.activeElement.blur()")


def test_a_report_that_a_loop_makes_again_stands_on_the_node(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    again = (
        "async () => { const { api } = await import('/scripts/api.js'); "
        f"const {{ id }} = {GRAPH}.nodes.find(node => node.type === 'PatchConv_Report'); "
        "const detail = { node: `99.0.0.${id}`, display_node: String(id), output: { text: ['of a loop'] } }; "
        "api.dispatchEvent(new CustomEvent('executed', { detail })); }"
    )
    front.page.evaluate(again)
    assert front.page.locator(".patchconv-text").inner_text() == "of a loop"


def test_help_page(front: Front, ran: tuple[Graph, dict[str, Any]]) -> None:
    page = front.page
    page.evaluate(f"() => {{ app.canvas.selectNode({GRAPH}.nodes.find(node => node.type === 'PatchConv_Report')); "
                  "app.canvas.setDirty(true, true); }")  # fmt: skip
    page.get_by_test_id("info-button").or_(page.get_by_role("button", name="Node Info")).first.click()
    page.get_by_text("What the figures mean").first.wait_for()
    front.picture("help")


def test_interrupt(front: Front, server: Server, ran: tuple[Graph, dict[str, Any]]) -> None:
    """While it runs the node shows how far it is; then it says that it was stopped."""
    page = front.page
    label = page.locator(".patchconv-row").get_attribute("aria-label")
    latent = server.latent("long", 1024, seed=77)
    page.evaluate(
        f"async latent => {{ const widget = {GRAPH}.nodes.find(node => node.type === 'LoadLatent').widgets[0]; "
        "widget.options.values = [latent]; widget.value = latent; await app.queuePrompt(0); }",
        latent,
    )
    page.wait_for_function("() => document.querySelector('.patchconv-row')?.innerText.includes('so far')")
    front.picture("running")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")
    wait_until(front, lambda: server.get("/queue")["queue_running"] == [])
    assert page.locator(".patchconv-row").get_attribute("aria-label") != label
    page.wait_for_function("() => document.querySelector('.patchconv-row').innerText.includes('stopped')")
    front.picture("stopped")
    last = next(reversed(server.get("/history").values()))
    assert last["status"]["messages"][-1][0] == "execution_interrupted"


def test_figures_go_to_the_workflow_that_was_queued(
    front: Front, server: Server, ran: tuple[Graph, dict[str, Any]]
) -> None:
    """Another with a node of the same id is open by the time that it runs."""
    page, graph = front.page, ran[0]
    latents = [server.latent("longer", 1024, seed=78), server.latent("short", 64, seed=79)]
    front.open(graph)
    for latent in latents:
        page.evaluate(
            f"async latent => {{ const widget = {GRAPH}.nodes.find(node => node.type === 'LoadLatent').widgets[0]; "
            "widget.options.values = [latent]; widget.value = latent; await app.queuePrompt(0); }",
            latent,
        )
    page.wait_for_function("() => document.querySelector('.patchconv-row')?.innerText.includes('so far')")
    page.evaluate(f"async () => {{ await app.loadGraphData({{ ...{GRAPH}.serialize(), id: crypto.randomUUID() }}); }}")
    server.get("/interrupt", {})
    wait_until(front, lambda: not any(server.get("/queue").values()))
    last = next(reversed(server.get("/history").values()))
    assert last["status"]["status_str"] == "success"
    page.wait_for_timeout(1500)
    assert page.locator(".patchconv-row").count() == 0


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_template_opens_from_the_browser(front: Front, path: Path) -> None:
    page, nodes = front.page, json.loads(path.read_text(encoding="utf-8"))["nodes"]
    page.keyboard.press("Escape")
    page.evaluate(f"() => {GRAPH}.clear()")
    page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates'); }")
    ours = page.get_by_text("comfyui_patchconv", exact=True)
    ours.first.click()
    page.get_by_text(path.stem, exact=True).first.click()
    page.wait_for_function(f"count => {GRAPH}.nodes.length === count", arg=len(nodes))
    ours.first.wait_for(state="hidden")
    page.wait_for_timeout(1000)
    front.picture(f"template_{path.stem}")
    assert sorted(page.evaluate(f"() => {GRAPH}.nodes.map(node => node.type)")) == sorted(one["type"] for one in nodes)
    unknown = "node => !window.LiteGraph.registered_node_types[node.type]"
    assert page.evaluate(f"() => {GRAPH}.nodes.filter({unknown}).map(node => node.type)") == []


def test_nothing_of_ours_went_wrong_or_elsewhere(front: Front, server: Server) -> None:
    assert not [error for error in front.errors if "patchconv" in error.lower()]
    ours = [url for url in front.requests if "patchconv" in url.lower()]
    assert any(url.endswith("patchconv.js") for url in ours)
    assert all(url.startswith(f"http://{server.address}/") for url in ours)
    for path in Path(__file__).parents[2].joinpath("web", "js").iterdir():
        assert set(re.findall(r"\w+://[^\s\"']+", path.read_text())) <= {"http://www.w3.org/2000/svg"}
