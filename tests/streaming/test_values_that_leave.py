"""Values that leave the dispatcher: numpy, lists, numbers, pointers, dlpack, shared memory, copies and pickles of maps.

Each is evaluated first and then gives eager's answer, in the middle of a call as well as after it.
"""

from __future__ import annotations

import copy
import ctypes
import io
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from products import crossed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import dlpack

from comfyui_patchconv.streaming import Tuning, streamed

from .comparing import FEW_ROWS, MODES, ONE_ROW, TUNINGS, Mode, assert_alike, assert_as_eager, assert_ordinary

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6, requires_grad=False)
X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))
Look = Callable[[Tensor], Any]
REFUSES_MEMORY = hasattr(torch._C, "_set_throw_on_mutable_data_ptr")
"""Whether this torch raises where C++ code asks a deferred tensor for its memory: 2.2 and later."""


def c(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT.to(x.dtype), padding=1)


def by_pointer(y: Tensor) -> list[float]:
    """What a kernel of C's reads where the pointer says."""
    pointer = y.data_ptr()
    if not pointer:
        raise AssertionError("A kernel was handed the pointer 0.")
    floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
    return [floats[index] for index in range(3)]


def in_place_by_pointer(y: Tensor) -> Tensor:
    floats = ctypes.cast(y.data_ptr(), ctypes.POINTER(ctypes.c_float))
    floats[0], floats[1] = 5.0, 6.0
    return y * 2


def saved_and_loaded(y: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved_in_a_dictionary(y: Tensor) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save({"y": y, "part": y[:, 1:]}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved_as_safetensors(y: Tensor) -> dict[str, Tensor]:
    from safetensors.torch import load, save

    return load(save({"y": y.contiguous()}))


def shared_memory_is_shared(y: Tensor) -> tuple[Tensor, bool]:
    z = y.share_memory_()
    return z * 2, z.is_shared()


def as_an_image(y: Tensor) -> np.ndarray:
    image: Any = pytest.importorskip("PIL.Image")
    pixels = (y[0, 0].clamp(0, 1) * 255).floor().to(torch.uint8).numpy()
    return np.asarray(image.fromarray(pixels).rotate(90, expand=True))


def read_from_a_file(y: Tensor) -> Tensor:
    file = io.BytesIO()
    np.save(file, y.numpy())
    file.seek(0)
    return torch.from_numpy(np.load(file))


def in_a_custom_operator(y: Tensor) -> Tensor:
    """An operator with a kernel in numpy, that says nothing about how it works on shapes."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, given: Tensor) -> Tensor:
            return torch.from_numpy(np.flip(given.numpy(), 2).copy())

    return Kernel.apply(y)  # type: ignore[reportReturnType]


def indexed_by_its_maximum(y: Tensor) -> Tensor:
    row = int(y.sum((0, 1, 3)).argmax())
    return y[:, :, row:]


def formatted(y: Tensor) -> tuple[str, ...]:
    return f"{y.mean():.2f}", f"{y[0, 0, 0, 0]:.2f}", format(y.amax(), ".2f"), f"{y.shape} {y.dtype}"


def printed(y: Tensor) -> tuple[str, ...]:
    z = (y * 0).round()
    return repr(z[0, 0, :2, :2]), str(z[0, 0, 0]), repr(z.shape)


def iterated(y: Tensor) -> list[Any]:
    return [[float(row.mean()) for row in one] for one in y]


def unpacked(y: Tensor) -> tuple[Tensor, Tensor]:
    one, other = y
    return other, one


def in_a_loop(y: Tensor) -> tuple[int, Tensor]:
    steps = 0
    while y.abs().mean() < 5:
        y, steps = y * 2, steps + 1
    return steps, y


def compared(y: Tensor) -> tuple[Any, ...]:
    return (
        torch.equal(y, y.clone()), torch.equal(y, y + 1), torch.allclose(y, y * (1 + 1e-9)), bool((y == y).all()),
        bool((y > 100).any()), y.isnan().any().item(), (y < 0).sum().item(), not y.mean().isnan(), y is y,
    )  # fmt: skip


def in_collections(y: Tensor) -> tuple[Any, ...]:
    named = {y: "y"}
    maps = [y, y * 2]
    return y in named, named[y], y in {y}, hash(y) == hash(y), [m is y for m in maps]


def what_it_says_of_itself(y: Tensor) -> tuple[Any, ...]:
    part = y[:, 1:, ::2]
    return (
        y.shape, y.dim(), y.ndim, y.numel(), y.nelement(), len(y), y.dtype, y.device, str(y.layout),
        y.is_floating_point(), y.element_size(), y.nbytes, y.stride(), y.is_contiguous(), y.size(1), y.requires_grad,
        y.grad, y.is_leaf, y.grad_fn, y.is_sparse, y.is_quantized, y.is_meta, y.is_cuda, y.type(), y.is_complex(),
        y.is_signed(), part.shape, part.stride(), part.storage_offset(), part.is_contiguous(),
        part.untyped_storage().nbytes(), y.is_shared(), y.is_pinned(), y.get_device(), y.itemsize,
        isinstance(y, Tensor), torch.is_tensor(y), torch.is_storage(y), y.dtype.itemsize, y.is_conj(), y.is_neg(),
    )  # fmt: skip


def storages(y: Tensor) -> tuple[Any, ...]:
    part = y[:, 1:]
    same = part.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    return same, part.data_ptr() - y.data_ptr(), y.untyped_storage().nbytes(), len(y.untyped_storage()) > 0


def bytes_of_its_storage(y: Tensor) -> np.ndarray:
    return np.frombuffer(bytes(y.contiguous().untyped_storage()), dtype=np.float32).copy()  # type: ignore[reportArgumentType]


def no_pointer_of_a_gpu(y: Tensor) -> bool:
    return hasattr(y, "__cuda_array_interface__")


def whose_arrays_are_its_memory(y: Tensor) -> tuple[Any, ...]:
    """numpy writes and torch sees it, and the other way round."""
    array = y.numpy()
    array[:, 0] = 3
    doubled = y * 2
    y[:, 1] = 4
    return doubled, array[:, 1].copy(), y + 0, np.shares_memory(array, y.numpy())


def whose_capsule_is_its_memory(y: Tensor) -> tuple[Any, ...]:
    other = torch.from_dlpack(y)
    other[:, 0].fill_(3)
    doubled = y * 2
    y[:, 1] = 4
    return doubled, other * 1


def written_to_from_numpy(y: Tensor) -> tuple[Any, ...]:
    y.copy_(torch.from_numpy(np.arange(y.numel(), dtype=np.float32).reshape(y.shape)))
    array = np.zeros((9, 7), dtype=np.float32)
    np.copyto(array, y[0, 0].numpy())
    np.add(array, y[1, 1], out=array)
    return y * 2, array


def numpy_functions(y: Tensor) -> tuple[Any, ...]:
    ones = np.ones(7, dtype=np.float32)
    return (
        np.mean(y.numpy()), np.abs(np.asarray(y)).sum(), np.array(y).shape, np.add(y, 1.0), np.stack([y[0], y[1]]),  # type: ignore[reportCallIssue]
        np.percentile(y, 50), ones * y.numpy(), np.array([y.amax(), y.abs().sum()]), np.asarray(y, dtype=np.float64),
    )  # fmt: skip


def numbers(y: Tensor) -> tuple[Any, ...]:
    one = y.mean()
    return (
        float(one), int(one * 10), bool(one), complex(one), one.item(), math.floor(one), round(float(one), 2),
        operator.index(y.argmax()), [0] * int((y[0, 0, 0] > 0).sum()), math.exp(one), 2.0**one,
        max(y.mean(), y.abs().sum()) * 1,
    )  # fmt: skip


def lists(y: Tensor) -> tuple[Any, ...]:
    return y.tolist(), y[0, 0].tolist(), max(y.flatten().tolist()), y.shape[0] * y[0, 0, 0].tolist(), y.mean().tolist()


def tensors_made_of_it(y: Tensor) -> tuple[Any, ...]:
    return (
        torch.tensor(y.tolist()), torch.as_tensor(y) * 1, torch.asarray(y, copy=True), y.new_tensor([1.0, 2.0]),
        torch.tensor([float(y.mean()), 2.0]), torch.tensor([one.item() for one in y[0, 0, 0]]), y.new_zeros(3),
        torch.stack([y.mean(), y.sum()]), y.new_full((2, 2), float(y.amax())), torch.full((2,), y.mean().item()),
    )  # fmt: skip


def numbers_where_no_operator_is_seen(y: Tensor) -> tuple[Any, ...]:
    one, whole = y.mean(), (y * 9).sum().long()
    all_of: Any = (y > -9).all()
    return (
        torch.tensor([one, y.std()]), torch.tensor([[one], [2]]), torch.tensor([whole, 3]), y.new_tensor(one),
        torch.tensor([all_of, False]), torch.tensor([torch.complex(y, y).sum(), 1]), y.new_tensor(y),
        torch.tensor([one], dtype=torch.float16), y.new_tensor([one, 2]), y.new_tensor(data=[one, 2]),
        torch.as_tensor([one, 1.0]), torch.asarray([one, 1.0]), torch.Tensor([one, 2]), torch.FloatTensor([one, 2]),
        torch.LongTensor([whole, 2]), np.array([float(one), y.std()]), torch.full((3,), one.item()),
        torch.linspace(y.amin(), y.amax(), 3), torch.zeros(int(all_of) + 1, all_of + 1), bytes([all_of]),
        "ab"[all_of], f"{one:.3f}",
    )  # fmt: skip


def copies(y: Tensor) -> tuple[Any, ...]:
    z = copy.deepcopy(y)
    both = copy.deepcopy([y, y[:, 1:]])
    y.mul_(2)
    return z, copy.copy(z), both, copy.deepcopy({"y": y}), z.__deepcopy__({}), y


def pickles(y: Tensor) -> tuple[Any, ...]:
    return (
        pickle.loads(pickle.dumps(y)), pickle.loads(pickle.dumps([y, y[:, 1:]])), pickle.loads(pickle.dumps(y.mean())),
        type(pickle.loads(pickle.dumps(y))) is Tensor,
    )  # fmt: skip


to_capsule: Any = dlpack.to_dlpack if REFUSES_MEMORY else Tensor.__dlpack__  # type: ignore[reportPrivateImportUsage]
"""Torch 2.1's own function ends the process where a tensor has no memory."""


def capsules(y: Tensor) -> tuple[Any, ...]:
    return (
        torch.from_dlpack(y) * 2, torch.from_dlpack(y[:, 1:]) * 2, np.from_dlpack(y).copy(),
        y.__dlpack_device__()[0] == 1, dlpack.from_dlpack(to_capsule(y)) * 3,  # type: ignore[reportPrivateImportUsage]
    )  # fmt: skip


def chosen_by_values(y: Tensor) -> tuple[Any, ...]:
    return (
        y[y > 0.1], y.nonzero(), (y > 0.5).nonzero(as_tuple=True), torch.masked_select(y, y < 0), torch.argwhere(y > 1),
        (y > 0).unique(), y.topk(3, 1)[1], y.argmax(1), y.sort(2)[1], torch.bincount((y > 0).long().flatten()),
        torch.histc(y, 4, -2, 2).sum(), y.kthvalue(2, 2)[0], y.median(),
        torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), y),
    )  # fmt: skip


def elsewhere(y: Tensor) -> tuple[Any, ...]:
    return y.to_sparse().to_dense(), y.to("meta").shape, y.cpu() * 1, y.to_sparse().sum().item(), F.relu(y).to_sparse()


def element_by_element(y: Tensor) -> tuple[Any, ...]:
    z = y.clone().apply_(lambda value: value * 2 + 1)
    return z, y.clone().map_(z, lambda one, other: one + other)


def as_a_python_scalar_of_an_operator(y: Tensor) -> tuple[Any, ...]:
    return (
        y.clamp(min=float(y.mean())),
        torch.add(y, y, alpha=float(y.amax())),
        F.pad(y, (int(y.amax() > 0),) * 4),
        y[: int((y > 50).sum()) + 1],
    )


def weakly_and_attributes(y: Tensor) -> tuple[Any, ...]:
    import weakref

    there = weakref.ref(y)
    y.note = "written on it"  # type: ignore[reportAttributeAccessIssue]
    return there() is y, y.note, y.__class__ is type(y), "note" in y.__dict__  # type: ignore[reportAttributeAccessIssue]


LOOKS: dict[str, Look] = {
    "numpy": lambda y: y.numpy().copy(),
    "numpy of a part": lambda y: y[:, 1:, ::2].numpy().copy(),
    "numpy by force": lambda y: y.numpy(force=True).copy(),
    "detached numpy": lambda y: y.detach().cpu().numpy().std(),
    "numpy of tokens": lambda y: y.flatten(2).transpose(1, 2).numpy().strides,
    "asarray": lambda y: np.asarray(y).copy(),
    "array": lambda y: np.array(y),
    "array of a mean": lambda y: np.array(y.mean((2, 3))),
    "memoryview": lambda y: memoryview(y.numpy()).nbytes,  # type: ignore[reportArgumentType]
    "from_numpy": lambda y: torch.from_numpy(y.numpy()) * 2,
    "tolist": lambda y: y.tolist(),
    "item": lambda y: y.std().item(),
    "item of a pixel": lambda y: y[0, 1, 2, 3].item(),
    "float": lambda y: float(y.mean()),
    "bool": lambda y: bool(y.mean() > 0),
    "bool of one element": lambda y: bool(y[:1, :1, :1, :1]),
    "int": lambda y: int(y.argmax()),
    "in a branch": lambda y: y * 2 if y.mean() > 0 else y * 3,
    "pointer": by_pointer,
    "pointer of a part": lambda y: by_pointer(y[:, 1:]),
    "pointer of tokens": lambda y: by_pointer(y.flatten(2).transpose(1, 2).contiguous()),
    "pointer of a storage": lambda y: y.untyped_storage().data_ptr() != 0,
    "pointer of a typed storage": lambda y: len(y.storage()) if hasattr(y, "storage") else 0,
    "capsule": lambda y: torch.from_dlpack(y) * 2,
    "shared": shared_memory_is_shared,
    "deepcopy": lambda y: copy.deepcopy(y) * 2,
    "copy": lambda y: copy.copy(y) * 2,
    "reduced": lambda y: len(y.__reduce_ex__(2)),
    "torch.Tensor.__array__": lambda y: y.__array__().copy(),
}
LOOKS |= {
    function.__name__: function
    for function in (
        in_place_by_pointer,
        saved_and_loaded,
        saved_in_a_dictionary,
        saved_as_safetensors,
        as_an_image,
        read_from_a_file,
        in_a_custom_operator,
        indexed_by_its_maximum,
        formatted,
        printed,
        iterated,
        unpacked,
        in_a_loop,
        compared,
        in_collections,
        what_it_says_of_itself,
        storages,
        bytes_of_its_storage,
        no_pointer_of_a_gpu,
        whose_arrays_are_its_memory,
        whose_capsule_is_its_memory,
        written_to_from_numpy,
        numpy_functions,
        numbers,
        lists,
        tensors_made_of_it,
        numbers_where_no_operator_is_seen,
        copies,
        pickles,
        capsules,
        chosen_by_values,
        elsewhere,
        element_by_element,
        as_a_python_scalar_of_an_operator,
        weakly_and_attributes,
    )
}


@pytest.mark.filterwarnings("ignore")
@crossed(2, name=list(LOOKS), tuning=TUNINGS, mode=MODES)
def test_a_look_at_a_map_in_the_middle_gives_what_eager_gives(name: str, tuning: Tuning, mode: Mode) -> None:
    """The program goes on behind it, with the map that was looked at."""

    def run(x: Tensor) -> Any:
        y = c(x)
        found = LOOKS[name](y)
        return found, c(F.group_norm(y, 2)), y

    assert_as_eager(run, X, tuning=tuning, mode=mode)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_what_is_deferred_further_gives_what_eager_gives(name: str) -> None:
    """At a map behind a norm, a write in place, an upsampling and a channels_last layout, within a budget."""

    def run(x: Tensor) -> Any:
        y = F.silu(F.group_norm(c(x), 2))
        y[:, :1].mul_(2)
        y = c(F.interpolate(y, scale_factor=2.0, mode="nearest"))[:, :, ::2, ::2].contiguous()
        return LOOKS[name](y), y + 1

    assert_as_eager(run, X, budget=1, tuning=ONE_ROW)
    assert_as_eager(run, X.contiguous(memory_format=torch.channels_last))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_a_map_that_was_kept_works_after_the_call(name: str) -> None:
    kept: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        kept.append(c(x))
        return c(kept[-1]) * 2

    with torch.no_grad():
        run(X)
        streamed(run, tuning=FEW_ROWS)(X)
        for tensor in kept:
            assert_ordinary(tensor)
        assert_alike(LOOKS[name](kept[1]), LOOKS[name](kept[0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_the_argument_gives_what_eager_gives(name: str) -> None:
    def run(x: Tensor) -> Any:
        y = c(x)
        found = LOOKS[name](x)
        return y, found, c(x)

    assert_as_eager(run, X)


@pytest.mark.parametrize("name", ["numpy", "tolist", "pointer", "capsule", "shared", "deepcopy", "item"])
def test_a_look_in_a_hook_gives_what_eager_gives(name: str) -> None:
    def fresh() -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3)).requires_grad_(False)
        said: list[Any] = []
        for module in net:
            module.register_forward_hook(lambda module, args, out: said.append(LOOKS[name](out)))
        return net, said

    (eager, expected), (ours, said) = fresh(), fresh()
    with torch.no_grad():
        assert_alike(streamed(ours, tuning=ONE_ROW)(X), eager(X))
    assert_alike(said, expected)


def test_a_map_looked_at_often_is_right_each_time() -> None:
    def run(x: Tensor) -> Any:
        y, said = c(x), []
        for step in range(6):
            said.append(float(y.mean()))
            y = c(y) + y
            said.append(y.numpy().sum())
            y.mul_(0.5)
            said.append(y[:, step % 4].tolist())
        return y, said

    for tuning in TUNINGS.values():
        assert_as_eager(run, X, tuning=tuning)


def test_a_part_whose_map_was_looked_at_shares_its_memory() -> None:
    def run(x: Tensor) -> Any:
        y = c(x)
        part, tokens = y[:, 1:3], y.flatten(2)
        array = y.numpy()
        part.mul_(2)
        array[:, 0] = 1
        tokens[:, :, 0] = 9
        return array.copy(), part, tokens, c(y)

    assert_as_eager(run, X)


def test_what_eager_refuses_is_refused_alike() -> None:
    def run(x: Tensor) -> Any:
        y, said = c(x), []
        for attempt in (
            lambda: bool(y),
            lambda: y.item(),
            lambda: int(y),
            lambda: len(y.mean()),
            lambda: y.__cuda_array_interface__,
            lambda: iter(y.mean()),
            lambda: range(y.mean()),  # type: ignore[reportArgumentType]
            lambda: y.nothing_of_that_name,  # type: ignore[reportAttributeAccessIssue]
            lambda: torch.from_numpy(y),  # type: ignore[reportArgumentType]
            lambda: y.numpy().resize(3),
        ):
            try:
                attempt()
                said.append("nothing")
            except Exception as error:
                said.append(type(error).__name__)
        return c(y), said

    assert_as_eager(run, X)


class Summed:
    """What is no tensor and knows what to do with one."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        this = next(one for one in args if isinstance(one, Summed))
        this.seen.append(getattr(func, "__name__", str(func)))
        return next(one for one in args if isinstance(one, Tensor)) * 2


def test_a_map_meets_what_is_no_tensor_but_takes_part() -> None:
    def run(x: Tensor) -> Any:
        y, other = c(x), Summed()
        return torch.add(y, other), other.seen  # type: ignore[reportCallIssue]

    assert_as_eager(run, X)


@pytest.mark.skipif(not hasattr(torch.library, "custom_op"), reason="this torch has no torch.library.custom_op")
def test_an_operator_of_a_library_of_its_own_gets_real_values() -> None:
    name = "patchconv_tests::flipped"
    seen: list[bool] = []

    def kernel(x: Tensor, times: float) -> Tensor:
        seen.append(x.data_ptr() != 0)
        return torch.from_numpy(np.flip(x.numpy(), 2).copy()) * times

    op = torch.library.custom_op(name, kernel, mutates_args=(), schema="(Tensor x, float times) -> Tensor")

    def run(x: Tensor) -> Tensor:
        return c(op(c(x), 2.0))

    assert_as_eager(run, X)
    assert all(seen)


@pytest.mark.skipif(not hasattr(torch.library, "custom_op"), reason="this torch has no torch.library.custom_op")
def test_an_operator_of_a_library_of_its_own_writes_in_place() -> None:
    def kernel(x: Tensor) -> None:
        x.numpy()[:] *= 2

    op = torch.library.custom_op(
        "patchconv_tests::doubled_", kernel, mutates_args=("x",), schema="(Tensor(a!) x) -> ()"
    )

    def run(x: Tensor) -> Any:
        y = c(x)
        z = y * 1
        op(y)
        op(x)
        return y, z, c(y), x * 1

    assert_as_eager(run, X)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_function_gets_real_values() -> None:
    if not hasattr(torch.jit, "script"):
        pytest.skip("this torch has no torch.jit.script")
    graph: Any = torch.jit.trace(lambda y: torch.relu(y) * 2 + y.mean(), torch.randn(2, 4, 9, 7))
    assert_as_eager(lambda x: c(graph(c(x))), X)


@pytest.mark.skipif(not REFUSES_MEMORY, reason="torch 2.1 cannot refuse it")
def test_a_capsule_that_nobody_is_asked_for_is_refused() -> None:
    """`to_dlpack` is a function of C++ that no subclass sees: it used to end the process."""

    def run(x: Tensor) -> Tensor:
        y = F.conv2d(x, torch.ones(4, 4, 3, 3), padding=1)
        with pytest.raises(RuntimeError, match="data pointer"):
            dlpack.to_dlpack(y)  # type: ignore[reportPrivateImportUsage]
        return y * 2

    x = torch.randn(1, 4, 16, 12)
    assert torch.allclose(streamed(run, tuning=FEW_ROWS)(x), F.conv2d(x, torch.ones(4, 4, 3, 3), padding=1) * 2)


def test_a_tensor_does_not_take_the_memory_of_a_deferred_map() -> None:
    """`plain.data = map` used to leave a tensor without memory, whose next use ended the process."""
    plain = torch.ones(9)

    def run(x: Tensor) -> Tensor:
        y = F.conv2d(x, torch.ones(4, 4, 3, 3), padding=1)
        with pytest.raises(RuntimeError, match="incompatible tensor type"):
            plain.data = y.flatten()[:9]
        return y + plain.sum()

    with torch.inference_mode():
        x = torch.randn(1, 4, 16, 12)
        assert torch.allclose(streamed(run, tuning=FEW_ROWS)(x), F.conv2d(x, torch.ones(4, 4, 3, 3), padding=1) + 9)
