"""Gradients, functional transforms, tracing, export and compilation: eager's result, or one clear sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from comfyui_patchconv.streaming import stream, streamed

from .comparing import FEW_ROWS, ONE_ROW, TUNINGS, Progress, assert_alike, assert_as_eager

X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))
OTHER = torch.randn(2, 4, 13, 11, generator=torch.Generator().manual_seed(3))


def drawn(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1.0
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / scale)
    return module.eval().requires_grad_(False)


def net(seed: int = 0) -> Any:
    return drawn(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3)), seed)


class WithFunction(nn.Module):
    """A network whose forward is a function of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.function = net(), function

    def forward(self, *args: Any) -> Any:
        return self.function(self.inner, *args)


def is_a_sentence(error: BaseException) -> bool:
    """Whether a user can read it: one line of ours about streaming."""
    text = str(error)
    return "\n" not in text and 20 < len(text) < 400 and "stream" in text.lower() and text.endswith((".", "?"))


def assert_as_eager_or_a_sentence(run: Callable[[], Any], expected: Any) -> None:
    refused: Optional[Exception] = None
    result: Any = None
    try:
        result = run()
    except Exception as error:
        refused = error
    if refused is None:
        assert_alike(result, expected)
    else:
        assert is_a_sentence(refused), f"{type(refused).__name__}: {refused}"


# Gradients


def says_that_gradients_are_wanted(report: dict[str, int]) -> bool:
    return any("grad" in key.lower() and len(key) > 12 for key in report)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("way", ["streamed", "stream"])
def test_an_input_that_requires_grad_runs_eager_with_its_gradients(way: str, tuning: Any) -> None:
    module, report, steps = net(), {}, Progress()
    x, same = X.clone().requires_grad_(), X.clone().requires_grad_()
    module(x).square().sum().backward()
    if way == "streamed":
        result = streamed(module, report=report, on_progress=steps, tuning=tuning)(same)
    else:
        with stream(module, report=report, on_progress=steps, tuning=tuning):
            result = module(same)
    assert result.requires_grad
    result.square().sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    assert_alike(same.grad, x.grad)
    assert says_that_gradients_are_wanted(report)
    assert not steps.steps


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x: ((x,), {}),
        lambda x: ((), {"x": x}),
        lambda x: (([{"deep": (x,)}],), {}),
        lambda x: ((X, x), {}),
        lambda x: ((x * 2,), {}),
        lambda x: ((x[:, :, 1:],), {}),
    ],
    ids=["positional", "by name", "in a structure", "the second", "not a leaf", "a view"],
)
def test_an_input_that_requires_grad_is_found_wherever_it_is(arguments: Callable[[Tensor], Any]) -> None:
    module, report = net(), {}

    def run(*args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()][-1]
        while not isinstance(given, Tensor):
            given = given[0] if isinstance(given, (list, tuple)) else given["deep"]
        return module(given)

    x = X.clone().requires_grad_()
    args, kwargs = arguments(x)
    result = streamed(run, report=report, tuning=FEW_ROWS)(*args, **kwargs)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    args, kwargs = arguments(x)
    (expected,) = torch.autograd.grad(run(*args, **kwargs).sum(), x)
    assert_alike(gradient, expected)
    assert says_that_gradients_are_wanted(report)


def test_an_input_that_requires_grad_streams_where_gradients_are_off() -> None:
    module, x = net(), X.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        steps, report = Progress(), {}
        with mode():
            result = streamed(module, on_progress=steps, report=report, tuning=FEW_ROWS)(x)
            assert_alike(result, module(x))
        assert steps.steps
        assert not says_that_gradients_are_wanted(report)
        assert not result.requires_grad


def test_gradients_within_the_program_are_eagers() -> None:
    """As guidance computes them: the program turns gradients on for a while, for a copy of a map."""

    def run(inner: nn.Module, x: Tensor) -> Any:
        y = inner(x)
        with torch.enable_grad():
            z = y.detach().clone().requires_grad_(True)
            loss = F.conv2d(z, torch.ones(2, 3, 3, 3)).pow(2).sum()
            (gradient,) = torch.autograd.grad(loss, z)
        return inner(x)[:, :, 1:] - gradient[:, :, 1:] * 0.01, y

    for mode in (torch.no_grad, torch.enable_grad):
        assert_as_eager(WithFunction(run), X, mode=mode)


def test_gradients_of_the_argument_within_the_program_are_eagers() -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(inner(x).square().sum(), x)
        return inner(x - gradient * 0.1)

    assert_as_eager(WithFunction(run), X, tolerance=1e-4)


def test_gradients_of_weights_within_the_program_are_eagers() -> None:
    """Training of a small thing within the call: a few steps of an optimiser."""

    def run(inner: nn.Module, x: Tensor) -> Any:
        target = inner(x)
        with torch.enable_grad():
            layer = drawn(nn.Conv2d(4, 3, 3)).requires_grad_(True)
            optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
            for _ in range(3):
                optimiser.zero_grad()
                F.mse_loss(layer(x), target.detach().clone()).backward()
                optimiser.step()
        return layer(x).detach(), inner(x)

    assert_as_eager(WithFunction(run), X)


def test_checkpointing_gives_eagers_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    module = WithFunction(lambda inner, x: checkpoint(inner, x, use_reentrant=False))
    x, same = X.clone().requires_grad_(), X.clone().requires_grad_()
    module(x).sum().backward()
    streamed(module, tuning=FEW_ROWS)(same).sum().backward()
    assert_alike(same.grad, x.grad)


def test_a_streamed_call_within_a_graph_of_gradients() -> None:
    """A frozen encoder that streams, and behind it what is trained: its input requires no gradient."""
    encoder, head = net(), nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        expected = encoder(X)
    codes = streamed(encoder, tuning=FEW_ROWS)(X)
    assert_alike(codes, expected)
    head(codes).sum().backward()
    assert head.weight.grad is not None
    weight = expected.sum((0, 2, 3)).view(1, 3, 1, 1).expand(2, 3, 1, 1)
    assert_alike(head.weight.grad.contiguous(), weight.contiguous(), 1e-4)


def test_a_result_can_be_trained_on() -> None:
    with torch.no_grad():
        result = streamed(net(), tuning=FEW_ROWS)(X)
    result.requires_grad_()
    result.square().sum().backward()
    assert_alike(result.grad, result.detach() * 2)


def test_weights_that_require_grad_stream_where_gradients_are_off() -> None:
    module, steps = net().requires_grad_(True), Progress()
    with torch.no_grad():
        assert_alike(streamed(module, on_progress=steps, tuning=ONE_ROW)(X), module(X))
    assert steps.steps


def test_an_operator_of_autograd_runs_its_forward_once() -> None:
    ran: list[str] = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ran.append("forward")
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            ran.append("backward")
            return grads[0] * 2

    module = WithFunction(lambda inner, x: inner(Doubled.apply(x)))
    with torch.no_grad():
        expected = module(X)
        assert_alike(streamed(module, tuning=FEW_ROWS)(X), expected)
    assert ran == ["forward", "forward"]
    x = X.clone().requires_grad_()
    streamed(module, tuning=FEW_ROWS)(x).sum().backward()
    assert ran == ["forward", "forward", "forward", "backward"]


# torch.func


def sum_of(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).square().mean()


FUNCTIONAL: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda m: torch.func.vmap(m)(torch.stack([X, X * 2, X.flip(2)])),
    "vmap over the last dimension": lambda m: torch.func.vmap(m, in_dims=4, out_dims=1)(torch.stack([X, X * 2], 4)),
    "vmap in chunks": lambda m: torch.func.vmap(m, chunk_size=1)(torch.stack([X, X * 2])),
    "vmap within vmap": lambda m: torch.func.vmap(torch.func.vmap(m))(torch.stack([X, X * 2])[None]),
    "grad": lambda m: torch.func.grad(sum_of(m))(X),
    "grad and value": lambda m: torch.func.grad_and_value(sum_of(m))(X),
    "grad of each sample": lambda m: torch.func.vmap(torch.func.grad(lambda x: m(x[None]).square().mean()))(X),
    "vjp": lambda m: (lambda found: (found[0], found[1](torch.ones_like(found[0]))))(torch.func.vjp(m, X)),
    "jvp": lambda m: torch.func.jvp(m, (X,), (X.flip(2),)),
    "jacrev": lambda m: torch.func.jacrev(lambda x: m(x).mean((0, 2, 3)))(X),
    "jacfwd": lambda m: torch.func.jacfwd(lambda x: m(X * x).mean((0, 2, 3)))(torch.ones(4, 1, 1)),
    "hessian": lambda m: torch.func.hessian(lambda x: m(X * x).mean())(torch.ones(4, 1, 1)),
    "linearize": lambda m: torch.func.linearize(m, X)[1](X),
    "functionalize": lambda m: torch.func.functionalize(m)(X),
    "forward gradients": lambda m: forward_gradient(m),
}


def forward_gradient(module: Callable[[Tensor], Tensor]) -> Any:
    import torch.autograd.forward_ad as fw

    with fw.dual_level():
        primal, tangent = fw.unpack_dual(module(fw.make_dual(X, X.flip(2))))
        return primal, tangent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.parametrize("way", ["streamed", "stream"])
@pytest.mark.parametrize("off", [False, True], ids=["gradients on", "no_grad"])
def test_a_transform_of_a_streamed_module_gives_eagers_result_or_says_why_not(name: str, way: str, off: bool) -> None:
    module = net()

    def run() -> Any:
        if way == "streamed":
            return FUNCTIONAL[name](streamed(module, tuning=FEW_ROWS))
        with stream(module, tuning=FEW_ROWS):
            return FUNCTIONAL[name](module)

    with torch.set_grad_enabled(not off):
        try:
            expected = FUNCTIONAL[name](module)
        except (RuntimeError, AttributeError) as error:
            pytest.skip(f"eager does not: {error}")
        assert_as_eager_or_a_sentence(run, expected)
        assert_alike(module(X), net()(X))
        assert "forward" not in module.__dict__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["vmap", "vmap over the last dimension", "grad", "vjp", "jvp", "jacrev", "functionalize"]
)
def test_a_transform_within_a_streamed_program_gives_eagers_result_or_says_why_not(name: str) -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        before = inner(x)
        return FUNCTIONAL[name](inner), before, inner(x * 2)

    module = WithFunction(run)
    with torch.no_grad():
        expected = module(X)
        assert_as_eager_or_a_sentence(lambda: streamed(module, tuning=FEW_ROWS)(X), expected)


def test_vmap_over_deferred_maps_gives_eagers_result_or_says_why_not() -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        y = inner(x)
        return torch.func.vmap(lambda one: one * 2 + one.mean())(y), inner(x)

    module = WithFunction(run)
    with torch.no_grad():
        expected = module(X)
        assert_as_eager_or_a_sentence(lambda: streamed(module, tuning=FEW_ROWS)(X), expected)


def test_an_ensemble_by_vmap_and_functional_call() -> None:
    models = [net(seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[reportArgumentType]

    def run(x: Tensor) -> Tensor:
        def one(weights: Any, given: Any) -> Any:
            return torch.func.functional_call(models[0], (weights, given), (x,))

        return torch.func.vmap(one)(parameters, buffers)

    with torch.no_grad():
        expected = run(X)
        assert_as_eager_or_a_sentence(lambda: streamed(run, tuning=FEW_ROWS)(X), expected)


# Tracing and export


def traced(module: Any) -> Tensor:
    graph: Any = torch.jit.trace(module, X)
    return graph(X * 2)


def traced_for_other_sizes(module: Any) -> Tensor:
    graph: Any = torch.jit.trace(module, X, check_trace=False)
    return graph(OTHER)


def traced_within_another(module: Any) -> Tensor:
    graph: Any = torch.jit.trace(nn.Sequential(drawn(nn.Conv2d(4, 4, 1)), module), X)
    return graph(X * 2)


def scripted(module: Any) -> Tensor:
    return torch.jit.script(module)(X)


def exported(module: Any) -> Tensor:
    return torch.export.export(module, (X,)).module()(X * 2)


def exported_for_other_sizes(module: Any) -> Tensor:
    sizes = torch.export.Dim.AUTO  # type: ignore[reportAttributeAccessIssue]
    return torch.export.export(module, (X,), dynamic_shapes=({2: sizes, 3: sizes},)).module()(OTHER)


def traced_by_fx(module: Any) -> Tensor:
    return torch.fx.symbolic_trace(module)(X)


def made_by_fx(module: Any) -> Tensor:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(module)(X)(X * 2)


def with_fake_tensors(module: Any) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = module(mode.from_tensor(X))
    return tuple(found.shape), type(found).__name__


def with_meta_tensors(module: Any) -> Any:
    import copy

    found = copy.deepcopy(module).to("meta")(X.to("meta"))
    return tuple(found.shape), found.device.type


TRACES = [
    traced, traced_for_other_sizes, traced_within_another, scripted, exported, exported_for_other_sizes, traced_by_fx,
    made_by_fx, with_fake_tensors, with_meta_tensors,
]  # fmt: skip
SLOW_TRACES = (exported, exported_for_other_sizes, scripted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "trace",
    [pytest.param(one, marks=pytest.mark.slow) if one in SLOW_TRACES else one for one in TRACES],
    ids=lambda one: one.__name__,
)
def test_a_trace_of_a_streamed_module_is_eagers_or_is_refused_in_a_sentence(trace: Callable[[Any], Any]) -> None:
    module = net()
    with torch.no_grad():
        try:
            expected = trace(module)
        except Exception as error:
            pytest.skip(f"eager does not: {error}")

        def run() -> Any:
            with stream(module, tuning=FEW_ROWS):
                return trace(module)

        assert_as_eager_or_a_sentence(run, expected)
        assert "forward" not in module.__dict__
        assert_alike(trace(module), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", [traced, made_by_fx, with_fake_tensors], ids=lambda one: one.__name__)
def test_a_trace_of_a_streamed_function_is_eagers_or_is_refused_in_a_sentence(trace: Callable[[Any], Any]) -> None:
    module = net()
    with torch.no_grad():
        expected = trace(lambda x: module(x))
        run = streamed(lambda x: module(x), tuning=FEW_ROWS)
        assert_as_eager_or_a_sentence(lambda: trace(run), expected)
        assert_alike(run(X), module(X))


# Tensors that are something else besides, and modes of the caller's


class Noted(Tensor):
    """A subclass as torchvision's and others': it goes through every operator."""


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_a_subclass_of_tensor_goes_through_as_in_eager() -> None:
    module = net()
    with torch.no_grad():
        expected = module(X.as_subclass(Noted))
        result = streamed(module, tuning=FEW_ROWS)(X.as_subclass(Noted))
        assert type(result) is type(expected)
        assert_alike(result.as_subclass(Tensor), expected.as_subclass(Tensor))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_sparse_and_a_complex_and_a_quantised_input_are_as_in_eager() -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        dense = x.to_dense() if x.layout != torch.strided else x.abs() if x.is_complex() else x
        return inner(dense), x * 2

    module = WithFunction(run)
    for x in (X.to_sparse(), torch.complex(X, X * 2)):
        assert_as_eager(module, x)
    stored = torch.quantize_per_tensor(X, 0.05, 10, torch.quint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_alike(
            streamed(lambda x: module.inner(x.dequantize()), tuning=FEW_ROWS)(stored), module.inner(stored.dequantize())
        )


def test_a_mode_of_the_callers_around_and_within_sees_what_it_sees_in_eager() -> None:
    """A mode that counts what the program asks for; the values are eager's whatever it is."""
    module = net()
    with torch.no_grad():
        expected = module(X)
        with Seen() as eager:
            module(X)
        with Seen() as ours:
            assert_alike(streamed(module, tuning=FEW_ROWS)(X), expected)
        for name in ("conv2d", "group_norm", "silu"):
            assert ours.names.count(name) >= eager.names.count(name)

        def within(inner: nn.Module, x: Tensor) -> Any:
            with Seen() as seen:
                y = inner(x)
            return y, [name for name in seen.names if name in ("conv2d", "group_norm", "silu")]

        assert_as_eager(WithFunction(within), X)


def test_a_counter_of_operations_around_a_streamed_call() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module = net()
    with torch.no_grad():
        expected = module(X)
        with FlopCounterMode(display=False) as counter:
            assert_alike(streamed(module, tuning=FEW_ROWS)(X), expected)
    assert counter.get_total_flops() > 0


def test_a_profiler_around_a_streamed_call() -> None:
    module = net()
    with torch.no_grad():
        expected = module(X)
        with torch.profiler.profile() as profile:
            assert_alike(streamed(module, tuning=FEW_ROWS)(X), expected)
    assert profile.key_averages()


@pytest.mark.parametrize("where", ["around", "within", "a part"])
def test_autocast_gives_eagers_types_and_values(where: str) -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        if where == "around":
            return inner(x), inner[0](x)  # type: ignore[reportIndexIssue]
        with torch.autocast("cpu", torch.bfloat16):
            y = inner[0](x)  # type: ignore[reportIndexIssue]
            if where == "within":
                return inner(x), y, y.mean(), torch.bmm(y.flatten(2).transpose(1, 2), y.flatten(2))
        return y, inner[1](y.float()), y * 2  # type: ignore[reportIndexIssue]

    module = WithFunction(run)
    with torch.no_grad():
        around = torch.autocast("cpu", torch.bfloat16) if where == "around" else torch.autocast("cpu", enabled=False)
        with around:
            expected = module(X)
            result = streamed(module, tuning=FEW_ROWS)(X)
    assert_alike(result, expected, 3e-2)


class Scaled(torch.autograd.Function):
    """Keeps its arguments for a gradient that nobody asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


def test_functions_that_save_maps_for_gradients_run() -> None:
    """Gradients are on, and weights ask for them: the result has none, and no exception comes."""
    weight = nn.Parameter(torch.full((1,), 3.0))
    runs: dict[str, Any] = {
        "of an argument": lambda inner, x: Scaled.apply(x, weight),
        "of a map": lambda inner, x: Scaled.apply(inner(x), weight),
        "a checkpoint": lambda inner, x: checkpoint(inner, x * 2, use_reentrant=False),
    }
    for name, run in runs.items():
        module = WithFunction(run)
        result = streamed(module, tuning=FEW_ROWS)(X)
        assert not result.requires_grad, name
        with torch.no_grad():
            assert_alike(result, module(X), 1e-5)


def test_forward_gradients_within_the_program() -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        with forward_ad.dual_level():
            y = inner(x)
            dual = forward_ad.make_dual(y, torch.ones(y.shape))
            return forward_ad.unpack_dual(torch.sin(dual)).tangent

    module = WithFunction(run)
    with torch.no_grad():
        assert_alike(streamed(module, tuning=FEW_ROWS)(X), module(X), 1e-5)
        jvp = WithFunction(lambda inner, x: torch.func.jvp(torch.sin, (inner(x),), (inner(x),))[1])
        with pytest.raises(RuntimeError, match=r"torch\.func\.jvp was given a map"):
            streamed(jvp, tuning=FEW_ROWS)(X)


@pytest.mark.skipif(not hasattr(torch, "cond"), reason="torch.cond is new in torch 2.4")
def test_operators_that_take_functions() -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        y = inner(x)
        return torch.cond(y.sum() > 0, lambda z: z.sin(), lambda z: z.cos(), (y,)) + y

    module = WithFunction(run)
    with torch.no_grad():
        assert_alike(streamed(module, tuning=FEW_ROWS)(X), module(X), 1e-5)


def test_autocast_is_what_it_was_where_an_operator_was_called() -> None:
    """Not what it is where values are demanded."""
    convolution, linear = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(7, 7)

    def without_within(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return linear(convolution(x)) * 1.0

    def demanded_within(x: Tensor) -> Tensor:
        y = convolution(x)
        with torch.autocast("cpu", torch.bfloat16):
            y.mean().item()
        return y

    with torch.no_grad():
        for run, around in ((without_within, True), (demanded_within, False)):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                assert_alike(streamed(run, tuning=FEW_ROWS)(X), run(X), 1e-5)


def test_a_default_device_and_dtype_around_a_streamed_call() -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        return inner(x), torch.zeros(3), torch.ones(2).device.type

    module = WithFunction(run)
    with torch.no_grad(), torch.device("cpu"):
        assert_as_eager(module, X)
    torch.set_default_dtype(torch.float64)
    try:
        assert_as_eager(module, X)
    finally:
        torch.set_default_dtype(torch.float32)


def test_deterministic_algorithms_are_kept() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert_as_eager(WithFunction(lambda inner, x: inner(x).cumsum(2)), X)
    finally:
        torch.use_deterministic_algorithms(False)


# Compilation


def dynamo_works() -> bool:
    with suppress(Exception), torch.no_grad():
        return float(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(()))) == 1.0
    return False


@pytest.fixture
def dynamo() -> Any:
    if not dynamo_works():
        pytest.skip("torch.compile is not usable here: Dynamo does not run on this Python or this machine.")
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the module in place", "a module around it", "a layer within it", "the function"])
def test_a_compiled_module_runs_right_and_quietly(what: str, dynamo: Any, capfd: pytest.CaptureFixture[str]) -> None:
    module, outer = net(), None
    with torch.no_grad():
        expected = module(X)
        call: Callable[[Tensor], Any] = module
        if what == "the module in place" and not hasattr(nn.Module, "compile"):
            pytest.skip("Modules of this torch are not compiled in place.")
        elif what == "the module in place":
            module.compile(backend="eager")
        elif what == "a layer within it":
            module[0] = torch.compile(module[0], backend="eager")
        elif what == "a module around it":
            outer = nn.Sequential(module)
            call = torch.compile(outer, backend="eager")  # type: ignore[reportAssignmentType]
        else:
            call = torch.compile(lambda x: module(x), backend="eager")
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with stream(module, tuning=FEW_ROWS):
                assert_alike(call(X), expected)
                assert_alike(call(X), expected)
        assert_alike(call(X), expected)
    spoken = capfd.readouterr()
    assert "Traceback" not in spoken.err + spoken.out
    assert "Exception ignored" not in spoken.err + spoken.out
    assert not [str(one.message) for one in said if "stream" in str(one.message).lower()]


@pytest.mark.slow
def test_a_streamed_function_of_a_compiled_module_and_the_other_way_round(dynamo: Any) -> None:
    module = net()
    with torch.no_grad():
        expected = module(X)
        compiled: Any = torch.compile(module, backend="eager")
        assert_alike(streamed(compiled, tuning=FEW_ROWS)(X), expected)
        around: Any = torch.compile(streamed(module, tuning=FEW_ROWS), backend="eager")
        assert_alike(around(X), expected)
        assert_alike(around(OTHER), module(OTHER))


@pytest.mark.slow
def test_a_program_that_compiles_within_its_call(dynamo: Any) -> None:
    def run(inner: nn.Module, x: Tensor) -> Any:
        pointwise: Any = torch.compile(lambda y: F.silu(y) * 2 + y.mean(), backend="eager")
        return inner(pointwise(inner[0](x))[:, :4]), pointwise(x)  # type: ignore[reportIndexIssue]

    assert_as_eager(WithFunction(run), X)


@pytest.mark.slow
def test_a_compiled_decoder_of_a_vae_streams_right_and_quietly(dynamo: Any, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    if not hasattr(nn.Module, "compile"):
        pytest.skip("Modules of this torch are not compiled in place.")
    from model_zoo import draw_weights, image, kl

    vae: Any = draw_weights(kl(4))
    latent = image(4, 19, 16)
    with torch.no_grad():
        expected = vae.decode(latent).sample
        vae.decoder.compile(backend="eager")
        capfd.readouterr()
        with stream(vae.decoder, tuning=FEW_ROWS):
            assert_alike(vae.decode(latent).sample, expected)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_exporting_and_streaming_at_once_leave_each_other_alone() -> None:
    """A program that was exported before is called within a streamed one."""
    module = net()
    try:
        program: Any = torch.export.export(module, (X,)).module()
    except Exception as error:
        pytest.skip(f"torch.export does not work here: {error}")
    assert_as_eager(lambda x: program(x * 2) + program(x), X)
