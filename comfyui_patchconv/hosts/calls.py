"""What is known of a call of a model before it is made."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


def device_of(args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Tell the device that a call computes on: the one that it names, or else that of its first tensor, or the CPU.

    ComfyUI hands some encoders a video that lies in host memory, and `device`, to which they bring a part at a time.
    """
    named = _named(kwargs.get("device"))
    values = tree_flatten((args, kwargs))[0]
    named = named or next((one for one in values if isinstance(one, torch.device)), None)
    found = (one.device for one in values if isinstance(one, Tensor))
    return named or next(found, torch.device("cpu"))


def _named(value: Any) -> Optional[torch.device]:
    if isinstance(value, str):
        try:
            return torch.device(value)
        except RuntimeError:  # the call will say so
            return None
    return value if isinstance(value, torch.device) else None
