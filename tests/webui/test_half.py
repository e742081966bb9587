"""The toggle in half precision, where rounding differs between two ways to compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .conftest import MODES, WebUI


@pytest.mark.slow
@MODES
def test_no_farther_from_full_precision(half_webui: WebUI, webui: WebUI, settings: dict[str, Any]) -> None:
    exact = webui.run().images[0].astype(int)
    half_webui.run()  # what the WebUI puts on a model itself is there from the first run on
    before = half_webui.get("/probe/now")
    plain = half_webui.run().images[0]
    result = half_webui.run(patch_conv=settings)
    one, other = (np.abs(image.astype(int) - exact) for image in (result.images[0], plain))
    apart = np.abs(result.images[0].astype(int) - plain)
    print(f"distance to float32: {one.mean():.4f} (largest {one.max()}), plain {other.mean():.4f} ({other.max()})")
    print(f"to plain: largest {apart.max()}, values that differ {(apart > 0).mean():.2e}")
    assert other.any()  # it does run in half precision
    assert apart.max() <= 1 or (one.mean() <= 1.05 * other.mean() and one.max() <= 1.05 * other.max())
    assert "U-Net in up to 3 strips" in result.log
    assert half_webui.get("/probe/now") == before
    assert np.array_equal(half_webui.run().images[0], plain)
