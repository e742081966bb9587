"""The caller's code runs exactly once per streamed call, and leaves what one eager call leaves."""

from __future__ import annotations

import collections
import contextvars
import copy
import functools
import gc
import io
import itertools
import logging
import pickle
import random
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from processes import LIMIT
from products import crossed
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Streamed, Tuning, stream, streamed

from .comparing import (
    FEW_ROWS,
    KEPT_ARE_ORDINARY,
    ONE_ROW,
    TUNINGS,
    assert_alike,
    assert_ordinary,
    random_states,
    seed_all,
    tensors_in,
)  # fmt: skip

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6, requires_grad=False)
X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))
BUDGETS = [None, 1, 5_000, 1 << 40]
Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
Call = Callable[[], Any]


def c(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT.to(x.dtype), padding=1)


class Net(nn.Module):
    """A convolution, and a function of it and the input."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        with torch.no_grad():
            self.c.weight.copy_(WEIGHT)
            self.c.bias.zero_()  # type: ignore[reportOptionalMemberAccess]
        self.requires_grad_(False).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def within_a_block(function: Function, **options: Any) -> Function:
    """The function as a module's forward, called within a block of its own."""
    net = function if isinstance(function, nn.Module) else Net(lambda _, *args, **kwargs: function(*args, **kwargs))

    def run(*args: Any, **kwargs: Any) -> Any:
        with stream(net, **options):
            return net(*args, **kwargs)

    return run


WAYS: dict[str, Callable[..., Function]] = {"streamed": streamed, "stream": within_a_block}


# How often


def goes_through(x: Tensor) -> Tensor:
    return F.silu(F.group_norm(c(x), 2)) + x


def asks_for_a_number(x: Tensor) -> Tensor:
    y = c(x)
    return c(y) * y.mean().item() if y.amax() > 0 else y


def asks_for_an_array(x: Tensor) -> Tensor:
    return c(torch.from_numpy(c(x).numpy() * 2))


def has_an_unknown_operator(x: Tensor) -> Tensor:
    y = c(torch.fft.fft2(c(x)).abs())
    return c(torch.cumsum(y.sort(2)[0], 1))


def writes_rows(x: Tensor) -> Tensor:
    y = c(x)
    y[:, :1, :2] = 0
    y.flatten(2).transpose(1, 2)[:, 3] += 1
    return c(y)


def has_an_operator_of_python(x: Tensor) -> Tensor:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, given: Tensor) -> Tensor:
            return given * 2

    return c(Twice.apply(c(x)))  # type: ignore[reportArgumentType]


def goes_sparse(x: Tensor) -> Tensor:
    return c(F.relu(c(x)).to_sparse().to_dense())


def hides_an_error(x: Tensor) -> Tensor:
    y = c(x)
    try:
        y = y + torch.zeros(13)
    except RuntimeError:
        y = y * 3
    try:
        y = F.conv2d(y, torch.zeros(3, 5, 3, 3))
    except RuntimeError:
        y = y + 1
    return c(y)


def gives_up(x: Tensor) -> Tensor:
    c(x)
    raise KeyError("the caller's own")


def is_no_network(x: Tensor) -> int:
    return x.dim()


PROGRAMS: list[Function] = [
    goes_through, asks_for_a_number, asks_for_an_array, has_an_unknown_operator, writes_rows,
    has_an_operator_of_python, goes_sparse, hides_an_error, gives_up, is_no_network,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@crossed(2, program=PROGRAMS, tuning={**TUNINGS, "as it is": Tuning()}, budget=BUDGETS, way=list(WAYS))
def test_each_call_runs_the_code_once(program: Function, tuning: Tuning, budget: Optional[int], way: str) -> None:
    ran: list[int] = []

    def run(x: Tensor) -> Any:
        ran.append(len(ran))
        result = program(x)
        ran.append(len(ran))
        return result

    wrapped = WAYS[way](run, budget=budget, tuning=tuning)
    ends = 2 if program is not gives_up else 1
    with torch.no_grad():
        for calls, x in enumerate([X, X, X[:1], X[:, :, :5].clone(), X.double(), X], 1):
            if program is gives_up:
                with pytest.raises(KeyError, match="the caller's own"):
                    wrapped(x)
            else:
                assert_alike(wrapped(x), program(x))
            assert len(ran) == ends * calls


# What is left: each world gives a call that can be made repeatedly, and that gives the result and what it left.


def a_number_in_an_object(wrap: Wrap) -> Call:
    state = types.SimpleNamespace(count=0, maps=[])

    def run(x: Tensor) -> Tensor:
        state.count += 1
        state.maps.append(c(x) * state.count)
        return state.maps[-1] + 1

    run = wrap(run)
    return lambda: (run(X), state.count, state.maps)


def a_tensor_in_a_closure(wrap: Wrap) -> Call:
    total = torch.zeros(())
    run = wrap(lambda x: c(x) * total.add_(1))
    return lambda: (run(X), total)


def a_running_sum_of_maps(wrap: Wrap) -> Call:
    total = torch.zeros(2, 4, 9, 7)

    def run(x: Tensor) -> Tensor:
        total.mul_(0.9).add_(c(x), alpha=0.1)
        return c(total)

    run = wrap(run)
    return lambda: (run(X), total)


def a_name_of_an_outer_function(wrap: Wrap) -> Call:
    previous: Optional[Tensor] = None

    def run(x: Tensor) -> Tensor:
        nonlocal previous
        y = c(x) if previous is None else c(x) + previous
        previous = y * 0.5
        return y

    run = wrap(run)
    return lambda: (run(X), previous)


def buffers_of_a_module(wrap: Wrap) -> Call:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        y = self.c(x) + self.previous
        self.previous = y * 0.5
        self.last = y
        self.seen.append(y.mean())
        return y

    net: Any = Net(forward)
    net.register_buffer("count", torch.zeros((), dtype=torch.long))
    net.register_buffer("previous", torch.zeros(2, 4, 9, 7))
    net.last, net.seen = None, []
    run = wrap(net)
    return lambda: (run(X), net.count, net.previous, net.last, net.seen)


def a_buffer_written_in_place(wrap: Wrap) -> Call:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.c(x)
        self.memory[:, :, 1:] = self.memory[:, :, :-1].clone()
        self.memory[:, :, 0] = y.mean((2, 3))
        return y + self.memory.mean(2)[..., None, None]

    net: Any = Net(forward)
    net.register_buffer("memory", torch.zeros(2, 4, 5))
    run = wrap(net)
    return lambda: (run(X), net.memory)


def a_batch_norm_that_trains(wrap: Wrap) -> Call:
    norm = nn.BatchNorm2d(4)
    net = Net(lambda self, x: self.c(F.relu(norm(self.c(x)))))
    run = wrap(net)
    return lambda: (run(X), norm.running_mean, norm.running_var, norm.num_batches_tracked)


def what_reads_a_norm_that_trains(wrap: Wrap) -> Call:
    """Its statistics before and after, by the program and by norms that do not train."""
    norms: Any = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def run(x: Tensor) -> Any:
        y, read = c(x), []
        for norm in norms:
            before = norm.eval()(y)
            y = norm.train()(y)
            read += [norm.running_mean.clone(), norm.running_var.sum().item(), before, norm.eval()(y)]
        unused = norms[0].train()(y * 2)
        del unused
        return y, read, norms[0].running_mean.clone()

    run = wrap(run)
    return lambda: (run(X), [norm.running_var for norm in norms])


def a_spectral_norm_that_trains(wrap: Wrap) -> Call:
    torch.manual_seed(3)
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)).train().requires_grad_(False)
    run = wrap(nn.Sequential(layer, nn.SiLU()))
    return lambda: (run(X), dict(layer.named_buffers()))


def a_dictionary_of_a_module(wrap: Wrap) -> Call:
    tables: dict[Any, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        key = tuple(x.shape[-2:]), x.dtype, x.device
        if key not in tables:
            tables[key] = torch.linspace(-1, 1, key[0][0])[:, None] * torch.linspace(-1, 1, key[0][1])
        return c(x) + tables[key]

    run = wrap(run)
    return lambda: (run(X), run(X[..., 1:]), tables)


def a_cached_function(wrap: Wrap) -> Call:
    @functools.lru_cache
    def grid(height: int, width: int) -> Tensor:
        return torch.linspace(-1, 1, height)[:, None] * torch.linspace(-1, 1, width)

    run = wrap(lambda x: c(x) + grid(*x.shape[2:]))
    return lambda: (run(X), tuple(grid.cache_info()), grid(9, 7), grid(9, 7).numpy().copy())


def a_cached_function_filled_before(wrap: Wrap) -> Call:
    @functools.cache
    def window(size: int) -> Tensor:
        return torch.linspace(0.5, 1.5, size).view(1, 1, size, 1)

    with torch.no_grad():
        window(9)
    run = wrap(lambda x: c(x * window(x.shape[-2])))
    return lambda: (run(X), run(X[:, :, 1:]), window(9), window(8))


def a_cached_property(wrap: Wrap) -> Call:
    class Table:
        @functools.cached_property
        def values(self) -> Tensor:
            return torch.arange(7.0) / 7

    table = Table()
    run = wrap(lambda x: c(x) * table.values)
    return lambda: (run(X), table.values, list(vars(table)))


def a_cache_of_maps(wrap: Wrap) -> Call:
    """As a video VAE keeps the last frames of each convolution."""
    caches: list[Optional[Tensor]] = [None, None]

    def layer(x: Tensor, index: int) -> Tensor:
        before = caches[index]
        y = torch.cat([torch.zeros_like(x[:, :, :2]) if before is None else before, x], 2)
        caches[index] = x[:, :, -2:].clone()
        return F.conv2d(F.pad(y, (1, 1, 0, 0)), WEIGHT)

    run = wrap(lambda x: layer(F.silu(layer(x, 0)), 1))
    return lambda: (run(X), caches)


def a_helper_that_moves_its_constants(wrap: Wrap) -> Call:
    class Helper:
        def __init__(self) -> None:
            self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)

        def on(self, device: torch.device) -> Tensor:
            self.scale = self.scale.to(device).clone()
            return self.scale

    helper = Helper()
    run = wrap(lambda x: c(x * helper.on(x.device)))
    return lambda: (run(X), helper.scale)


def a_scheduler(wrap: Wrap) -> Call:
    class Scheduler:
        def __init__(self) -> None:
            self.step_index, self.outputs = 0, []
            self.sigmas = torch.linspace(1, 0.1, 8)

        def step(self, noise: Tensor, sample: Tensor) -> Tensor:
            sigma = self.sigmas[self.step_index]
            self.step_index += 1
            self.outputs = [*self.outputs[-1:], noise]
            return sample - sigma * sum(self.outputs)  # type: ignore[reportReturnType]

    scheduler = Scheduler()

    def run(x: Tensor) -> Tensor:
        for _ in range(2):
            x = scheduler.step(c(x), x)
        return x

    run = wrap(run)
    return lambda: (run(X), scheduler.step_index, scheduler.outputs)


def an_attribute_of_a_class(wrap: Wrap) -> Call:
    class Counted:
        calls = 0
        last: Any = None

        def __call__(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            type(self).last = c(x)
            return c(type(self).last)

    counted = Counted()
    run = wrap(lambda x: counted(x))
    return lambda: (run(X), Counted.calls, Counted.last)


def an_attribute_of_a_function(wrap: Wrap) -> Call:
    def inner(x: Tensor, kept: list[Any] = []) -> Tensor:  # noqa: B006
        inner.calls = getattr(inner, "calls", 0) + 1  # type: ignore[reportFunctionMemberAccess]
        kept.append(c(x))
        return kept[0] + kept[-1]

    run = wrap(lambda x: inner(x))
    return lambda: (run(X), inner.calls, inner.__defaults__)  # type: ignore[reportFunctionMemberAccess]


def an_iterator_as_argument(wrap: Wrap) -> Call:
    numbers = iter(range(1, 100))
    run = wrap(lambda x, given: c(x) * (next(given) + next(given)))
    return lambda: (run(X, numbers), next(numbers))


def a_generator_as_argument(wrap: Wrap) -> Call:
    def weights() -> Iterator[Tensor]:
        for step in itertools.count(1):
            yield WEIGHT * step

    given = weights()
    run = wrap(lambda x, found: F.conv2d(c(x), next(found), padding=1))
    return lambda: (run(X, given), next(given))


def a_generator_of_maps_as_argument(wrap: Wrap) -> Call:
    taken: list[int] = []

    def maps() -> Iterator[Tensor]:
        for step in range(3):
            taken.append(step)
            yield X * step

    run = wrap(lambda found: torch.cat([c(x) for x in found], 1))
    return lambda: (run(maps()), list(taken))


def a_zip_that_ends(wrap: Wrap) -> Call:
    source = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    run = wrap(lambda x, given: sum(c(x) * a * b for a, b in zip(given, range(2))))
    return lambda: (run(X, source), next(source, None))


def a_file_as_argument(wrap: Wrap) -> Call:
    file = io.BytesIO(np.arange(100, dtype=np.float32).tobytes())
    run = wrap(lambda x, f: c(x) + torch.frombuffer(bytearray(f.read(28)), dtype=torch.float32))
    return lambda: (run(X, file), file.tell())


def a_counter_of_itertools(wrap: Wrap) -> Call:
    count = itertools.count()
    run = wrap(lambda x: c(x) + next(count))
    return lambda: (run(X), repr(count))


def lists_of_the_arguments(wrap: Wrap) -> Call:
    given: dict[str, Any] = {"maps": [X * 1, X * 2], "steps": []}

    def run(x: Tensor, found: dict[str, Any]) -> Tensor:
        y = c(x) + found["maps"].pop()
        found["maps"].insert(0, y)
        found["steps"].append(len(found["steps"]))
        found["maps"][-1].mul_(0.5)
        found["last"] = y
        return y

    run = wrap(run)
    return lambda: (run(X, given), given)


def every_sort_of_container(wrap: Wrap) -> Call:
    ring: collections.deque[Tensor] = collections.deque(maxlen=2)
    named: Any = collections.defaultdict(list)
    counted: collections.Counter[str] = collections.Counter()

    def run(x: Tensor) -> Tensor:
        y = c(x)
        ring.append(y)
        named["y"].append(y)
        named[y.shape].append(y.flatten(2))
        counted.update(["a", "b", "a"])
        return sum(ring)  # type: ignore[reportReturnType]

    run = wrap(run)
    return lambda: (run(X), list(ring), dict(named), dict(counted))


def a_context_variable(wrap: Wrap) -> Call:
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default=None)

    def run(x: Tensor) -> Tensor:
        before = variable.get()
        y = c(x) if before is None else before + c(x)
        variable.set(y)
        return y * 2

    run = wrap(run)
    return lambda: (run(X), variable.get())


def a_value_of_the_thread(wrap: Wrap) -> Call:
    local = threading.local()

    def run(x: Tensor) -> Tensor:
        local.count = getattr(local, "count", 0) + 1
        local.map = c(x) * local.count
        return c(local.map)

    run = wrap(run)
    return lambda: (run(X), local.count, local.map)


def maps_in_other_threads(wrap: Wrap) -> Call:
    def run(x: Tensor) -> Tensor:
        y = c(x)
        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(lambda part: part.mul(2) + 1, y.chunk(2, 1)))
        return c(torch.cat(parts, 1))

    run = wrap(run)
    return lambda: run(X)


def numbers_of_python(wrap: Wrap) -> Call:
    run = wrap(lambda x: c(x) * random.random() + random.choice([1.0, 2.0, 3.0]))
    return lambda: (run(X), random.random())


def numbers_of_numpy(wrap: Wrap) -> Call:
    generator = np.random.default_rng(3)
    run = wrap(lambda x: c(x) * np.random.rand() + float(generator.random()))
    return lambda: (run(X), generator.random(), np.random.rand())


def numbers_of_torch(wrap: Wrap) -> Call:
    def run(x: Tensor) -> Tensor:
        y = c(x) + torch.randn_like(x)
        y = F.dropout(c(y), 0.3)
        return y * torch.rand(2, 4, 1, 1) + torch.randint(0, 5, (7,)) + torch.randperm(9)[:, None]

    run = wrap(run)
    return lambda: (run(X), torch.rand(3))


def numbers_of_a_generator_of_torch(wrap: Wrap) -> Call:
    generator = torch.Generator().manual_seed(8)

    def run(x: Tensor, given: torch.Generator) -> Tensor:
        y = c(x) + torch.randn(x.shape, generator=given)
        y.normal_(generator=given) if float(y.mean()) > 100 else y.mul_(torch.rand(7, generator=given))
        return c(y)

    run = wrap(run)
    return lambda: (run(X, generator), generator.get_state())


def a_random_state_that_is_set(wrap: Wrap) -> Call:
    def run(x: Tensor) -> Tensor:
        state = torch.get_rng_state()
        y = c(x) + torch.randn(7)
        torch.set_rng_state(state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            z = torch.randn_like(y)
        return y + z + torch.randn(7)

    run = wrap(run)
    return lambda: (run(X), torch.rand(3))


def noise_that_nobody_reads(wrap: Wrap) -> Call:
    def run(x: Tensor) -> Tensor:
        torch.randn_like(c(x))
        c(x).normal_()
        return c(x)

    run = wrap(run)
    return lambda: (run(X), torch.rand(3))


WORLDS: list[Callable[[Wrap], Call]] = [
    a_number_in_an_object, a_tensor_in_a_closure, a_running_sum_of_maps, a_name_of_an_outer_function,
    buffers_of_a_module, a_buffer_written_in_place, a_batch_norm_that_trains, what_reads_a_norm_that_trains,
    a_spectral_norm_that_trains,
    a_dictionary_of_a_module, a_cached_function, a_cached_function_filled_before, a_cached_property, a_cache_of_maps,
    a_helper_that_moves_its_constants, a_scheduler, an_attribute_of_a_class, an_attribute_of_a_function,
    an_iterator_as_argument, a_generator_as_argument, a_generator_of_maps_as_argument, a_zip_that_ends,
    a_file_as_argument, a_counter_of_itertools, lists_of_the_arguments, every_sort_of_container, a_context_variable,
    a_value_of_the_thread, maps_in_other_threads, numbers_of_python, numbers_of_numpy, numbers_of_torch,
    numbers_of_a_generator_of_torch, a_random_state_that_is_set, noise_that_nobody_reads,
]  # fmt: skip


@crossed(2, world=WORLDS, way=list(WAYS), tuning={"one row": ONE_ROW, "few rows": FEW_ROWS}, budget=[None, 1])
def test_what_is_left_is_what_eager_calls_leave(
    world: Callable[[Wrap], Call], way: str, tuning: Tuning, budget: Optional[int]
) -> None:
    eager = world(lambda function: function)
    ours = world(lambda function: WAYS[way](function, tuning=tuning, budget=budget))
    outcomes: list[Any] = []
    for call in (eager, ours):
        seed_all()
        with torch.no_grad():
            outcomes.append(([call() for _ in range(3)], random_states()))
    assert_alike(outcomes[1], outcomes[0])


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_eager_goes_on_from_what_streaming_left(world: Callable[[Wrap], Call]) -> None:
    """Calls in turn, eager and streamed, on one state: nothing of the streamed ones is in the way of the others."""
    outcomes: list[Any] = []
    for turns in (False, True):
        count = itertools.count()

        def in_turn(function: Function, turns: bool = turns, count: Iterator[int] = count) -> Function:
            ours = WAYS["streamed"](function, tuning=FEW_ROWS)
            return lambda *args: (ours if turns and next(count) % 2 == 0 else function)(*args)

        call = world(in_turn)
        seed_all()
        with torch.no_grad():
            outcomes.append([call() for _ in range(4)])
    assert_alike(outcomes[1], outcomes[0])


# Where maps may be kept


def in_a_list(keep: Any, y: Tensor) -> None:
    keep.found = [y]


def in_a_tuple_in_a_dictionary(keep: Any, y: Tensor) -> None:
    keep.found = {"a": {"b": (1, (y, y))}}


def in_a_set(keep: Any, y: Tensor) -> None:
    keep.hidden = {y}
    keep.read = lambda: list(keep.hidden)


def as_a_key(keep: Any, y: Tensor) -> None:
    keep.hidden = {y: 1}
    keep.read = lambda: list(keep.hidden)


def in_slots(keep: Any, y: Tensor) -> None:
    class Slots:
        __slots__ = ("value",)

    keep.hidden = Slots()
    keep.hidden.value = y
    keep.read = lambda: keep.hidden.value


def in_a_closure(keep: Any, y: Tensor) -> None:
    keep.read = lambda: y


def in_a_default(keep: Any, y: Tensor) -> None:
    def read(value: Tensor = y) -> Tensor:
        return value

    keep.read = read


def in_a_partial(keep: Any, y: Tensor) -> None:
    keep.read = functools.partial(lambda value: value, y)


def in_a_generator(keep: Any, y: Tensor) -> None:
    def given() -> Iterator[Tensor]:
        kept = y
        yield kept
        yield kept

    generator = given()
    next(generator)
    keep.read = lambda: next(generator)


def in_a_bound_method(keep: Any, y: Tensor) -> None:
    keep.method = y.add
    keep.read = lambda: keep.method(0)


def on_another_tensor(keep: Any, y: Tensor) -> None:
    other: Any = torch.zeros(1)
    keep.tensor, other.tag = other, y
    keep.read = lambda: keep.tensor.tag


def on_another_map(keep: Any, y: Tensor) -> None:
    other: Any = c(y)
    other.tag = y
    keep.found = [other]
    keep.read = lambda: [keep.found[0].tag, keep.found[0]]


def in_an_array_of_objects(keep: Any, y: Tensor) -> None:
    keep.array = np.empty(1, dtype=object)
    keep.array[0] = y
    keep.read = lambda: keep.array[0]


def in_a_cached_function(keep: Any, y: Tensor) -> None:
    @functools.lru_cache
    def same(value: Tensor) -> Tensor:
        return value

    same(y)
    keep.read = lambda: [same(y), same.cache_info().hits]


def in_a_weak_dictionary(keep: Any, y: Tensor) -> None:
    keep.hidden, keep.held = weakref.WeakValueDictionary({1: y}), y
    keep.read = lambda: keep.hidden[1]


def in_an_exception(keep: Any, y: Tensor) -> None:
    try:
        raise ValueError(y)
    except ValueError as error:
        keep.error = error
    keep.read = lambda: keep.error.args[0]


def in_a_frame_of_a_traceback(keep: Any, y: Tensor) -> None:
    try:
        raise ValueError
    except ValueError as error:
        keep.error = error
    keep.read = lambda: keep.error.__traceback__.tb_frame.f_locals["y"]


def in_a_module_list(keep: Any, y: Tensor) -> None:
    keep.module = nn.Module()
    keep.module.register_buffer("value", y)
    keep.module.inner = nn.Module()
    keep.module.inner.value = y
    keep.read = lambda: [keep.module.value, keep.module.inner.value, *keep.module.state_dict().values()]


def in_a_queue_of_a_thread(keep: Any, y: Tensor) -> None:
    import queue

    waiting: queue.Queue[Tensor] = queue.Queue()
    thread = threading.Thread(target=waiting.put, args=(y,))
    thread.start()
    thread.join()
    keep.read = waiting.get_nowait


def only_a_part(keep: Any, y: Tensor) -> None:
    keep.found = [y[:, 1], y.flatten(2).transpose(1, 2), y[:, :, ::2], y.mean(), y > 0]


def what_was_written_later(keep: Any, y: Tensor) -> None:
    keep.found = [y, y.mul(2)]
    y.mul_(3)
    keep.found[1].add_(y)


PLACES: list[Callable[[Any, Tensor], None]] = [
    in_a_list, in_a_tuple_in_a_dictionary, in_a_set, as_a_key, in_slots, in_a_closure, in_a_default, in_a_partial,
    in_a_generator, in_a_bound_method, on_another_tensor, on_another_map, in_an_array_of_objects,
    in_a_cached_function, in_a_weak_dictionary, in_an_exception, in_a_frame_of_a_traceback, in_a_module_list,
    in_a_queue_of_a_thread, only_a_part, what_was_written_later,
]  # fmt: skip


@pytest.mark.parametrize("tuning", [ONE_ROW, FEW_ROWS], ids=["one row", "few rows"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@KEPT_ARE_ORDINARY
def test_a_map_that_outlives_the_call_is_an_ordinary_tensor(
    place: Callable[[Any, Tensor], None], tuning: Tuning
) -> None:
    found: list[Any] = []
    for wrap in (lambda function: function, functools.partial(streamed, tuning=tuning)):
        keep = types.SimpleNamespace()

        def run(x: Tensor, keep: Any = keep) -> Tensor:
            y = c(x)
            place(keep, y)
            return c(F.silu(y))

        with torch.no_grad():
            result = wrap(run)(X)
        kept = keep.read() if hasattr(keep, "read") else keep.found
        for tensor in tensors_in(kept):
            assert isinstance(tensor, (nn.Parameter, Tensor))
            assert_ordinary(tensor)
            tensor.numpy()
            copy.deepcopy(tensor)
            tensor.sum().item()
        found.append((result, kept))
    assert_alike(found[1], found[0])


class KeepsMaps(nn.Module):
    """Of a class that pickle finds; keeps a map in an attribute, in a buffer and for a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.register_buffer("previous", torch.zeros(2, 4, 9, 7))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x) + self.previous
        self.previous, self.last = y * 0.5, y
        return y


@pytest.mark.parametrize("within", [True, False], ids=["within the block", "after it"])
@KEPT_ARE_ORDINARY
def test_a_module_that_keeps_maps_is_saved_copied_and_looked_at(within: bool) -> None:
    module, seen = KeepsMaps(), []
    eager = copy.deepcopy(module)
    handle = module.c.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), ExitStack() as block:
        block.enter_context(stream(module, tuning=FEW_ROWS))
        module(X)
        handle.remove()
        if not within:
            block.close()
        eager(X)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_alike([copied.last, copied.previous], [eager.last, eager.previous])
            assert_alike(copied(X), copy.deepcopy(eager)(X))
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        assert_alike(dict(torch.load(file, weights_only=True)), dict(eager.state_dict()))
        assert_alike(module.last.numpy(), eager.last.numpy())
        assert_alike(seen, [eager.c(X)])


@KEPT_ARE_ORDINARY
def test_a_map_that_is_kept_and_returned_is_one_object() -> None:
    kept: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        kept.append(c(x))
        return kept[0]

    with torch.no_grad():
        assert streamed(run, tuning=FEW_ROWS)(X) is kept[0]


def test_a_map_that_nobody_holds_is_gone() -> None:
    """A weak reference to a map says within the program what it says in eager."""

    def run(x: Tensor) -> tuple[Tensor, list[bool]]:
        y = c(x)
        there = weakref.ref(y)
        seen = [there() is y]
        z = c(y)
        del y
        gc.collect()
        return z, [*seen, there() is None]

    with torch.no_grad():
        result, seen = streamed(run, tuning=FEW_ROWS)(X)
        assert_alike((result, seen), run(X))


# Hooks


class Hooked:
    """What the hooks of a small network are called with, in order."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 3))
        self.net.requires_grad_(False)
        self.calls: list[Any] = []

    def saw(self, name: str) -> Callable[..., None]:
        return lambda *seen: self.calls.append((name, *seen[1:]))


def forward_hooks(hooked: Hooked) -> None:
    for name, module in hooked.net.named_modules():
        module.register_forward_hook(hooked.saw(f"after {name}"))
        module.register_forward_pre_hook(hooked.saw(f"before {name}"))


def hooks_with_keywords(hooked: Hooked) -> None:
    hooked.net[0].register_forward_hook(hooked.saw("after"), with_kwargs=True)
    hooked.net[3].register_forward_pre_hook(hooked.saw("before"), with_kwargs=True, prepend=True)


def hooks_that_change_what_passes(hooked: Hooked) -> None:
    hooked.net[0].register_forward_hook(lambda module, args, out: out * 2 + args[0])
    hooked.net[1].register_forward_pre_hook(lambda module, args: (args[0].flip(2),))
    hooked.net[2].register_forward_hook(lambda module, args, out: out.mul_(0.5))
    forward_hooks(hooked)


def hooks_that_look(hooked: Hooked) -> None:
    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        hooked.calls.append((float(out.mean()), bool(out.isnan().any()), out.detach().cpu().numpy().std().item()))

    for module in hooked.net:
        module.register_forward_hook(look)


def hooks_that_are_removed_within_the_call(hooked: Hooked) -> None:
    handles: list[Any] = []

    def once(module: nn.Module, args: Any, out: Tensor) -> None:
        hooked.calls.append(out)
        handles.pop().remove()

    handles.append(hooked.net[0].register_forward_hook(once))


def hooks_that_are_set_within_the_call(hooked: Hooked) -> None:
    def set_another(module: nn.Module, args: Any) -> None:
        hooked.net[2].register_forward_hook(hooked.saw("set in the call"))

    hooked.net[0].register_forward_pre_hook(set_another)


def hooks_on_convolutions_of_an_observer(hooked: Hooked) -> None:
    """As calibration of a quantiser keeps the range of what it sees."""
    ranges = [torch.tensor(0.0), torch.tensor(0.0)]

    def observe(module: nn.Module, args: Any, out: Tensor) -> None:
        torch.minimum(ranges[0], out.amin(), out=ranges[0])
        torch.maximum(ranges[1], out.amax(), out=ranges[1])
        hooked.calls.append([one.clone() for one in ranges])

    for module in hooked.net:
        module.register_forward_hook(observe)


HOOKS: list[Callable[[Hooked], None]] = [
    forward_hooks, hooks_with_keywords, hooks_that_change_what_passes, hooks_that_look,
    hooks_that_are_removed_within_the_call, hooks_that_are_set_within_the_call, hooks_on_convolutions_of_an_observer,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("register", HOOKS, ids=lambda register: register.__name__)
@KEPT_ARE_ORDINARY
def test_hooks_are_called_once_with_what_are_ordinary_tensors(
    register: Callable[[Hooked], None], tuning: Tuning, way: str
) -> None:
    found: list[Any] = []
    for wrap in (lambda function: function, functools.partial(WAYS[way], tuning=tuning)):
        hooked = Hooked()
        register(hooked)
        run = wrap(hooked.net)
        with torch.no_grad():
            found.append(([run(X), run(X)], hooked.calls))
    assert_alike(found[1], found[0])


@KEPT_ARE_ORDINARY
def test_hooks_of_all_modules_are_called_once() -> None:
    found: list[Any] = []
    for wrap in (lambda function: function, functools.partial(streamed, tuning=FEW_ROWS)):
        hooked = Hooked()
        handles = [
            nn.modules.module.register_module_forward_hook(hooked.saw("after")),
            nn.modules.module.register_module_forward_pre_hook(hooked.saw("before")),
        ]
        try:
            with torch.no_grad():
                found.append((wrap(hooked.net)(X), hooked.calls))
        finally:
            for handle in handles:
                handle.remove()
    assert_alike(found[1], found[0])


@KEPT_ARE_ORDINARY
def test_a_hook_that_is_always_called_sees_the_error_once() -> None:
    for wrap in (lambda function: function, functools.partial(streamed, tuning=FEW_ROWS)):
        hooked = Hooked()
        hooked.net[3] = Net(lambda *_: int("no number"))
        hooked.net.register_forward_hook(hooked.saw("the whole"), always_call=True)
        hooked.net[0].register_forward_hook(hooked.saw("the first"))
        with torch.no_grad(), pytest.raises(ValueError, match="no number"):
            wrap(hooked.net)(X)
        assert [name for name, *_ in hooked.calls] == ["the first", "the whole"]
        assert_ordinary(hooked.calls[0][2])
        assert type(hooked.calls[0][2]) is Tensor


# What the caller's code finds around it


def around() -> tuple[Any, ...]:
    """What holds where it is called, and what is made there."""
    made = torch.zeros(3), torch.arange(4), torch.tensor([1.5]), torch.ones(2, 2).mul(2), torch.linspace(0, 1, 5)
    for tensor in made:
        assert type(tensor) is Tensor
        assert_ordinary(tensor)
        tensor.numpy()
    parameter = nn.Conv2d(1, 1, 1).weight
    assert type(parameter) is nn.Parameter
    assert_ordinary(parameter)
    return (
        *made,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch._guards.detect_fake_mode() is None,  # type: ignore[reportAttributeAccessIssue]
        torch.zeros(1).device,
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_the_code_makes_and_finds_around_it_is_as_in_eager(mode: Any) -> None:
    found: list[Any] = []

    def run(x: Tensor) -> Tensor:
        found.append(around())
        y = c(x)
        found.append(around())
        return c(y * float(y.mean()))

    with mode():
        run(X)
        streamed(run, tuning=FEW_ROWS)(X)
    assert_alike(found[2], found[0])
    assert_alike(found[3], found[1])


def test_what_the_code_sets_stays_set() -> None:
    def run(x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        return c(x) + torch.zeros(7).sum().float()

    try:
        with torch.no_grad():
            streamed(run, tuning=FEW_ROWS)(X)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_written_said_and_warned_of_is_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def run(x: Tensor) -> Tensor:
        y = c(x)
        print("printed")
        logging.getLogger("a host").warning("logged")
        warnings.warn("warned", stacklevel=1)
        with (tmp_path / "log.txt").open("a") as file:
            file.write("line\n")
        torch.save(y, tmp_path / "map.pt")
        return c(y)

    with torch.no_grad(), pytest.warns(UserWarning, match="warned") as said:
        streamed(run, tuning=FEW_ROWS)(X)
    assert [str(one.message) for one in said].count("warned") == 1
    assert capsys.readouterr().out == "printed\n"
    assert [record.message for record in caplog.records if record.name == "a host"] == ["logged"]
    assert (tmp_path / "log.txt").read_text() == "line\n"
    assert_alike(torch.load(tmp_path / "map.pt", weights_only=True), c(X))


# Errors


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@KEPT_ARE_ORDINARY
def test_an_error_of_the_code_is_the_callers_and_what_was_kept_is_ordinary(tuning: Tuning) -> None:
    kept: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        kept.append(c(x))
        kept[0].mul_(2)
        raise LookupError("the caller's own")

    with torch.no_grad(), pytest.raises(LookupError, match="the caller's own"):
        streamed(run, tuning=tuning)(X)
    assert_alike(kept, [c(X) * 2])


def test_an_error_comes_where_eager_has_it_come() -> None:
    """Shapes that do not fit are refused at their line, so that the code can go another way."""

    def run(x: Tensor) -> tuple[Tensor, list[str]]:
        y, said = c(x), []
        for attempt in (
            lambda: y + torch.zeros(5),
            lambda: F.conv2d(y, torch.zeros(2, 3, 3, 3)),
            lambda: y.view(5, 5),
            lambda: torch.cat([y, y[:, :, 1:]], 1),
            lambda: y[:, 9],
            lambda: y.permute(0, 1),
            lambda: F.group_norm(y, 3),
            lambda: F.pad(y, (1, 1, 20, 20), mode="reflect"),
            lambda: torch.bmm(y, y),
            lambda: y.reshape(11, -1),
            lambda: F.conv2d(y, torch.zeros(4, 4, 11, 11)),
            lambda: y.mean(7),
            lambda: F.pixel_shuffle(y, 3),
            lambda: y.copy_(torch.zeros(3)),
            lambda: F.linear(y, torch.zeros(3, 5)),
            lambda: y.item(),
        ):
            try:
                attempt()
                said.append("nothing")
            except Exception as error:
                said.append(type(error).__name__)
        return c(y), said

    with torch.no_grad():
        expected = run(X)
        assert "nothing" not in expected[1]
        assert_alike(streamed(run, tuning=FEW_ROWS)(X), expected)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_what_progress_raises_ends_the_call_and_the_next_is_right(kind: type[BaseException]) -> None:
    def stop(*_: Any) -> None:
        raise kind("stopped")

    net = Net(lambda self, x: self.c(F.group_norm(self.c(x), 2)))
    with torch.no_grad():
        expected = net(X)
        with pytest.raises(kind, match="stopped"), stream(net, on_progress=stop, tuning=ONE_ROW):
            net(X)
        assert "forward" not in net.__dict__
        assert_alike(net(X), expected)
        with stream(net, tuning=ONE_ROW):
            assert_alike(net(X), expected)


@KEPT_ARE_ORDINARY
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_a_call_that_was_stopped_computes_nothing_more(kind: type[BaseException]) -> None:
    """What its code keeps has the values that were there, and the others once somebody asks for them."""
    steps: list[int] = []

    def stop(done: int, work: int) -> None:
        steps.append(done)
        if len(steps) == 20:
            raise kind("stopped")

    kept: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        kept.append(c(F.group_norm(c(x), 2)))
        kept[0].sum().item()
        y = c(F.group_norm(kept[0], 2))
        kept.append(y[:, :2])
        kept.append(y)
        return c(y) * y.mean().item()

    with torch.no_grad():
        x = torch.randn(1, 4, 40, 6, generator=torch.Generator().manual_seed(4))
        with pytest.raises(kind, match="stopped"):
            streamed(run, on_progress=stop, tuning=FEW_ROWS)(x)
        assert len(steps) == 20
        y = c(F.group_norm(c(x), 2))
        expected = [y, c(F.group_norm(y, 2))[:, :2], c(F.group_norm(y, 2))]
        assert type(kept[0]) is Tensor
        assert_alike([one.numpy() for one in kept], [one.numpy() for one in expected])
        assert len(steps) == 20
        assert_alike(kept, expected)


def test_a_copy_into_memory_that_was_stopped_is_not_made_after_all() -> None:
    steps: list[int] = []

    def stop(done: int, work: int) -> None:
        steps.append(done)
        raise KeyboardInterrupt

    x, out = torch.randn(1, 4, 400, 6), torch.zeros(1, 4, 400, 6)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        streamed(lambda x: out.copy_(c(c(x))), on_progress=stop, tuning=ONE_ROW)(x)
    assert len(steps) == 1


@pytest.mark.parametrize("budget", [0, -5, 1.5, "2 GiB"])
def test_a_budget_that_is_none_is_refused_before_any_work(budget: Any) -> None:
    ran: list[int] = []
    with pytest.raises((ValueError, TypeError), match="budget"):
        streamed(lambda x: ran.append(1), budget=budget)(X)
    assert not ran


def test_a_module_that_calls_a_streamed_one_runs_once() -> None:
    ran: list[str] = []

    def inner(x: Tensor) -> Tensor:
        ran.append("inner")
        return c(F.group_norm(c(x), 2))

    within = streamed(inner, tuning=ONE_ROW)

    def outer(x: Tensor) -> Tensor:
        ran.append("outer")
        return c(within(c(x)))

    with torch.no_grad():
        expected = c(c(F.group_norm(c(c(X)), 2)))
        assert_alike(streamed(outer, tuning=FEW_ROWS)(X), expected)
    assert ran == ["outer", "inner"]


def test_a_function_that_calls_itself_runs_as_often_as_in_eager() -> None:
    depths: list[int] = []

    def run(x: Tensor, depth: int) -> Tensor:
        depths.append(depth)
        return c(x) if not depth else c(again(x, depth - 1)) + x

    again = streamed(run, tuning=FEW_ROWS)
    with torch.no_grad():
        ours = again(X, 3)
    streaming = list(depths)
    depths.clear()
    again = run
    with torch.no_grad():
        assert_alike(ours, run(X, 3))
    assert streaming == depths


def test_calls_in_two_threads_leave_compiling_as_it_was() -> None:
    """The second begins within the first, and ends behind it."""
    streamed(c)(X)  # loads what compiles
    within_first, within_second, behind_first = (threading.Event() for _ in range(3))

    def first(x: Tensor) -> Tensor:
        within_first.set()
        assert within_second.wait(LIMIT)
        return c(x)

    def second(x: Tensor) -> Tensor:
        within_second.set()
        assert behind_first.wait(LIMIT)
        return c(x)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(streamed(first), X)
        assert within_first.wait(LIMIT)
        other = pool.submit(streamed(second), X)
        one.result()
        behind_first.set()
        other.result()
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(X)
    assert compiled


def test_a_call_that_another_thread_makes_meanwhile_is_not_taken_for_this_one() -> None:
    """A small one, which is better not streamed; the large one is streamed whenever it is made."""

    class Calling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = c(x)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(runner.call, c, (X,), {}).result()
            return c(y)

    runner, module, large = Streamed(2_000_000), Calling(), torch.randn(1, 4, 512, 512)
    with torch.no_grad():
        for _ in range(3):
            runner.call(module, (large,), {})
            assert not runner.ran_eagerly


def test_what_a_program_took_by_numpy_is_not_kept() -> None:
    runner = Streamed(tuning=ONE_ROW)
    with torch.no_grad():
        array = runner.call(lambda x: c(x).numpy(), (X,), {})
    assert runner.last is not None
    place = array.ctypes.data
    kept = [one for one in gc.get_objects() if type(one) is Tensor and one.device.type == "cpu"]
    assert not [
        one for one in kept if one.layout is torch.strided and one.data_ptr() == place and one is not array.base
    ]
