"""ComfyUI's front end in a real browser: the server of `tests/comfyui` (see there), `CHROMIUM` (see `host_process`)."""

from __future__ import annotations

from comfyui.conftest import checkout, checkpoint, server

__all__ = ["checkout", "checkpoint", "server"]
