"""VAEs from files: recognised by their tensors' names and shapes, checked, and made by diffusers.

`vaes/` has a module for each family: the names and shapes that it has in files, and what its configuration is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensors import FLOATS, Header, opened, read_metadata
from .vaes import of_names
from .vaes.family import COUNTER, Family, Medium, Plan, State, VaeFile, check_state
from .vaes.halves import Read, joined
from .vaes.kl import GROUPS_NAME, random_vae
from .words import listed, short

__all__ = ["GROUPS_NAME", "load_vae", "medium_of", "random_vae"]

_PREFIXES = ("", "first_stage_model.", "vae.", "pretransform.model.")
"""What checkpoints have before the names of a VAE's tensors."""

_OF_TRAINING = ("loss.", "model_ema.")
"""What LDM's trainings leave beside a VAE, and no decode uses."""


def load_vae(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> Any:
    """The VAE in the file `path`, a module of diffusers, ready for inference. Only its own tensors are read.

    path: a VAE, or a whole checkpoint that has one, in its authors' layout, which ComfyUI and Automatic1111 use (LDM's,
        with any number of latent channels), or in diffusers'; docs/command_line.md has the families. safetensors, or a
        pickle (.ckpt, .pt, .pth, .bin) as far as `torch.load(weights_only=True)` reads it. Flux.2's and TAESD's have a
        `packing_of`. Of a TAESD's two files the other one is read too, if it lies beside this one.
    trust: a pickle; see `tensors.unpickled`.

    Group norms of an AutoencoderKL have 32 groups, or as many as a safetensors file's metadata says by `GROUPS_NAME`.

    Raises FileNotFoundError, or ValueError if the file is damaged, has no VAE that is known, has tensors that none has,
    or needs a newer diffusers.
    """
    path = Path(path)
    header, read = _opened(path, trust)
    family, file = _recognised(path, header)
    _check_parts(family, file)
    plan = family.plan(file)
    names = _names(file, plan, header)
    vae: Any = plan.build(file)
    check_state(path, _without_values(file, names, plan), vae)
    state, apart = _read(file, names, plan, read, dtype, device)
    vae.load_state_dict(plan.converted(state), strict=False, assign=True)  # strictly checked above
    for module in vae.modules():
        counter = getattr(module, COUNTER, None)
        if counter is not None and counter.is_meta:
            setattr(module, COUNTER, torch.zeros_like(counter, device=device))
    plan.finish(vae, apart)
    return vae.requires_grad_(False).eval()


def medium_of(path: str | os.PathLike[str], trust: bool = False) -> Medium:
    """What the VAE in the file `path` makes, by the names of its tensors. Raises what `load_vae` raises for them."""
    header, _ = _opened(Path(path), trust)
    return _recognised(Path(path), header)[0].MEDIUM


def _opened(path: Path, trust: bool) -> tuple[Header, Read]:
    header, read = opened(path, trust)
    return joined(path, header, read, trust)


def _recognised(path: Path, header: Header) -> tuple[Family, VaeFile]:
    """The family of the VAE in a file, and its tensors. Raises ValueError where there is none that is known."""
    for prefix in _PREFIXES:
        held = {name[len(prefix) :]: name for name in header if name.startswith(prefix)}
        shapes = {name: header[full][1] for name, full in held.items()}
        family = of_names(shapes)
        if family is not None:
            return family, VaeFile(path, shapes, held, read_metadata(path))
    raise ValueError(
        f"{path} has no VAE that is known here (first of its tensors: {listed(header)}): give a VAE file, or a "
        "checkpoint that has one built in."
    )


def _check_parts(family: Family, file: VaeFile) -> None:
    """Raises ValueError for a tensor that is of no part of a VAE of this family."""
    unknown = [held for name, held in file.held.items() if not name.startswith((*family.PARTS, *_OF_TRAINING))]
    if unknown:
        raise ValueError(
            f"{file.path} has tensors beside its VAE's that may change what it makes ({listed(unknown)}): give a file "
            "without them, or the VAE of a model that is known here."
        )


def _names(file: VaeFile, plan: Plan, header: Header) -> list[str]:
    """The tensors that are read. Raises ValueError for one that is there twice, or of a type that is of no use."""
    names = [name for name in file.held if name not in plan.left and not name.startswith(_OF_TRAINING)]
    seen: dict[str, str] = {}
    for name in names:
        held = file.held[name]
        dtype, _ = header[held]
        if dtype not in FLOATS:
            raise ValueError(
                f"{file.path}: {short(held)} is of type {short(dtype, 20)}: float32, float16 or bfloat16 can be used."
            )
        other = seen.setdefault(plan.rename(name), held)
        if other != held:
            raise ValueError(
                f"{file.path} has {short(other, 60)} and {short(held, 60)}, which are the same tensor of a VAE: give a "
                "file in one layout."
            )
    return names


def _without_values(file: VaeFile, names: list[str], plan: Plan) -> State:
    """The tensors as the VAE is to have them, of which only shapes are known yet."""
    shapes = {name: file.shapes[name] for name in names if name not in plan.apart}
    return plan.converted({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def _read(
    file: VaeFile, names: list[str], plan: Plan, read: Read, dtype: torch.dtype, device: torch.device | str
) -> tuple[State, State]:
    """The values of the VAE's tensors by the file's names, and of those apart, which stay in float32."""
    state: State = {}
    apart: State = {}
    for name in names:
        held = file.held[name]
        separate = name in plan.apart
        value = _cast(file.path, held, read(held), torch.float32 if separate else dtype).to(device)
        (apart if separate else state)[name] = value
    return state, apart


def _cast(path: Path, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`. Raises ValueError where it holds NaN or infinity, which would be those of every picture."""
    cast = value.to(dtype)
    if not cast.isfinite().all():
        if value.isfinite().all():
            raise ValueError(f"{path}: {short(name)} has values that {dtype} cannot hold: use float32 or bfloat16.")
        raise ValueError(f"{path}: {short(name)} holds NaN or infinity: it is damaged, download or export it again.")
    return cast
