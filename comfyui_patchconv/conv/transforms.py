"""Whether something records or transforms a call, such as vmap or a trace: it runs whole then, as eager would."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, _utils

_OLDER = not hasattr(torch.compiler, "is_compiling")
"""Whether this is torch 2.1, whose dynamo knows the answer by another name, and reads no `hasattr` of a module."""


def is_traced(input: Any) -> bool:
    """Whether a call is recorded to be run with other inputs too, of which strips would keep the sizes of this one:
    by `torch.jit.trace`, `torch.export`, `torch.compile`, `make_fx` or `torch.fx`."""
    if is_compiled():
        return True  # asked first: dynamo knows the answer
    if not isinstance(input, Tensor) or torch._C._get_tracing_state() is not None:
        return True
    if _has_proxies():
        return True
    return not all(isinstance(side, int) for side in input.shape)


def _has_proxies() -> bool:
    """Whether `make_fx` records: its mode has a place of its own, or, before torch 2.2, one among all modes."""
    core: Any = torch._C
    if hasattr(core, "_get_dispatch_mode"):
        return core._get_dispatch_mode(core._TorchDispatchModeKey.PROXY) is not None
    modes = map(core._get_dispatch_stack_at, range(core._len_torch_dispatch_stack()))
    return any(type(mode).__name__ == "ProxyTorchDispatchMode" for mode in modes)


def is_compiled() -> bool:
    """Whether `torch.compile` or `torch.export` reads this code to write its own: what only watches has no place in
    that."""
    if _OLDER:
        older: Any = _utils
        return older.is_compiling()
    compiler: Any = torch.compiler
    return any(getattr(compiler, name)() for name in ("is_exporting", "is_compiling") if hasattr(compiler, name))


def transformed() -> bool:
    """Whether `torch.func`, `torch.vmap` or forward-mode differentiation is at work, which a function of ours has no
    rules for."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_batched(grad: Tensor) -> bool:
    """Whether a gradient stands for many at once, as `torch.autograd.grad(..., is_grads_batched=True)` makes it."""
    core: Any = torch._C
    if hasattr(core._functorch, "is_legacy_batchedtensor"):
        return core._functorch.is_legacy_batchedtensor(grad)
    return re.search(r"\bBatched\b", str(core._dispatch_keys(grad))) is not None  # torch 2.1
