"""Filling holes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comfyui_patchconv.conv.fill import fill


def hole(height: int, width: int, rows: slice, columns: slice) -> Tensor:
    mask = torch.ones(1, 1, height, width)
    mask[..., rows, columns] = 0
    return mask


@pytest.mark.parametrize("edge_aware", [False, True])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_valid_pixels_stay_and_holes_tell_nothing(edge_aware: bool, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    height, width = data.draw(st.integers(1, 33)), data.draw(st.integers(1, 33))
    image = torch.rand(2, 3, height, width)
    mask = (torch.rand(2, 1, height, width) < data.draw(st.sampled_from([0.02, 0.5, 0.9]))).float()
    mask[..., data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = 1
    filled = fill(image, mask, edge_aware)
    kept = mask.bool().expand_as(image)
    assert torch.equal(filled[kept], image[kept])
    assert torch.equal(filled, fill(torch.where(kept, image, torch.nan), mask, edge_aware))
    for one, whole, valid in zip(filled, image, kept):
        for channel in range(3):
            inside = whole[channel][valid[channel]]
            assert one[channel].min() >= inside.min() - 1e-5
            assert one[channel].max() <= inside.max() + 1e-5


@pytest.mark.parametrize("edge_aware", [False, True])
def test_any_size_of_hole_is_filled_with_what_surrounds_it(edge_aware: bool) -> None:
    image = torch.linspace(0, 1, 200).expand(1, 3, 200, 200).clone()
    for mask in (hole(200, 200, slice(20, 180), slice(20, 180)), hole(200, 200, slice(0, 200), slice(150, 200))):
        filled = fill(image, mask, edge_aware)
        edge = (mask[..., 1:] != mask[..., :-1]).expand(1, 3, 200, 199)
        assert (filled[..., 1:] - filled[..., :-1])[edge].abs().max() < 0.05
    constant = fill(torch.full((1, 3, 50, 70), 0.3), hole(50, 70, slice(5, 45), slice(5, 69)), edge_aware)
    assert torch.allclose(constant, torch.full_like(constant, 0.3), atol=1e-6)


def test_edges_go_on_in_the_hole_where_they_are_kept() -> None:
    image = torch.zeros(1, 3, 128, 128)
    image[..., 64:] = 1
    mask = hole(128, 128, slice(40, 90), slice(40, 90))
    between = [
        int(((filled > 0.2) & (filled < 0.8)).sum()) for filled in (fill(image, mask, kept) for kept in (False, True))
    ]
    assert between[1] < between[0] / 4


def test_one_image_of_a_batch_is_filled_as_by_itself() -> None:
    torch.manual_seed(0)
    image, mask = torch.rand(3, 3, 40, 30), (torch.rand(3, 1, 40, 30) < 0.5).float()
    together = fill(image, mask)
    for number in range(3):
        alone = fill(image[number : number + 1], mask[number : number + 1])
        assert torch.allclose(together[number], alone[0], atol=1e-6)


def test_half_precision_is_filled_as_float32_is() -> None:
    image, mask = torch.rand(1, 3, 20, 20), hole(20, 20, slice(5, 15), slice(5, 15))
    filled = fill(image.half(), mask.half())
    assert filled.dtype == torch.float16
    assert torch.allclose(filled.float(), fill(image, mask), atol=2e-3)


def test_what_cannot_be_filled_is_refused() -> None:
    with pytest.raises(ValueError, match="the mask covers a whole image"):
        fill(torch.rand(2, 3, 8, 8), torch.cat([torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)]))
    with pytest.raises(ValueError, match=r"mask \(1, 1, 8, 8\): give"):
        fill(torch.rand(2, 3, 8, 8), torch.ones(1, 1, 8, 8))
