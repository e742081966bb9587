"""Which half of a VAE a module is of, by its name."""

from __future__ import annotations

import pytest

from comfyui_patchconv.hosts.halves import half_of


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("decoder.up.0.block.1.conv1", "decoder"),
        ("encoder.down.0.block.1.conv1", "encoder"),
        ("quant_conv", "encoder"),
        ("post_quant_conv", "decoder"),
        ("autoencoder.decoder.mid.block_1.conv2.conv", "decoder"),
        ("autoencoder.encoder.conv_in.conv", "encoder"),
        ("dconv_encoder.blocks.0.conv1", "encoder"),
        ("decoder_model.blocks.0.conv1", "decoder"),
        ("vocoder.conv_pre", "decoder"),
        ("pre_block.attn.to_q", "encoder"),
        ("mean_proj", "encoder"),
        ("dec_in_proj", "decoder"),
        ("conv1", "encoder"),
        ("conv2", "decoder"),
    ],
)
def test_the_first_part_that_tells_decides(name: str, half: str) -> None:
    assert half_of(name) == half
