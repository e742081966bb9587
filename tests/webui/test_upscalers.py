"""Upscalers in a running WebUI, whole and streamed: in hires fix, in SD upscale and under Extras."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from processes import LIMIT
from upscale_weights import NO_REAL_WEIGHTS, scene

from .conftest import COMPACT_UPSCALER, REAL_UPSCALER, UPSCALER, Result, WebUI, as_base64, open_image
from .test_api import HIRES

UPSCALING = {"upscalers": True, "vae": False}
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 1}
EXTRAS = {"upscaler_1": UPSCALER, "upscaling_resize": 4}


@pytest.fixture(scope="module", autouse=True)
def tiles(webui: WebUI) -> Iterator[None]:
    """Such small ones that they are seen, and nothing that was upscaled before is taken for it."""
    there = [one["name"] for one in webui.get("/sdapi/v1/upscalers")]
    if UPSCALER not in there:
        pytest.skip(
            f"{webui.host.name} has {', '.join(there)}, and not what is in its models/ESRGAN: is spandrel there?"
        )
    with webui.options(ESRGAN_tile=16, ESRGAN_tile_overlap=8, upscaling_max_images_in_cache=0):
        yield


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """A slope with noise."""
    return picture(32, 32)


def picture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    return (slope + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


def differs(one: np.ndarray, other: np.ndarray) -> bool:
    return np.abs(one.astype(int) - other).max() > 4


def hires(webui: WebUI) -> dict[str, Any]:
    return {**SMALL, **HIRES, **webui.host.hires, "hr_upscaler": UPSCALER}


def whole(webui: WebUI, run: Callable[[], Any]) -> Any:
    """What the WebUI makes without tiles."""
    with webui.options(ESRGAN_tile=0):
        return run()


def check_level(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    difference = np.abs(one.astype(int) - other)
    print(f"largest difference {difference.max()}, values that differ {(difference > 0).mean():.2e}")
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


class Made(NamedTuple):
    """What a run gave back, and the picture that its upscaler made on the way, `[H, W, 3]`."""

    result: Result
    upscaled: np.ndarray


def make(webui: WebUI, kind: str = "txt2img", **request: Any) -> Made:
    result = webui.run(kind, **request)
    return Made(result, np.asarray(open_image(webui.get("/probe/upscaled")["png"])))


def check_whole(ours: Made, untiled: Made, tiled: Made) -> None:
    """What was upscaled is the whole's, and in the end there is nothing of the tiles. One level in two of the values
    that were upscaled becomes one in 1.6 % of those that are sampled from them in reForge, without Patch Conv too."""
    check_level(ours.upscaled, untiled.upscaled)
    from_tiles, from_ours = (
        np.abs(one.result.images[0].astype(int) - untiled.result.images[0]) for one in (tiled, ours)
    )
    print(
        f"in the end: tiles' mean {from_tiles.mean():.4f}, largest {from_tiles.max()}; "
        f"ours {from_ours.mean():.4f}, {from_ours.max()}"
    )
    assert from_ours.max() <= 1
    assert (from_ours > 0).mean() < 2e-2
    assert from_tiles.mean() > 10 * from_ours.mean()


@pytest.fixture(scope="module")
def tiled(webui: WebUI) -> Made:
    """By hires fix, as the WebUI has it."""
    return make(webui, **hires(webui))


@pytest.fixture(scope="module")
def untiled(webui: WebUI) -> Made:
    return whole(webui, lambda: make(webui, **hires(webui)))


def test_hires_fix(webui: WebUI, tiled: Made, untiled: Made) -> None:
    before = webui.get("/probe/now")
    assert differs(tiled.upscaled, untiled.upscaled)
    ours = make(webui, **hires(webui), patch_conv={"upscalers": True})
    result = ours.result
    during = webui.get("/probe/during")
    patched = {place for place, method in during.items() if before.get(place) != method}
    tiling = {place for place in before if place.endswith((".upscale_with_model", ".tiled_upscale_2"))}
    print(f"tiles are cut by {', '.join(sorted(tiling))}")
    assert {"upscaler_utils.upscale_with_model", "esrgan_model.upscale_with_model"} <= tiling <= patched
    check_whole(ours, untiled, tiled)
    assert "; upscaler ESRGAN streamed, peak " in result.report
    assert "whole without Patch Conv: " in result.report
    assert "Patch Conv parts: VAE + Upscalers" in result.infotext
    assert webui.get("/probe/now") == before


def test_arguments_in_order(webui: WebUI, tiled: Made, untiled: Made) -> None:
    ours = make(webui, **hires(webui), patch_conv=[True, "stream", False, False, 0, 0.0, 2.0, True])
    check_whole(ours, untiled, tiled)
    assert ours.result.report.startswith("Patch Conv: upscaler ESRGAN streamed, peak ")
    theirs = make(webui, **hires(webui), patch_conv=[True, "auto", True, False, 0, 0.0, 2.0])
    assert np.array_equal(theirs.upscaled, tiled.upscaled)
    assert "upscaler" not in theirs.result.report


def test_sd_upscale(webui: WebUI, image: np.ndarray) -> None:
    """Its script upscales before the first picture is begun."""
    request: dict[str, Any] = {
        "init_images": [as_base64(image)], **SMALL, "denoising_strength": 0.5, "steps": 2,
        "script_name": "sd upscale", "script_args": ["", 16, UPSCALER, 2.0],
    }  # fmt: skip

    def run(**options: Any) -> Made:
        return make(webui, "img2img", **request, **options)

    before = webui.get("/probe/now")
    tiled, untiled, ours = run(), whole(webui, run), run(patch_conv=UPSCALING)
    assert differs(tiled.upscaled, untiled.upscaled)
    check_whole(ours, untiled, tiled)
    result = ours.result
    assert "nothing that it was asked to patch has run" not in result.log
    assert "Patch Conv: upscaler ESRGAN streamed, peak " in result.log
    assert "Patch Conv parts: Upscalers" in result.infotext
    assert webui.get("/probe/now") == before
    assert np.array_equal(run().result.images[0], tiled.result.images[0])


def test_img2img_to_another_size(webui: WebUI, image: np.ndarray) -> None:
    request: dict[str, Any] = {"init_images": [as_base64(image)], **SMALL, "denoising_strength": 0.5, "steps": 2}

    def run(**options: Any) -> Made:
        return make(webui, "img2img", **request, **options)

    with webui.options(upscaler_for_img2img=UPSCALER):
        tiled, untiled, ours = run(), whole(webui, run), run(patch_conv=UPSCALING)
    assert differs(tiled.upscaled, untiled.upscaled)
    check_whole(ours, untiled, tiled)
    assert ours.result.report.startswith("Patch Conv: upscaler ESRGAN streamed, peak ")


def extras(webui: WebUI, image: np.ndarray, *, anew: bool = True, **request: Any) -> np.ndarray:
    """anew: with none of the pictures that Extras keeps, of which one stays even where none is to be kept."""
    if anew:
        webui.get("/probe/forget")
    asked = {"image": as_base64(image), **EXTRAS, **request}
    answer = webui.get("/sdapi/v1/extra-single-image", asked, seconds=1800)
    return np.asarray(open_image(answer["image"]))


def test_extras(webui: WebUI, image: np.ndarray) -> None:
    before = webui.get("/probe/now")
    untiled = whole(webui, lambda: extras(webui, image))
    with webui.options(upscaling_max_images_in_cache=5):
        tiled = extras(webui, image)
        assert tiled.shape == (128, 128, 3)
        assert differs(tiled, untiled)
        with webui.options(patch_conv_extras=True):
            start = len(webui.log())
            idle = webui.get("/probe/now")
            changed = {place for place, method in idle.items() if before[place] != method}
            assert changed == {"postprocessing.run_postprocessing"}
            check_level(extras(webui, image, anew=False), untiled)  # not what was kept of the tiled one
            assert "Patch Conv: upscaler ESRGAN streamed, peak " in webui.log()[start:]
            assert webui.get("/probe/now") == idle
            assert webui.run(**hires(webui)).report == ""  # the accordion says so of a run
        assert webui.get("/probe/now") == before
        assert np.array_equal(extras(webui, image, anew=False), tiled)  # nor this what was kept of ours


def test_extras_with_a_model_of_the_compact_kind(webui: WebUI, image: np.ndarray) -> None:
    """reForge has a module, a folder and tiles of its own for each kind; the others have them beside ESRGAN's."""
    kind = webui.host.compact
    request: dict[str, Any] = {"upscaler_1": COMPACT_UPSCALER}
    with webui.options(**{f"{kind}_tile": 0}):
        untiled = extras(webui, image, **request)
    with webui.options(**{f"{kind}_tile": 16, f"{kind}_tile_overlap": 2}):  # less than it sees
        tiled = extras(webui, image, **request)
        start = len(webui.log())
        with webui.options(patch_conv_extras=True):
            result = extras(webui, image, **request)
        assert re.search(r"Patch Conv: upscaler .*Compact streamed, peak ", webui.log()[start:])
        check_level(result, untiled)
        assert differs(tiled, untiled)
        assert np.array_equal(extras(webui, image, **request), tiled)


@pytest.mark.slow
def test_extras_with_real_weights_at_512(webui: WebUI) -> None:
    """RealESRGAN x4plus: the picture of the model run on the whole, which the WebUI's usual tiles are not."""
    if REAL_UPSCALER not in [one["name"] for one in webui.get("/sdapi/v1/upscalers")]:
        pytest.skip(NO_REAL_WEIGHTS)
    image = scene(512).numpy()
    with webui.options(ESRGAN_tile=192, ESRGAN_tile_overlap=8):
        tiled = extras(webui, image, upscaler_1=REAL_UPSCALER)
        untiled = whole(webui, lambda: extras(webui, image, upscaler_1=REAL_UPSCALER))
        start = len(webui.log())
        with webui.options(patch_conv_extras=True):
            result = extras(webui, image, upscaler_1=REAL_UPSCALER)
    print([line for line in webui.log()[start:].splitlines() if line.startswith("Patch Conv")])
    check_level(result, untiled)
    print(f"tiles: largest difference {np.abs(tiled.astype(int) - untiled).max()}")
    assert differs(tiled, untiled)


def press(webui: WebUI, button: str, work: Callable[[], Any]) -> Any:
    """What comes of `work` if a button is pressed once the host shows that it upscales."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    end = time.monotonic() + LIMIT
    while not (shown(webui) or "").startswith("upscaler ESRGAN in strips"):
        assert thread.is_alive()
        assert time.monotonic() < end
        time.sleep(0.02)
    webui.get(f"/sdapi/v1/{button}", {})
    thread.join()
    return results[0]


def shown(webui: WebUI) -> str | None:
    return webui.get("/sdapi/v1/progress?skip_current_image=true")["textinfo"]


def test_extras_interrupted(webui: WebUI) -> None:
    from PIL import Image

    large = picture(512, 448)
    before = webui.get("/probe/now")
    with webui.options(patch_conv_extras=True):
        start = len(webui.log())
        result = press(webui, "interrupt", lambda: extras(webui, large))
        expected = Image.fromarray(large).resize((4 * 448, 4 * 512), resample=Image.Resampling.LANCZOS)
        assert np.array_equal(result, np.asarray(expected))  # as the WebUI does with tiles
        assert ", stopped; the picture whose upscaling was stopped went on as it was" in webui.log()[start:]
    assert webui.get("/probe/now") == before


@pytest.mark.parametrize("button", ["interrupt", "skip"])
def test_hires_fix_stopped(webui: WebUI, button: str) -> None:
    before = webui.get("/probe/now")
    request: dict[str, Any] = {**hires(webui), "width": 128, "height": 128}
    result = press(webui, button, lambda: webui.run(**request, patch_conv=UPSCALING))
    assert result.report.endswith(", stopped; the picture whose upscaling was stopped went on as it was")
    assert result.images[0].shape == (192, 192, 3)
    assert webui.get("/probe/now") == before
    assert shown(webui) is None


def test_an_error_leaves_nothing(webui: WebUI) -> None:
    """One of a script behind what it upscaled."""
    before = webui.get("/probe/now")
    webui.get("/probe/fail")
    request = hires(webui)
    with pytest.raises(OSError, match="500"):
        webui.run(**request, patch_conv=UPSCALING)
    assert webui.get("/probe/now") == before
