"""Transforms of `torch.func`, and what records a call to run it with other sizes: as eager while patched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, functionalize, grad, jvp, linearize, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from comfyui_patchconv import patched

GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randn(3, 2, 4, 15, 12, generator=GENERATOR)
IMAGE, OTHER = IMAGES[0], torch.randn(2, 4, 22, 18, generator=GENERATOR)
SETTINGS = [{}, {"sequential": False}, {"padding": "partial"}]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


def within(settings: dict[str, Any], splits: int) -> Any:
    """A network in strips, or whole with the same borders."""
    return patched(network(), splits, threshold=0 if splits > 1 else 10**9, **settings)


def of_weights(model: nn.Module) -> Tensor:
    weights, _ = stack_module_state([network(), network()])
    return vmap(lambda one: functional_call(model, one, (IMAGE,)))(weights)


def of_each_sample(model: nn.Module) -> Tensor:
    weights = {name: value.detach() for name, value in model.named_parameters()}
    loss = vmap(grad(lambda one, x: functional_call(model, one, (x,)).square().sum()), (None, 0))
    return torch.cat([value.flatten() for value in loss(weights, IMAGES).values()])


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda model: vmap(model)(IMAGES),
    "vmap of the batch": lambda model: vmap(model, in_dims=1)(IMAGES),
    "vmap of single images": lambda model: vmap(model)(IMAGE),
    "vmap in vmap": lambda model: vmap(vmap(model))(IMAGES.unsqueeze(1)),
    "vmap of weights": of_weights,
    "functional_call": lambda model: functional_call(model, dict(network().named_parameters()), (IMAGE,)),
    "grad": lambda model: grad(lambda x: model(x).square().sum())(IMAGE),
    "gradients of each sample": of_each_sample,
    "jvp": lambda model: jvp(model, (IMAGE,), (OTHER[..., :15, :12],))[1],
    "linearize": lambda model: linearize(model, IMAGE)[1](IMAGE),
    "functionalize": lambda model: functionalize(model)(IMAGE),
    "jacobian": lambda model: jacobian(lambda x: model(x).sum((0, 2, 3)), IMAGE, vectorize=True),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_what_they_give_of_eager(name: str, gradients: bool, settings: dict[str, Any]) -> None:
    if name == "linearize" and gradients and "padding" in settings:
        pytest.skip("torch computes beforehand what is scaled in place, and refuses it")
    with torch.set_grad_enabled(gradients):
        with within(settings, 1) as model:
            expected = TRANSFORMS[name](model)
        with within(settings, 3) as model:
            assert_same(TRANSFORMS[name](model).detach(), expected.detach(), 1e-5)


def test_many_gradients_at_once_are_eagers() -> None:
    model, image, many = network(), IMAGE.clone().requires_grad_(), torch.randn(2, 2, 3, 15, 12)
    leaves = [image, *model.parameters()]
    expected = torch.autograd.grad(model(image), leaves, many, is_grads_batched=True)
    with patched(model, 3, threshold=0):
        actual = torch.autograd.grad(model(image), leaves, many, is_grads_batched=True)
    for ours, eager in zip(actual, expected, strict=True):
        assert_same(ours, eager, 1e-5)


def exported(model: Any, **options: Any) -> Any:
    if not hasattr(torch.export, "Dim") or not hasattr(torch.export.Dim, "AUTO"):
        pytest.skip("this torch exports with sizes that are free by another way")
    free = torch.export.Dim.AUTO
    return torch.export.export(model, (IMAGE,), dynamic_shapes=({2: free, 3: free},), **options).module()


class Through(torch.fx.Tracer):
    """Records what is within modules too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def make_symbolic(model: nn.Module) -> Any:
    make: Any = make_fx
    return make(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(IMAGE)


RECORDS: dict[str, Callable[[nn.Module], Any]] = {
    "trace": lambda model: torch.jit.trace(model, IMAGE),
    "trace unchecked": lambda model: torch.jit.trace(model, IMAGE, check_trace=False),
    "freeze": lambda model: torch.jit.freeze(torch.jit.trace(model.eval(), IMAGE)),
    "export": exported,
    "export strict": lambda model: exported(model, strict=True),
    "make_fx": lambda model: make_fx(model)(IMAGE),
    "make_fx symbolic": make_symbolic,
    "fx": lambda model: torch.fx.GraphModule(model, Through().trace(model)),
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True, dynamic=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", RECORDS)
def test_what_is_recorded_while_patched_takes_other_sizes(name: str, gradients: bool) -> None:
    model = network()
    with torch.set_grad_enabled(gradients):
        expected = model(OTHER)
        with patched(model, 3, threshold=0):
            recorded: Any = RECORDS[name](model)
        assert_same(recorded(OTHER).detach(), expected.detach(), 1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padding", ["plain", "partial"])
def test_what_watches_strips_is_not_compiled(padding: str) -> None:
    """What it does may be nothing that a compiler can read, and would break up what is compiled at each convolution."""
    if not hasattr(torch.compiler, "is_compiling"):
        pytest.skip("this torch's compiler reads no convolution: it calls it as it is")
    told: list[object] = []
    lock = threading.Lock()

    def watch(*_: object) -> None:
        with lock:
            told.append(threading.get_native_id())

    model = network()
    with torch.no_grad(), patched(model, 3, threshold=0, padding=padding, on_strip=watch):
        expected = model(IMAGE)
        assert told
        told.clear()
        recorded: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert_same(recorded(IMAGE), expected, 1e-5)
    assert not told
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_borders_that_are_scaled_are_recorded_too() -> None:
    with torch.no_grad(), patched(network(), 3, threshold=0, padding="partial") as model:
        traced: Any = torch.jit.trace(model, IMAGE)
        assert_same(traced(OTHER), model(OTHER), 1e-5)
        assert_same(exported(model)(OTHER), model(OTHER), 1e-5)
