"""What the WebUI shows of a decode, and is asked by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comfyui_patchconv.hosts.webui.host import Host, no_latents

from .vae import VAE
from .webui_state import Model, cheap, state_of_a_run


def shown(state: Any, now: float) -> tuple[float, float]:
    """The percentage and the time that is left, as the WebUI reckons them (modules/progress.py)."""
    progress = state.job_no / state.job_count + state.sampling_step / state.sampling_steps / state.job_count
    passed = now - state.time_start
    return 100 * progress, passed / progress - passed


@pytest.mark.parametrize(("jobs", "done"), [(1, 0), (2, 1), (3, 1)])
def test_one_percentage_and_a_time_that_falls(jobs: int, done: int) -> None:
    """Of a decode of 40 seconds."""
    state, now = state_of_a_run(jobs, done), [10.0]
    before = dict(vars(state))
    left: list[float] = []
    percents: list[float] = []
    with Host(state, cheap, None, lambda: now[0]).shown("VAE decoder in strips") as show:
        show(0.0)
        assert vars(state) == before
        for second in range(1, 40):
            now[0] = 10.0 + second
            show(second / 40)
            percent, eta = shown(state, now[0])
            percents.append(percent)
            left.append(eta)
            assert state.textinfo == "VAE decoder in strips"
            assert isinstance(state.sampling_step, int)
            assert state.sampling_step - state.current_image_sampling_step <= 0  # no live preview is due
    assert percents == pytest.approx([100 * (done + second / 40) / jobs for second in range(1, 40)])
    jobs_left = (jobs - done - 1) * 50 / (done + 1)
    assert left == pytest.approx([second + jobs_left for second in range(39, 0, -1)])
    assert vars(state) == before


def test_the_time_does_not_grow_in_a_slow_stretch() -> None:
    state, now = state_of_a_run(), [10.0]
    left: list[float] = []
    with Host(state, cheap, None, lambda: now[0]).shown("VAE decoder in strips") as show:
        for seconds, share in ((1, 0.1), (10, 0.2), (11, 0.5), (12, 0.75), (13, 1.0)):
            now[0] = 10.0 + seconds
            show(share)
            left.append(round(shown(state, now[0])[1], 6))
    assert left == [9, 9, 9, 4, 0]


@pytest.mark.parametrize("jobs", [0, 1, 2])
def test_work_that_nobody_has_begun_as_a_job(jobs: int) -> None:
    """An extension's decode before the first run: the WebUI knows no time then."""
    state, now = state_of_a_run(jobs), [10.0]
    state.time_start = None
    before = dict(vars(state))
    with Host(state, cheap, None, lambda: now[0]).shown("VAE decoder in strips") as show:
        now[0] = 12.0
        show(0.25)
        assert state.textinfo == "VAE decoder in strips" + ("" if jobs else ": 25%")
        if jobs:
            assert shown(state, now[0]) == pytest.approx((25 / jobs, 6 + 8 * (jobs - 1)))
    assert vars(state) == before


def test_before_the_jobs_are_counted_the_words_have_the_percentage() -> None:
    """A picture that is encoded for img2img."""
    state, now = state_of_a_run(jobs=-1), [10.0]
    with Host(state, cheap, None, lambda: now[0]).shown("VAE encoder in strips") as show:
        show(0.25)
        assert state.textinfo == "VAE encoder in strips: 25%"
        assert state.sampling_steps == 20
    assert state.textinfo is None


def test_under_extras_whose_bar_is_full_the_words_have_the_percentage() -> None:
    """It counts a job as done when that begins."""
    state, now = state_of_a_run(jobs=1, done=1), [10.0]
    with Host(state, cheap, None, lambda: now[0]).shown("upscaler ESRGAN in strips") as show:
        show(0.25)
        assert state.textinfo == "upscaler ESRGAN in strips: 25%"
        assert state.sampling_steps == 20


def test_whether_to_stop() -> None:
    state = state_of_a_run()
    host = Host(state, cheap, None)
    assert not host.stop_asked("decoder")
    state.skipped = True
    assert host.stop_asked("decoder")
    assert host.stop_asked("upscaler")
    assert not host.stop_asked("encoder")
    state.interrupted = True
    assert host.stop_asked("encoder")


def test_what_is_shown_instead() -> None:
    latents = torch.randn(2, 4, 3, 5).half()
    picture = Host(state_of_a_run(), cheap, None).rough_picture(latents)
    assert picture.shape == (2, 3, 24, 40)
    assert picture.dtype == torch.float16
    assert torch.equal(picture[:, :, ::8, ::8], latents[:, :3] + 7)
    assert no_latents(Model(VAE()), torch.ones(2, 3, 64, 32)).shape == (2, 4, 8, 4)
