"""Runs what the library does on a second device: `run.py FOLDER` prints one line of JSON, what each thing gave.

FOLDER: where the device is built. difference: to the same on the CPU, of the largest value. peak, plan: bytes of the
device at once, beyond the weights, and what was expected. An error is told in words.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from device import register
from model_zoo import CASES, draw_weights, image, kl
from network_helpers import Frames, random_network, run_network
from patch_ddpm_helpers import FEW, TALL, randomised
from streaming.spread.toys import Decoder, drawn, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comfyui_patchconv import PartialConv2d, PConv2d, Tiling, convert_model
from comfyui_patchconv.conv.fill import fill
from comfyui_patchconv.conv.holes import with_holes
from comfyui_patchconv.conv.videos import VARIABLE
from comfyui_patchconv.hosts.devices.team import Team
from comfyui_patchconv.pixel_models.patch_ddpm import diffusion as patch_ddpm
from comfyui_patchconv.pixel_models.patch_diffusion import diffusion as patch_diffusion
from comfyui_patchconv.pixel_models.patch_diffusion.config import Config
from comfyui_patchconv.pixel_models.patch_diffusion.model import PatchUNet
from comfyui_patchconv.streaming import Streamed, Tuning, expect, stream, streamed
from comfyui_patchconv.streaming.execute import pass_loop
from comfyui_patchconv.streaming.suited import measured

SECOND = torch.device("privateuseone", 0)  # which is how torch calls it before it has a name
Answer = dict[str, Any]


def difference(result: Tensor, expected: Tensor) -> float:
    assert result.device == SECOND, f"on {result.device}"
    assert result.shape == expected.shape, f"of shape {tuple(result.shape)} instead of {tuple(expected.shape)}"
    return float((result.cpu() - expected).abs().max() / expected.abs().max())


def both(run: Callable[[Any], Tensor], *modules: nn.Module) -> float:
    """Of what `run` gives, the difference of the second device's; it puts its tensors on the device it is given."""
    expected = run(torch.device("cpu"))
    for module in modules:
        module.to(SECOND)
    return difference(run(SECOND), expected)


def models(counter: Any) -> Answer:
    """Each VAE, decode and encode, without a budget, and with all offloaded that can be."""
    answer = {}
    for name, (build, run, input) in CASES.items():
        if name == "unet":
            continue  # it is given its timestep on the CPU
        model, method = draw_weights(build()), name.split()[-1]
        expected = run(model, input)
        model.to(SECOND)
        for budget in (None, 1):
            try:
                with stream(getattr(model, method), budget=budget, tuning=SMALL):
                    answer[f"{name}, budget {budget}"] = difference(run(model, input.to(SECOND)), expected)
            except Exception as error:
                answer[f"{name}, budget {budget}"] = f"{type(error).__name__}: {error}"
    return answer


def networks(counter: Any) -> Answer:
    """Random networks, with the same weights on each device."""
    answer = {}
    for seed in range(40):
        results = []
        for device in (torch.device("cpu"), SECOND):
            operators, channels = random_network(seed, device)
            x = torch.randn(2, channels, 6 + seed % 12, 7, generator=torch.Generator().manual_seed(seed)).double()

            def run(map: Tensor, operators: Any = operators, holds: int = 1 + seed % 3) -> Tensor:
                return run_network(operators, map, holds)

            if device == SECOND:
                results.append(streamed(run, budget=[None, 1, 20_000][seed % 3], tuning=SMALL)(x.to(device)))
            else:
                results.append(run(x))
        answer[f"network {seed}"] = difference(results[1], results[0])
    return answer


SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)
"""Small maps come in several strips, too, and take more than what strips have beside them."""


def layers(counter: Any) -> Answer:
    """Convolutions in strips, partial convolution, and what is made of it."""
    answer = {}
    for kind, size in ((nn.Conv1d, (40,)), (nn.Conv2d, (40, 9)), (nn.Conv3d, (5, 40, 9))):
        layer, x = kind(4, 6, 3, padding=1), torch.randn(2, 4, *size)
        expected = layer(x)
        model = nn.Sequential(layer.to(SECOND))
        convert_model(model, splits=3, threshold=0)
        answer[kind.__name__] = difference(model(x.to(SECOND)), expected)
    x, holes = torch.rand(1, 4, 30, 20), torch.ones(1, 1, 30, 20)
    holes[..., 8:20, 5:12] = 0
    nvidia, other = PartialConv2d(4, 6, 3, padding=1), PConv2d(4, 6, 3, padding=1)
    answer["PartialConv2d"] = both(lambda device: nvidia(x.to(device), holes.to(device)), nvidia)
    answer["PConv2d"] = both(lambda device: other(x.to(device), holes[:, 0].to(device))[0], other)
    for edges in (False, True):
        answer[f"fill, edges {edges}"] = both(lambda device, e=edges: fill(x[:, :3].to(device), holes.to(device), e))
    vae: Any = draw_weights(kl(4))
    picture = image(3, 32, 24)

    def encode(device: torch.device) -> Tensor:
        mask = holes[0, 0, :, :].to(device).repeat(2, 2)[:32, :24]
        return with_holes(
            vae, lambda given: vae.encode(given).latent_dist.mean, picture.to(device), mask, Tiling(3, threshold=0)
        )

    answer["with_holes"] = both(encode, vae)
    return answer


def ranks(counter: Any) -> Answer:
    """A decode over two processes, which send each other what lies on the device."""
    model, latent = seeded(Decoder), drawn(1, 4, 13, 9)
    expected = model(latent)
    model.to(SECOND)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(2):
            process = os.fork()
            if not process:
                answer = of_rank(rank, Path(folder, "store"), model, latent.to(SECOND), expected)
                Path(folder, f"{rank}.json").write_text(json.dumps(answer))
                os._exit(0)
            processes.append(process)
        for process in processes:
            os.waitpid(process, 0)
        return {
            f"rank {rank}, {name}": value
            for rank in range(2)
            for name, value in json.loads(Path(folder, f"{rank}.json").read_text()).items()
        }


def of_rank(rank: int, store: Path, model: nn.Module, latent: Tensor, expected: Tensor) -> Answer:
    files: Any = dist
    dist.init_process_group("gloo", store=files.FileStore(str(store), 2), rank=rank, world_size=2)
    answer = {}
    for budget in (None, 1):
        run = streamed(model, budget=budget, tuning=SMALL, group=dist.group.WORLD)
        answer[f"budget {budget}"] = difference(run(latent), expected)
    return answer


def workers(counter: Any) -> Answer:
    """A decode over this process and a worker, which is sent the weights and has a device of its own."""
    model, latent = seeded(Decoder), drawn(1, 4, 13, 9)
    expected = model(latent)
    model.to(SECOND)
    os.environ["SECOND_DEVICE"] = sys.argv[1]
    team, run = Team(SECOND, ("device:register_for_worker",)), Streamed(tuning=SMALL)
    answer = {}
    for budget in (None, 1):
        run.budget = budget
        result, _ = team.call([SECOND], run, model.forward, (latent.to(SECOND),), {}, budget=budget)
        answer[f"budget {budget}"] = difference(result, expected)
    team.end()
    return answer


def pixel_models(counter: Any) -> Answer:
    """Sampling: noise comes from the CPU's generator whatever the device, so that a seed gives one image."""
    answer = {}
    config = Config(16, 2, 32, (1, 2), 1, attention=(4,), head_channels=0, heads=2)
    unet = PatchUNet(config).eval().requires_grad_(False)
    draw_weights(unet)
    noise = torch.randn(2, 3, 16, 16)
    answer["patch diffusion"] = both(
        lambda device: patch_diffusion.sample(
            [unet], noise.to(device), steps="4", generator=torch.Generator().manual_seed(0)
        ),
        unet,
    )
    for at_once in (0, 2):
        denoiser = randomised(TALL)
        start = torch.randn(2, TALL.channels, *TALL.image_sides)
        answer[f"patch ddpm, {at_once} at once"] = both(
            lambda device, denoiser=denoiser, start=start, at_once=at_once: patch_ddpm.sample(
                denoiser, FEW, start.to(device), generator=torch.Generator().manual_seed(0), patches_at_once=at_once
            ),
            denoiser,
        )
    return answer


@contextmanager
def made_of_images() -> Iterator[None]:
    """Within the block convolutions of videos are made of such of images, as where a device refuses them."""
    os.environ[VARIABLE] = "images"
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def videos(counter: Any) -> Answer:
    """Convolutions of videos that are made of such of images: in strips, streamed, and what the latter takes."""
    answer = {}
    layer, x = nn.Conv3d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 40, 9)
    expected = layer(x)
    with made_of_images():
        model = nn.Sequential(layer.to(SECOND))
        convert_model(model, splits=3, threshold=0)
        answer["in strips"] = difference(model(x.to(SECOND)), expected)
    frames, input = Frames(), image(8, 48, 96, 64)
    expected = frames(input)
    frames.to(SECOND)
    input = input.to(SECOND)
    for share in (None, 2, 12):
        with made_of_images():
            run = lambda copy, make: copy(make(input.shape))  # noqa: E731
            free = expect(frames, run, device=torch.device(SECOND), tuning=SMALL).peak
            budget = None if share is None else free // share
            plan = expect(frames, run, device=torch.device(SECOND), budget=budget, tuning=SMALL).peak
            before = counter.now()
            counter.reset_peak()
            result = streamed(frames, budget=budget, tuning=SMALL)(input)
            peak = counter.peak() - before
        answer[f"streamed, budget {budget}"] = difference(result, expected)
        assert peak <= 1.05 * plan, f"{peak} bytes where {plan} were planned"
    return answer


def sizes(counter: Any) -> Answer:
    """Strips are tried there, too, and nothing of them stays."""
    tried, before = [1 << 20, 6 << 20], counter.now()
    found = measured(SECOND, tried)
    assert counter.now() == before
    return {"measured": float(found not in tried)}


def peaks(counter: Any) -> Answer:
    """What a decode, an encode and a video's frames take at once, and what their plans say."""
    answer = {}
    vae: Any = draw_weights(kl(4)).to(SECOND)
    frames = Frames().to(SECOND)
    cases = (
        (vae, "decode", image(4, 96, 64)),
        (vae, "encode", image(3, 192, 128)),
        (frames, "forward", image(8, 48, 96, 64)),
    )
    for model, method, input in cases:
        input = input.to(SECOND)

        def run(copy: Any, make: Any, method: str = method, input: Tensor = input) -> Any:
            return getattr(copy, method)(make(input.shape))

        free = expect(model, run, device=torch.device(SECOND), tuning=SMALL).peak
        for share in (None, 2, 4, 12):
            budget = None if share is None else free // share
            with stream(getattr(model, method), budget=budget, tuning=SMALL):
                before = counter.now()
                counter.reset_peak()
                getattr(model, method)(input)
                peak = counter.peak() - before
            plan = expect(model, run, device=torch.device(SECOND), budget=budget, tuning=SMALL)
            answer[f"{method}, budget {budget}"] = {"peak": peak, "plan": plan.peak, "offloaded": plan.offloaded}
    return answer


class Waits(TorchDispatchMode):
    """Notes what the host has to wait for: values of the device's that come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = any(one.device == SECOND for one in given)
        if there and any(not isinstance(one, Tensor) or one.device != SECOND for one in tree_leaves(result)):
            self.seen.append(str(func))
        return result


def waits(counter: Any) -> Answer:
    """What the host waits for within the passes of decodes and encodes; and that such a wait would have been noted."""
    vae: Any = draw_weights(kl(4)).to(SECOND)
    kind: Any = pass_loop.PassLoop
    frames, found, compute = Frames().to(SECOND), {}, kind.compute
    cases = (
        (vae, "decode", image(4, 24, 16)),
        (vae, "encode", image(3, 64, 48)),
        (frames, "forward", image(8, 6, 32, 16)),
    )
    passes: list[str] = []

    def watched(one_pass: Any) -> None:
        with Waits() as seen:
            compute(one_pass)
        passes.append(" ".join(seen.seen))

    kind.compute = watched
    try:
        for model, method, input in cases:
            passes.clear()
            with stream(getattr(model, method), tuning=SMALL):
                getattr(model, method)(input.to(SECOND))
            found[method] = {"passes": len(passes), "waits": " ".join(passes).strip()}
    finally:
        kind.compute = compute
    with Waits() as seen:
        image(3, 4, 4).to(SECOND).sum().item()
        image(3, 4, 4).to(SECOND).cpu()
    found["noted"] = len(seen.seen)
    return found


if __name__ == "__main__":
    counted = register(Path(sys.argv[1]))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        print(
            json.dumps(
                {
                    part.__name__: part(counted)
                    for part in (models, networks, layers, ranks, workers, pixel_models, videos, sizes, peaks, waits)
                }
            )
        )
