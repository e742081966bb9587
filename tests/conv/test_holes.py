"""Networks on an image with holes."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from conv_helpers import assert_same, unchanged
from model_zoo import CASES, draw_weights, encode, image, kl, tiny
from processes import LIMIT
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv import Tiling, convert_model, patched
from comfyui_patchconv.conv.holes import with_holes

ENCODERS = {name.removesuffix(" encode"): case for name, case in CASES.items() if name.endswith("encode")}
STRIPS = Tiling(splits=3, threshold=0)


def hole_in(pixels: Tensor) -> Tensor:
    """A mask with a hole in the middle, and one at the border."""
    height, width = pixels.shape[-2:]
    mask = torch.ones(height, width)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0
    mask[:, -2:] = 0
    return mask


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_no_bit_of_a_latent_depends_on_what_is_masked(name: str) -> None:
    build, run, pixels = ENCODERS[name]
    model, mask = draw_weights(build()), hole_in(pixels)
    other = torch.where(mask.bool(), pixels, 9 * torch.randn_like(pixels))
    latent = with_holes(model, lambda x: run(model, x), pixels, mask)
    assert not any({"forward", "_conv_forward"} & module.__dict__.keys() for module in model.modules())
    assert torch.isfinite(latent).all()
    assert latent.shape == run(model, pixels).shape
    for changed in (other, torch.where(mask.bool(), pixels, torch.nan)):
        assert torch.equal(with_holes(model, lambda x: run(model, x), changed, mask), latent)
    assert not torch.allclose(run(model, other), run(model, pixels))


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_strips_change_nothing(name: str) -> None:
    build, run, pixels = ENCODERS[name]
    model, mask = draw_weights(build()), hole_in(pixels)
    whole = with_holes(model, lambda x: run(model, x), pixels, mask, Tiling(1))
    assert_same(with_holes(model, lambda x: run(model, x), pixels, mask, STRIPS), whole)


@torch.no_grad()
def test_without_holes_it_is_eagers_encode_bit_by_bit() -> None:
    model, pixels = draw_weights(kl(4)), image(3, 36, 32)
    assert torch.equal(with_holes(model, lambda x: encode(model, x), pixels, torch.ones(36, 32)), encode(model, pixels))


@torch.no_grad()
def test_far_from_a_hole_a_network_without_norms_gives_the_result_of_the_whole_image() -> None:
    model, pixels = draw_weights(tiny()), image(3, 96, 32)
    mask = torch.ones(96, 32)
    mask[:4] = 0
    latent, expected = with_holes(model, lambda x: encode(model, x), pixels, mask), encode(model, pixels)
    assert_same(latent[..., -4:, :], expected[..., -4:, :])
    assert not torch.allclose(latent[..., :4, :], expected[..., :4, :])


class Chain(nn.Module):
    """Every kind of step that a mask has to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.second(F.pad(F.silu(self.norm(self.first(image))), (0, 1, 0, 1)))


def continued(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One ring more of valid pixels, each the mean of the valid ones around it: pixel by pixel."""
    image, known = image.clone(), mask.clone()
    for row, column in (mask == 0).nonzero().tolist():
        rows, columns = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
        if mask[rows, columns].any():
            image[0, :, row, column] = image[0, :, rows, columns][:, mask[rows, columns] > 0].mean(1)
            known[row, column] = 1
    return image, known


@torch.no_grad()
def test_masks_and_statistics_follow_the_image() -> None:
    torch.manual_seed(0)
    model, pixels, mask = Chain().double(), torch.randn(1, 3, 20, 17, dtype=torch.float64), torch.ones(20, 17)
    mask[6:13, 5:12] = 0
    found = with_holes(model, model, pixels, mask)

    middle = model.first(continued(pixels, mask)[0])
    mask = mask[1:-1, 1:-1]
    for group in middle.split(4, 1):
        inside = group[..., mask.bool()]
        group.sub_(inside.mean()).div_((inside.var(correction=0) + model.norm.eps).sqrt())
    middle = middle * model.norm.weight[:, None, None] + model.norm.bias[:, None, None]
    middle = F.pad(F.silu(middle), (0, 1, 0, 1))
    mask = F.pad(mask, (0, 1, 0, 1), value=1)
    for known in (mask, continued(middle, mask)[1]):
        middle, _ = continued(middle, known)
    expected = model.second(middle)
    halves = F.avg_pool2d(mask[None, None], 2)[0, 0] >= 0.5
    kept = halves[: expected.shape[2], : expected.shape[3]]
    assert 0 < kept.sum() < kept.numel()
    assert_same(found[..., kept], expected[..., kept], 1e-6)


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_convolutions_over_time_alone_leave_valid_pixels_as_they_are(count: int) -> None:
    torch.manual_seed(0)
    conv, frames = (
        nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)),
        torch.randn(1, count, 12, 12, 4).permute(0, 4, 1, 2, 3),
    )
    mask = torch.ones(12, 12)
    mask[0, 0] = mask[-1, -1] = 0
    kept = mask.bool()
    assert_same(with_holes(conv, conv, frames, mask)[..., kept], conv(frames)[..., kept], 1e-6)


@torch.no_grad()
def test_maps_that_share_memory_give_what_copies_give() -> None:
    """As the first frame of a video that is repeated without a copy."""
    torch.manual_seed(0)
    conv, pixels, mask = nn.Conv3d(3, 4, 3, padding=1), torch.randn(1, 3, 1, 12, 12), torch.ones(12, 12)
    mask[4:8, 4:8] = 0
    found = with_holes(conv, lambda image: conv(image.expand(-1, -1, 3, -1, -1)), pixels, mask)
    expected = with_holes(conv, lambda image: conv(image.repeat(1, 1, 3, 1, 1)), pixels, mask)
    assert torch.equal(found, expected)


class SelfAttention(nn.Module):
    """Attention over all pixels, with 1 x 1 convolutions, as VAEs have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(4, 12, 1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, image: Tensor, mask: Any = None) -> Tensor:
        q, k, v = self.qkv(self.norm(image)).flatten(2).transpose(1, 2).chunk(3, -1)
        return image + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).view_as(image)


@torch.no_grad()
def test_attention_sees_valid_positions_only() -> None:
    torch.manual_seed(0)
    model, pixels, mask = SelfAttention(), torch.randn(1, 4, 8, 7), torch.ones(8, 7)
    mask[2:6, 1:4] = 0
    kept = mask.bool()
    found = with_holes(model, model, pixels, mask)
    row = pixels[..., kept].unsqueeze(2)
    assert_same(found[..., kept], model(row)[:, :, 0], 1e-6)
    assert not found[..., ~kept].any()


@torch.no_grad()
def test_what_convert_model_has_put_on_is_taken_off_and_put_back() -> None:
    model, pixels = draw_weights(kl(4)), image(3, 36, 32)
    mask = hole_in(pixels)
    expected = with_holes(model, lambda x: encode(model, x), pixels, mask)
    convert_model(model, 3, threshold=0)
    with unchanged(model.get_submodule("encoder.conv_in")):
        assert_same(with_holes(model, lambda x: encode(model, x), pixels, mask), expected, 1e-6)


@torch.no_grad()
@torch.no_grad()
def test_calls_of_other_threads_meanwhile_see_all_and_leave_nothing() -> None:
    """The one that began first ends first; and one without holes runs amid them."""
    torch.manual_seed(0)
    model, pixels = SelfAttention(), image(4, 6, 5)
    masks = [torch.ones(6, 5), torch.ones(6, 5)]
    masks[0][2:4, 1:3], masks[1][:2] = 0, 0
    eager, expected = model(pixels), [with_holes(model, model, pixels, mask) for mask in masks]
    began, ended = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def first() -> None:
        def run(held: Tensor) -> Tensor:
            assert began.wait(LIMIT)
            return model(held)

        found.append(with_holes(model, run, pixels, masks[0]))
        ended.set()

    def second(held: Tensor) -> Tensor:
        began.set()
        assert ended.wait(LIMIT)
        return model(held)

    one = threading.Thread(target=first)
    one.start()
    while "forward" not in model.__dict__:
        time.sleep(0.01)
    assert_same(model(pixels), eager)
    found.append(with_holes(model, second, pixels, masks[1]))
    one.join()
    assert "forward" not in model.__dict__
    for result, wanted in zip(found, expected, strict=True):
        assert torch.equal(result, wanted)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["plain", "partial"])
def test_another_thread_may_patch_the_network_meanwhile(padding: str) -> None:
    torch.manual_seed(0)
    model, pixels, mask = draw_weights(kl(4)), image(3, 36, 32), torch.ones(36, 32)
    mask[10:20, 4:30] = 0
    expected = with_holes(model, lambda x: encode(model, x), pixels, mask)

    def run(held: Tensor) -> Tensor:
        entered, left = threading.Event(), threading.Event()

        def patching() -> None:
            with patched(model, 3, threshold=0, padding=padding):
                entered.set()
                assert left.wait(LIMIT)

        other = threading.Thread(target=patching)
        other.start()
        assert entered.wait(LIMIT)
        result = encode(model, held)
        left.set()
        other.join()
        return result

    assert torch.equal(with_holes(model, run, pixels, mask), expected)
    assert all("_conv_forward" not in module.__dict__ for module in model.modules())


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, pixels = draw_weights(kl(4)), image(3, 36, 32)
    states = [unchanged(module) for module in model.modules()]
    for state in states:
        state.__enter__()

    def stop(*_: Any) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        with_holes(model, lambda x: encode(model, x), pixels, hole_in(pixels), Tiling(3, threshold=0, on_strip=stop))
    for state in states:
        state.__exit__(None, None, None)
    assert torch.equal(encode(model, pixels), encode(draw_weights(kl(4)), pixels))


@pytest.mark.parametrize(
    ("shape", "mask"), [((2, 3, 8, 8), (8, 8)), ((1, 3, 8, 8), (8, 9)), ((1, 3, 8, 8), (1, 8, 8)), ((3, 8, 8), (8, 8))]
)
def test_other_shapes_are_refused(shape: tuple[int, ...], mask: tuple[int, ...]) -> None:
    model = nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match="give one image"):
        with_holes(model, model, torch.zeros(shape), torch.ones(mask))


@torch.no_grad()
def test_an_image_that_is_all_hole_gives_finite_values() -> None:
    model, pixels = draw_weights(kl(4)), image(3, 36, 32)
    latent = with_holes(model, lambda x: encode(model, x), pixels, torch.zeros(36, 32))
    assert torch.isfinite(latent).all()
