"""The names that LDM's code gives an encoder's and a decoder's tensors, which the authors of several VAEs keep."""

from __future__ import annotations

import re

from .family import Rename, State, renaming

_NAMES = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def rename_of(levels: int) -> Rename:
    """diffusers' names of LDM's tensors. levels: of the decoder, which LDM counts from the image's side."""
    rename = renaming(*_NAMES)

    def renamed(name: str) -> str:
        return re.sub(r"(?<=\.up_blocks\.)\d{1,3}", lambda level: str(levels - 1 - int(level[0])), rename(name))

    return renamed


def flat(state: State) -> State:
    """Attention's weights as matrices: LDM has convolutions."""
    return {
        name: value.flatten(1) if ".attentions.0.to_" in name and value.dim() > 2 else value
        for name, value in state.items()
    }
