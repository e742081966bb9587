"""`patchconv demo | decode | encode | patch-diffusion | patch-ddpm`: the package without a host."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Optional, cast

import torch
from torch import Tensor, nn

from . import files
from .arguments import DTYPES, device, first_line, natural, size
from .convert import patched
from .measure import Recorder
from .memory import is_out_of_memory
from .patch_ddpm import commands as patch_ddpm
from .patch_diffusion import commands as patch_diffusion
from .planner import DEFAULT_THRESHOLD, MODES
from .streaming import stream
from .tiled_conv import OnStrip

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

MB = 1e6
CHOICES = (*MODES, "plain")
WRONG_INPUT, OUT_OF_MEMORY, INTERRUPTED = 2, 3, 130
"""Exit codes; 0 is success."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code.

    0: done. 2: wrong input, said in one sentence on stderr before any work. 3: out of memory. 130: interrupted.
    """
    try:
        args = parser().parse_args(argv)
        with torch.inference_mode(args.job != "train"):
            args.run(args)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        return _fail("stopped.", INTERRUPTED)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        return _fail(f"{error.name} is not installed: run pip install 'patchconv[{extra}]'.", WRONG_INPUT)
    except (ValueError, OSError) as error:
        return _fail(_sentence(error), WRONG_INPUT)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory ({first_line(error)}): {_LESS_MEMORY}", OUT_OF_MEMORY)
    return 0


_EXTRAS = {
    **dict.fromkeys(("diffusers", "matplotlib", "numpy", "PIL"), "demo"),
    **dict.fromkeys(("accelerate", "tqdm"), "train"),
    "h5py": "keras",
}
"""Which extra brings what may not be installed."""

_LESS_MEMORY = "try --mode stream with a --budget, --dtype bfloat16, or --device cpu."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="patchconv", description="Convolutions in strips: the same pixels in less memory.")
    commands = top.add_subparsers(required=True, metavar="demo | decode | encode | patch-diffusion | patch-ddpm")

    decode = commands.add_parser("decode", help="a latent to an image", description=_decode.__doc__)
    decode.add_argument("--vae", type=Path, required=True, help="VAE or checkpoint, LDM or diffusers layout")
    decode.add_argument("--latent", type=Path, required=True, help="ComfyUI's .latent, or a safetensors tensor")
    decode.add_argument("--out", type=Path, required=True, help="PNG to write; numbered if the latent is a batch")
    decode.set_defaults(run=_decode)

    encode = commands.add_parser("encode", help="an image to a latent", description=_encode.__doc__)
    encode.add_argument("--vae", type=Path, required=True, help="VAE or checkpoint, LDM or diffusers layout")
    encode.add_argument("--image", type=Path, required=True, help="PNG, JPEG, WebP …")
    encode.add_argument("--out", type=Path, required=True, help=".latent to write, which ComfyUI's LoadLatent reads")
    encode.set_defaults(run=_encode)

    demo = commands.add_parser("demo", help="plain, Patch Conv and streaming side by side", description=_demo.__doc__)
    demo.add_argument(
        "--size", type=int, default=768, help="pixels of a synthetic latent's side (default: %(default)s)"
    )
    demo.add_argument("--vae", type=Path, help="VAE or checkpoint (default: Stable Diffusion's VAE, random weights)")
    demo.add_argument("--latent", type=Path, help="ComfyUI's .latent or a safetensors tensor (default: synthetic)")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to (default: %(default)s)")
    demo.set_defaults(run=_demo)

    patch_diffusion.add(commands)
    patch_ddpm.add(commands)

    top.set_defaults(job="")
    for command in (decode, encode, demo):
        command.add_argument("--splits", type=natural, default=0, help="strips per convolution; 0 chooses (default)")
        command.add_argument(
            "--threshold",
            type=natural,
            default=DEFAULT_THRESHOLD,
            help="input elements from which a convolution runs in strips (default: %(default)s)",
        )
        command.add_argument("--device", type=device, default=None, help="default: cuda if there is one, else cpu")
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    for command in (decode, encode):
        command.add_argument(
            "--mode",
            choices=CHOICES,
            default="patch",
            help="patch: each large convolution in strips (default); stream: everything in strips; plain: nothing",
        )
        command.add_argument(
            "--budget",
            type=size,
            help="memory beside the weights for --mode stream to stay within, such as 2GiB or 800MB; default: no limit",
        )
    return top


@dataclass(frozen=True)
class Strips:
    """How to decode or encode. mode: one of `CHOICES`. splits, threshold: see `Tiling`. budget: see `streamed`."""

    mode: str = "patch"
    splits: int = 0
    threshold: int = DEFAULT_THRESHOLD
    budget: Optional[int] = None


def decode(vae: AutoencoderKL, latent: Tensor, strips: Strips = Strips()) -> Tensor:
    """The images `[B, 3, H, W]` of `latent` `[B, C, h, w]`, on the VAE's device."""
    with _in_strips(vae.decoder, strips):
        return vae.decode(cast(Any, latent.to(vae.device, vae.dtype)), return_dict=False)[0]


def encode(vae: AutoencoderKL, image: Tensor, strips: Strips = Strips()) -> Tensor:
    """The latent `[B, C, h, w]` of `image` `[B, 3, H, W]`: the mean of its distribution, as ComfyUI has it."""
    with _in_strips(vae.encoder, strips):
        return vae.encode(image.to(vae.device, vae.dtype), return_dict=False)[0].mode()


def scale(vae: AutoencoderKL) -> int:
    """Pixels to a latent's pixel, on either side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def check_channels(vae: AutoencoderKL, latent: Tensor, path: Optional[Path] = None) -> None:
    """Raises ValueError unless `vae` decodes latents of `latent`'s channels."""
    channels = vae.config["latent_channels"]
    if latent.shape[1] != channels:
        raise ValueError(
            f"{path or 'the latent'} has {latent.shape[1]} channels and the VAE decodes {channels}: give the VAE of "
            "the model that made it."
        )


def _decode(args: argparse.Namespace) -> None:
    """Decode a latent to a PNG: the picture that the host would make, in less memory."""
    strips = _strips(args)
    _check_output(args.out, ".png")
    latent = files.load_latent(args.latent)
    vae = files.load_vae(args.vae, DTYPES[args.dtype], args.device or _default_device())
    check_channels(vae, latent, args.latent)
    for number, sample in enumerate(latent, 1):
        name = args.out if len(latent) == 1 else args.out.with_stem(f"{args.out.stem}-{number:04}")
        with Recorder(vae.device) as recorder:
            image = decode(vae, sample[None], strips)[0]
        files.save_image(name, image)
        _say(f"{name}: {image.shape[2]}x{image.shape[1]}", recorder)


def _encode(args: argparse.Namespace) -> None:
    """Encode an image to ComfyUI's .latent: what VAEEncode and SaveLatent would make, in less memory."""
    strips = _strips(args)
    _check_output(args.out, ".latent", ".safetensors")
    vae = files.load_vae(args.vae, DTYPES[args.dtype], args.device or _default_device())
    image = files.load_image(args.image, multiple=scale(vae))
    with Recorder(vae.device) as recorder:
        latent = encode(vae, image, strips)
    files.save_latent(args.out, latent)
    _say(f"{args.out}: {list(latent.shape)}", recorder)


def _demo(args: argparse.Namespace) -> None:
    """Decode one latent plain, with Patch Conv and streamed, in fresh processes; compare memory, time and pixels."""
    from .demo import Settings, run

    if args.latent is None and not 64 <= args.size <= 16384:
        raise ValueError(f"--size is {args.size}: use 64 to 16384 pixels.")
    where = str(args.device or _default_device())
    run(Settings(args.vae, args.latent, args.size, args.splits, args.threshold, where, args.dtype), args.out)


def _strips(args: argparse.Namespace) -> Strips:
    if args.budget is not None and args.mode != "stream":
        raise ValueError(
            f"--budget is for --mode stream and the mode is {args.mode}: leave it out, or choose that mode."
        )
    return Strips(args.mode, args.splits, args.threshold, args.budget)


@contextmanager
def _in_strips(model: nn.Module, strips: Strips) -> Iterator[None]:
    if strips.mode == "plain":
        yield
        return
    watched = sys.stderr.isatty()
    if strips.mode == "stream":
        working = stream(model, budget=strips.budget, on_progress=_percent if watched else None)
    else:
        every = {"predicate": lambda *_: True}  # kernels of 1 too: backends copy their input and output all the same
        on_strip = _progress() if watched else None
        working = patched(model, strips.splits, threshold=strips.threshold, on_strip=on_strip, **every)
    with working:
        try:
            yield
        finally:
            if watched:
                print(end="\r\x1b[K", file=sys.stderr, flush=True)


def _percent(done: int, work: int) -> None:
    if work:
        print(f"\r{done / work:4.0%}", end="", file=sys.stderr, flush=True)


def _progress() -> OnStrip:
    """A line on stderr that counts the convolutions that run in strips."""
    done = 0

    def show(_: nn.Module, rows_done: int, rows: int) -> None:
        nonlocal done
        print(f"\rconvolution {done + 1}: {rows_done / rows:4.0%}", end="", file=sys.stderr, flush=True)
        done += rows_done == rows

    return show


def _say(what: str, recorder: Recorder) -> None:
    print(f"{what}, {recorder.seconds:.1f} s, peak {recorder.peak / MB:.0f} MB beyond the weights")


def _check_output(path: Path, *suffixes: str) -> None:
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--out is {path}: its name must end in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ValueError(f"--out is {path} and the folder {path.parent} does not exist: create it first.")
    if path.is_dir():
        raise ValueError(f"--out is {path}, which is a folder: give the name of a file.")


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def _fail(message: str, code: int) -> int:
    print(f"patchconv: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the whole usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help.\n")


if __name__ == "__main__":
    sys.exit(main())
