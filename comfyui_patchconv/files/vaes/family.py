"""What the families of VAEs have in common: a file's tensors by their own names, and a plan to make a VAE of them."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ...memory.errors import is_out_of_memory
from ..words import listed, shape_of, short

Shapes = Mapping[str, tuple[int, ...]]

State = dict[str, Tensor]

Medium = Literal["image", "video", "sound"]
"""What a VAE's latents are of: `[N, C, H, W]`, `[N, C, T, H, W]` or `[N, C, L]`."""

COUNTER = "num_batches_tracked"
"""Of batch norms, in training: files have it or not."""

Rename = Callable[[str], str]

Convert = Callable[[State], State]

Prepare = Callable[[Any], None]

Finish = Callable[[Any, State], None]


@dataclass(frozen=True)
class VaeFile:
    """The tensors of a VAE in the file `path`, by their own names, without what a checkpoint has before them.

    shapes: of the tensors. held: their names in the file. metadata: what a safetensors file says of itself.
    """

    path: Path
    shapes: Shapes
    held: Mapping[str, str]
    metadata: Mapping[str, str]

    def other_kind(self, what: str, name: str, wanted: str) -> ValueError:
        """The error for a tensor that is not as it has to be. what: the kind of VAE. wanted: what is needed."""
        shape = shape_of(self.shapes.get(name, ()))
        return ValueError(
            f"{self.path} has {what} of another kind ({short(self.held.get(name, name), 60)} has the shape {shape}): "
            f"{wanted}."
        )


def incomplete(path: Path, there: str, missing: str) -> ValueError:
    """The error for the tensor, or part, `there` without `missing`."""
    return ValueError(
        f"{path} has {short(there, 50)} and no {short(missing, 50)}, which belong together: it is incomplete, download "
        "or export it again."
    )


def check_pairs(file: VaeFile, *pairs: tuple[str, str]) -> None:
    """Raises ValueError where tensors of one of two parts that belong together are there, and none of the other."""
    for pair in pairs:
        there = [part for part in pair if any(name.startswith(part) for name in file.shapes)]
        if len(there) == 1:
            raise incomplete(file.path, there[0], pair[1] if there[0] == pair[0] else pair[0])


def of_diffusers(module: str) -> Any:
    """A module of diffusers, by its full name. Raises ModuleNotFoundError without it, and ValueError where it asks this
    torch for what came with a newer one."""
    try:
        return importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        raise ValueError(
            f"diffusers {metadata.version('diffusers')} cannot be imported with torch {torch.__version__} "
            f"({short(str(error))}): run pip install 'diffusers<0.36', which goes with torch 2.1, or use a newer torch."
        ) from error


@dataclass(frozen=True)
class Kind:
    """A class of diffusers. since: the first release that has it. modules: where it lies, in the newest first."""

    name: str
    since: str
    modules: tuple[str, ...]

    def load(self, path: Path) -> Any:
        """The class. Raises ValueError for a diffusers without it, or that this torch is too old for, and
        ModuleNotFoundError without diffusers."""
        of_diffusers("diffusers")  # where it is missing that is said, not that it is old
        for module in self.modules:
            try:
                found = of_diffusers(module)
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("diffusers."):  # what diffusers needs is missing
                    raise
                continue
            if hasattr(found, self.name):
                return getattr(found, self.name)
        raise self.too_old(path)

    def too_old(self, path: Path) -> ValueError:
        """The error for a diffusers that is older."""
        import diffusers

        return ValueError(
            f"{path} is for {self.name}, which diffusers has since {self.since} in this form, and "
            f"{diffusers.__version__} is installed: run pip install -U diffusers."
        )


def _nothing(*_: Any) -> None:
    """Nothing is left to do."""


def _same(state: State) -> State:
    return state


@dataclass(frozen=True)
class Plan:
    """How to make a VAE of a file's tensors.

    kind, config: the class of diffusers, and its arguments. rename: diffusers' names of the tensors, which are 1:1 with
    the file's. convert: changes them then, where that is not all. left: the file's names of what no decode uses. apart:
    of what is no tensor of that class, and is read in float32. prepare: called with the VAE before it has values.
    finish: called last, with the VAE and what is `apart`.
    """

    kind: Kind
    config: dict[str, Any]
    rename: Rename = str
    convert: Convert = _same
    left: Collection[str] = ()
    apart: Collection[str] = ()
    prepare: Prepare = _nothing
    finish: Finish = _nothing

    def converted(self, state: State) -> State:
        """The tensors as diffusers names and shapes them."""
        return self.convert({self.rename(name): value for name, value in state.items()})

    def build(self, file: VaeFile) -> nn.Module:
        """The VAE, without values. Raises ValueError where diffusers has no such class, or not with such a shape."""
        kind = self.kind.load(file.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of weight norm, which diffusers makes the old way
                vae = _without_values(kind, self.config)
        except TypeError:  # an argument that came with a later release
            raise self.kind.too_old(file.path) from None
        except Exception as error:  # shapes that do not go together
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"{file.path} has tensors that make no {self.kind.name} ({short(error)}): it is incomplete, or a VAE "
                "of another kind."
            ) from None
        self.prepare(vae)
        return vae


def _without_values(kind: Any, config: dict[str, Any]) -> nn.Module:
    """`kind(**config)` on the meta device; the state of random numbers stays as it is."""
    try:
        with torch.device("meta"):
            return kind(**config)
    except NotImplementedError:  # torch 2.1 has no weight norm there
        with torch.random.fork_rng(devices=[]):
            return kind(**config).to("meta")


@dataclass(frozen=True)
class Traits:
    """What a VAE makes of latents, and of which.

    medium: see `Medium`. channels: of its own latents. scale: pixels, or samples, to a latent's one, on each side.
    frames: frames to each frame of a latent but the first, which is one. paired: whether the first makes as many as the
    others where the latent's frames are even in number. low: of its pixels, which go from there to 1. rate: frames or
    samples a second.
    """

    medium: Medium
    channels: int
    scale: int
    frames: int = 1
    low: float = -1.0
    rate: float = 0.0
    paired: bool = False

    def frames_of(self, latents: int) -> int:
        """How many frames a latent of so many makes."""
        if self.paired and latents % 2 == 0:
            return latents * self.frames
        return (latents - 1) * self.frames + 1


class Family(Protocol):
    """A module of `vaes`. NAMES: the classes of diffusers that are of this family. MEDIUM: what they make. PARTS: what
    all of its tensors' names begin with."""

    @property
    def NAMES(self) -> tuple[str, ...]: ...  # noqa: N802 - a module's constant

    @property
    def MEDIUM(self) -> Medium: ...  # noqa: N802 - as above

    @property
    def PARTS(self) -> tuple[str, ...]: ...  # noqa: N802 - as above

    def claims(self, shapes: Shapes) -> bool:
        """Whether these tensors are, as far as their names tell, a VAE of this family."""
        ...

    def plan(self, file: VaeFile) -> Plan:
        """How to make it. Raises ValueError, which names the tensors, for one that is incomplete or another kind."""
        ...

    def traits(self, vae: Any) -> Traits:
        """What a VAE of this family makes."""
        ...


def numbered(names: Collection[str], name: str, first: int = 0, step: int = 1) -> list[str]:
    """`name` with `first` and each `step` more in the place of its `{}`, as far as that is in `names`."""
    return list(takewhile(names.__contains__, map(name.format, count(first, step))))


def renaming(*rules: tuple[str, str]) -> Rename:
    """A function that puts each regular expression's replacement in a name, one after the other."""
    compiled = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in rules]

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        return name

    return rename


def check_state(path: Path, state: Mapping[str, Tensor], vae: nn.Module) -> None:
    """Raises ValueError unless `state` has exactly the tensors of `vae`, in its shapes; counters of training apart."""
    expected = {name: value for name, value in vae.state_dict().items() if not name.endswith(COUNTER)}
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has tensors that no such VAE has:", unknown)
        raise ValueError(f"{path} {what} {listed(sorted(names))}: it is incomplete, or a VAE of another kind.")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{path}: {short(name)} has the shape {shape_of(state[name].shape)} where {list(value.shape)} is "
                "needed: it is a VAE of another kind."
            )


class Missing(nn.Module):
    """Stands for an encoder or decoder that a file does not have. why: what its calls raise as a ValueError."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why

    def forward(self, *_: Any) -> Tensor:
        raise ValueError(self.why)
