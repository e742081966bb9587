"""Patching and restoring whole models, what is chosen, and the settings."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from conv_helpers import Counting, HostConv3d, assert_same, hook, make_seamless
from torch import Tensor, nn

from comfyui_patchconv import (
    PatchConv2d,
    TiledForward,
    Tiling,
    convert_model,
    convolutions,
    patched,
    restore_model,
)
from comfyui_patchconv.conv.patch import unpatched


class Small(nn.Module):
    """Convolutions of all kinds: by name, in a list, of size 1, transposed, of a host's own class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.mix = nn.Conv2d(8, 8, 1)
        self.decoder = nn.ModuleList([nn.ConvTranspose2d(8, 8, 2, 2), Counting(8, 3, 5, padding=2)])
        self.length = nn.Conv1d(3, 3, 3, padding=1)
        self.depth = HostConv3d(3, 3, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.mix(self.encoder(input))
        for layer in self.decoder:
            hidden = layer(hidden)
        return self.depth(self.length(hidden.flatten(2)).view_as(hidden)[:, :, None])


KERNELS = ["encoder.0", "encoder.2", "decoder.1", "length", "depth"]
IMAGE = torch.randn(2, 3, 20, 18, generator=torch.Generator().manual_seed(1))


def patched_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "_conv_forward" in module.__dict__]


def one_sentence(*named: str) -> str:
    return r"^(?!.*\. [A-Z])" + "".join(rf"(?=.*{name})" for name in named) + r".*\.$"


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(IMAGE)


# Patching and restoring


@pytest.mark.parametrize("splits", [0, 1, 3, 4, 50])
@pytest.mark.parametrize("sequential", [True, False])
def test_convert_gives_the_same_result_and_restore_brings_the_methods_back(splits: int, sequential: bool) -> None:
    model = Small()
    expected, keys = run(model), list(model.state_dict())
    assert convert_model(model, splits, sequential, threshold=0) is model
    assert patched_names(model) == KERNELS
    assert list(model.state_dict()) == keys
    assert_same(run(model), expected)
    assert restore_model(model) is model
    assert patched_names(model) == []
    assert torch.equal(run(model), expected)


def test_a_bare_convolution_is_converted_in_place() -> None:
    conv = nn.Conv2d(3, 4, 3)
    assert convert_model(conv, 4) is conv
    assert type(conv) is nn.Conv2d
    assert hook(conv).module is conv


def test_converting_again_changes_the_settings_without_nesting() -> None:
    model = convert_model(Small(), 4)
    convert_model(model, 7, False, 123)
    for name in KERNELS:
        found = hook(model.get_submodule(name))
        assert found.tiling == Tiling(7, False, 123)
        assert found.inner is None
    convert_model(model, 2, names=["length"])
    assert hook(model.length).tiling.splits == 2
    assert hook(model.depth).tiling.splits == 7


def test_restore_leaves_another_extension_in_place() -> None:
    model = Small()
    first: Any = model.encoder[0]
    theirs = make_seamless(first, "circular", "circular").__dict__["_conv_forward"]
    expected = run(model)
    convert_model(model, threshold=0)
    convert_model(model, 3, threshold=0)
    assert hook(first).inner is theirs
    assert_same(run(model), expected)
    restore_model(model)
    assert patched_names(model) == ["encoder.0"]
    assert first._conv_forward is theirs
    assert torch.equal(run(restore_model(model)), expected)


def test_patched_ends_with_its_block() -> None:
    model = Small()
    expected = run(model)
    with patched(model, 3, threshold=0) as inside:
        assert inside is model
        assert patched_names(model) == KERNELS
        assert_same(run(model), expected)
    assert patched_names(model) == []


def test_patched_ends_with_an_exception() -> None:
    model = Small()
    with pytest.raises(KeyError), patched(model, 3):
        raise KeyError
    assert patched_names(model) == []


def test_patched_brings_earlier_settings_back() -> None:
    model = convert_model(Small(), 5, names=["length"])
    before = hook(model.length)
    with patched(model, 3):
        assert hook(model.length).tiling.splits == 3
        with patched(model, 2, names=["depth"]):
            assert [hook(model.length).tiling.splits, hook(model.depth).tiling.splits] == [3, 2]
        assert hook(model.depth).tiling.splits == 3
    assert patched_names(model) == ["length"]
    assert hook(model.length) is before


@pytest.mark.parametrize("settings", [{"splits": -1}, {"names": ["nothing"]}])
def test_patched_with_a_bad_setting_changes_nothing(settings: dict[str, Any]) -> None:
    model = Small()
    with pytest.raises(ValueError), patched(model, **settings):
        pytest.fail("the block is not entered")
    assert patched_names(model) == []


# Blocks that overlap in time

BLOCKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "all": (patched, {"splits": 2}),
    "again": (patched, {"splits": 3}),
    "encoder": (patched, {"splits": 5, "names": "encoder.*"}),
    "length": (patched, {"splits": 6, "names": "length"}),
    "none": (unpatched, {}),
}


def splits_of(model: nn.Module) -> dict[str, int]:
    """Strips of each convolution that runs in strips, by its name."""
    return {name: hook(model.get_submodule(name)).tiling.splits for name in patched_names(model)}


def of_blocks(names: list[str]) -> dict[str, int]:
    """What `splits_of` a model is within these blocks: for each convolution the last one that is about it decides."""
    found = {"length": 9}  # converted before
    for name in names:
        block, settings = BLOCKS[name]
        if block is unpatched:
            found.clear()
            continue
        chosen = convolutions(Small(), names=settings.get("names"))
        found.update({name: settings["splits"] for name, _ in chosen})
    return found


@pytest.mark.parametrize("entered", list(itertools.permutations(BLOCKS, 3)), ids="-".join)
def test_blocks_that_overlap_end_in_any_order(entered: tuple[str, ...]) -> None:
    model = convert_model(Small(), 9, names="length")
    before = hook(model.length)
    for order in itertools.permutations(entered):
        blocks = {name: BLOCKS[name][0](model, **BLOCKS[name][1]) for name in entered}
        inside: list[str] = []
        for name in entered:
            blocks[name].__enter__()
            inside.append(name)
            assert splits_of(model) == of_blocks(inside)
        for name in order:
            blocks[name].__exit__(None, None, None)
            inside.remove(name)
            assert splits_of(model) == of_blocks(inside)
        assert hook(model.length) is before


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_another_extensions_method_is_what_overlapping_blocks_leave(order: tuple[int, ...]) -> None:
    conv = make_seamless(nn.Conv2d(3, 4, 3, padding=1), "circular", "circular")
    theirs, expected = conv._conv_forward, run(conv)
    blocks = [patched(conv, 3, threshold=0), unpatched(conv), patched(conv, 2, threshold=0)]
    for one in blocks:
        one.__enter__()
    for index in order:
        blocks[index].__exit__(None, None, None)
        assert_same(run(conv), expected)
    assert conv._conv_forward is theirs


def test_blocks_of_a_model_and_of_a_part_of_it_overlap() -> None:
    model = Small()
    whole, part = patched(model, 3), patched(model.encoder, 2)
    whole.__enter__()
    part.__enter__()
    whole.__exit__(None, None, None)
    assert splits_of(model) == {"encoder.0": 2, "encoder.2": 2}
    part.__exit__(None, None, None)
    assert patched_names(model) == []


def test_a_block_that_fails_amid_others_takes_nothing_from_them() -> None:
    model = Small()
    with patched(model, 3):
        with pytest.raises(ValueError), patched(model, names="nothing"):
            pytest.fail("the block is not entered")
        assert set(splits_of(model).values()) == {3}
    assert patched_names(model) == []


def test_a_generator_that_is_dropped_amid_its_block_leaves_nothing() -> None:
    model = Small()

    def images() -> Any:
        with patched(model, 3):
            yield run(model)
            yield run(model)

    first, second = images(), images()
    for images_of in (first, second):
        next(images_of)
    del images_of
    first.close()
    assert patched_names(model) == KERNELS
    del second
    gc.collect()
    assert patched_names(model) == []


def test_threads_that_share_a_model_each_have_their_blocks() -> None:
    model = Small()
    expected = run(model)
    failures: list[BaseException] = []

    def work(splits: int) -> None:
        try:
            for _ in range(10):
                with patched(model, splits, threshold=0):
                    assert_same(run(model), expected)
                    assert patched_names(model) == KERNELS
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(splits,)) for splits in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert patched_names(model) == []


# What is chosen


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ({"names": ["encoder.*"]}, ["encoder.0", "encoder.2"]),
        ({"names": ["decoder.*", "length"]}, ["decoder.1", "length"]),
        ({"types": (nn.Conv1d, nn.Conv3d)}, ["length", "depth"]),
        ({"types": (Counting,)}, ["decoder.1"]),
        ({"predicate": lambda name, module: module.stride == (2, 2)}, ["encoder.2"]),
        ({"predicate": lambda name, module: "m" in name}, ["mix"]),
        ({"names": ["[ed]*"], "types": (nn.Conv2d,)}, ["encoder.0", "encoder.2", "decoder.1"]),
    ],
)
def test_names_types_and_predicate_choose(choice: dict[str, Any], chosen: list[str]) -> None:
    model = Small()
    expected = run(model)
    assert [name for name, _ in convolutions(model, **choice)] == chosen
    convert_model(model, 3, threshold=0, **choice)
    assert patched_names(model) == chosen
    assert_same(run(model), expected)


def test_a_model_used_in_two_places_is_converted_once() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    expected = run(model)
    assert_same(run(convert_model(model, 3, threshold=0)), expected)
    assert hook(conv).inner is None


def test_a_single_pattern_is_not_read_letter_by_letter() -> None:
    model = Small()
    with suppress(TypeError, ValueError):
        convert_model(model, names="encoder.*")
    assert patched_names(model) in ([], ["encoder.0", "encoder.2"])


# Copies


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copy_stands_on_its_own(make_copy: Any) -> None:
    model = convert_model(Small(), 3, threshold=0)
    expected = run(model)
    other = make_copy(model)
    for name in KERNELS:
        assert hook(other.get_submodule(name)).module is other.get_submodule(name)
    assert torch.equal(run(other), expected)
    with torch.no_grad():
        other.encoder[0].weight.zero_()
    assert torch.equal(run(model), expected)
    assert not torch.equal(run(other), expected)
    restore_model(other)
    assert patched_names(model) == KERNELS
    assert {hook(model.get_submodule(name)).module is model.get_submodule(name) for name in KERNELS} == {True}


def test_a_copy_chains_to_its_own_extension() -> None:
    conv = make_seamless(nn.Conv2d(3, 4, 3, padding=1), "circular", "circular")
    model = convert_model(nn.Sequential(conv), 3, threshold=0)
    expected = run(model)
    other = copy.deepcopy(model)
    conv.__dict__["mode_x"] = "constant"
    assert torch.equal(run(other), expected)
    inner: Any = hook(other[0]).inner
    assert inner.__self__ is other[0]


def test_a_copy_shares_the_progress_callback() -> None:
    class Bar:
        def __init__(self) -> None:
            self.rows = 0

        def update(self, module: nn.Module, done: int, rows: int) -> None:
            self.rows += 1

    bar = Bar()
    other = copy.deepcopy(convert_model(Small(), 3, threshold=0, on_strip=bar.update))
    run(other)
    assert bar.rows > len(KERNELS)


# Bad input


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"splits": -1}, "-1"),
        ({"splits": 1.5}, "1.5"),
        ({"splits": "4"}, "'4'"),
        ({"splits": True}, "True"),
        ({"splits": None}, "None"),
        ({"threshold": -5}, "-5"),
        ({"threshold": 1e6}, "1000000.0"),
        ({"threshold": "all"}, "'all'"),
        ({"sequential": 1}, "1"),
        ({"sequential": "no"}, "'no'"),
    ],
)
def test_a_wrong_setting_is_named_in_one_sentence(settings: dict[str, Any], value: str) -> None:
    model = Small()
    (setting,) = settings
    with pytest.raises(ValueError, match=one_sentence(setting, value)):
        convert_model(model, **settings)
    with pytest.raises(ValueError, match=one_sentence(setting, value)):
        PatchConv2d(in_channels=3, out_channels=4, kernel_size=3, **settings)
    assert patched_names(model) == []


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        (nn.Sequential(nn.Linear(3, 3)), {}),
        (nn.Conv2d(3, 3, 1), {}),
        (Small(), {"names": ["unet.*"]}),
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), {"types": (nn.ConvTranspose2d,)}),
        (nn.Sequential(nn.Linear(3, 3)), {"types": (nn.Module,), "predicate": lambda *_: True}),
    ],
)
def test_a_model_without_convolutions_is_refused_in_one_sentence(model: nn.Module, choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=one_sentence(type(model).__name__, "no convolution")):
        convert_model(model, **choice)


def test_hook_is_the_documented_class() -> None:
    assert isinstance(convert_model(nn.Conv2d(3, 4, 3)).__dict__["_conv_forward"], TiledForward)
