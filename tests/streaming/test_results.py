"""Results of any shape and any layout: what a streamed call gives is made of ordinary tensors, laid out as eager's."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from products import crossed
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, stream, streamed

from .comparing import (
    FEW_ROWS,
    KEPT_ARE_ORDINARY,
    MODES,
    ONE_ROW,
    TUNINGS,
    Mode,
    assert_alike,
    assert_as_eager,
    assert_ordinary,
    copied,
    random_states,
    seed_all,
    sharing,
)

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6, requires_grad=False)
X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def c(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT.to(x.dtype), padding=1)


# Structures


@dataclasses.dataclass
class Output:
    hidden: Any
    number: int = 3


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: Any


@dataclasses.dataclass
class Slotted:
    __slots__ = ("hidden", "other")
    hidden: Any
    other: Any


class Named(NamedTuple):
    first: Any
    rest: Any


class Holder:
    def __init__(self, value: Any) -> None:
        self.value, self._hidden, self.again = value, (value,), [value]


class Slots:
    __slots__ = ("__weakref__", "_hidden", "value")

    def __init__(self, value: Any) -> None:
        self.value, self._hidden = value, {"value": value}


class SlotsAndMore(Slots):
    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.more = value


class WithProperty:
    def __init__(self, value: Any) -> None:
        self.__value = value

    @property
    def value(self) -> Any:
        return self.__value


class TupleOfItsOwn(tuple):
    __slots__ = ()


class ListOfItsOwn(list):
    pass


class DictOfItsOwn(dict):
    """As transformers' and diffusers' outputs: keys that are attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__.update(items)


class Kind(enum.Enum):
    MAP = 1


class CannotBeBuiltAnew:
    """Its constructor takes something else than its attributes, and refuses to be copied."""

    def __init__(self, path: str, *, opened: bool) -> None:
        self.path, self.opened, self.value = path, opened, None

    def __copy__(self) -> Any:
        raise TypeError

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError


def with_value(y: Tensor) -> CannotBeBuiltAnew:
    found = CannotBeBuiltAnew("here", opened=True)
    found.value = y  # type: ignore[reportAttributeAccessIssue]
    return found


def deep(y: Tensor) -> Any:
    value: Any = y
    for depth in range(200):
        value = [value] if depth % 3 else {"deeper": (value, depth)}
    return value


def deep_objects(y: Tensor) -> Any:
    value: Any = y
    for _ in range(50):
        value = Output(Holder(Frozen([value])))
    return value


def a_circle(y: Tensor) -> Any:
    one, other = Holder(y), Holder(y * 2)
    one.other, other.other = other, one  # type: ignore[reportAttributeAccessIssue]
    one.again.append(one)
    return one


def a_module_that_holds_it(y: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("value", y)
    module.other = y * 2
    module.inner = nn.ModuleList([nn.Identity()])
    module.inner[0].register_buffer("deeper", y[:, 1:])
    return module


@functools.cache
def output_of_diffusers() -> Any:
    outputs: Any = pytest.importorskip("diffusers.utils.outputs")

    @dataclasses.dataclass
    class Decoded(outputs.BaseOutput):
        sample: Any
        other: Any = None

    return Decoded


def an_exception(y: Tensor) -> Any:
    return list(ValueError("said", y).args)


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, y * 2),
    "tuple of one": lambda y: (y,),
    "empty": lambda y: ((), [], {}, None),
    "list": lambda y: [y, [y * 2, [y * 3]]],
    "dict": lambda y: {"a": y, 3: [y * 2], ("b", 1): (y,)},
    "mixed": lambda y: [1, "text", None, 2.5, True, b"bytes", y, torch.float32, y.shape, y.device, slice(1, 2)],
    "dataclass": lambda y: Output((y, y * 2)),
    "frozen dataclass": lambda y: Frozen([y, Frozen(y * 2)]),
    "dataclass with slots": lambda y: Slotted(y, {"a": y * 2}),
    "named tuple": lambda y: Named(y, Named(y * 2, [y])),
    "tuple of a class of its own": lambda y: TupleOfItsOwn((y, TupleOfItsOwn([y * 2]))),
    "list of a class of its own": lambda y: ListOfItsOwn([y, y * 2]),
    "dict of a class of its own": lambda y: DictOfItsOwn(sample=y, other=[y * 2]),
    "ordered dict": lambda y: collections.OrderedDict(b=y, a=y * 2),
    "default dict": lambda y: (lambda d: d["a"].append(y) or d)(collections.defaultdict(list)),
    "chain map": lambda y: collections.ChainMap({"a": y}, {"b": y * 2}),
    "deque": lambda y: collections.deque([y, y * 2], maxlen=3),
    "set": lambda y: {y, y * 2},
    "frozen set": lambda y: (frozenset([y, y * 2]), 1),
    "keys": lambda y: [*{y: 1, y * 2: 2}],
    "object": Holder,
    "tuple in an object": lambda y: Holder((y, (y * 2, Holder([y])))),
    "slots": Slots,
    "slots and more": SlotsAndMore,
    "object with a property": lambda y: (lambda o: [o, o.value])(WithProperty(y)),
    "namespace": lambda y: types.SimpleNamespace(y=y, rest=[y * 2]),
    "mapping proxy": lambda y: dict(types.MappingProxyType({"y": y})),
    "what cannot be built anew": with_value,
    "deep": deep,
    "deep objects": deep_objects,
    "circle": a_circle,
    "module": a_module_that_holds_it,
    "array of objects": lambda y: np.array([y.mean(), None, Holder(y)], dtype=object),
    "output of diffusers": lambda y: output_of_diffusers()(sample=y, other=(y * 2,)),
    "arguments of an exception": an_exception,
    "return type of torch": lambda y: tuple(y.max(1)),
    "enum and others": lambda y: [Kind.MAP.value, y, range(3)],
    "many": lambda y: [y * index for index in range(40)],
    "numbers": lambda y: (y.shape[0], float(y.mean()), y.tolist()),
    "nothing of it": lambda y: (torch.arange(3), "text"),
}


@crossed(2, name=list(STRUCTURES), tuning=TUNINGS, way=["streamed", "stream"])
def test_maps_in_a_result_of_any_structure_are_ordinary(name: str, tuning: Tuning, way: str) -> None:
    build = STRUCTURES[name]

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return build(c(F.silu(c(x))))

    net = Net()
    with torch.no_grad():
        expected = net(X)
        if way == "streamed":
            assert_alike(streamed(net, tuning=tuning)(X), expected)
        else:
            with stream(net, tuning=tuning):
                result = net(X)
            assert_alike(result, expected)


@KEPT_ARE_ORDINARY
def test_a_result_is_the_object_that_the_program_made() -> None:
    made: list[Any] = []

    def run(x: Tensor) -> Any:
        made.append([Output(c(x)), Slots(c(x)), [c(x)], {"a": c(x)}, with_value(c(x)), {c(x)}])
        return made[-1]

    with torch.no_grad():
        result = streamed(run, tuning=FEW_ROWS)(X)
    assert result is made[0]
    assert all(one is other for one, other in zip(result, made[0]))
    for tensor in (result[0].hidden, result[1].value, result[2][0], result[3]["a"], result[4].value, *result[5]):
        assert type(tensor) is Tensor
        assert_ordinary(tensor)


@KEPT_ARE_ORDINARY
def test_what_is_in_a_result_twice_is_one_object() -> None:
    def run(x: Tensor) -> Any:
        y = c(x)
        return [y, {"again": y}, Holder(y), y[:, 1:]]

    with torch.no_grad():
        one, again, held, _ = streamed(run, tuning=FEW_ROWS)(X)
    assert again["again"] is one
    assert held.value is one
    assert held.again[0] is one


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_a_weak_reference_to_a_map_ends_no_call(tuning: Tuning) -> None:
    """torch refuses to make another object of one that its own weak references show."""
    found, weak = [], getattr(torch._C, "_WeakTensorRef")  # noqa: B009 - it has no public name

    def program(x: Tensor) -> Tensor:
        y = F.conv2d(x, WEIGHT, padding=1)
        found.append(weak(y))
        return y

    result = streamed(program, tuning=tuning)(X)
    assert_ordinary(result)
    assert_alike(result, F.conv2d(X, WEIGHT, padding=1))
    assert len(found) == 1


def test_a_profiler_that_records_shapes_ends_no_call() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True):
        result = streamed(lambda x: F.silu(F.conv2d(x, WEIGHT, padding=1)), tuning=ONE_ROW)(X)
    assert_ordinary(result)
    assert_alike(result, F.silu(F.conv2d(X, WEIGHT, padding=1)))


def test_what_is_given_twice_is_one_object() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, *, other: Tensor) -> Any:
        return c(query), query is key, query is value, query is other, key

    with torch.no_grad():
        result = streamed(attend, tuning=FEW_ROWS)(X, X, X.clone(), other=X)
    assert result[1:4] == (True, False, True)
    assert result[4] is X


def test_attributes_of_a_map_stay_on_it() -> None:
    def run(x: Tensor) -> Any:
        y: Any = c(x)
        y.fps, y.mask = 24, y > 0
        return y

    with torch.no_grad():
        result = streamed(run, tuning=FEW_ROWS)(X)
        assert result.fps == 24
        assert_alike(result.mask, c(X) > 0)


def test_attributes_of_an_argument_are_there_and_stay_on_it() -> None:
    def run(x: Any) -> Any:
        x.scale *= 2
        x.seen = c(x)
        del x.mask
        return x.seen * x.scale

    found = []
    for function in (run, streamed(run, tuning=FEW_ROWS)):
        x: Any = X.clone()
        x.scale, x.mask = 0.5, X > 0
        with torch.no_grad():
            result = function(x)
        found.append((result, vars(x)))
    assert_alike(found[1], found[0])


# Objects that the caller had


def test_what_is_given_back_is_the_callers_object() -> None:
    class Net(nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
            self.register_buffer("table", torch.zeros(3))

        def forward(self, x: Tensor, given: Any) -> Any:
            y = self.conv(x)
            return x, given, self.conv.weight, self.table, self.table.add_(1), x.add_(1), given[0], y.dtype

    net, given = Net(), [torch.ones(2), "text"]
    x = X.clone()
    with torch.no_grad():
        result = streamed(net, tuning=FEW_ROWS)(x, given)
    expected = [x, given, net.conv.weight, net.table, net.table, x, given[0], torch.float32]
    assert all(one is other for one, other in zip(result, expected))
    assert_alike(x, X + 1)


def test_identity_and_none_are_as_in_eager() -> None:
    with torch.no_grad():
        assert streamed(lambda x: x, tuning=FEW_ROWS)(X) is X
        assert streamed(lambda x: None, tuning=FEW_ROWS)(X) is None
        assert streamed(lambda x: [x][0], tuning=FEW_ROWS)(X) is X
        assert streamed(nn.Identity(), tuning=FEW_ROWS)(X) is X


def views_of_one_another(x: Tensor) -> Any:
    y = c(x)
    return y, y[:, 1:], y.flatten(2), y.permute(0, 2, 3, 1), y * 1


def views_of_the_argument(x: Tensor) -> Any:
    y = c(x)
    return x[:, 1:], x.flatten(2), y, x.contiguous(), x.to(torch.float32), x.detach()


def written_in_place(x: Tensor) -> Any:
    y = c(x)
    z = y.mul_(2)
    return y, z, F.relu(y, inplace=True), y.clone()


def halves(x: Tensor) -> Any:
    return c(x).chunk(2, 1)


def joined_maps_are_copies(x: Tensor) -> Any:
    y = c(x)
    both = torch.cat([x, y], 1)
    return y, both[:, :4], both[:, 4:], torch.cat([x]), y.flip(0), y[:, [0, 1]]


def stored_in_the_argument(x: Tensor) -> Any:
    x[:, :2] = c(x)[:, 2:]
    return x, x[:, 1]


SHARING = [
    views_of_one_another,
    views_of_the_argument,
    written_in_place,
    halves,
    joined_maps_are_copies,
    stored_in_the_argument,
]


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("function", SHARING, ids=lambda function: function.__name__)
def test_results_share_memory_where_eagers_do(function: Callable[[Tensor], Any], tuning: Tuning) -> None:
    assert_as_eager(function, X, tuning=tuning, memory=True)


@pytest.mark.parametrize("function", SHARING, ids=lambda function: function.__name__)
def test_writes_after_the_call_are_seen_where_eagers_are(function: Callable[[Tensor], Any]) -> None:
    outcomes: list[Any] = []
    for run in (function, streamed(function, tuning=FEW_ROWS)):
        x = X.clone()
        with torch.no_grad():
            results = run(x)
            for index, result in enumerate(results):
                result.mul_(0.5).add_(index)
        outcomes.append((results, x))
    assert_alike(outcomes[1], outcomes[0])


def test_no_result_holds_the_memory_of_a_larger_map() -> None:
    """A part that eager keeps as a copy is a copy: its storage is no larger than eager's."""

    def run(x: Tensor) -> Any:
        y = c(F.interpolate(c(x), scale_factor=2.0))
        return y[:, :, :2].clone(), y.mean((2, 3)), y[:, :1] * 2, F.avg_pool2d(y, 2)

    with torch.no_grad():
        for result, expected in zip(streamed(run, tuning=ONE_ROW)(X), run(X)):
            assert result.untyped_storage().nbytes() <= expected.untyped_storage().nbytes()


# Generators, and what computes later


def yields(x: Tensor) -> Iterator[Tensor]:
    y = c(x)
    for step in range(3):
        y = F.group_norm(c(y), 2) * (step + 1)
        yield y
    yield y[:, 1:]


def yields_and_returns(x: Tensor) -> Any:
    y = c(x)
    sent = yield y
    y = y * 2 if sent is None else y + sent
    yield c(y)
    return y.mean()


def yields_what_it_keeps(x: Tensor) -> Iterator[Any]:
    kept: list[Tensor] = []
    for step in range(3):
        kept.append(c(x) * step)
        kept[0].add_(1)
        yield list(kept)


def yields_from_another(x: Tensor) -> Iterator[Tensor]:
    yield from yields(x)
    yield from (c(x) * step for step in range(2))


def an_expression(x: Tensor) -> Any:
    y = c(x)
    return (c(y) * step for step in range(3))


def a_map_of_python(x: Tensor) -> Any:
    y = c(x)
    return map(lambda step: c(y) + step, range(3))


def a_zip(x: Tensor) -> Any:
    return zip(c(x).chunk(2, 1), iter([c(x), x]))


def an_iterator_of_a_list(x: Tensor) -> Any:
    return iter([c(x), c(x) * 2])


def an_iterator_of_a_class(x: Tensor) -> Any:
    class Frames:
        def __init__(self, value: Tensor) -> None:
            self.value, self.left = value, 3

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Tensor:
            if not self.left:
                raise StopIteration
            self.left -= 1
            self.value = c(self.value)
            return self.value

    return Frames(c(x))


def rows_of_a_map(x: Tensor) -> Any:
    return iter(c(x))


GENERATORS = [
    yields, yields_and_returns, yields_what_it_keeps, yields_from_another, an_expression, a_map_of_python, a_zip,
    an_iterator_of_a_list, an_iterator_of_a_class, rows_of_a_map,
]  # fmt: skip


@pytest.mark.parametrize("taken", [0, 1, 99], ids=["after the block", "half in it", "within the block"])
@pytest.mark.parametrize("tuning", [ONE_ROW, FEW_ROWS], ids=["one row", "few rows"])
@pytest.mark.parametrize("function", GENERATORS, ids=lambda function: function.__name__)
def test_a_generator_may_be_consumed_within_the_block_or_after_it(
    function: Callable[[Tensor], Any], tuning: Tuning, taken: int
) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    net, found, expected = Net(), [], []
    with torch.no_grad():
        eager = function(X)
        with stream(net, tuning=tuning):
            generator = net(X)
            for _, item, other in zip(range(taken), generator, eager):
                assert_alike(item, other)
                found.append(item)
                expected.append(other)
        found += list(generator)
        expected += list(eager)
    assert_alike(found, expected)


@pytest.mark.parametrize("function", GENERATORS, ids=lambda function: function.__name__)
def test_a_generator_of_a_streamed_function_gives_what_eager_gives(function: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        assert_alike(list(streamed(function, tuning=FEW_ROWS)(X)), list(function(X)))


def test_a_generator_is_sent_to_closed_and_returns() -> None:
    ended: list[str] = []

    def run(x: Tensor) -> Any:
        try:
            y = c(x)
            while True:
                sent = yield y
                if sent is None:
                    return y.mean()
                y = c(y) * sent
        finally:
            ended.append("ended")

    def used(start: Callable[[Tensor], Any]) -> Any:
        generator = start(X)
        found = [next(generator), generator.send(2.0), generator.send(torch.ones(7))]
        try:
            next(generator)
        except StopIteration as error:
            found.append(error.value)
        other = start(X)
        next(other)
        other.close()
        third = start(X)
        next(third)
        with pytest.raises(KeyError):
            third.throw(KeyError("thrown"))
        return found

    with torch.no_grad():
        assert_alike(used(streamed(run, tuning=FEW_ROWS)), used(run))
    assert ended == ["ended"] * 6


def test_a_generator_that_is_never_consumed_runs_nothing() -> None:
    ran: list[int] = []

    def run(x: Tensor) -> Iterator[Tensor]:
        ran.append(1)
        yield c(x)

    with torch.no_grad():
        generator = streamed(run, tuning=FEW_ROWS)(X)
        assert not ran
        assert_alike(next(generator), c(X))
    assert ran == [1]


def test_two_generators_in_turn() -> None:
    with torch.no_grad():
        run = streamed(yields, tuning=ONE_ROW)
        pairs = list(zip(run(X), run(X * 2)))
        assert_alike(pairs, list(zip(yields(X), yields(X * 2))))


def test_a_coroutine_gives_what_eager_gives() -> None:
    import asyncio

    async def run(x: Tensor) -> Tensor:
        y = c(x)
        await asyncio.sleep(0)
        return c(y)

    async def both(start: Callable[[Tensor], Any]) -> Any:
        return await asyncio.gather(start(X), start(X * 2))

    with torch.no_grad():
        assert_alike(asyncio.run(both(streamed(run, tuning=FEW_ROWS))), asyncio.run(both(run)))


def a_function(x: Tensor) -> Any:
    y = c(x)
    return lambda z: c(y) + z


def a_partial(x: Tensor) -> Any:
    return functools.partial(torch.add, c(x))


def a_bound_method(x: Tensor) -> Any:
    return c(x).add


def an_object_that_is_called(x: Tensor) -> Any:
    class Called:
        def __init__(self) -> None:
            self.y = c(x)

        def __call__(self, z: Tensor) -> Tensor:
            self.y = self.y + z
            return self.y

    return Called()


@KEPT_ARE_ORDINARY
@pytest.mark.parametrize(
    "function", [a_function, a_partial, a_bound_method, an_object_that_is_called], ids=lambda f: f.__name__
)
def test_what_computes_with_a_map_after_the_call_gives_what_eager_gives(function: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        later = streamed(function, tuning=FEW_ROWS)(X)
        result = later(torch.ones(7))
        assert_alike(result, function(X)(torch.ones(7)))
        assert type(result) is Tensor


# Layouts


def unfolded(x: Tensor) -> Any:
    return F.unfold(c(x), 3), c(x).unfold(2, 3, 2)


def of_pools(x: Tensor) -> Any:
    y = c(x)
    return F.avg_pool2d(y, 2), F.max_pool2d(y, 2), F.adaptive_avg_pool2d(y, 3), F.adaptive_max_pool2d(y, 1)


def of_norms(x: Tensor) -> Any:
    y = c(x)
    return F.group_norm(y, 2), F.layer_norm(y, (7,)), F.batch_norm(y, torch.zeros(4), torch.ones(4)), F.instance_norm(y)


def of_norms_of_tokens(x: Tensor) -> Any:
    t = c(x).flatten(2).transpose(1, 2)
    return F.layer_norm(t, (4,)), F.layer_norm(c(x).permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2), t * 2


def of_upsampling(x: Tensor) -> Any:
    y = c(x)
    return [F.interpolate(y, scale_factor=2.0, mode=mode) for mode in ("nearest", "bilinear", "bicubic", "area")]


def of_paddings(x: Tensor) -> Any:
    y = c(x)
    return [F.pad(y, (1, 1, 2, 0), mode) for mode in ("constant", "reflect", "replicate", "circular")]


def of_joins(x: Tensor) -> Any:
    y = c(x)
    return torch.cat([y, x], 1), torch.stack([y, x], 2), torch.cat([y, y.contiguous()], 2), torch.cat([y, x], 0)


def of_products(x: Tensor) -> Any:
    y = c(x)
    t = y.flatten(2)
    return (
        torch.bmm(t.transpose(1, 2), t),
        F.linear(y, torch.ones(3, 7)),
        torch.einsum("bchw,cd->bdhw", y, torch.ones(4, 3)),
    )


def of_attention(x: Tensor) -> Any:
    q = c(x).flatten(2).transpose(1, 2)
    heads = q.unflatten(2, (2, 2)).transpose(1, 2)
    parts = torch.cat((q, q * 2, q), 2).chunk(3, 2)
    split = [part.unflatten(2, (2, 2)).transpose(1, 2) for part in parts]
    own = heads.contiguous()
    given = [q] * 3, [heads] * 3, [own] * 3, split, [heads, split[1], own]
    return [F.scaled_dot_product_attention(query, key, value) for query, key, value in given]


def of_reductions(x: Tensor) -> Any:
    y = c(x)
    return y.mean(1), y.mean((2, 3), keepdim=True), y.sum(0), y.amax(1, keepdim=True), y.var((0, 2)), y.std(3)


def of_arithmetic(x: Tensor) -> Any:
    y = c(x)
    return (
        y + x,
        y + x.contiguous(),
        y * y.permute(0, 1, 2, 3),
        y + y.transpose(2, 3).transpose(2, 3),
        -y,
        y > 0,
        y + y.mean(1, True),
    )


def of_two_layouts(x: Tensor) -> Any:
    a, b = c(x).contiguous(), c(x).contiguous(memory_format=torch.channels_last)
    return a + b, b + a, torch.where(a > 0, a, b), torch.lerp(b, a, 0.5), torch.cat([b, a], 1), a * b[:, :1]


def of_permuted_arithmetic(x: Tensor) -> Any:
    t = c(x).permute(0, 2, 3, 1)
    return t * 2, t + t.contiguous(), F.silu(t), (t * 2).permute(0, 3, 1, 2), t.clone(), t.transpose(1, 2) + 1


def of_views(x: Tensor) -> Any:
    y = c(x)
    return (
        y[:, 1:], y[:, :, ::2], y[..., 2], y.permute(3, 0, 2, 1), y.transpose(2, 3), y.flatten(2), y.unsqueeze(1),
        y.expand(3, 2, 4, 9, 7), y.mean(1, True).expand_as(y), y.diagonal(0, 2, 3), y.unflatten(1, (2, 2)), y[1],
        y.flatten(2).transpose(1, 2), y.movedim(1, -1), y.narrow(2, 3, 4), y.as_strided((2, 3), (3, 1), 5),
    )  # fmt: skip


def of_copies(x: Tensor) -> Any:
    y = c(x)[:, :, ::2]
    return (
        y.clone(), y.contiguous(), y.clone(memory_format=torch.contiguous_format), y * 1, y.flip(2), y.roll(1, 2),
        y.repeat(1, 2, 1, 1), y.to(torch.float64), y.to(memory_format=torch.channels_last),
        y.clone(memory_format=torch.channels_last), y.reshape(2, -1), y[:, [2, 0]],
        y.index_select(3, torch.tensor([0, 3])), y.sort(1)[0], y.cumsum(2), torch.empty_like(y).fill_(1),
        torch.zeros_like(y),
    )  # fmt: skip


def of_convolutions(x: Tensor) -> Any:
    y, bias = c(x), torch.ones(4)
    wide = WEIGHT.contiguous(memory_format=torch.channels_last)
    return (
        F.conv2d(y, wide, bias), F.conv2d(y, WEIGHT[:, :1], groups=4), F.conv_transpose2d(y, WEIGHT, stride=2),
        F.conv2d(y, WEIGHT[..., :1, :1]), F.conv2d(y[:, :1], WEIGHT[:, :1]), F.conv1d(y.flatten(2), WEIGHT[:, :, 0]),
        F.conv3d(y.unsqueeze(2), WEIGHT[:, :, None]), F.conv2d(y[0], WEIGHT), F.conv2d(y, WEIGHT, stride=(2, 1)),
        F.conv2d(y, WEIGHT[:1]), F.conv2d(y.transpose(2, 3), WEIGHT), F.conv2d(y[:1], WEIGHT),
    )  # fmt: skip


def of_shuffles(x: Tensor) -> Any:
    y = c(x)
    return (
        F.pixel_shuffle(y, 2),
        F.pixel_unshuffle(y[:, :, :8, :6], 2),
        F.channel_shuffle(y, 2),
        y.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    )


def of_other_types(x: Tensor) -> Any:
    y = c(x)
    return (
        y.half(),
        y.bfloat16(),
        y.double(),
        (y * 4).round().to(torch.int8),
        y > 0,
        y.to(torch.complex64),
        (y > 0).sum(1),
    )


def of_gates(x: Tensor) -> Any:
    y = c(x)
    g = y.mean((2, 3), keepdim=True).sigmoid()
    return g * y, y * g, y * y.mean(1, True), y.amax(3, True) * y, F.glu(y, 1), g.expand_as(y) * y


def of_one_pixel_and_one_channel(x: Tensor) -> Any:
    y = c(x)
    return (
        y[:, :1],
        y[:, :1].clone(),
        y[:, :, :1, :1] * 2,
        y[:1],
        y[:1, :1],
        y[..., :1].contiguous(),
        y[:, :1] + x[:, :1],
    )


LAYOUTS = [
    unfolded, of_pools, of_norms, of_norms_of_tokens, of_upsampling, of_paddings, of_joins, of_products, of_attention,
    of_reductions, of_arithmetic, of_two_layouts, of_permuted_arithmetic, of_views, of_copies, of_convolutions,
    of_shuffles, of_other_types, of_gates, of_one_pixel_and_one_channel,
]  # fmt: skip


@crossed(2, function=LAYOUTS, tuning=TUNINGS, memory_format=FORMATS, mode=MODES)
def test_results_have_the_strides_of_eagers(
    function: Callable[[Tensor], Any], tuning: Tuning, memory_format: torch.memory_format, mode: Mode
) -> None:
    assert_as_eager(function, X.contiguous(memory_format=memory_format), tuning=tuning, mode=mode)


@pytest.mark.parametrize("function", LAYOUTS, ids=lambda function: function.__name__)
def test_results_of_what_lies_otherwise_have_the_strides_of_eagers(function: Callable[[Tensor], Any]) -> None:
    """An input with two dimensions exchanged, one that is a part, and one that is expanded."""
    assert_as_eager(function, torch.randn(2, 4, 7, 9).transpose(2, 3))
    assert_as_eager(function, torch.randn(3, 6, 12, 9)[1:, 1:5, ::1, 1:8][:, :, 2:11])
    assert_as_eager(function, torch.randn(1, 4, 9, 7).expand(2, 4, 9, 7))


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("function", LAYOUTS, ids=lambda function: function.__name__)
def test_within_the_program_a_map_says_the_strides_that_eagers_says(
    function: Callable[[Tensor], Any], memory_format: torch.memory_format
) -> None:
    def run(x: Tensor) -> Any:
        return [
            (
                tuple(y.shape),
                [stride for stride, size in zip(y.stride(), y.shape) if size > 1],
                y.is_contiguous(),
                y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last),
                y.storage_offset(),
                str(y.dtype),
            )
            for y in function(x)
        ]

    assert_as_eager(run, X.contiguous(memory_format=memory_format))


# Operators of which some kernels give another order than torch says without values


def of_numbers_and_maps(x: Tensor) -> Any:
    y = c(x)
    two, line = torch.tensor(2.0), torch.ones(4, 1, 1)
    return (
        torch.copysign(y, two), torch.copysign(y, line), torch.logaddexp(two, y), torch.logaddexp2(two, y),
        torch.heaviside(two, y), y.floor_divide(two), y.floor_divide(line), torch.logical_xor(two, y), 2.0**y,
        torch.float_power(2.0, y), torch.ldexp(two, y), F.logsigmoid(y), torch.isin(y, torch.ones(2)),
    )  # fmt: skip


def of_both_orders(x: Tensor) -> Any:
    y, other = c(x), torch.ones(x.shape)
    return [
        operator(*pair)
        for operator in (torch.copysign, torch.xlogy, torch.floor_divide, torch.add, torch.atan2)
        for pair in ((y, other), (other, y))
    ]


def of_what_goes_on_at_the_other_end(x: Tensor) -> Any:
    y = c(x)
    wrapped = [F.pad(y, sides, "circular") for sides in ((1, 1, 1, 1), (2, 1, 0, 0), (0, 0, 0, 0))]
    return *wrapped, y.roll(5), y.roll(2, 1), y.roll((1, 2), (2, 3))


def of_pools_undone(x: Tensor) -> Any:
    y = c(x)
    return F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), (2, 2)), y.flip(2), y.cumsum(1), y.softmax(1)


def of_tokens(x: Tensor) -> Any:
    t, turned = c(x).flatten(2).transpose(1, 2), c(x).transpose(2, 3)
    two = torch.tensor(2.0)
    return t.copysign(two), torch.logaddexp(two, t), 2.0**t, turned.copysign(two), 2.0**turned, torch.xlogy(turned, two)


SIZES = {"few": (2, 4, 10, 14), "many": (2, 4, 40, 60), "many of one sample": (1, 4, 60, 80)}


@crossed(
    2,
    function=[of_numbers_and_maps, of_both_orders, of_what_goes_on_at_the_other_end, of_pools_undone, of_tokens],
    size=SIZES,
    memory_format=FORMATS,
    mode=MODES,
)
def test_results_of_many_and_of_few_places_say_and_have_the_strides_of_eagers(
    function: Callable[[Tensor], Any], size: tuple[int, ...], memory_format: torch.memory_format, mode: Mode
) -> None:
    def run(x: Tensor) -> Any:
        found = function(x)
        return found, [[stride for stride, side in zip(y.stride(), y.shape) if side > 1] for y in found]

    x = torch.randn(size, generator=torch.Generator().manual_seed(2))
    assert_as_eager(run, x.contiguous(memory_format=memory_format), mode=mode)


def test_a_convolution_that_pads_by_the_other_end_can_be_viewed() -> None:
    wrapped = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular").requires_grad_(False)
    x = torch.randn(1, 4, 80, 60).contiguous(memory_format=torch.channels_last)
    assert_as_eager(lambda x: wrapped(x).view(1, -1) * 2, x)


def test_pixels_of_volumes_are_shuffled_whose_pieces_come_with_their_channels_last() -> None:
    x = torch.randn(2, 8, 4, 8, 6).contiguous(memory_format=torch.channels_last_3d)
    assert_as_eager(lambda x: [F.pixel_shuffle((x * 2).contiguous(), 2), F.pixel_unshuffle((x * 2).contiguous(), 2)], x)


def test_a_branch_on_the_layout_goes_where_eagers_goes() -> None:
    def run(x: Tensor) -> Any:
        y = c(x)
        z = y * 2 if y.is_contiguous() else y * 3
        t = z.permute(0, 2, 3, 1)
        t = t + 1 if t.is_contiguous() else t + 2
        try:
            flat = t.view(-1)
        except RuntimeError:
            flat = t.reshape(-1) * 2
        return z, t, flat

    for memory_format in FORMATS.values():
        assert_as_eager(run, X.contiguous(memory_format=memory_format))


# Noise


NOISE: dict[str, Callable[[Tensor], Any]] = {
    "randn_like": lambda y: torch.randn_like(y), "rand_like": lambda y: torch.rand_like(y) + y,
    "randint_like": lambda y: torch.randint_like(y, 0, 9),
    "randn_like of a permuted map": lambda y: torch.randn_like(y.permute(0, 2, 3, 1)),
    "randn_like of a part": lambda y: torch.randn_like(y[:, :, ::2]),
    "randn_like of an expanded map": lambda y: torch.randn_like(y[:, :1].expand_as(y)),
    "randn_like of a sum": lambda y: torch.randn_like(y + y.contiguous()),
    "randn_like of a mean": lambda y: torch.randn_like(y.mean((2, 3), keepdim=True)) + y,
    "randn_like in another type": lambda y: torch.randn_like(y, dtype=torch.float64),
    "randn_like in another format": lambda y: torch.randn_like(y, memory_format=torch.contiguous_format),
    "randn of its shape": lambda y: torch.randn(y.shape) + y,
    "an empty map filled": lambda y: torch.empty_like(y).normal_(), "a map filled": lambda y: y.clone().uniform_(-1, 1),
    "tokens filled": lambda y: y.flatten(2).transpose(1, 2).normal_(),
    "exponential": lambda y: torch.empty_like(y).exponential_(), "bernoulli": lambda y: torch.bernoulli(y.sigmoid()),
    "bernoulli in place": lambda y: y.clone().bernoulli_(0.3), "normal around a map": lambda y: torch.normal(y, 0.1),
    "bernoulli by a map": lambda y: y.clone().bernoulli_(y.sigmoid()),
    "bernoulli by a chance of zero": lambda y: torch.bernoulli(y, 0.0) + y.clone().bernoulli_(0.0),
    "poisson": lambda y: torch.poisson(y.abs()), "dropout": lambda y: F.dropout(y, 0.4),
    "dropout of channels": lambda y: F.dropout2d(y, 0.4),
    "alpha dropout": lambda y: F.alpha_dropout(y, 0.4, training=True), "rrelu": lambda y: F.rrelu(y, training=True),
    "gumbel": lambda y: F.gumbel_softmax(y, dim=1),
    "multinomial": lambda y: torch.multinomial(y.abs().flatten(1) + 0.1, 3),
    "a permutation": lambda y: y[:, torch.randperm(4)], "a number": lambda y: y * torch.rand(1).item() + torch.rand(()),
    "noise twice": lambda y: torch.randn_like(y) + torch.randn_like(y) * 2,
    "noise that a value depends on": lambda y: (
        y * 2 if (y + torch.randn_like(y)).mean().item() > 0 else torch.randn_like(y)
    ),
    "fractional pool": lambda y: F.fractional_max_pool2d(y, 2, output_size=(3, 3)),
}  # fmt: skip


@crossed(2, name=list(NOISE), tuning=TUNINGS, memory_format=FORMATS)
def test_noise_drawn_like_a_map_is_eagers(name: str, memory_format: torch.memory_format, tuning: Tuning) -> None:
    """Also what is drawn behind it, and the state that is left."""

    def run(x: Tensor) -> Any:
        y = c(x)
        noise = NOISE[name](y)
        return noise, c(y) + torch.randn(7), torch.randn_like(c(x))

    assert_as_eager(run, X.contiguous(memory_format=memory_format), tuning=tuning)


def test_noise_is_drawn_in_the_order_of_the_program_whatever_is_read_first() -> None:
    def run(x: Tensor) -> Any:
        one = torch.randn_like(c(x))
        other = torch.randn_like(x)
        generator = torch.Generator().manual_seed(3)
        third = torch.randn(x.shape, generator=generator)
        fourth = c(x).normal_(generator=generator)
        return c(other), fourth, c(one), third

    assert_as_eager(run, X, tuning=ONE_ROW, calls=2)


def test_a_sampler_with_a_streamed_model_draws_eagers_numbers() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Dropout(0.2), nn.Conv2d(8, 4, 3, padding=1)).train()
    net.requires_grad_(False)
    outcomes: list[Any] = []
    for model in (net, streamed(net, tuning=FEW_ROWS)):
        seed_all(3)
        x = X
        with torch.no_grad():
            for _ in range(4):
                x = x - 0.1 * model(x) + 0.05 * torch.randn_like(x)
        outcomes.append((x, random_states()))
    assert_alike(outcomes[1], outcomes[0])


# What lives how long


@KEPT_ARE_ORDINARY
def test_a_result_is_freed_when_the_caller_lets_it_go() -> None:
    with torch.no_grad():
        run = streamed(lambda x: (c(x), c(c(x))), tuning=FEW_ROWS)
        one, other = run(X)
        there = weakref.ref(one), weakref.ref(other)
        del one
        assert there[0]() is None
        assert there[1]() is other


def test_results_of_two_calls_are_independent() -> None:
    with torch.no_grad():
        run = streamed(lambda x: c(F.group_norm(c(x), 2)), tuning=FEW_ROWS)
        one = run(X)
        before = one.clone()
        other = run(X * 2)
        other.zero_()
        run(X * 3)
        assert_alike(one, before)
        assert sharing((one, other)) == []


def test_arguments_by_name_and_in_structures() -> None:
    def run(x: Tensor, *rest: Any, scale: Any, options: dict[str, Any]) -> Any:
        y = c(x) * scale + options["maps"][0] + rest[0].value
        options["maps"][1].add_(y)
        return c(y), options["maps"][1]

    def arguments() -> tuple[Any, dict[str, Any]]:
        maps = [copied(X), copied(X) * 2]
        return Holder(copied(X)), {"scale": torch.full((4, 1, 1), 2.0), "options": {"maps": maps, "none": None}}

    with torch.no_grad():
        (held, given), (same, again) = arguments(), arguments()
        assert_alike(streamed(run, tuning=FEW_ROWS)(X, same, **again), run(X, held, **given))
        assert_alike(again, given)


ARITHMETIC: dict[str, Callable[[Tensor], Tensor]] = {
    "x / 2": lambda x: x / 2.0,
    "x * 2": lambda x: x * 2,
    "1 + x": lambda x: 1.0 + x,
    "1 - x": lambda x: 1.0 - x,
    "x - 1": lambda x: torch.sub(x, 1.0, alpha=2),
    "x > 0": lambda x: x > 0,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "x ** 2": lambda x: x**2,
    "silu": F.silu,
    "empty_like": torch.zeros_like,
}


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_made_an_image_again_have_eagers_strides(name: str, batch: int) -> None:
    """A batch of one has a stride that leaves eager a choice then; large enough not to be tried on the CPU."""
    function = ARITHMETIC[name]

    def run(x: Tensor) -> Tensor:
        return function(x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.shape))

    x = torch.randn(batch, 128, 17, 13)
    with torch.no_grad():
        assert_alike(streamed(run, tuning=FEW_ROWS)(x), run(x), 1e-5)
