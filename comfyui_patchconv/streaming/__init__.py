"""Whole networks in strips: only what a normalisation or an unknown operator needs whole is ever stored.

One decode, from `stream()` to the last strip:

1. `stream(vae)` puts methods in the place of `forward`, `decode` and `encode` on the object's class, or on the object
   where it has its own (`target.Entry`); deep copies and pickles have nothing of it. A call of one arrives at
   `runner.Streamed.call`. One that has no map among its arguments, or is made within another streamed call, just runs.
   `fallback.eager_reason` says whether something rules streaming out, such as an input that requires gradients, and a
   small call that is like an earlier one, for which eager was best, is left to eager, too. Any other begins a
   `call.Call`.

2. record. `Call.run` wraps the maps among the arguments in `record.lazy.LazyTensor`s and calls the program, once. Each
   operator on one of these arrives at `record.recorder.Recorder.call`. It asks `record.shapes` what the result looks
   like, and the table in `record.operators` which rows of its inputs its rows are made of: the answer is a
   `graph.node.Node` with a `Step`, whose `needs(first, last)` says so in integers. Nothing large is computed. An
   operator that the table does not know becomes a step that takes all of its inputs (`graph.steps.Whole`). A view is a
   `record.lazy.View` of a `Cell`, a piece of memory as eager would have it; `record.writes` gives the cell another node
   where it is written to, and `record.views` works out what each view shows. Weights are held as the call saw them:
   `record.held` copies what is about to be written to.

3. A value is demanded: the call is over, or `.item()`, NumPy or an operator that looks at values needs it now.
   `Call.evaluate` gets the nodes that are wanted (`roots`) and those that the program may still read (`keep`).

4. plan. Integers in, a `plan.schedule.Schedule` out, or the one of an earlier call whose graph was alike.
   `plan.choose` tries a few schedules and keeps the best. `plan.passes` makes each of them: which passes there are and
   what each stores, that is, what a step needs whole, what statistics are wanted of, and what later steps read
   (`plan.for_later`, `plan.reduced`). `plan.lifetimes` knows what is stored until when, `plan.placement` what is
   offloaded. `plan.way` lists the steps from stored maps to what a pass is made for, and `plan.sweep` sizes that pass:
   how many rows at once, which rows line buffers hold, what that takes; `plan.cost` reckons its time. `plan.eagerly`
   counts the same graph as eager runs it. Eager's schedule is taken where strips save no memory, or would take over
   1.25 times as long and eager fits the budget.

5. execute. `execute.loop.Loop` goes through the schedule's steps, which are passes or, where an operator takes its
   inputs whole, single operators; `pass_loop.PassLoop` goes through a pass's strips. `execute.strips.Rows` says which
   rows of which step a strip computes, and which of them the next one will read again (line buffers, `execute.lines`);
   `execute.kernels` computes what lies between convolutions in one go. The rows of a strip's targets go to stored maps
   (`execute.stored`), which lie on the device, in host memory or in a file (`execute.offloaded` chooses; `to_host`,
   `to_file`), and to the statistics of the next norm (`graph.statistics`) or to another reduction. Where a strip does
   not fit, and no row that was read has been freed yet, the pass begins again in strips of half the rows.

6. The nodes that were asked for now have values. When the call ends, `record.values` makes ordinary tensors of all
   deferred ones that the program still has: the same objects, where torch can do that (from 2.3 on).

Where several ranks make the call (`group`), a batch is first split by samples (`spread.samples`). `spread.agree` has
all follow the schedule of rank 0, each rank runs the passes of step 5 for a band of the rows, and `spread.together`
exchanges the rows beside bands before each pass (`spread.moves` says which), and merges statistics behind it.

`estimate.expect` does 2 to 4 with a copy of the model and inputs that have no values, and says what 5 would take.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional, Union

from torch import nn

from .call import OnProgress, joins
from .errors import CannotEstimateError, SpreadError
from .estimate import Expected, Make, expect, peak_activations
from .plan.schedule import USUAL, Tuning
from .runner import Streamed
from .spread.own_group import OwnGroup
from .spread.results import Band, InBands, gathered
from .target import Entry, methods_of

__all__ = [
    "USUAL",
    "Band",
    "CannotEstimateError",
    "Expected",
    "InBands",
    "Make",
    "OnProgress",
    "OwnGroup",
    "SpreadError",
    "Streamed",
    "Tuning",
    "expect",
    "gathered",
    "joins",
    "peak_activations",
    "stream",
    "streamed",
]


def streamed(
    function: Callable[..., Any],
    *,
    budget: Optional[int] = None,
    report: Optional[dict[str, int]] = None,
    on_progress: Optional[OnProgress] = None,
    tuning: Tuning = USUAL,
    group: Any = None,
) -> Callable[..., Any]:
    """`function`, with the feature maps among its arguments, and all that is computed from them, in strips.

    The result is that of `function`, in less memory; its code runs once. Gradients are off, and where an argument asks
    for them the call runs eagerly.

    budget: bytes of the device, beyond weights and arguments, to stay within: maps that do not fit are kept in host
    memory, or in a file where the device is the CPU. None for no limit. Where even a strip does not fit, more is used.
    report: filled with the operators that were evaluated whole, and how often, and with the reasons why calls ran
    eagerly. on_progress: see `OnProgress`; what it raises ends the call. Raises ValueError for a budget that is not a
    whole number above 0.

    group: a process group of `torch.distributed`, such as `dist.group.WORLD`, or an `OwnGroup`, whose ranks all make
    the same calls with equal arguments: each computes and stores a band of the rows of every map, within the least of
    their budgets, and all get the whole result; with `InBands(group)` each gets its own band of it. None for this
    process alone. Calls raise SpreadError, which names the rank, where another one fails, is gone, or does not come
    (`Tuning.silent_seconds`); ValueError is raised for a group that this process is not in.
    """
    runner = Streamed(budget, report, on_progress, tuning, group)

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        return runner.call(function, args, kwargs)

    return run


@contextmanager
def stream(
    target: Union[nn.Module, Callable[..., Any]],
    *,
    budget: Optional[int] = None,
    report: Optional[dict[str, int]] = None,
    on_progress: Optional[OnProgress] = None,
    tuning: Tuning = USUAL,
    group: Any = None,
) -> Iterator[Any]:
    """Within the `with` block, or the decorated function, `target` computes in strips; afterwards it is as it was.

    target: a module, of which `forward` is streamed, and `decode` and `encode` if it has them; or a method of an object
    (`vae.decode`). The other arguments are those of `streamed`. Where nothing was streamed, that is said in `report`
    and as a warning. Raises TypeError for another target.
    """
    runner = Streamed(budget, report, on_progress, tuning, group)
    methods = methods_of(target)
    with ExitStack() as entered:
        for owner, name in methods:
            entry = Entry(owner, name, runner.call)
            entry.enter()
            entered.callback(entry.leave)
        yield target
    if not runner.calls and not runner.report:
        names = " or ".join(f"{type(owner).__name__}.{name}" for owner, name in methods)
        text = f"nothing was streamed: {names} was not called with a map to compute on; stream the part that is."
        runner.report[text] = 1
        warnings.warn(text[0].upper() + text[1:], stacklevel=3)
