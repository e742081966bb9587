"""One picture over several devices in a running WebUI: here its own process and two workers, on the CPU."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_process import is_there, page_of
from processes import LIMIT, until

from .accordion import open_tab
from .conftest import A1111, UPSCALER, Result, WebUI, as_base64, open_image, serve
from .test_api import HIRES, check_same

STREAM = {"mode": "stream", "budget": 0.02}
ALL = STREAM | {"devices": "all"}
QUICK: dict[str, Any] = {"steps": 1}


@pytest.fixture(scope="module")
def spread_webui(checkout: Path, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """As users have it: the package lies in the extension's folder, which no search path has."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # other servers start without it
            patch.setenv("PATCHCONV_CPU_WORKERS", "2")
            patch.delenv("PYTHONPATH", raising=False)
            webui = stack.enter_context(serve(checkout, checkpoint, tmp_path_factory.mktemp("spread")))
        webui.run(**QUICK)  # what the WebUI puts on a model itself is there from the first run on
        yield webui


@pytest.fixture(scope="module")
def eager(spread_webui: WebUI) -> Result:
    return spread_webui.run(**QUICK)


def test_the_same_picture(spread_webui: WebUI, eager: Result) -> None:
    webui, before = spread_webui, spread_webui.get("/probe/now")
    one = webui.run(**QUICK, patch_conv=STREAM)
    assert "over" not in one.report
    assert not webui.workers()
    many = webui.run(**QUICK, patch_conv=ALL)
    assert many.report.startswith("Patch Conv: VAE decoder streamed over 3 processes, peak ")
    check_same(many, eager)
    assert "devices" not in many.infotext
    running = webui.workers()
    assert len(running) == 2
    two = webui.run(**QUICK, patch_conv={"mode": "auto", "budget": 0.02, "devices": 2})
    assert "streamed over 2 processes (eager needs " in two.report
    check_same(two, eager)
    assert webui.workers() == running
    assert webui.get("/probe/now") == before


def test_set_once_for_all_runs(spread_webui: WebUI, eager: Result) -> None:
    webui, image = spread_webui, as_base64(eager.images[0])
    request: dict[str, Any] = {**QUICK, "init_images": [image], "denoising_strength": 0.5, "steps": 2}
    expected = webui.run("img2img", **request)
    with webui.options(patch_conv_devices="all"):
        result = webui.run("img2img", **request, patch_conv=[True, "stream", True, False, 0, 16.0, 0.02])
        assert result.report.count("streamed over 3 processes") == 2
        assert "VAE encoder streamed over 3 processes" in result.report
        one = webui.run(**QUICK, patch_conv=STREAM | {"devices": "one"})
    check_same(result, expected)
    assert "over" not in one.report


def test_another_attention(spread_webui: WebUI) -> None:
    """Automatic1111 puts it in the place of the VAE's own, in its own process alone."""
    if spread_webui.host is not A1111:
        pytest.skip(f"{spread_webui.host.name} puts nothing in the place of its VAE's functions")
    with spread_webui.options(cross_attention_optimization="sdp - scaled dot product"):
        expected = spread_webui.run(**QUICK)
        result = spread_webui.run(**QUICK, patch_conv=ALL)
        again = spread_webui.run(**QUICK)
    assert "streamed over 3 processes" in result.report
    check_same(result, expected)
    assert np.array_equal(again.images[0], expected.images[0])


def test_interrupt_ends_it_on_all(spread_webui: WebUI, eager: Result) -> None:
    webui = spread_webui
    webui.run(**QUICK, patch_conv=ALL)
    before = webui.workers()
    results: list[Result] = []
    request: dict[str, Any] = {**QUICK, "width": 192, "height": 192}
    thread = threading.Thread(target=lambda: results.append(webui.run(**request, patch_conv=ALL)))
    begin_decode(webui, thread)
    webui.get("/sdapi/v1/interrupt", {})
    thread.join()
    assert results[0].report.endswith(", stopped; of what was stopped there is only a rough picture")
    again = webui.run(**QUICK, patch_conv=ALL)
    assert "streamed over 3 processes" in again.report
    check_same(again, eager)
    assert webui.workers() == before


def begin_decode(webui: WebUI, thread: threading.Thread) -> None:
    """Start a run, and wait until its decode has begun."""
    webui.get("/probe/watch")
    thread.start()
    end = time.monotonic() + LIMIT
    while not webui.get("/probe/decodes")["begun"]:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_that_is_killed(spread_webui: WebUI, eager: Result) -> None:
    webui = spread_webui
    webui.run(**QUICK, patch_conv=ALL)
    first, second = webui.workers()
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(webui.run(**QUICK, patch_conv=ALL)))
    begin_decode(webui, thread)
    time.sleep(0.3)
    os.kill(first, signal.SIGKILL)
    thread.join()
    (result,) = results
    assert f"on one device: rank 1 (cpu, process {first}) was ended by signal 9" in result.report
    assert f"Patch Conv: on one device: rank 1 (cpu, process {first}) was ended by signal 9." in result.log
    check_same(result, eager)
    again = webui.run(**QUICK, patch_conv=ALL)
    assert "streamed over 3 processes" in again.report
    check_same(again, eager)
    assert second in webui.workers()
    assert len(webui.workers()) == 2


def test_upscalers(spread_webui: WebUI) -> None:
    webui = spread_webui
    there = [one["name"] for one in webui.get("/sdapi/v1/upscalers")]
    if UPSCALER not in there:
        pytest.skip(
            f"{webui.host.name} has {', '.join(there)}, and not what is in its models/ESRGAN: is spandrel there?"
        )
    request: dict[str, Any] = {**QUICK, **HIRES, **webui.host.hires, "hr_upscaler": UPSCALER}
    upscaling = {"upscalers": True, "vae": False, "budget": 0.02}
    one, many = (webui.run(**request, patch_conv=upscaling | {"devices": number}) for number in ("one", "all"))
    assert "upscaler ESRGAN streamed over 3 processes" in many.report
    difference = np.abs(one.images[0].astype(int) - many.images[0])
    print(f"largest difference {difference.max()}, values that differ {(difference > 0).mean():.2e}")
    assert difference.max() <= 1
    assert (difference > 0).mean() < 2e-2  # they were sampled from what was upscaled


def test_extras(spread_webui: WebUI, eager: Result) -> None:
    webui = spread_webui
    asked = {"image": as_base64(eager.images[0]), "upscaler_1": UPSCALER, "upscaling_resize": 4}
    pictures = []
    for number in ("one", "all"):
        webui.get("/probe/forget")
        with webui.options(patch_conv_extras=True, patch_conv_devices=number, patch_conv_budget=0.02):
            before = len(webui.log())
            answer = webui.get("/sdapi/v1/extra-single-image", asked, seconds=LIMIT)
        pictures.append(np.asarray(open_image(answer["image"])).astype(int))
        assert ("streamed over 3 processes" in webui.log()[before:]) == (number == "all")
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_what_is_no_choice(spread_webui: WebUI) -> None:
    report = spread_webui.run(**QUICK, patch_conv=STREAM | {"devices": "both"}).report
    assert report == "Patch Conv is off: devices is 'both': use one, all or a number of devices such as 2."


def test_the_setting(spread_webui: WebUI) -> None:
    """Of three processes."""
    with page_of(spread_webui.address, 1280, 1400) as page:
        page.wait_for_selector("#txt2img_generate")
        open_tab(page, "Settings")
        open_tab(page, "Patch Conv")
        entry = page.locator("#setting_patch_conv_devices")
        entry.get_by_label("one", exact=True).wait_for()
        assert [one.get_attribute("value") for one in entry.locator("input").all()] == ["one", "all", "2", "3"]
        assert entry.get_by_label("one", exact=True).is_checked()


def test_no_process_is_left(spread_webui: WebUI) -> None:
    """Whatever ends the WebUI."""
    before = spread_webui.workers()
    assert before
    spread_webui.kill()
    until(lambda: not any(is_there(pid) for pid in before))


def test_one_device_is_no_setting(webui: WebUI) -> None:
    """And whoever asks for others hears that there are none."""
    settings = webui.get("/probe/settings")
    assert "patch_conv_budget" in settings
    assert "patch_conv_devices" not in settings
    assert "on one device: there is no other than the CPU (" in webui.run(**QUICK, patch_conv=ALL).report
    assert "over" not in webui.run(**QUICK, patch_conv=STREAM).report
