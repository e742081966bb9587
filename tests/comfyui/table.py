"""What streaming comes to for an autoencoder of ComfyUI's: counted at the size that people use, run at a small one.

device: to count for; "meta" stands for a GPU that is not here. load: imports a module of the package by its name in
there, as `"hosts.halves"`: the pack's, or that of a checkout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from families import Family, build, draw, result_of

FLAGS = ("--use-pytorch-cross-attention",)
"""What ComfyUI is started with: the attention that it has on GPUs."""

METHODS = {"decode": "decoder", "encode": "encoder"}


def counted(load: Callable[[str], Any], family: Family, method: str, device: str) -> dict[str, Any]:
    """Bytes beside weights, `eager` and `streamed` as ComfyUI's node would have it, and `tight` with a budget of a
    quarter of eager's, the operators that are evaluated `whole`, and whether anything is computed `in_strips`: None for
    a half without convolutions, which the node leaves alone, and of which nothing is counted; `device`: what it was
    counted for after all. Raises what building and counting raise."""
    shape = family.shape(method)
    assert shape is not None
    model, halves = build(family), load("hosts.halves")
    convolutions = load("conv.patch").convolutions(model, predicate=lambda *_: True)
    if not any(halves.half_of(name) == METHODS[method] for name, _ in convolutions):
        return {"eager": 0, "streamed": 0, "tight": 0, "in_strips": None, "whole": [], "device": device}
    part = halves.part_of(model, METHODS[method], method)
    dtype, whole = getattr(torch, family.dtype), dict[str, int]()
    kind = load("hosts.memory_estimates").StreamEstimate

    def expected(device: str, budget: int = 0) -> Any:
        holder = SimpleNamespace(first_stage_model=model, device=device)
        return kind(holder, method, _unknown, budget=budget, part=part).expected(shape, dtype, whole)

    try:
        found = expected(device)
    except RuntimeError:
        if device != "meta":
            raise
        device, found = "cpu", expected("cpu")  # its code looks at a tensor that it makes on the device
    streamed = found.peak if found.in_strips else found.eager
    tight = expected(device, budget=max(found.eager // 4, 1)).peak
    return {
        "eager": found.eager, "streamed": streamed, "tight": tight, "in_strips": found.in_strips,
        "whole": sorted(whole), "device": device,
    }  # fmt: skip


def _unknown(shape: Any, dtype: torch.dtype) -> float:
    return float("inf")


def row(load: Callable[[str], Any], family: Family, method: str, device: str = "meta") -> dict[str, Any]:
    """What `counted` gives, and under `ran` what `ran` gives, where the node does anything."""
    found = counted(load, family, method, device)
    nothing = {"error": 0.0, "whole": [], "strips": 0}
    return found | {"ran": nothing if found["in_strips"] is None else ran(load, family, method)}


_STRIP_BYTES = 1 << 18
"""Of a strip of what runs: so few that small maps come in several."""


@torch.inference_mode()
def ran(load: Callable[[str], Any], family: Family, method: str) -> dict[str, Any]:
    """The largest `error` of a narrow one in strips, of the range of what eager gives, in float32, and the operators
    that were evaluated `whole`; and how many `strips` there were. Raises what building and running raise."""
    streaming = load("streaming")
    shape = family.shape(method, small=True)
    assert shape is not None
    model = build(family, narrow=True, device="cpu").float()
    draw(model, family.gain)
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    eager = result_of(model, method, input)
    owner, _, name = load("hosts.halves").part_of(model, METHODS[method], method).rpartition(".")
    always = replace(streaming.USUAL, always=True, strip_bytes=_STRIP_BYTES)
    # Where the method goes through the part's inside by itself, the node streams all of it.
    for target in (getattr(model.get_submodule(owner), name), getattr(model, method)):
        calls: list[int] = []
        report: dict[str, int] = {}
        with streaming.stream(
            target, report=report, tuning=always, on_progress=lambda *_, calls=calls: calls.append(1)
        ):
            result = result_of(model, method, input)
        if calls:
            error = float((result - eager).abs().max() / (eager.max() - eager.min()))
            return {"error": error, "whole": sorted(report), "strips": len(calls)}
    raise RuntimeError("nothing was streamed")
