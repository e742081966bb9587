"""The toggle in a running WebUI: same pictures, and nothing left on the model."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
from typing import Any

import numpy as np
import pytest
from host_process import TIME, assert_same_picture
from processes import LIMIT

from .conftest import A1111, FORGE, MODES, PATCH, STREAM, Result, WebUI, as_base64

HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 1, "denoising_strength": 0.5}


@pytest.fixture(scope="module")
def eager(webui: WebUI) -> Result:
    webui.run()  # what the WebUI puts on a model itself is there from the first run on
    return webui.run()


@pytest.fixture(scope="module")
def image(eager: Result) -> str:
    return as_base64(eager.images[0])


def check_same(result: Result, eager: Result) -> None:
    assert len(result.images) == len(eager.images)
    for one, other in zip(result.images, eager.images):
        assert_same_picture(one, other)


def check_second_pass(result: Result, eager: Result) -> None:
    """Between the passes the picture is in 8 bits: one level in one value may be seen all around it in the end."""
    difference = np.abs(result.images[0].astype(int) - eager.images[0])
    print(f"largest difference {difference.max()}, values that differ {(difference > 0).mean():.2e}")
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-2


@MODES
def test_the_same_picture_and_nothing_left(webui: WebUI, eager: Result, settings: dict[str, Any]) -> None:
    before = webui.get("/probe/now")
    check_same(webui.run(patch_conv=settings), eager)
    during = webui.get("/probe/during")
    patched = [name for name, method in during.items() if before.get(name) != method]
    assert any("diffusion_model" in name and "_conv_forward" in name for name in patched)
    assert any("first_stage_model.decoder" in name for name in patched)
    assert webui.host is A1111 or {"vae.memory_used_decode", "vae.memory_used_encode"} <= set(patched)
    assert webui.get("/probe/now") == before
    assert np.array_equal(webui.run().images[0], eager.images[0])
    assert webui.get("/probe/during") == before


def test_reports_what_was_done(webui: WebUI) -> None:
    streamed = webui.run(patch_conv=STREAM)
    assert re.search(
        r"^Patch Conv: VAE decoder streamed, peak [\d.]+ .iB "
        rf"\(without Patch Conv: (at least [\d.]+ .iB, counted|not measured)\), {TIME}; "
        r"U-Net in up to 3 strips$",
        streamed.report,
    )
    assert f"{streamed.report}\n" in streamed.log
    assert "Patch Conv report" not in streamed.infotext
    assert webui.run().report == ""
    assert "VAE decoder in up to 3 strips" in webui.run(patch_conv=PATCH).log


def test_auto_runs_as_it_fits_and_says_why(webui: WebUI, eager: Result) -> None:
    free = webui.run(patch_conv={"mode": "auto"})
    assert np.array_equal(free.images[0], eager.images[0])
    assert re.search(r"VAE decoder auto: eager \(eager needs [\d.]+ .iB, [\d.]+ .iB are free\)", free.report)
    tight = webui.run(patch_conv={"mode": "auto", "budget": 0.001})
    check_same(tight, eager)
    assert re.search(r"VAE decoder auto: streamed \(eager needs [\d.]+ .iB, 1 MiB are allowed\)", tight.report)
    assert "Patch Conv: auto" in tight.infotext


def test_a_decode_that_runs_out_of_memory_is_streamed_where_that_is_set(webui: WebUI) -> None:
    if webui.host is not A1111:
        pytest.skip(f"{webui.host.name}'s attention takes 512 MiB at this size: memory runs out before the decode")
    large: dict[str, Any] = {"width": 512, "height": 512, "steps": 1}
    eager = webui.run(**large)
    assert eager.report == ""
    with webui.options(patch_conv_instead_of_tiles=True):
        assert np.array_equal(webui.run(**large).images[0], eager.images[0])
        with webui.limited(700 << 20):  # eager takes 1 GB, streaming less than half of that
            rescued = webui.run(**large)
    check_same(rescued, eager)
    assert re.match(r"Patch Conv: VAE decoder auto: streamed \(memory ran out eagerly\), peak ", rescued.report)
    assert "Patch Conv" not in rescued.infotext


@MODES
def test_the_host_makes_room_for_what_it_takes(webui: WebUI, settings: dict[str, Any]) -> None:
    if webui.host is A1111:
        pytest.skip("Automatic1111 does not reckon what a decode takes")
    webui.run()
    eager = webui.get("/probe/estimate")
    webui.run(patch_conv={**settings, "unet": False})
    estimate = webui.get("/probe/estimate")
    print(f"decode of 512²: {estimate['during'] / 2**20:.0f} MiB for {eager['now'] / 2**20:.0f} MiB")
    assert estimate["now"] == eager["now"] == eager["during"]
    assert estimate["during"] < 0.6 * eager["now"]


@MODES
def test_hires_fix(webui: WebUI, settings: dict[str, Any]) -> None:
    request = {**HIRES, **webui.host.hires}
    for upscaler in ("Latent", "Lanczos"):
        eager = webui.run(**request, hr_upscaler=upscaler)
        result = webui.run(**request, hr_upscaler=upscaler, patch_conv=settings)
        if upscaler == "Latent":
            check_same(result, eager)
        else:
            check_second_pass(result, eager)


def test_a_second_pass_with_another_checkpoint(webui: WebUI) -> None:
    first, before = webui.run(), kinds(webui.get("/probe/now"))
    request = {**HIRES, **webui.host.hires, "hr_upscaler": "Lanczos", "hr_checkpoint_name": "second.safetensors"}
    eager = webui.run(**request)
    result = webui.run(**request, patch_conv=STREAM)
    check_second_pass(result, eager)
    assert "VAE encoder streamed" in result.log
    assert np.array_equal(webui.run().images[0], first.images[0])
    assert kinds(webui.get("/probe/now")) == before


def kinds(methods: dict[str, str]) -> dict[str, str]:
    """What is set where, without which object it is: a checkpoint that is loaded anew has others."""
    return {place: method.split()[0] for place, method in methods.items()}


@MODES
def test_img2img(webui: WebUI, image: str, settings: dict[str, Any]) -> None:
    request: dict[str, Any] = {"init_images": [image], "denoising_strength": 0.5, "steps": 4}
    eager = webui.run("img2img", **request)
    result = webui.run("img2img", **request, patch_conv=settings)
    check_same(result, eager)
    assert "VAE encoder" in result.log


def test_inpainting(webui: WebUI, image: str) -> None:
    mask = np.zeros((128, 128, 3))
    mask[32:96, 32:96] = 255
    request: dict[str, Any] = {"init_images": [image], "mask": as_base64(mask), "denoising_strength": 0.5, "steps": 4}
    check_same(webui.run("img2img", **request, patch_conv=STREAM), webui.run("img2img", **request))


def test_batches(webui: WebUI) -> None:
    request: dict[str, Any] = {"batch_size": 2, "n_iter": 2}
    eager = webui.run(**request)
    assert len(eager.images) == 4
    check_same(webui.run(**request, patch_conv=STREAM), eager)


def test_parameters_are_written_and_pasted(webui: WebUI, eager: Result) -> None:
    assert "Patch Conv" not in eager.infotext
    result = webui.run(patch_conv=STREAM | {"budget": 1.5})
    for text in ("Patch Conv: stream", "Patch Conv parts: VAE + U-Net", "Patch Conv budget: 1.5"):
        assert text in result.infotext
    if webui.host is FORGE:
        pytest.skip("written; not pasted, because Forge's API fails at any infotext, one without Patch Conv too")
    pasted = webui.run(infotext=result.infotext)
    assert pasted.infotext == result.infotext
    assert "VAE decoder streamed" in pasted.log


def test_controls_are_remembered(webui: WebUI) -> None:
    config = json.loads((webui.folder / "ui-config.json").read_text())
    for tab in ("txt2img", "img2img"):
        path = f"customscript/patch_conv.py/{tab}"
        if webui.host is not FORGE:  # it remembers the state of no accordion
            assert config[f"{path}/Patch Conv/value"] is False
        assert config[f"{path}/Mode/value"] == "auto"
        assert config[f"{path}/Threshold (millions of elements)/value"] == 16.0


def test_arguments_in_order(webui: WebUI, eager: Result) -> None:
    result = webui.run(patch_conv=[True, "patch", True, False, 5, 0.0, 0.0])
    check_same(result, eager)
    assert "Patch Conv: VAE decoder in up to 5 strips" in result.log
    assert "U-Net" not in result.log


def test_arguments_mean_what_they_say(webui: WebUI) -> None:
    report = webui.run(patch_conv=[{"enabled": 1, "mode": "STREAM", "unet": "false"}]).report
    assert report.startswith("Patch Conv: VAE decoder streamed")
    assert "U-Net" not in report


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([{"enabled": True, "mode": "tile"}], "mode is 'tile': use 'auto', 'patch' or 'stream'."),
        ([{"enabled": True, "tiles": 3}], "there is no argument 'tiles': use enabled, mode,"),
        ([{"enabled": True, "splits": 1e9}], "splits is 1000000000.0: use at most 4096 strips."),
        (
            [{"enabled": True, "vae": False}],
            "neither VAE nor U-Net nor Upscalers is chosen, so nothing will be patched.",
        ),
        ([True, "patch", True, False, 0, 16.0, 0.0, 8], "upscalers is 8: use True or False."),
        ([True, "patch", True, False, 0, 16.0, 0.0, False, 8], "there are more than 8 arguments: use enabled, mode,"),
    ],
)
def test_wrong_arguments(webui: WebUI, eager: Result, args: list[Any], message: str) -> None:
    result = webui.run(patch_conv=args)
    assert result.report.startswith(f"Patch Conv is off: {message}")
    assert result.report in result.log
    assert np.array_equal(result.images[0], eager.images[0])


@pytest.mark.parametrize(
    ("words", "report", "comments"),
    [
        ("Patch Conv: banana", "", ["is ignored: mode is 'banana': use 'auto', 'patch' or 'stream'."]),
        (
            "Patch Conv: stream, Patch Conv splits: many, Patch Conv budget: -3",
            "Patch Conv: VAE decoder streamed",
            ["splits is 'many': use a number of strips, or 0.", "budget is -3.0: use a number of GiB, or 0."],
        ),
    ],
)
def test_parameters_from_elsewhere(webui: WebUI, words: str, report: str, comments: list[str]) -> None:
    if webui.host is FORGE:
        pytest.skip("Forge's API fails at any infotext, one without Patch Conv too")
    result = webui.run(infotext=f"a cat\nSteps: 2, Sampler: Euler, CFG scale: 1, Seed: 1, Size: 128x128, {words}")
    assert result.report.startswith(report)
    assert bool(result.report) == bool(report)
    for comment in comments:
        assert comment in result.log


def test_an_error_leaves_nothing(webui: WebUI, eager: Result) -> None:
    before = webui.get("/probe/now")
    webui.get("/probe/fail")
    with pytest.raises(urllib.error.HTTPError):
        webui.run(patch_conv=STREAM)
    assert webui.get("/probe/now") == before
    check_same(webui.run(patch_conv=STREAM), eager)


def test_interrupt_leaves_nothing(webui: WebUI, eager: Result) -> None:
    before = webui.get("/probe/now")
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(webui.run(patch_conv=STREAM, steps=60)))
    thread.start()
    end = time.monotonic() + LIMIT
    while webui.get("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    webui.get("/sdapi/v1/interrupt", {})
    thread.join()
    assert len(results[0].images) == 1  # the WebUI shows how far it came
    assert webui.get("/probe/now") == before


@pytest.mark.parametrize(("button", "pictures"), [("interrupt", 1), ("skip", 2)])
@MODES
def test_a_decode_is_stopped_by(webui: WebUI, settings: dict[str, Any], button: str, pictures: int) -> None:
    """The first of two batches: the WebUI shows what it has of it, and goes on as after any other."""
    before = webui.get("/probe/now")
    results: list[Result] = []
    request: dict[str, Any] = {"width": 192, "height": 192, "steps": 1, "n_iter": 2}
    asked = {**settings, "unet": False, "splits": 8, "budget": 0.05}
    thread = threading.Thread(target=lambda: results.append(webui.run(**request, patch_conv=asked)))
    webui.get("/probe/watch")
    thread.start()
    end = time.monotonic() + LIMIT
    while not webui.get("/probe/decodes")["begun"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    webui.get(f"/sdapi/v1/{button}", {})
    thread.join()
    assert len(results[0].images) == pictures
    assert results[0].report.endswith(", stopped; of what was stopped there is only a rough picture")
    rough = results[0].images[-pictures]
    assert np.array_equal(rough, rough[::8, ::8].repeat(8, 0).repeat(8, 1))
    whole = results[0].images[-1]
    assert (pictures == 1) == np.array_equal(whole, whole[::8, ::8].repeat(8, 0).repeat(8, 1))
    assert webui.get("/probe/now") == before
    assert webui.get("/sdapi/v1/progress?skip_current_image=true")["textinfo"] is None


def test_live_previews_are_not_counted(webui: WebUI, eager: Result) -> None:
    """Those that are decoded in full."""
    if webui.host is not A1111:
        pytest.skip(f"{webui.host.name} decodes no preview in full: it takes Approx NN for that")
    with webui.options(live_previews_enable=True, show_progress_type="Full", show_progress_every_n_steps=1):
        results: list[Result] = []
        thread = threading.Thread(target=lambda: results.append(webui.run(patch_conv=STREAM, steps=8)))
        thread.start()
        seen = False
        while thread.is_alive():
            seen = bool(webui.get("/sdapi/v1/progress", seconds=LIMIT)["current_image"]) or seen
            time.sleep(0.1)
        assert seen
        assert webui.get("/probe/decodes")["counted"] == 1
        check_same(results[0], webui.run(steps=8))


def test_a_plot_over_modes_and_splits(webui: WebUI, eager: Result) -> None:
    axes = webui.get("/probe/axes")
    mode, splits = axes.index("[Patch Conv] Mode"), axes.index("[Patch Conv] Splits")
    # Type, values and values as a list of x, y and z.
    args = [mode, "", ["off", "patch", "stream"], splits, "2,3", [], 0, "", [], *webui.host.plot]
    result = webui.run(script_name="x/y/z plot", script_args=args, patch_conv=PATCH)
    singles = [image for image in result.images if image.shape == eager.images[0].shape]
    assert len(singles) == 6
    for single in singles:
        assert_same_picture(single, eager.images[0])
    cells = [line.partition(",")[0] for line in result.report.splitlines()]
    ran = ("in up to 2 strips", "streamed", "in up to 3 strips", "streamed")
    assert cells == [f"{n} out of 6: Patch Conv: VAE decoder {how}" for n, how in zip((2, 3, 5, 6), ran)]
    assert "1 out of 6" not in webui.run(patch_conv=PATCH).report


@pytest.mark.slow
def test_memory(webui: WebUI) -> None:
    """The decode is the peak of an eager run; what a streamed one takes it measures itself, from trimmed memory on."""
    request: dict[str, Any] = {"width": 768, "height": 768, "steps": 1}
    webui.run(**request)
    _, eager = webui.peak_of(lambda: webui.run(**request))
    report = re.search(r"streamed, peak (\d+) MiB", webui.run(**request, patch_conv={"mode": "stream"}).log)
    assert report is not None
    print(f"peak of the WebUI's decode at 768²: eager {eager >> 20} MiB, streamed {report[1]} MiB")
    assert int(report[1]) < 0.6 * (eager >> 20)


@pytest.mark.slow
def test_weights_that_move(frugal_webui: WebUI) -> None:
    frugal_webui.run()
    before = frugal_webui.get("/probe/now")
    eager = frugal_webui.run()
    for settings in (PATCH, STREAM):
        check_same(frugal_webui.run(patch_conv=settings), eager)
    assert frugal_webui.get("/probe/now") == before
