"""Copies made within a block carry nothing of ours; blocks that overlap undo in any order; objects without forward."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import pytest
import torch
from processes import LIMIT
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv import convert_model, patched, restore_model
from comfyui_patchconv.streaming import Tuning, stream, streamed
from comfyui_patchconv.streaming.target import Entry

from .comparing import FEW_ROWS, ONE_ROW, TUNINGS, Progress, assert_alike

X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))
LATENT = torch.randn(1, 4, 19, 16, generator=torch.Generator().manual_seed(1))


def drawn(module: nn.Module, seed: int = 0) -> Any:
    """The module with seeded weights, for evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1.0
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / scale)
    return module.eval().requires_grad_(False)


class Net(nn.Module):
    """Small, and of a class that pickle finds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 3)
        self.copies: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        if self.copies is not None:
            self.copies.append(copy.deepcopy(self.first))
        return self.last(F.silu(y))


class Codec(nn.Module):
    """As VAEs are: no forward of its own, but two methods."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 4, 3)), Net()

    def encode(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.encoder(x) * scale

    def decode(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"sample": self.decoder(x / scale)}


def net(seed: int = 0) -> Any:
    return drawn(Net(), seed)


def carries_nothing(module: nn.Module) -> None:
    """Nothing of ours on the module or on one within it."""
    ours = {"forward", "decode", "encode", "_conv_forward"}
    assert not [name for name, one in module.named_modules() if ours & set(one.__dict__)]


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Afterwards the attributes of each module are the objects they were."""
    before = {name: dict(one.__dict__) for name, one in module.named_modules()}
    kinds = {name: type(one) for name, one in module.named_modules()}
    yield
    for name, one in module.named_modules():
        assert type(one) is kinds[name]
        assert one.__dict__.keys() == before[name].keys()
        for key, value in one.__dict__.items():
            assert value is before[name][key], key


# Copies


def by_deepcopy(module: Any) -> Any:
    return copy.deepcopy(module)


def by_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # a whole module, saved a line above


def by_deepcopy_of_what_holds_it(module: Any) -> Any:
    return copy.deepcopy({"models": [nn.Sequential(module)]})["models"][0][0]


def by_a_moving_average(module: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(module).module


def by_an_ema_of_a_pipeline(module: Any) -> Any:
    class Pipeline:
        def __init__(self) -> None:
            self.vae, self.method = module, module.forward

    return copy.deepcopy(Pipeline()).vae


def by_state(module: Any) -> Any:
    other = net(9)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES: list[Callable[[Any], Any]] = [
    by_deepcopy, by_pickle, by_torch_save, by_deepcopy_of_what_holds_it, by_a_moving_average,
    by_an_ema_of_a_pipeline, by_state,
]  # fmt: skip


@pytest.mark.parametrize("after_a_call", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("way", COPIES, ids=lambda way: way.__name__)
def test_a_copy_made_within_a_block_computes_with_its_own_weights(
    way: Callable[[Any], Any], after_a_call: bool
) -> None:
    original = net()
    with torch.no_grad():
        expected = original(X)
        with stream(original, tuning=FEW_ROWS):
            if after_a_call:
                original(X)
            copied = way(original)
            carries_nothing(copied)
            assert_alike(copied(X), expected)
            for parameter in copied.parameters():
                parameter.data.zero_()
            assert float(copied(X).abs().max()) == 0.0
            assert_alike(original(X), expected)
        assert float(copied(X).abs().max()) == 0.0
        carries_nothing(copied)
        carries_nothing(original)
        assert_alike(original(X), expected)


@pytest.mark.parametrize("way", COPIES[:3], ids=lambda way: way.__name__)
def test_a_copy_streams_by_itself_within_the_block_of_its_original(way: Callable[[Any], Any]) -> None:
    original = net()
    with torch.no_grad(), stream(original, tuning=FEW_ROWS):
        copied = way(original)
        copied.last.weight.mul_(2)
        expected = copied(X)
        steps = Progress()
        with stream(copied, on_progress=steps, tuning=ONE_ROW):
            assert_alike(copied(X), expected)
        assert steps.steps
        carries_nothing(copied)
        before = steps.steps
        copied(X)
        assert steps.steps == before


def test_a_copy_does_not_report_to_the_block_of_its_original() -> None:
    original, steps, report = net(), Progress(), {}
    with torch.no_grad(), stream(original, on_progress=steps, report=report, tuning=ONE_ROW):
        copy.deepcopy(original)(X)
        assert not steps.steps
        original(X)
        assert steps.steps


def test_a_replica_of_data_parallel_computes_with_its_own_weights() -> None:
    original = net()
    with torch.no_grad(), stream(original, tuning=FEW_ROWS):
        expected = original(X)
        replica = original._replicate_for_data_parallel()
        for name, module in original.named_children():
            inner = module._replicate_for_data_parallel()
            for key, parameter in module.named_parameters():
                setattr(inner, key, parameter * 0)
            setattr(replica, name, inner)
        assert "forward" not in replica.__dict__
        assert float(replica(X).abs().max()) == 0.0
        assert_alike(original(X), expected)


def test_a_shallow_copy_computes_what_eager_computes() -> None:
    original = net()
    with torch.no_grad():
        expected = original(X)
        with stream(original, tuning=FEW_ROWS):
            shallow = copy.copy(original)
            assert_alike(shallow(X), expected)
        assert "forward" not in shallow.__dict__
        assert_alike(shallow(X), expected)
        shallow._modules = dict(shallow._modules)
        shallow.last = net(5).last
        assert_alike(shallow(X), shallow.last(F.silu(original.norm(original.first(X)))))


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_a_copy_made_within_a_call_computes_with_its_own_weights(tuning: Tuning) -> None:
    original = net()
    with torch.no_grad():
        expected = original(X)
        original.copies = []
        with stream(original, tuning=tuning):
            assert_alike(original(X), expected)
        (copied,) = original.copies
        assert_alike(copied(X), original.first(X))
        copied.weight.zero_()
        assert_alike(original(X), expected)


def test_copies_of_a_codec_and_of_its_methods() -> None:
    codec = drawn(Codec())
    with torch.no_grad():
        expected = codec.decode(X)
        for target in (codec, codec.decode, codec.decoder, codec.decoder.forward):
            with stream(target, tuning=FEW_ROWS):
                for way in COPIES[:4]:
                    copied = way(codec)
                    carries_nothing(copied)
                    for parameter in copied.parameters():
                        parameter.data.zero_()
                    assert float(copied.decode(X)["sample"].abs().max()) == 0.0
                method = copy.deepcopy(codec.decode)
                assert_alike(method(X), expected)
                assert_alike(codec.decode(X), expected)
            carries_nothing(codec)


def test_what_is_copied_within_a_block_can_be_moved_and_shared() -> None:
    original = net()
    with torch.no_grad(), stream(original, tuning=FEW_ROWS):
        expected = original(X)
        wide = copy.deepcopy(original).double()
        assert_alike(wide(X.double()).float(), expected)
        half = copy.deepcopy(original).to(torch.bfloat16)
        assert half(X.bfloat16()).dtype is torch.bfloat16
        assert_alike(copy.deepcopy(original).share_memory()(X), expected)
        assert copy.deepcopy(original).to("meta")(X.to("meta")).shape == expected.shape


# Afterwards it is as it was


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_block_the_object_is_as_it_was(fails: bool) -> None:
    codec = drawn(Codec())
    for target in (codec, codec.decoder, codec.decode, codec.encode, codec.encoder, codec.decoder.forward):
        with unchanged(codec), torch.no_grad():
            try:
                with stream(target, tuning=FEW_ROWS):
                    codec.decode(X)
                    codec.encode(X[:, :3])
                    if fails:
                        raise LookupError
            except LookupError:
                assert fails


def test_a_forward_that_a_host_had_set_is_there_again_and_was_used() -> None:
    module = net()
    original, ran = module.forward, []

    def hosts(x: Tensor) -> Tensor:
        ran.append(1)
        return original(x) * 2

    module.forward = hosts
    with torch.no_grad(), unchanged(module):
        expected = module(X)
        with stream(module, tuning=FEW_ROWS):
            assert_alike(module(X), expected)
    assert len(ran) == 2
    assert module.forward is hosts


def test_a_forward_that_a_host_sets_and_takes_off_within_the_block() -> None:
    module, ran = net(), []
    with torch.no_grad(), unchanged(module):
        expected = module(X)
        with stream(module, tuning=FEW_ROWS):
            before = module.__dict__.get("forward")
            inner = module.forward
            module.forward = lambda x: ran.append(1) or inner(x) * 2
            assert_alike(module(X), expected * 2)
            if before is None:
                del module.forward
            else:
                module.forward = before
            assert_alike(module(X), expected)
    assert ran == [1]


def test_a_forward_that_a_host_sets_within_the_block_and_leaves_there() -> None:
    """It is the host's: neither lost when the block ends nor a way back into it."""
    module, steps = net(), Progress()
    with torch.no_grad():
        expected = module(X)
        with stream(module, on_progress=steps, tuning=FEW_ROWS):
            inner = module.forward
            hosts = module.forward = lambda x: inner(x) * 2
            module(X)
        assert module.forward is hosts
        before = steps.steps
        assert_alike(module(X), expected * 2)
        assert steps.steps == before


def test_a_method_taken_within_the_block_still_works_after_it() -> None:
    module = net()
    with torch.no_grad():
        expected = module(X)
        with stream(module, tuning=FEW_ROWS):
            forward = module.forward
        assert_alike(forward(X), expected)


def test_a_block_is_left_by_a_generator_that_is_closed() -> None:
    module = net()

    def within() -> Any:
        with torch.no_grad(), stream(module, tuning=FEW_ROWS):
            yield module(X)
            yield module(X)

    generator = within()
    next(generator)
    generator.close()
    carries_nothing(module)


def test_a_decorated_function_runs_within_a_block_each_time() -> None:
    module, steps = net(), Progress()

    @stream(module, on_progress=steps, tuning=FEW_ROWS)
    def run(x: Tensor) -> Tensor:
        return module(x)

    with torch.no_grad():
        expected = module(X)
        for calls in (1, 2):
            before = steps.steps
            assert_alike(run(X), expected)
            assert steps.steps > before, calls
            carries_nothing(module)


@pytest.mark.parametrize("target", [None, 3, "vae", lambda x: x, F.silu, object()])
def test_what_is_no_module_and_no_method_is_refused(target: Any) -> None:
    with pytest.raises(TypeError), stream(target):
        pass


# Blocks that overlap


def in_any_order(count: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(count)))


@pytest.mark.parametrize("order", in_any_order(3), ids=str)
@pytest.mark.parametrize("one_target", [True, False], ids=["one target", "three targets"])
def test_blocks_undo_in_any_order_and_who_is_inside_streams(order: tuple[int, ...], one_target: bool) -> None:
    codec = drawn(Codec())
    targets = [codec.decoder] * 3 if one_target else [codec, codec.decoder, codec.decode]
    with torch.no_grad(), unchanged(codec):
        expected = codec.decode(X)
        progress = [Progress() for _ in targets]
        blocks = [stream(t, on_progress=p, tuning=ONE_ROW) for t, p in zip(targets, progress)]
        inside: list[int] = []
        for index, block in enumerate(blocks):
            block.__enter__()
            inside.append(index)
            assert_alike(codec.decode(X), expected)
        for index in order:
            blocks[index].__exit__(None, None, None)
            inside.remove(index)
            before = [one.steps for one in progress]
            assert_alike(codec.decode(X), expected)
            grew = {i for i, one in enumerate(progress) if one.steps > before[i]}
            assert grew <= set(inside)
            assert bool(grew) == bool(inside)


@pytest.mark.parametrize("order", in_any_order(3), ids=str)
def test_blocks_and_patches_undo_in_any_order(order: tuple[int, ...]) -> None:
    module = net()
    with torch.no_grad(), unchanged(module):
        expected = module(X)
        kinds: list[Any] = [
            stream(module, tuning=FEW_ROWS),
            patched(module, 3, threshold=0),
            stream(module, tuning=ONE_ROW, budget=1),
        ]
        for block in kinds:
            block.__enter__()
            assert_alike(module(X), expected)
        for index in order:
            kinds[index].__exit__(None, None, None)
            assert_alike(module(X), expected)


def test_a_block_entered_while_another_is_left_keeps_its_own_settings() -> None:
    module, one, other = net(), Progress(), Progress()
    with torch.no_grad():
        first = stream(module, on_progress=one, tuning=ONE_ROW)
        first.__enter__()
        module(X)
        second = stream(module, on_progress=other, tuning=ONE_ROW)
        second.__enter__()
        first.__exit__(None, None, None)
        third = stream(module, tuning=ONE_ROW)
        third.__enter__()
        third.__exit__(None, None, None)
        before = one.steps
        module(X)
        assert other.steps
        assert one.steps == before
        second.__exit__(None, None, None)
    carries_nothing(module)


def test_two_threads_each_in_a_block_of_its_own() -> None:
    """The first that entered leaves first, while the second decodes."""
    module, found = net(), {}
    inside, left = threading.Event(), threading.Event()
    with torch.no_grad():
        expected = module(X)

    def first() -> None:
        with torch.no_grad(), stream(module, tuning=FEW_ROWS):
            found["first"] = module(X)
            assert inside.wait(LIMIT)
        left.set()

    def second() -> None:
        steps = Progress()
        with torch.no_grad(), stream(module, on_progress=steps, tuning=ONE_ROW):
            inside.set()
            assert left.wait(LIMIT)
            found["second"] = module(X)
        found["steps"] = steps.steps

    with unchanged(module), ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result(60)
    assert_alike([found["first"], found["second"]], [expected, expected])
    assert found["steps"]


@pytest.mark.parametrize("own_blocks", [True, False], ids=["a block each", "one block"])
def test_many_threads_use_one_module(own_blocks: bool) -> None:
    module = net()
    inputs = [X[:, :, : 3 + index % 6] * index for index in range(24)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]

    def work(x: Tensor) -> Tensor:
        with torch.no_grad(), ExitStack() as stack:
            if own_blocks:
                stack.enter_context(stream(module, tuning=FEW_ROWS, budget=10_000))
            return module(x)

    with unchanged(module), ThreadPoolExecutor(4) as pool, ExitStack() as stack:
        if not own_blocks:
            stack.enter_context(stream(module, tuning=FEW_ROWS))
        assert_alike(list(pool.map(work, inputs)), expected)


def test_many_threads_use_one_streamed_function() -> None:
    module = net()
    run = streamed(module, tuning=FEW_ROWS)
    inputs = [X * index for index in range(16)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]

    def work(x: Tensor) -> Tensor:
        with torch.no_grad():
            return run(x)

    with ThreadPoolExecutor(4) as pool:
        assert_alike(list(pool.map(work, inputs)), expected)


def test_a_block_within_a_call_of_another() -> None:
    """A host that streams the decoder from within the streamed decode."""

    class Host(Codec):
        def decode(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            with stream(self.decoder, tuning=ONE_ROW):
                return super().decode(x * 2, scale)

    host = drawn(Host())
    with torch.no_grad(), unchanged(host):
        expected = drawn(Codec()).decode(X * 2)
        with stream(host, tuning=FEW_ROWS):
            assert_alike(host.decode(X), expected)
            assert_alike(host.decode(X), expected)


# Objects that have no forward


class Calls(nn.Module):
    """Neither forward nor decode nor encode is called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def run(self, x: Tensor) -> Tensor:
        return self.inner.first(x)


def test_decode_and_encode_of_an_object_without_forward_stream() -> None:
    codec = drawn(Codec())
    with torch.no_grad():
        expected = codec.decode(X, scale=2.0), codec.encode(X[:, :3], 3.0)
        for tuning in TUNINGS.values():
            steps = Progress()
            with unchanged(codec), warnings.catch_warnings():
                warnings.simplefilter("error")
                with stream(codec, on_progress=steps, tuning=tuning):
                    decoded = codec.decode(X, scale=2.0)
                    assert steps.steps
                    before = steps.steps
                    encoded = codec.encode(X[:, :3], 3.0)
                    assert steps.steps > before
            assert_alike((decoded, encoded), expected)


@pytest.mark.parametrize("name", ["kl decode", "kl encode", "tiny decode", "vq encode"])
def test_a_vae_of_diffusers_streams_as_a_whole(name: str) -> None:
    pytest.importorskip("diffusers")
    from model_zoo import CASES, draw_weights

    make, run, given = CASES[name]
    vae: Any = draw_weights(make())
    steps = Progress()
    with torch.no_grad():
        expected = run(vae, given)
        with unchanged(vae), stream(vae, on_progress=steps, tuning=Tuning(strip_bytes=8_000, always=True)):
            assert_alike(run(vae, given), expected)
    assert steps.steps > 1


@pytest.mark.parametrize("setting", ["enable_slicing", "enable_tiling"])
def test_a_vae_of_diffusers_with_its_own_tiles_and_slices(setting: str) -> None:
    pytest.importorskip("diffusers")
    from model_zoo import draw_weights, kl

    vae: Any = draw_weights(kl(4))
    getattr(vae, setting)()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 12, 24
    latents = torch.cat([LATENT, LATENT * 0.5])
    with torch.no_grad():
        expected = vae.decode(latents).sample
        for target in (vae, vae.decoder, vae.decode):
            with stream(target, tuning=Tuning(strip_bytes=8_000, always=True)):
                assert_alike(vae.decode(latents).sample, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_audio_decoder_streams_or_says_that_it_does_not() -> None:
    """Its maps have three dimensions."""
    diffusers: Any = pytest.importorskip("diffusers")
    from model_zoo import draw_weights

    widths = {"encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 4}
    vae: Any = draw_weights(
        diffusers.AutoencoderOobleck(downsampling_ratios=[2, 4], channel_multiples=[1, 2], **widths)
    )
    latent, steps = torch.randn(1, 4, 300, generator=torch.Generator().manual_seed(1)), Progress()
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expected = vae.decode(latent).sample
        del said[:]
        with stream(vae.decoder, on_progress=steps, tuning=Tuning(strip_bytes=8_000, always=True)):
            assert_alike(vae.decode(latent).sample, expected)
    assert steps.steps
    assert not said


def test_nothing_is_said_while_a_video_vae_streams(capfd: pytest.CaptureFixture[str]) -> None:
    """Operators that a plan tries and that fail there are not the user's concern."""
    diffusers: Any = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "AutoencoderKLMagvit"):
        pytest.skip("This diffusers has no AutoencoderKLMagvit.")
    from model_zoo import draw_weights

    widths = {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
    vae: Any = draw_weights(diffusers.AutoencoderKLMagvit(latent_channels=4, **widths))
    x = torch.randn(1, 3, 5, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mode()
        capfd.readouterr()
        with stream(vae.encoder, tuning=Tuning(strip_bytes=20_000, always=True)):
            assert_alike(vae.encode(x).latent_dist.mode(), expected)
    assert capfd.readouterr() == ("", "")


def test_a_method_of_a_vae_streams_and_the_others_do_not() -> None:
    codec, steps = drawn(Codec()), Progress()
    with torch.no_grad(), stream(codec.decode, on_progress=steps, tuning=ONE_ROW):
        codec.decode(X)
        before = steps.steps
        codec.encode(X[:, :3])
    assert before
    assert steps.steps == before


def said_within(target: Any, use: Callable[[], Any]) -> tuple[list[str], dict[str, int]]:
    """The warnings and the report of a block."""
    report: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        with stream(target, report=report, tuning=ONE_ROW):
            use()
    return [str(one.message) for one in said], report


def test_what_streams_nothing_says_so_once() -> None:
    calls = Calls()

    def use() -> None:
        for _ in range(3):
            calls.run(X)

    said, report = said_within(calls, use)
    assert len(said) == 1
    assert "stream" in said[0].lower()
    assert "\n" not in said[0]
    assert report


@pytest.mark.parametrize(
    "module",
    [nn.Linear(4, 4), nn.Identity(), nn.Embedding(5, 4)],
    ids=lambda module: type(module).__name__,
)
def test_a_call_in_which_nothing_can_stream_says_so_once(module: nn.Module) -> None:
    x = torch.tensor([1, 2]) if isinstance(module, nn.Embedding) else torch.randn(3, 4)

    def use() -> None:
        for _ in range(3):
            module(x)

    said, report = said_within(module, use)
    assert len(said) == 1
    assert report


def test_what_streams_says_nothing() -> None:
    module, codec = net(), drawn(Codec())
    assert said_within(module, lambda: module(X)) == ([], {})
    assert said_within(codec, lambda: codec.decode(X)) == ([], {})


# Converted models


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("first", ["converted", "streamed"])
def test_a_converted_model_that_streams_is_right(first: str, tuning: Tuning, budget: Optional[int]) -> None:
    module, steps = net(), Progress()
    with torch.no_grad(), unchanged(module):
        expected = module(X)
        if first == "converted":
            convert_model(module, 3, threshold=0)
        with stream(module, tuning=tuning, budget=budget, on_progress=steps):
            if first == "streamed":
                convert_model(module, 3, threshold=0)
            assert_alike(module(X), expected)
            assert_alike(module(X * 2), net()(X * 2))
        assert_alike(module(X), expected)
        restore_model(module)
    assert steps.steps


def test_a_converted_model_streams_in_as_many_strips_as_another() -> None:
    """Streaming sees through the hooks: what they do in strips is no reason to evaluate a map whole."""
    counts: list[int] = []
    reports: list[dict[str, int]] = []
    for converted in (False, True):
        module, steps, report = net(), Progress(), {}
        if converted:
            convert_model(module, 3, threshold=0)
        with torch.no_grad(), stream(module, on_progress=steps, report=report, tuning=ONE_ROW):
            module(torch.randn(1, 4, 33, 16))
        counts.append(steps.steps)
        reports.append(report)
    assert counts[0] == counts[1]
    assert reports[0] == reports[1]


def test_a_copy_of_a_converted_model_that_streams() -> None:
    module = net()
    with torch.no_grad():
        expected = module(X)
        convert_model(module, 3, threshold=0)
        with stream(module, tuning=FEW_ROWS):
            copied = copy.deepcopy(module)
            assert_alike(copied(X), expected)
            for parameter in copied.parameters():
                parameter.data.zero_()
            assert float(copied(X).abs().max()) == 0.0
        assert "forward" not in copied.__dict__
        restore_model(copied)
        carries_nothing(copied)


class Odd(nn.Module):
    """Whose `decode` and `encode` are no methods, each in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(self.convolution(x)))

    @staticmethod
    def decode(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.silu(x), 3, 1)

    @classmethod
    def encode(cls, x: Tensor) -> Tensor:
        return 2 * cls.decode(x)


class OfModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(F.silu(self.encode(x)))


class OfAProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    @property
    def decode(self) -> Any:
        return self.convolution.forward

    encode = decode

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class Halved:
    """Something that can be called and binds to no object."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class OfObjects(Odd):
    decode = Halved()  # type: ignore[assignment]
    encode = functools.partial(F.avg_pool2d, kernel_size=3)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Odd, OfModules, OfAProperty, OfObjects])
def test_decode_that_is_a_module_a_property_or_of_the_class_streams(kind: Any) -> None:
    module = drawn(kind())
    before = dict(kind.__dict__)
    calls: list[Callable[[Tensor], Tensor]] = [module, module.encode, lambda x: module.decode(module.encode(x))]
    with torch.no_grad():
        expected, actual = [run(X) for run in calls], []
        with stream(module, tuning=ONE_ROW, on_progress=(progress := Progress())):
            for run in (module, module.encode, calls[2]):
                progress.steps = 0
                actual.append(run(X))
                assert progress.steps
            if kind is Odd:
                assert torch.equal(kind.decode(X), F.avg_pool2d(F.silu(X), 3, 1))
                assert torch.equal(kind.encode(X), 2 * F.avg_pool2d(F.silu(X), 3, 1))
        assert_alike(actual, expected)
    assert dict(kind.__dict__) == before
    assert not {"forward", "decode", "encode"} & set(module.__dict__)


def test_a_traced_module_streams_and_is_as_it_was() -> None:
    traced: Any = torch.jit.trace(drawn(Net()), X)
    with torch.no_grad():
        expected = traced(X)
        with stream(traced, tuning=ONE_ROW):
            assert_alike(traced(X), expected)
        assert_alike(traced(X), expected)


def renamed(method: Callable[..., Any]) -> Callable[..., Any]:
    """As diffusers wraps `decode`: under a name of its own."""

    def wrapper(self: Any, *args: Any) -> Any:
        return method(self, *args)

    return wrapper


class Guarded(Net):
    @property
    def a_value(self) -> int:
        raise RuntimeError("not before it is trained")

    @renamed
    def decode(self, x: Tensor) -> Tensor:
        return self.forward(x)


def test_a_method_is_found_without_asking_for_other_attributes() -> None:
    module, progress = drawn(Guarded()), Progress()
    with torch.no_grad():
        expected = module.decode(X)
        with stream(module.decode, tuning=ONE_ROW, on_progress=progress):
            assert_alike(module.decode(X), expected)
    assert progress.steps > 1


def test_a_method_of_the_object_alone_streams_in_blocks_within_blocks() -> None:
    module = drawn(Net())
    module.decode = before = types.MethodType(lambda self, x: self.forward(x), module)
    with torch.no_grad():
        expected = module.decode(X)
        with stream(module.decode, tuning=ONE_ROW), stream(module.decode, tuning=FEW_ROWS), stream(module):
            assert_alike(module.decode(X), expected)
    assert module.__dict__["decode"] is before


def test_a_block_that_cannot_begin_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    module, entered = drawn(Codec()), []
    enter = Entry.enter

    def refused(self: Any) -> None:
        entered.append(self)
        if len(entered) == 2:
            raise MemoryError
        enter(self)

    monkeypatch.setattr(Entry, "enter", refused)
    before = dict(Codec.__dict__)
    with pytest.raises(MemoryError), stream(module):
        pass
    assert dict(Codec.__dict__) == before
