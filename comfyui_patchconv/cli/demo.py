"""`patchconv demo`: one latent decoded eagerly, in tiles, with Patch Conv and streamed, in fresh processes."""

from __future__ import annotations

import argparse
import multiprocessing
import signal
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conv.strip_sizes import DEFAULT_THRESHOLD
from ..files.atomic import check_no_input
from ..files.images import save_image, save_picture
from ..files.latents import load_latent
from ..files.tensors import existing
from ..files.vae import load_vae, random_vae
from ..files.vaes import traits_of
from ..files.words import short
from ..memory.errors import is_out_of_memory
from ..memory.recorder import Recorder
from .arguments import DTYPES, path_of
from .options import add_strips, add_trust, default_device
from .outputs import check_folder
from .vae import EAGER, MB, RunOptions, channels, check_channels, decode, scale

if TYPE_CHECKING:
    from PIL import Image

TILES = "tiles"
"""The way of everyone else, by the name that the demo has for it: diffusers' `enable_tiling`, tiles of 512 pixels."""

NAMES = {EAGER: "eager", TILES: "tiles", "patch": "Patch Conv", "stream": "streaming"}

SMALL_VAE = Path(__file__).resolve().parents[1] / "data" / "vae.safetensors"
PHOTOGRAPH = SMALL_VAE.with_name("photograph.latent")
"""What is decoded by default; see `data/README.md`."""

_WRITTEN = ("image.png", "comparison.png", "memory.png")
_RANDOM = "random"
_COLOURS = {EAGER: "#9a9a9a", TILES: "#c2410c", "patch": "#1668c7", "stream": "#1a7f37"}
_INTERVAL = 0.02


def add(commands: Any) -> None:
    """Add the command to `commands`, an argparse parser's subparsers."""
    parser = commands.add_parser("demo", help="eager, tiles and strips side by side", description=_run.__doc__)
    parser.add_argument(
        "--size",
        type=int,
        help="pixels of the picture's sides, for which a latent is cut, or repeated and mirrored (default: as the "
        "latent is, and 768 for a synthetic one)",
    )
    parser.add_argument(
        "--vae",
        type=path_of,
        default=SMALL_VAE,
        help="VAE or checkpoint; 'random' for Stable Diffusion's VAE with random weights and a synthetic latent "
        "(default: a small VAE, trained for this, and a photograph's latent)",
    )
    parser.add_argument("--latent", type=path_of, help="ComfyUI's .latent or a safetensors tensor, that --vae decodes")
    parser.add_argument(
        "--out",
        type=path_of,
        default=Path("demo"),
        help="folder of image.png, comparison.png and memory.png, which are replaced once new ones are whole "
        "(default: %(default)s)",
    )
    add_strips(parser)
    add_trust(parser)
    parser.set_defaults(run=_run, less_memory="a smaller --size, --dtype bfloat16, or --device cpu")


def _run(args: argparse.Namespace) -> None:
    """Decode one latent eagerly, in tiles, with Patch Conv and streamed; compare memory, time and pixels."""
    run(settings_of(args), args.out)


def settings_of(args: argparse.Namespace) -> DemoSettings:
    """The options as `DemoSettings`. Raises ValueError for a size out of bounds, or a latent without its VAE."""
    if args.size is not None and not 64 <= args.size <= 16384:
        raise ValueError(f"--size is {args.size}: use 64 to 16384 pixels.")
    vae, latent = None if str(args.vae) == _RANDOM else args.vae, args.latent
    if vae == SMALL_VAE:
        if latent is not None:
            raise ValueError(f"--latent is {latent}, which only the VAE that made it can decode: give that with --vae.")
        latent = PHOTOGRAPH
    where = str(args.device or default_device())
    return DemoSettings(vae, latent, args.size, args.splits, args.threshold, where, args.dtype, args.trust)


@dataclass(frozen=True)
class DemoSettings:
    """What to decode and how.

    vae: file, or None for Stable Diffusion's VAE with random weights. latent: file, or None for a synthetic one. size:
    pixels of the image's sides; None for those of the file, and 768 for a synthetic latent. splits, threshold: see
    `Tiling`. device, dtype: as torch names them. trust: see `load_vae`.
    """

    vae: Optional[Path] = SMALL_VAE
    latent: Optional[Path] = PHOTOGRAPH
    size: Optional[int] = None
    splits: int = 0
    threshold: int = DEFAULT_THRESHOLD
    device: str = "cpu"
    dtype: str = "float32"
    trust: bool = False


@dataclass(frozen=True)
class Result:
    """One decode: peak in bytes beyond the weights, time in seconds, memory over time, and the image `[3, H, W]`."""

    peak: int
    seconds: float
    timeline: list[tuple[float, int]] = field(repr=False)
    pixels: Any = field(repr=False)  # numpy: a tensor would reach the parent through memory that dies with the child

    @property
    def image(self) -> Tensor:
        return torch.from_numpy(self.pixels)


def run(settings: DemoSettings, out: Path) -> dict[str, Optional[Result]]:
    """Decode in each of the modes, print the table, and write the pictures to the folder `out`.

    `image.png` is the last one's, `comparison.png` has all beside eager's, and `memory.png` memory over time.

    Returns the results by mode; None for one that did not fit into memory. Raises ValueError for files that cannot be
    used, and MemoryError if none fits.
    """
    import PIL  # noqa: F401  before the work, not after it, if it is missing

    check_folder(out, _WRITTEN, parents=True)
    read = [existing(path) for path in (settings.vae, settings.latent) if path]
    image, comparison, memory = (out / name for name in _WRITTEN)
    for path in (image, comparison, memory):
        check_no_input(path, read)
    print(about(settings))
    results: dict[str, Optional[Result]] = {}
    for mode, name in NAMES.items():
        print(f"Decoding, {name} …", flush=True)
        results[mode] = _in_fresh_process(settings, mode)
    done = [result for result in results.values() if result is not None]
    if not done:
        raise MemoryError("in every mode")
    print(f"\n{table(results)}\n\n{difference(results)}")
    out.mkdir(parents=True, exist_ok=True)
    save_image(image, done[-1].image)
    save_picture(comparison, compared(results, settings))
    plot(results, settings, memory)
    print(f"\nWritten: {image} (the image), {comparison} (beside the others), {memory} (memory over time)")
    return results


def about(settings: DemoSettings) -> str:
    """A sentence on what is decoded, and by what."""
    if settings.vae is None:
        return "Stable Diffusion's VAE with random weights: the figures are true, the colours mean nothing."
    if settings.vae == SMALL_VAE:
        return (
            "A photograph, by a small VAE that was trained for this demo: Stable Diffusion's at an eighth to a half\n"
            "of the width, in a fraction of its memory and time. For its own figures: --vae random."
        )
    return f"{settings.latent or 'A synthetic latent'}, by the VAE in {settings.vae}."


def table(results: dict[str, Optional[Result]]) -> str:
    """Peak memory and time of each result, one row each, and what they are beside eager's."""
    lines = [f"{'':<12}{'peak memory':>14}{'time':>11}"]
    eager = results[EAGER]
    for mode, result in results.items():
        line = f"{NAMES[mode]:<12}" + f"{'out of memory':>14}"
        if result is not None:
            line = f"{NAMES[mode]:<12}{result.peak / MB:>11.0f} MB{result.seconds:>9.1f} s"
            if eager is not None and result is not eager:
                memory, seconds = result.peak / max(eager.peak, 1) - 1, result.seconds / eager.seconds - 1
                line += f"   {memory:+.0%} memory, {seconds:+.0%} time"
        lines.append(line)
    return "\n".join(lines)


def difference(results: dict[str, Optional[Result]]) -> str:
    """A sentence on the largest difference of each image to eager's."""
    eager = results[EAGER]
    others = [(NAMES[mode], result) for mode, result in results.items() if mode != EAGER and result is not None]
    if eager is None or not others:
        return "Only some of the images could be made: there is nothing to compare with eager."
    low, high = eager.image.aminmax()
    largest = ", ".join(f"{(eager.image - result.image).abs().max():.2g} ({name})" for name, result in others)
    return f"Largest difference to the eager image: {largest}; its values go from {low:.2f} to {high:.2f}."


def plot(results: dict[str, Optional[Result]], settings: DemoSettings, path: Path) -> None:
    """Memory over time of each result as a PNG."""
    from ..hosts.chart import Series, lines

    series = []
    for mode, result in results.items():
        name, colour = NAMES[mode], _COLOURS[mode]
        if result is None:
            series.append(Series(f"{name}: out of memory", colour))
            continue
        points = [(0.0, 0.0), *((seconds, used / MB) for seconds, used in result.timeline)]
        label = f"{name}: peak {result.peak / MB:.0f} MB, {result.seconds:.1f} s"
        series.append(Series(label, colour, points, result.peak / MB))
    image = next(result.image for result in results.values() if result is not None)
    if settings.vae is None:
        by = "Stable Diffusion's VAE"
    else:
        by = "the small VAE" if settings.vae == SMALL_VAE else short(settings.vae.name, 30)
    title = f"Decoding {image.shape[2]}x{image.shape[1]} pixels by {by}, {settings.dtype} on {settings.device}"
    save_picture(path, lines(title, series, "Time (s)", "Memory in use beyond the weights (MB)"))


def compared(results: dict[str, Optional[Result]], settings: DemoSettings) -> Image.Image:
    """The images of the modes in a row, and what they differ from eager's by; without what did not fit."""
    from .side_by_side import GAIN, Column, draw

    eager = results[EAGER]
    columns = [
        Column(
            NAMES[mode],
            result.image,
            None if eager is None or mode == EAGER else eager.image,
            f"{result.peak / MB:.0f} MB, {result.seconds:.1f} s",
            ours=mode not in (EAGER, TILES),
        )
        for mode, result in results.items()
        if result is not None
    ]
    height, width = columns[0].image.shape[1:]
    note = f"{width}x{height} pixels\n\nAbove: what is framed, enlarged,\nwhere most differs\n\n"
    note += f"Beside: the difference\nto eager, {GAIN} times"
    return draw(columns, note, foot=f"{settings.dtype} on {settings.device}, memory beyond the weights")


def filled(latent: Tensor, height: int, width: int) -> Tensor:
    """`latent` `[…, h, w]` as `[…, height, width]`: cut, or repeated, every second time mirrored."""
    for axis, length in ((-2, height), (-1, width)):
        size = latent.shape[axis]
        place = torch.arange(length) % (2 * size)
        latent = latent.index_select(axis, torch.minimum(place, 2 * size - 1 - place))
    return latent


def synthetic_latent(channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """A latent `[1, channels, height, width]` drawn from `seed`: shapes of all sizes, as in a picture."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.zeros(1, channels, height, width)
    for cells, weight in ((2, 3.0), (4, 2.0), (8, 1.0), (32, 0.5)):
        noise = torch.randn(1, channels, cells, cells, generator=generator)
        latent += weight * F.interpolate(noise, (height, width), mode="bicubic")
    return latent


def _in_fresh_process(settings: DemoSettings, mode: str) -> Optional[Result]:
    """The result, or None where memory ran out: the process said so, or the system ended it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, settings, mode), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process alone, which ends the other
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -9:
            return None
        raise ChildProcessError(f"the process that decodes ended with exit code {process.exitcode}.") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send(sender: Connection, settings: DemoSettings, mode: str) -> None:
    """Send the result, None where memory ran out, or the exception for wrong input; any other ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it is not handed down
    try:
        result = _measure(settings, mode)
    except (ValueError, OSError, ImportError) as error:
        result = error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = None
    sender.send(result)


@torch.inference_mode()
def _measure(settings: DemoSettings, mode: str) -> Result:
    dtype = DTYPES[settings.dtype]
    vae = load_vae(settings.vae, dtype, trust=settings.trust) if settings.vae else random_vae(dtype=dtype)
    if traits_of(vae).medium == "sound" or not hasattr(vae, "enable_tiling"):
        raise ValueError(f"{settings.vae} is of sounds, or diffusers has no tiles for it: use patchconv decode.")
    if settings.latent is not None:
        latent = load_latent(settings.latent)[:1]
        check_channels(vae, latent, settings.latent)
        if settings.size is not None:
            latent = filled(latent, settings.size // scale(vae), settings.size // scale(vae))
    else:
        side = (settings.size or 768) // scale(vae)
        latent = synthetic_latent(channels(vae), side, side)
    nn.Module.to(vae, settings.device)
    decode(vae, latent[:, :, :8, :8], RunOptions(EAGER))  # what libraries set up once is not the decode's
    if mode == TILES:
        vae.enable_tiling()
    options = RunOptions(EAGER if mode == TILES else mode, settings.splits, settings.threshold)
    with Recorder(settings.device, _INTERVAL) as recorder:
        image = decode(vae, latent, options)
    return Result(recorder.peak, recorder.seconds, recorder.timeline, image[0].float().cpu().numpy())
