"""Read and write what the command line works on: VAE weights, latents and images. Every file is checked first."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .memory import is_out_of_memory

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from PIL import Image

Shapes = dict[str, tuple[int, ...]]
Header = dict[str, tuple[str, tuple[int, ...]]]
State = dict[str, Tensor]

FLOATS = {"F64", "F32", "F16", "BF16"}
SCALE = 0.18215
"""What ComfyUI divides latents by that were saved before its files had `latent_format_version_0`."""

_MAX_HEADER = 100_000_000  # as safetensors itself has it
_PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
_PREFIXES = ("", "first_stage_model.", "vae.")
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_NAMES = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_GROUPS = 32  # of every group norm; LDM's code has it fixed, and no tensor's shape shows it
_LAYOUTS = {
    "ldm": ("encoder.down.{}.block.{}.conv1.weight", "decoder.mid.attn_1.q.weight"),
    "diffusers": ("encoder.down_blocks.{}.resnets.{}.conv1.weight", "decoder.mid_block.attentions.0.group_norm.weight"),
}


def random_vae(seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> AutoencoderKL:
    """Stable Diffusion's VAE, its real architecture with weights drawn from `seed`; the global generator is kept."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of the GPUs too
        vae = AutoencoderKL(**_config((128, 256, 512, 512), layers=2, latent=4))
    return _ready(vae, dtype, device)


def load_vae(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKL:
    """The image VAE in the file `path`, ready for inference. Only its own tensors are read.

    path: a VAE, or a whole checkpoint that has one, in LDM layout (`decoder.mid.attn_1…`: ComfyUI, Automatic1111) or
        diffusers layout (`decoder.mid_block.attentions.0…`), with any number of latent channels. safetensors, or a
        pickle (.ckpt, .pt, .pth, .bin) as far as `torch.load(weights_only=True)` reads it.

    Raises FileNotFoundError, or ValueError if the file is damaged or has no such VAE.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    path = Path(path)
    header, read = _opened(path)
    shapes, prefix = _vae_shapes(path, header)
    layout, config = _detect(path, shapes)
    state = {name: read(prefix + name).to(device, dtype) for name in shapes}
    if layout == "ldm":
        state = _from_ldm(state, len(config["block_out_channels"]))
    state = _today(state)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    _check_state(path, state, vae)
    vae.load_state_dict(state, assign=True)
    return _ready(vae, dtype, device)


def load_latent(path: str | os.PathLike[str]) -> Tensor:
    """The latent in the file `path`, `[N, C, H, W]` in float32, scaled as a VAE's decoder takes it.

    path: ComfyUI's `.latent`, or any safetensors file that holds one tensor, `[N, C, H, W]` or `[C, H, W]`, or one
        of several called `latent_tensor`, `samples`, `latents` or `latent`.

    Raises FileNotFoundError, or ValueError if the file is damaged, holds no latent, or one with NaN or infinity.
    """
    path = Path(path)
    header = read_header(path)
    names = [name for name in header if not name.startswith("latent_format_version")]
    known = [name for name in ("latent_tensor", "samples", "latents", "latent") if name in names]
    if not known and len(names) != 1:
        raise ValueError(
            f"{path} holds {_listed(names)} and none is called latent_tensor: give a .latent file from ComfyUI's "
            "SaveLatent, or a safetensors file with one tensor."
        )
    name = (known or names)[0]
    dtype, shape = header[name]
    if dtype not in FLOATS:
        raise ValueError(f"{path}: {_short(name)} is of type {dtype}: a latent is of float32, float16 or bfloat16.")
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            f"{path}: {_short(name)} has the shape {list(shape)}: a latent image is [batch, channels, height, width]."
        )
    with safe_open(path, "pt") as file:
        latent = file.get_tensor(name).to(torch.float32)
    if not torch.isfinite(latent).all():
        raise ValueError(f"{path}: {_short(name)} holds NaN or infinity: it cannot be decoded, make it anew.")
    if name == "latent_tensor" and "latent_format_version_0" not in header:
        latent = latent / SCALE
    return latent if latent.dim() == 4 else latent[None]


def save_latent(path: str | os.PathLike[str], latent: Tensor) -> None:
    """Write `latent` `[N, C, H, W]` as ComfyUI's `.latent`, which its LoadLatent reads, in float32."""
    tensors = {"latent_tensor": latent.float().cpu().contiguous(), "latent_format_version_0": torch.tensor([])}
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(
            f"{path} cannot be written ({_short(str(error))}): is there space, and may you write there?"
        ) from None


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in the file `path`, upright, with 8 bits a channel.

    Raises FileNotFoundError, or ValueError if the file is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = existing(path)
    Image.MAX_IMAGE_PIXELS = 2**30  # large images are what this package is for; Pillow refuses twice this number
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            image.load()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read: give a PNG, JPEG or WebP file.") from None
    except Exception as error:  # a damaged or hostile image raises anything
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} cannot be read as an image ({_short(str(error))}): it is damaged or too large."
        ) from None
    return image


def load_image(path: str | os.PathLike[str], multiple: int = 8) -> Tensor:
    """The image in the file `path` as a VAE's encoder takes it: `[1, 3, H, W]`, float32 from -1 to 1.

    multiple: pixels that height and width are to be a multiple of; what is over is cropped evenly, as ComfyUI does.

    Raises FileNotFoundError, or ValueError if the file is no image or a smaller one than `multiple`.
    """
    import numpy as np

    image = open_image(path).convert("RGB")
    if min(image.size) < multiple:
        raise ValueError(f"{path} is {image.width}x{image.height} pixels: at least {multiple}x{multiple} are needed.")
    width, height = (side - side % multiple for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div_(127.5).sub_(1)


def save_image(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write `image` `[1 | 3 | 4, H, W]` from -1 to 1 to `path`; what lies outside is clipped.

    Raises ValueError if it holds NaN, which would be a black image.
    """
    from PIL import Image

    if image.isnan().any():
        raise ValueError(f"{path} is not written, the image holds NaN: use float32 or bfloat16, float16 is too narrow.")
    Image.fromarray(levels(image).numpy()).save(path)


def levels(images: Tensor) -> Tensor:
    """8-bit levels `[…, H, W, C]` of `images` `[…, C, H, W]` from -1 to 1, on the CPU; `[…, H, W]` of one channel."""
    whole = images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to("cpu", torch.uint8)
    return whole.movedim(-3, -1).contiguous() if images.shape[-3] > 1 else whole.squeeze(-3)


def grid(images: Tensor, gap: int = 2) -> Tensor:
    """One image `[C, H, W]` of `images` `[N, C, h, w]` from -1 to 1: side by side, as many as below one another, white
    `gap` pixels between them."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    whole = images.new_ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        whole[:, top : top + height, left : left + width] = image
    return whole


def read_header(path: str | os.PathLike[str]) -> Header:
    """Type and shape of each tensor in a safetensors file, without reading any.

    Raises FileNotFoundError, or ValueError if the file is no safetensors file, cut short, or contradicts itself.
    """
    path = existing(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is not a safetensors file, or is cut short: its first 8 bytes announce a header of {length} "
                f"bytes and the file has {size}; download or export it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"{path} is not a safetensors file: its header is not the JSON that the format asks for; download or "
            "export it again."
        ) from None
    for name, (_, _, start, stop) in tensors.items():
        if not start <= stop <= size - 8 - length:
            raise ValueError(
                f"{path} is cut short or damaged: {_short(name)} is said to lie at bytes {start} to {stop} of "
                f"{size - 8 - length}; download or export it again."
            )
    try:
        with safe_open(path, "pt"):  # its own checks: overlaps, gaps, sizes that do not match shapes
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({_short(str(error))}): download or export it again.") from None
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in tensors.items()}


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    start, stop = entry["data_offsets"]
    numbers = (*entry["shape"], start, stop)
    if not isinstance(entry["dtype"], str) or any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError
    return entry["dtype"], tuple(entry["shape"]), start, stop


def existing(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is a file. Raises FileNotFoundError or ValueError if not."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the name and the folder.")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: give a file.")
    return path


def _opened(path: Path) -> tuple[Header, Callable[[str], Tensor]]:
    """Type and shape of each tensor in a checkpoint, and the function that reads one."""
    if path.suffix.lower() not in _PICKLES:
        return read_header(path), safe_open(path, "pt").get_tensor
    path = existing(path)
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle raises anything
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} cannot be read safely, as weights alone ({type(error).__name__}): use a .safetensors file of it."
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    pairs = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in pairs if isinstance(value, Tensor) and _plain(value)}
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header = {name: (kinds.get(value.dtype, str(value.dtype)), tuple(value.shape)) for name, value in tensors.items()}
    return header, tensors.__getitem__


def _plain(value: Tensor) -> bool:
    return value.layout is torch.strided and value.device.type == "cpu"


def _vae_shapes(path: Path, header: Header) -> tuple[Shapes, str]:
    """Shapes of the VAE's tensors by their names without prefix, and the prefix."""
    for prefix in _PREFIXES:
        if f"{prefix}decoder.conv_in.weight" in header and f"{prefix}encoder.conv_in.weight" in header:
            break
    else:
        raise ValueError(
            f"{path} has no VAE with an encoder and a decoder (first of its tensors: {_listed(header)}): give a VAE "
            "file, or a checkpoint that has one built in."
        )
    shapes: Shapes = {}
    for name, (dtype, shape) in header.items():
        if not name.startswith(tuple(prefix + part for part in _PARTS)):
            continue
        if dtype not in FLOATS:
            raise ValueError(f"{path}: {_short(name)} is of type {dtype}: float32, float16 or bfloat16 can be used.")
        shapes[name[len(prefix) :]] = shape
    return shapes, prefix


def _detect(path: Path, shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """Layout ("ldm" or "diffusers") of a VAE's tensors, and the `AutoencoderKL` configuration their shapes show."""
    layout = next((name for name, (block, _) in _LAYOUTS.items() if block.format(0, 0) in shapes), None)
    if layout is None:
        raise ValueError(f"{path} has a VAE that is laid out neither as LDM's nor as diffusers': use an image VAE.")
    block, attention = _LAYOUTS[layout]
    levels = list(takewhile(shapes.__contains__, (block.format(level, 0) for level in count())))
    layers = len(list(takewhile(shapes.__contains__, (block.format(0, layer) for layer in count()))))
    first, last, inner = "encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_in.weight"
    odd = [name for name in (first, last, inner, *levels) if len(shapes.get(name, ())) != 4 or 0 in shapes[name]]
    if not odd:
        odd = [name for name in levels if shapes[name][0] % _GROUPS]
        odd += [name for name, channels in ((first, shapes[first][1]), (last, shapes[last][0])) if channels != 3]
    if odd:
        raise ValueError(
            f"{path} has a VAE of another kind ({odd[0]} has the shape {list(shapes.get(odd[0], ()))}): one for "
            f"RGB images, with channels in multiples of {_GROUPS}, is needed."
        )
    return layout, _config(
        [shapes[name][0] for name in levels],
        layers,
        latent=shapes[inner][1],
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention=attention in shapes,
    )


def _config(widths: Sequence[int], layers: int, latent: int, **rest: Any) -> dict[str, Any]:
    return {
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "latent_channels": latent,
        "norm_num_groups": _GROUPS,
        "sample_size": 512,  # diffusers tiles by it
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        **rest,
    }


def _from_ldm(state: State, levels: int) -> State:
    """The tensors of an LDM VAE by diffusers' names; LDM counts the decoder's levels from the image's side."""

    def renamed(name: str) -> str:
        for pattern, replacement in _LDM_NAMES:
            name = re.sub(pattern, replacement, name, flags=re.ASCII)
        return re.sub(r"(?<=\.up_blocks\.)\d{1,3}", lambda level: str(levels - 1 - int(level[0])), name)

    return {renamed(name): value for name, value in state.items()}


def _today(state: State) -> State:
    """Attention as diffusers has it since 0.18: published VAEs still have `query` and `proj_attn`, LDM convolutions."""
    pattern = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")
    renamed = {pattern.sub(lambda match: _OLD_ATTENTION[match[0]], name): value for name, value in state.items()}
    return {
        name: value.flatten(1) if ".attentions.0.to_" in name and value.dim() > 2 else value
        for name, value in renamed.items()
    }


def _check_state(path: Path, state: State, vae: AutoencoderKL) -> None:
    """Raises ValueError unless `state` has exactly the tensors of `vae`, in its shapes."""
    expected = vae.state_dict()
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has tensors that no such VAE has:", unknown)
        raise ValueError(f"{path} {what} {_listed(sorted(names))}: it is incomplete, or a VAE of another kind.")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{path}: {name} has the shape {list(state[name].shape)} where {list(value.shape)} is needed: it is a "
                "VAE of another kind."
            )


def _ready(vae: AutoencoderKL, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
    nn.Module.to(vae, device=device, dtype=dtype)  # diffusers' own `to` warns of every cast
    return vae.requires_grad_(False).eval()


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = [_short(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "no tensors"


def _short(name: str) -> str:
    """`name`, which a stranger may have written, fit for one line."""
    return ascii(name)[1:-1][:80]
