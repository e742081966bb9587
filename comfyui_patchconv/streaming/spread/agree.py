"""One plan for all ranks: rank 0 makes it, for what the least of them has, once all are known to do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..errors import SpreadError
from ..graph.node import Node
from ..plan.schedule import Pass, Schedule
from .ranks import Ranks, bytes_of

Plan = Callable[[Optional[int], int, int], Schedule]
"""Makes a schedule over the numbers of nodes for a budget, the bytes held already, and the room for what is
offloaded."""


class Offer(NamedTuple):
    """What a rank has and wants. program: what it is about to compute. budget, held, room: bytes, of its own."""

    program: str
    inputs: str
    budget: Optional[int]
    held: int
    room: int


def agree(ranks: Ranks, offer: Offer, plan: Plan) -> Schedule:
    """The schedule that all follow, over the numbers of nodes. Raises SpreadError where they are to compute something
    else each."""
    offers: list[Offer] = ranks.to_first(offer)
    answer: tuple[str, Optional[Schedule]] = "", None
    if offers:
        text = _difference(offers)
        budgets = [one.budget for one in offers if one.budget is not None]
        budget, held = min(budgets, default=None), max(one.held for one in offers)
        answer = text, None if text else plan(budget, held, min(one.room for one in offers))
    text, schedule = ranks.from_first(answer)
    if schedule is None:
        raise SpreadError(text)
    return schedule


def _difference(offers: Sequence[Offer]) -> str:
    """A sentence for ranks that do not do the same; empty where all do."""
    for rank, other in enumerate(offers):
        if other.program != offers[0].program:
            return (
                f"rank {rank} is to compute something else than rank 0: every rank has to make the same calls, of the "
                "same model, with inputs of the same shapes and types, on devices of one kind."
            )
        if other.inputs != offers[0].inputs:
            return f"rank {rank} has another input than rank 0: give all ranks the same, as from one file or one seed."
    return ""


def program_of(nodes: Sequence[Node], names: Mapping[Node, int], roots: Sequence[Node], keep: Sequence[Node]) -> str:
    """What tells two graphs apart, whichever of several alike devices they are for. names: a number for each node."""
    found = [([(names[node], node.in_bands) for node in roots], [names[node] for node in keep])]
    written = hashlib.sha256(repr(found).encode())
    for node in nodes:
        step = node.step
        assert step is not None
        rows = () if step.takes_all else (0, (node.rows - 1) // 2, node.rows - 1)
        needs = [tuple(step.needs(row, row + 1)) for row in rows]
        sources = [(names[source], source.shape, str(source.dtype)) for source in node.inputs]
        looks = node.shape, str(node.dtype), node.dim, node.dims, step.takes_all, step.reduces, needs, sources
        written.update(repr(looks).encode())
    return written.hexdigest()


_BLOCK = 1 << 17
"""Numbers of 8 bytes that are summed at once."""


def sum_of(values: Sequence[Tensor]) -> str:
    """A checksum of the bytes of tensors, in which their order counts."""
    total = 0
    for value in values:
        if not value.numel():
            continue
        flat = bytes_of(value, value.device)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
        for block in flat.split(_BLOCK):
            places = torch.arange(1, 2 * block.numel(), 2, device=block.device)
            total = (31 * total + int((block * places).sum())) % (1 << 64)
    return f"{total:x}"


def at_home(schedule: Schedule) -> Schedule:
    """A schedule over this rank's nodes, on the devices that these are on."""
    steps = [_here(step) if isinstance(step, Pass) else step for step in schedule.steps]
    return replace(schedule, steps=steps)


def _here(one_pass: Pass) -> Pass:
    nodes = one_pass.order or [target.node for target in one_pass.targets]
    return replace(one_pass, device=max(nodes, key=lambda node: node.bytes).device)
