"""Which device a call of a model computes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comfyui_patchconv.hosts.calls import device_of

HERE, THERE = torch.zeros(1), torch.zeros(1, device="meta")


@pytest.mark.parametrize(
    ("args", "kwargs", "device"),
    [
        ((HERE,), {}, "cpu"),
        ((THERE, HERE), {}, "meta"),
        ((1, [THERE]), {"x": HERE}, "meta"),
        ((), {"x": THERE}, "meta"),
        ((HERE,), {"device": "meta"}, "meta"),
        ((HERE,), {"device": torch.device("meta")}, "meta"),
        ((HERE, torch.device("meta")), {}, "meta"),
        ((THERE,), {"device": torch.device("cpu")}, "cpu"),
        ((THERE,), {"device": None}, "meta"),
        ((THERE,), {"device": "no such device"}, "meta"),
        ((THERE,), {"device": HERE}, "meta"),
        (("cpu", 1), {}, "cpu"),
        ((), {}, "cpu"),
    ],
)
def test_a_named_device_comes_before_that_of_a_tensor(args: Any, kwargs: Any, device: str) -> None:
    assert device_of(args, kwargs) == torch.device(device)
