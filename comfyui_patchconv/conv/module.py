"""`PatchConv2d`: a `torch.nn.Conv2d` that runs in strips."""

from __future__ import annotations

from typing import Any, Optional

from torch import nn
from torch.nn.parameter import is_lazy

from .forward import tiled_forward
from .strip_sizes import DEFAULT_THRESHOLD
from .tiling import Tiling


class PatchConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` that runs in strips; call-compatible with `patch_conv.PatchConv2d`.

    splits, sequential: see `Tiling`.
    conv2d: an existing convolution whose parameters and settings are shared; without it, `args` and `kwargs` are those
        of `torch.nn.Conv2d`. Raises TypeError for a subclass with a forward of its own: `convert_model` keeps those.
    Loads state dicts written with `patch_conv` (`conv2d.weight`) as well as its own (`weight`).
    """

    def __init__(
        self,
        splits: int = 4,
        sequential: bool = True,
        conv2d: Optional[nn.Conv2d] = None,
        *args: Any,
        threshold: int = DEFAULT_THRESHOLD,
        **kwargs: Any,
    ) -> None:
        tiling = Tiling(splits, sequential, threshold)
        if conv2d is None:
            super().__init__(*args, **kwargs)
        else:
            kind = type(conv2d)
            ordinary = isinstance(conv2d, nn.Conv2d) and kind.forward is nn.Conv2d.forward
            if not ordinary or (kind._conv_forward is not nn.Conv2d._conv_forward):
                raise TypeError(f"conv2d is a {kind.__name__}: give a torch.nn.Conv2d, or use convert_model on it.")
            if "weight" not in conv2d._parameters or is_lazy(conv2d.weight):
                raise TypeError(
                    "conv2d computes its weight anew for each call, or has none yet: use convert_model on it, which "
                    "keeps the module as it is."
                )
            nn.Module.__init__(self)
            self.__dict__.update(conv2d.__dict__)
            self._parameters = dict(conv2d._parameters)
        self.__dict__["_conv_forward"] = tiled_forward(self, self._conv_forward, tiling)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._parameters:
            if (old := f"{prefix}conv2d.{name}") in state_dict:
                state_dict[prefix + name] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)
