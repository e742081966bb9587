"""ComfyUI's way into this folder. Anywhere else (pytest, the WebUI) it imports nothing."""

from importlib.util import find_spec

WEB_DIRECTORY = "./web"

if __package__ and find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint as comfy_entrypoint
