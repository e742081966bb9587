"""`patchconv decode` over two machines, for which network namespaces stand: torchrun's own rendezvous finds them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import LIMIT, environment
from vae_helpers import random_latent, write_vae

from comfyui_patchconv import cli
from comfyui_patchconv.files.latents import save_latent

pytestmark = pytest.mark.slow


def ip(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True)


class Machine:
    """A network namespace with one device, which is one end of a cable. place: 0 or 1."""

    def __init__(self, place: int) -> None:
        self.name, self.device = f"patchconv{os.getpid()}-{place}", f"pc{place}-{os.getpid()}"
        self.address = f"10.213.97.{place + 1}"

    def up(self) -> None:
        for arguments in (
            ("link", "set", self.device, "netns", self.name),
            ("-n", self.name, "address", "add", f"{self.address}/24", "dev", self.device),
            ("-n", self.name, "link", "set", self.device, "up"),
            ("-n", self.name, "link", "set", "lo", "up"),
        ):
            done = ip(*arguments)
            assert done.returncode == 0, done.stderr

    def start(self, *command: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, sys.executable, *map(str, command)], text=True,
            env=environment(GLOO_SOCKET_IFNAME=self.device, TP_SOCKET_IFNAME=self.device),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def received(self) -> int:
        """Bytes that have come over the cable."""
        found = json.loads(ip("-n", self.name, "-s", "-j", "link", "show", self.device).stdout)
        return found[0]["stats64"]["rx"]["bytes"]


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two with a cable between them, and neither with a way to anywhere else."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` to make network namespaces with")
    found = [Machine(0), Machine(1)]
    try:
        for machine in found:
            done = ip("netns", "add", machine.name)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        done = ip("link", "add", found[0].device, "type", "veth", "peer", "name", found[1].device)
        if done.returncode:
            pytest.skip(f"a cable between network namespaces cannot be made here: {done.stderr.strip()}")
        for machine in found:
            machine.up()
        yield found
    finally:
        for machine in found:
            ip("netns", "delete", machine.name)


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_two_machines_give_the_picture_of_one_process(machines: list[Machine], tmp_path: Path) -> None:
    vae, latent = write_vae(tmp_path / "vae.safetensors"), tmp_path / "one.latent"
    save_latent(latent, random_latent(height=13, width=9))
    given = ["decode", "--vae", vae, "--latent", latent, "--mode", "stream", "--budget", "1MB", "--out"]
    assert cli.main([*map(str, given), str(tmp_path / "one.png")]) == 0
    running = []
    for machine in machines:
        rendezvous = {
            "--nnodes": 2, "--nproc-per-node": 1, "--rdzv-backend": "c10d", "--rdzv-id": "picture",
            "--rdzv-endpoint": f"{machines[0].address}:29400", "--local-addr": machine.address,
            # Namespaces share a host name, by which torchrun would know whose address that is.
            "--rdzv-conf": f"is_host={int(machine is machines[0])}",
        }  # fmt: skip
        options = [one for option in rendezvous.items() for one in option]
        job = "-m", "comfyui_patchconv", *given, tmp_path / "both.png", "--silent-seconds", int(LIMIT)
        running.append(machine.start("-m", "torch.distributed.run", *options, *job))
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert abs(pixels(tmp_path / "both.png") - pixels(tmp_path / "one.png")).max() <= 1
    result = 104 * 72 * 3 * 4
    assert all(machine.received() > result // 2 for machine in machines)
