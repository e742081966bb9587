"""Strips that suit the GPU that is there: measured in time, and nothing of it stays."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from comfyui_patchconv.streaming.suited import Kept, Suited, candidates, measured, traits_of

from .helpers import in_use


def test_it_is_measured_in_time(gpu: torch.device, tmp_path: Path) -> None:
    traits = traits_of(gpu)
    assert traits is not None
    assert traits.processors > 0
    kept, before = Kept(tmp_path / "strips.json"), in_use(gpu)
    with torch.inference_mode():
        found = Suited(kept).strip_bytes(gpu)
        assert found in candidates(traits)
        assert list(kept.read().values()) == [found]
        start = time.monotonic()
        measured(gpu, candidates(traits))  # libraries have started
        assert time.monotonic() - start < 0.5
    assert in_use(gpu) <= before + (32 << 20)  # what libraries work in
