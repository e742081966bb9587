"""Why a call cannot be streamed and runs eagerly; and `torch.compile`, which is kept away from those that are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import torch
import torch.autograd.forward_ad
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten

from .record.held import is_ordinary
from .record.recorder import Recorder


def eager_reason(args: Any, kwargs: Any) -> Optional[str]:
    """Why a call with these arguments runs eagerly; None where it can be streamed."""
    if torch._C._get_tracing_state() is not None:
        return "it is traced"
    if _is_compiling():
        return "it is compiled or exported"
    if any(not isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack()):
        return "something else watches or traces its operators"
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "an argument requires gradients"
    if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        return "a forward-mode gradient is being computed"
    functorch: Any = getattr(torch._C, "_functorch", None)
    if functorch is not None and functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if any(
        type(tensor) is not Tensor and not is_ordinary(tensor) for tensor in tensors if tensor.layout is torch.strided
    ):
        return "an argument is a tensor of a class of its own"
    return None


def _is_compiling() -> bool:
    compiler: Any = getattr(torch, "compiler", None)
    names = ("is_compiling", "is_exporting", "is_dynamo_compiling")
    return any(getattr(compiler, name)() for name in names if hasattr(compiler, name))


class _Blocks:
    """What `undisturbed` has set for all threads, and how many of its blocks go on."""

    def __init__(self) -> None:
        self.count, self.lock, self.undo = 0, threading.Lock(), ExitStack()


_blocks = _Blocks()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within the block, and in other threads meanwhile, nothing is compiled: what `torch.compile` was asked to compile
    runs as it is written."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _blocks.lock:
        if not _blocks.count:
            _blocks.undo.enter_context(_nothing_compiled())
        _blocks.count += 1
    try:
        yield
    finally:
        with _blocks.lock:
            _blocks.count -= 1
            if not _blocks.count:
                _blocks.undo.close()


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    set_stance: Any = getattr(torch.compiler, "set_stance", None)
    if set_stance is not None:
        with set_stance("force_eager"):
            yield
        return
    config: Any = sys.modules["torch._dynamo"].config  # before torch 2.6
    before, config.disable = config.disable, True
    try:
        yield
    finally:
        config.disable = before
