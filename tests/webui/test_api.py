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
from host_process import assert_same_picture

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
        r"\(without Patch Conv: (at least [\d.]+ .iB, counted|not measured)\), [\d.]+ s; "
        r"U-Net in up to 3 strips$",
        streamed.log,
        re.MULTILINE,
    )
    assert "VAE decoder in up to 3 strips" in webui.run(patch_conv=PATCH).log


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
        assert config[f"{path}/Mode/value"] == "patch"
        assert config[f"{path}/Threshold (millions)/value"] == 16.0


def test_arguments_in_order(webui: WebUI, eager: Result) -> None:
    result = webui.run(patch_conv=[True, "patch", True, False, 5, 0.0, 0.0])
    check_same(result, eager)
    assert "Patch Conv: VAE decoder in up to 5 strips" in result.log
    assert "U-Net" not in result.log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "tile"}, "Patch Conv is off: mode is 'tile': use 'patch' or 'stream'."),
        ({"tiles": 3}, "Patch Conv is off: there is no argument 'tiles': use enabled, mode,"),
    ],
)
def test_wrong_arguments(webui: WebUI, eager: Result, settings: dict[str, Any], message: str) -> None:
    result = webui.run(patch_conv=settings)
    assert message in result.log
    assert np.array_equal(result.images[0], eager.images[0])


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
    end = time.monotonic() + 120
    while webui.get("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    webui.get("/sdapi/v1/interrupt", {})
    thread.join()
    assert len(results[0].images) == 1  # the WebUI shows how far it came
    assert webui.get("/probe/now") == before


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
    for words in ("decoder in up to 2 strips", "decoder in up to 3 strips", "decoder streamed"):
        assert words in result.log


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
