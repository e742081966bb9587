"""One convolution in strips: `halo` says which rows a strip needs, `tiling` how a convolution is cut, `forward` and
`backward` run it, `patch` puts it on any model and takes it off again.

Beside them: `partial` convolution, images with `holes` and how to `fill` them, and what makes a strip cheaper on a CPU
(`onednn`, `winograd`, `doubled`).
"""
