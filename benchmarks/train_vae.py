"""Trains the small VAE of `patchconv demo`: Stable Diffusion's architecture at a fraction of its width.

    python benchmarks/train_vae.py PACKAGES OUT [--minutes 75] [--begun comfyui_patchconv/data/vae.safetensors]

PACKAGES: a folder with the photographs' packages; `photographs.py` says how they come there. OUT: a folder for
`vae.safetensors`, in half precision by diffusers' names, for `photograph.latent`, a photograph that it never saw, and
for `training.pt`, from which an interrupted training goes on. Every few minutes all are written, and the PSNR on
photographs that are never trained on is printed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import photographs
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.files.tensors import save_tensors
from comfyui_patchconv.files.vae import GROUPS_NAME

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

WIDTHS, LAYERS, LATENT, GROUPS = (64, 64, 64, 64), 1, 4, 16
"""Four channels in a group of a norm, as at Stable Diffusion's first level: through two, no mean brightness gets."""

STAGES = ((0.0, 64, 4), (0.5, 128, 2), (0.9, 192, 1))
"""From which share of the time on, crops of how many pixels, and how many: norms and attention have to learn what a
large picture's statistics are, small crops give more steps. Weights that were trained before have had those."""

SHOWN = "face"
"""The photograph whose latent is written."""

REFERENCE, SPREAD = 2.0, 3.0
"""A constant in every channel to begin with, and what colours of -1 to 1 are multiplied by to be a latent."""

RATE, LEAST_RATE, WARM_UP = 5e-4, 1e-5, 0.02
KL, LEAST_ERROR, DECAY = 1e-5, 1e-4, 0.999
EVALUATED, SIDE, EVERY = 8, 128, 180
"""Crops of each photograph that is held out, their side in pixels, and seconds between two evaluations."""


def new_vae() -> AutoencoderKL:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": WIDTHS,
        "layers_per_block": LAYERS,
        "latent_channels": LATENT,
        "norm_num_groups": GROUPS,
        "down_block_types": ("DownEncoderBlock2D",) * len(WIDTHS),
        "up_block_types": ("UpDecoderBlock2D",) * len(WIDTHS),
    }
    vae: Any = AutoencoderKL(**config)
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):  # blocks add nothing to begin with
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    begin_linear(vae)
    return vae


@torch.no_grad()
def begin_linear(vae: Any) -> None:
    """Weights by which `vae` makes each 8x8 pixels their mean colour and back, so that training begins with that.

    Each group of a norm holds u + c, u - c, -u + c and -u - c: their mean is 0, whatever u is, they are divided by the
    root of mean(u²) + c², which c keeps about the same in all pictures, and SiLU(x) - SiLU(-x) is x. Three groups
    carry colours, the others are random.
    """
    width, colours = WIDTHS[0], 3
    signs, constants = (torch.tensor(each).repeat(GROUPS) for each in ((1.0, 1.0, -1.0, -1.0), (1.0, -1.0, 1.0, -1.0)))
    passed = math.hypot(REFERENCE, 0.5)  # what norms divide by, for colours of the usual spread
    encoder, decoder = vae.encoder, vae.decoder
    for module, gain in ((encoder.conv_in, 1), (decoder.conv_in, 1 / SPREAD)):
        rows = torch.empty_like(module.weight[::4])
        nn.init.kaiming_normal_(rows, nonlinearity="linear")
        rows[:colours] = 0
        rows[:colours, :colours, 1, 1] = gain * torch.eye(colours)
        module.weight.copy_(rows.repeat_interleave(4, 0) * signs[:, None, None, None])
        module.bias.copy_(REFERENCE * constants)
    for block in encoder.down_blocks[:-1]:
        conv = block.downsamplers[0].conv
        conv.weight.zero_()[..., :2, :2] = torch.eye(width)[..., None, None] / 4
        conv.bias.zero_()
    for block in decoder.up_blocks[:-1]:
        conv = block.upsamplers[0].conv
        conv.weight.zero_()[..., 1, 1] = torch.eye(width)
        conv.bias.zero_()
    for module, gain in ((encoder.conv_out, SPREAD), (decoder.conv_out, 1)):
        module.weight[:colours] = 0
        for colour in range(colours):
            module.weight[colour, 4 * colour : 4 * colour + 4, 1, 1] = gain * passed / 2 * signs[:4]
        module.bias[:colours] = 0
    encoder.conv_out.weight[LATENT:] = 0
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[..., None, None])
        conv.bias.zero_()
    vae.quant_conv.bias[LATENT:] = -5  # the log variance: little noise


def crops(pictures: list[Tensor], side: int, count: int, generator: torch.Generator) -> Tensor:
    """`[count, 3, side, side]` from -1 to 1: from any photograph, at any size, turned, and in other light."""

    def chance(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    weights = torch.tensor([min(picture[0].numel(), 512**2) ** 0.5 for picture in pictures])
    made = []
    for chosen in torch.multinomial(weights, count, True, generator=generator).tolist():
        picture = pictures[chosen]
        height, width = picture.shape[1:]
        taken = round(min(side * 2 ** chance(-0.6, 1.2), height, width))
        top, left = int(chance(0, height - taken + 0.999)), int(chance(0, width - taken + 0.999))
        crop = picture[None, :, top : top + taken, left : left + taken]
        if taken != side:
            crop = F.interpolate(crop, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        if chance(0, 1) < 0.5:
            crop = crop.flip(3)
        if chance(0, 1) < 0.3:
            crop = crop.transpose(2, 3)
        if chance(0, 1) < 0.3:  # a photograph has few colours, and these are other ones
            crop = crop[:, torch.randperm(3, generator=generator)]
        crop = torch.lerp(crop.mean(1, keepdim=True), crop, chance(0.5, 1.8)).clamp(0, 1)
        light = torch.tensor([chance(0.85, 1.15) for _ in range(3)])[None, :, None, None] * chance(0.6, 1.2)
        made.append((crop ** chance(0.8, 1.25) * light).clamp(0, 1))
    return torch.cat(made) * 2 - 1


def loss_of(vae: Any, images: Tensor) -> Tensor:
    """How far a reconstruction is from `images`, as PSNR has it, by the logarithm of each one's mean square; and the
    latent from a normal distribution."""
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(images, return_dict=False)[0]
        made = vae.decode(latent.sample(), return_dict=False)[0]
    squares = (made.float() - images).square().flatten(1).mean(1)
    return 0.1 * (squares + LEAST_ERROR).log().mean() + KL * latent.kl().mean() / latent.mean[0].numel()


@torch.inference_mode()
def psnr(vae: Any, pictures: dict[str, Tensor]) -> dict[str, float]:
    """The mean PSNR in dB over the same crops of each of the pictures, by the mean of the latent."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, picture in pictures.items():
        each = []
        for _ in range(EVALUATED):
            top, left = (int(torch.randint(n - SIDE + 1, (), generator=generator)) for n in picture.shape[1:])
            crop = picture[None, :, top : top + SIDE, left : left + SIDE]
            made = vae.decode(vae.encode(crop * 2 - 1).latent_dist.mode()).sample
            made = made.add(1).div(2).clamp(0, 1)
            each.append(-10 * math.log10(max(float(F.mse_loss(made, crop)), 1e-10)))
        found[name] = sum(each) / len(each)
    return found


@torch.inference_mode()
def save_latent(vae: Any, picture: Tensor, path: Path) -> None:
    """Write the mean of the latent of `picture`, `[3, H, W]` in 0..1, as ComfyUI's `.latent`, in half precision."""
    latent = vae.encode(picture[None] * 2 - 1).latent_dist.mode()
    save_tensors(path, {"latent_tensor": latent.half(), "latent_format_version_0": torch.tensor([])})


class Training:
    """Weights, their running mean, the optimizer, and how long it has taken so far, in seconds.

    begun: a file of weights to go on from.
    """

    def __init__(self, out: Path, seconds: float, begun: Optional[Path] = None) -> None:
        torch.manual_seed(0)
        self.out, self.seconds, self.elapsed, self.steps = out, seconds, 0.0, 0
        self.vae, self.mean = new_vae(), new_vae().requires_grad_(False).eval()
        self.mean.load_state_dict(self.vae.state_dict())
        self.optimizer = torch.optim.AdamW(self.vae.parameters(), RATE, betas=(0.9, 0.99), weight_decay=1e-3)
        self.least_stage = STAGES[begun is not None][0]
        if begun is not None:
            self.vae.load_state_dict(load_file(begun))
            self.mean.load_state_dict(self.vae.state_dict())
        if (out / "training.pt").exists():
            held = torch.load(out / "training.pt", weights_only=True)
            self.elapsed, self.steps = held["elapsed"], held["steps"]
            for name in ("vae", "mean", "optimizer"):
                getattr(self, name).load_state_dict(held[name])
        self.generator = torch.Generator().manual_seed(self.steps)

    def step(self, pictures: list[Tensor]) -> float:
        """Train on some crops, and return their loss."""
        began, done = time.monotonic(), self.elapsed / self.seconds
        rate = LEAST_RATE + (RATE - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1, (done + 1e-4) / WARM_UP)
        _, side, count = [stage for stage in STAGES if stage[0] <= max(done, self.least_stage)][-1]
        loss = loss_of(self.vae, crops(pictures, side, count, self.generator))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        share = 1 - min(DECAY, (self.steps + 1) / (self.steps + 10))
        for kept, now in zip(self.mean.parameters(), self.vae.parameters()):
            kept.lerp_(now.detach(), share)
        self.elapsed += time.monotonic() - began
        return float(loss.detach())

    def save(self) -> None:
        """Write both files, each whole or not at all."""
        state = {"elapsed": self.elapsed, "steps": self.steps}
        for name in ("vae", "mean", "optimizer"):
            state[name] = getattr(self, name).state_dict()
        torch.save(state, self.out / "training.tmp")
        (self.out / "training.tmp").replace(self.out / "training.pt")
        half = {name: value.half() for name, value in self.mean.state_dict().items()}
        save_tensors(self.out / "vae.safetensors", half, {"format": "pt", GROUPS_NAME: str(GROUPS)})


def losses(training: Training, pictures: list[Tensor]) -> Iterator[float]:
    """Train until the time is over: the mean loss of every `EVERY` seconds, and of what is left."""
    since, found = time.monotonic(), []
    while training.elapsed < training.seconds:
        found.append(training.step(pictures))
        if time.monotonic() - since > EVERY or training.elapsed >= training.seconds:
            yield sum(found) / len(found)
            since, found = time.monotonic(), []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=75, help="of training, beside evaluations (%(default)s)")
    parser.add_argument("--begun", type=Path, help="weights to go on from, for what it trained earlier (default: none)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    every = photographs.load(args.packages)
    held_out = {name: every.pop(name) for name in photographs.HELD_OUT}
    training = Training(args.out, args.minutes * 60, args.begun)
    size = sum(value.numel() for value in training.vae.parameters())
    print(f"{len(every)} photographs, {size / 1e6:.2f} million weights", flush=True)
    for loss in losses(training, list(every.values())):
        training.save()
        save_latent(training.mean, held_out[SHOWN], args.out / "photograph.latent")
        found = psnr(training.mean, held_out)
        each = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        minutes, mean = training.elapsed / 60, sum(found.values()) / len(found)
        print(f"{minutes:5.1f} min, {training.steps} steps: loss {loss:.4f}, {mean:.2f} dB ({each})", flush=True)


if __name__ == "__main__":
    main()
