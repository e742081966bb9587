"""A real ComfyUI server, driven through its API.

COMFYUI_PATH: a ComfyUI checkout; without it these tests are skipped. COMFYUI_PYTHON: the Python to start it with,
this one by default. COMFYUI_CHECKPOINT: name of an SD 1.5 checkpoint among the host's models (random weights will do);
by default the first whose name has `sd15` or `v1-5` in it. COMFYUI_FRONT_END: folder of another front end than the
host's own, the `static` of a `comfyui-frontend-package`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_process import HostProcess, checkpoint_in
from safetensors.torch import load_file, save_file

Graph = dict[str, Any]
PACK = Path(__file__).parents[2]
MODELS = ("controlnet", "loras", "patch_diffusion", "patch_ddpm", "upscale_models", "vae")
"""Folders of models that a test can put files into, beside the host's own."""


class Server(HostProcess):
    """One ComfyUI process with its own input, output, user and model folders; the checkout stays as it is.

    packs: folders of custom nodes beside ours.
    """

    def __init__(self, checkout: Path, folder: Path, flags: tuple[str, ...] = (), packs: tuple[Path, ...] = ()) -> None:
        for name in ("input", "output", "temp", "user", *MODELS, "custom_nodes"):
            (folder / name).mkdir()
        (folder / "custom_nodes" / "comfyui_patchconv").symlink_to(PACK)
        for name in ("short_of_memory.py", "looped.py"):
            (folder / "custom_nodes" / name).symlink_to(Path(__file__).with_name(name))
        for pack in packs:
            (folder / "custom_nodes" / pack.name).symlink_to(pack)
        paths = {"base_path": str(folder), **{name: name for name in ("custom_nodes", *MODELS)}}
        (folder / "paths.yaml").write_text(json.dumps({"patchconv": paths}))  # JSON is YAML
        command = [python(), str(Path(__file__).with_name("launch.py")), str(checkout)]
        command += ["--extra-model-paths-config", str(folder / "paths.yaml")]
        for name in ("input", "output", "temp", "user"):
            command += [f"--{name}-directory", str(folder / name)]
        command += ["--database-url", "sqlite:///:memory:", "--preview-method", "none", *flags]
        if front_end := os.environ.get("COMFYUI_FRONT_END"):
            command += ["--front-end-root", str(Path(front_end).resolve())]
        if not torch.cuda.is_available():
            command.append("--cpu")
        super().__init__(command, folder, checkout)

    def queue(self, graph: Graph, preview: str = "default") -> str:
        """preview: as the front end's setting of this name; by default that of the command line."""
        extra = {"preview_method": preview}
        return self.get("/prompt", {"prompt": graph, "client_id": "tests", "extra_data": extra})["prompt_id"]

    def result(self, prompt: str, seconds: float = 1800) -> Any:
        """The history of a prompt once it has ended, one way or another."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt}")
            if prompt in history:
                return history[prompt]
            self.check()
            time.sleep(0.1)
        raise TimeoutError(f"prompt did not end in {seconds} s:\n{self.log()[-3000:]}")

    def run(self, graph: Graph) -> dict[str, Path]:
        """Run a workflow; the file that each of its output nodes has written, the first if there are more."""
        return {node: files[0] for node, files in self.run_batch(graph).items()}

    def run_batch(self, graph: Graph, preview: str = "default") -> dict[str, list[Path]]:
        """Run a workflow; all files that each of its output nodes has written. preview: see `queue`."""
        history = self.result(self.queue(graph, preview))
        assert history["status"]["status_str"] == "success", history["status"]
        return {
            node: [self._file(entry) for entry in output.get("images") or output["latents"]]
            for node, output in history["outputs"].items()
        }

    def _file(self, entry: dict[str, str]) -> Path:
        folder = self.folder / ("temp/temp" if entry["type"] == "temp" else entry["type"])  # the host's own way
        return folder / entry["subfolder"] / entry["filename"]

    def interrupted(self, graph: Graph, sampler: str) -> list[int]:
        """Run a workflow, and interrupt it when its node `sampler` first shows progress; all that was shown."""
        with self.messages() as messages:
            prompt = self.queue(graph)
            while not any(m["type"] == "progress" and m["data"]["node"] == sampler for m in messages):
                self.check()
                time.sleep(0.05)
            asked = time.monotonic()
            self.get("/interrupt", {})
            history = self.result(prompt)
        print(f"stopped after {time.monotonic() - asked:.2f} s")
        assert history["status"]["messages"][-1][0] == "execution_interrupted"
        return [m["data"]["value"] for m in messages if m["type"] == "progress"]

    def error(self, graph: Graph) -> str:
        """Run a workflow that has to fail; the message that the user sees."""
        history = self.result(self.queue(graph))
        messages = [body for kind, body in history["status"]["messages"] if kind == "execution_error"]
        assert messages, history["status"]
        return messages[0]["exception_message"]

    @contextmanager
    def messages(self) -> Iterator[list[Any]]:
        """What the server tells the front end meanwhile, as `{"type": …, "data": …}`."""
        received: list[Any] = []
        listener = subprocess.Popen(
            [python(), str(Path(__file__).with_name("listen.py")), self.address, "tests"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

        thread = threading.Thread(target=lambda: self._read(listener, received), daemon=True)
        thread.start()
        try:
            end = time.monotonic() + 900
            while not received:  # the server greets whoever connects
                assert time.monotonic() < end
                time.sleep(0.05)
            yield received
        finally:
            time.sleep(0.5)  # for what is still on the way
            listener.terminate()
            thread.join()

    @staticmethod
    def _read(listener: subprocess.Popen[str], received: list[Any]) -> None:
        assert listener.stdout is not None
        for line in listener.stdout:
            received.append(json.loads(line))

    def set(self, **settings: Any) -> None:
        """Settings of the front end, as it keeps them."""
        folder = self.folder / "user" / "default"
        folder.mkdir(exist_ok=True)
        (folder / "comfy.settings.json").write_text(json.dumps(settings))

    def latent(self, name: str, size: int, seed: int = 0) -> str:
        """A random SD latent for an image of `size` pixels, where LoadLatent finds it; its name."""
        file = f"{name}.latent"
        noise = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
        save_file({"latent_tensor": noise, "latent_format_version_0": torch.tensor([])}, self.folder / "input" / file)
        return file


def assert_described(server: Server, kind: str, title: str, beside: str) -> None:
    """A node with `title` in its name, all of it explained, in the category of the node `beside`, with a help page."""
    info = server.get("/object_info")
    shown = info[kind]
    assert title in shown["display_name"]
    assert shown["description"]
    assert shown["category"] == info[beside]["category"]
    assert all(options["tooltip"] for _, options in shown["input"]["required"].values())
    assert all(shown["output_tooltips"])
    page = server.get(f"/extensions/comfyui_patchconv/docs/{kind}/en.md").decode()
    assert page.startswith(f"# {shown['display_name']}")
    assert all(f"- `{name}`: " in page for name in shown["input"]["required"])


def python() -> str:
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


def read_image(path: Path) -> np.ndarray:
    """`[H, W, 3]` as whole numbers that can be subtracted."""
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


def read_latent(path: Path) -> torch.Tensor:
    return load_file(path)["latent_tensor"]


@pytest.fixture(scope="session")
def checkout() -> Path:
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set: it names the ComfyUI checkout to test with")
    if not (Path(path) / "main.py").is_file():
        pytest.skip(f"COMFYUI_PATH is {path}, where there is no ComfyUI (no main.py)")
    front_end = os.environ.get("COMFYUI_FRONT_END")
    if front_end and not (Path(front_end) / "index.html").is_file():
        pytest.skip(f"COMFYUI_FRONT_END is {front_end}, where there is no front end (no index.html)")
    return Path(path).resolve()


@pytest.fixture(scope="session")
def checkpoint(checkout: Path) -> str:
    """Name of an SD 1.5 checkpoint, as CheckpointLoaderSimple lists it."""
    folder = checkout / "models" / "checkpoints"
    return checkpoint_in(folder, "COMFYUI_CHECKPOINT", os.environ.get("COMFYUI_CHECKPOINT"))


def serve(checkout: Path, folder: Path, flags: tuple[str, ...] = (), packs: tuple[Path, ...] = ()) -> Iterator[Server]:
    """One that has started, for a fixture to yield from. flags, packs: see `Server`."""
    server = Server(checkout, folder, flags, packs)
    try:
        server.wait(lambda: server.get("/system_stats"))
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serve(checkout, tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def frugal_server(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Weights stored in other types than they are computed in, so that the host casts them at every use."""
    flags = ("--fp8_e4m3fn-unet", "--bf16-vae", *(["--novram"] if torch.cuda.is_available() else []))
    yield from serve(checkout, tmp_path_factory.mktemp("frugal"), flags)
